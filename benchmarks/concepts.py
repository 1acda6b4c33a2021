"""The trimodal corpus as media, and the questions that are asked about it.

Concept    -- one document: names, picture and recordings
Question   -- what the model is asked, and the parts that the answer should have
said       -- whether a name, or its words, are said in other phrases of the training
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

from mmtok import media
from mmtok.documents import Audio, Image, Text
from mmtok.training import corpus
from mmtok.training.conversations import plain

SIZE, RATE = 64, 16_000
RECIPES = Path(__file__).resolve().parent.parent / "recipes"
ANSWERING = {"en": "joe", "fr": "human"}  # the voice of the answers
ASKING = "joe2"  # another rendering of the same voice; asks in all parts but the spoken questions
MODALITIES = ("text", "image", "audio")

Media = Text | Image | Audio


class Concept:
    """One document of the trimodal corpus.

    Attributes:
        id, split: of the document.
        names: language -> name.
    """

    def __init__(self, document: dict, root: Path) -> None:
        self.id, self.split = document["id"], document["split"]
        segments = document["segments"]
        self.names = {s["language"]: s["text"] for s in reversed(segments) if s["type"] == "text"}
        self._picture = root / next(s["path"] for s in segments if s["type"] == "image")
        self._sounds = {(s["voice"], s["language"]): root / s["path"] for s in segments if s["type"] == "audio"}

    @cached_property
    def image(self) -> Image:
        """The picture, 64 x 64 on white."""
        return Image(media.fit_image(media.read_image(self._picture), SIZE))

    def spoken(self, voice: str, language: str = "en") -> Audio | None:
        """A recording of the name, mono at 16 kHz; None where there is none."""
        return self._read(voice, language) if (voice, language) in self._sounds else None

    def _read(self, voice: str, language: str) -> Audio:
        return Audio(media.read_audio(self._sounds[voice, language], RATE), RATE)

    def has(self, part: str) -> bool:
        """Whether there is a true answer for ``text``, ``image``, ``audio``, ``text:fr`` or ``audio:fr``."""
        kind, language = modality(part), language_of(part)
        return {
            "image": True,
            "text": language in self.names,
            "audio": language in self.names and (ANSWERING[language], language) in self._sounds,
        }[kind]

    def truth(self, part: str) -> Media:
        """The true answer, which must be there."""
        kind, language = modality(part), language_of(part)
        if kind == "text":
            return Text(plain(self.names[language]))
        return self.image if kind == "image" else self._read(ANSWERING[language], language)

    def asked(self, kind: str) -> Media:
        """The name, the picture or the spoken name, as a bare question."""
        if kind == "text":
            return Text(plain(self.names["en"]))
        return self.image if kind == "image" else self._read(ASKING, "en")

    def phrased(self, asks: str, phrasing: str) -> tuple[Media, ...]:
        """A question in words, with the picture or the sound before it."""
        text = phrasing.replace("{name}", plain(self.names["en"])).replace("{nom}", plain(self.names.get("fr", "")))
        return (Text(text),) if asks == "text" else (self.asked(asks), Text(text))


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        concept: what it is about.
        segments: of the user's turn.
        answers: the parts that the answer should have: ``text``, ``image``, ``audio:fr`` ...
    """

    concept: Concept
    segments: tuple[Media, ...]
    answers: tuple[str, ...]

    @property
    def modalities(self) -> tuple[str, ...]:
        """Of the answer's parts."""
        return tuple(map(modality, self.answers))


def modality(part: str) -> str:
    """``audio`` of ``audio:fr``."""
    return part.partition(":")[0]


def language_of(part: str) -> str:
    """``fr`` of ``audio:fr``, else ``en``."""
    return part.partition(":")[2] or "en"


def read(data: Path) -> list[Concept]:
    """All concepts of ``trimodal.jsonl``."""
    return [Concept(d, data) for d in corpus.documents(data / "trimodal.jsonl")]


def spoken_questions(data: Path, split: str) -> dict[str, list[tuple[str, Audio]]]:
    """intent -> (question, recording) in every voice, of ``questions.jsonl``."""
    out: dict[str, list[tuple[str, Audio]]] = {}
    for document in corpus.documents(data / "questions.jsonl"):
        if document["split"] == split:
            text, *sounds = document["segments"]
            found = [(text["text"], Audio(media.read_audio(data / s["path"], RATE), RATE)) for s in sounds]
            out.setdefault(document["intent"], []).extend(found)
    return out


def recipe(name: str) -> ModuleType:
    """A module of ``recipes``, which is no package."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SAID = ("said within other phrases", "its words said in other phrases, not together", "a word of it never said")


def said(concepts: Iterable[Concept], data: Path) -> dict[str, str]:
    """id of each `pair-test` concept -> which of ``SAID`` is true of its English name in all that is trained on."""
    bare = recipe("speaking").bare
    texts = [bare(c.names["en"]) for c in concepts if c.split == "train"]
    with open(data / "phrases.jsonl", encoding="utf-8") as lines:
        texts += [json.loads(line)["segments"][0]["text"] for line in lines]
    phrases, known = [f" {t} " for t in texts], {w for t in texts for w in t.split()}
    out = {}
    for c in concepts:
        if c.split == "pair-test":
            name = bare(c.names["en"])
            whole = any(f" {name} " in phrase for phrase in phrases)
            out[c.id] = SAID[0 if whole else 1 if known.issuperset(name.split()) else 2]
    return out

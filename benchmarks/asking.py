"""Which questions are asked: of which concepts, bare or in which words.

Way        -- a kind of question and answer, asked of many concepts
WAYS       -- the nine directions, asked bare, and those that must be asked in words
Corpus     -- the concepts, drawn by a seed, and the phrasings
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from concepts import MODALITIES, RECIPES, Concept, Question, read, spoken_questions

from mmtok.training.conversations import Phrasings

SPLITS = ("train", "pair-test", "test")


class Way(NamedTuple):
    """A kind of question and answer.

    Attributes:
        asks: modality of the question.
        answers: parts of the answer.
        intent: it is asked in the first of this intent's phrasings to train on; empty: bare.
    """

    asks: str
    answers: tuple[str, ...]
    intent: str = ""

    @property
    def name(self) -> str:
        """``text -> image``; ``image -> text audio (name_and_tell)``."""
        return f"{self.asks} -> {' '.join(self.answers)}" + (f" ({self.intent})" if self.intent else "")


# A name asked for text is translated.
BARE = [Way(a, ("text:fr",) if a == b == "text" else (b,)) for a, b in product(MODALITIES, MODALITIES)]
PHRASED = (
    "write_english",
    "name_french",
    "transcribe_french",
    "say_french",
    "tell_french",
    "repeat_french",
    "name_and_tell",
)


class Corpus:
    """The concepts and the phrasings.

    Attributes:
        concepts: all of them.
        evaluated: of train, drawn by seed 0.
        tuned: of train, as many as there are of the others; sampling is chosen by them.
    """

    def __init__(self, data: Path, limit: int) -> None:
        self.data, self.limit = data, limit
        self.concepts = read(data)
        train = [c for c in self.concepts if c.split == "train"]
        drawn = [train[i] for i in np.random.default_rng(0).permutation(len(train))]
        self.evaluated, self.tuned = drawn[:limit], drawn[limit : 2 * limit]
        self.phrasings = Phrasings(RECIPES / "phrasings.toml")
        intents = self.phrasings.intents
        self.ways = [*BARE, *(Way(intents[k].asks, intents[k].answers, k) for k in PHRASED)]

    def members(self, split: str) -> list[Concept]:
        """The concepts of a split that are asked about."""
        return self.evaluated if split == "train" else [c for c in self.concepts if c.split == split][: self.limit]

    def asked(self, way: Way, concepts: Sequence[Concept]) -> list[Question]:
        """A question about each concept that has a true answer and what the question needs."""
        out = []
        for c in concepts:
            if not all(c.has(part) for part in way.answers):
                continue
            if not way.intent:
                out.append(Question(c, (c.asked(way.asks),), way.answers))
            elif "{nom}" not in (phrasing := self.phrasings.intents[way.intent].train[0]) or c.has("text:fr"):
                out.append(Question(c, c.phrased(way.asks, phrasing), way.answers))
        return out

    def requests(self, split: str, per: int, intents: Sequence[str], seed: int) -> list[tuple[str, Question]]:
        """(intent, question) of every phrasing of ``train``, ``held-out`` or ``independent`` (of which there are no
        spoken ones), spoken ones in every voice, about ``per`` concepts of ``evaluated`` each, which have all parts.
        """
        r = np.random.default_rng(seed)
        whole = [c for c in self.evaluated if c.has("text:fr") and c.has("audio:fr")]
        spoken = spoken_questions(self.data, split)
        out = []
        for name in intents:
            intent = self.phrasings.intents[name]
            written = {"train": intent.train, "held-out": intent.held_out, "independent": intent.independent}
            ways: Sequence = spoken.get(name, []) if intent.spoken else written[split]
            for way in ways:
                for i in r.permutation(len(whole))[:per]:
                    c = whole[i]
                    segments = (c.asked(intent.asks), way[1]) if intent.spoken else c.phrased(intent.asks, way)
                    out.append((name, Question(c, segments, intent.answers)))
        return out

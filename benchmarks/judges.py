"""Judges of answers that are not the model: which concept is a text, a picture or a sound taken for?

Exact        -- text: the concept of this very name
Features     -- pictures: nearest by the features of a network of our own, see ``looking``
Pixels       -- pictures: nearest at 16 x 16 pixels
Recordings   -- speech: nearest recording of a name by dynamic time warping over MFCCs, a measure without training
Understood   -- speech: heard by pocketsphinx among all English names whose words it has, see ``recognition``

Each chooses among all concepts of the trimodal corpus. A label is a name as ``shares.words`` writes it; concepts of one
name, which some are in French, are one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from concepts import SIZE, Concept, Media, language_of
from hearing import mfccs, warped
from looking import Network, trained
from recognition import Listener, words_of
from shares import words

from mmtok import media
from mmtok.documents import Audio, Image, Text


class Judge(ABC):
    """What every judge does.

    Attributes:
        name: for the results.
        labels: of the candidates.
    """

    name: str
    labels: list[str]
    language = "en"

    def label(self, concept: Concept) -> str | None:
        """What the right answer is taken for; None where the judge has no such candidate."""
        name = words(concept.names.get(self.language, ""))
        return name if name in self.labels else None

    @abstractmethod
    def ranks(self, answer: Media, labels: Sequence[str]) -> np.ndarray:
        """int [len(labels)]: how many candidates an answer is rather taken for than each label; 0 is the one."""

    def right(self, answer: Media, concept: Concept) -> bool:
        """Whether an answer is taken for a concept, which is no candidate of every judge."""
        label = self.label(concept)
        return label is not None and not self.ranks(answer, [label])[0]


class Naming(Judge):
    """Names one candidate or none; all others are as wrong."""

    @abstractmethod
    def take(self, answer: Media) -> str:
        """The label that an answer is taken for; what no candidate has, where it is taken for none."""

    def ranks(self, answer: Media, labels: Sequence[str]) -> np.ndarray:
        taken = self.take(answer)
        return np.array([int(label != taken) for label in labels])


class Nearest(Judge):
    """The candidate at the smallest distance.

    Attributes:
        known: features of the candidates.
    """

    known: Sequence[np.ndarray]

    @abstractmethod
    def features(self, answer: Media) -> np.ndarray:
        """What is compared."""

    @abstractmethod
    def between(self, features: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
        """float [len(others)]: distances of features."""

    def distances(self, answer: Media) -> np.ndarray:
        """float [candidates]"""
        return self.between(self.features(answer), self.known)

    def ranks(self, answer: Media, labels: Sequence[str]) -> np.ndarray:
        found, own = self.distances(answer), np.array(self.labels)
        return np.array([(found < found[own == label].min()).sum() for label in labels])


class Exact(Naming):
    """Names, case and punctuation aside."""

    name = "exact"

    def __init__(self, concepts: Sequence[Concept], language: str) -> None:
        self.language = language
        self.labels = sorted({words(c.names[language]) for c in concepts if language in c.names})

    def take(self, answer: Media) -> str:
        assert isinstance(answer, Text)
        return words(answer.text)


class Features(Nearest):
    """Cosine of features of a network that was trained on the original pictures."""

    name = "features"

    def __init__(self, concepts: Sequence[Concept], cache: Path) -> None:
        self.labels = [words(c.names["en"]) for c in concepts]
        pictures = np.stack([c.image.pixels for c in concepts])
        self.network: Network = trained(pictures, cache)
        self.known = self.network.features(pictures)

    def features(self, answer: Media) -> np.ndarray:
        """float32 [128] of length 1."""
        assert isinstance(answer, Image)
        return self.network.features(sized(answer.pixels)[None])[0]

    def between(self, features: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
        return 1 - np.asarray(others) @ features


class Pixels(Nearest):
    """Squared differences at 16 x 16 pixels."""

    name = "pixels"

    def __init__(self, concepts: Sequence[Concept]) -> None:
        self.labels = [words(c.names["en"]) for c in concepts]
        self.known = np.stack([self.features(c.image) for c in concepts])

    def features(self, answer: Media) -> np.ndarray:
        """float32 [768]"""
        assert isinstance(answer, Image)
        return media.resize_image(sized(answer.pixels), 16, 16).astype(np.float32).ravel()

    def between(self, features: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
        return np.square(np.asarray(others) - features).sum(1)


class Recordings(Nearest):
    """Dynamic time warping over MFCCs against the recordings that are the answers of a language."""

    name = "recordings"

    def __init__(self, concepts: Sequence[Concept], part: str) -> None:
        self.language = language_of(part)
        there = [c for c in concepts if c.has(part)]
        self.labels = [words(c.names[self.language]) for c in there]
        self.known = [self.features(c.truth(part)) for c in there]

    def features(self, answer: Media) -> np.ndarray:
        """float32 [T, 24], see ``hearing``."""
        assert isinstance(answer, Audio)
        return mfccs(answer.samples[0])

    def between(self, features: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
        return warped(features, others)


class Understood(Naming):
    """pocketsphinx with its own English model and a closed list of names."""

    name = "understood"

    def __init__(self, concepts: Sequence[Concept]) -> None:
        names = [c.names["en"] for c in concepts]
        self.listener = Listener.phrases({words_of(name) for name in names})
        self.of = {words_of(name): words(name) for name in names if self.listener.knows(words_of(name))}
        self.labels = sorted(set(self.of.values()))
        self._heard: dict[Audio, str] = {}

    def take(self, answer: Media) -> str:
        assert isinstance(answer, Audio)
        if answer not in self._heard:  # a third of a second each
            self._heard[answer] = self.of.get(self.listener.hears(answer.samples[0]), "")
        return self._heard[answer]


class Judges:
    """All of them, by the part of an answer: ``text``, ``image``, ``audio``, ``text:fr``, ``audio:fr``."""

    def __init__(self, concepts: Sequence[Concept], cache: Path) -> None:
        self.of: dict[str, list[Judge]] = {
            "text": [Exact(concepts, "en")],
            "text:fr": [Exact(concepts, "fr")],
            "image": [Features(concepts, cache), Pixels(concepts)],
            "audio": [Recordings(concepts, "audio"), Understood(concepts)],
            "audio:fr": [Recordings(concepts, "audio:fr")],
        }

    def main(self, part: str) -> Judge:
        """The first judge of a part, which counts where only one is asked."""
        return self.of[part][0]

    def right(self, part: str, concept: Concept, answer: Media) -> bool:
        """Whether the first judge of the part takes an answer for the concept."""
        return self.main(part).right(answer, concept)

    def language(self, answer: Media) -> str:
        """``en`` or ``fr``: of the nearest recording; whose names have more of a text's words, empty if neither's."""
        if isinstance(answer, Audio):
            near = {language_of(p): self._recordings(p).distances(answer).min() for p in ("audio", "audio:fr")}
            return min(near, key=lambda k: near[k])
        assert isinstance(answer, Text)
        own = words(answer.text).split()
        shares = {}
        for part in ("text", "text:fr"):
            vocabulary = {w for label in self.main(part).labels for w in label.split()}
            shares[language_of(part)] = sum(w in vocabulary for w in own)
        return "" if shares["en"] == shares["fr"] else max(shares, key=lambda k: shares[k])

    def _recordings(self, part: str) -> Nearest:
        judge = self.main(part)
        assert isinstance(judge, Nearest)
        return judge


def sized(pixels: np.ndarray) -> np.ndarray:
    """uint8 [3, H, W] -> uint8 [3, 64, 64]"""
    return pixels if pixels.shape[1:] == (SIZE, SIZE) else media.resize_image(pixels, SIZE, SIZE)

"""Questions and answers made of a token dataset's documents, each of which describes one thing in several modalities.

Concept    -- what is known of one thing: its names, pictures and recordings, as ids
concepts   -- those of a dataset
Phrasings  -- the ways in which people ask, read from TOML
Exchange   -- one question and its answer as ids

An answer is named by its parts: ``text``, ``image``, ``audio``, and in another language than the first ``text:fr``,
``audio:fr``; ``"image audio"`` is a picture and then a sound.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmtok.datasets.shards import TokenDataset
from mmtok.documents import Text
from mmtok.errors import ConfigError, DataError
from mmtok.multimodal import MultimodalTokenizer
from mmtok.training.corpus import split_of

FIRST = "en"  # the language that a part has which names none
ARTICLES = ("a", "an", "the", "some", "un", "une", "le", "la", "les", "des")


@dataclass
class Concept:
    """One thing.

    Attributes:
        id: of its document.
        split: of its document.
        names: language -> what it is called.
        asked: part -> id sequences with their brackets, int64 [n], that a question may hold; of texts none: they are
            written anew each time.
        answered: part -> those that an answer may be.
        intent: of what the document is the question, if it is one.
    """

    id: str
    split: str
    names: dict[str, str] = field(default_factory=dict)
    asked: dict[str, list[np.ndarray]] = field(default_factory=dict)
    answered: dict[str, list[np.ndarray]] = field(default_factory=dict)
    intent: str = ""

    def without(self, part: str) -> Concept:
        """The same thing, of which nobody has a part."""
        less = [{k: v for k, v in x.items() if k != part} for x in (self.asked, self.answered)]
        return Concept(self.id, self.split, self.names, less[0], less[1], self.intent)


def concepts(data: TokenDataset, mm: MultimodalTokenizer, voices: Mapping[str, str]) -> Iterator[Concept]:
    """The documents of a dataset, as they are called for in conversations.

    A segment's ``language`` makes its part; English needs none. A sound whose ``voice`` is not the one of its language
    in ``voices`` is only heard, never said, and a segment with ``"question_only": true`` is only asked with. Of several
    texts in one language the first is the name. Texts that follow each other are one in a dataset: put something
    between them.

    Args:
        data: the dataset.
        mm: its vocabulary's tokenizers.
        voices: language -> the voice that answers.
    """
    modality = [t.modality for t in mm.registry.tokenizers]
    for i in range(len(data)):
        meta = data.meta(i)
        name = str(meta.get("id", i))
        made = Concept(name, meta.get("split") or split_of(name), intent=meta.get("intent", ""))
        segments = data.segments(i)
        ids = data[i]
        for start, end, tokenizer, segment, *_ in data.spans(i).tolist():
            about: Mapping[str, Any] = segments[segment] if segment < len(segments) else {}
            kind, language = modality[tokenizer], about.get("language", FIRST)
            part = kind if language == FIRST or kind == "image" else f"{kind}:{language}"
            span = ids[start:end]
            if kind == "text":
                text = mm.decode(np.concatenate([[mm.registry.bos], span, [mm.registry.eos]])).segments[0]
                if isinstance(text, Text) and language not in made.names:
                    made.names[language] = text.text
                    made.answered[part] = [text_ids(mm, plain(text.text))]
                continue
            made.asked.setdefault(part, []).append(span)
            voice = about.get("voice")
            if not about.get("question_only") and voice in (None, voices.get(language)):
                made.answered.setdefault(part, []).append(span)
        yield made


def text_ids(mm: MultimodalTokenizer, text: str) -> np.ndarray:
    """The ids of a text, int64 [n]."""
    return mm.grammar.segment_ids("text", mm.codes(Text(text)))


def plain(name: str) -> str:
    """A name with a small first letter, but for abbreviations: what the model writes."""
    return name[:1].lower() + name[1:] if name[1:2].islower() or name[1:2] == " " else name


def spelt(name: str, r: np.random.Generator) -> str:
    """One of the ways in which people write a name: as it is, with a small letter, without its article."""
    small = plain(name)
    article, _, rest = small.partition(" ")
    bare = rest if rest and article in ARTICLES else small
    return (name, small, small, small, bare)[r.integers(5)]


class Intent(NamedTuple):
    """What somebody wants, and how it is said.

    Attributes:
        asks: the modality that the question is about: text, image or audio.
        answers: the parts of the answer.
        train, held_out, independent: phrasings to train on, and two lists to judge by; ``{name}`` is the English name
            and ``{nom}`` the French one.
        spoken: the phrasing is a recording.
    """

    asks: str
    answers: tuple[str, ...]
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    independent: tuple[str, ...] = ()
    spoken: bool = False


class Phrasings:
    """The ways in which people ask.

    Args:
        path: TOML as in ``recipes/phrasings.toml``.

    Raises:
        ConfigError: it is not.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            value = tomllib.loads(Path(path).read_text(encoding="utf-8"))
            self.openings, self.endings = list(value.pop("openings")), list(value.pop("endings"))
            self.intents = {
                name: Intent(
                    entry["asks"],
                    tuple(entry["answers"].split()),
                    tuple(entry["train"]),
                    tuple(entry["held_out"]),
                    tuple(entry.get("independent", ())),
                    bool(entry.get("spoken", False)),
                )
                for name, entry in value.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path}: got {type(error).__name__} ({error}), expected openings, endings, and for each intent asks, "
                "answers, train and held_out, as in recipes/phrasings.toml"
            ) from error

    def of(self, asks: str, answers: tuple[str, ...]) -> list[str]:
        """Names of the intents for a kind of exchange."""
        return [k for k, v in self.intents.items() if v.asks == asks and v.answers == answers]

    def phrase(self, intent: str, r: np.random.Generator) -> str:
        """One of the intent's phrasings to train on, varied: with politeness, a large letter, a full stop."""
        choices = self.intents[intent].train
        text = choices[r.integers(len(choices))]
        if not text.endswith(("?", ":")) and ": " not in text:
            text = self.openings[r.integers(len(self.openings))] + text + self.endings[r.integers(len(self.endings))]
            text += ("", "", ".", "!")[r.integers(4)]
        elif text.endswith("?") and r.random() < 0.3:
            text = text[:-1]
        return text[:1].upper() + text[1:] if r.random() < 0.3 else text


class Exchange(NamedTuple):
    """One question and its answer.

    Attributes:
        ids: int64 [n], ``<bos> <user> question <assistant> answer <eos>``.
        start: where the answer begins.
        direction: ``text -> image audio``.
    """

    ids: np.ndarray
    start: int
    direction: str


class Conversations:
    """Makes exchanges.

    Args:
        mm: the vocabulary's tokenizers.
        phrasings: how people ask.
        questions: spoken questions: concepts with an ``intent``; only those of split ``train`` are asked.
        bare: share of questions without a phrasing: only the name, the picture or the sound.
        empty: share of questions that hold nothing, for classifier-free guidance (arXiv:2207.12598).
    """

    def __init__(
        self,
        mm: MultimodalTokenizer,
        phrasings: Phrasings,
        questions: Iterable[Concept] = (),
        bare: float = 0.3,
        empty: float = 0.1,
    ) -> None:
        self.mm, self.phrasings, self.bare, self.empty = mm, phrasings, bare, empty
        self.spoken: dict[str, list[np.ndarray]] = {}
        for question in questions:
            if question.split == "train":
                self.spoken.setdefault(question.intent, []).extend(question.asked.get("audio", []))

    def exchange(
        self, concept: Concept, asks: Sequence[str], answers: Sequence[str], r: np.random.Generator
    ) -> Exchange | None:
        """One exchange about a concept; None if it lacks a part of it.

        Args:
            concept: of what.
            asks: the parts of a bare question; only a question of one part can be phrased.
            answers: the parts of the answer.
            r: the chance.
        """
        answer = []
        for part in answers:
            choices = concept.answered.get(part)
            if not choices:
                return None
            answer.append(choices[r.integers(len(choices))])
        question = self._question(concept, tuple(asks), tuple(answers), r)
        if question is None:
            return None
        if r.random() < self.empty and not all(part.startswith("text") for part in answers):
            question = []  # guidance is for codes
        registry = self.mm.registry
        ids = np.concatenate([[registry.bos, registry.user], *question, [registry.assistant], *answer, [registry.eos]])
        start = 3 + sum(len(x) for x in question)
        return Exchange(ids.astype(np.int64), start, f"{' '.join(asks)} -> {' '.join(answers)}")

    def _question(
        self, concept: Concept, asks: tuple[str, ...], answers: tuple[str, ...], r: np.random.Generator
    ) -> list[np.ndarray] | None:
        intents = self.phrasings.of(asks[0], answers) if len(asks) == 1 else []
        intents = [k for k in intents if not self.phrasings.intents[k].spoken or self.spoken.get(k)]
        # A picture alone does not say which language is wanted: then the answer is in the first one. Text alone is
        # answered with its translation, where text is wanted.
        foreign = any(":" in part for part in answers)
        phrased = foreign
        if asks == ("text",):
            phrased = answers == ("text",) or (foreign and not answers[0].startswith("text:"))
        if intents and (phrased or r.random() >= self.bare):
            intent = intents[r.integers(len(intents))]
            if self.phrasings.intents[intent].spoken:
                recordings = self.spoken[intent]
                words = recordings[r.integers(len(recordings))]
            else:
                phrase = self.phrasings.phrase(intent, r)
                for mark, language in (("{name}", "en"), ("{nom}", "fr")):
                    if mark in phrase:
                        if language not in concept.names:
                            return None
                        phrase = phrase.replace(mark, spelt(concept.names[language], r))
                words = text_ids(self.mm, phrase)
            if asks == ("text",):
                return [words]
            media = self._media(concept, asks[0], r)
            if media is None:
                return None
            return [media, words] if r.random() < 0.7 else [words, media]
        parts = []
        for part in asks:
            language = part.partition(":")[2] or FIRST
            if part.startswith("text"):
                if language not in concept.names:
                    return None
                text = spelt(concept.names[language], r) + ("", "", ".")[r.integers(3)]
                made: np.ndarray | None = text_ids(self.mm, text)
            else:
                made = self._media(concept, part, r)
            if made is None:
                return None
            parts.append(made)
        return parts

    @staticmethod
    def _media(concept: Concept, part: str, r: np.random.Generator) -> np.ndarray | None:
        choices = concept.asked.get(part)
        return choices[r.integers(len(choices))] if choices else None


def draw(
    make: Callable[[np.random.Generator], Exchange | None], room: int, longest: int, r: np.random.Generator
) -> list[Exchange]:
    """Exchanges until they fill so many ids; those that cannot be made or are too long are passed over.

    Raises:
        DataError: none can be made.
    """
    drawn: list[Exchange] = []
    missed = 0
    while True:
        one = make(r)
        if one is None or len(one.ids) > longest:
            missed += 1
            if missed == 10_000:
                raise DataError(f"no exchange of at most {longest} ids can be made of these documents")
            continue
        missed, room = 0, room - len(one.ids)
        if room < 0 and drawn:
            return drawn
        drawn.append(one)

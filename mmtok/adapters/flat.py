"""What the layouts of one flat sequence share: text, with images and sounds between a start and an end id.

- ``Table``: what each id of a published vocabulary is.
- ``Reader``: strict reading of one sequence, with whole-array steps.
- ``Flat``: the adapter; a system says how its images and sounds are read and written.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from mmtok.adapters.base import Adapter, Segment
from mmtok.arrays import integers
from mmtok.blocks import MAX_IDS, is_int
from mmtok.errors import SequenceError, VocabularyError

TEXT = 0  # the kind of the ids of the text model


class Table:
    """Kind and code of every id. What no kind claims is text, and its code is the id itself.

    Args:
        size: of the vocabulary.
        kinds: name of a kind -> its ids, in the order of the codes.

    Attributes:
        kind: int64 [size + 1]: an index into ``names``; the last row stands for ids outside the vocabulary.
        code: int64 [size + 1].
        names: of the kinds; text is the first, outside the last.
        members: the ids of each kind, int64, indexed by code.

    Raises:
        VocabularyError: an id out of range, or with two meanings.
    """

    def __init__(self, size: int, kinds: Mapping[str, Any]) -> None:
        self.size = size
        self.names = ("text", *kinds, "outside")
        self.kind = np.zeros(size + 1, np.int64)
        self.kind[size] = len(kinds) + 1
        self.code = np.arange(size + 1)
        self.members: dict[str, np.ndarray] = {}
        for index, (name, ids) in enumerate(kinds.items(), 1):
            array = np.atleast_1d(integers(ids, name)).astype(np.int64)
            wrong = (array < 0) | (array >= size)
            if wrong.any():
                raise VocabularyError(f"{name} has id {array[wrong][0]}, expected 0..{size - 1}")
            taken = self.kind[array] != TEXT
            if taken.any() or len(np.unique(array)) < len(array):
                raise VocabularyError(f"an id of {name} has two meanings; is this the vocabulary of that system?")
            self.kind[array], self.code[array] = index, np.arange(len(array))
            self.members[name] = array

    def index(self, name: str) -> int:
        """The kind of this name."""
        return self.names.index(name)

    def describe(self, id: int) -> str:
        """An id in words: ``image code 17 (id 21)``, ``image end (id 8196)``, ``text id 42``."""
        if not 0 <= id < self.size:
            return f"id {id} outside the vocabulary of {self.size}"
        name = self.names[self.kind[id]]
        if name == "text":
            return f"text id {id}"
        return f"{name} {self.code[id]} (id {id})" if len(self.members[name]) > 1 else f"{name} (id {id})"


class Reader:
    """One sequence, by kinds and codes.

    Args:
        table: of the vocabulary.
        ids: integers [n].

    Attributes:
        raw: the ids as given.
        kinds, codes: int64 [n].

    Raises:
        VocabularyError: not a one-dimensional array of integers.
    """

    def __init__(self, table: Table, ids: Any) -> None:
        self.raw = integers(ids, "ids")
        if self.raw.ndim != 1:
            raise VocabularyError(f"ids have shape {list(self.raw.shape)}, expected one sequence [n]")
        outside = (self.raw < 0) | (self.raw >= table.size)
        index = np.where(outside, 0, self.raw).astype(np.int64)
        index[outside] = table.size
        self.table, self.kinds, self.codes = table, table.kind[index], table.code[index]
        self._marks = np.flatnonzero(self.kinds != TEXT)
        self._places: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.raw)

    def error(self, at: int, expected: str) -> SequenceError:
        """The error that the id at ``at``, or the end of the sequence, is not what was expected."""
        got = self.table.describe(int(self.raw[at])) if at < len(self) else "the end of the sequence"
        return SequenceError(at, got, expected)

    def text_end(self, at: int) -> int:
        """Where the text that starts at ``at`` ends; ``at`` itself if that is no text."""
        return self._next(self._marks, at)

    def next(self, at: int, kind: str) -> int:
        """The next position, from ``at`` on, of an id of this kind; the length if there is none."""
        if kind not in self._places:
            self._places[kind] = np.flatnonzero(self.kinds == self.table.index(kind))
        return self._next(self._places[kind], at)

    def _next(self, places: np.ndarray, at: int) -> int:
        i = int(np.searchsorted(places, at))
        return int(places[i]) if i < len(places) else len(self)

    def expect(self, at: int, due: np.ndarray) -> np.ndarray:
        """The codes from ``at`` on, which must be of the kinds ``due``, int [m].

        Raises:
            SequenceError: the first that is not.
        """
        got = self.kinds[at : at + len(due)]
        wrong = np.flatnonzero(got != due[: len(got)])
        bad = int(wrong[0]) if len(wrong) else len(got)
        if bad < len(due):
            raise self.error(at + bad, self.table.names[due[bad]])
        return self.codes[at : at + len(due)]

    def one(self, at: int, kind: str) -> int:
        """The code of the id at ``at``, which must be of this kind; errors as for ``expect``."""
        return int(self.expect(at, np.array([self.table.index(kind)]))[0])

    def rows(self, at: int, h: int, w: int, code: str, end: str) -> tuple[np.ndarray, int]:
        """``h`` rows of ``w`` codes, each row followed by an id of kind ``end``; errors as for ``expect``.

        Returns:
            int64 [h, w], and the position behind them.
        """
        total = h * (w + 1)
        offsets = np.arange(min(total, len(self) - at + 1))  # a hostile size must not make us allocate without end
        due = np.where(offsets % (w + 1) == w, self.table.index(end), self.table.index(code))
        return self.expect(at, due).reshape(h, w + 1)[:, :w], at + total


class Flat(Adapter):
    """An adapter to sequences [n]; the tokenizer of its text is named ``text``.

    Attributes:
        table: what each id is.
        openings: the kinds that start an image or a sound.
    """

    table: Table
    openings: ClassVar[tuple[str, ...]]

    @abstractmethod
    def _read(self, reader: Reader, at: int, opening: str) -> tuple[Segment, int]:
        """The image or sound whose first id behind its opening is at ``at``, and the position behind it."""

    @abstractmethod
    def _write(self, segment: Segment) -> np.ndarray:
        """The ids of an image or sound, start and end included; VocabularyError if the layout cannot hold it."""

    def segments(self, ids: Any) -> list[Segment]:
        """Integers [n] to segments. Raises SequenceError and VocabularyError as ``Adapter.segments``."""
        reader, out, at = Reader(self.table, ids), list[Segment](), 0
        while at < len(reader):
            end = reader.text_end(at)
            if end > at:
                out.append(Segment("text", reader.codes[at:end]))
                at = end
                continue
            opening = self.table.names[reader.kinds[at]]
            if opening not in self.openings:
                raise reader.error(at, " or ".join(("text", *self.openings)))
            segment, at = self._read(reader, at + 1, opening)
            out.append(segment)
        return out

    def ids(self, segments: Sequence[Segment]) -> np.ndarray:
        """Segments to int64 [n]. Raises VocabularyError as ``Adapter.ids``."""
        parts = [np.zeros(0, np.int64)]
        for i, segment in enumerate(self._checked(segments)):
            if segment.tokenizer != "text":
                parts.append(self._write(segment))
                continue
            wrong = np.flatnonzero(self.table.kind[segment.codes] != TEXT)
            if len(wrong):
                got = self.table.describe(int(segment.codes[wrong[0]]))
                raise VocabularyError(f"segment {i}: {got} at {wrong[0]}, expected text ids; give it as a segment")
            parts.append(segment.codes)
        return np.concatenate(parts)


def vocabulary_size(vocabulary: Mapping[str, int]) -> int:
    """One past the largest id of a mapping from names to ids.

    Raises:
        VocabularyError: no mapping from names to ids, or ids out of any reasonable range.
    """
    if not isinstance(vocabulary, Mapping) or not all(isinstance(x, str) for x in vocabulary):
        raise VocabularyError(f"vocabulary: got {type(vocabulary).__name__}, expected a mapping from names to ids")
    wrong = [name for name, id in vocabulary.items() if not is_int(id) or not 0 <= id < MAX_IDS]
    if wrong or not vocabulary:
        got = f"{wrong[0]!r} with id {vocabulary[wrong[0]]!r}" if wrong else "no names"
        raise VocabularyError(f"vocabulary: {got}, expected ids from 0 up to {MAX_IDS}")
    return max(vocabulary.values()) + 1


def lookup(vocabulary: Mapping[str, int], names: Sequence[str]) -> list[int]:
    """The ids of these names.

    Raises:
        VocabularyError: one is missing.
    """
    missing = [name for name in names if name not in vocabulary]
    if missing:
        raise VocabularyError(f"the vocabulary has no {missing[0]!r}; is it the vocabulary of that system?")
    return [vocabulary[name] for name in names]

"""The one definition of a valid sequence: strict parsing, codes in and out, sampling masks, loss mask, listing.

    document := <bos> turn* <eos>
    turn     := [<user> | <assistant>] segment*
    segment  := text-id+ | <image> grid(h) grid(w) code{h*w} </image> | <audio> frame* </audio>
    frame    := one code of each level of the audio tokenizer, level 0 first

Audio may have no frames. After <eos> only <pad> may follow. ``Grammar`` parses whole arrays with one vectorised step
a segment; what it inherits from ``Automaton`` follows single tokens of a batch. Both accept the same sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmtok.arrays import integers
from mmtok.automaton import Automaton
from mmtok.automaton import GrammarState as GrammarState
from mmtok.automaton import Restriction as Restriction
from mmtok.automaton import Restrictions as Restrictions
from mmtok.errors import SequenceError, VocabularyError
from mmtok.layouts import Interleaved
from mmtok.registry import VocabularyRegistry
from mmtok.states import BODY, BOS, DONE, EOS, GRID, PAD, START, TURN, Bracketed


@dataclass(frozen=True)
class Span:
    """A part of a document. The spans of a document follow each other without gaps.

    Attributes:
        kind: ``control``, ``text``, ``image`` or ``audio``.
        start, end: slice of the ids, opening and closing tokens included.
        tokenizer: whose codes these are, empty for control.
        shape: image (h, w); audio (K, T); text (n,); control ().
        name: of a control token: ``<bos>``, ``<user>``, ``<assistant>``, ``<eos>``; ``<pad>`` for all the padding.
    """

    kind: str
    start: int
    end: int
    tokenizer: str
    shape: tuple[int, ...]
    name: str = ""


class Grammar(Automaton):
    """The grammar of a registry's sequences.

    Args:
        registry: the vocabulary.
    """

    def __init__(self, registry: VocabularyRegistry) -> None:
        super().__init__(registry)
        self._by_name = {b.tokenizer: b for b in self._brackets}
        # Ids of one tokenizer are one group, so that a run of audio codes is found as one; other classes stay apart.
        self._group = np.arange(len(self.states.members))
        for b in self._brackets:
            self._group[b.codes] = b.codes[0]
        free = np.ones(registry.padded_size, bool)
        free[[registry.pad, registry.bos, *(b.closing for b in self._brackets if b.modality == "image")]] = False
        self._free = free

    # --- parsing

    def spans(self, ids: Any) -> list[Span]:
        """Parse a whole document, <bos> to <eos>, with any padding after it.

        Args:
            ids: integers [n], numpy, torch or a list.

        Raises:
            SequenceError: the first id that cannot follow those before it, or the end if the document is cut short.
            VocabularyError: not a one-dimensional array of integers.
        """
        ids = self._checked(ids)
        spans, phase, _ = self._parse(ids)
        if phase != DONE:
            raise SequenceError(len(ids), "the end of the sequence", self.states.phases[phase].expected)
        return spans

    def resume(self, prompts: Sequence[Any], device: torch.device | str = "cpu") -> GrammarState:
        """The states after prompts, each the beginning of a document: the batch to go on generating from.

        Args:
            prompts: integers [n], one array a row; lengths may differ.
            device: where the states go.

        Raises:
            SequenceError: an id that cannot follow those before it.
            VocabularyError: a prompt is not a one-dimensional array of integers.
        """
        ends = [self._parse(self._checked(ids))[1:] for ids in prompts]
        phase, counter = torch.tensor(ends, dtype=torch.int64, device=device).reshape(len(ends), 2).unbind(-1)
        return GrammarState(phase, counter)

    def _checked(self, ids: Any) -> np.ndarray:
        array = integers(ids, "ids")
        if array.ndim != 1:
            raise VocabularyError(f"ids have shape {list(array.shape)}, expected one sequence [n]")
        return array

    def _classes(self, ids: np.ndarray) -> np.ndarray:
        """The class of each id; ids out of range have that of no id."""
        last = len(self.states.classes) - 1
        return self.states.classes[np.where((ids < 0) | (ids >= last), last, ids).astype(np.int64)]

    def _parse(self, ids: np.ndarray) -> tuple[list[Span], int, int]:
        """The complete spans of a valid beginning of a document, and the (phase, counter) that it ends in."""
        classes, n = self._classes(ids), len(ids)
        group = self._group[classes]
        ends = np.append(np.flatnonzero(group[1:] != group[:-1]) + 1, n)  # of runs of one group

        def run_end(at: int) -> int:
            return int(ends[np.searchsorted(ends, at, side="right")]) if at < n else n

        spans: list[Span] = []
        if n == 0:
            return spans, START, 0
        if classes[0] != BOS:
            raise self._error(ids, 0, START)
        spans.append(Span("control", 0, 1, "", (), "<bos>"))
        at = 1
        while at < n:
            kind = int(classes[at])
            if kind in self.states.texts:
                end = run_end(at)
                spans.append(Span("text", at, end, self.states.texts[kind], (end - at,)))
            elif kind in self.states.brackets:
                bracket = self.states.brackets[kind]
                if bracket.modality == "image":
                    span, phase, counter = self._read_image(ids, classes, at, bracket)
                else:
                    span, phase, counter = self._read_audio(ids, classes, at, run_end(at + 1), bracket)
                if span is None:
                    return spans, phase, counter
                spans.append(span)
            elif kind in (TURN, EOS):
                spans.append(Span("control", at, at + 1, "", (), self.registry.describe(int(ids[at]))))
                if kind == EOS:
                    return spans + self._read_padding(ids, classes, at + 1), DONE, 0
            else:
                raise self._error(ids, at, BODY)
            at = spans[-1].end
        return spans, BODY, 0

    def _read_image(self, ids: np.ndarray, classes: np.ndarray, at: int, b: Bracketed) -> tuple[Span | None, int, int]:
        """The image that opens at ``at``; no span, but a phase and counter, if the ids end within it."""
        n, first = len(ids), b.first
        counter = 0
        for i in (0, 1):
            if at + 1 + i == n:
                return None, first + i, counter
            if classes[at + 1 + i] != GRID:
                raise self._error(ids, at + 1 + i, first + i)
            counter = int(self.states.sizes[ids[at + 1]])
        h, w = counter, int(self.states.sizes[ids[at + 2]])
        start, end = at + 3, at + 3 + h * w
        wrong = np.flatnonzero(classes[start:end] != b.codes[0])
        if len(wrong):
            raise self._error(ids, start + int(wrong[0]), first + 2)
        if end > n:
            return None, first + 2, end - n
        if end == n:
            return None, first + 3, 0
        if ids[end] != b.closing:
            raise self._error(ids, end, first + 3)
        return Span("image", at, end + 1, b.tokenizer, (h, w)), BODY, 0

    def _read_audio(
        self, ids: np.ndarray, classes: np.ndarray, at: int, end: int, b: Bracketed
    ) -> tuple[Span | None, int, int]:
        """The same for audio; ``end`` is where the run of ids of one tokenizer that follows the opening ends."""
        n, k, start = len(ids), len(b.codes), at + 1
        if start == n or classes[start] not in b.codes:
            end = start
        due = np.arange(end - start) % k
        wrong = np.flatnonzero(classes[start:end] - b.codes[0] != due)
        if len(wrong):
            raise self._error(ids, start + int(wrong[0]), b.first + int(due[wrong[0]]))
        frames, level = divmod(end - start, k)
        if end == n:
            return None, b.first + level, frames
        if level or ids[end] != b.closing:
            raise self._error(ids, end, b.first + level)
        return Span("audio", at, end + 1, b.tokenizer, (k, frames)), BODY, 0

    def _read_padding(self, ids: np.ndarray, classes: np.ndarray, at: int) -> list[Span]:
        wrong = np.flatnonzero(classes[at:] != PAD)
        if len(wrong):
            raise self._error(ids, at + int(wrong[0]), DONE)
        return [Span("control", at, len(ids), "", (), "<pad>")] if at < len(ids) else []

    def _error(self, ids: np.ndarray, position: int, phase: int) -> SequenceError:
        got = self.registry.describe(int(ids[position]))
        return SequenceError(position, got, self.states.phases[phase].expected)

    # --- codes

    def segment_codes(self, ids: Any, span: Span) -> np.ndarray:
        """The codes of a text, image or audio span of ``spans(ids)``.

        Returns:
            int64, local to the tokenizer: text [n], image [h, w], audio [K, T].

        Raises:
            SequenceError: the ids are not those that the span was parsed from.
            VocabularyError: a control span, which has no codes.
        """
        if span.kind == "control":
            raise VocabularyError(f"{span.name} at {span.start} is a control span; expected text, image or audio")
        array = self._checked(ids)
        blocks = self.registry.blocks_of(span.tokenizer)
        skip = {"text": (0, 0), "image": (3, 1), "audio": (1, 1)}[span.kind]
        start, end = span.start + skip[0], span.end - skip[1]
        part = array[start:end].astype(np.int64)
        n = int(np.prod(span.shape))
        if len(part) != n:
            raise SequenceError(start, f"{len(part)} codes", f"{n} codes of {span.tokenizer}; parse these ids anew")
        owner = np.resize(np.arange(len(blocks)), n)  # which codebook each position belongs to, frame after frame
        codes = part - np.array([b.start for b in blocks])[owner]
        wrong = np.flatnonzero((codes < 0) | (codes >= np.array([b.size for b in blocks])[owner]))
        if len(wrong):
            at = start + int(wrong[0])
            raise SequenceError(
                at, self.registry.describe(int(array[at])), f"{blocks[owner[wrong[0]]].name} code; parse these ids anew"
            )
        return Interleaved(span.shape[0]).unflatten(codes) if span.kind == "audio" else codes.reshape(span.shape)

    def segment_ids(self, tokenizer: str, codes: Any) -> np.ndarray:
        """The inverse of ``segment_codes``: a whole segment, with opening, size and closing tokens.

        Args:
            tokenizer: a name, or a modality for its default tokenizer.
            codes: integers: text [n], image [h, w] with sides of 1..max_grid, audio [K, T].

        Returns:
            int64 [m].

        Raises:
            VocabularyError: a wrong shape, or a code out of range (its position is named).
        """
        spec, array = self.registry.tokenizer(tokenizer), integers(codes, f"codes of {tokenizer}")
        blocks, grid = self.registry.blocks_of(spec.name), self.registry.block("grid")
        k, index = len(blocks), [self.registry.blocks.index(b) for b in blocks]
        shape, form = array.shape, {"text": "[n]", "image": "[h, w]", "audio": f"[{k}, T]"}[spec.modality]
        if len(shape) != (1 if spec.modality == "text" else 2) or (spec.modality == "audio" and shape[0] != k):
            raise VocabularyError(f"codes of {spec.name} have shape {list(shape)}, expected {form}")
        if spec.modality == "text":
            return self.registry.merge(index[0], array)
        b = self._by_name[spec.name]
        if spec.modality == "audio":
            flat = Interleaved(k).flatten(self.registry.merge(np.array(index)[:, None], array))
            return np.concatenate([[b.opening], flat, [b.closing]])
        if min(shape) < 1 or max(shape) > grid.size:
            raise VocabularyError(
                f"an image of {shape[0]}x{shape[1]} codes, expected sides of 1..{grid.size}: resize the image, or "
                "create a vocabulary with a larger max_grid"
            )
        head = [b.opening, grid.start + shape[0] - 1, grid.start + shape[1] - 1]
        return np.concatenate([head, self.registry.merge(index[0], array).reshape(-1), [b.closing]])

    # --- training and inspection

    def loss_mask(self, ids: Any) -> np.ndarray:
        """Which target ids are a choice, and so worth a loss: all but <pad>, <bos> and the closings of images.

        These alone are forced by what stands before them. The mask looks at single ids, so it serves cut and packed
        sequences too.

        Args:
            ids: integers of any shape, numpy, torch or lists.

        Returns:
            bool numpy array of the same shape.

        Raises:
            VocabularyError: an id outside the vocabulary.
        """
        array = integers(ids, "ids")
        bad = (array < 0) | (array >= len(self._free))
        if bad.any():
            raise VocabularyError(f"id {array[bad][0]}, expected 0..{len(self._free) - 1}")
        return self._free[array.astype(np.int64)]

    def listing(self, ids: Any) -> list[dict[str, Any]]:
        """A document with notes, one row an id.

        Each row has ``position``, ``id``, ``kind`` and ``description``; codes have ``tokenizer`` and ``code``, image
        codes ``row`` and ``column``, audio codes ``frame``, ``level`` and, where the tokenizer says so, ``time_s``.

        Raises:
            SequenceError, VocabularyError: as ``spans``.
        """
        array = self._checked(ids)
        rows: list[dict[str, Any]] = []
        for span in self.spans(array):
            spec = self.registry.tokenizer(span.tokenizer) if span.tokenizer else None
            blocks = self.registry.blocks_of(span.tokenizer) if span.tokenizer else ()
            lead = {"image": 3, "audio": 1}.get(span.kind, 0)
            for position in range(span.start, span.end):
                id, i = int(array[position]), position - span.start - lead
                row: dict[str, Any] = {"position": position, "id": id, "kind": span.kind}
                row["description"] = self.registry.describe(id)
                rows.append(row)
                if spec is None or not 0 <= i < int(np.prod(span.shape)):
                    continue
                row["tokenizer"] = spec.name
                level = i % span.shape[0] if span.kind == "audio" else 0
                row["code"] = id - blocks[level].start
                if span.kind == "image":
                    row["row"], row["column"] = divmod(i, span.shape[1])
                elif span.kind == "audio":
                    row["frame"], row["level"] = divmod(i, span.shape[0])
                    if "hop" in spec.properties and "sample_rate" in spec.properties:
                        row["time_s"] = row["frame"] * spec.properties["hop"] / spec.properties["sample_rate"]
        return rows

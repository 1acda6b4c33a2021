"""The one definition of a valid sequence: strict parsing, codes in and out, sampling masks, loss mask.

    document := <bos> turn* <eos>
    turn     := [<user> | <assistant>] segment*
    segment  := text-id+ | <image> grid(h) grid(w) code{h*w*L} </image> | <audio> code* </audio>

The codes of an image stand row by row, of each position its L levels, from coarse to fine. The codes of a sound stand
in the order of its tokenizer's layout: frame after frame, level after level, or delayed with fill tokens in the gaps.
Audio may have no frames. After <eos> only <pad> may follow. ``Grammar`` parses whole arrays with one vectorised step a
segment; what it inherits from ``Automaton`` follows single tokens of a batch. Both accept the same sequences.
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
from mmtok.errors import LayoutError, SequenceError, VocabularyError
from mmtok.layouts import CodebookMajor, Delayed, Layout
from mmtok.registry import VocabularyRegistry
from mmtok.restrictions import Restriction as Restriction
from mmtok.restrictions import Restrictions as Restrictions
from mmtok.states import BODY, BOS, DONE, EOS, GRID, PAD, START, TURN, Bracketed


@dataclass(frozen=True)
class Span:
    """A part of a document. The spans of a document follow each other without gaps.

    Attributes:
        kind: ``control``, ``text``, ``image`` or ``audio``.
        start, end: slice of the ids, opening and closing tokens included.
        tokenizer: whose codes these are, empty for control.
        shape: of the codes: image (h, w), of several levels (h, w, L); audio (K, T), codebooks and frames; text (n,);
            control ().
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
        self._brackets = tuple(self.states.brackets.values())
        self._by_name = {b.tokenizer: b for b in self._brackets}
        self._grid = registry.block("grid")
        owned = {t.name: registry.blocks_of(t.name) for t in registry.tokenizers}
        self._starts = {name: np.array([b.start for b in blocks]) for name, blocks in owned.items()}
        self._sizes = {name: np.array([b.size for b in blocks], np.uint64) for name, blocks in owned.items()}
        choice = np.ones(registry.padded_size, bool)
        choice[[registry.pad, registry.bos]] = False
        for b in self._brackets:
            choice[b.closing] = b.closes_by_choice
            if isinstance(b.layout, Delayed):
                choice[b.layout.fill] = False
        self._choice = choice

    # --- parsing

    def spans(self, ids: Any) -> list[Span]:
        """Parse a whole document, <bos> to <eos>, with any padding after it.

        Args:
            ids: integers [n], numpy, torch or a list.

        Raises:
            SequenceError: the first id that cannot follow those before it, or the end if the document is cut short.
            VocabularyError: not a one-dimensional array of integers.
        """
        ids = self.checked(ids)
        spans, state = self._parse(ids)
        if state[0] != DONE:
            raise SequenceError(len(ids), "the end of the sequence", self.states.expected(*state))
        return spans

    def resume(self, prompts: Sequence[Any], device: torch.device | str = "cpu") -> GrammarState:
        """The states after prompts, each the beginning of a document: the batch to go on generating from.

        What follows a prompt that ends in text is a segment of its own, which counts for ``Restriction.next``.

        Args:
            prompts: integers [n], one array a row; lengths may differ.
            device: where the states go.

        Raises:
            SequenceError: an id that cannot follow those before it.
            VocabularyError: a prompt is not a one-dimensional array of integers.
        """
        return self._state([self._parse(self.checked(ids))[1] for ids in prompts], device)

    def checked(self, ids: Any) -> np.ndarray:
        """One sequence of integers as a numpy array; raises VocabularyError for anything else."""
        array = integers(ids, "ids")
        if array.ndim != 1:
            raise VocabularyError(f"ids have shape {list(array.shape)}, expected one sequence [n]")
        return array

    def classes(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n]: the class (see ``states``) of each id, integers [n]; ids out of range have that of no id."""
        last = len(self.states.classes) - 1
        return self.states.classes[np.where((ids < 0) | (ids >= last), last, ids).astype(np.int64)]

    def _parse(self, ids: np.ndarray) -> tuple[list[Span], tuple[int, int, int]]:
        """The complete spans of a valid beginning of a document, and the (phase, counter, total) that it ends in."""
        classes, n = self.classes(ids), len(ids)
        spans: list[Span] = []
        if n == 0:
            return spans, (START, 0, 0)
        if classes[0] != BOS:
            raise self._error(ids, 0, START)
        spans.append(Span("control", 0, 1, "", (), "<bos>"))
        at = 1
        while at < n:
            kind = int(classes[at])
            if kind in self.states.texts:
                end = _run_end(classes, at, kind, kind)
                spans.append(Span("text", at, end, self.states.texts[kind], (end - at,)))
            elif kind in self.states.brackets:
                span = self.read_segment(ids, classes, at)
                if span is None:
                    return spans, self.walk_segment(ids, classes, at)
                spans.append(span)
            elif kind in (TURN, EOS):
                spans.append(Span("control", at, at + 1, "", (), self.registry.describe(int(ids[at]))))
                if kind == EOS:
                    return spans + self._read_padding(ids, classes, at + 1), (DONE, 0, 0)
            else:
                raise self._error(ids, at, BODY)
            at = spans[-1].end
        return spans, (BODY, 0, 0)

    def read_segment(self, ids: np.ndarray, classes: np.ndarray, at: int) -> Span | None:
        """The image or sound that opens at ``at``; None if something is wrong with it, or the ids end within it.

        Args:
            ids: integers [n].
            classes: int64 [n], ``classes(ids)``.
            at: position of an opening.
        """
        b = self.states.brackets[int(classes[at])]
        return self._read_image(ids, classes, at, b) if b.layout is None else self._read_audio(ids, classes, at, b)

    def _read_image(self, ids: np.ndarray, classes: np.ndarray, at: int, b: Bracketed) -> Span | None:
        sizes = classes[at + 1 : at + 3] - GRID + 1
        if len(sizes) < 2 or min(sizes) < 1 or max(sizes) > self.registry.max_grid:
            return None
        h, w, levels = int(sizes[0]), int(sizes[1]), len(b.codes)
        start, end = at + 3, at + 3 + h * w * levels
        if end >= len(ids) or ids[end] != b.closing:
            return None
        if (classes[start:end].reshape(-1, levels) != b.codes).any():
            return None
        return Span("image", at, end + 1, b.tokenizer, (h, w) if levels == 1 else (h, w, levels))

    def _read_audio(self, ids: np.ndarray, classes: np.ndarray, at: int, b: Bracketed) -> Span | None:
        assert b.layout is not None
        start = at + 1
        end = _run_end(classes, start, b.codes[0], b.codes[-1] + (b.layout.fill is not None))
        if end >= len(ids) or ids[end] != b.closing:
            return None
        try:
            frames = b.layout.frames(end - start)
        except LayoutError:
            return None
        levels = b.layout.levels(frames)
        if not np.array_equal(classes[start:end], b.codes[0] + np.where(levels < 0, len(b.codes), levels)):
            return None
        return Span("audio", at, end + 1, b.tokenizer, (len(b.codes), frames))

    def walk_segment(self, ids: np.ndarray, classes: np.ndarray, at: int) -> tuple[int, int, int]:
        """The (phase, counter, total) at the end of a segment that opens at ``at`` and is cut short.

        Args:
            ids, classes, at: as for ``read_segment``.

        Raises:
            SequenceError: the first id that cannot follow.
        """
        state = (BODY, 0, 0)
        for i in range(at, len(ids)):
            after = self.states.step(*state, int(classes[i]))
            if after is None:
                raise self._error(ids, i, *state)
            state = after
        return state

    def _read_padding(self, ids: np.ndarray, classes: np.ndarray, at: int) -> list[Span]:
        wrong = np.flatnonzero(classes[at:] != PAD)
        if len(wrong):
            raise self._error(ids, at + int(wrong[0]), DONE)
        return [Span("control", at, len(ids), "", (), "<pad>")] if at < len(ids) else []

    def _error(self, ids: np.ndarray, position: int, phase: int, counter: int = 0, total: int = 0) -> SequenceError:
        got = self.registry.describe(int(ids[position]))
        return SequenceError(position, got, self.states.expected(phase, counter, total))

    # --- codes

    def segment_codes(self, ids: Any, span: Span) -> Any:
        """The codes of a text, image or audio span of ``spans(ids)``.

        Returns:
            int64, local to the tokenizer: text [n], image [h, w], of several levels [h, w, L], audio [K, T]; of a
            layout with several codes of a level in a frame a tuple of K arrays [rate * T].

        Raises:
            SequenceError: the ids are not those that the span was parsed from.
            VocabularyError: a control span, which has no codes.
        """
        if span.kind == "control":
            raise VocabularyError(f"{span.name} at {span.start} is a control span; expected text, image or audio")
        array = self.checked(ids)
        blocks = self.registry.blocks_of(span.tokenizer)
        skip = {"text": (0, 0), "image": (3, 1), "audio": (1, 1)}[span.kind]
        start, end = span.start + skip[0], span.end - skip[1]
        part = array[start:end].astype(np.int64)
        layout = self.layout_of(span)
        if layout is None:
            levels = np.resize(np.arange(len(blocks)), int(np.prod(span.shape)))
        else:
            levels = layout.levels(span.shape[1])
        if len(part) != len(levels):
            raise SequenceError(start, f"{len(part)} ids", f"{len(levels)} of {span.tokenizer}; parse these ids anew")
        low = np.array([b.start for b in blocks])[levels]
        high = np.array([b.end for b in blocks])[levels]
        if layout is not None and layout.fill is not None:
            low, high = (np.where(levels < 0, layout.fill + i, x) for i, x in enumerate((low, high)))
        wrong = np.flatnonzero((part < low) | (part >= high))
        if len(wrong):
            at = start + int(wrong[0])
            want = self.registry.describe(int(low[wrong[0]]))
            raise SequenceError(at, self.registry.describe(int(array[at])), f"{want} or the like; parse these ids anew")
        if layout is None:
            return (part - low).reshape(span.shape)
        codes = layout.unflatten(part)
        if isinstance(codes, tuple):
            return tuple(level - b.start for level, b in zip(codes, blocks, strict=True))
        return codes - np.array([b.start for b in blocks])[:, None]

    def layout_of(self, span: Span) -> Layout | None:
        """The codebook layout of an audio span, over ids; None for any other."""
        return self._by_name[span.tokenizer].layout if span.kind == "audio" else None

    def segment_ids(self, tokenizer: str, codes: Any) -> np.ndarray:
        """The inverse of ``segment_codes``: a whole segment, with opening, size and closing tokens.

        Args:
            tokenizer: a name, or a modality for its default tokenizer.
            codes: integers: text [n], image [h, w] with sides of 1..max_grid, of several levels [h, w, L], audio [K, T]
                or K arrays [rate * T].

        Returns:
            int64 [m].

        Raises:
            VocabularyError: a wrong shape, or a code out of range (its position is named).
        """
        spec = self.registry.tokenizer(tokenizer)
        b = self._by_name.get(spec.name)
        if b is not None and b.layout is not None:
            return self._audio_ids(b, b.layout, codes)
        array = integers(codes, f"codes of {tokenizer}")
        shape, levels = array.shape, len(spec.codebook_sizes)
        form = "[n]" if b is None else "[h, w]" if levels == 1 else f"[h, w, {levels}]"
        if len(shape) != len(form.split()) or (levels > 1 and shape[2] != levels):
            raise VocabularyError(f"codes of {spec.name} have shape {list(shape)}, expected {form}")
        if b is None:
            return self._ids(spec.name, array, 0)
        if min(shape[:2]) < 1 or max(shape[:2]) > self._grid.size:
            raise VocabularyError(
                f"an image of {shape[0]}x{shape[1]} codes, expected sides of 1..{self._grid.size}: resize the image, "
                "or create a vocabulary with a larger max_grid"
            )
        head = (b.opening, self._grid.start + shape[0] - 1, self._grid.start + shape[1] - 1)
        return _enclosed(head, self._ids(spec.name, array, np.arange(levels)).reshape(-1), b.closing)

    def _audio_ids(self, b: Bracketed, layout: Layout, codes: Any) -> np.ndarray:
        """A whole audio segment."""
        k, ragged = len(b.codes), set(layout.rates) != {1}
        parts = [integers(part, f"codes of {b.tokenizer}") for part in (codes if ragged else [codes])]
        shapes = [list(part.shape) for part in parts]
        if ragged and (len(parts) != k or any(part.ndim != 1 for part in parts)):
            form = f"{k} arrays of {layout.rates} codes a frame"
            raise VocabularyError(f"codes of {b.tokenizer} have shapes {shapes}, expected {form}")
        if not ragged and (len(shapes[0]) != 2 or shapes[0][0] != k):
            raise VocabularyError(f"codes of {b.tokenizer} have shape {shapes[0]}, expected [{k}, T]")
        merged: Any = None
        if ragged:
            merged = [self._ids(b.tokenizer, part, level) for level, part in enumerate(parts)]
        else:
            merged = self._ids(b.tokenizer, parts[0], np.arange(k)[:, None])
        try:
            stream = layout.flatten(merged)
        except LayoutError as error:
            raise VocabularyError(f"codes of {b.tokenizer}: {error}") from error
        return _enclosed((b.opening,), stream, b.closing)

    def _ids(self, tokenizer: str, codes: np.ndarray, levels: int | np.ndarray) -> np.ndarray:
        """Codes as ids; their levels broadcast against them. VocabularyError with the first bad position."""
        starts, sizes = self._starts[tokenizer][levels], self._sizes[tokenizer][levels]
        codes = codes.astype(np.int64, copy=False)
        if (codes.view(np.uint64) >= sizes).any():  # a negative number is a large unsigned one
            position = tuple(int(i) for i in np.argwhere(codes.view(np.uint64) >= sizes)[0])
            block = self.registry.blocks_of(tokenizer)[int(np.broadcast_to(levels, codes.shape)[position])]
            where = position if len(position) > 1 else position[0]
            raise VocabularyError(
                f"position {where}: code {codes[position]}, expected 0..{block.size - 1} in block {block.name!r}"
            )
        return codes + starts

    # --- training

    def loss_mask(self, ids: Any) -> np.ndarray:
        """Which target ids are a choice, and so worth a loss: all but those that what stands before them forces.

        Forced are <pad>, <bos>, the closings of images, and in layouts whose end shows earlier the closings of sounds;
        of the fills of a delayed layout all but the first at the deciding level, which ends the sound. The mask looks
        at no more than an id and those of the step before, so it serves cut and packed sequences too; a fill whose
        step before is cut off counts as forced.

        Args:
            ids: integers [..., n], numpy, torch or lists.

        Returns:
            bool numpy array of the same shape.

        Raises:
            VocabularyError: an id outside the vocabulary.
        """
        array = integers(ids, "ids")
        if not array.ndim:
            raise VocabularyError("ids are a single number, expected an array [..., n]")
        bad = (array < 0) | (array >= len(self._choice))
        if bad.any():
            raise VocabularyError(f"id {array[bad][0]}, expected 0..{len(self._choice) - 1}")
        array = array.astype(np.int64)
        mask = self._choice[array]

        def before(steps: int) -> np.ndarray:
            """The classes of the ids so many places earlier, PAD where there are none."""
            shifted = np.full(array.shape, PAD)
            if steps < array.shape[-1]:
                shifted[..., steps:] = self.states.classes[array[..., : array.shape[-1] - steps]]
            return shifted

        for kind, b in self.states.brackets.items():
            if isinstance(b.layout, Delayed) and b.spread:
                k = len(b.codes)
                ends = (before(k) == b.codes[b.deciding]) | (before(b.lead * k + b.deciding + 1) == kind)
                mask |= (array == b.layout.fill) & ends
            elif isinstance(b.layout, CodebookMajor) and len(b.codes) > 1:
                mask |= (array == b.closing) & (before(1) == kind)
        return mask


def _run_end(classes: np.ndarray, start: int, low: int, high: int) -> int:
    """Where the run of classes from ``low`` to ``high`` that begins at ``start`` ends."""
    size = 256
    while start < len(classes):
        part = classes[start : start + size]
        out = (part < low) | (part > high)
        if out.any():
            return start + int(out.argmax())
        start, size = start + size, 2 * size
    return len(classes)


def _enclosed(head: tuple[int, ...], stream: np.ndarray, closing: int) -> np.ndarray:
    """int64: head, stream, closing."""
    out = np.empty(len(head) + len(stream) + 1, np.int64)
    out[: len(head)], out[len(head) : -1], out[-1] = head, stream, closing
    return out

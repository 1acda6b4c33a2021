"""Decode policies for sequences that break the grammar: ``repair`` and ``drop``. Strict parsing is ``Grammar.spans``.

Neither policy invents a code, a pixel or a sample. ``drop`` removes every damaged segment whole. ``repair`` keeps what
of it can be placed: of a picture its whole rows, of a sound the frames whose codes all stand where they belong. Both
return a valid sequence and an account of each change; a valid sequence comes back as it is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mmtok.errors import ConfigError, SequenceError
from mmtok.grammar import Grammar
from mmtok.layouts import CodebookMajor, Delayed, Layout
from mmtok.states import BODY, BOS, EOS, GRID, PAD, TURN, Bracketed

Policy = Literal["repair", "drop"]


@dataclass(frozen=True)
class Edit:
    """One change.

    Attributes:
        action: ``removed``, ``inserted``, ``replaced`` or ``moved`` (a code that stays, behind ones it stood before);
            of media also ``padded`` (an image that keeps the padding to whole codes, as its size is not known).
        position: in the original ids; of an insertion, the id that it stands before.
        count: how many ids.
        what: what and why, in words.
    """

    action: str
    position: int
    count: int
    what: str

    def __str__(self) -> str:
        return f"position {self.position}: {self.action} {self.count} id{'s' * (self.count != 1)}: {self.what}"


@dataclass(frozen=True)
class Recovery:
    """A valid sequence and how it came about.

    Attributes:
        ids: int64 [n], a whole document.
        edits: in order of their positions; empty if the original was valid.
        images: for each image of ``ids``, where its opening was in the original.
    """

    ids: np.ndarray
    edits: tuple[Edit, ...]
    images: tuple[int, ...]


def recover(grammar: Grammar, ids: Any, policy: Policy) -> Recovery:
    """The valid sequence that a policy makes of any ids.

    A single stray id with codes of the segment right behind it counts as damage within the segment; anything else that
    is not a code ends the segment. The first <eos> between segments ends the document.

    Args:
        grammar: of the vocabulary.
        ids: integers [n], numpy, torch or a list; any values.
        policy: ``repair`` or ``drop``.

    Raises:
        ConfigError: another policy.
        VocabularyError: not a one-dimensional array of integers.
    """
    if policy not in ("repair", "drop"):
        raise ConfigError(f"got policy {policy!r}, expected 'repair' or 'drop' (strict is Grammar.spans)")
    return _Recoverer(grammar, grammar.checked(ids), policy).run()


class _Recoverer:
    """One call of ``recover``."""

    def __init__(self, grammar: Grammar, ids: np.ndarray, policy: Policy) -> None:
        self.grammar, self.registry, self.ids, self.policy = grammar, grammar.registry, ids, policy
        self.classes = grammar.classes(ids)
        self.parts: list[np.ndarray] = []
        self.edits: list[Edit] = []
        self.images: list[int] = []
        self._known: dict[str, np.ndarray] = {}  # by tokenizer, so that many damaged segments cost no more than one

    def run(self) -> Recovery:
        ids, classes, n = self.ids, self.classes, len(self.ids)
        states, at = self.grammar.states, 0
        if n and classes[0] == BOS:
            at = 1
        else:
            self._edit("inserted", 0, 1, "<bos>, with which every document begins")
        self.parts.append(np.array([self.registry.bos]))
        between = {*states.texts, TURN, EOS, *states.brackets}
        while at < n and classes[at] != EOS:
            kind = int(classes[at])
            if kind in states.brackets:
                at = self._segment(at, states.brackets[kind])
                continue
            end = at + 1
            while end < n and (classes[end] == kind if kind in between else int(classes[end]) not in between):
                end += 1
            if kind in between:
                self.parts.append(ids[at:end])
            else:
                more = f" and {end - at - 1} more" if end - at > 1 else ""
                self._edit(
                    "removed", at, end - at, f"{self._name(at)}{more}, where {states.expected(BODY, 0, 0)} may follow"
                )
            at = end
        self._end(at)
        out = np.concatenate(self.parts).astype(np.int64)
        return Recovery(out, tuple(sorted(self.edits, key=lambda e: e.position)), tuple(self.images))

    def _end(self, at: int) -> None:
        """The <eos>, and of what follows the padding."""
        self.parts.append(np.array([self.registry.eos]))
        n = len(self.ids)
        if at == n:
            self._edit("inserted", n, 1, "<eos>, with which every document ends")
            return
        padding = self.classes[at + 1 :] == PAD
        self.parts.append(np.full(int(padding.sum()), self.registry.pad))
        self._removed(at + 1 + np.flatnonzero(~padding), "after <eos>, which only <pad> may follow")

    def _segment(self, at: int, b: Bracketed) -> int:
        """Keep, mend or remove the segment that opens at ``at``; where it ends."""
        span = self.grammar.read_segment(self.ids, self.classes, at)
        if span is not None:
            self.parts.append(self.ids[at : span.end])
            self.images += [at] * (b.layout is None)
            return span.end
        end = self._extent(at, b)
        closed = end > at + 1 and self.ids[end - 1] == b.closing
        why = self._error(at)
        body = np.arange(at + 1, end - closed)
        made = None
        if self.policy == "repair":
            first = len(self.edits)
            made = self._image(at, body, b) if b.layout is None else self._audio(at, body, b, b.layout)
            if made is None:
                del self.edits[first:]
        if made is None:
            self._edit("removed", at, end - at, f"a damaged {b.modality}: {why}")
            return end
        if not closed:
            self._edit("inserted", end, 1, f"{self.registry.describe(b.closing)}, which was missing")
        self.parts += [self.ids[at : at + 1], made, np.array([b.closing])]
        self.images += [at] * (b.layout is None)
        return end

    def _extent(self, at: int, b: Bracketed) -> int:
        """One past the last id of a damaged segment."""
        n, start = len(self.ids), at + 1
        if b.layout is None:
            while start < min(n, at + 3) and GRID <= self.classes[start] < GRID + self.registry.max_grid:
                start += 1
        own = self._own(b)
        for i in range(start, n):
            if own[i]:
                continue
            if self.ids[i] == b.closing:
                return i + 1
            if self.ids[i] == b.opening or i + 1 >= n or not own[i + 1]:
                return i
        return n

    def _own(self, b: Bracketed) -> np.ndarray:
        """Which ids are codes or fills of a tokenizer."""
        if b.tokenizer not in self._known:
            last = b.codes[-1] + (b.layout is not None and b.layout.fill is not None)
            self._known[b.tokenizer] = (self.classes >= b.codes[0]) & (self.classes <= last)
        return self._known[b.tokenizer]

    def _image(self, at: int, body: np.ndarray, b: Bracketed) -> np.ndarray | None:
        """Sizes and codes of the rows that are whole; None if there is none, or no size."""
        sizes = self.classes[body[:2]] - GRID + 1
        if len(sizes) < 2 or min(sizes) < 1 or max(sizes) > self.registry.max_grid:
            return None
        height, width, levels = int(sizes[0]), int(sizes[1]), len(b.codes)
        places, own = body[2:], self._own(b)
        if len(places) == height * width * levels:  # each id is in its place: a stray one costs its row
            found = places.reshape(-1, levels)
            index = np.flatnonzero((self.classes[found] == b.codes).all(1))
            found = found[index]
        else:
            codes = places[own[places]]
            starts = _groups(self.classes[codes] - b.codes[0], np.arange(levels), False)
            found = codes[starts[:, None] + np.arange(levels)]
            # A position that lacks a level shows: if only such positions are lost, all others keep their place.
            odd = np.diff(starts, prepend=-levels, append=len(codes)) != levels
            index = np.arange(len(starts)) + (np.cumsum(odd[:-1]) if len(starts) + odd.sum() == height * width else 0)
        rows = np.flatnonzero(np.bincount(index // width, minlength=height)[:height] == width)
        rows_kept, kept = len(rows), found[np.isin(index // width, rows)].reshape(-1)
        if not rows_kept:
            return None
        lost = np.setdiff1d(places, kept)
        self._removed(lost[~own[lost]], f"where {b.tokenizer} codes belong")
        self._removed(lost[own[lost]], f"not in a whole row of {width * levels} codes of the {height}x{width} image")
        first = int(self.ids[at + 1])
        if rows_kept < height:
            self._edit("replaced", at + 1, 1, f"height {height} by {rows_kept}, the rows that are whole")
            first += rows_kept - height
        return np.concatenate([[first, self.ids[at + 2]], self.ids[kept]])

    def _audio(self, at: int, body: np.ndarray, b: Bracketed, layout: Layout) -> np.ndarray | None:
        """The stream of the frames that are whole; None if there is none."""
        own = body[self._own(b)[body]]
        levels = np.where(self.classes[own] > b.codes[-1], -1, self.classes[own] - b.codes[0])
        queues = [own[index] for index in _whole_frames(levels, layout)]
        frames = len(queues[0]) // layout.rates[0]
        if not frames:
            return None
        order = dataclasses.replace(layout, fill=-1) if isinstance(layout, Delayed) else layout
        source = order.flatten(np.stack(queues) if set(layout.rates) == {1} else queues)  # -1 for a fill
        held = np.flatnonzero(source >= 0)
        kept = source[held]
        # Where frames are lost from a delayed sound, what its levels lag behind by closes up: codes pass each other.
        behind = kept < np.maximum.accumulate(kept)
        for place in kept[behind]:
            self._edit(
                "moved", int(place), 1, f"{self._name(int(place))}, behind codes of later frames, as {layout} says"
            )
        fills = body[self.ids[body] == layout.fill] if layout.fill is not None else body[:0]
        self._removed(np.setdiff1d(body, np.concatenate([kept, fills])), f"not in a whole frame of {b.tokenizer}")
        self._fills(np.cumsum(source < 0), held[~behind], kept[~behind], fills, int(body[-1]) + 1, layout)
        return np.where(source < 0, -1 if layout.fill is None else layout.fill, self.ids[source])

    def _fills(
        self, count: np.ndarray, held: np.ndarray, kept: np.ndarray, fills: np.ndarray, end: int, layout: Layout
    ) -> None:
        """The edits of the fills between each two codes that stay, where there are more or fewer than belong.

        Args:
            count: fills in the new stream up to each of its places.
            held, kept: where the codes that stay are in the new stream, and where in the ids.
            fills: where the ids have fills.
            end: one past the last id of the stream.
            layout: of the sound.
        """
        due = np.diff(np.concatenate([[0], count[held], count[-1:]]))
        gap = np.searchsorted(kept, fills)
        have = np.bincount(gap, minlength=len(due))
        why = f"fills, so that the layout {layout} holds"
        for g in np.flatnonzero(have != due):
            if have[g] > due[g]:
                first = int(np.searchsorted(gap, g))
                self._removed(fills[first + due[g] : first + have[g]], why)
            else:
                self._edit("inserted", int(kept[g]) if g < len(kept) else end, int(due[g] - have[g]), why)

    # --- the account

    def _removed(self, positions: np.ndarray, why: str) -> None:
        """An edit for each run of positions."""
        for run in np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1):
            if len(run):
                more = f" and {len(run) - 1} more" if len(run) > 1 else ""
                self._edit("removed", int(run[0]), len(run), f"{self._name(int(run[0]))}{more}, {why}")

    def _edit(self, action: str, position: int, count: int, what: str) -> None:
        self.edits.append(Edit(action, position, count, what))

    def _name(self, position: int) -> str:
        return self.registry.describe(int(self.ids[position]))

    def _error(self, at: int) -> str:
        """What is wrong with the segment at ``at``."""
        try:
            state = self.grammar.walk_segment(self.ids, self.classes, at)
        except SequenceError as error:
            return str(error)
        return f"the sequence ends, expected {self.grammar.states.expected(*state)}"


def _whole_frames(levels: np.ndarray, layout: Layout) -> list[np.ndarray]:
    """Which of the ids of a damaged sound, of these levels (-1 for a fill), are of whole frames: level by level.

    Frame after frame, or in a delayed layout step after step, is looked for, and what does not fit is passed over. A
    frame of a delayed layout must lie in steps that follow each other, so that none is mixed from two. In a
    codebook-major sound nothing tells where a level lost a code: all levels are cut to the shortest.
    """
    if isinstance(layout, CodebookMajor):
        queues: list[np.ndarray] = []
        at = 0
        for q in range(len(layout.rates)):
            level: list[int] = []
            while at < len(levels) and (levels[at] == q or (at + 1 < len(levels) and levels[at + 1] == q)):
                level += [at] * int(levels[at] == q)  # what stands alone among codes of this level is passed over
                at += 1
            queues.append(np.array(level, np.int64))
        frames = min(len(queue) // rate for queue, rate in zip(queues, layout.rates, strict=True))
        return [queue[: frames * rate] for queue, rate in zip(queues, layout.rates, strict=True)]
    slots = np.array(layout.slot_levels)
    starts = _groups(levels, slots, isinstance(layout, Delayed))
    places = starts[:, None] + np.arange(len(slots))
    if not isinstance(layout, Delayed):
        return [places[:, slots == q].reshape(-1) for q in range(len(layout.rates))]
    shifts = np.array(layout.delays) - min(layout.delays)
    out = [np.zeros((0, len(slots)), np.int64)]
    for run in np.split(places, np.flatnonzero(np.diff(starts) != len(slots)) + 1):
        count = max(len(run) - int(shifts.max()), 0)
        frames_here = np.stack([run[shift : shift + count, q] for q, shift in enumerate(shifts)], 1)
        out.append(frames_here[(levels[frames_here] == slots).all(1)])
    return list(np.concatenate(out).T)


def _groups(levels: np.ndarray, slots: np.ndarray, gaps: bool) -> np.ndarray:
    """Where frames begin whose ids have the levels of the slots (or are fills, with gaps), one after another."""
    fits = np.ones(max(len(levels) - len(slots) + 1, 0), bool)
    for j, level in enumerate(slots):
        here = levels[j : j + len(fits)]
        fits &= (here == level) | (gaps & (here == -1))
    starts, at = [], 0
    while at < len(fits):
        if fits[at]:
            starts.append(at)
            at += len(slots)
        else:
            at += 1
    return np.array(starts, np.int64)

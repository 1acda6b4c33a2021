"""The sequence grammar as a batched automaton: each row's state, its next state, and the ids it may sample.

All steps are tensor operations on the device of the state; nothing is read back to the host and no row waits for
another. ``states`` has the definition that is compiled here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmtok.errors import ConfigError, VocabularyError
from mmtok.registry import MODALITIES, VocabularyRegistry
from mmtok.states import BODY, DONE, FAILED, START, States

_NEVER = 2**60  # a cost that no budget reaches
_UNLIMITED = 2**59  # a budget that every real cost fits


class GrammarState(NamedTuple):
    """Where each row of a batch stands.

    Attributes:
        phase: int64 [B], a node of the automaton.
        counter: int64 [B], the number that goes with it.
    """

    phase: Tensor
    counter: Tensor

    @property
    def done(self) -> Tensor:
        """bool [B]: the row has ended, in <eos> or in an id that the grammar forbids. It takes only <pad>."""
        return (self.phase == DONE) | (self.phase == FAILED)

    @property
    def failed(self) -> Tensor:
        """bool [B]: the row was given an id that the grammar forbids."""
        return self.phase == FAILED

    @property
    def between(self) -> Tensor:
        """bool [B]: the row is between segments: text, a turn, another segment or <eos> may follow."""
        return self.phase == BODY


@dataclass(frozen=True)
class Restriction:
    """What one generation may emit, beyond the grammar. Turns are the caller's: no <user> or <assistant> under one.

    Args:
        modalities: which segments may be opened.
        grid: the exact image size (h, w) in codes; None for any.
        min_frames: least length of an audio segment, in frames.
        max_frames: largest length of an audio segment, in frames; None for any.

    Raises:
        ConfigError: an impossible value.
    """

    modalities: tuple[str, ...] = MODALITIES
    grid: tuple[int, int] | None = None
    min_frames: int = 0
    max_frames: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.modalities, str) or any(m not in MODALITIES for m in self.modalities):
            raise ConfigError(f"modalities {self.modalities!r}, expected a tuple of {', '.join(MODALITIES)}")
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 1):
            raise ConfigError(f"grid {self.grid!r}, expected (height, width) in codes, each from 1 up")
        if not 0 <= self.min_frames <= (2**31 if self.max_frames is None else self.max_frames) <= 2**31:
            raise ConfigError(
                f"min_frames {self.min_frames}, max_frames {self.max_frames}, expected 0 <= min <= max <= {2**31}"
            )


class Restrictions(NamedTuple):
    """Restrictions compiled by ``Automaton.restrict``; R is the batch size, or 1 for all rows alike."""

    columns: Tensor  # int64 [R, C]: tokens still needed after each turn token and opening
    text: Tensor  # int64 [R]: tokens still needed after a text id
    grid: Tensor  # int64 [R, 2]: the exact image size, 0 for any
    frames: Tensor  # int64 [R, 2]: least and largest number of audio frames


class _Tables(NamedTuple):
    """The automaton on one device: P phases, C classes, V padded ids."""

    classes: Tensor  # int64 [V + 1]
    sizes: Tensor  # int64 [V + 1]
    next: Tensor  # int64 [P, C]
    steps: Tensor  # int64 [P, 4], see Phase.count
    cost: Tensor  # int64 [P, 6], see Phase.cost
    modality: Tensor  # int64 [P]
    allowed: Tensor  # bool [P + X, V]: the ids that may follow; X more rows for the phases with bulk, without it
    lean: Tensor  # int64 [P]: the row of `allowed` without bulk, the phase itself if it has none
    columns: Tensor  # int64 [C']: <user>, <assistant> and the openings
    closings: Tensor  # int64 [A]: the closings of audio
    grid: Tensor  # int64 [G]: 1..max_grid


class Automaton:
    """The grammar of a registry's sequences, for batches.

    Args:
        registry: the vocabulary.
    """

    def __init__(self, registry: VocabularyRegistry) -> None:
        self.registry = registry
        self.states = States(registry)
        self._brackets = tuple(self.states.brackets.values())
        self._grid = slice(registry.block("grid").start, registry.block("grid").end)
        self._tables = {torch.device("cpu"): self._compile()}
        self._unrestricted: dict[torch.device, Restrictions] = {}  # no restriction, compiled once a device

    def _compile(self) -> _Tables:
        states, size = self.states, self.registry.padded_size
        phases = states.phases
        follow = np.full((len(phases), len(states.members)), FAILED)
        allowed = np.zeros((len(phases), size), bool)
        lean = np.arange(len(phases))
        lean_rows: list[np.ndarray] = []
        for p, phase in enumerate(phases):
            for c, target in phase.edges.items():
                follow[p, c] = target
                allowed[p, states.members[c]] = True
            if phase.bulk:
                lean[p] = len(phases) + len(lean_rows)
                lean_rows.append(allowed[p].copy())
                for c in phase.bulk:
                    lean_rows[-1][states.members[c]] = False
        allowed[FAILED, self.registry.pad] = True
        openings = [b.opening for b in self._brackets]
        arrays = (
            states.classes,
            states.sizes,
            follow,
            np.array([p.count for p in phases]),
            np.array([p.cost for p in phases]),
            np.array([MODALITIES.index(p.modality) for p in phases]),
            np.stack([*allowed, *lean_rows]),
            lean,
            np.array([self.registry.user, self.registry.assistant, *openings]),
            np.array([b.closing for b in self._brackets if b.modality == "audio"], np.int64),
            np.arange(1, self._grid.stop - self._grid.start + 1),
        )
        return _Tables(*(torch.from_numpy(a) for a in arrays))

    def _on(self, device: torch.device) -> _Tables:
        """The tables on a device, copied there once."""
        if device not in self._tables:
            self._tables[device] = _Tables(*(t.to(device) for t in self._tables[torch.device("cpu")]))
        return self._tables[device]

    def initial(self, batch: int, device: torch.device | str = "cpu") -> GrammarState:
        """``batch`` rows that await <bos>."""
        phase = torch.full((batch,), START, dtype=torch.int64, device=device)
        return GrammarState(phase, torch.zeros_like(phase))

    def advance(self, state: GrammarState, ids: Tensor) -> GrammarState:
        """The states after one more id in each row.

        Args:
            state: of B rows.
            ids: integers [B] on the device of the state. A row that has ended takes <pad>.

        Returns:
            New states; a row whose id the grammar forbids becomes ``failed``, and stays so.
        """
        t = self._on(state.phase.device)
        ids = ids.long()
        last = len(t.classes) - 1
        index = torch.where((ids < 0) | (ids >= last), last, ids)
        a, b, c, d = t.steps[state.phase].unbind(-1)
        size = t.sizes[index]
        count = a * state.counter + b * size + c * state.counter * size + d
        phase = t.next[state.phase, t.classes[index]]
        phase = phase + ((t.cost[phase, 3] > 0) & (count == 0)).long()  # the last code of an image
        return GrammarState(phase, torch.where(phase <= FAILED, 0, count))

    def modality(self, state: GrammarState) -> Tensor:
        """int64 [B]: index into ``MODALITIES`` of the segment that each row is in; text between segments."""
        return self._on(state.phase.device).modality[state.phase]

    def restrict(
        self, restrictions: Restriction | Sequence[Restriction | None], device: torch.device | str = "cpu"
    ) -> Restrictions:
        """Compile restrictions once, for many calls of ``mask``.

        Args:
            restrictions: one for all rows, or one a row; None leaves a row free.
            device: where the states are.

        Raises:
            VocabularyError: an image grid that the registry has no size tokens for.
            ConfigError: an empty list.
        """
        rows = [restrictions] if isinstance(restrictions, Restriction) else list(restrictions)
        if not rows:
            raise ConfigError("got no restrictions, expected one a row or one")
        columns, text, grid, frames = [], [], [], []
        for row in rows:
            r = row or Restriction()
            h, w = r.grid or (1, 1)
            if max(h, w) > self.registry.max_grid:
                raise VocabularyError(
                    f"image grid {h}x{w}, expected at most {self.registry.max_grid}: make the image smaller, or "
                    "create a vocabulary with a larger max_grid"
                )
            costs = [1 if row is None else _NEVER] * 2
            for b in self._brackets:
                least = 4 + h * w if b.modality == "image" else 2 + len(b.codes) * r.min_frames
                costs.append(least if b.modality in r.modalities else _NEVER)
            columns.append(costs)
            text.append(1 if "text" in r.modalities else _NEVER)
            grid.append(r.grid or (0, 0))
            frames.append((r.min_frames, _NEVER if r.max_frames is None else r.max_frames))
        return Restrictions(*(torch.tensor(x, device=device) for x in (columns, text, grid, frames)))

    def needed(
        self, state: GrammarState, restrict: Restrictions | Restriction | Sequence[Restriction | None] | None = None
    ) -> Tensor:
        """int64 [B]: the tokens each row needs at least to reach its end, the final <eos> included."""
        return self._needed(state, self._compiled(restrict, len(state.phase), state.phase.device))

    def mask(
        self,
        state: GrammarState,
        budget: Tensor | None = None,
        restrict: Restrictions | Restriction | Sequence[Restriction | None] | None = None,
    ) -> Tensor:
        """The ids that each row may emit next. Never empty.

        A segment is opened, and an image made as large, only if it can be closed within the budget. A row whose
        budget is too small for any end takes the shortest one.

        Args:
            state: of B rows.
            budget: int64 [B], tokens that each row may still emit, the final <eos> included; None for no limit.
            restrict: see :class:`Restriction`; compile it with :meth:`restrict` when it serves many steps.

        Returns:
            bool [B, padded_size], True for an id that may follow.
        """
        t = self._on(state.phase.device)
        phase, count = state
        r = self._compiled(restrict, len(phase), phase.device)
        cost = t.cost[phase]
        levels, height = cost[:, 4], cost[:, 1] > 0
        least, most = r.frames.unbind(-1)
        limit = torch.full_like(phase, _UNLIMITED) if budget is None else budget.long().clamp(max=_UNLIMITED)
        left = torch.maximum(limit, self._needed(state, r)) - 1  # tokens left after this one

        # Text between segments, or another audio frame: with or without, as whole rows of the table.
        frame = levels + 1 + levels * (least - count - 1).clamp(min=0)
        bulk = torch.where(phase == BODY, r.text, torch.where(count < most, frame, _NEVER))
        mask = t.allowed[torch.where(bulk <= left, phase, t.lean[phase])]

        # The rest are few columns. Openings are allowed in the body alone, closings at the end of a frame alone.
        mask[:, t.columns] &= r.columns <= left[:, None]
        mask[:, t.closings] &= (count >= least)[:, None]

        # Image sizes: the height leaves room for the least width, the width for height * width codes.
        exact = torch.where(height, r.grid[:, 0], r.grid[:, 1])[:, None]
        each = torch.where(height, r.grid[:, 1].clamp(min=1), count)[:, None]
        fits = t.grid * each <= (left - torch.where(height, 3, 2))[:, None]
        mask[:, self._grid] &= fits & ((exact == 0) | (t.grid == exact))
        return mask

    def _needed(self, state: GrammarState, r: Restrictions) -> Tensor:
        """Phase.cost, evaluated."""
        phase, n = state
        base, area, width, count, levels, started = self._on(phase.device).cost[phase].unbind(-1)
        h, w = r.grid.clamp(min=1).unbind(-1)
        missing = (r.frames[:, 0] - n - started).clamp(min=0)
        return base + area * h * w + width * n * w + count * n + levels * missing

    def _compiled(
        self,
        restrict: Restrictions | Restriction | Sequence[Restriction | None] | None,
        batch: int,
        device: torch.device,
    ) -> Restrictions:
        if restrict is None:
            if device not in self._unrestricted:
                self._unrestricted[device] = self.restrict([None], device)
            return self._unrestricted[device]
        if not isinstance(restrict, Restrictions):
            restrict = self.restrict(restrict, device)
        if len(restrict.text) not in (1, batch):
            raise ConfigError(f"got {len(restrict.text)} restrictions for {batch} rows, expected one a row or one")
        return restrict

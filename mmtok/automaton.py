"""The sequence grammar as a batched automaton: each row's state, its next state, and the ids it may sample.

``states`` has the definition; here its edges become one table, and a step of a batch a few operations on whole arrays.
An id may follow if its edge is open and the way from there to the end fits the budget. The way is never shorter than
one less than the way from here: so an edge that skips what is still owed (a sound below its least duration, a picture
smaller than its exact size) shows by its cost, and no rule of its own is needed.

On a GPU, and under ``torch.compile``, the operations are torch's: nothing is read back to the host, and no row waits
for another. On the CPU the same lines run on numpy views of the tensors: numpy's operations on small arrays cost less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmtok.errors import ConfigError
from mmtok.registry import MODALITIES, VocabularyRegistry
from mmtok.restrictions import NEVER, Restriction, Restrictions, compile_restrictions
from mmtok.states import ANY, BODY, DONE, EOS, FAILED, GRID, NO_ID, PAD, SIZE, START, TURN, States

_EDGE = 10  # features of an edge, in the order of states.Edge and whether a restriction gates it


class GrammarState(NamedTuple):
    """Where each row of a batch stands.

    Attributes:
        phase: int64 [B], a node of the automaton.
        counter: int64 [B], the number that goes with it.
        total: int64 [B], the frames of the audio segment, once they are known.
        stage: int64 [B], segments begun since the state was made, for ``Restriction.next``.
    """

    phase: Tensor
    counter: Tensor
    total: Tensor
    stage: Tensor

    @property
    def done(self) -> Tensor:
        """bool [B]: the row has ended, in <eos> or in an id that the grammar forbids. It takes only <pad>."""
        return (self.phase == DONE) | (self.phase == FAILED)

    @property
    def failed(self) -> Tensor:
        """bool [B]: the row was given an id that the grammar forbids."""
        return self.phase == FAILED


class _Tables(NamedTuple):
    """The automaton as arrays of one kind, numpy's or torch's on one device: P phases, C classes, V padded ids."""

    xp: Any  # the module: numpy or torch
    classes: Any  # int64 [V + 1]
    runs: Any  # int64 [N], the classes of the ids 0 to V - 1, those of a run of one class but once
    lengths: Any  # int64 [N], of the runs
    edges: Any  # int64 [_EDGE + 8, P, C + 1], with the cost of the target; the last is to stay where one is
    zero: Any  # int64 [P]
    refill: Any  # int64 [P]
    modality: Any  # int64 [P]
    sole: Any  # int64 [P], the class that alone may ever follow, 0 if there are several
    ceiling: Any  # int64 [P], the bound of the budget: states.SIZE where an image size is chosen
    ended: Any  # bool [P, C + 1], <pad> after the end
    between: Any  # bool [P]
    text: Any  # bool [P]


class Automaton:
    """The grammar of a registry's sequences, for batches.

    Args:
        registry: the vocabulary.
    """

    def __init__(self, registry: VocabularyRegistry) -> None:
        self.registry = registry
        self.states = States(registry)
        self._host = self._compile()
        self._tables = {torch.device("cpu"): self._copy(torch.device("cpu"))}
        self._free: dict[torch.device, Restrictions] = {}  # no restriction, compiled once a device

    def _compile(self) -> _Tables:
        states, phases = self.states, self.states.phases
        cost = np.array([dataclasses.astuple(phase.cost) for phase in phases]).T
        edges = np.zeros((_EDGE, len(phases), len(states.names) + 1), np.int64)
        edges[0], edges[5] = FAILED, NEVER  # no edge: a window that nothing is in
        for p, phase in enumerate(phases):
            for c, e in phase.edges.items():
                gated = e.starts or c in (TURN, EOS)
                edges[:, p, c] = (e.to, *e.counter, *e.total, *e.window, e.outside, e.starts, gated)
            edges[:, p, -1] = (p, 1, 0, 1, 0, -NEVER, NEVER, 0, 0, 0)
        classes = states.classes[:-1]
        firsts = np.flatnonzero(np.diff(classes, prepend=-1))
        between = [BODY, *(phases[BODY].edges[kind].to for kind in states.texts)]
        ended = np.zeros((len(phases), len(states.names) + 1), bool)
        ended[[DONE, FAILED], PAD] = True
        flags = np.zeros((2, len(phases)), bool)
        flags[0, between] = flags[1, between[1:]] = True
        return _Tables(
            np,
            states.classes,
            classes[firsts],
            np.diff(firsts, append=len(classes)),
            np.concatenate([edges, cost[:, edges[0]]]),
            np.array([p if phase.zero is None else phase.zero for p, phase in enumerate(phases)]),
            np.array([phase.refill for phase in phases]),
            np.array([MODALITIES.index(phase.modality) for phase in phases]),
            np.array([next(iter(phase.edges)) if len(phase.edges) == 1 else NO_ID for phase in phases]),
            np.array([SIZE if GRID in phase.edges else ANY for phase in phases]),
            ended,
            *flags,
        )

    def _on(self, device: torch.device) -> _Tables:
        """The tables for states on a device."""
        if device.type == "cpu" and not torch.compiler.is_compiling():
            return self._host
        if device not in self._tables:
            self._tables[device] = self._copy(device)
        return self._tables[device]

    def _copy(self, device: torch.device) -> _Tables:
        return _Tables(torch, *(torch.from_numpy(a).to(device) for a in self._host[1:]))

    def initial(self, batch: int, device: torch.device | str = "cpu") -> GrammarState:
        """``batch`` rows that await <bos>."""
        return self._state([(START, 0, 0)] * batch, device)

    def _state(self, rows: Sequence[tuple[int, int, int]], device: torch.device | str) -> GrammarState:
        """A state of (phase, counter, total) in each row."""
        values = torch.tensor([(*row, 0) for row in rows], dtype=torch.int64, device=device).reshape(len(rows), 4)
        self._on(values.device)  # the tables go there now, not within a compiled step
        return GrammarState(*(column.contiguous() for column in values.unbind(-1)))

    def advance(self, state: GrammarState, ids: Tensor) -> GrammarState:
        """The states after one more id in each row.

        Args:
            state: of B rows.
            ids: integers [B] on the device of the state. A row that has ended takes <pad>.

        Returns:
            New states; a row whose id the grammar forbids becomes ``failed``, and stays so.
        """
        t = self._on(state.phase.device)
        phase, counter, total, stage = _native(t, state)
        ids = _native(t, ids.long())
        where, last = t.xp.where, len(t.classes) - 1
        kind = t.classes[where((ids < 0) | (ids >= last), last, ids)]
        to, *rest, starts, _ = t.edges[:_EDGE, phase, kind]
        ok, counter, total = _move(rest, counter, total)
        stage = stage + starts * ok
        host = t.xp is np  # where it costs nothing to ask whether a step is needed
        if not host or not counter.all():
            zero = counter == 0
            counter, to = where(zero, t.refill[to] * total, counter), where(zero, t.zero[to], to)
        if not host or not ok.all():
            to, counter, total = where(ok, to, FAILED), where(ok, counter, 0), where(ok, total, 0)
        return GrammarState(*map(_tensor, (to, counter, total, stage)))

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
        r = self._compiled(restrict, len(state.phase), state.phase.device)
        if t.xp is np and (sole := t.sole[state.phase.numpy()]).all():  # nothing to weigh: most steps of a picture
            return self._spread(t, t.runs == sole[:, None])
        limits, rows = _native(t, r), _native(t, state)
        phase, counter, total, stage = rows
        edge = t.edges[:, phase]
        ok, counter, total = _move(edge[1:8], counter[:, None], total[:, None])
        starts, gated = edge[8], edge[9]
        cost, begun = _cost(t, edge[_EDGE:], (counter, total, stage[:, None] + starts), limits)
        needed, most = cost[:, -1:], limits.bounds[limits.row[:, None], 1, edge[-1]]
        left = limits.bounds[limits.row, 1, t.ceiling[phase]]
        if budget is not None:
            left = t.xp.minimum(left, _native(t, budget.long()))
        ok = ok & (cost >= needed - 1) & (cost < t.xp.maximum(left[:, None], needed))
        ok = ok & (begun <= t.xp.maximum(most, begun[:, -1:]))
        ok = ok & (limits.gates[limits.row, t.xp.minimum(stage, limits.last)] | (gated == 0))
        return self._spread(t, (ok | t.ended[phase])[:, t.runs])

    def _spread(self, t: _Tables, runs: Any) -> Tensor:
        """bool [B, padded_size] of bool [B, N], the same for all ids of a run."""
        if t.xp is np:
            return torch.from_numpy(np.repeat(runs, t.lengths, axis=1))
        return torch.repeat_interleave(runs, t.lengths, 1, output_size=self.registry.padded_size)

    def needed(
        self, state: GrammarState, restrict: Restrictions | Restriction | Sequence[Restriction | None] | None = None
    ) -> Tensor:
        """int64 [B]: the tokens each row needs at least to reach its end, the final <eos> included."""
        t = self._on(state.phase.device)
        r = self._compiled(restrict, len(state.phase), state.phase.device)
        phase, *numbers = (x[:, None] for x in _native(t, state))
        return _tensor(_cost(t, t.edges[_EDGE:, phase, -1], numbers, _native(t, r))[0][:, 0])

    def modality(self, state: GrammarState) -> Tensor:
        """int64 [B]: index into ``MODALITIES`` of the segment that each row is in; text between segments."""
        t = self._on(state.phase.device)
        return _tensor(t.modality[_native(t, state.phase)])

    def between(self, state: GrammarState) -> Tensor:
        """bool [B]: the row is between segments or in a text: another segment, a turn or <eos> may follow."""
        t = self._on(state.phase.device)
        return _tensor(t.between[_native(t, state.phase)])

    def in_text(self, state: GrammarState) -> Tensor:
        """bool [B]: the row's last id was of a text, which may go on."""
        t = self._on(state.phase.device)
        return _tensor(t.text[_native(t, state.phase)])

    def restrict(
        self, restrictions: Restriction | Sequence[Restriction | None], device: torch.device | str = "cpu"
    ) -> Restrictions:
        """Compile restrictions once, for many calls of ``mask``.

        Args:
            restrictions: one for all rows, or one a row; None leaves a row free.
            device: where the states are.

        Raises:
            VocabularyError: an image grid that the registry has no size tokens for, or an unknown tokenizer.
            ConfigError: an empty list, or a restriction that no sequence meets.
        """
        rows = [restrictions] if isinstance(restrictions, Restriction) else list(restrictions)
        return compile_restrictions(self.states, rows, device)

    def _compiled(
        self,
        restrict: Restrictions | Restriction | Sequence[Restriction | None] | None,
        batch: int,
        device: torch.device,
    ) -> Restrictions:
        if restrict is None:
            if device not in self._free:
                self._free[device] = self.restrict([None], device)
            return self._free[device]
        if not isinstance(restrict, Restrictions):
            restrict = self.restrict(restrict, device)
        if len(restrict.gates) not in (1, batch):
            raise ConfigError(f"got {len(restrict.gates)} restrictions for {batch} rows, expected one a row or one")
        return restrict


def _native(t: _Tables, tree: Any) -> Any:
    """A tensor, or a tuple of tensors, as the tables' kind of array: numpy views of them, or themselves."""
    if t.xp is not np:
        return tree
    return tree.numpy() if isinstance(tree, Tensor) else type(tree)(*(x.numpy() for x in tree))


def _tensor(array: Any) -> Tensor:
    """The inverse of ``_native``."""
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array


def _move(edge: Sequence[Any], counter: Any, total: Any) -> tuple[Any, Any, Any]:
    """Whether edges may be taken, and the numbers after them; ``edge`` from ``times`` to ``outside``."""
    times, plus, keep, take, low, high, outside = edge
    ok = ((low < counter) & (counter <= total + high)) != outside
    return ok, times * counter + plus, keep * total + take * counter


def _cost(t: _Tables, terms: Any, numbers: Sequence[Any], limits: Restrictions) -> tuple[Any, Any]:
    """``states.Cost`` evaluated with what ``next`` still asks for, and the audio frames begun.

    Args:
        terms: int64 [8, B, X], the coefficients.
        numbers: counter, total and stage, int64 [B, X] or [B, 1].
        limits: of the batch.
    """
    base, area, width, count, more, frames, started, bound = terms
    counter, total, stage = numbers
    row = limits.row[:, None]
    height, side = limits.smallest[row, 0], limits.smallest[row, 1]
    begun = counter + started
    cost = base + area * (height * side) + (width * side + count) * counter + more * total
    cost = cost + frames * t.xp.maximum(limits.bounds[row, 0, bound], begun)
    if limits.reserve.shape[1] > 1:
        cost = cost + limits.reserve[row, t.xp.minimum(stage, limits.last)]
    return cost, begun

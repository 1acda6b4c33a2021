"""Batches for training: one endless order of rows, shared by ranks and workers, that resumes exactly.

``Batches`` -- a torch ``IterableDataset`` over one or several packed datasets

    packs = Packs(TokenDataset.open("data"), 2048)
    batches = Batches(packs, batch_size=64, seed=0, rank=rank, world_size=world_size)
    for batch in batches.load(num_workers=2):
        ...
        state = batches.state_dict()  # after this batch; json.dumps can write it

Batch k holds rows k * batch_size to (k + 1) * batch_size - 1 of the order, of which each rank has its share. The order
runs from one epoch into the next, so no batch is short and none is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmtok.datasets.loader.gathering import Gatherer
from mmtok.datasets.loader.order import Order
from mmtok.datasets.loader.packing import Packs
from mmtok.errors import ConfigError, DataError

_AHEAD = 4096  # rows whose places are computed at once


class Batches(IterableDataset):
    """Whole batches, as dicts of tensors; for a ``DataLoader`` with ``batch_size=None``.

    Of a batch: what ``mmtok.datasets.loader.gathering.Gatherer`` gives, and ``next``, int64 []: the global index of the
    row after it. ``next // len(packs)`` is the epoch of one dataset.

    Args:
        packs: of one dataset, or of several that have one vocabulary and one length.
        batch_size: rows in a batch of all ranks together.
        seed: of the order; any integer.
        shuffle: False: rows in the order of the documents.
        weights: of several datasets: how many of the rows are of each, see ``Order``; None: as many as they have.
        rank, world_size: of ``world_size`` ranks this one gets an equal part of each batch.
        dense: False: leave out ``document`` and ``positions``, which ``places`` makes of ``bounds`` and ``source``.

    Attributes:
        row: global index of the first row that was not given yet.

    Raises:
        ConfigError: no packs, lengths that differ, a batch that the ranks cannot share, an impossible rank or weight.
        VocabularyMismatchError: the datasets have different vocabularies; the difference is named.
    """

    def __init__(
        self,
        packs: Packs | Sequence[Packs],
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        weights: Sequence[float] | None = None,
        rank: int = 0,
        world_size: int = 1,
        dense: bool = True,
    ) -> None:
        self.packs = (packs,) if isinstance(packs, Packs) else tuple(packs)
        if not self.packs:
            raise ConfigError("got no packs, expected those of one dataset at least")
        for p in self.packs[1:]:
            self.packs[0].dataset.registry.check_same(p.dataset.registry, str(p.dataset.path))
        if len(lengths := {p.length for p in self.packs}) > 1:
            raise ConfigError(f"got rows of {', '.join(map(str, sorted(lengths)))} ids, expected one length")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(f"rank is {rank} of {world_size}, expected 0 to world_size - 1")
        if batch_size < 1 or batch_size % world_size:
            raise ConfigError(f"batch_size is {batch_size}, expected a multiple of the {world_size} ranks, at least 1")
        self.share = batch_size // world_size
        if self.share * self.packs[0].length >= 2**31:
            raise ConfigError(
                f"a batch of {self.share} rows of {self.packs[0].length} ids has more than 2**31 - 1 ids; "
                "use a smaller batch_size or length"
            )
        self.batch_size, self.rank, self.dense = batch_size, rank, dense
        self.order = Order([len(p) for p in self.packs], weights, seed, shuffle)
        self.row = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Batches from ``row`` on, without end; of n workers each gives every n-th.

        Raises:
            DataError: a dataset was changed since it was opened, or a block of it is damaged.
        """
        for p in self.packs:
            p.dataset.check_unchanged()
        worker = get_worker_info()
        step = self.batch_size * (worker.num_workers if worker else 1)
        begin = self.row + self.batch_size * (worker.id if worker else 0)
        gather = Gatherer(self.packs, self.dense)
        mine = np.arange(self.share) + self.rank * self.share
        ahead = max(1, _AHEAD // self.share)
        for k in itertools.count(0, ahead):
            starts = begin + step * np.arange(k, k + ahead)
            rows = (starts[:, None] + mine).ravel()
            after = starts + self.batch_size
            batches = gather(*self.order(rows), self.share)
            for row, number, batch in zip(after.tolist(), torch.from_numpy(after).unbind(), batches, strict=True):
                batch["next"] = number
                if worker is None:
                    self.row = row
                yield batch

    def load(self, num_workers: int = 0, **options: Any) -> Iterator[dict[str, Tensor]]:
        """The same batches in the same order through a ``DataLoader``, whose workers may be ahead: ``state_dict`` tells
        of the last batch that was given.

        Args:
            num_workers: processes that read.
            options: further ones of ``DataLoader``: ``pin_memory``, ``prefetch_factor``.
        """
        for batch in DataLoader(self, batch_size=None, num_workers=num_workers, **options):
            self.row = int(batch["next"])
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands, JSON-able; the same on all ranks. In your own ``DataLoader`` with workers set ``row``
        to the ``next`` of the last batch before.
        """
        datasets = [
            {"fingerprint": p.dataset.fingerprint, "length": p.length, "packing": p.packing, "slots": int(slots)}
            for p, slots in zip(self.packs, self.order.slots, strict=True)
        ]
        return {"row": self.row, "seed": self.order.seed, "shuffle": self.order.shuffle, "datasets": datasets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken: the same rows in the same order, with any number of ranks and workers, and
        any batch size.

        Raises:
            DataError: it is no such state, or one of another dataset, packing, mixture or seed: what differs is named.
        """
        mine = self.state_dict()
        fine = isinstance(state, dict) and state.keys() == mine.keys() and isinstance(state["datasets"], list)
        if not fine or not all(isinstance(x, dict) for x in state["datasets"]):
            raise DataError(f"got {str(state)[:80]} for a state, expected what state_dict returned: {', '.join(mine)}")
        if type(state["row"]) is not int or state["row"] < 0:
            raise DataError(f"the state has row {state['row']!r}, expected an integer, 0 or more")
        different = [f"{k} {state[k]!r}, here {mine[k]!r}" for k in ("seed", "shuffle") if state[k] != mine[k]]
        if len(state["datasets"]) != len(self.packs):
            different.append(f"{len(state['datasets'])} datasets, here {len(self.packs)}")
        for i, (theirs, ours) in enumerate(zip(state["datasets"], mine["datasets"], strict=False)):
            different += [
                f"dataset {i} ({self.packs[i].dataset.path}) {k} {theirs.get(k)!r}, here {v!r}"
                for k, v in ours.items()
                if theirs.get(k) != v
            ]
        if different:
            raise DataError(f"the state is of another order: {'; '.join(different)}; resume with what it was taken of")
        self.row = state["row"]

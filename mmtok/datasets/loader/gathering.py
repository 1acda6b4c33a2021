"""Rows of packed datasets, gathered into batches: the inner loop of the reader.

``Gatherer`` -- (dataset, row) -> batches of ids with the bounds of their pieces

What can be is done for thousands of rows at once. The ids of a batch are then joined as bytes from the mapped files
(a copy that Python's own ``bytes.join`` makes in one call) and widened to int64 while they are in the cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mmtok.datasets.loader.packing import PADDING, Packs, places
from mmtok.datasets.shardfile import BLOCK

_TOGETHER = 65_536  # ids that are joined and then widened: few enough for a processor's cache
_PAUSE = 0.1  # seconds between looks at the sizes of the files


class Gatherer:
    """Batches of the rows of some packs, which have one vocabulary and one length.

    Args:
        packs: at least one.
        dense: also give ``document`` and ``positions``.
    """

    def __init__(self, packs: Sequence[Packs], dense: bool = True) -> None:
        self.packs, self.dense, self.length = tuple(packs), dense, packs[0].length
        self._shards = [shard for p in packs for shard in p.dataset.shards]
        self._dtype = packs[0].dataset.dtype
        pad = np.full(self.length, packs[0].dataset.registry.pad, self._dtype)
        self._bytes = [*(shard.raw for shard in self._shards), pad.data.cast("B")]
        self._pad = len(self._shards)
        self._first_shard = np.cumsum([0, *(len(p.starts) for p in self.packs[:-1])])
        # Which blocks of ids were compared with their sums; the shards compare, this says when there is nothing left.
        self._block = BLOCK // self._dtype.itemsize
        blocks = [-(-shard.tokens // self._block) for shard in self._shards]
        self._first_block = np.cumsum([0, *blocks])
        self._seen = bytearray(self._first_block[-1])
        self._due = 0.0

    def __call__(self, which: np.ndarray, rows: np.ndarray, size: int) -> Iterator[dict[str, Tensor]]:
        """Batches of ``size`` rows each.

        Args:
            which: int64 [N * size], the number of the packs.
            rows: int64 [N * size], the row in it.
            size: rows in a batch.

        Yields:
            ids: int64 [size, length].
            bounds: int32 [S + 1], where the pieces begin and end, all rows end to end; padding is a piece: from 0 to
                size * length, as ``cu_seqlens`` of FlashAttention's varlen functions.
            source: int64 [S, 3], of each piece the number of the dataset, of the document in it, -1 for padding, and
                where the piece begins in the document.
            document, positions: int64 [size, length], see ``places``; if ``dense``.

        Raises:
            DataError: a block of a file is damaged, or a file was cut.
        """
        pieces, counts = self._pieces(which, rows)
        sizes = pieces[:, 3]
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        source = np.empty((len(pieces), 3), np.int64)
        source[:, 0] = owner = np.repeat(which, counts)
        source[:, 1:] = pieces[:, [0, 2]]
        # The first piece of each group of rows whose ids are joined together, and of each batch.
        groups = np.arange(0, size, max(1, _TOGETHER // self.length))
        first = np.cumsum(counts) - counts
        joined = first.reshape(-1, size)[:, groups].ravel()
        batches = [*first[::size].tolist(), len(pieces)]
        # Within a group, pieces that follow one another in a file are read at once.
        shard, start = self._located(owner, pieces)
        alone = np.ones(len(pieces), bool)
        alone[1:] = (shard[1:] != shard[:-1]) | (start[1:] != start[:-1] + sizes[:-1]) | (shard[1:] == self._pad)
        alone[joined] = True
        run = np.flatnonzero(alone)
        shard, start = shard[run], start[run]
        stop = start + np.add.reduceat(sizes, run)
        unseen = self._unseen(shard, start, stop).tolist()[::-1]
        width = self._dtype.itemsize
        shards, starts, stops = shard.tolist(), (start * width).tolist(), (stop * width).tolist()
        at = [*np.searchsorted(run, joined).tolist(), len(run)]
        to = [*(groups * self.length).tolist(), size * self.length]
        for i in range(len(batches) - 1):
            if time.monotonic() > self._due:
                for checked in self._shards:
                    checked.check_size()
                self._due = time.monotonic() + _PAUSE
            k = i * len(groups)
            while unseen and unseen[-1] < at[k + len(groups)]:
                j = unseen.pop()
                self._check(shards[j], int(start[j]), int(stop[j]))
            ids = np.empty(size * self.length, np.int64)
            for j in range(len(groups)):
                a, b = at[k + j], at[k + j + 1]
                ids[to[j] : to[j + 1]] = self._joined(shards[a:b], starts[a:b], stops[a:b])
            here = slice(batches[i], batches[i + 1])
            batch = {
                "ids": ids.reshape(size, self.length),
                "bounds": (bounds[here.start : here.stop + 1] - bounds[here.start]).astype(np.int32),
                "source": source[here],
            }
            if self.dense:
                batch["document"], batch["positions"] = places(batch["bounds"], batch["source"], self.length)
            yield {k: torch.from_numpy(v) for k, v in batch.items()}

    def _pieces(self, which: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pieces of some rows, int64 [S, 4], and how many each row has."""
        low, counts = np.empty((2, len(rows)), np.int64)
        for i, p in enumerate(self.packs):
            mine = which == i if len(self.packs) > 1 else slice(None)
            low[mine] = p.first[rows[mine]]
            counts[mine] = p.first[rows[mine] + 1] - low[mine]
        ends = np.cumsum(counts)
        index = np.arange(ends[-1]) + np.repeat(low - ends + counts, counts)
        if len(self.packs) == 1:
            return self.packs[0].pieces.take(index, axis=0), counts
        out = np.empty((len(index), 4), np.int64)
        owner = np.repeat(which, counts)
        for i, p in enumerate(self.packs):
            out[owner == i] = p.pieces.take(index[owner == i], axis=0)
        return out, counts

    def _located(self, owner: np.ndarray, pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard of each piece, and where it begins there."""
        shard, start = np.empty((2, len(pieces)), np.int64)
        for i, p in enumerate(self.packs):
            mine = owner == i if len(self.packs) > 1 else slice(None)
            begin = pieces[mine, 1]
            number = np.searchsorted(p.starts, begin, side="right") - 1
            shard[mine] = number + self._first_shard[i]
            start[mine] = begin - p.starts[number]
        padding = pieces[:, 0] == PADDING
        shard[padding], start[padding] = self._pad, 0
        return shard, start

    def _unseen(self, shard: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """The runs that are the first to touch a block that was not compared with its sum yet, ascending."""
        if self._seen.find(0) < 0:
            return np.zeros(0, np.int64)
        seen = np.frombuffer(self._seen, bool)
        runs = np.flatnonzero(shard < self._pad)
        base = self._first_block[shard[runs]]
        ends = np.stack([base + start[runs] // self._block, base + (stop[runs] - 1) // self._block], 1)
        long = ends[:, 1] - ends[:, 0] > 1
        some = np.flatnonzero(~seen[ends].all(1) & ~long)
        _, earliest = np.unique(ends[some], return_index=True)
        return np.union1d(runs[some[earliest // 2]], runs[long])

    def _check(self, shard: int, start: int, stop: int) -> None:
        """Compare what was not compared of ids start..stop of a shard."""
        base, step = int(self._first_block[shard]), self._block
        for block in range(start // step, (stop - 1) // step + 1):
            if not self._seen[base + block]:
                self._shards[shard].ids(block * step, min((block + 1) * step, self._shards[shard].tokens))
                self._seen[base + block] = 1

    def _joined(self, shards: list[int], starts: list[int], stops: list[int]) -> np.ndarray:
        """The ids of some runs one after another, as they are stored; starts and stops in bytes."""
        buffers = self._bytes
        parts = [buffers[i][a:b] for i, a, b in zip(shards, starts, stops, strict=True)]
        return np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), self._dtype)

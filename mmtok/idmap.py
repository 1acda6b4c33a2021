"""The arithmetic of ``VocabularyRegistry.split`` and ``merge``, in pieces that stay in the processor's cache.

A whole-array expression would carry each of its intermediate results to memory and back; in pieces, only the arguments
and the results travel. Ranges are checked on unsigned views, where a negative number is a large one. Long arrays are
shared among a few threads: numpy works without Python's lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mmtok.blocks import Block

PIECE = 1 << 17  # ids: large enough that Python's share is small
LONG = 1 << 20  # ids from which threads are worth their start
THREADS = min(4, os.cpu_count() or 1)
_LOW = 2**32 - 1


class IdMap:
    """Ids <-> (index of the block, code within it).

    Args:
        blocks: in order of their ids.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.size = blocks[-1].start + blocks[-1].capacity
        self._starts = np.array([b.start for b in blocks], np.int64)
        kind: type = np.int8 if len(blocks) < 128 else np.int16 if len(blocks) < 2**15 else np.int32
        # Of each id, -1 for one that no block uses; narrow, so that it stays in cache.
        self._block_of: np.ndarray = np.full(self.size, -1, kind)
        for i, block in enumerate(blocks):
            self._block_of[block.start : block.end] = i
        self._gaps = bool((self._block_of < 0).any())
        self._pairs = np.array([b.start << 32 | b.size for b in blocks], np.int64)  # one look-up gives both

    def block_of(self, id: int) -> int:
        """The index of the block that uses an id, -1 if none does."""
        return int(self._block_of[id]) if 0 <= id < self.size else -1

    def split(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray] | int:
        """Block indices and codes, int64 [n]; of bad ids the position of the first.

        Args:
            ids: integers [n].
        """
        index, codes = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)

        def work(first: int, last: int) -> int:
            size = min(PIECE, last - first)
            narrow, starts = np.empty(size, self._block_of.dtype), np.empty(size, np.int64)
            for at in range(first, last, PIECE):
                piece = ids[at : min(at + PIECE, last)].astype(np.int64, copy=False)
                end, n = at + len(piece), len(piece)
                if int(piece.view(np.uint64).max()) >= self.size:
                    outside = (piece < 0) | (piece >= self.size)
                    unused = self._block_of[np.where(outside, 0, piece)] < 0
                    return at + int((outside | unused).argmax())
                index[at:end] = self._block_of.take(piece, out=narrow[:n], mode="clip")
                if self._gaps and int(narrow[:n].min()) < 0:
                    return at + int((narrow[:n] < 0).argmax())
                self._starts.take(index[at:end], out=starts[:n], mode="clip")
                np.subtract(piece, starts[:n], out=codes[at:end])
            return -1

        bad = _first_bad(work, len(ids))
        return bad if bad >= 0 else (index, codes)

    def merge(self, index: np.ndarray, codes: np.ndarray) -> np.ndarray | int:
        """Ids, int64 [n]; of bad arguments the position of the first.

        Args:
            index: integers [n] or [1], the block of each or of all codes.
            codes: integers [n].
        """
        ids = np.empty(len(codes), np.int64)
        one = len(index) == 1

        def work(first: int, last: int) -> int:
            size = min(PIECE, last - first)
            pairs, sizes, fits = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, bool)
            for at in range(first, last, PIECE):
                code = codes[at : min(at + PIECE, last)].astype(np.int64, copy=False)
                end, n = at + len(code), len(code)
                block = (index if one else index[at:end]).astype(np.int64, copy=False)
                pair, room, fit = pairs[:n], sizes[:n], fits[:n]
                if one:
                    pair[:] = self._pairs.take(block, mode="clip")
                else:
                    self._pairs.take(block, out=pair, mode="clip")
                np.bitwise_and(pair, _LOW, out=room)
                np.less(code.view(np.uint64), room.view(np.uint64), out=fit)
                if int(block.view(np.uint64).max()) >= len(self._pairs):
                    fit &= (block >= 0) & (block < len(self._pairs))
                if not fit.all():
                    return at + int(fit.argmin())
                np.right_shift(pair, 32, out=pair)
                np.add(pair, code, out=ids[at:end])
            return -1

        bad = _first_bad(work, len(codes))
        return bad if bad >= 0 else ids


def _first_bad(work: Callable[[int, int], int], length: int) -> int:
    """Run ``work(first, last)`` over all positions; the least of its results that is a position, else -1."""
    if length < LONG or THREADS == 1:
        return work(0, length)
    bounds = [length * i // THREADS for i in range(THREADS + 1)]
    with ThreadPoolExecutor(THREADS) as pool:
        return min((bad for bad in pool.map(work, bounds[:-1], bounds[1:]) if bad >= 0), default=-1)

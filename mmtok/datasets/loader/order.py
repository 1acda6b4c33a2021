"""The order in which rows are read: computed from (seed, epoch, index), never stored.

``permute`` -- a shuffle of 0..n-1, evaluated at any indices
``slots``   -- how many places of a block of ``BLOCK`` each of several datasets gets, by weight
``Order``   -- global index -> (which dataset, which row), through any number of epochs, of one or several datasets

The shuffle is a keyed bijection: a Feistel network (Luby and Rackoff 1988, "How to construct pseudorandom permutations
from pseudorandom functions") over the next power of two, walked until it lands below n (Black and Rogaway 2002,
"Ciphers with arbitrary finite domains"), as Mitchell et al. 2021 ("Bandwidth-optimal random shuffling for GPUs",
arXiv:2106.06161) do. The rounds' function is the mixing step of SplitMix64 (Steele et al. 2014).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from mmtok.errors import ConfigError

BLOCK = 4096  # places of a block of the mixture
_ROUNDS = 8
_DOMAIN = 6  # bits: on fewer, a network of so few rounds has not enough different permutations
_GOLDEN, _FIRST, _SECOND = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_SHIFT = np.uint64(31)


def permute(index: np.ndarray, size: int, epoch: np.ndarray | int = 0, seed: str = "") -> np.ndarray:
    """Where a shuffle of 0..size-1 sends each index. No memory beyond that of the arguments.

    Args:
        index: int64 [n], 0..size-1.
        size: at least 1.
        epoch: int64 [n], or one for all: each has its own shuffle.
        seed: any text; another one gives other shuffles.

    Returns:
        int64 [n], 0..size-1; different for different indices of an epoch.
    """
    bits = max(_DOMAIN, (size - 1).bit_length())
    right = bits // 2
    epochs, which = np.unique(np.asarray(epoch, np.uint64), return_inverse=True)
    key = np.frombuffer(hashlib.blake2b(seed.encode(), digest_size=8 * _ROUNDS).digest(), "<u8")
    keys = _mix(key[:, None] + _GOLDEN * epochs)  # [rounds, epochs]
    if len(epochs) > 1:
        keys = keys[:, which.ravel()]
    out = _feistel(index.astype(np.uint64), keys, bits - right, right)
    while (wrong := np.flatnonzero(out >= size)).size:
        out[wrong] = _feistel(out[wrong], keys[:, wrong] if len(epochs) > 1 else keys, bits - right, right)
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> _SHIFT)) * _FIRST
    return (x ^ (x >> _SHIFT)) * _SECOND


def _feistel(x: np.ndarray, keys: np.ndarray, left: int, right: int) -> np.ndarray:
    """A bijection of numbers of left + right bits; keys uint64 [rounds, len(x) or 1]."""
    low = np.uint64(right)
    a, b = x >> low, x & np.uint64((1 << right) - 1)
    for i in range(0, _ROUNDS, 2):
        a ^= _mix(b + keys[i]) >> np.uint64(64 - left)
        b ^= _mix(a + keys[i + 1]) >> np.uint64(64 - right)
    return (a << low) | b


def slots(weights: Sequence[float], block: int = BLOCK) -> np.ndarray:
    """Share out the places of a block by weight, by largest remainder.

    Args:
        weights: one for each dataset, finite, 0 or more; only their ratios count.
        block: places.

    Returns:
        int64 [datasets], in sum ``block``; each within 1 of its exact share.

    Raises:
        ConfigError: a weight is negative, not finite, or so small that it gets no place, or all are 0.
    """
    for i, w in enumerate(weights):
        if not math.isfinite(w) or w < 0:
            raise ConfigError(f"weight {i} is {w}, expected a finite number, 0 or more")
    if not any(weights):
        raise ConfigError(f"all of the {len(weights)} weights are 0, expected one above 0 at least")
    exact = np.array(weights, np.float64)
    exact = exact / exact.max()
    exact *= block / exact.sum()
    out = np.floor(exact).astype(np.int64)
    out[np.argsort(out - exact, kind="stable")[: block - int(out.sum())]] += 1
    for i, w in enumerate(weights):
        if w and not out[i]:
            raise ConfigError(
                f"weight {i} is {w}, less than 1/{2 * block} of all: it would never be drawn; give it more, or 0"
            )
    return out


class Order:
    """Global index -> (dataset, row): endless, epoch after epoch.

    Of several datasets each block of ``BLOCK`` indices holds its exact share of each, in shuffled places; every one
    goes through its own epochs, in the order that it would have alone.

    Args:
        sizes: rows of each dataset, at least 1.
        weights: of each; None: as many as their rows.
        seed: of the shuffles.
        shuffle: False: the rows of each dataset one after another.

    Raises:
        ConfigError: another number of weights than of datasets, or as ``slots``.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0, shuffle: bool = True
    ) -> None:
        if weights is not None and len(weights) != len(sizes):
            raise ConfigError(f"got {len(weights)} weights for {len(sizes)} datasets, expected one for each")
        self.sizes, self.seed, self.shuffle = tuple(sizes), seed, shuffle
        self.slots = slots(sizes if weights is None else weights)
        self._kinds = np.repeat(np.arange(len(sizes)), self.slots)
        self._begin = np.cumsum(self.slots) - self.slots
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None

    def __call__(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows at some global indices.

        Args:
            index: int64 [n], 0 or more.

        Returns:
            int64 [n] each: the dataset's number, and the row in it.
        """
        if len(self.sizes) == 1:
            return np.zeros(len(index), np.int64), self._rows(0, index)
        which, rows = np.empty((2, len(index)), np.int64)
        number = index // BLOCK
        for block in np.unique(number):
            here = number == block
            place = index[here] - block * BLOCK
            kinds, ranks = self._mixture(int(block))
            which[here] = kinds[place]
            rows[here] = block * self.slots[kinds[place]] + ranks[place]
        for dataset in np.unique(which):
            mine = which == dataset
            rows[mine] = self._rows(int(dataset), rows[mine])
        return which, rows

    def _rows(self, dataset: int, index: np.ndarray) -> np.ndarray:
        """Row of a dataset's own endless sequence."""
        epoch, place = np.divmod(index, self.sizes[dataset])
        return permute(place, self.sizes[dataset], epoch, f"rows/{self.seed}/{dataset}") if self.shuffle else place

    def _mixture(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each place of a block its dataset, and how many places of that dataset are before it."""
        if self._block is None or self._block[0] != block:
            kinds = self._kinds[permute(np.arange(BLOCK), BLOCK, block, f"mixture/{self.seed}")]
            ranks = np.empty(BLOCK, np.int64)
            ranks[np.argsort(kinds, kind="stable")] = np.arange(BLOCK) - self._begin[self._kinds]
            self._block = block, kinds, ranks
        return self._block[1], self._block[2]

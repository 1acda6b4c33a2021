"""Key-value cache: preallocated, owned by the caller, sliced to the length in use, one length a row.

The slot of a key is its position, so what a row's cache holds does not depend on the rest of the batch. Prompts of
unequal length are run right-padded; ``rewind`` then sets each row's true length, and the keys of the padding are
masked until later ids overwrite them.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from mmtok.errors import ConfigError

HUGE = 2**21  # bytes of a huge page


class KVCache:
    """Keys and values of every layer.

    Attributes:
        capacity: slots per row.
        lengths: ids that each row holds, on the host: no device synchronisation is needed to know them.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Allocate [layers, batch, heads, capacity, head_dim] twice, with ``heads`` the key-value heads."""
        self.capacity = capacity
        self.lengths = [0] * batch
        shape = layers, batch, heads, capacity, head_dim
        self._keys, self._values = (_zeros(shape, torch.device(device), dtype) for _ in range(2))
        self._slots = torch.arange(capacity, device=device)
        self._end = 0
        self._rows: Tensor | None = None  # (B, 1), when rows are written at slots of their own
        self._positions = self._slots[:0]

    def begin(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Prepare to append ``count`` ids to every row.

        Returns:
            Their positions, int64 [count] if all rows are equally long, else [B, count]; and the attention mask, bool
            [1 or B, 1, count, keys], None if everything may be seen.

        Raises:
            ConfigError: a row would outgrow the capacity.
        """
        low, high = min(self.lengths), max(self.lengths)
        self._end = high + count
        if self._end > self.capacity:
            raise ConfigError(f"a row of {high} ids cannot take {count} more: the cache has {self.capacity} slots")
        if low == high:
            self._rows, self._positions = None, self._slots[low : self._end]
            mask = None if count == 1 else (self._slots[: self._end] <= self._positions[:, None])[None, None]
            return self._positions, mask
        starts = torch.tensor(self.lengths, device=self._slots.device)
        self._rows = torch.arange(len(self.lengths), device=self._slots.device)[:, None]
        self._positions = starts[:, None] + self._slots[:count]
        return self._positions, (self._slots[: self._end] <= self._positions[..., None])[:, None]

    def append(self, layer: int | slice, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, heads, count, head_dim] of one layer after ``begin``; returns all that is in use, as views.

        A slice of the layers takes [layers, B, ...].
        """
        rows, count = len(self.lengths), keys.shape[-2]
        in_use = self._keys[layer, :rows], self._values[layer, :rows]
        for everything, new in zip(in_use, (keys, values), strict=True):
            if self._rows is None:
                everything[..., self._end - count : self._end, :] = new
            else:
                everything.transpose(-3, -2)[..., self._rows, self._positions, :, :] = new.transpose(-3, -2)
        return in_use[0][..., : self._end, :], in_use[1][..., : self._end, :]

    def window(self) -> tuple[Tensor, Tensor, Tensor]:
        """After ``begin``, as views: keys and values [layers, B, heads, S, head_dim] of the slots before, and these."""
        rows, stop = len(self.lengths), max(self.lengths)
        return self._keys[:, :rows, :, :stop], self._values[:, :rows, :, :stop], self._slots[:stop]

    def advance(self, count: int) -> None:
        """Every row has grown by ``count`` ids."""
        self.lengths = [n + count for n in self.lengths]

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget all but the first ``lengths[i]`` ids of row i."""
        self.lengths = list(lengths)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order: finished ones need not be computed further. A row may come twice."""
        index = torch.tensor(list(rows), device=self._slots.device)
        self._keys, self._values = (_copied(x, index, len(index)) for x in (self._keys, self._values))
        self.lengths = [self.lengths[r] for r in rows]

    def join(self, other: KVCache) -> None:
        """Append the rows of another cache of the same model, of no more slots than this one.

        Room is made for as many rows again, so that rows that come one by one are not each paid for with a copy.
        """
        have, slots = len(self.lengths), other.capacity
        self.lengths = self.lengths + other.lengths
        rows = len(self.lengths)
        if rows > self._keys.shape[1]:
            index = torch.arange(have, device=self._slots.device)
            self._keys, self._values = (_copied(x, index, max(rows, 2 * have)) for x in (self._keys, self._values))
        count = len(other.lengths)
        self._keys[:, have:rows, :, :slots] = other._keys[:, :count]
        self._values[:, have:rows, :, :slots] = other._values[:, :count]


def _copied(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """These rows of [L, R, ...], at the beginning of so many."""
    out = _zeros((len(x), rows, *x.shape[2:]), x.device, x.dtype)
    out[:, : len(index)] = x[:, index]
    return out


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros, on a CPU in huge pages where the system has them: a step reads all that is there, page by page."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, device=device, dtype=dtype)
    memory = mmap.mmap(-1, size)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)

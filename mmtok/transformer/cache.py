"""Key-value cache: preallocated, owned by the caller, sliced to the length in use, one length a row.

The slot of a key is its position, so what a row's cache holds does not depend on the rest of the batch. Prompts of
unequal length are run right-padded; ``rewind`` then sets each row's true length, and the keys of the padding are
masked until later ids overwrite them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtok.errors import ConfigError


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
        self._keys = torch.zeros(layers, batch, heads, capacity, head_dim, device=device, dtype=dtype)
        self._values = torch.zeros_like(self._keys)
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
        self._move(rows, len(rows))
        self.lengths = [self.lengths[r] for r in rows]

    def join(self, other: KVCache) -> None:
        """Append the rows of another cache of the same model.

        Room is made for as many rows again, so that rows that come one by one are not each paid for with a copy.

        Raises:
            ConfigError: they hold more ids than this cache has slots.
        """
        have, slots = len(self.lengths), max(other.lengths)
        if slots > self.capacity:
            raise ConfigError(f"got a row of {slots} ids, the cache has {self.capacity} slots")
        rows = have + len(other.lengths)
        if rows > self._keys.shape[1]:
            self._move(range(have), max(rows, 2 * have))
        self._keys[:, have:rows, :, :slots] = other._keys[:, : len(other.lengths), :, :slots]
        self._values[:, have:rows, :, :slots] = other._values[:, : len(other.lengths), :, :slots]
        self.lengths = self.lengths + other.lengths

    def _move(self, rows: Sequence[int], room: int) -> None:
        """What these rows hold to new memory, which has room for so many."""
        used = max((self.lengths[r] for r in rows), default=0)
        index = torch.tensor(list(rows), dtype=torch.int64, device=self._slots.device)
        for name in ("_keys", "_values"):
            old = getattr(self, name)
            new = old.new_zeros(len(old), room, *old.shape[2:])
            new[:, : len(index), :, :used] = old[:, :, :, :used].index_select(1, index)
            setattr(self, name, new)

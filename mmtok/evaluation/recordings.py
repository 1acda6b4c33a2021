"""The sounds that tokenizers and their peers are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

from mmtok import media
from mmtok.errors import MediaError
from mmtok.evaluation.sets import readable
from mmtok.training.corpus import Item


class Recordings(Sequence[np.ndarray]):
    """Sounds at one rate, float32 [channels, T] each. Files that cannot be read are left out.

    Sounds are read again whenever they are looked at, so that a set may be larger than the memory.

    Attributes:
        sample_rate: Hz.
        channels: 1 (the mean of a file's own) or 2 (a mono file's twice).
        names: of the sounds that can be read: path within the data.
        sources: what kind of sound each is, where a manifest says so; else the name of the folder, or nothing.
        lengths: samples of each.
        unreadable: a line for each file that cannot be read.
    """

    def __init__(self, chosen: Sequence[Item], sample_rate: int, channels: int = 1) -> None:
        """Read every file once.

        Args:
            chosen: the files.
            sample_rate: Hz.
            channels: 1 or 2.

        Raises:
            DataError: none can be read.
        """
        self.sample_rate, self.channels = sample_rate, channels
        self._items, self.lengths, self.unreadable = readable(chosen, lambda x: self._read(x).shape[1], "sounds")
        self.names = [str(item.segment["path"]) for item in self._items]
        self.sources = [item.source for item in self._items]

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        """float32 [channels, T]."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._read(self._items[index])

    def seconds(self, indices: Sequence[int] | None = None) -> float:
        """Of some of the sounds together; of all by default."""
        return sum(self.lengths if indices is None else (self.lengths[i] for i in indices)) / self.sample_rate

    def by_source(self) -> dict[str, list[int]]:
        """Indices of the sounds of each kind, where there are several kinds."""
        kinds = sorted(set(self.sources))
        return {kind: [i for i, s in enumerate(self.sources) if s == kind] for kind in kinds if len(kinds) > 1}

    def _read(self, item: Item) -> np.ndarray:
        start, end = item.segment.get("start"), item.segment.get("end")
        samples = media.read_audio(item.path, self.sample_rate, start, end, mono=self.channels == 1)
        if samples.shape[0] == self.channels:
            return samples
        if samples.shape[0] == 1:
            return samples.repeat(self.channels, 0)
        raise MediaError(f"{item.path}: {samples.shape[0]} channels, expected 1 or {self.channels}")

"""The pictures that tokenizers and their peers are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

from mmtok import media
from mmtok.evaluation.sets import readable
from mmtok.training.corpus import Item


class Pictures(Sequence[np.ndarray]):
    """Pictures as they look on white: uint8 [3, H, W] each. Files that cannot be read are left out.

    Fitted pictures stay in memory; those of true sizes are read again whenever they are looked at, so that a set may
    be larger than the memory.

    Attributes:
        names: of the pictures that can be read: path within the data.
        sizes: (H, W) of each.
        unreadable: a line for each file that cannot be read.
    """

    def __init__(self, chosen: Sequence[Item], size: int | None = None) -> None:
        """Read every file once.

        Args:
            chosen: the files.
            size: fit into a square of so many pixels, centred on white; None keeps the true sizes.

        Raises:
            DataError: none can be read.
        """
        self._size = size
        self._kept: list[np.ndarray] = []
        self._items, self.sizes, self.unreadable = readable(chosen, self._look, "pictures")
        self.names = [str(item.segment["path"]) for item in self._items]

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        """uint8 [3, H, W] on white."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._kept[index] if self._kept else self._read(self._items[index], "RGB")

    def with_alpha(self, index: int) -> np.ndarray:
        """uint8 [4, H, W], for tokenizers that keep the alpha channel."""
        return self._read(self._items[index], "RGBA")

    @property
    def pixels(self) -> int:
        """Of all pictures together."""
        return sum(height * width for height, width in self.sizes)

    def _look(self, item: Item) -> tuple[int, int]:
        """(H, W) of a picture, which is kept if it is fitted."""
        pixels = self._read(item, "RGB")
        if self._size is not None:
            self._kept.append(pixels)
        return pixels.shape[1], pixels.shape[2]

    def _read(self, item: Item, mode: str) -> np.ndarray:
        pixels = media.read_image(item.path, mode)
        return pixels if self._size is None else media.fit_image(pixels, self._size)

"""Which columns of the output projection a step needs: those of the blocks that some row may take an id of."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmtok.registry import MODALITIES, VocabularyRegistry


class Columns(NamedTuple):
    """Blocks of the vocabulary, side by side: what one step computes scores of."""

    slices: list[slice]
    ids: Tensor  # int64 [n]
    codes: Tensor  # bool [n]: of images and sounds

    def of(self, x: Tensor) -> Tensor:
        """[B, V] -> [B, n]."""
        parts = [x[:, part] for part in self.slices]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class Vocabulary:
    """The blocks of a registry as the steps use them.

    The ids of a block of codes are allowed all or none, so one of them, and each id of the other blocks, says all.
    """

    def __init__(self, registry: VocabularyRegistry, device: torch.device) -> None:
        blocks = registry.blocks
        whole = [b.modality in MODALITIES for b in blocks]
        probes = [range(b.start, b.start + 1 if one else b.end) for b, one in zip(blocks, whole, strict=True)]
        self.slices = [slice(b.start, b.end) for b in blocks]
        self.probes = torch.tensor([id for ids in probes for id in ids], device=device)
        self.sizes = torch.tensor(
            [b.size if one else 1 for b, ids, one in zip(blocks, probes, whole, strict=True) for _ in ids],
            device=device,
        )
        self.owners = np.repeat(np.arange(len(blocks)), [len(ids) for ids in probes])  # the block of each probe
        ids = torch.zeros(2, registry.padded_size, dtype=torch.bool)
        for b in blocks:
            ids[0, b.start : b.end] = b.modality in MODALITIES
            ids[1, b.start : b.end] = b.modality in ("image", "audio")
        ids = ids.to(device)
        self.content, self.codes = ids[0], ids[1]  # bool [V]
        self._columns: dict[tuple[int, ...], Columns] = {}

    def columns(self, used: Tensor) -> Columns:
        """The blocks of the probes that are used, bool [P]."""
        key = tuple(np.unique(self.owners[used.cpu().numpy()]).tolist())
        if key not in self._columns:
            slices = [self.slices[i] for i in key]
            ids = torch.cat([torch.arange(part.start, part.stop, device=self.codes.device) for part in slices])
            self._columns[key] = Columns(slices, ids, self.codes[ids])
        return self._columns[key]

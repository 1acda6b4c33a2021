"""Codes of vectors and vectors of codes, as the published tokenizers have them. Both take and give rows: [N, dim].

``Codebook`` -- the nearest of learnt vectors (VQ-VAE, https://arxiv.org/abs/1711.00937), on the unit sphere if asked
``Scalars``  -- finite scalar quantization (https://arxiv.org/abs/2309.15505): a small integer in each dimension

The nearest is what ``mmtok.nearest`` defines: what the systems' own argmin gives, but where two distances are equal
within the rounding of float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.nearest import nearest


class Codebook(nn.Module):
    """float32 [N, dim] <-> int64 [N], the index of the nearest vector by Euclidean distance.

    Args:
        size, dim: of the codebook.
        normalized: inputs and codebook are scaled to length 1 first (ViT-VQGAN, https://arxiv.org/abs/2110.04627).
    """

    def __init__(self, size: int, dim: int, normalized: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        self.normalized = normalized

    def _vectors(self) -> Tensor:
        return F.normalize(self.embedding.weight, dim=-1) if self.normalized else self.embedding.weight

    def encode(self, vectors: Tensor) -> Tensor:
        """float32 [N, dim] -> int64 [N]."""
        return nearest(F.normalize(vectors, dim=-1) if self.normalized else vectors, self._vectors())

    def decode(self, codes: Tensor) -> Tensor:
        """int64 [N] -> float32 [N, dim]."""
        return F.embedding(codes, self._vectors())


class Scalars(nn.Module):
    """float32 [N, dim] <-> int64 [N], 0 .. the product of the levels less 1; the first dimension changes fastest.

    An even number of levels has no middle: -1, -3/4 .. 3/4 of 8; an odd one has: -1, -1/2, 0, 1/2, 1 of 5.

    Args:
        levels: how many integers there are in each dimension.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.steps = tuple(math.prod(self.levels[:i]) for i in range(len(self.levels)))

    def encode(self, vectors: Tensor) -> Tensor:
        """float32 [N, dim] of any range -> int64 [N]."""
        levels = vectors.new_tensor(self.levels)
        reach = (levels - 1) * 1.001 / 2  # a little more than the outermost level, which rounding then reaches
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        bounded = (vectors + (offset / reach).atanh()).tanh() * reach - offset
        digits = bounded.round().long() + levels.long() // 2
        return (digits * digits.new_tensor(self.steps)).sum(-1)

    def decode(self, codes: Tensor) -> Tensor:
        """int64 [N] -> float32 [N, dim], -1..1."""
        levels = codes.new_tensor(self.levels)
        half = levels // 2
        return ((codes[:, None] // codes.new_tensor(self.steps)) % levels - half) / half

"""Weight matrices for generation: a precision, and for a CPU the layout that its kernels read best.

On a CPU the kernels of oneDNN take a matrix that was reordered once. At 32 rows they are twice as fast as the product
with the plain matrix, and, unlike it, give a row the same bits whatever rows stand beside it.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.errors import ConfigError

FEW = 3  # up to so many rows reading int8 is faster than the packed bfloat16 of the same values
ROWS = 64  # that the packed layout is chosen for; others run as fast in it


class Matrix:
    """A weight matrix [N, K] in float32, bfloat16, or int8 with a scale per output.

    An int8 matrix means the same for any number of rows: its whole numbers are exact in bfloat16, which many rows are
    multiplied with.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        """Convert ``weight``, float [N, K]; int8 rounds to 127 steps of the largest magnitude of each row.

        Raises:
            ConfigError: int8 for a K that is no multiple of 32.
        """
        weight = weight.detach()
        self.shape = weight.shape
        self._scale: Tensor | None = None
        if dtype == torch.int8:
            if weight.shape[1] % 32:  # the kernel reads beyond the end of such rows
                got = weight.shape[1]
                raise ConfigError(f"int8 needs sizes that are multiples of 32, got {got}; use torch.bfloat16")
            scale = weight.float().abs().amax(1).clamp(min=1e-8) / 127
            self._scale = scale.bfloat16()
            weight = weight.float() / self._scale.float()[:, None]
            self._plain = weight.round().clamp(-127, 127).to(torch.int8)
        else:
            self._plain = weight.to(dtype)

    @cached_property
    def _packed(self) -> Tensor | None:
        """The matrix as oneDNN reads it, int8 as bfloat16; None where that is not to be had."""
        plain = self._plain.bfloat16() if self._plain.dtype == torch.int8 else self._plain
        if plain.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return None
        if plain.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(plain.contiguous(), ROWS)
        return packed

    def __call__(self, x: Tensor) -> Tensor:
        """float [R, K] -> [R, N] of the same type."""
        if self._scale is None:
            return self._multiply(x)
        if x.device.type == "cpu" and len(x) <= FEW:
            return torch._weight_int8pack_mm(x.bfloat16(), self._plain, self._scale).to(x.dtype)
        return self._multiply(x) * self._scale

    def _multiply(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or self._packed is None:
            plain = self._plain if self._plain.is_floating_point() else self._plain.to(x.dtype)
            return F.linear(x.to(plain.dtype), plain).to(x.dtype)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(self._packed.dtype), self._packed, None, "none", [], "")
        return y.to(x.dtype)


def itemsize(dtype: torch.dtype, rows: int) -> int:
    """Bytes that a weight of a matrix takes where so many rows read it."""
    return torch.bfloat16.itemsize if dtype == torch.int8 and rows > FEW else dtype.itemsize

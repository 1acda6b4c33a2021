"""The float32 part of the nearest-code search on a CUDA device, fused: no score leaves the chip.

- ``scan``: for each vector the entry of the least score, that score, and the second one.

``mmtok.nearest`` decides from them; this module is imported only for CUDA tensors. The kernel was run in Triton's
interpreter and compiled for compute capabilities 8.0 and 9.0, not yet run on a device; the test for one is marked
``gpu``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64
CODES = 128


@triton.jit
def _scan(  # type: ignore[no-untyped-def]
    x_ptr, c_ptr, half_ptr, index_ptr, least_ptr, second_ptr, n, x_stride_n, x_stride_d, c_stride_k, c_stride_d,
    k: tl.constexpr, d: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """ROWS vectors against all entries, CODES at a time, DIMS dimensions at a time; the state is held in registers.

    The size of a codebook is a constant of a model, so k and d are constants of the compiled kernel.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < n
    least = tl.full((ROWS,), float("inf"), tl.float32)
    second = tl.full((ROWS,), float("inf"), tl.float32)
    index = tl.zeros((ROWS,), tl.int64)
    for offset in range(0, k, CODES):
        step = tl.arange(0, CODES)
        code = offset + step.to(tl.int64)
        is_code = code < k
        product = tl.zeros((ROWS, CODES), tl.float32)
        for first in range(0, d, DIMS):
            dim = first + tl.arange(0, DIMS)
            is_dim = dim < d
            x = tl.load(
                x_ptr + row[:, None] * x_stride_n + dim[None, :] * x_stride_d,
                mask=is_row[:, None] & is_dim[None, :],
                other=0.0,
            )
            c = tl.load(
                c_ptr + code[None, :] * c_stride_k + dim[:, None] * c_stride_d,
                mask=is_code[None, :] & is_dim[:, None],
                other=0.0,
            )
            # The error bound is that of float32 products: no TF32.
            product = tl.dot(x.to(tl.float32), c.to(tl.float32), product, input_precision="ieee")
        half = tl.load(half_ptr + code, mask=is_code, other=float("inf"))
        score = half[None, :] - product
        here = tl.min(score, axis=1)
        place = tl.argmin(score, axis=1)
        others = tl.min(tl.where(step[None, :] == place[:, None], float("inf"), score), axis=1)
        second = tl.minimum(tl.maximum(least, here), tl.minimum(second, others))
        index = tl.where(here < least, offset + place, index)
        least = tl.minimum(least, here)
    tl.store(index_ptr + row, index, mask=is_row)
    tl.store(least_ptr + row, least, mask=is_row)
    tl.store(second_ptr + row, second, mask=is_row)


def scan(x: Tensor, c: Tensor, half: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two least scores |c|^2 / 2 - x.c of each row, computed in float32 and off by no more than its rounding.

    Args:
        x: float [N, d], any strides.
        c: float [K, d], any strides.
        half: float32 [K]: |c|^2 / 2.

    Returns:
        (an entry of the least score, int64 [N]; that score, float32 [N]; the least score of all other entries, float32
        [N], infinite if there is none)
    """
    (n, d), k = x.shape, len(c)
    index = torch.empty(n, dtype=torch.int64, device=x.device)
    least, second = half.new_empty(n), half.new_empty(n)
    dims = min(32, max(16, triton.next_power_of_2(d)))
    with torch.cuda.device_of(x):
        _scan[(triton.cdiv(n, ROWS),)](
            x, c, half, index, least, second, n, *x.stride(), *c.stride(), k=k, d=d, ROWS=ROWS, CODES=CODES, DIMS=dims
        )  # fmt: skip
    return index, least, second

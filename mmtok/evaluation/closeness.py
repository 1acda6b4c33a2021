"""How close a set of pictures came back: one record a picture, and the figures of the whole set.

``compare``   -- pairs of pictures -> a ``Closeness`` each
``summarize`` -- those of a set -> PSNR, SSIM and MS-SSIM, the same for tokenizers and for their peers
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmtok.errors import MediaError
from mmtok.training.ssim import WINDOW, ms_min_side, ms_ssim, ssim

PSNR_CAP_DB = 60.0  # stands for itself and all above: an exact copy has no PSNR, and would make a mean infinite
SHORT_SCALES = 3  # of the MS-SSIM that pictures from 41 pixels a side have
_CHUNK = 2**19  # pixels of which SSIM is computed at once


class Closeness(NamedTuple):
    """A picture and its reconstruction.

    Attributes:
        squared_error: sum over the values, which are 0..255.
        values: 3 for each pixel.
        ssim, ms_ssim, ms_ssim_3_scales: None where a side is below 11, 161 and 41 pixels.
    """

    squared_error: int
    values: int
    ssim: float | None
    ms_ssim: float | None
    ms_ssim_3_scales: float | None

    @property
    def psnr(self) -> float:
        """dB, at most ``PSNR_CAP_DB``."""
        return _psnr(self.squared_error, self.values)


def compare(x: Tensor, y: Tensor, multiscale: bool = True) -> list[Closeness]:
    """Compare pictures with their reconstructions.

    Args:
        x, y: uint8 [B, 3, H, W] of one shape.
        multiscale: MS-SSIM too, which takes as long again.

    Raises:
        MediaError: another dtype or shape.
    """
    if x.shape != y.shape or x.ndim != 4 or x.dtype != torch.uint8 or y.dtype != torch.uint8:
        raise MediaError(
            f"got {x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)}, expected two uint8 [B, 3, H, W] of one shape"
        )
    side, pixels = min(x.shape[2:]), x.shape[2] * x.shape[3]
    out = []
    for a, b in zip(*(z.split(max(1, _CHUNK // pixels)) for z in (x, y)), strict=True):
        errors = (a.int() - b.int()).square().sum(dim=(1, 2, 3)).tolist()
        p, q = a.float() / 255, b.float() / 255
        none = [None] * len(a)
        one = ssim(p, q).tolist() if side >= WINDOW else none
        short = (
            ms_ssim(p, q, scales=SHORT_SCALES).tolist() if multiscale and side >= ms_min_side(SHORT_SCALES) else none
        )
        full = ms_ssim(p, q).tolist() if multiscale and side >= ms_min_side() else none
        out += [
            Closeness(error, x[0].numel(), s, f, t) for error, s, f, t in zip(errors, one, full, short, strict=True)
        ]
    return out


def summarize(scores: Sequence[Closeness]) -> dict[str, Any]:
    """Figures of a set, at least one picture.

    Returns:
        ``psnr_of_mean_error_db``, of the squared error averaged over all values of all pictures, and ``psnr_mean_db``,
        the mean of the pictures' own, both at most ``PSNR_CAP_DB``; ``ssim``, ``ms_ssim`` and ``ms_ssim_3_scales``,
        means over the pictures that have one, None if none has.
    """
    total, values = sum(s.squared_error for s in scores), sum(s.values for s in scores)
    return {
        "psnr_of_mean_error_db": round(_psnr(total, values), 3),
        "psnr_mean_db": round(math.fsum(s.psnr for s in scores) / len(scores), 3),
        "ssim": _mean([s.ssim for s in scores]),
        "ms_ssim": _mean([s.ms_ssim for s in scores]),
        "ms_ssim_3_scales": _mean([s.ms_ssim_3_scales for s in scores]),
    }


def notes(scores: Sequence[Closeness]) -> list[str]:
    """Which of the means are over a part of the pictures only, or missing, and why."""
    out = []
    for name, label, side in (
        ("ssim", "SSIM", WINDOW),
        ("ms_ssim", "MS-SSIM", ms_min_side()),
        ("ms_ssim_3_scales", "MS-SSIM of 3 scales", ms_min_side(SHORT_SCALES)),
    ):
        have = sum(getattr(s, name) is not None for s in scores)
        if have < len(scores):
            out.append(f"{label} is of {have} of {len(scores)} pictures: it needs sides of at least {side} pixels")
    return out


def _psnr(squared_error: int, values: int) -> float:
    if not squared_error:
        return PSNR_CAP_DB
    return min(PSNR_CAP_DB, 10 * math.log10(255**2 * values / squared_error))


def _mean(values: Sequence[float | None]) -> float | None:
    have = [v for v in values if v is not None]
    return round(math.fsum(have) / len(have), 4) if have else None

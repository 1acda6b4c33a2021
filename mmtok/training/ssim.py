"""Structural similarity, differentiable: the one implementation, used as a loss and as a metric.

Wang, Bovik, Sheikh, Simoncelli: Image quality assessment: from error visibility to structural similarity, IEEE TIP
2004; Wang, Simoncelli, Bovik: Multiscale structural similarity for image quality assessment, Asilomar 2003.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtok.errors import MediaError

WINDOW = 11
SIGMA = 1.5
BANDED = 128  # up to this side one product with a banded matrix is many times faster than two thin convolutions
K1, K2 = 0.01, 0.03
MS_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ms_min_side(scales: int = len(MS_WEIGHTS)) -> int:
    """The smallest side of images that :func:`ms_ssim` takes: 161 pixels for five scales, 41 for three."""
    return (WINDOW - 1) * 2 ** (scales - 1) + 1


def ssim(x: Tensor, y: Tensor, data_range: float = 1.0) -> Tensor:
    """Mean SSIM of each image pair: Gaussian window 11x11, sigma 1.5, valid positions only, channels averaged.

    Args:
        x, y: float [B, C, H, W] with H, W >= 11, values over a range of ``data_range``.
        data_range: largest minus smallest possible value: 1 for 0..1, 2 for -1..1.

    Returns:
        float [B], at most 1; 1 for equal images.

    Raises:
        MediaError: unequal shapes, not float, or a side below 11.
    """
    _check(x, y, WINDOW)
    luminance, contrast = _maps(x, y, data_range)
    return (luminance * contrast).mean(dim=(1, 2, 3))


def ms_ssim(x: Tensor, y: Tensor, data_range: float = 1.0, scales: int = len(MS_WEIGHTS)) -> Tensor:
    """Multi-scale SSIM with the paper's weights; terms below 1e-6 count as 1e-6 (finite gradient).

    Args:
        x, y: float [B, C, H, W] with H, W >= 161; with fewer scales :func:`ms_min_side` of them.
        data_range: as in :func:`ssim`.
        scales: the paper has 5. For small images 1 to 4: the finest, their weights divided by their sum. A value is
            comparable with those of as many scales only.

    Returns:
        float [B], 0..1.

    Raises:
        MediaError: unequal shapes, not float, a side too small, or a number of scales out of range.
    """
    if not 1 <= scales <= len(MS_WEIGHTS):
        raise MediaError(f"got {scales} scales, expected 1 to {len(MS_WEIGHTS)}")
    _check(x, y, ms_min_side(scales))
    total = sum(MS_WEIGHTS[:scales])
    result = torch.ones((), dtype=x.dtype, device=x.device)
    for scale, weight in enumerate(MS_WEIGHTS[:scales]):
        luminance, contrast = _maps(x, y, data_range)
        last = scale == scales - 1
        term = (luminance * contrast if last else contrast).mean(dim=(2, 3))
        result = result * term.clamp_min(1e-6).pow(weight / total)
        if not last:
            # ceil_mode averages a last odd row or column alone, so that 161 pixels still give the window's 11.
            x, y = (F.avg_pool2d(z, 2, ceil_mode=True) for z in (x, y))
    return result.mean(dim=1)


def _check(x: Tensor, y: Tensor, side: int) -> None:
    if x.shape != y.shape or x.dim() != 4 or not x.is_floating_point() or not y.is_floating_point():
        raise MediaError(
            f"got {x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)}, expected two float [B, C, H, W] of one shape"
        )
    if min(x.shape[2:]) < side:
        raise MediaError(f"got images of {x.shape[2]}x{x.shape[3]}, expected sides of at least {side}")


def _blur(planes: Tensor, window: Tensor) -> Tensor:
    """Each plane filtered along both sides, valid positions only: [B, C, H, W] -> [B, C, H - 10, W - 10]."""
    if max(planes.shape[2:]) > BANDED:
        flat = planes.flatten(0, 1).unsqueeze(1)
        flat = F.conv2d(F.conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
        return flat.view(*planes.shape[:2], *flat.shape[2:])
    rows, columns = (_band(window, side) for side in planes.shape[2:])
    return rows @ planes @ columns.T


def _band(window: Tensor, side: int) -> Tensor:
    """The matrix [side - 10, side] that filters a column of ``side`` values."""
    band = window.new_zeros(side - WINDOW + 1, side)
    for i, weight in enumerate(window):
        band.diagonal(i).fill_(weight)
    return band


def _maps(x: Tensor, y: Tensor, data_range: float) -> tuple[Tensor, Tensor]:
    """The luminance map and the contrast-structure map, each [B, C, H - 10, W - 10]."""
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    offset = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    window = torch.exp(-(offset**2) / (2 * SIGMA**2))
    window = window / window.sum()

    # One pass blurs all five planes. Variances as E[x^2] - E[x]^2 lose digits on a large mean, so half the range goes.
    centre = data_range / 2
    a, b = x - centre, y - centre
    mean_a, mean_b, aa, bb, ab = _blur(torch.cat([a, b, a * a, b * b, a * b]), window).chunk(5)
    covariance = ab - mean_a * mean_b
    variances = aa - mean_a**2 + bb - mean_b**2
    mean_x, mean_y = mean_a + centre, mean_b + centre
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance, (2 * covariance + c2) / (variances + c2)

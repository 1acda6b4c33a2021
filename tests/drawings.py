"""Generated pictures for the tests that measure what comes back of them."""

from __future__ import annotations

import numpy as np


def drawing(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth colours with a disc: uint8 [3, H, W]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    base = rng.random((3, 1, 1)) * 120 + 100 * (rng.random((3, 1, 1)) * x + rng.random((3, 1, 1)) * y)
    disc = (y - 0.4) ** 2 + (x - 0.5) ** 2 < 0.03 * (1 + seed % 3)
    return np.where(disc, rng.random((3, 1, 1)) * 255, base).astype(np.uint8)

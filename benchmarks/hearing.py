"""A measure of how alike two recordings sound, which nobody has trained: dynamic time warping over MFCCs.

mfccs    -- features of a recording
warped   -- distances of features
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torchaudio.transforms import MFCC

RATE = 16_000


@cache
def _transform() -> MFCC:
    return MFCC(RATE, 13, melkwargs={"n_fft": 512, "win_length": 400, "hop_length": 320, "n_mels": 40})


def mfccs(samples: np.ndarray) -> np.ndarray:
    """MFCCs without the first, and their slopes, each scaled over the utterance.

    Args:
        samples: float32 [T], 16 kHz; silence at both ends is left out.

    Returns:
        float32 [F, 24], 50 frames a second, at least one.
    """
    x = _transform()(torch.from_numpy(np.pad(audible(samples), RATE // 80)))[1:]
    x = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
    wide = torch.nn.functional.pad(x[None], (1, 1), mode="replicate")[0]
    slope = wide[:, 2:] - wide[:, :-2]
    return torch.cat((x, slope / (slope.std(1, keepdim=True) + 1e-5))).T.numpy()


def audible(samples: np.ndarray) -> np.ndarray:
    """float32 [T] without the silence at both ends; nothing of what is silent all over."""
    loud = np.flatnonzero(np.abs(samples) > 0.03 * np.abs(samples).max(initial=1e-9))
    return samples[loud[0] : loud[-1] + 1] if len(loud) else samples[:0]


def warped(query: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """Distances by dynamic time warping of symmetric steps, the diagonal one counted twice (Sakoe and Chiba 1978).

    Args:
        query: float32 [N, C].
        others: float32 [M_i, C] each.

    Returns:
        float64 [len(others)]: the cost of the best path, over the sum of both lengths.
    """
    lengths = np.array([len(x) for x in others])
    stack = np.zeros((len(others), lengths.max(), query.shape[1]), np.float32)
    for row, x in zip(stack, others, strict=True):
        row[: len(x)] = x
    squares = (
        np.square(query).sum(1)[:, None, None] + np.square(stack).sum(2) - 2 * np.einsum("nc,rmc->nrm", query, stack)
    )
    cost = np.sqrt(np.maximum(0, squares)).astype(np.float64)
    # Along a row of the table, best[j] = min(enter[j], best[j - 1] + cost[j]) is a running minimum once the costs so
    # far are taken off.
    total = np.cumsum(cost, -1)
    best = total[0] + cost[0, :, :1]
    for here, so_far in zip(cost[1:], total[1:], strict=True):
        enter = best + here
        enter[:, 1:] = np.minimum(enter[:, 1:], best[:, :-1] + 2 * here[:, 1:])
        best = so_far + np.minimum.accumulate(enter - so_far, -1)
    return best[np.arange(len(others)), lengths - 1] / (len(query) + lengths)

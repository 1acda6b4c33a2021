"""How close sounds came back: one record a sound, and the figures of a set, the same for tokenizers and for Opus.

``compare``   -- a sound and what came back -> a ``Fidelity``
``summarize`` -- those of a set -> means
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mmtok.evaluation.metrics import has_pesq, log_mel_distance, pesq_wb, stft_distance, stoi
from mmtok.evaluation.rates import Figure

# The figures of a set by their keys in the reports, as they are rounded and read on a peer's curve.
FIGURES = {
    "stoi": Figure(digits=4),
    "pesq_wb": Figure(),
    "log_mel_distance_db": Figure(lower_is_closer=True),
    "stft_distance": Figure(digits=4, lower_is_closer=True),
}


class Fidelity(NamedTuple):
    """A sound and its reconstruction, by the functions of :mod:`mmtok.evaluation.metrics`; NaN where there is none."""

    stoi: float
    pesq_wb: float
    log_mel_distance_db: float
    stft_distance: float


def compare(x: np.ndarray, y: np.ndarray, sample_rate: int) -> Fidelity:
    """Compare a sound with what came back.

    Args:
        x, y: float32 [C, T] of one shape, T at least 1.
        sample_rate: Hz.
    """
    a, b = (torch.from_numpy(np.ascontiguousarray(z))[None] for z in (x, y))
    return Fidelity(
        float(stoi(a, b, sample_rate)),
        float(pesq_wb(a, b, sample_rate)) if has_pesq() else math.nan,
        float(log_mel_distance(a, b, sample_rate)),
        float(stft_distance(a, b)),
    )


def summarize(scores: Sequence[Fidelity]) -> dict[str, Any]:
    """Means of a set.

    Returns:
        ``stoi``, ``pesq_wb``, ``log_mel_distance_db``, ``stft_distance``: over the sounds that have one, None if none
        has; ``sounds_with_stoi`` and ``sounds_with_pesq``: how many that are.
    """
    out: dict[str, Any] = {}
    for key, figure in FIGURES.items():
        have = [v for v in (getattr(s, key) for s in scores) if math.isfinite(v)]
        out[key] = round(math.fsum(have) / len(have), figure.digits) if have else None
    for name, key in (("sounds_with_stoi", "stoi"), ("sounds_with_pesq", "pesq_wb")):
        out[name] = sum(math.isfinite(getattr(s, key)) for s in scores)
    return out


def notes(scores: Sequence[Fidelity]) -> list[str]:
    """Which of the means are over a part of the sounds only, or missing, and why."""
    out = []
    count = summarize(scores)
    if count["sounds_with_stoi"] < len(scores):
        out.append(f"STOI is of {count['sounds_with_stoi']} of {len(scores)} sounds: it needs .4 s that are not silent")
    if not has_pesq():
        out.append("no PESQ: that needs the package pesq, which a C compiler builds; pip install 'mmtok[evaluation]'")
    elif count["sounds_with_pesq"] < len(scores):
        out.append(
            f"PESQ is of {count['sounds_with_pesq']} of {len(scores)} sounds: it needs .25 s in which it finds speech"
        )
    return out

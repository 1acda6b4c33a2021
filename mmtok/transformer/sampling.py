"""Choosing ids from masked scores: temperature, top-k, top-p (nucleus, Holtzman et al. 2020, arXiv:1904.09751).

One uniform number per row decides, by the inverse of the cumulative distribution in order of id. A row's choice so
depends on its own scores and its own number alone: not on the other rows, nor on which never-allowed ids were left
out of the computation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmtok.config import Config
from mmtok.errors import ConfigError

MODALITIES = ("text", "image", "audio")
LOWEST = -1e30  # stands for a score that is not a number: possible, but the last choice


@dataclass(frozen=True)
class Sampling(Config):
    """How ids are chosen.

    Attributes:
        temperature: divides the scores; 0 takes the best id always.
        top_k: only the k best ids (more if the last are equal); 0 is no limit.
        top_p: only the best ids that together reach this probability, 0 < top_p <= 1.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"Sampling.temperature: got {self.temperature}, expected 0 (greedy) or more")
        if self.top_k < 0:
            raise ConfigError(f"Sampling.top_k: got {self.top_k}, expected 0 (no limit) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"Sampling.top_p: got {self.top_p}, expected more than 0 and at most 1 (no limit)")


class Sampler:
    """Samples rows of a batch with the settings of each row's modality, as whole-tensor operations."""

    def __init__(self, settings: Sampling | Mapping[str, Sampling], device: torch.device | str = "cpu") -> None:
        """Settings for everything, or for each of "text", "image" and "audio" (absent ones take ``Sampling()``).

        Raises:
            ConfigError: settings for something that is not a modality.
        """
        if isinstance(settings, Sampling):
            settings = dict.fromkeys(MODALITIES, settings)
        unknown = sorted(set(settings) - set(MODALITIES))
        if unknown:
            raise ConfigError(f"got sampling settings for {unknown[0]!r}, expected {', '.join(MODALITIES)}")
        rows = [settings.get(m, Sampling()) for m in MODALITIES]
        self._greedy = all(r.temperature == 0 for r in rows)
        filtered = [r.temperature > 0 and (r.top_k > 0 or r.top_p < 1) for r in rows]
        limits = [r.top_k or torch.iinfo(torch.int64).max for r in rows]
        self._width = max((k for k, f in zip(limits, filtered, strict=True) if f), default=0)  # how many to rank
        self._filtered = torch.tensor(filtered, device=device)
        self._temperature = torch.tensor([r.temperature for r in rows], dtype=torch.float64, device=device)
        self._top_k = torch.tensor(limits, device=device)
        self._top_p = torch.tensor([r.top_p for r in rows], dtype=torch.float64, device=device)

    def __call__(self, logits: Tensor, mask: Tensor, modality: Tensor, uniform: Tensor) -> Tensor:
        """Choose one column per row.

        Args:
            logits: float [B, V]; anything, infinities and NaN included.
            mask: bool [B, V], True = allowed, at least one in every row. Nothing else is ever chosen.
            modality: int64 [B], index in ``MODALITIES``: whose settings apply to the row.
            uniform: float [B], 0 <= u < 1, single precision: the chance.

        Returns:
            int64 [B].
        """
        scores = torch.nan_to_num(logits.double(), nan=LOWEST, posinf=-LOWEST, neginf=LOWEST)
        scores = scores.masked_fill(~mask, float("-inf"))
        best = scores.argmax(-1)
        if self._greedy:
            return best
        temperature = self._temperature[modality]
        probs = torch.softmax((scores - scores.amax(-1, True)) / temperature.clamp(min=1e-6)[:, None], -1)
        if self._width:
            probs = self._filter(probs, modality)
        cumulative = probs.cumsum(-1)
        # A single-precision u < 1 times the double total stays below it, so the first sum beyond is of a possible id.
        chosen = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
        return torch.where(temperature == 0, best, chosen)

    def _filter(self, probs: Tensor, modality: Tensor) -> Tensor:
        """Zero what top-k and top-p leave out. Equal probabilities stay or go together."""
        ranked = probs.topk(min(self._width, probs.shape[-1])).values  # best first
        rank = torch.arange(ranked.shape[-1], device=probs.device)
        kept = (rank < self._top_k[modality][:, None]) & (ranked.cumsum(-1) - ranked < self._top_p[modality][:, None])
        kept[:, 0] = True
        threshold = ranked.masked_fill(~kept, 2.0).amin(-1, True) * self._filtered[modality][:, None]
        return torch.where(probs >= threshold, probs, 0.0)


def uniforms(seed: int, rows: Sequence[int], count: int) -> Tensor:
    """The chance of a generation: float32 [len(rows), count], 0 <= u < 1, a generator per row seeded by (seed, row)."""
    draws = [np.random.default_rng((seed % 2**64, row)).random(count, dtype=np.float32) for row in rows]
    return torch.from_numpy(np.stack(draws))

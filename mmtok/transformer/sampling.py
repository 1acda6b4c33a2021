"""Choosing ids from masked scores: guidance, repetition penalty, temperature, top-k, top-p.

Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598); the penalty of CTRL (Keskar et al. 2019,
arXiv:1909.05858); nucleus sampling, top-p (Holtzman et al. 2020, arXiv:1904.09751). They apply in this order.

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
COLDEST = 1e-6  # a temperature that no other is below, but for 0
RANKED = 128  # ids that are ranked at first
LOWEST = -1e30  # stands for a score that is not a number: possible, but the last choice


@dataclass(frozen=True)
class Sampling(Config):
    """How ids are chosen.

    Attributes:
        temperature: divides the scores; 0 takes the best id always.
        top_k: only the k best ids (more if the last are equal); 0 is no limit.
        top_p: only the best ids that together reach this probability, 0 < top_p <= 1.
        repetition_penalty: of the ids that the segment already holds, scores above 0 are divided by it and others
            multiplied; 1 is none.
        guidance: of images and sounds: scores become those without the question plus so many times the difference
            that the question makes; 1 is none, which costs nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"Sampling.temperature: got {self.temperature}, expected 0 (greedy) or more")
        if self.top_k < 0:
            raise ConfigError(f"Sampling.top_k: got {self.top_k}, expected 0 (no limit) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"Sampling.top_p: got {self.top_p}, expected more than 0 and at most 1 (no limit)")
        if not 0 < self.repetition_penalty < float("inf"):
            got = self.repetition_penalty
            raise ConfigError(f"Sampling.repetition_penalty: got {got}, expected more than 0; 1 is none")
        if not 0 <= self.guidance < float("inf"):
            raise ConfigError(f"Sampling.guidance: got {self.guidance}, expected 0 or more; 1 is none")


class Sampler:
    """Samples rows of a batch with the settings of each row's modality, as whole-tensor operations.

    Attributes:
        guided: bool [3], the modalities that are sampled with guidance.
        guides, penalises: whether any modality has guidance, or a repetition penalty.
    """

    def __init__(self, settings: Sampling | Mapping[str, Sampling], device: torch.device | str = "cpu") -> None:
        """Settings for everything, or for each of "text", "image" and "audio" (absent ones take ``Sampling()``).

        Raises:
            ConfigError: settings for something that is not a modality, or guidance for text.
        """
        if isinstance(settings, Sampling):
            settings = dict.fromkeys(MODALITIES, settings)
        unknown = sorted(set(settings) - set(MODALITIES))
        if unknown:
            raise ConfigError(f"got sampling settings for {unknown[0]!r}, expected {', '.join(MODALITIES)}")
        rows = [settings.get(m, Sampling()) for m in MODALITIES]
        if rows[0].guidance != 1:
            raise ConfigError(
                f"got guidance {rows[0].guidance} for text, expected 1: guidance is for images and sounds; "
                "give settings of each modality"
            )
        filtered = [r.temperature > 0 and (r.top_k > 0 or r.top_p < 1) for r in rows]
        limits = [r.top_k or torch.iinfo(torch.int64).max for r in rows]
        self._width = max((k for k, f in zip(limits, filtered, strict=True) if f), default=0)  # how many to rank
        self._filtered = torch.tensor(filtered, device=device)
        self._top_k = torch.tensor(limits, device=device)

        def each(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)

        self._greedy = torch.tensor([r.temperature == 0 for r in rows], device=device)
        self._temperature = each([max(r.temperature, COLDEST) for r in rows])
        self._top_p = each([r.top_p for r in rows])
        self._penalty, self._guidance = each([r.repetition_penalty for r in rows]), each([r.guidance for r in rows])
        self.guided = self._guidance != 1
        self.guides, self.penalises = bool(self.guided.any()), bool((self._penalty != 1).any())

    def guide(self, logits: Tensor, without: Tensor, mask: Tensor, codes: Tensor, modality: Tensor) -> Tensor:
        """Scores with guidance, for the columns that are codes and the rows whose modality has it; the rest stays.

        Each row's codes keep, all together, the probability that they have by ``logits``: that a sound ends is as
        likely as it is without guidance.

        Args:
            logits: float [B, V], anything.
            without: float [B, V], the scores without the question; whatever in rows that have no guidance.
            mask: bool [B, V], True = allowed.
            codes: bool [V].
            modality: int64 [B], index in ``MODALITIES``.

        Returns:
            float [B, V].
        """
        scale = self._guidance[modality][:, None]
        guided = torch.lerp(without, logits, scale.to(logits.dtype))
        on = codes & (scale != 1)
        if not bool(codes.all()):
            hidden = ~(on & mask)
            sums = [x.double().masked_fill(hidden, float("-inf")).logsumexp(-1, True) for x in (logits, guided)]
            guided = guided + (sums[0] - sums[1]).nan_to_num(0.0)
        return torch.where(on, guided, logits)

    def __call__(
        self, logits: Tensor, mask: Tensor, modality: Tensor, uniform: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        """Choose one column per row.

        Args:
            logits: float [B, V]; anything, infinities and NaN included.
            mask: bool [B, V], True = allowed, at least one in every row. Nothing else is ever chosen.
            modality: int64 [B], index in ``MODALITIES``: whose settings apply to the row.
            uniform: float [B], 0 <= u < 1, single precision: the chance.
            seen: bool [B, V], the columns that the repetition penalty is for; None for none.

        Returns:
            int64 [B].
        """
        scores = torch.nan_to_num(logits.double(), nan=LOWEST, posinf=-LOWEST, neginf=LOWEST)
        if seen is not None:
            penalty = self._penalty[modality][:, None]
            scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
        scores = scores.masked_fill(~mask, float("-inf"))
        if self._greedy.all():
            return scores.argmax(-1)
        probs = torch.softmax(scores / self._temperature[modality][:, None], -1)
        if self._width:
            probs = self._filter(probs, modality)
        cumulative = probs.cumsum(-1)
        # A single-precision u < 1 times the double total stays below it, so the first sum beyond is of a possible id.
        chosen = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
        return torch.where(self._greedy[modality], scores.argmax(-1), chosen) if self._greedy.any() else chosen

    def _filter(self, probs: Tensor, modality: Tensor) -> Tensor:
        """Zero what top-k and top-p leave out. Equal probabilities stay or go together."""
        top_k, top_p, filtered = (x[modality][:, None] for x in (self._top_k, self._top_p, self._filtered))
        most = min(self._width, probs.shape[-1])
        width = min(most, RANKED)
        while True:  # to rank all is slow, and few reach top-p in most rows
            ranked = probs.topk(width).values  # best first
            sums = ranked.cumsum(-1)
            enough = (sums[:, -1:] >= top_p) | (top_k <= width) | ~filtered
            if width == most or bool(enough.all()):
                break
            width = min(most, 8 * width)
        rank = torch.arange(width, device=probs.device)
        kept = (rank < top_k) & (sums - ranked < top_p)
        kept[:, 0] = True
        threshold = ranked.masked_fill(~kept, 2.0).amin(-1, True) * filtered
        return torch.where(probs >= threshold, probs, 0.0)


def uniforms(seed: int, rows: Sequence[int], count: int) -> Tensor:
    """The chance of a generation: float32 [len(rows), count], 0 <= u < 1, a generator per row seeded by (seed, row)."""
    draws = [np.random.default_rng((seed % 2**64, row)).random(count, dtype=np.float32) for row in rows]
    return torch.from_numpy(np.stack(draws))

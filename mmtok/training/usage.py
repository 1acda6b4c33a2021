"""The life of codebooks in training: how often each code was drawn since the last look."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmtok.codebook import DEAD_SHARE, sum_over_ranks
from mmtok.training.histograms import code_histogram, codebook_usage, perplexity

Figures = dict[str, float]


class CodebookUsage(nn.Module):
    """Counts of the codes of each level; buffers, so that a resumed run goes on counting.

    Usage within one batch misleads: a batch holds fewer vectors than a large codebook has codes.

    Args:
        codebook_sizes: codes of each level.
    """

    def __init__(self, codebook_sizes: Sequence[int]) -> None:
        super().__init__()
        for level, size in enumerate(codebook_sizes):
            self.register_buffer(f"level_{level}", torch.zeros(size, dtype=torch.int64))

    @torch.no_grad()
    def count(self, codes: Tensor) -> None:
        """Take in codes int64 [..., levels]; in training mode those of all ranks, which must all call it."""
        for level, counts in enumerate(self.buffers()):
            drawn = code_histogram(codes[..., level], len(counts))
            counts += sum_over_ranks(drawn) if self.training else drawn

    def figures(self) -> Figures:
        """``usage`` (share of the codes drawn at all), ``perplexity``, and ``dead`` codes (drawn less than a tenth as
        often as if all were drawn alike), of each level (``usage_1`` is level 1's); empty where nothing was counted.
        """
        out: Figures = {}
        for level, counts in enumerate(self.buffers()):
            if counts.any():
                name = f"_{level}" if level else ""
                least = DEAD_SHARE * float(counts.sum()) / len(counts)
                out[f"usage{name}"] = codebook_usage(counts)
                out[f"perplexity{name}"] = perplexity(counts)
                out[f"dead{name}"] = float((counts < least).sum())
        return out

    def reset(self) -> None:
        """Begin to count anew."""
        for counts in self.buffers():
            counts.zero_()

"""How often the codes of a codebook occur, and what follows from it: used in training and in evaluation alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmtok.errors import VocabularyError


def code_histogram(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs: int64 [codebook_size]. Histograms of batches add up.

    Args:
        codes: integers of any shape, 0..codebook_size - 1.

    Raises:
        VocabularyError: not integers, or a code out of range.
    """
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise VocabularyError(f"got codes {codes.dtype}, expected integers")
    flat = codes.flatten().long()
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= codebook_size):
        raise VocabularyError(f"got codes {int(flat.min())}..{int(flat.max())}, expected 0..{codebook_size - 1}")
    return torch.bincount(flat, minlength=codebook_size)


def codebook_usage(histogram: Tensor) -> float:
    """Share of the codes that occur at all, 0..1, of a histogram [codebook_size]."""
    check_histogram(histogram)
    return float((histogram > 0).double().mean())


def perplexity(histogram: Tensor) -> float:
    """2 ** :func:`entropy_bits`, 1..codebook_size: how many codes, used equally often, would carry as much."""
    return 2.0 ** entropy_bits(histogram)


def entropy_bits(histogram: Tensor) -> float:
    """Entropy of the codes in bits a code, 0..log2(codebook_size), of a histogram [codebook_size].

    Raises:
        VocabularyError: no code was counted.
    """
    check_histogram(histogram)
    share = histogram.double() / histogram.sum()
    return float(-torch.special.xlogy(share, share).sum() / math.log(2)) + 0.0


def check_histogram(histogram: Tensor) -> None:
    """Raise VocabularyError unless ``histogram`` is [codebook_size], of counts that are not all zero."""
    if histogram.dim() != 1 or bool((histogram < 0).any()) or not histogram.sum() > 0:
        raise VocabularyError(f"got a histogram {list(histogram.shape)} without counts, expected [codebook_size]")

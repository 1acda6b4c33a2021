"""The health of image tokenizers on a set of pictures, and beside JPEG, WebP and AVIF at the same bits.

``measure``      -- one tokenizer: closeness, bits, use of the codebooks, stability, speed
``image_report`` -- several, and the peers at exactly their bits
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmtok.evaluation.baselines import at_bits, sweeps
from mmtok.evaluation.closeness import Closeness, compare, notes, summarize
from mmtok.evaluation.metrics import adaptive_bits, code_histogram, codebook_usage, entropy_bits, perplexity
from mmtok.evaluation.pictures import Pictures
from mmtok.evaluation.sets import progress
from mmtok.image.tokenizer import ImageTokenizer, match_channels

# Two ways to count the bits of tokens, by the name of their rate in a tokenizer's figures.
RATES = ("bits_per_pixel", "adaptive_bits_per_pixel")


def measure(tokenizer: ImageTokenizer, pictures: Pictures, label: str = "") -> tuple[dict[str, Any], list[float]]:
    """Figures of one tokenizer on a set, and the PSNR of each picture in dB.

    Every picture is encoded and decoded by itself, at its own size. What is compared is how it looks on white, also
    for a tokenizer that keeps alpha.

    Returns:
        ``psnr_of_mean_error_db``, ``psnr_mean_db``, ``ssim``, ``ms_ssim``, ``ms_ssim_3_scales``: see ``summarize``.
        ``tokens``; ``bits_per_pixel``: tokens as long as the logarithm of their codebook over the pictures' own pixels;
        ``adaptive_bits_per_pixel``: the same under :func:`adaptive_bits`, a level at a time, which starts anew for this
        set and pays for learning it.
        ``codes_kept``: share of codes that are the same after decoding to uint8, which a PNG keeps, and encoding again.
        ``levels``: for each codebook, coarse to fine, its usage, perplexity, entropy and adaptive bits a token, and the
        share kept.
        ``prefixes``: for a residual quantizer, closeness and bits with the first 1, 2, ... levels alone.
        ``speed``: of encode and decode, pictures one after the other, with the threads that torch has now.
    """
    sizes = tokenizer.codebook_sizes
    levels = len(sizes)
    histograms = [torch.zeros(size, dtype=torch.int64) for size in sizes]
    kept = torch.zeros(levels, dtype=torch.int64)
    scores: list[list[Closeness]] = [[] for _ in sizes]  # with the first 1, 2, ... levels
    encoding = decoding = 0.0

    reconstruct(tokenizer, pictures, 0)  # buffers and kernels are chosen on the first call, off the clock
    for i in progress(range(len(pictures)), label):
        source, size = _input(tokenizer, pictures, i), pictures.sizes[i]
        started = time.perf_counter()
        codes = _codes(tokenizer, source)
        encoded = time.perf_counter()
        back = _pixels(tokenizer, codes, size)
        decoding += time.perf_counter() - encoded
        encoding += encoded - started

        original = torch.from_numpy(pictures[i])[None]
        scores[-1] += compare(original, match_channels(back[None], 3))
        for n in range(1, levels):
            part = _pixels(tokenizer, codes[..., :n], size)
            scores[n - 1] += compare(original, match_channels(part[None], 3), multiscale=False)
        ours, again = (c.reshape(-1, levels) for c in (codes, _codes(tokenizer, back)))
        kept += (ours == again).sum(0)
        for histogram, column in zip(histograms, ours.T, strict=True):
            histogram += code_histogram(column, len(histogram))

    tokens = int(histograms[0].sum())
    adaptive = [adaptive_bits(h) for h in histograms]
    nominal = [tokens * math.log2(size) for size in sizes]
    figures = {
        "fingerprint": tokenizer.fingerprint,
        "downsample": tokenizer.downsample,
        "codebook_sizes": list(sizes),
        "tokens": tokens * levels,
        "bits_per_pixel": _rate(nominal, pictures),
        "adaptive_bits_per_pixel": _rate(adaptive, pictures),
        **summarize(scores[-1]),
        "codes_kept": round(int(kept.sum()) / (tokens * levels), 4),
        "levels": [
            {
                "codebook_size": size,
                "usage": round(codebook_usage(histogram), 4),
                "perplexity": round(perplexity(histogram), 1),
                "entropy_bits": round(entropy_bits(histogram), 3),
                "adaptive_bits": round(bits / tokens, 3),
                "codes_kept": round(int(same) / tokens, 4),
            }
            for size, histogram, bits, same in zip(sizes, histograms, adaptive, kept, strict=True)
        ],
        "prefixes": [
            {
                "levels": n,
                "bits_per_pixel": _rate(nominal[:n], pictures),
                **{k: v for k, v in summarize(scores[n - 1]).items() if not k.startswith("ms_")},
            }
            for n in range(1, levels + 1)
            if levels > 1
        ],
        "speed": {
            "threads": torch.get_num_threads(),
            **_speed("encode", encoding, pictures),
            **_speed("decode", decoding, pictures),
        },
        "notes": notes(scores[-1]),
    }
    return figures, [s.psnr for s in scores[-1]]


def image_report(
    tokenizers: Mapping[str, ImageTokenizer], pictures: Pictures, peers: Sequence[str]
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Figures of several tokenizers on one set, with what each peer reaches at exactly their bits.

    Args:
        tokenizers: by the names that the report gives them.
        pictures: the set.
        peers: formats of :data:`mmtok.evaluation.baselines.PEERS` that this Pillow has.

    Returns:
        ``tokenizers``: ``measure`` of each, with ``at_equal_bits`` by way of counting the tokens' bits (``RATES``),
        peer and way of counting the peer's bytes (:mod:`mmtok.evaluation.baselines`). ``peers``: their curves, by way
        of counting. And beside them the PSNR of each picture, by tokenizer.
    """
    figures, psnrs = {}, {}
    for name, tokenizer in tokenizers.items():
        figures[name], psnrs[name] = measure(tokenizer, pictures, name)
    targets = sorted({f[rate] for f in figures.values() for rate in RATES})
    curves = {form: sweeps(form, pictures, targets) for form in peers}
    for f in figures.values():
        f["at_equal_bits"] = {
            rate: {form: {kind: at_bits(points, f[rate]) for kind, points in curves[form].items()} for form in peers}
            for rate in RATES
        }
    return {"tokenizers": figures, "peers": curves}, psnrs


def reconstruct(tokenizer: ImageTokenizer, pictures: Pictures, index: int) -> Tensor:
    """What comes back of one picture, on white: uint8 [3, H, W]."""
    codes = _codes(tokenizer, _input(tokenizer, pictures, index))
    return match_channels(_pixels(tokenizer, codes, pictures.sizes[index])[None], 3)[0]


def _input(tokenizer: ImageTokenizer, pictures: Pictures, index: int) -> Tensor:
    """uint8 [channels, H, W]."""
    return torch.from_numpy(pictures.with_alpha(index) if tokenizer.channels == 4 else pictures[index])


def _codes(tokenizer: ImageTokenizer, pixels: Tensor) -> Tensor:
    """uint8 [channels, H, W] -> int64 [h, w] or [h, w, levels]; on the CPU, so that a clock sees all of the work."""
    return tokenizer.encode([pixels])[0].cpu()


def _pixels(tokenizer: ImageTokenizer, codes: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse: uint8 [channels, H, W]."""
    return tokenizer.decode([codes], [size])[0].cpu()


def _rate(bits: Sequence[float], pictures: Pictures) -> float:
    return round(math.fsum(bits) / pictures.pixels, 6)


def _speed(what: str, seconds: float, pictures: Pictures) -> dict[str, float]:
    return {
        f"{what}_images_per_second": round(len(pictures) / seconds, 1),
        f"{what}_megapixels_per_second": round(pictures.pixels / 1e6 / seconds, 3),
    }

"""What a tokenizer does to one text, picture or recording: tokens, bits and how close it comes back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from mmtok import media
from mmtok.documents import Audio, Image, Text
from mmtok.errors import MediaError
from mmtok.evaluation.metrics import log_mel_distance, psnr, ssim, stoi
from mmtok.image.tokenizer import match_channels


def roundtrip_text(tokenizer: Any, segment: Text) -> tuple[Text, dict[str, Any]]:
    """Through a text tokenizer: tokens, bits, bytes per token, and whether the text is the same (it must be)."""
    codes = tokenizer.encode([segment.text])[0]
    back = tokenizer.decode([codes])[0]
    size = len(segment.text.encode())
    figures = {
        **_bits(len(codes), tokenizer.codebook_sizes),
        "bytes": size,
        "bytes_per_token": round(size / max(1, len(codes)), 3),
        "identity": back == segment.text,
    }
    return Text(back), figures


def roundtrip_image(tokenizer: Any, segment: Image) -> tuple[Image, dict[str, Any]]:
    """Through an image tokenizer: tokens, bits, bits per pixel, PSNR in dB and SSIM.

    Bits per pixel are over the pixels of the picture, although the codes span its padding too. PSNR is None for an
    exact copy, SSIM is None for sides below 11 pixels.
    """
    height, width = segment.pixels.shape[1:]
    pixels = torch.from_numpy(np.ascontiguousarray(segment.pixels))[None]
    codes = tokenizer.encode(pixels)
    back = match_channels(tokenizer.decode(codes, (height, width)), 3)
    x, y = (a.float() / 255 for a in (pixels, back))
    level = float(psnr(x, y)[0])
    bits = _bits(codes.shape[1] * codes.shape[2], tokenizer.codebook_sizes)
    figures = {
        **bits,
        "height": height,
        "width": width,
        "bits_per_pixel": round(bits["bits"] / (height * width), 4),
        "psnr_db": round(level, 2) if math.isfinite(level) else None,
        "ssim": round(float(ssim(x, y)[0]), 4) if min(height, width) >= 11 else None,
    }
    return Image(back[0].numpy()), figures


def roundtrip_audio(tokenizer: Any, segment: Audio, levels: int | None = None) -> tuple[Audio, dict[str, Any]]:
    """Through an audio codec, at its sample rate and in mono: tokens, bits, kb/s, STOI and log-mel distance in dB.

    STOI is None where it is not defined: below about 0.4 s of sound.

    Args:
        tokenizer: the codec.
        segment: any rate and channels.
        levels: use only the first so many codebooks.
    """
    if not segment.samples.shape[1]:
        raise MediaError("got an empty recording, expected at least one sample")
    rate = int(tokenizer.properties["sample_rate"])
    mono = media.resample(segment.samples.mean(0, keepdims=True), segment.sample_rate, rate)
    x = torch.from_numpy(np.ascontiguousarray(mono, np.float32))[None]
    codes = tokenizer.encode(x) if levels is None else tokenizer.encode(x, levels)
    y = tokenizer.decode(codes, x.shape[-1])
    rows = codes[0] if isinstance(codes, torch.Tensor) else [level[0] for level in codes]  # levels of their own rates
    bits = sum(len(row) * math.log2(size) for row, size in zip(rows, tokenizer.codebook_sizes, strict=False))
    score = float(stoi(x, y, rate)[0])
    figures = {
        "tokens": sum(map(len, rows)),
        "bits": round(bits, 1),
        "seconds": round(x.shape[-1] / rate, 3),
        "codebooks": len(rows),
        "kilobits_per_second": round(bits / (x.shape[-1] / rate) / 1000, 3),
        "stoi": round(score, 4) if math.isfinite(score) else None,
        "log_mel_distance_db": round(float(log_mel_distance(x, y, rate)[0]), 2),
    }
    return Audio(y[0].numpy(), rate), figures


def _bits(places: int, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Of places with a token of each codebook. Nominal bits: every token as long as the logarithm of its codebook."""
    return {"tokens": places * len(sizes), "bits": round(places * sum(map(math.log2, sizes)), 1)}

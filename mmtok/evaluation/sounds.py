"""The health of audio tokenizers on a set of sounds, and beside Opus at the same bits.

``measure``      -- one tokenizer: fidelity by number of levels, bits, use of the codebooks, stability, speed
``sound_report`` -- several, and Opus at exactly their bits
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtok.audio.encodec import Encodec, EncodecCodes
from mmtok.audio.tokenizer import AudioTokenizer
from mmtok.errors import ConfigError
from mmtok.evaluation.fidelity import FIGURES, Fidelity, compare, notes, summarize
from mmtok.evaluation.metrics import adaptive_bits, code_histogram, codebook_usage, entropy_bits, perplexity
from mmtok.evaluation.opus import Sweep
from mmtok.evaluation.rates import at_rate, rate_for
from mmtok.evaluation.recordings import Recordings
from mmtok.evaluation.sets import progress
from mmtok.training.corpus import Item

AXIS = "kilobits_per_second"
# Two ways to count the bits of tokens, by the name of their rate in a tokenizer's figures.
RATES = (AXIS, "adaptive_kilobits_per_second")
NEAR_TIE = 1e-4  # a second code is almost as near where its squared distance is larger by at most this share

SCALE_BITS = 32  # of each loudness that the 48 kHz EnCodec stores beside its codes

Codes = Tensor | Sequence[Tensor] | EncodecCodes


def measure(
    tokenizer: AudioTokenizer, recordings: Recordings, label: str = ""
) -> tuple[dict[str, Any], dict[int, list[Fidelity]]]:
    """Figures of one tokenizer on a set, and the fidelity of each sound by the number of levels.

    Every sound is encoded and decoded by itself.

    Returns:
        ``sample_rate``, ``hop``, ``channels``, ``codebook_sizes``; ``bandwidth``: nominal kb/s of all levels;
        ``tokens``.
        ``prefixes``: for the first 1, 2, 4, ... and all of the levels, as far as the tokenizer can work with so many:
        ``kilobits_per_second``, tokens as long as the logarithm of their codebook over the sounds' own seconds, and
        ``SCALE_BITS`` for each scale that goes with the codes;
        ``adaptive_kilobits_per_second``, the same under :func:`adaptive_bits`, a level at a time, which starts anew for
        this set and pays for learning it; and the means of :func:`mmtok.evaluation.fidelity.summarize`.
        ``by_source``: for each kind of sound that the manifest names, its number and seconds and the prefixes.
        ``codes_kept``: share of codes that are the same after decoding and encoding again.
        ``levels``: for each codebook, coarse to fine, its usage, perplexity, entropy and adaptive bits a token, the
        share kept, and the share of near ties (``NEAR_TIE``), None where the tokenizer cannot tell.
        ``speed``: seconds of work for a second of sound, with the threads that torch has now.
    """
    sizes = tokenizer.codebook_sizes
    chosen = prefixes(tokenizer)
    histograms = [torch.zeros(size, dtype=torch.int64) for size in sizes]
    per_sound: list[list[int]] = []  # tokens of each level
    beside_codes: list[int] = []  # bits
    kept = torch.zeros(len(sizes), dtype=torch.int64)
    ties: list[int] | None = [0] * len(sizes)
    scores: dict[int, list[Fidelity]] = {n: [] for n in chosen}
    encoding = decoding = 0.0

    reconstruct(tokenizer, recordings[0])  # buffers and kernels are chosen on the first call, off the clock
    for x in progress(recordings, label):
        samples = torch.from_numpy(x)[None]
        started = time.perf_counter()
        codes = _encode(tokenizer, samples)
        encoded = time.perf_counter()
        back = _decode(tokenizer, codes, x.shape[1])
        decoding += time.perf_counter() - encoded
        encoding += encoded - started

        for n in chosen:
            part = back if n == len(sizes) else _decode(tokenizer, _first(codes, n), x.shape[1])
            scores[n].append(compare(x, part[0].cpu().numpy(), recordings.sample_rate))
        rows = _rows(codes)
        per_sound.append([len(row) for row in rows])
        beside_codes.append(SCALE_BITS * codes.scales.numel() if isinstance(codes, EncodecCodes) else 0)
        for level, (row, again) in enumerate(zip(rows, _rows(_encode(tokenizer, back)), strict=True)):
            histograms[level] += code_histogram(row, sizes[level])
            kept[level] += int((row == again).sum())
        found = tokenizer.near_ties(samples, NEAR_TIE)
        if found is None or ties is None:
            ties = None
        else:
            ties = [have + int(row.sum()) for have, row in zip(ties, _rows(found), strict=True)]

    tokens = [int(h.sum()) for h in histograms]
    adaptive = [adaptive_bits(h) for h in histograms]
    seconds = recordings.seconds()

    def figures_of(indices: Sequence[int]) -> list[dict[str, Any]]:
        bits = [math.log2(size) * sum(per_sound[i][q] for i in indices) for q, size in enumerate(sizes)]
        more = sum(beside_codes[i] for i in indices)
        return [
            {
                "levels": n,
                AXIS: _kilobits([*bits[:n], more], recordings.seconds(indices)),
                **summarize([scores[n][i] for i in indices]),
            }
            for n in chosen
        ]

    whole = figures_of(range(len(recordings)))
    for prefix in whole:
        bits = [*adaptive[: prefix["levels"]], sum(beside_codes)]
        prefix["adaptive_kilobits_per_second"] = _kilobits(bits, seconds)
    remarks = notes(scores[len(sizes)])
    if ties is None:
        remarks.append("no near ties: the tokenizer does not tell how near its second codes are")
    figures = {
        "fingerprint": tokenizer.fingerprint,
        "sample_rate": tokenizer.sample_rate,
        "hop": tokenizer.hop,
        "channels": tokenizer.channels,
        "codebook_sizes": list(sizes),
        "bandwidth": round(tokenizer.bandwidth(), 4),
        "tokens": sum(tokens),
        "prefixes": whole,
        "by_source": {
            source: {
                "sounds": len(indices),
                "seconds": round(recordings.seconds(indices), 2),
                "prefixes": figures_of(indices),
            }
            for source, indices in recordings.by_source().items()
        },
        "codes_kept": round(int(kept.sum()) / sum(tokens), 4),
        "levels": [
            {
                "codebook_size": size,
                "usage": round(codebook_usage(histogram), 4),
                "perplexity": round(perplexity(histogram), 1),
                "entropy_bits": round(entropy_bits(histogram), 3),
                "adaptive_bits": round(adaptive[level] / tokens[level], 3),
                "codes_kept": round(int(kept[level]) / tokens[level], 4),
                "near_ties": None if ties is None else round(ties[level] / tokens[level], 6),
            }
            for level, (size, histogram) in enumerate(zip(sizes, histograms, strict=True))
        ],
        "speed": {
            "threads": torch.get_num_threads(),
            "encode_real_time_factor": round(encoding / seconds, 5),
            "decode_real_time_factor": round(decoding / seconds, 5),
        },
        "notes": remarks,
    }
    return figures, scores


def sound_report(
    tokenizers: Mapping[str, AudioTokenizer], chosen: Sequence[Item], opus: bool
) -> tuple[dict[str, Any], dict[str, Recordings], dict[str, list[Fidelity]]]:
    """Figures of several tokenizers on one set, with what Opus reaches at exactly their bits.

    Args:
        tokenizers: by the names that the report gives them.
        chosen: the files.
        opus: whether to measure Opus too, at each tokenizer's own rate and channels.

    Returns:
        ``sounds``, ``seconds``, ``unreadable``; ``tokenizers``: ``measure`` of each, where every prefix also has
        ``opus``: what it reaches ``at_equal_bits`` by way of counting the tokens' bits (``RATES``), and the kb/s that
        it ``needs`` for the same STOI and the same PESQ; ``peers``: the curve of Opus, by rate and channels. And
        beside them the sounds as each tokenizer takes them, and their fidelity with all levels.
    """
    sets: dict[tuple[int, int], Recordings] = {}
    figures, taken, scores = {}, {}, {}
    for name, tokenizer in tokenizers.items():
        form = (tokenizer.sample_rate, tokenizer.channels)
        if form not in sets:
            sets[form] = Recordings(chosen, *form)
        taken[name] = sets[form]
        figures[name], made = measure(tokenizer, sets[form], name)
        scores[name] = made[len(tokenizer.codebook_sizes)]
    curves = {}
    for (rate, channels), recordings in sets.items() if opus else ():
        mine = [f for f in figures.values() if (f["sample_rate"], f["channels"]) == (rate, channels)]
        sweep = Sweep(recordings, 1000 * max(f["prefixes"][-1][AXIS] for f in mine))
        curve = curves[form_name(rate, channels)] = sweep.curve()
        parts = {source: sweep.curve(indices) for source, indices in recordings.by_source().items()}
        for f in mine:
            for prefix in f["prefixes"]:
                prefix["opus"] = beside(prefix, curve)
            for source, part in f["by_source"].items():
                for prefix in part["prefixes"]:
                    prefix["opus"] = beside(prefix, parts[source])
    first = next(iter(taken.values()))
    report = {
        "sounds": len(first),
        "seconds": round(first.seconds(), 2),
        "unreadable": first.unreadable,
        "tokenizers": figures,
        "peers": {"opus": curves} if opus else {},
    }
    return report, taken, scores


def beside(figures: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What Opus reaches at the bits of a tokenizer, and which bits it needs for the same; see ``sound_report``."""
    return {
        "at_equal_bits": {rate: at_rate(curve, AXIS, figures[rate], FIGURES) for rate in RATES if rate in figures},
        "needs": {
            key: rate_for(curve, AXIS, key, figures[key], FIGURES[key])
            for key in ("stoi", "pesq_wb")
            if figures[key] is not None
        },
    }


def form_name(sample_rate: int, channels: int) -> str:
    """How the report calls sounds of this form."""
    return f"{sample_rate} Hz, {('mono', 'stereo')[channels - 1]}"


def prefixes(tokenizer: AudioTokenizer) -> list[int]:
    """The powers of two and all of the levels, as far as the tokenizer can work with so many."""
    count = len(tokenizer.codebook_sizes)
    out = []
    for n in sorted({2**i for i in range(count.bit_length()) if 2**i < count} | {count}):
        try:
            tokenizer.check_levels(n)
        except ConfigError:
            continue
        out.append(n)
    return out


def reconstruct(tokenizer: AudioTokenizer, samples: np.ndarray) -> np.ndarray:
    """What comes back of one sound, float32 [C, T]."""
    codes = _encode(tokenizer, torch.from_numpy(samples)[None])
    return _decode(tokenizer, codes, samples.shape[1])[0].cpu().numpy()


def _encode(tokenizer: AudioTokenizer, samples: Tensor) -> Codes:
    """Codes of one sound, with the scales where they do not mean anything without them."""
    if isinstance(tokenizer, Encodec) and tokenizer.channels == 2:
        return tokenizer.encode_with_scale(samples)
    return tokenizer.encode(samples)


def _decode(tokenizer: AudioTokenizer, codes: Any, length: int) -> Tensor:
    """The inverse: float32 [1, C, length]."""
    if isinstance(tokenizer, Encodec) and isinstance(codes, EncodecCodes):
        return tokenizer.decode_with_scale(codes)
    return tokenizer.decode(codes, length)


def _rows(codes: Codes) -> list[Tensor]:
    """The codes of one sound, level by level: of [1, K, F], or of [1, n] each where levels have rates of their own."""
    if isinstance(codes, EncodecCodes):
        codes = codes.codes
    return [row.cpu() for row in (codes[0] if isinstance(codes, Tensor) else [level[0] for level in codes])]


def _first(codes: Codes, levels: int) -> Codes:
    """The first levels of the codes of one sound."""
    if isinstance(codes, EncodecCodes):
        return dataclasses.replace(codes, codes=codes.codes[:, :levels])
    return codes[:, :levels] if isinstance(codes, Tensor) else codes[:levels]


def _kilobits(bits: Sequence[float], seconds: float) -> float:
    return round(math.fsum(bits) / seconds / 1000, 4)

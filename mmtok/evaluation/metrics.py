"""How close a reconstruction is, and how much of a codebook is used. All functions are pure and work row by row.

SSIM and MS-SSIM are those of :mod:`mmtok.training.ssim`, histograms those of :mod:`mmtok.training.histograms`.
"""

from __future__ import annotations

import math
import warnings
from importlib.util import find_spec

import numpy as np
import pystoi
import torch
import torchaudio
from torch import Tensor

from mmtok.errors import ConfigError, MediaError
from mmtok.media import resample
from mmtok.training.histograms import check_histogram
from mmtok.training.histograms import code_histogram as code_histogram
from mmtok.training.histograms import codebook_usage as codebook_usage
from mmtok.training.histograms import entropy_bits as entropy_bits
from mmtok.training.histograms import perplexity as perplexity
from mmtok.training.ssim import ms_ssim as ms_ssim
from mmtok.training.ssim import ssim as ssim

# FFT, hop and window in samples of the multi-resolution STFT distance: table 1 of Parallel WaveGAN.
STFT_RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
PESQ_RATE = 16_000  # Hz of PESQ-WB
PESQ_SECONDS = 16  # PESQ was made for recordings of this length, and its C code crashes at 50 utterances, .4 s each


def psnr(x: Tensor, y: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of each pair, in dB; infinite for equal ones.

    Args:
        x, y: float [B, ...] of one shape, over a range of ``data_range`` (1 for 0..1, 2 for -1..1).

    Returns:
        float [B].
    """
    _check_pair(x, y)
    error = (x - y).flatten(1).pow(2).mean(dim=1)
    return 10 * torch.log10(data_range**2 / error)


def log_mel_distance(
    x: Tensor,
    y: Tensor,
    sample_rate: int,
    mels: int = 80,
    window: int = 1024,
    hop: int = 256,
    floor: float = 1e-5,
    unit: str = "dB",
) -> Tensor:
    """Mean absolute difference of log-mel magnitude spectra of each pair.

    Args:
        x, y: float [B, C, T] of one shape, T >= 1; channels are averaged first.
        sample_rate: Hz; the mel bands reach from 0 to half of it.
        mels: mel bands (Slaney scale and norm).
        window, hop: samples; Hann window.
        floor: magnitudes below it count as it.
        unit: "dB" (20 log10) or "nat" (natural logarithm); 1 nat is 8.686 dB.

    Returns:
        float [B]; 0 for equal signals.
    """
    _check_sounds(x, y)
    if unit not in ("dB", "nat"):
        raise MediaError(f"got unit {unit!r}, expected 'dB' or 'nat'")
    banks = torchaudio.functional.melscale_fbanks(
        window // 2 + 1, 0.0, sample_rate / 2, mels, sample_rate, norm="slaney", mel_scale="slaney"
    ).to(x)
    taper = torch.hann_window(window, dtype=x.dtype, device=x.device)

    def log_mel(z: Tensor) -> Tensor:
        # Zeros around: reflection is impossible for sounds shorter than half a window.
        padded = torch.nn.functional.pad(z.mean(dim=1), (window // 2, window // 2))
        spectrum = torch.stft(padded, window, hop, window=taper, center=False, return_complex=True).abs()
        return torch.log((spectrum.transpose(1, 2) @ banks).clamp_min(floor))

    distance = (log_mel(x) - log_mel(y)).abs().mean(dim=(1, 2))
    return distance * (20 / math.log(10)) if unit == "dB" else distance


def stoi(reference: Tensor, estimate: Tensor, sample_rate: int) -> Tensor:
    """Short-time objective intelligibility of each pair, through pystoi, which resamples to 10 kHz.

    Taal, Hendriks, Heusdens, Jensen: An algorithm for intelligibility prediction of time-frequency weighted noisy
    speech, IEEE TASL 2011.

    Args:
        reference, estimate: float [B, C, T] of one shape; channels are averaged first.
        sample_rate: Hz.

    Returns:
        float64 [B], about 0..1. NaN where less than 30 frames (.4 s) of the reference are not silent: such a pair
        has no STOI, and pystoi's own 1e-5 would pull a mean down.
    """
    _check_pair(reference, estimate)
    if reference.dim() != 3:
        raise MediaError(f"got audio {list(reference.shape)}, expected [B, C, T]")
    a, b = (z.mean(dim=1).detach().cpu().double().numpy() for z in (reference, estimate))
    return torch.tensor([_stoi(p, q, sample_rate) for p, q in zip(a, b, strict=True)], dtype=torch.float64)


def has_pesq() -> bool:
    """Whether the package ``pesq`` is installed."""
    return find_spec("pesq") is not None


def pesq_wb(reference: Tensor, estimate: Tensor, sample_rate: int) -> Tensor:
    """Wide-band PESQ of each pair, a listening quality (MOS-LQO) from about 1.0 to 4.64, through the package ``pesq``.

    ITU-T P.862.2 (2007), at 16 kHz: other rates are resampled. A sound of more than ``PESQ_SECONDS`` is scored in
    equal pieces, the mean of which is its score.

    Args:
        reference, estimate: float [B, C, T] of one shape; channels are averaged first.
        sample_rate: Hz.

    Returns:
        float64 [B]. NaN where PESQ finds no utterance in one of the two, or with less than a quarter of a second.

    Raises:
        ConfigError: ``pesq`` is not installed.
    """
    _check_pair(reference, estimate)
    if reference.dim() != 3:
        raise MediaError(f"got audio {list(reference.shape)}, expected [B, C, T]")
    if not has_pesq():
        raise ConfigError("PESQ needs the package pesq: pip install 'mmtok[evaluation]' (it is built by a C compiler)")
    a, b = (
        resample(z.mean(dim=1).detach().cpu().float().numpy(), sample_rate, PESQ_RATE) for z in (reference, estimate)
    )
    return torch.tensor([_pesq(p, q) for p, q in zip(a, b, strict=True)], dtype=torch.float64)


def stft_distance(x: Tensor, y: Tensor) -> Tensor:
    """Multi-resolution STFT distance of each pair: spectral convergence plus the difference of log magnitudes.

    Yamamoto, Song, Kim: Parallel WaveGAN (https://arxiv.org/abs/1910.11480), equations 4 to 6. The mean over
    ``STFT_RESOLUTIONS`` of ||X - Y|| / ||X|| (Frobenius norms of the magnitudes) and of |ln X - ln Y|, averaged over
    bins and frames; magnitudes below 3.2e-4 count as it. The first signal is the reference.

    Args:
        x, y: float [B, C, T] of one shape, T >= 1; channels are averaged first.

    Returns:
        float [B]; 0 for equal signals.
    """
    _check_sounds(x, y)
    total = x.new_zeros(len(x))
    for size, hop, window in STFT_RESOLUTIONS:
        taper = torch.hann_window(window, dtype=x.dtype, device=x.device)

        def magnitude(
            z: Tensor, size: int = size, hop: int = hop, window: int = window, taper: Tensor = taper
        ) -> Tensor:
            padded = torch.nn.functional.pad(z.mean(dim=1), (size // 2, size // 2))
            spectrum = torch.stft(padded, size, hop, window, taper, center=False, return_complex=True)
            return torch.view_as_real(spectrum).square().sum(-1).clamp_min(1e-7).sqrt()

        p, q = magnitude(x), magnitude(y)
        convergence = torch.linalg.matrix_norm(p - q) / torch.linalg.matrix_norm(p)
        total += convergence + (p.log() - q.log()).abs().mean(dim=(1, 2))
    return total / len(STFT_RESOLUTIONS)


def adaptive_bits(histogram: Tensor, prior: float = 0.5) -> float:
    """Bits of all codes of a histogram [codebook_size] under a model that learns their shares while it reads them.

    The model starts knowing nothing and keeps no order: a code that occurred n_c times among the n before it costs
    -log2((n_c + prior) / (n + prior * codebook_size)) bits. The sum is the same for every order of the codes, so that
    log-gamma functions of the counts give it exactly, without a loop. An arithmetic coder reaches it to two bits.

    Krichevsky, Trofimov: The performance of universal encoding, IEEE Transactions on Information Theory 1981.

    Args:
        histogram: counts of all codes.
        prior: what each count starts from; one half is Krichevsky's and Trofimov's.

    Raises:
        VocabularyError: no code was counted.
    """
    check_histogram(histogram)
    counts = histogram.double()
    start = torch.tensor([prior, prior * len(counts)], dtype=torch.float64, device=counts.device)
    total = torch.lgamma(counts.sum() + start[1]) - torch.lgamma(start[1])
    each = torch.lgamma(counts + prior) - torch.lgamma(start[0])
    return float((total - each.sum()) / math.log(2))


def _check_pair(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape or not x.is_floating_point() or not y.is_floating_point() or x.dim() < 2:
        raise MediaError(
            f"got {x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)}, expected two float [B, ...] of one shape"
        )


def _check_sounds(x: Tensor, y: Tensor) -> None:
    _check_pair(x, y)
    if x.dim() != 3 or x.shape[-1] == 0:
        raise MediaError(f"got audio {list(x.shape)}, expected [B, C, T] with T >= 1")


def _pesq(reference: np.ndarray, estimate: np.ndarray) -> float:
    from pesq import PesqError, pesq

    pieces = max(1, math.ceil(len(reference) / (PESQ_SECONDS * PESQ_RATE)))
    scores = []
    for a, b in zip(np.array_split(reference, pieces), np.array_split(estimate, pieces), strict=True):
        if a.any() and b.any():  # the package divides by the level
            try:
                scores.append(float(pesq(PESQ_RATE, a, b, "wb")))
            except PesqError:  # too short, or no utterance
                continue
    return math.fsum(scores) / len(scores) if scores else math.nan


def _stoi(reference: np.ndarray, estimate: np.ndarray, sample_rate: int) -> float:
    if len(reference) < sample_rate * 0.4 or not reference.any():
        return math.nan
    with warnings.catch_warnings():
        # pystoi warns and returns 1e-5 when too little of the reference is louder than silence.
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(pystoi.stoi(reference, estimate, sample_rate))
        except RuntimeWarning:
            return math.nan

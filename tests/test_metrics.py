"""Metrics against independent numpy and scipy implementations, and on inputs whose score is known."""

from __future__ import annotations

import math

import numpy as np
import pesq
import pystoi
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from mmtok import media
from mmtok.errors import ConfigError, MediaError, VocabularyError
from mmtok.evaluation import metrics
from mmtok.training.ssim import ms_min_side, ms_ssim, ssim


def pictures(batch: int, height: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.random((batch, 3, height, width)), (0, 0, 2, 2))
    x = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    y = np.clip(x + rng.normal(0, 0.05, x.shape) * rng.random((batch, 1, 1, 1)), 0, 1)
    return torch.from_numpy(x), torch.from_numpy(y)


def blur(plane: np.ndarray) -> np.ndarray:
    """Gaussian, sigma 1.5, 11x11, valid part."""
    return ndimage.gaussian_filter(plane, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]


def maps(x: np.ndarray, y: np.ndarray, data_range: float) -> tuple[np.ndarray, np.ndarray]:
    """Wang 2004 as the paper writes it, for one plane."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mx, my = blur(x), blur(y)
    sx, sy, sxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    return (2 * mx * my + c1) / (mx**2 + my**2 + c1), (2 * sxy + c2) / (sx + sy + c2)


def plain_ssim(x: np.ndarray, y: np.ndarray, data_range: float) -> float:
    return float(np.mean([np.mean(np.prod(maps(a, b, data_range), axis=0)) for a, b in zip(x, y, strict=True)]))


def plain_ms_ssim(x: np.ndarray, y: np.ndarray, scales: int = 5) -> float:
    scores = []
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:scales])
    last = scales - 1
    for a, b in zip(x, y, strict=True):
        score = 1.0
        for scale, weight in enumerate(weights / weights.sum()):
            luminance, contrast = maps(a, b, 1.0)
            score *= (np.mean(luminance * contrast) if scale == last else np.mean(contrast)) ** weight
            a, b = (
                z.reshape(z.shape[0] // 2, 2, z.shape[1] // 2, 2).mean((1, 3)) if scale < last else z for z in (a, b)
            )
        scores.append(score)
    return float(np.mean(scores))


# --- images


@pytest.mark.parametrize(("height", "width"), [(11, 11), (11, 30), (64, 48), (37, 53)])
@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_ssim_is_wangs(height: int, width: int, data_range: float) -> None:
    x, y = (z * data_range for z in pictures(3, height, width))
    got = ssim(x, y, data_range)
    expected = [plain_ssim(a.numpy(), b.numpy(), data_range) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-9)
    np.testing.assert_allclose(ssim(x.float(), y.float(), data_range).numpy(), expected, atol=1e-4)


def test_ssim_centred_range() -> None:
    x, y = pictures(1, 20, 20)
    shifted = ssim(x + 100 - 0.5, y + 100 - 0.5, 1.0).item()
    assert shifted != pytest.approx(ssim(x, y).item()), "the luminance term depends on the level"
    expected = plain_ssim(2 * x[0].numpy() - 1, 2 * y[0].numpy() - 1, 2.0)
    assert ssim(2 * x - 1, 2 * y - 1, 2.0).item() == pytest.approx(expected, abs=1e-9)


def test_ms_ssim_is_wangs() -> None:
    x, y = pictures(2, 176, 192)
    expected = [plain_ms_ssim(a.numpy(), b.numpy()) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(ms_ssim(x, y).numpy(), expected, atol=1e-9)
    assert metrics.ms_ssim(x[..., :161, :161], y[..., :161, :161]).shape == (2,)


@pytest.mark.parametrize("scales", [1, 3, 4])
def test_ms_ssim_of_fewer_scales(scales: int) -> None:
    x, y = pictures(2, 96, 88)
    expected = [plain_ms_ssim(a.numpy(), b.numpy(), scales) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(ms_ssim(x, y, scales=scales).numpy(), expected, atol=1e-9)
    side = ms_min_side(scales)
    assert ms_ssim(x[..., :side, :side], y[..., :side, :side], scales=scales).shape == (2,)
    with pytest.raises(MediaError, match=f"sides of at least {side}"):
        ms_ssim(x[..., : side - 1], y[..., : side - 1], scales=scales)
    with pytest.raises(MediaError, match="expected 1 to 5"):
        ms_ssim(x, y, scales=6)


def test_equal_images() -> None:
    x, _ = pictures(2, 161, 161)
    np.testing.assert_allclose(ssim(x, x).numpy(), 1, atol=1e-12)
    np.testing.assert_allclose(ms_ssim(x, x).numpy(), 1, atol=1e-12)
    assert metrics.psnr(x, x).tolist() == [math.inf, math.inf]
    flat = torch.full((1, 3, 16, 16), 0.5)
    assert ssim(flat, flat).item() == pytest.approx(1)


def test_ssim_has_the_right_gradient() -> None:
    x, y = pictures(1, 12, 13)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: ssim(z, y), (x,), atol=1e-6)
    noise = torch.rand(1, 1, 161, 161, requires_grad=True)
    ms_ssim(noise, 1 - noise.detach()).sum().backward()
    assert torch.isfinite(noise.grad).all(), "negative correlation must not give NaN"


def test_a_loss_on_ssim_goes_down() -> None:
    x, _ = pictures(1, 24, 24)
    y = torch.full_like(x, 0.5).requires_grad_()
    optimizer = torch.optim.Adam([y], 0.02)
    before = ssim(x, y).item()
    for _ in range(40):
        optimizer.zero_grad()
        (1 - ssim(x, y)).sum().backward()
        optimizer.step()
    assert ssim(x, y).item() > before + 0.3


@pytest.mark.parametrize("metric", [ssim, ms_ssim, metrics.psnr])
def test_rows_are_independent(metric) -> None:
    x, y = pictures(3, 161, 165)
    together = metric(x, y)
    assert together.shape == (3,)
    np.testing.assert_allclose(together.numpy(), [metric(x[i : i + 1], y[i : i + 1]).item() for i in range(3)])


def test_psnr_by_hand() -> None:
    x = torch.zeros(2, 3, 4, 4)
    y = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 1.0)])
    np.testing.assert_allclose(metrics.psnr(x, y).numpy(), [20, 0], atol=1e-5)
    np.testing.assert_allclose(metrics.psnr(x * 255, y * 255, 255).numpy(), [20, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("call", "x", "y"),
    [
        (ssim, torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20)),
        (ssim, torch.zeros(1, 3, 20, 20), torch.zeros(1, 3, 20, 21)),
        (ssim, torch.zeros(3, 20, 20), torch.zeros(3, 20, 20)),
        (ssim, torch.zeros(1, 3, 20, 20, dtype=torch.uint8), torch.zeros(1, 3, 20, 20, dtype=torch.uint8)),
        (ms_ssim, torch.zeros(1, 3, 160, 161), torch.zeros(1, 3, 160, 161)),
        (metrics.psnr, torch.zeros(2, 3), torch.zeros(3, 3)),
        (metrics.psnr, torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.uint8)),
    ],
)
def test_bad_images(call, x: torch.Tensor, y: torch.Tensor) -> None:
    with pytest.raises(MediaError, match="expected"):
        call(x, y)


# --- audio


def speech_like(seconds: float, rate: int = 16000, seed: int = 0) -> torch.Tensor:
    """Noise with a formant-like spectrum and syllables."""
    rng = np.random.default_rng(seed)
    n = round(seconds * rate)
    noise = ndimage.gaussian_filter1d(rng.normal(size=n), 3)
    envelope = 0.05 + np.abs(np.sin(2 * np.pi * 3 * np.arange(n) / rate))
    sound = noise * envelope
    return torch.from_numpy(sound / np.abs(sound).max()).float()[None, None]


def plain_log_mel(x: np.ndarray, rate: int, mels: int, window: int, hop: int) -> np.ndarray:
    x = np.pad(x, window // 2)
    taper = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    frames = np.stack([x[i : i + window] * taper for i in range(0, len(x) - window + 1, hop)])
    spectrum = np.abs(np.fft.rfft(frames))

    def to_mel(f: np.ndarray) -> np.ndarray:
        return np.where(f < 1000, 3 * f / 200, 15 + 27 * np.log(np.maximum(f, 1) / 1000) / np.log(6.4))

    def to_hz(m: np.ndarray) -> np.ndarray:
        return np.where(m < 15, 200 * m / 3, 1000 * np.exp(np.log(6.4) * (m - 15) / 27))

    edges = to_hz(np.linspace(0, to_mel(np.array(rate / 2)), mels + 2))
    f = np.linspace(0, rate / 2, window // 2 + 1)
    rising = (f - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - f) / (edges[2:] - edges[1:-1])[:, None]
    banks = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return np.log(np.maximum(spectrum @ banks.T, 1e-5))


def test_log_mel_distance_against_numpy() -> None:
    x, y = speech_like(0.4), speech_like(0.4, seed=1) * 0.5
    a, b = (plain_log_mel(z[0, 0].double().numpy(), 16000, 40, 512, 128) for z in (x, y))
    expected = np.abs(a - b).mean()
    got = metrics.log_mel_distance(x, y, 16000, mels=40, window=512, hop=128, unit="nat").item()
    assert got == pytest.approx(expected, rel=1e-3)


def test_log_mel_distance_of_a_gain_is_the_gain() -> None:
    x = torch.randn(2, 1, 8000, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(metrics.log_mel_distance(x, 10 * x, 16000, floor=1e-12).numpy(), 20, rtol=1e-3)
    nats = metrics.log_mel_distance(x, 10 * x, 16000, floor=1e-12, unit="nat").numpy()
    np.testing.assert_allclose(nats, math.log(10), rtol=1e-3)
    assert metrics.log_mel_distance(x, x, 16000).tolist() == [0, 0]


@pytest.mark.parametrize("length", [1, 100, 1023])
def test_log_mel_distance_of_short_sounds(length: int) -> None:
    x = torch.randn(1, 2, length)
    assert torch.isfinite(metrics.log_mel_distance(x, torch.zeros_like(x), 16000)).all()


def test_bad_audio() -> None:
    x = torch.zeros(1, 1, 100)
    with pytest.raises(MediaError, match="T >= 1"):
        metrics.log_mel_distance(x[..., :0], x[..., :0], 16000)
    with pytest.raises(MediaError, match="'dB' or 'nat'"):
        metrics.log_mel_distance(x, x, 16000, unit="bel")
    with pytest.raises(MediaError, match="one shape"):
        metrics.stoi(x, x[..., 1:], 16000)


def test_stoi_is_pystois_and_falls_with_noise() -> None:
    x = speech_like(1.5)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    batch = torch.cat([x, x, x])
    degraded = torch.cat([x, x + 0.02 * noise, x + 0.5 * noise])
    scores = metrics.stoi(batch, degraded, 16000)
    assert scores[0].item() == pytest.approx(1, abs=1e-6)
    assert scores[0] > scores[1] > scores[2]
    expected = pystoi.stoi(batch[1, 0].double().numpy(), degraded[1, 0].double().numpy(), 16000)
    assert scores[1].item() == pytest.approx(expected, abs=1e-9)


def test_stoi_that_does_not_exist_is_nan() -> None:
    short, silent = speech_like(0.2), torch.zeros(1, 1, 16000)
    assert metrics.stoi(short, short, 16000).isnan().all()
    assert metrics.stoi(silent, silent, 16000).isnan().all()
    click = silent.clone()
    click[..., 8000:8100] = 1
    assert metrics.stoi(click, click, 16000).isnan().all()


def plain_stft_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Equations 4 to 6 of Parallel WaveGAN, frame by frame."""
    total = 0.0
    for size, hop, window in ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240)):
        taper = np.zeros(size)
        left = (size - window) // 2
        taper[left : left + window] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
        padded = [np.pad(z, size // 2) for z in (x, y)]
        p, q = (
            np.maximum(
                np.abs([np.fft.rfft(z[i : i + size] * taper) for i in range(0, len(z) - size + 1, hop)]), 1e-7**0.5
            )
            for z in padded
        )
        total += np.sqrt(np.square(p - q).sum() / np.square(p).sum()) + np.abs(np.log(p) - np.log(q)).mean()
    return total / 3


@pytest.mark.parametrize("length", [1, 500, 4000])
def test_stft_distance_against_numpy(length: int) -> None:
    rng = np.random.default_rng(length)
    x = rng.normal(size=(2, 2, length))
    y = x + 0.3 * rng.normal(size=x.shape)
    expected = [plain_stft_distance(a.mean(0), b.mean(0)) for a, b in zip(x, y, strict=True)]
    got = metrics.stft_distance(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9)
    single = metrics.stft_distance(torch.from_numpy(x).float(), torch.from_numpy(y).float())
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-3)


def test_stft_distance_by_hand() -> None:
    x = torch.randn(1, 1, 6000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert metrics.stft_distance(x, x).item() == 0
    # All magnitudes doubled: convergence 1, logarithms ln 2 apart.
    assert metrics.stft_distance(x, 2 * x).item() == pytest.approx(1 + math.log(2), rel=1e-6)
    assert metrics.stft_distance(x, 0 * x).item() > 5, "silence is far from everything"
    assert torch.isfinite(metrics.stft_distance(0 * x, x)).all()
    with pytest.raises(MediaError, match="T >= 1"):
        metrics.stft_distance(x[..., :0], x[..., :0])


def test_pesq_is_the_packages_and_falls_with_noise() -> None:
    x = speech_like(2)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    scores = metrics.pesq_wb(torch.cat([x, x, x]), torch.cat([x, x + 0.002 * noise, x + 0.05 * noise]), 16000)
    assert scores[0].item() == pytest.approx(4.644, abs=1e-3), "the highest that there is"
    assert scores[0] > scores[1] > scores[2] > 1
    expected = pesq.pesq(16000, x[0, 0].numpy(), (x + 0.002 * noise)[0, 0].numpy(), "wb")
    assert scores[1].item() == pytest.approx(expected, abs=1e-6)


def test_pesq_at_other_rates_and_in_stereo() -> None:
    x = speech_like(1, 16000)
    y = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    a, b = (torch.from_numpy(media.resample(z[0].numpy(), 16000, 32000))[None] for z in (x, y))
    own = metrics.pesq_wb(x, y, 16000).item()
    assert metrics.pesq_wb(a, b, 32000).item() == pytest.approx(own, abs=0.1)
    stereo = [torch.cat([1.5 * z, 0.5 * z], 1) for z in (x, y)]
    assert metrics.pesq_wb(*stereo, 16000).item() == pytest.approx(own, abs=1e-3)


def test_pesq_that_does_not_exist_is_nan() -> None:
    x = speech_like(1)
    for reference, estimate in ((x[..., :3999], x[..., :3999]), (0 * x, x), (x, 0 * x), (0 * x, 0 * x)):
        assert metrics.pesq_wb(reference, estimate, 16000).isnan().all()
    assert metrics.pesq_wb(x[..., :0], x[..., :0], 16000).isnan().all()


def test_pesq_of_a_long_sound_is_the_mean_of_pieces() -> None:
    # 60 utterances: at 50 the package's C code crashes.
    word = torch.cat([speech_like(0.3), torch.zeros(1, 1, 16000 * 3 // 10)], -1)
    x = word.repeat(1, 1, 60)
    y = x + 0.003 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    pieces = [metrics.pesq_wb(a, b, 16000).item() for a, b in zip(x.chunk(3, -1), y.chunk(3, -1), strict=True)]
    assert metrics.pesq_wb(x, y, 16000).item() == pytest.approx(np.mean(pieces), abs=1e-6)


def test_without_pesq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    x = speech_like(1)
    with pytest.raises(ConfigError, match=r"pip install 'mmtok\[evaluation\]'"):
        metrics.pesq_wb(x, x, 16000)


# --- codes


def test_codebook_figures_by_hand() -> None:
    codes = torch.tensor([[0, 0, 1, 1], [2, 2, 3, 3]])
    histogram = metrics.code_histogram(codes, 8)
    assert histogram.tolist() == [2, 2, 2, 2, 0, 0, 0, 0]
    assert metrics.codebook_usage(histogram) == 0.5
    assert metrics.entropy_bits(histogram) == pytest.approx(2)
    assert metrics.perplexity(histogram) == pytest.approx(4)
    single = metrics.code_histogram(torch.full((9,), 5), 8)
    assert metrics.perplexity(single) == 1
    assert metrics.codebook_usage(single) == 1 / 8


@given(st.lists(st.integers(0, 15), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_codebook_bounds(values: list[int]) -> None:
    histogram = metrics.code_histogram(torch.tensor(values), 16)
    used = metrics.codebook_usage(histogram) * 16
    assert used == len(set(values))
    assert 1 - 1e-9 <= metrics.perplexity(histogram) <= used + 1e-9
    half = len(values) // 2
    parts = [metrics.code_histogram(torch.tensor(v, dtype=torch.int32), 16) for v in (values[:half], values[half:])]
    assert torch.equal(parts[0] + parts[1], histogram)


def plain_adaptive_bits(values: list[int], size: int, prior: float) -> float:
    """One code after the other, each from the counts so far."""
    counts, bits = [0] * size, 0.0
    for n, value in enumerate(values):
        bits -= math.log2((counts[value] + prior) / (n + prior * size))
        counts[value] += 1
    return bits


@given(st.lists(st.integers(0, 15), min_size=1, max_size=60), st.sampled_from([0.05, 0.5, 1.0]), st.randoms())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_adaptive_bits_are_those_of_the_loop(values: list[int], prior: float, chance) -> None:
    got = metrics.adaptive_bits(metrics.code_histogram(torch.tensor(values), 16), prior)
    assert got == pytest.approx(plain_adaptive_bits(values, 16, prior), rel=1e-9)
    chance.shuffle(values)
    assert got == pytest.approx(plain_adaptive_bits(values, 16, prior), rel=1e-9)


def test_adaptive_bits_of_many_codes_come_to_the_entropy() -> None:
    rng = np.random.default_rng(0)
    skewed = torch.from_numpy(rng.geometric(0.05, 1_000_000) % 512)
    histogram = metrics.code_histogram(skewed, 512)
    per_token = metrics.adaptive_bits(histogram) / 1_000_000
    # Learning K shares from n codes costs about (K - 1) / 2 log2 n bits.
    assert metrics.entropy_bits(histogram) < per_token < metrics.entropy_bits(histogram) + 512 / 2 * 20 / 1_000_000
    with pytest.raises(VocabularyError, match="without counts"):
        metrics.adaptive_bits(torch.zeros(8))


def test_bad_codes() -> None:
    for bad in (torch.tensor([8]), torch.tensor([-1]), torch.tensor([0.0]), torch.tensor([True])):
        with pytest.raises(VocabularyError, match="expected"):
            metrics.code_histogram(bad, 8)
    with pytest.raises(VocabularyError, match="without counts"):
        metrics.perplexity(torch.zeros(8))

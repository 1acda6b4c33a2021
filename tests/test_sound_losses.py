"""What audio codecs are trained on: distances of spectra, and the critics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchaudio
from torch import Tensor

from mmtok.errors import ConfigError
from mmtok.training.sound_critics import SoundCritics, SpectrogramCritic
from mmtok.training.sounds import RESOLUTIONS, SoundLoss, SpectralDistance

RATE = 8000


def tone(b: int = 2, length: int = 4000) -> Tensor:
    t = torch.arange(length) / RATE
    return torch.stack([0.3 * torch.sin(2 * torch.pi * (200 + 170 * i) * t) for i in range(b)])


def noise(b: int = 2, length: int = 4000, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(b, length, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weights", [{}, {"stft": 1.0}, {"mel": 0.0, "stft": 2.0}])
@pytest.mark.parametrize("training", [True, False])
def test_distance_of_equal_sounds_is_zero_and_grows_with_the_difference(weights, training):
    distance, x = SpectralDistance(RATE, SoundLoss(**weights)).train(training), tone() + noise()
    assert float(distance(x, x)) == 0
    assert 0 < distance(0.9 * x, x) < distance(0.5 * x, x) < distance(torch.zeros_like(x), x)
    y = (x + noise(seed=1)).requires_grad_()
    (step,) = torch.autograd.grad(distance(y, x), y)
    assert distance(y - 0.1 * step / step.norm(), x).item() < distance(y, x).item()


def test_the_two_parts_add_up():
    y, x = tone(), noise()
    mel, stft, both, none = (
        float(SpectralDistance(RATE, SoundLoss(mel=m, stft=s))(y, x)) for m, s in ((1, 0), (0, 1), (2, 0.5), (0, 0))
    )
    assert none == 0
    assert both == pytest.approx(2 * mel + 0.5 * stft)


def test_mel_distance_against_torchaudio():
    y, x = tone() + noise(seed=1), noise()
    total = 0.0
    for n, mels in RESOLUTIONS:
        mel = torchaudio.transforms.MelSpectrogram(RATE, n_fft=n, hop_length=n // 4, n_mels=mels, power=1.0)
        a, b = mel(y), mel(x)
        logs = (a.clamp(min=1e-4).log10() - b.clamp(min=1e-4).log10()).abs().mean()
        total += float(logs + 8 / n**0.5 * (a - b).abs().mean()) / len(RESOLUTIONS)
    assert float(SpectralDistance(RATE, SoundLoss()).eval()(y, x)) == pytest.approx(total, rel=2e-3)


def test_stft_distance_by_hand():
    y, x = tone() + noise(seed=1), noise()
    total = 0.0
    for n in (512, 1024, 2048):
        window = np.hanning(n + 1)[:-1]
        frames = [
            np.lib.stride_tricks.sliding_window_view(np.pad(z.numpy(), ((0, 0), (n // 2, n // 2)), "reflect"), n, 1)
            for z in (y, x)
        ]
        a, b = (np.abs(np.fft.rfft(f[:, :: n // 4] * window)) for f in frames)
        total += np.linalg.norm(a - b) / np.linalg.norm(b) / 3
        total += np.abs(np.log10(np.maximum(a, 1e-3)) - np.log10(np.maximum(b, 1e-3))).mean() / 3
    got = float(SpectralDistance(RATE, SoundLoss(mel=0.0, stft=1.0)).eval()(y, x))
    assert got == pytest.approx(total, rel=2e-3)


@pytest.mark.parametrize("x", [torch.zeros(2, 2000), noise(2, 2000)])
def test_gradients_stay_finite_for_silence(x):
    distance = SpectralDistance(RATE, SoundLoss(stft=1.0))
    y = torch.zeros(2, 2000, requires_grad=True)
    distance(y, x).backward()
    assert torch.isfinite(y.grad).all()


def test_distance_stays_in_float32_within_autocast():
    y, x = tone().bfloat16(), noise()
    distance = SpectralDistance(RATE, SoundLoss(stft=1.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = distance(y, x)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, distance(y.float(), x))


def test_the_shortest_sounds_of_the_distance():
    assert float(SpectralDistance(RATE, SoundLoss())(tone(1, 1025), noise(1, 1025))) > 0


@pytest.mark.parametrize("name", ["mel", "commitment", "critic_warmup"])
def test_a_negative_weight_is_refused(name):
    with pytest.raises(ConfigError, match=rf"SoundLoss\.{name}: got -1(\.0)?, expected at least 0"):
        SoundLoss().replace([f"{name}=-1"])


# --- the critics


def critics() -> SoundCritics:
    torch.manual_seed(0)
    return SoundCritics(windows=(64, 128), width=2)


def test_scores_are_places_in_the_spectrogram():
    scores, seen = SpectrogramCritic(64, 3)(noise(2, 1600))
    assert scores.shape == (2, 1, 101, 5)  # a frame every 16 samples, 33 bins halved three times
    assert [x.shape[1] for x in seen] == [3] * 5


def test_losses_by_hand():
    model, x, y = critics(), tone(), noise()
    own, adversarial, feature = (v.detach() for v in model.losses(x, y))
    hinge = fooled = matched = 0.0
    for critic in model.critics:
        with torch.no_grad():
            (real, a), (fake, b) = critic(x), critic(y)
        hinge += float(((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2) / 2
        fooled += float((1 - fake).clamp(min=0).mean()) / 2
        matched += sum(float((p - q).abs().mean() / p.abs().mean()) for p, q in zip(a, b, strict=True)) / 5 / 2
    assert [float(v) for v in (own, adversarial, feature)] == pytest.approx([hinge, fooled, matched], rel=1e-4)
    assert model.losses(x, x)[2].item() == pytest.approx(0, abs=1e-6)


def test_one_backward_pass_serves_both_without_mixing_them():
    model, x, y = critics(), tone(), noise().requires_grad_()
    own, adversarial, feature = model.losses(x, y)
    weights = list(model.parameters())
    keep = {"retain_graph": True, "allow_unused": True}
    assert torch.autograd.grad(own, y, **keep) == (None,)
    assert torch.autograd.grad(adversarial + feature, weights, **keep) == (None,) * len(weights)
    of_critics = torch.autograd.grad(own, weights, retain_graph=True)
    (of_codec,) = torch.autograd.grad(0.1 * adversarial + 0.2 * feature, y, retain_graph=True)
    (own + 0.1 * adversarial + 0.2 * feature).backward()
    torch.testing.assert_close([w.grad for w in weights], list(of_critics))
    torch.testing.assert_close(y.grad, of_codec)
    assert all(float(g.abs().sum()) > 0 for g in (*of_critics, of_codec))


def test_the_critics_learn_to_tell_and_the_codec_to_fool_them():
    model = critics()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(40):
        x, y = tone(2, 1600), noise(2, 1600, step)
        own, before, _ = model.losses(x, y)
        optimizer.zero_grad()
        own.backward()
        optimizer.step()
    assert own.item() < 0.3
    y = noise(2, 1600, 99).requires_grad_()
    before = model.losses(x, y)[1]
    (step,) = torch.autograd.grad(before, y)
    assert before.item() > 1.5
    assert model.losses(x, y - 0.3 * step / step.norm())[1].item() < before.item()


def test_critics_within_autocast():
    model, x, y = critics(), tone(), noise().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model.losses(x, y)
    assert all(v.dtype == torch.float32 for v in inside)
    torch.testing.assert_close(torch.stack(inside), torch.stack(model.losses(x, y)), rtol=0.05, atol=0.02)
    sum(inside).backward()
    assert torch.isfinite(y.grad).all()

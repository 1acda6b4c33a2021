"""What a reconstructed sound is judged by in training: distances of spectra at several resolutions."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

from mmtok.config import Config
from mmtok.errors import ConfigError

# FFT length and mel bands: short ones see when, long ones at which pitch (DAC, arXiv:2306.06546, section 3.4).
RESOLUTIONS = ((128, 10), (256, 20), (512, 40), (1024, 80), (2048, 160))
FLOOR = 1e-4  # magnitudes of mel bands below it count as it


@dataclasses.dataclass(frozen=True)
class SoundLoss(Config):
    """Weights of the distances; 0 leaves one out.

    Attributes:
        mel: absolute differences of log-mel and of mel magnitudes, mean of five resolutions.
        stft: spectral convergence and absolute difference of log magnitudes, mean of three resolutions
            (https://arxiv.org/abs/1910.11480).
        commitment: of the pull of the encoder to its codes.
        critic: of the critics' opinion, see ``mmtok.training.sound_critics``.
        feature: of the difference between what the critics see in the original and in the reconstruction.
        critic_start: step from which the critics count.
        critic_warmup: steps before that in which the critics alone learn.
        critic_rows: how many sounds of a rank's batch the critics look at; 0 for all.
    """

    mel: float = 1.0
    stft: float = 0.0
    commitment: float = 0.2
    critic: float = 0.0
    feature: float = 0.0
    critic_start: int = 0
    critic_warmup: int = 200
    critic_rows: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ConfigError(f"SoundLoss.{field.name}: got {getattr(self, field.name)}, expected at least 0")


class SpectralDistance(nn.Module):
    """The ``mel`` and ``stft`` parts of a ``SoundLoss``; always in float32, also within autocast.

    In training mode windows overlap by half, else by three quarters.

    Args:
        sample_rate: Hz.
        loss: the weights.
    """

    def __init__(self, sample_rate: int, loss: SoundLoss) -> None:
        super().__init__()
        self.loss = loss
        for n, mels in RESOLUTIONS:
            self.register_buffer(f"window{n}", torch.hann_window(n), persistent=False)
            bank = melscale_fbanks(n // 2 + 1, 0.0, sample_rate / 2, mels, sample_rate)
            self.register_buffer(f"bank{n}", bank, persistent=False)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Samples [B, T] against samples [B, T], T above 1024 -> float32 scalar."""
        with torch.autocast(x.device.type, enabled=False):
            both = torch.cat([y.float(), x.float()])
            mel, stft = both.new_zeros(()), both.new_zeros(())
            for n, _ in RESOLUTIONS:
                window, bank = self.get_buffer(f"window{n}"), self.get_buffer(f"bank{n}")
                spectrum = torch.stft(both, n, n // (2 if self.training else 4), window=window, return_complex=True)
                magnitude = (torch.view_as_real(spectrum).square().sum(-1) + 1e-9).sqrt()
                a, b = (bank.T @ magnitude).chunk(2)
                ratio = (a.clamp(min=FLOOR).log10() - b.clamp(min=FLOOR).log10()).abs().mean()
                mel = mel + (ratio + (a - b).abs().mean() * (8 / n**0.5)) / len(RESOLUTIONS)
                if self.loss.stft and n >= 512:
                    a, b = magnitude.chunk(2)
                    converged = (a - b).norm() / b.norm().clamp(min=1e-3)
                    ratio = (a.clamp(min=1e-3).log10() - b.clamp(min=1e-3).log10()).abs().mean()
                    stft = stft + (converged + ratio) / 3
            return self.loss.mel * mel + self.loss.stft * stft

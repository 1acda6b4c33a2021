"""Critics of sounds: networks that see complex spectrograms at several resolutions and tell real from reconstructed.

The multi-scale STFT discriminator of EnCodec (https://arxiv.org/abs/2210.13438, section 3.4): dilated convolutions over
time and frequency, halving the frequencies. With the hinge loss, and with feature matching: what each layer sees in a
reconstruction is drawn to what it sees in the original.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

WINDOWS = (256, 512, 1024)
DILATIONS = (1, 2, 4)


class SpectrogramCritic(nn.Module):
    """Scores of places in the spectrogram of one resolution: high for real, low for reconstructed.

    Args:
        window: FFT length in samples; windows are a quarter apart.
        width: channels.
    """

    window: Tensor

    def __init__(self, window: int, width: int) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        layers = [_normed(nn.Conv2d(2, width, (3, 9), padding=(1, 4)))]
        for dilation in DILATIONS:
            layers.append(
                _normed(nn.Conv2d(width, width, (3, 9), stride=(1, 2), dilation=(dilation, 1), padding=(dilation, 4)))
            )
        layers.append(_normed(nn.Conv2d(width, width, (3, 3), padding=1)))
        self.layers = nn.ModuleList(layers)
        self.score = _normed(nn.Conv2d(width, 1, (3, 3), padding=1))

    def forward(self, samples: Tensor) -> tuple[Tensor, list[Tensor]]:
        """float [B, T] -> (scores [B, 1, frames, bins], the outputs of the layers before)."""
        with torch.autocast(samples.device.type, enabled=False):
            n = len(self.window)
            spectrum = torch.stft(samples.float(), n, n // 4, window=self.window, normalized=True, return_complex=True)
        x = torch.view_as_real(spectrum).permute(0, 3, 2, 1).contiguous(memory_format=torch.channels_last)
        seen = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            seen.append(x)
        return self.score(x), seen


class SoundCritics(nn.Module):
    """A critic for each of several resolutions.

    Args:
        windows: their FFT lengths.
        width: channels of each.
    """

    def __init__(self, windows: tuple[int, ...] = WINDOWS, width: int = 16) -> None:
        super().__init__()
        self.critics = nn.ModuleList(SpectrogramCritic(n, width) for n in windows)

    def forward(self, samples: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        """float [B, T] -> of each critic its scores and what its layers saw."""
        return [critic(samples) for critic in self.critics]

    def losses(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the critics and what the codec are trained on, so that one backward pass serves both.

        Args:
            real, fake: originals and reconstructions, float [B, T].

        Returns:
            The critics' own hinge loss, with no gradient to ``fake``; the adversarial loss and the feature matching
            loss of the codec, with no gradient to the critics. Means over critics, scalars.
        """
        both = self(torch.cat([real, fake.detach()]))
        fixed = {k: v.detach() for k, v in self.named_parameters()}
        judged = functional_call(self, fixed, (fake,))
        own = adversarial = feature = fake.new_zeros(())
        for (scores, seen), (opinion, noticed) in zip(both, judged, strict=True):
            on_real, on_fake = scores.float().chunk(2)
            own = own + (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()) / 2
            adversarial = adversarial + F.relu(1 - opinion.float()).mean()
            for a, b in zip(seen, noticed, strict=True):
                target = a[: len(real)].detach().float()
                feature = feature + (b.float() - target).abs().mean() / target.abs().mean().clamp(min=1e-3) / len(seen)
        count = len(self.critics)
        return own / count, adversarial / count, feature / count


def _normed(layer: nn.Conv2d) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(layer)

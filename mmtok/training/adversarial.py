"""A patch critic for image codecs: what it takes for fake teaches the decoder the detail that averages leave out.

Isola et al.: Image-to-image translation with conditional adversarial networks (https://arxiv.org/abs/1611.07004), the
hinge loss of https://arxiv.org/abs/1705.02894, the adaptive weight of VQGAN (https://arxiv.org/abs/2012.09841,
equation 7) and the regularisation of LeCam-GAN (https://arxiv.org/abs/2104.03310).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

LECAM = 0.001
ANCHOR_DECAY = 0.99


class Critic(nn.Module):
    """Scores of overlapping patches, [B, channels, H, W] -> [B, 1, h, w]: high for real, low for reconstructed.

    Spectral normalisation in place of batch statistics, so that the score of a picture is its own.

    Args:
        channels: of the pictures.
        width: of the first layer; doubled at each of the two halvings.
    """

    real: Tensor
    fake: Tensor

    def __init__(self, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        widths = (channels, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for before, after, stride in zip(widths[:-1], widths[1:], (2, 2, 1), strict=True):
            layers += [_spectral(nn.Conv2d(before, after, 4, stride, 1)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, _spectral(nn.Conv2d(widths[-1], 1, 4, 1, 1)))
        self.register_buffer("real", torch.zeros(()))  # moving averages of the scores, LeCam's anchors
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """float [B, channels, H, W] in -1..1, H and W at least 12 -> scores [B, 1, h, w]."""
        return self.layers(x)

    def own_loss(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the critic is trained on: (hinge loss with LeCam's term, mean score of the real, of the fake)."""
        on_real, on_fake = self(real), self(fake.detach())
        loss = (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()) / 2
        loss = loss + LECAM * ((on_real - self.fake).square().mean() + (on_fake - self.real).square().mean())
        if self.training:
            self.real.lerp_(on_real.detach().mean().to(self.real), 1 - ANCHOR_DECAY)
            self.fake.lerp_(on_fake.detach().mean().to(self.fake), 1 - ANCHOR_DECAY)
        return loss, on_real.detach().mean(), on_fake.detach().mean()

    def codec_loss(self, fake: Tensor) -> Tensor:
        """What the codec is trained on: the scores of its pictures, raised. Gradients pass the critic, not into it."""
        fixed = {k: v.detach() for k, v in self.named_parameters()}
        return -functional_call(self, fixed, (fake,)).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """The factor that gives the adversarial loss as large a gradient at the decoder's last weights as the other loss.

    Args:
        reconstruction, adversarial: scalars with gradients.
        last: weights of the decoder's last layer.
    """
    a, b = (torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (reconstruction, adversarial))
    return (a / (b + 1e-4)).clamp(0, 1e4).detach()


def _spectral(layer: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(layer)

"""What a reconstructed picture is judged by in training: a weighted sum of distances to the original."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.config import Config
from mmtok.errors import ConfigError
from mmtok.training.ssim import ms_ssim, ssim


@dataclasses.dataclass(frozen=True)
class PictureLoss(Config):
    """Weights of the distances, between float [B, C, H, W] in -1..1; 0 leaves one out.

    Attributes:
        l2, l1: mean squared and mean absolute difference.
        ssim: 1 - SSIM.
        ms_ssim: 1 - SSIM over three scales (five need pictures of 161 pixels).
        gradient: mean absolute difference of the differences between neighbours: edges.
        perceptual: LPIPS (https://arxiv.org/abs/1801.03924), where the package and its network's weights are there.
        alpha: mean absolute difference of the fourth channel, if there is one; the others are premultiplied colour.
        critic: share of the adversarial loss, see ``mmtok.training.adversarial``.
        critic_start: step from which it counts.
        critic_warmup: steps before that in which the critic alone learns.
    """

    l2: float = 1.0
    l1: float = 0.0
    ssim: float = 0.05
    ms_ssim: float = 0.0
    gradient: float = 0.0
    perceptual: float = 0.0
    alpha: float = 1.0
    critic: float = 0.0
    critic_start: int = 0
    critic_warmup: int = 200

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ConfigError(f"PictureLoss.{field.name}: got {getattr(self, field.name)}, expected at least 0")

    def __call__(self, y: Tensor, x: Tensor, lpips: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """The weighted distance of reconstructions y to originals x, float32 scalar; without the critic's part.

        Always in float32, also within autocast: SSIM subtracts nearly equal numbers.

        Args:
            y, x: float [B, 3 or 4, H, W] in -1..1, sides of at least 11, of 41 for ``ms_ssim``.
            lpips: what ``perceptual_distance`` returns, where ``perceptual`` is not 0.
        """
        with torch.autocast(x.device.type, enabled=False):
            y, x = y.float(), x.float()
            total = self.l2 * F.mse_loss(y, x) if self.l2 else x.new_zeros(())
            if self.l1:
                total = total + self.l1 * F.l1_loss(y, x)
            if self.ssim:
                total = total + self.ssim * (1 - ssim(y, x, data_range=2.0).mean())
            if self.ms_ssim:
                total = total + self.ms_ssim * (1 - ms_ssim(y, x, data_range=2.0, scales=3).mean())
            if self.gradient:
                edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
                total = total + self.gradient * edges
            if x.shape[1] == 4 and self.alpha:
                total = total + self.alpha * F.l1_loss(y[:, 3], x[:, 3])
            if self.perceptual:
                assert lpips is not None
                total = total + self.perceptual * lpips(y[:, :3], x[:, :3]).mean()
            return total


def perceptual_distance(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS with its VGG network: (float [B, 3, H, W] in -1..1, the same) -> [B, 1, 1, 1].

    Raises:
        ConfigError: the package is missing, or the network's weights are neither on this machine nor to be had.
    """
    try:
        import lpips
    except ImportError as error:
        raise ConfigError("perceptual needs LPIPS: python -m pip install lpips, or set perceptual=0") from error
    try:
        return lpips.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)
    except OSError as error:  # torchvision could not fetch VGG-16
        raise ConfigError(
            f"perceptual needs torchvision's VGG-16 weights, which could not be had ({error}); put "
            "vgg16-397923af.pth into ~/.cache/torch/hub/checkpoints, or set perceptual=0"
        ) from error

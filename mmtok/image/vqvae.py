"""A convolutional VQ-VAE for images of any size, RGB or RGBA.

VQ-VAE (https://arxiv.org/abs/1711.00937) with the residual blocks of VQGAN (https://arxiv.org/abs/2012.09841), but no
layer looks at more than its kernel: normalisation is over channels, so that a code depends on its neighbourhood alone.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.codec import CodecModel
from mmtok.config import Config
from mmtok.errors import ConfigError
from mmtok.image.tokenizer import NOISE, ImageTokenizer
from mmtok.quantizers import build_quantizer


@dataclasses.dataclass(frozen=True)
class ImageVQVAEConfig(Config):
    """Shape of the model.

    Attributes:
        downsample: pixels a token spans on each side; a power of two, at least ``patch``.
        patch: pixels folded into channels before the first layer; a power of two.
        channels: width of the first stage; doubled once at the first downsampling.
        encoder_blocks, decoder_blocks: residual blocks a stage.
        alpha: pictures have an alpha channel, which is kept.
        quantizer: ``vq``, ``cosine``, ``simvq``, ``fsq`` or ``lfq``, see ``mmtok.quantizers``.
        codebook_size: number of codes; of each level, where there are several.
        codebook_dim: channels in which codes are searched; ``fsq`` and ``lfq`` have their own.
        levels: residual levels of ``vq``: so many codes a position, from coarse to fine.
        fsq_levels: values of each channel of ``fsq``.
    """

    downsample: int = 8
    patch: int = 4
    channels: int = 96
    encoder_blocks: int = 2
    decoder_blocks: int = 2
    alpha: bool = False
    quantizer: str = "vq"
    codebook_size: int = 1024
    codebook_dim: int = 8
    levels: int = 1
    fsq_levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("channels", "codebook_size", "codebook_dim", "levels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"ImageVQVAEConfig.{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("encoder_blocks", "decoder_blocks"):
            if getattr(self, name) < 0:
                raise ConfigError(f"ImageVQVAEConfig.{name}: got {getattr(self, name)}, expected at least 0")
        for name in ("downsample", "patch"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ConfigError(f"ImageVQVAEConfig.{name}: got {value}, expected a power of two")
        if self.patch > self.downsample:
            raise ConfigError(
                f"ImageVQVAEConfig.patch: got {self.patch}, expected at most downsample, {self.downsample}"
            )


class ChannelNorm(nn.Module):
    """RMS normalisation over the channels of each position (https://arxiv.org/abs/1910.07467). [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-6)
        return x * scale.to(x.dtype) * self.weight[:, None, None].to(x.dtype)


class ResidualBlock(nn.Module):
    """norm, SiLU, 3x3, norm, SiLU, 3x3, added to its input. [B, C, H, W] -> the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class ImageVQVAE(ImageTokenizer, CodecModel):
    """Image tokenizer: uint8 [B, 3, H, W] <-> int64 [B, ceil(H / downsample), ceil(W / downsample)]."""

    kind: ClassVar[str] = "image-vqvae"
    config_class: ClassVar[type[Config]] = ImageVQVAEConfig

    def __init__(self, config: ImageVQVAEConfig, vectors_per_batch: int = 4096) -> None:
        super().__init__(config)
        self.channels = 4 if config.alpha else 3
        stages = (config.downsample // config.patch).bit_length()  # the first at `patch`, one more each halving
        widths = [config.channels * (2 if i else 1) for i in range(stages)]
        folded = self.channels * config.patch**2
        down: list[nn.Module] = [nn.PixelUnshuffle(config.patch), nn.Conv2d(folded, widths[0], 3, padding=1)]
        up: list[nn.Module] = []
        for i, width in enumerate(widths):
            if i:
                down.append(nn.Conv2d(widths[i - 1], width, 2, stride=2))
            down += [ResidualBlock(width) for _ in range(config.encoder_blocks)]
        for i, width in reversed(list(enumerate(widths))):
            up += [ResidualBlock(width) for _ in range(config.decoder_blocks)]
            if i:
                up += [nn.Conv2d(width, 4 * widths[i - 1], 1), nn.PixelShuffle(2)]
        dim = widths[-1]
        self.encoder = nn.Sequential(*down, ChannelNorm(dim), nn.Conv2d(dim, dim, 1))
        self.quantizer = build_quantizer(
            config.quantizer, dim, config.codebook_dim, config.codebook_size, config.levels, config.fsq_levels,
            vectors_per_batch,
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1), *up, ChannelNorm(widths[0]), nn.SiLU(),
            nn.Conv2d(widths[0], folded, 3, padding=1), nn.PixelShuffle(config.patch),
        )  # fmt: skip
        # How far the 3x3 kernels see: a position a convolution, as wide as a position is there.
        sides = [config.patch * 2**i for i in range(stages)]
        encoder = config.patch + sum(2 * config.encoder_blocks * side for side in sides)
        decoder = config.downsample + config.patch + sum(2 * config.decoder_blocks * side for side in sides)
        self.halo = -(-encoder // config.downsample) * config.downsample
        self.decode_halo = -(-decoder // config.downsample)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Training pass: float [B, channels, H, W] in -1..1 -> (reconstruction, codes [B, h, w, levels], own loss).

        H and W are multiples of ``downsample``; RGBA is premultiplied, see ``premultiply``.
        """
        z = self.encoder(pixels)
        b, d, h, w = z.shape
        q, codes, loss = self.quantizer(z.permute(0, 2, 3, 1).reshape(b, h * w, d))
        return self.decoder(q.reshape(b, h, w, d).permute(0, 3, 1, 2)), codes.unflatten(1, (h, w)), loss

    @property
    def last(self) -> Tensor:
        """Weights of the decoder's last layer, for ``mmtok.training.adversarial.adaptive_weight``."""
        return self.decoder[-2].weight  # type: ignore[return-value]

    @property
    def downsample(self) -> int:
        """Pixels that a code spans on each side."""
        return self.config.downsample

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes of each level."""
        return self.quantizer.codebook_sizes

    def to_codes(self, pixels: Tensor) -> Tensor:
        """float32 [B, channels, H, W] in -1..1 -> int64 [B, h, w, levels]."""
        z = self._vectors(pixels)
        return self.quantizer.encode(z.flatten(1, 2)).unflatten(1, z.shape[1:3])

    def to_codes_together(self, pixels: Tensor) -> tuple[Tensor, Tensor] | None:
        """As ``to_codes``, and bool [B]: which pictures have these codes alone too; None for residual levels."""
        if self.config.levels > 1:
            return None
        z = self._vectors(pixels)
        codes, sure = self.quantizer.encode_within(z.flatten(1, 2), NOISE)
        return codes.unflatten(1, z.shape[1:3]), sure.all(1)

    def _vectors(self, pixels: Tensor) -> Tensor:
        x = premultiply(pixels) if self.config.alpha else pixels
        return self.encoder(x.to(self.quantizer.project_in.weight.dtype)).permute(0, 2, 3, 1)

    def to_pixels(self, codes: Tensor) -> Tensor:
        """int64 [1, h, w, levels] -> float32 [1, channels, H, W] about in -1..1."""
        z = self.quantizer.decode(codes.flatten(1, 2)).unflatten(1, codes.shape[1:3])
        y = self.decoder(z.permute(0, 3, 1, 2)).float()
        return straighten(y) if self.config.alpha else y


def premultiply(x: Tensor) -> Tensor:
    """RGBA [B, 4, H, W] in -1..1 with colours times opacity, so that the colour of what cannot be seen is black."""
    colour, alpha = (x[:, :3] + 1) / 2, (x[:, 3:] + 1) / 2
    return torch.cat([colour * alpha, alpha], 1) * 2 - 1


def straighten(x: Tensor) -> Tensor:
    """The inverse of ``premultiply``, where there is any opacity."""
    colour, alpha = (x[:, :3] + 1) / 2, ((x[:, 3:] + 1) / 2).clamp(0, 1)
    return torch.cat([(colour / alpha.clamp_min(1 / 255)).clamp(0, 1), alpha], 1) * 2 - 1

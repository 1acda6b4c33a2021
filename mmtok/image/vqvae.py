"""A convolutional VQ-VAE for images of any size that is a multiple of the downsample factor.

VQ-VAE (https://arxiv.org/abs/1711.00937) with the residual blocks of VQGAN (https://arxiv.org/abs/2012.09841), but no
layer looks at more than its kernel: normalisation is over channels, so that a code depends on its neighbourhood alone.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.codec import CodecModel, exact
from mmtok.config import Config
from mmtok.errors import ConfigError, MediaError, VocabularyError
from mmtok.quantizers import Quantizer


@dataclasses.dataclass(frozen=True)
class ImageVQVAEConfig(Config):
    """Shape of the model.

    Attributes:
        downsample: pixels a token spans on each side; a power of two, at least ``patch``.
        patch: pixels folded into channels before the first layer; a power of two.
        channels: width of the first stage; doubled once at the first downsampling.
        blocks: residual blocks a stage.
        codebook_size: number of codes.
        codebook_dim: channels in which codes are searched.
    """

    downsample: int = 8
    patch: int = 4
    channels: int = 96
    blocks: int = 2
    codebook_size: int = 1024
    codebook_dim: int = 8

    def __post_init__(self) -> None:
        for name in ("channels", "codebook_size", "codebook_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"ImageVQVAEConfig.{name}: got {getattr(self, name)}, expected at least 1")
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


class ImageVQVAE(CodecModel):
    """Image tokenizer: uint8 [B, 3, H, W] <-> int64 [B, H / downsample, W / downsample]."""

    kind: ClassVar[str] = "image-vqvae"
    modality: ClassVar[str] = "image"
    config_class: ClassVar[type[Config]] = ImageVQVAEConfig

    def __init__(self, config: ImageVQVAEConfig, vectors_per_batch: int = 4096) -> None:
        super().__init__(config)
        stages = (config.downsample // config.patch).bit_length()  # the first at `patch`, one more each halving
        widths = [config.channels * (2 if i else 1) for i in range(stages)]
        folded = 3 * config.patch**2
        down: list[nn.Module] = [nn.PixelUnshuffle(config.patch), nn.Conv2d(folded, widths[0], 3, padding=1)]
        up: list[nn.Module] = []
        for i, width in enumerate(widths):
            if i:
                down.append(nn.Conv2d(widths[i - 1], width, 2, stride=2))
            down += [ResidualBlock(width) for _ in range(config.blocks)]
        for i, width in reversed(list(enumerate(widths))):
            up += [ResidualBlock(width) for _ in range(config.blocks)]
            if i:
                up += [nn.Conv2d(width, 4 * widths[i - 1], 1), nn.PixelShuffle(2)]
        dim = widths[-1]
        self.encoder = nn.Sequential(*down, ChannelNorm(dim), nn.Conv2d(dim, dim, 1))
        self.quantizer = Quantizer(dim, config.codebook_dim, config.codebook_size, 1, vectors_per_batch)
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1), *up, ChannelNorm(widths[0]), nn.SiLU(),
            nn.Conv2d(widths[0], folded, 3, padding=1), nn.PixelShuffle(config.patch),
        )  # fmt: skip

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Training pass: float [B, 3, H, W] in -1..1 -> (reconstruction, codes [B, h, w], commitment loss)."""
        z = self.encoder(pixels)
        b, d, h, w = z.shape
        q, codes, loss = self.quantizer(z.permute(0, 2, 3, 1).reshape(b, h * w, d))
        return self.decoder(q.reshape(b, h, w, d).permute(0, 3, 1, 2)), codes.reshape(b, h, w), loss

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes in each codebook: one for images."""
        return (self.config.codebook_size,)

    @property
    def properties(self) -> dict[str, int]:
        """What the registry keeps of this tokenizer: ``downsample``, in pixels."""
        return {"downsample": self.config.downsample}

    @exact
    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W], H and W multiples of ``downsample`` -> codes int64 [B, h, w].

        Images are encoded one by one, so that a row does not depend on the batch that it came in.

        Raises:
            MediaError: wrong dtype or shape.
        """
        f = self.config.downsample
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise MediaError(f"got {pixels.dtype} {list(pixels.shape)}, expected uint8 [B, 3, H, W]")
        b, _, height, width = pixels.shape
        if not height or not width or height % f or width % f:
            raise MediaError(
                f"got an image of {height}x{width}, expected multiples of {f} pixels: resize or pad it first"
            )
        rows = []
        for i in range(b):
            z = self.encoder(pixels[i : i + 1].to(self.quantizer.project_in.weight.dtype) / 127.5 - 1)
            rows.append(self.quantizer.encode(z.permute(0, 2, 3, 1).flatten(1, 2)))
        empty = torch.zeros(0, height // f * (width // f), 1, dtype=torch.int64)
        return torch.cat(rows or [empty]).reshape(b, height // f, width // f)

    @exact
    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, h, w] -> uint8 [B, 3, h * downsample, w * downsample].

        Raises:
            VocabularyError: wrong shape or dtype, or a code outside the codebook.
        """
        if codes.dtype != torch.int64 or codes.ndim != 3:
            raise VocabularyError(f"got codes {codes.dtype} {list(codes.shape)}, expected int64 [B, h, w]")
        b, h, w = codes.shape
        if not h or not w:
            raise VocabularyError(f"got codes {list(codes.shape)}, expected at least one code a side")
        out = [
            self.decoder(self.quantizer.decode(codes[i].reshape(1, h * w, 1)).reshape(1, h, w, -1).permute(0, 3, 1, 2))
            for i in range(b)
        ]
        f = self.config.downsample
        pixels = torch.cat(out or [torch.zeros(0, 3, h * f, w * f)])
        return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

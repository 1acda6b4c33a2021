"""The VQGAN of taming-transformers and the published tokenizers that share its network.

VQGAN (https://arxiv.org/abs/2012.09841, github.com/CompVis/taming-transformers) took encoder and decoder from denoising
diffusion (https://arxiv.org/abs/2006.11239). The same network, with other widths and another quantizer, is in
Chameleon (https://arxiv.org/abs/2405.09818), LlamaGen (https://arxiv.org/abs/2406.06525) and NVIDIA's Cosmos-Tokenizer
(https://arxiv.org/abs/2501.03575), which works on Haar wavelets of the picture.

Parameters have the names of taming-transformers, so that its files load as they are; ``importers`` maps the others.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.config import Config
from mmtok.errors import CheckpointError, ConfigError
from mmtok.image.published.base import PublishedTokenizer
from mmtok.image.published.quantize import Codebook, Scalars

GROUPS = 32  # of every group normalisation


@dataclasses.dataclass(frozen=True)
class VQGANConfig(Config):
    """Shape of the network; the defaults are taming's VQGAN of 1024 codes for ImageNet.

    Attributes:
        channels: width of the first convolution (``ch`` in published configs); widths are multiples of 32.
        multipliers: width of each level, in ``channels`` (``ch_mult``).
        blocks: residual blocks a level in the encoder, one less than in the decoder (``num_res_blocks``).
        attention: the levels with attention behind each block, 0 the finest. Published configs give resolutions
            (``attn_resolutions``) for pictures of one size (``resolution``); level i is at ``resolution / 2**i``.
        halvings: levels that end in a downsampling: the finest in the encoder, as many of the coarsest in the decoder.
        patch: pixels on each side that the Haar transform folds into channels; 1 for none.
        latent_channels: between the network and the quantizer's convolutions (``z_channels``).
        codebook_size, codebook_dim: of the codebook (``n_embed``, ``embed_dim``).
        normalized: distances are between vectors of length 1.
        levels: of finite scalar quantization; empty for a learnt codebook.
        image_channels: 3 or 4.
        decoder: false where only the encoder was published.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    attention: tuple[int, ...] = (4,)
    halvings: int = 4
    patch: int = 1
    latent_channels: int = 256
    codebook_size: int = 1024
    codebook_dim: int = 256
    normalized: bool = False
    levels: tuple[int, ...] = ()
    image_channels: int = 3
    decoder: bool = True

    def __post_init__(self) -> None:
        def check(name: str, fits: bool, expected: str) -> None:
            if not fits:
                raise ConfigError(f"VQGANConfig.{name}: got {getattr(self, name)}, expected {expected}")

        for name in ("blocks", "latent_channels", "codebook_size", "codebook_dim"):
            check(name, getattr(self, name) >= 1, "at least 1")
        check("channels", self.channels >= GROUPS and self.channels % GROUPS == 0, f"a multiple of {GROUPS}")
        check("multipliers", bool(self.multipliers) and min(self.multipliers) >= 1, "one of at least 1 for each level")
        count = len(self.multipliers)
        check("attention", all(0 <= i < count for i in self.attention), f"levels from 0 to {count - 1}")
        check("halvings", 0 <= self.halvings < count, f"0 to {count - 1}")
        check("patch", self.patch >= 1 and not self.patch & (self.patch - 1), "a power of two")
        check("image_channels", self.image_channels in (3, 4), "3 or 4")
        if self.levels:
            check("levels", min(self.levels) >= 2, "at least 2 in each dimension")
            check("codebook_size", self.codebook_size == math.prod(self.levels), f"{math.prod(self.levels)}")
            check("codebook_dim", self.codebook_dim == len(self.levels), f"{len(self.levels)}")


class Norm(nn.GroupNorm):
    """Group normalisation as all of these networks have it, of a single value too."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, GROUPS, self.weight, self.bias, self.eps)


class ResidualBlock(nn.Module):
    """Twice group normalisation, swish and a 3x3 convolution, added to its input. [B, C, H, W] -> [B, C', H, W]."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(inside), Norm(outside)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        if inside != outside:
            self.nin_shortcut = nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """Each position attends to all, one head, added to its input. [B, C, H, W] -> the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).mT[:, None] for f in (self.q, self.k, self.v))  # [B, 1, H W, C]
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(mixed[:, 0].mT.unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """A 3x3 convolution at every second position, with a row and a column of zeros at the bottom and the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Each position four times, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks at one resolution, with attention behind each or none, and the way to the next resolution, if any."""

    def __init__(self, inside: int, outside: int, blocks: int, attention: bool, way: str, leave: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(outside if i else inside, outside) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(outside) for _ in range(blocks if attention else 0))
        if leave:
            setattr(self, way, {"downsample": Downsample, "upsample": Upsample}[way](outside))
        self._way = way if leave else None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x if self._way is None else getattr(self, self._way)(x)


class Middle(nn.Module):
    """A block, attention, a block, at the coarsest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            ResidualBlock(channels, channels), Attention(channels), ResidualBlock(channels, channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """float32 [B, image_channels, H, W] -> [B, latent_channels, h, w]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.patch = config.patch
        self.conv_in = nn.Conv2d(config.image_channels * config.patch**2, config.channels, 3, padding=1)
        self.down = nn.ModuleList(
            Level(before, width, config.blocks, i in config.attention, "downsample", i < config.halvings)
            for i, (before, width) in enumerate(zip([config.channels, *widths], widths, strict=False))
        )
        self.mid = Middle(widths[-1])
        self.norm_out = Norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(haar(x, self.patch))
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """float32 [B, latent_channels, h, w] -> [B, image_channels, H, W]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        count = len(widths)
        self.patch = config.patch
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(  # the finest first, as published; run from the last
            Level(before, width, config.blocks + 1, i in config.attention, "upsample", i >= count - config.halvings)
            for i, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = Norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.image_channels * config.patch**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return unhaar(self.conv_out(F.silu(self.norm_out(x))), self.patch)


class VQGAN(PublishedTokenizer):
    """A published VQGAN: uint8 [B, 3, H, W] <-> int64 [B, ceil(H / downsample), ceil(W / downsample)].

    Args:
        config: the shape; the importers find it in the weights.
    """

    kind: ClassVar[str] = "image-vqgan"
    config_class: ClassVar[type[Config]] = VQGANConfig

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config)
        self.channels = config.image_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.codebook_dim, 1)
        self.quantize: Any = (
            Scalars(config.levels)
            if config.levels
            else Codebook(config.codebook_size, config.codebook_dim, config.normalized)
        )
        if config.decoder:
            self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.latent_channels, 1)
            self.decoder = Decoder(config)

    @property
    def downsample(self) -> int:
        """Pixels that a code spans on each side."""
        return self.config.patch * 2**self.config.halvings

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes in the codebook."""
        return (self.config.codebook_size,)

    def to_codes(self, pixels: Tensor) -> Tensor:
        """float32 [1, channels, H, W] in -1..1 -> int64 [1, h, w, 1]."""
        z = self.quant_conv(self.encoder(pixels)).permute(0, 2, 3, 1)
        return self.quantize.encode(z.reshape(-1, z.shape[3])).view(*z.shape[:3], 1)

    def to_pixels(self, codes: Tensor) -> Tensor:
        """int64 [1, h, w, 1] -> float32 [1, channels, H, W] about in -1..1.

        Raises:
            CheckpointError: the file that was imported holds no decoder.
        """
        if not self.config.decoder:
            raise CheckpointError(
                "this tokenizer can only encode: transformers has Chameleon's encoder without its decoder; import the "
                "vqgan.ckpt of Chameleon itself (mmtok import chameleon)"
            )
        z = self.quantize.decode(codes.flatten()).view(*codes.shape[:3], -1).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(z))


def haar(x: Tensor, patch: int) -> Tensor:
    """The Haar transform, ``patch`` pixels a side folded into channels: [B, C, H, W] -> [B, C p p, H / p, W / p].

    Each halving gives four bands: mean, difference of the rows, of the columns, and of both, each over all channels.
    """
    for _ in range(patch.bit_length() - 1):
        cells = F.pixel_unshuffle(x, 2).unflatten(1, (-1, 4))
        x = torch.einsum("kp,bcphw->bkchw", _signs(x) / 4, cells).flatten(1, 2)
    return x


def unhaar(x: Tensor, patch: int) -> Tensor:
    """The inverse of ``haar``."""
    for _ in range(patch.bit_length() - 1):
        bands = x.unflatten(1, (4, -1))
        x = F.pixel_shuffle(torch.einsum("pk,bkchw->bcphw", _signs(x), bands).flatten(1, 2), 2)
    return x


def _signs(like: Tensor) -> Tensor:
    """[band, pixel]: the sign in a band of each of four pixels: top left, top right, bottom left, bottom right."""
    return like.new_tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])

"""Emu3's visual tokenizer with transformers' own class ``Emu3VQVAE`` (https://arxiv.org/abs/2409.18869).

A MoVQ (https://arxiv.org/abs/2209.09002) for video in groups of four frames; a picture is a group of four equal ones.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from mmtok.config import Config
from mmtok.image.published.base import PublishedTokenizer
from mmtok.nearest import nearest


@dataclasses.dataclass(frozen=True)
class Emu3VQConfig(Config):
    """The fields of transformers' ``Emu3VQVAEConfig`` by name; ``attn_resolutions`` are levels, 0 the finest."""

    codebook_size: int = 32768
    embed_dim: int = 4
    latent_channels: int = 4
    double_latent: bool = False
    in_channels: int = 3
    out_channels: int = 3
    temporal_downsample_factor: int = 4
    base_channels: int = 256
    channel_multiplier: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (3,)
    hidden_size: int = 1024
    num_attention_heads: int = 1
    attention_dropout: float = 0.0


class Emu3VQ(PublishedTokenizer):
    """Emu3's tokenizer: uint8 [B, 3, H, W] <-> int64 [B, ceil(H / 8), ceil(W / 8)], 0..32767.

    Args:
        config: as transformers has it.
    """

    kind: ClassVar[str] = "image-emu3-vq"
    config_class: ClassVar[type[Config]] = Emu3VQConfig

    def __init__(self, config: Emu3VQConfig) -> None:
        from transformers import Emu3VQVAE, Emu3VQVAEConfig  # its import takes seconds

        super().__init__(config)
        self.model = Emu3VQVAE(Emu3VQVAEConfig(**dataclasses.asdict(config)))

    @property
    def downsample(self) -> int:
        """Pixels that a code spans on each side."""
        return 2 ** (len(self.config.channel_multiplier) - 1)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes in the codebook."""
        return (self.config.codebook_size,)

    def to_codes(self, pixels: Tensor) -> Tensor:
        """float32 [1, 3, H, W] in -1..1 -> int64 [1, h, w, 1]."""
        frames = pixels[:, None].expand(-1, self.config.temporal_downsample_factor, -1, -1, -1)
        z = self.model.quant_conv(self.model.encoder(frames).transpose(1, 2))  # [1, dim, 1, h, w]
        rows = z.permute(0, 2, 3, 4, 1)[:, 0]
        return nearest(rows.flatten(0, 2), self.model.quantize.embedding.weight).view(*rows.shape[:3], 1)

    def to_pixels(self, codes: Tensor) -> Tensor:
        """int64 [1, h, w, 1] -> float32 [1, 3, H, W] about in -1..1."""
        return self.model.decode(codes[..., 0])

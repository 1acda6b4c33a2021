"""diffusers' ``VQModel``, with the class of that package: VQGANs of latent diffusion, MoVQ of Kandinsky, aMUSEd.

``diffusers`` is installed with ``pip install 'mmtok[published]'``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor

from mmtok.config import Config
from mmtok.errors import CheckpointError
from mmtok.image.published.base import PublishedTokenizer
from mmtok.nearest import nearest


@dataclasses.dataclass(frozen=True)
class VQModelConfig(Config):
    """The fields of diffusers' ``VQModel``, under its names, and the range of pixels that it was trained on.

    Attributes:
        unit_range: pixels are 0..1 (aMUSEd), not -1..1.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 3
    num_vq_embeddings: int = 256
    norm_num_groups: int = 32
    vq_embed_dim: int | None = None
    norm_type: str = "group"
    mid_block_add_attention: bool = True
    unit_range: bool = False


class VQModel(PublishedTokenizer):
    """diffusers' tokenizer: uint8 [B, 3, H, W] <-> int64 [B, ceil(H / downsample), ceil(W / downsample)].

    Args:
        config: as diffusers has it.

    Raises:
        CheckpointError: diffusers is not installed, or has no such blocks.
    """

    kind: ClassVar[str] = "image-diffusers-vq"
    config_class: ClassVar[type[Config]] = VQModelConfig

    def __init__(self, config: VQModelConfig) -> None:
        try:
            import diffusers
        except ImportError as error:
            raise CheckpointError(
                f"this tokenizer needs the package diffusers ({error}): pip install 'mmtok[published]'"
            ) from error
        super().__init__(config)
        fields = dataclasses.asdict(config)
        del fields["unit_range"]
        try:
            self.model: Any = diffusers.VQModel(**fields)
        except (ValueError, KeyError, IndexError) as error:
            raise CheckpointError(f"diffusers {diffusers.__version__} cannot build the VQModel: {error}") from error

    @property
    def downsample(self) -> int:
        """Pixels that a code spans on each side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes in the codebook."""
        return (self.config.num_vq_embeddings,)

    def to_codes(self, pixels: Tensor) -> Tensor:
        """float32 [1, 3, H, W] in -1..1 -> int64 [1, h, w, 1]."""
        x = (pixels + 1) / 2 if self.config.unit_range else pixels
        z = self.model.quant_conv(self.model.encoder(x)).permute(0, 2, 3, 1)
        return nearest(z.flatten(0, 2), self.model.quantize.embedding.weight).view(*z.shape[:3], 1)

    def to_pixels(self, codes: Tensor) -> Tensor:
        """int64 [1, h, w, 1] -> float32 [1, 3, H, W] about in -1..1."""
        z = self.model.quantize.embedding(codes[..., 0]).permute(0, 3, 1, 2)
        y = self.model.decoder(self.model.post_quant_conv(z), z if self.config.norm_type == "spatial" else None)
        return y * 2 - 1 if self.config.unit_range else y

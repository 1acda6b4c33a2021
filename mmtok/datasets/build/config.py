"""How documents become ids: ``EncodeConfig``, and which tokenizers it chooses of a vocabulary."""

from __future__ import annotations

import dataclasses
from typing import Any

from mmtok.config import Config
from mmtok.errors import ConfigError, MediaError
from mmtok.registry import MODALITIES

# Of what, beside vocabulary and config, turns a document into ids: reading, resizing, resampling. To be raised when one
# of them gives other pixels or samples, so that no build takes old ids for what it would make now.
REVISION = 1


@dataclasses.dataclass(frozen=True)
class EncodeConfig(Config):
    """How documents become ids.

    Attributes:
        image_size: pictures are fitted into a white square of so many pixels a side; 0 keeps their own sizes.
        max_side: pictures with a longer side are scaled down to it; 0 for none. Not together with ``image_size``.
        text, image, audio: names of the tokenizers to use, where the vocabulary has several; empty for the default.
    """

    image_size: int = 0
    max_side: int = 0
    text: str = ""
    image: str = ""
    audio: str = ""

    def __post_init__(self) -> None:
        if self.image_size < 0 or self.max_side < 0 or (self.image_size and self.max_side):
            raise ConfigError(
                f"got image_size {self.image_size} and max_side {self.max_side}, expected pixels, and one of them 0"
            )

    def fitted(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of a picture after ``max_side``."""
        longest = max(size)
        if not self.max_side or longest <= self.max_side:
            return size
        height, width = (max(1, round(x * self.max_side / longest)) for x in size)
        return height, width


def chosen(registry: Any, config: EncodeConfig) -> dict[str, str]:
    """modality -> name of the tokenizer that encodes it, for those that the vocabulary has.

    Raises:
        ConfigError: no such tokenizer, or an image size that is no multiple of its downsample factor, or larger than
            the vocabulary's grid.
    """
    names = {}
    for modality in MODALITIES:
        wanted = getattr(config, modality)
        have = [x for x in registry.tokenizers if x.modality == modality and wanted in ("", x.name)]
        if wanted and not have:
            own = ", ".join(x.name for x in registry.tokenizers if x.modality == modality) or "none"
            raise ConfigError(f"the vocabulary has no {modality} tokenizer {wanted!r}, it has {own}")
        if have:
            names[modality] = registry.tokenizer(wanted or modality).name
    if config.image_size and "image" in names:
        factor = int(registry.tokenizer(names["image"]).properties["downsample"])
        most = factor * max((x.size for x in registry.blocks if x.modality == "grid"), default=0)
        if config.image_size % factor or config.image_size > most:
            raise ConfigError(
                f"got an image size of {config.image_size} pixels, expected a multiple of {factor} up to {most}, "
                "which is the largest that the vocabulary has"
            )
    return names


def check_grid(properties: Any, grid: int, label: str, height: int, width: int) -> None:
    """Raise MediaError if a picture has more codes on a side than the vocabulary has sizes for."""
    most = int(properties["downsample"]) * grid
    if max(height, width) > most:
        raise MediaError(
            f"{label}: {width}x{height} pixels, the vocabulary has sizes up to {most}x{most}; give --max-side {most} "
            "or --image-size, or a vocabulary with a larger max_grid"
        )

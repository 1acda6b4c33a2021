"""DAC, the Descript Audio Codec (https://arxiv.org/abs/2306.06546), with transformers' ``DacModel``.

Published as ``weights_16khz_8kbps_0.0.5.pth`` and the like by the package descript-audio-codec, and as directories of
transformers (descript/dac_16khz, dac_24khz, dac_44khz). Both give the same tokenizer.

Where a stride is odd, as in those for 16 and 24 kHz, DAC's decoder gives 8 samples less than whole frames
(https://github.com/descriptinc/descript-audio-codec/issues/37): here the last sample is held, so that every sound has
the length that it came with, and all samples that DAC gives are DAC's.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor
from torch.nn import functional as F

from mmtok.archive import read_archive
from mmtok.audio.published.base import (
    PublishedCodec,
    build,
    check_positive,
    fuse_weight_norm,
    read_transformers,
    transformers_class,
)
from mmtok.config import Config
from mmtok.errors import CheckpointError, ConfigError
from mmtok.published import config_of

# Names in the package's config -> in transformers'.
_FIELDS = {
    "encoder_dim": "encoder_hidden_size", "encoder_rates": "downsampling_ratios", "latent_dim": "hidden_size",
    "decoder_dim": "decoder_hidden_size", "decoder_rates": "upsampling_ratios", "n_codebooks": "n_codebooks",
    "codebook_size": "codebook_size", "codebook_dim": "codebook_dim", "sample_rate": "sampling_rate",
}  # fmt: skip
# Numbers in the package's names of tensors -> names in transformers': inside a block of the encoder, of the decoder,
# and inside a residual unit.
_ENCODER = ("res_unit1", "res_unit2", "res_unit3", "snake1", "conv1")
_DECODER = ("snake1", "conv_t1", "res_unit1", "res_unit2", "res_unit3")
_UNIT = ("snake1", "conv1", "snake2", "conv2")


@dataclasses.dataclass(frozen=True)
class DACConfig(Config):
    """The fields of transformers' ``DacConfig`` that shape the network.

    Attributes:
        encoder_hidden_size: channels after the first convolution.
        downsampling_ratios: strides of the encoder; their product is the hop.
        hidden_size: of the latent; None for encoder_hidden_size times 2 for each stride.
        decoder_hidden_size: channels before the first stride of the decoder.
        upsampling_ratios: strides of the decoder; empty for those of the encoder backwards.
        n_codebooks, codebook_size, codebook_dim: of the residual quantizer.
        sampling_rate: Hz.
    """

    encoder_hidden_size: int = 64
    downsampling_ratios: tuple[int, ...] = (2, 4, 8, 8)
    hidden_size: int | None = None
    decoder_hidden_size: int = 1536
    upsampling_ratios: tuple[int, ...] = ()
    n_codebooks: int = 9
    codebook_size: int = 1024
    codebook_dim: int = 8
    sampling_rate: int = 16_000

    def __post_init__(self) -> None:
        check_positive(
            self, "encoder_hidden_size", "downsampling_ratios", "decoder_hidden_size", "n_codebooks", "codebook_size",
            "codebook_dim", "sampling_rate",
        )  # fmt: skip
        if self.hidden_size is None:
            object.__setattr__(self, "hidden_size", self.encoder_hidden_size * 2 ** len(self.downsampling_ratios))
        if not self.upsampling_ratios:
            object.__setattr__(self, "upsampling_ratios", self.downsampling_ratios[::-1])
        check_positive(self, "hidden_size", "upsampling_ratios")
        down, up = self.downsampling_ratios, self.upsampling_ratios
        if min(*down, *up) < 2 or math.prod(down) != math.prod(up):
            raise ConfigError(f"DACConfig: got strides {down} and {up}, expected numbers from 2 up of one product")


class DAC(PublishedCodec):
    """DAC: float32 [B, 1, T] at 16, 24 or 44.1 kHz <-> int64 [B, levels, ceil(T / hop)].

    Args:
        config: as transformers has it.
    """

    kind: ClassVar[str] = "audio-dac"
    config_class: ClassVar[type[Config]] = DACConfig

    def __init__(self, config: DACConfig) -> None:
        super().__init__(config)
        network, shape = transformers_class("DacModel"), transformers_class("DacConfig")
        self.model: Any = build("DAC", lambda: network(shape(**config.to_dict())))

    @classmethod
    def from_published(cls, path: str | Path) -> Self:
        """DAC as published.

        Args:
            path: the package's ``.pth`` file, or a directory of transformers.

        Raises:
            CheckpointError: as ``PublishedCodec.from_published``.
        """
        place = Path(path)
        if place.is_dir():
            settings, state = read_transformers(place, "dac")
            config = config_of(DACConfig, settings, place / "config.json")
        else:
            config, state = _read_package(place)
        return cls.from_weights(config, {f"model.{key}": value for key, value in state.items()}, str(place))

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.config.sampling_rate

    @property
    def hop(self) -> int:
        """Samples that a frame spans."""
        return math.prod(self.config.downsampling_ratios)

    @property
    def codebooks(self) -> list[Tensor]:
        """float32 [codebook_size, codebook_dim] of each level."""
        return [quantizer.codebook.weight for quantizer in self.model.quantizer.quantizers]

    def to_codes(self, samples: Tensor, levels: int) -> Tensor:
        """float32 [1, 1, T] -> int64 [1, levels, ceil(T / hop)]."""
        return self.model.encode(F.pad(samples, (0, -samples.shape[-1] % self.hop)), n_quantizers=levels).audio_codes

    def to_samples(self, codes: Tensor) -> Tensor:
        """int64 [1, L, F] -> float32 [1, 1, F * hop]."""
        samples = self.model.decode(audio_codes=codes).audio_values.view(1, 1, -1)
        return F.pad(samples, (0, codes.shape[-1] * self.hop - samples.shape[-1]), mode="replicate")


def _read_package(file: Path) -> tuple[DACConfig, dict[str, Tensor]]:
    """Config and tensors, under transformers' names, of a .pth of descript-audio-codec; no code in it runs."""
    if not file.is_file():
        raise CheckpointError(
            f"no file at {file}; expected the published weights (.pth), or a directory of transformers"
        )
    held = read_archive(file)
    metadata = held.get("metadata") if isinstance(held, dict) else None
    state = held.get("state_dict") if isinstance(held, dict) else None
    settings = metadata.get("kwargs") if isinstance(metadata, dict) else None
    if not isinstance(settings, dict) or not isinstance(state, dict):
        raise CheckpointError(f"{file} has no state_dict and metadata; expected weights of descript-audio-codec (.pth)")
    config = config_of(DACConfig, {_FIELDS[k]: v for k, v in settings.items() if k in _FIELDS}, file)
    if not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{file}: the state_dict holds other things than tensors; fetch the file again")
    return config, _as_transformers(fuse_weight_norm(state), len(config.downsampling_ratios))


def _as_transformers(state: Mapping[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Tensors of the package under the names of transformers' ``DacModel``."""

    def rename(key: str) -> str:
        found = re.fullmatch(r"(encoder)\.block\.(.+)|(decoder)\.model\.(.+)", key)
        if found is None:
            return key
        side, rest = [part for part in found.groups() if part is not None]
        first, *inner, name = rest.replace("block.", "").split(".")
        outer = {0: "conv1", blocks + 1: "snake1", blocks + 2: "conv2"}.get(int(first), f"block.{int(first) - 1}")
        tables = (_ENCODER if side == "encoder" else _DECODER, _UNIT)
        return ".".join([side, outer, *(table[int(i)] for table, i in zip(tables, inner, strict=False)), name])

    try:
        return {rename(str(key)): value for key, value in state.items()}
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"the tensors are not those of descript-audio-codec: {error}") from error

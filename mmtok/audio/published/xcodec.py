"""X-Codec (https://arxiv.org/abs/2408.17175) with transformers' ``XcodecModel``.

An acoustic encoder as DAC's and a semantic one, HuBERT or WavLM, before one residual quantizer. Published as
directories of transformers (hf-audio/xcodec-hubert-general and others); the semantic model is in them.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.audio.published.base import PublishedCodec, build, check_positive, read_transformers, transformers_class
from mmtok.config import Config
from mmtok.errors import CheckpointError, ConfigError
from mmtok.published import config_of

# Of the semantic model, by its type in config.json.
_SEMANTIC = {"hubert": "HubertConfig", "wavlm": "WavLMConfig"}


@dataclasses.dataclass(frozen=True)
class XCodecConfig(Config):
    """The fields of transformers' ``XcodecConfig`` that shape the network, under its names.

    ``codebook_dim`` None is the sum of both hidden sizes. The two last are entries of the configs of DAC and of the
    semantic model, with its ``model_type``: what they do not hold is as transformers has it.
    """

    target_bandwidths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 4.0)
    sample_rate: int = 16_000
    kernel_size: int = 3
    channel_ratios: tuple[int, ...] = (1, 1)
    strides: tuple[int, ...] = (1, 1)
    block_dilations: tuple[int, ...] = (1, 1)
    unit_kernel_size: int = 3
    codebook_size: int = 1024
    codebook_dim: int | None = None
    acoustic_model_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    semantic_model_config: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_positive(
            self, "sample_rate", "kernel_size", "channel_ratios", "strides", "unit_kernel_size", "codebook_size"
        )
        for name in ("acoustic_model_config", "semantic_model_config"):
            if not isinstance(getattr(self, name), dict):
                raise ConfigError(f"XCodecConfig.{name}: got {getattr(self, name)!r}, expected an object")
        if self.semantic_model_config.get("model_type") not in _SEMANTIC:
            raise ConfigError(
                f"XCodecConfig.semantic_model_config: got model_type {self.semantic_model_config.get('model_type')!r}, "
                f"expected {' or '.join(_SEMANTIC)}"
            )
        if not self.target_bandwidths or min(self.target_bandwidths) <= 0:
            raise ConfigError(f"XCodecConfig.target_bandwidths: got {self.target_bandwidths}, expected kb/s above 0")


class XCodec(PublishedCodec):
    """X-Codec: float32 [B, 1, T] at 16 kHz <-> int64 [B, levels, ceil(T / 320)].

    It was trained with 1, 2, 3, 4 and 8 levels (0.5, 1, 1.5, 2 and 4 kb/s); any number of the first can be used.

    Args:
        config: as transformers has it.
    """

    kind: ClassVar[str] = "audio-xcodec"
    config_class: ClassVar[type[Config]] = XCodecConfig

    def __init__(self, config: XCodecConfig) -> None:
        super().__init__(config)
        network, shape = transformers_class("XcodecModel"), transformers_class("XcodecConfig")
        self.model: Any = build("X-Codec", lambda: network(shape(**config.to_dict())))
        made = self.model.config
        semantic = math.prod(made.semantic_model_config.conv_stride) * math.prod(config.strides)
        hops = (made.hop_length, semantic, math.prod(made.acoustic_model_config.upsampling_ratios))
        if len(set(hops)) > 1:
            raise CheckpointError(
                f"cannot build X-Codec: a frame of its acoustic encoder, semantic encoder and decoder is {hops} "
                "samples, expected one number"
            )

    @classmethod
    def from_published(cls, path: str | Path) -> Self:
        """X-Codec out of a directory of transformers.

        Raises:
            CheckpointError: as ``PublishedCodec.from_published``.
        """
        place = Path(path)
        settings, state = read_transformers(place, "xcodec")
        semantic = settings.get("semantic_model_config")
        name = _SEMANTIC.get(str(semantic.get("model_type")), "") if isinstance(semantic, dict) else ""
        parts = {"acoustic_model_config": "DacConfig", "semantic_model_config": name}
        known = {key: _known(settings.get(key), part) for key, part in parts.items() if part}
        config = config_of(XCodecConfig, {**settings, **known}, place / "config.json")
        return cls.from_weights(config, {f"model.{key}": value for key, value in state.items()}, str(place))

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.config.sample_rate

    @property
    def hop(self) -> int:
        """Samples that a frame spans."""
        return self.model.config.hop_length

    @property
    def codebooks(self) -> list[Tensor]:
        """float32 [codebook_size, codebook_dim] of each level."""
        return [quantizer.codebook.embed for quantizer in self.model.quantizer.quantizers]

    def to_codes(self, samples: Tensor, levels: int) -> Tensor:
        """float32 [1, 1, T] -> int64 [1, levels, ceil(T / hop)]."""
        padded = F.pad(samples, (0, -samples.shape[-1] % self.hop))
        with torch.random.fork_rng(devices=[]):  # HuBERT in transformers 4 draws a number for each layer
            return self.model.encode(padded).audio_codes[:, :levels]

    def to_samples(self, codes: Tensor) -> Tensor:
        """int64 [1, L, F] -> float32 [1, 1, F * hop]."""
        return self.model.decode(codes).audio_values


def _known(settings: Any, name: str) -> Any:
    """The entries that a config of transformers has beside those of every config, in order; no others take effect."""
    if not isinstance(settings, dict):
        return settings
    mine, every = transformers_class(name)().to_dict(), transformers_class("PretrainedConfig")().to_dict()
    return {key: settings[key] for key in sorted(settings) if key == "model_type" or (key in mine and key not in every)}

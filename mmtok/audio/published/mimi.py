"""Mimi (https://arxiv.org/abs/2410.00037), the codec of Moshi, with the network of transformers' ``MimiModel``.

Published as a directory of transformers (kyutai/mimi). Every part of it looks back only, so that a sound can be encoded
and decoded as a stream; ``mmtok.audio.published.causal`` carries what each part needs from one piece to the next, and
long sounds go through it in pieces too, in constant memory.

Where this differs from ``MimiModel.encode`` and ``decode`` it does as Moshi does:

- The tail is padded with silence to a whole frame before the network. transformers pads inside, layer by layer, so that
  its last, partial frame has other codes.
- Attention sees ``sliding_window`` steps, 10 s, in every version; transformers 4 has no such limit on a CPU.
- Sounds in a batch do not see each other's padding (https://github.com/huggingface/transformers/issues/43377).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.audio.published.base import PublishedCodec, build, check_positive, read_transformers, transformers_class
from mmtok.audio.published.causal import Carry, run, transform
from mmtok.audio.tokenizer import StreamDecoder, StreamEncoder
from mmtok.codec import exact
from mmtok.config import Config
from mmtok.errors import CheckpointError, ConfigError
from mmtok.published import config_of

PIECE = 128  # frames of a long sound that go through the network together: 10 s


@dataclasses.dataclass(frozen=True)
class MimiConfig(Config):
    """The fields of transformers' ``MimiConfig`` that shape the network, under its names.

    ``head_dim`` None is ``hidden_size / num_attention_heads``; ``rope_theta`` is part of its ``rope_parameters``.
    """

    sampling_rate: int = 24_000
    audio_channels: int = 1
    hidden_size: int = 512
    num_filters: int = 64
    num_residual_layers: int = 1
    upsampling_ratios: tuple[int, ...] = (8, 6, 5, 4)
    kernel_size: int = 7
    last_kernel_size: int = 3
    residual_kernel_size: int = 3
    dilation_growth_rate: int = 2
    use_causal_conv: bool = True
    pad_mode: str = "constant"
    compress: int = 2
    trim_right_ratio: float = 1.0
    codebook_size: int = 2048
    codebook_dim: int = 256
    num_quantizers: int = 32
    use_conv_shortcut: bool = False
    vector_quantization_hidden_dimension: int = 256
    num_semantic_quantizers: int = 1
    upsample_groups: int = 512
    num_hidden_layers: int = 8
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    head_dim: int | None = None
    hidden_act: str = "gelu"
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    sliding_window: int = 250
    attention_bias: bool = False

    def __post_init__(self) -> None:
        check_positive(
            self, "sampling_rate", "hidden_size", "num_filters", "upsampling_ratios", "compress", "codebook_size",
            "codebook_dim", "num_semantic_quantizers", "num_attention_heads", "num_key_value_heads", "sliding_window",
        )  # fmt: skip
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        check_positive(self, "head_dim")
        if self.audio_channels not in (1, 2):
            raise ConfigError(f"MimiConfig.audio_channels: got {self.audio_channels}, expected 1 or 2")
        if self.num_quantizers <= self.num_semantic_quantizers:
            raise ConfigError(
                f"MimiConfig.num_quantizers: got {self.num_quantizers}, expected more than the "
                f"{self.num_semantic_quantizers} of num_semantic_quantizers"
            )
        if not self.use_causal_conv or self.trim_right_ratio != 1 or self.pad_mode != "constant":
            raise ConfigError(
                f"MimiConfig: got use_causal_conv {self.use_causal_conv}, trim_right_ratio {self.trim_right_ratio} and "
                f"pad_mode {self.pad_mode!r}, expected true, 1.0 and 'constant': a Mimi that looks back only"
            )


class Mimi(PublishedCodec):
    """Mimi: float32 [B, 1, T] at 24 kHz <-> int64 [B, levels, ceil(T / 1920)], as a whole or as a stream.

    It has up to 32 levels; Moshi uses 8 of them, 1.1 kb/s.

    Args:
        config: as transformers has it.
    """

    kind: ClassVar[str] = "audio-mimi"
    config_class: ClassVar[type[Config]] = MimiConfig

    def __init__(self, config: MimiConfig) -> None:
        super().__init__(config)
        network, shape = transformers_class("MimiModel"), transformers_class("MimiConfig")
        self.channels = config.audio_channels
        fields = {key: value for key, value in config.to_dict().items() if key != "rope_theta"}
        model = build("Mimi", lambda: network(shape(**fields)))
        # Their places in version 4 are their names in published files; later ones have two halves in between.
        split = hasattr(model.encoder, "encoder_seanet")
        encoding, decoding = (model.encoder, model.decoder) if split else (model, model)
        self.encoder = encoding.encoder_seanet if split else model.encoder
        self.encoder_transformer, self.downsample = encoding.encoder_transformer, encoding.downsample
        self.quantizer = model.quantizer
        self.upsample, self.decoder_transformer = decoding.upsample, decoding.decoder_transformer
        self.decoder = decoding.decoder_seanet if split else model.decoder

    @classmethod
    def from_published(cls, path: str | Path) -> Self:
        """Mimi out of a directory of transformers.

        Raises:
            CheckpointError: as ``PublishedCodec.from_published``.
        """
        place = Path(path)
        settings, state = read_transformers(place, "mimi")
        settings = {key: value for key, value in settings.items() if value is not None}
        rope = settings.get("rope_parameters", settings.get("rope_scaling", {}))
        if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
            raise CheckpointError(f"{place / 'config.json'} has rotary positions {rope!r}, expected the default type")
        config = config_of(MimiConfig, {**settings, **rope}, place / "config.json")
        model = cls.from_weights(config, state, str(place))
        rate, expected = settings.get("frame_rate", settings.get("_frame_rate")), config.sampling_rate / model.hop
        if rate not in (None, expected):
            raise CheckpointError(f"{place / 'config.json'} has a frame_rate of {rate!r}, expected {expected:g}")
        return model

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for codebook in self._codebooks():
            codebook._embed = None  # which transformers keeps beside the buffers that it is computed of
        return super()._apply(fn, recurse)

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.config.sampling_rate

    @property
    def hop(self) -> int:
        """Samples that a frame spans: two steps of the transformer."""
        return 2 * math.prod(self.config.upsampling_ratios)

    @property
    def codebooks(self) -> list[Tensor]:
        """float32 [codebook_size, codebook_dim] of each level."""
        return [codebook.embed for codebook in self._codebooks()]

    def _codebooks(self) -> list[Any]:
        q = self.quantizer
        parts = (q.semantic_residual_vector_quantizer, q.acoustic_residual_vector_quantizer)
        return [layer.codebook for part in parts for layer in part.layers]

    def check_levels(self, levels: int) -> None:
        """As ``AudioTokenizer.check_levels``; the semantic levels, of which there is one, go together."""
        super().check_levels(levels)
        if levels < self.config.num_semantic_quantizers:
            raise ConfigError(
                f"got {levels} levels, expected at least the {self.config.num_semantic_quantizers} semantic"
            )

    def to_codes(self, samples: Tensor, levels: int) -> Tensor:
        """float32 [1, channels, T] -> int64 [1, levels, ceil(T / hop)]."""
        return self.encode_next([Carry()], F.pad(samples, (0, -samples.shape[-1] % self.hop)), levels)

    def to_samples(self, codes: Tensor) -> Tensor:
        """int64 [1, L, F] -> float32 [1, channels, F * hop]."""
        return self.decode_next([Carry()], codes)

    def stream_encoder(self, levels: int | None = None, *, bandwidth: float | None = None) -> StreamEncoder:
        """As ``AudioTokenizer.stream_encoder``: the codes of a frame come with its last sample."""
        return MimiStreamEncoder(self, self.choose_levels(levels, bandwidth))

    def stream_decoder(self, length: int | None = None) -> StreamDecoder:
        """As ``AudioTokenizer.stream_decoder``: the samples of a frame come with its codes."""
        return MimiStreamDecoder(self, length)

    @exact
    def encode_next(self, carries: list[Carry], samples: Tensor, levels: int) -> Tensor:
        """The next whole frames of some sounds.

        Args:
            carries: one for each sound; they are updated.
            samples: float32 [B, channels, f * hop], checked.
            levels: checked.

        Returns:
            int64 [B, levels, f].
        """
        if not samples.numel():
            return samples.new_zeros(len(samples), levels, 0, dtype=torch.int64)
        window, theta = self.config.sliding_window, self.config.rope_theta
        rows = []
        for carry, row in zip(carries, samples.split(1), strict=True):
            pieces = []
            for x in row.split(PIECE * self.hop, -1):
                x = run(carry, self.encoder.layers, x)
                x = transform(carry, self.encoder_transformer.layers, x.transpose(1, 2), window, theta)
                x = run(carry, [self.downsample], x.transpose(1, 2))
                pieces.append(self.quantizer.encode(x, levels).transpose(0, 1))
            rows.append(torch.cat(pieces, -1))
        return torch.cat(rows)

    @exact
    def decode_next(self, carries: list[Carry], codes: Tensor) -> Tensor:
        """The next frames of some sounds.

        Args:
            carries: one for each sound; they are updated.
            codes: int64 [B, L, f], checked.

        Returns:
            float32 [B, channels, f * hop].
        """
        if not codes.numel():
            return codes.new_zeros(len(codes), self.channels, 0, dtype=torch.float32)
        window, theta = self.config.sliding_window, self.config.rope_theta
        rows = []
        for carry, row in zip(carries, codes.split(1), strict=True):
            pieces = []
            for piece in row.split(PIECE, -1):
                x = run(carry, [self.upsample], self.quantizer.decode(piece))
                x = transform(carry, self.decoder_transformer.layers, x.transpose(1, 2), window, theta)
                pieces.append(run(carry, self.decoder.layers, x.transpose(1, 2)))
            rows.append(torch.cat(pieces, -1))
        return torch.cat(rows)


class MimiStreamEncoder(StreamEncoder):
    """See ``Mimi.stream_encoder``."""

    def __init__(self, codec: Mimi, levels: int) -> None:
        super().__init__(codec, levels)
        self.codec = codec
        self._carries: list[Carry] | None = None
        self._rest = torch.zeros(0)  # of a frame

    def advance(self, samples: Tensor, last: bool) -> Tensor:
        """As ``StreamEncoder.advance``."""
        if self._carries is None:
            self._carries, self._rest = [Carry() for _ in samples], samples[..., :0]
        held = torch.cat([self._rest, samples], -1)
        if last:
            held = F.pad(held, (0, -held.shape[-1] % self.codec.hop))
        whole = held.shape[-1] - held.shape[-1] % self.codec.hop
        self._rest = held[..., whole:].clone()
        return self.codec.encode_next(self._carries, held[..., :whole], self.levels)


class MimiStreamDecoder(StreamDecoder):
    """See ``Mimi.stream_decoder``."""

    def __init__(self, codec: Mimi, length: int | None) -> None:
        super().__init__(codec, length)
        self.codec = codec
        self._carries: list[Carry] | None = None

    def advance(self, codes: Tensor, last: bool) -> Tensor:
        """As ``StreamDecoder.advance``."""
        if self._carries is None:
            self._carries = [Carry() for _ in codes]
        return self.codec.decode_next(self._carries, codes).clamp(-1, 1)

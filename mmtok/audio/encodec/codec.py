"""EnCodec as a tokenizer.

``EncodecConfig`` -- which of the two models, and its default bandwidth
``Encodec``       -- sounds to codes and back, as a whole, in lists, or as streams
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, overload

import torch
from torch import Tensor

from mmtok import checkpoints
from mmtok.audio.encodec.network import HOP
from mmtok.audio.encodec.stream import EncodecStreamDecoder, EncodecStreamEncoder, decode_next, encode_next
from mmtok.audio.encodec.weights import BANDWIDTHS, build, needed, read
from mmtok.audio.encodec.windows import (
    CrossFade,
    EncodecCodes,
    ScaledStreamDecoder,
    ScaledStreamEncoder,
    check_fit,
    decode_windows,
    encode_windows,
    windows,
)
from mmtok.audio.tokenizer import AudioTokenizer, StreamDecoder, StreamEncoder
from mmtok.config import Config
from mmtok.errors import ConfigError, MediaError

_KBPS_PER_LEVEL = {24_000: 0.75, 48_000: 1.5}


@dataclass(frozen=True)
class EncodecConfig(Config):
    """Which of the two models, and how many levels it uses by default.

    Attributes:
        sample_rate: 24000 (mono) or 48000 (stereo), Hz.
        bandwidth: kb/s where a call names none, one of ``BANDWIDTHS``; .75 (24 kHz) or 1.5 (48 kHz) a level.
    """

    sample_rate: int = 24_000
    bandwidth: float = 6.0

    def __post_init__(self) -> None:
        if self.sample_rate not in BANDWIDTHS:
            raise ConfigError(f"EncodecConfig.sample_rate: got {self.sample_rate!r}, expected 24000 or 48000")
        known = BANDWIDTHS[self.sample_rate]
        if self.bandwidth not in known:
            raise ConfigError(f"got bandwidth {self.bandwidth!r}, expected one of {', '.join(map(str, known))} kb/s")


class Encodec(AudioTokenizer):
    """A pretrained EnCodec. Use :meth:`pretrained` or :meth:`load`.

    At 24 kHz: float32 [B, 1, T] <-> int64 [B, levels, ceil(T / 320)], 1 to 32 levels. At 48 kHz codes alone do not hold
    the sound: use the methods ``with_scale``, 1 to 16 levels.

    Args:
        config: model and default bandwidth.
        state: a state dict of the package's model; buffers that only training needs may be absent.

    Raises:
        CheckpointError: tensors are missing, misshapen or not finite, or a codebook is empty.
    """

    kind: ClassVar[str] = "encodec"

    def __init__(self, config: EncodecConfig, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.channels = 1 if config.sample_rate == 24_000 else 2
        kept = needed(state)
        self.network = build(config.sample_rate, kept)
        # The weights as published are what is stored and fingerprinted: fusing rounds, and not alike on every machine.
        self._weights = checkpoints.tensors_to_bytes(kept)
        self.fingerprint = checkpoints.fingerprint(self.kind, config.to_json(), self._files())
        self.eval()

    @classmethod
    def pretrained(
        cls, sample_rate: int = 24_000, bandwidth: float = 6.0, weights: str | Path | None = None
    ) -> Encodec:
        """The published weights, from local files or through the package's address.

        Args:
            sample_rate: 24000 or 48000.
            bandwidth: kb/s by default, one of 1.5 (24 kHz alone), 3, 6, 12 and 24.
            weights: the original ``.th`` file or the directory that holds it, or a directory with the ``config.json``
                and ``model.safetensors`` of transformers (facebook/encodec_24khz); None downloads the original into
                torch's hub directory unless it is there.

        Raises:
            CheckpointError: none can be had, or they are not the published model. The message names the file and where
                to put it.
        """
        config = EncodecConfig(sample_rate, float(bandwidth))
        return cls(config, read(sample_rate, weights))

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.config.sample_rate

    @property
    def hop(self) -> int:
        """Samples a frame: 320."""
        return HOP

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """1024 for each level of the config's bandwidth."""
        return (1024,) * int(self.config.bandwidth / _KBPS_PER_LEVEL[self.sample_rate])

    @property
    def all_codebook_sizes(self) -> tuple[int, ...]:
        """1024 for each level that the model has."""
        return (1024,) * len(self.network.books)

    def to_codes(self, samples: Tensor, levels: int) -> Tensor:
        """float32 [1, 1, T] at 24 kHz -> int64 [1, levels, ceil(T / 320)]."""
        return encode_next(self.network, [{}], samples, levels)

    def to_samples(self, codes: Tensor) -> Tensor:
        """int64 [1, L, F] of 24 kHz -> float32 [1, 1, F * 320]."""
        return decode_next(self.network, [{}], codes)

    def _encode(self, samples: Tensor, levels: int) -> Tensor:
        self._check_unscaled("encode_with_scale")
        return super()._encode(samples, levels)

    def _decode(self, codes: Tensor, length: int) -> Tensor:
        self._check_unscaled("decode_with_scale")
        return super()._decode(codes, length)

    def stream_encoder(self, levels: int | None = None, *, bandwidth: float | None = None) -> StreamEncoder:
        """As ``AudioTokenizer.stream_encoder``, at 24 kHz. The codes of a frame come with its last sample, those of the
        first seven frames with the last of these.

        Raises:
            MediaError: a 48 kHz model.
            ConfigError: as ``encode``.
        """
        self._check_unscaled("stream_encoder_with_scale")
        return EncodecStreamEncoder(self, self.network, self.choose_levels(levels, bandwidth))

    def stream_decoder(self, length: int | None = None) -> StreamDecoder:
        """As ``AudioTokenizer.stream_decoder``, at 24 kHz. The samples of a frame come with its codes, those of the
        first seven frames with the last of these.

        Raises:
            MediaError: a 48 kHz model.
        """
        self._check_unscaled("stream_decoder_with_scale")
        return EncodecStreamDecoder(self, self.network, length)

    @overload
    def encode_with_scale(
        self, samples: Tensor, levels: int | None = ..., *, bandwidth: float | None = ...
    ) -> EncodecCodes: ...
    @overload
    def encode_with_scale(
        self, samples: Sequence[Tensor], levels: int | None = ..., *, bandwidth: float | None = ...
    ) -> list[EncodecCodes]: ...
    def encode_with_scale(
        self, samples: Tensor | Sequence[Tensor], levels: int | None = None, *, bandwidth: float | None = None
    ) -> EncodecCodes | list[EncodecCodes]:
        """Codes, scales and length of sounds at either rate.

        Args:
            samples, levels, bandwidth: as for ``encode``.

        Returns:
            Of a tensor the codes of the batch; of a sequence those of each sound, without the dimension of the batch.

        Raises:
            MediaError, ConfigError: as ``encode``.
        """
        levels = self.choose_levels(levels, bandwidth)
        if not isinstance(samples, Tensor):
            self.check_sounds(samples)
            rows = [self.encode_with_scale(x[None], levels) for x in samples]
            return [EncodecCodes(x.codes[0], x.scales[0], x.length) for x in rows]
        self.check_samples(samples)
        length = samples.shape[-1]
        if self.sample_rate == 24_000:
            return EncodecCodes(self._encode(samples, levels), torch.zeros(len(samples), 0), length)
        return EncodecCodes(*encode_windows(self.network, samples, windows(length), levels), length)

    @overload
    def decode_with_scale(self, coded: EncodecCodes) -> Tensor: ...
    @overload
    def decode_with_scale(self, coded: Sequence[EncodecCodes]) -> list[Tensor]: ...
    def decode_with_scale(self, coded: EncodecCodes | Sequence[EncodecCodes]) -> Tensor | list[Tensor]:
        """Sounds of what :meth:`encode_with_scale` gave, as long as they were.

        Returns:
            float32 [B, channels, length] in -1..1; for a sequence a list of [channels, length].

        Raises:
            VocabularyError: codes of a wrong dtype or shape, or outside their codebooks.
            MediaError: codes, scales and length do not fit each other.
        """
        if not isinstance(coded, EncodecCodes):
            rows = [EncodecCodes(x.codes[None], x.scales[None], x.length) for x in coded]
            return [self.decode_with_scale(x)[0] for x in rows]
        self.check_codes(coded.codes)
        if self.sample_rate == 24_000:
            check_fit(coded, [(0, coded.length)], scaled=False)
            return self._decode(coded.codes, coded.length)
        spans = windows(coded.length)
        check_fit(coded, spans)
        return decode_windows(self.network, [CrossFade() for _ in coded.codes], coded, spans)

    def stream_encoder_with_scale(
        self, levels: int | None = None, *, bandwidth: float | None = None
    ) -> ScaledStreamEncoder:
        """A new stream from 48 kHz samples to codes with scales, those of the whole sound, a window of 1 s at a time.

        Raises:
            ConfigError: a 24 kHz model, or as ``encode``.
        """
        self._check_scaled("stream_encoder")
        return ScaledStreamEncoder(self, self.network, self.choose_levels(levels, bandwidth))

    def stream_decoder_with_scale(self) -> ScaledStreamDecoder:
        """A new stream from what a stream encoder of 48 kHz gave to samples, those of the whole sound.

        Raises:
            ConfigError: a 24 kHz model.
        """
        self._check_scaled("stream_decoder")
        return ScaledStreamDecoder(self, self.network)

    def save(self, path: str | Path) -> None:
        """Write config.json, model.safetensors (float32) and mmtok.json to a directory, atomically."""
        checkpoints.save_checkpoint(path, self.kind, self.config.to_json(), self._files())

    @classmethod
    def load(cls, path: str | Path) -> Encodec:
        """Read a directory that ``save`` wrote.

        Raises:
            CheckpointError: missing, damaged, of another kind, or with weights that cannot be used.
        """
        config_json, _, state, _ = checkpoints.read_model(path, cls.kind)
        return cls(EncodecConfig.from_json(config_json), state)

    def _files(self) -> dict[str, bytes]:
        return {checkpoints.WEIGHTS: self._weights}

    def _check_unscaled(self, instead: str) -> None:
        if self.sample_rate == 48_000:
            raise MediaError(f"codes of the 48 kHz EnCodec need scales and a length: use {instead}")

    def _check_scaled(self, instead: str) -> None:
        if self.sample_rate == 24_000:
            raise ConfigError(f"codes of the 24 kHz EnCodec have no scales: use {instead}")

"""What all audio tokenizers share: sounds of any length, in batches and lists, as a whole or as a stream.

``AudioTokenizer`` -- encode float32 sounds to codes, decode codes to sounds; a subclass gives the network
``StreamEncoder``  -- push samples, get codes
``StreamDecoder``  -- push codes, get samples

length  -- any, 0 included: the tail is padded with silence to a whole frame, and ``decode`` cuts back to the length
levels  -- how many codebooks of a residual quantizer, an argument of each call, as a number or as a bit rate
batch   -- each row goes through the network alone, so that its codes are those that it has alone
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from mmtok.codec import exact
from mmtok.errors import ConfigError, MediaError, VocabularyError


class AudioTokenizer(nn.Module, ABC):
    """Encode float32 sounds to codes and decode codes to float32 sounds.

    Attributes:
        modality: ``audio``.
        channels: of the sounds: 1 for mono, 2 for stereo.
    """

    modality = "audio"
    channels: int = 1

    @property
    @abstractmethod
    def sample_rate(self) -> int:
        """Hz."""

    @property
    @abstractmethod
    def hop(self) -> int:
        """Samples that a frame, a column of the codes, spans."""

    @property
    @abstractmethod
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes in each codebook, a row of the codes, coarse to fine."""

    @property
    def all_codebook_sizes(self) -> tuple[int, ...]:
        """As ``codebook_sizes``, with levels that a call can ask for beyond those that it has by default."""
        return self.codebook_sizes

    @abstractmethod
    def to_codes(self, samples: Tensor, levels: int) -> Tensor:
        """float32 [1, channels, T], T at least 1 -> int64 [1, levels, ceil(T / hop)]."""

    @abstractmethod
    def to_samples(self, codes: Tensor) -> Tensor:
        """int64 [1, L, F], F at least 1, codes in range -> float32 [1, channels, F * hop]."""

    def check_levels(self, levels: int) -> None:
        """Raise ConfigError unless the tokenizer can work with the first ``levels`` of its codebooks."""
        if not _is_whole(levels) or not 1 <= levels <= len(self.all_codebook_sizes):
            raise ConfigError(f"got {levels!r} levels, expected 1 to {len(self.all_codebook_sizes)}, an int")

    @property
    def properties(self) -> dict[str, Any]:
        """What the registry keeps of this tokenizer: ``sample_rate`` in Hz and ``hop`` in samples."""
        return {"sample_rate": self.sample_rate, "hop": self.hop}

    def bandwidth(self, levels: int | None = None) -> float:
        """Nominal bit rate in kb/s of the first ``levels`` levels; by default of ``codebook_sizes``.

        Raises:
            ConfigError: no such number of levels.
        """
        if levels is not None:
            self.check_levels(levels)
        sizes = self.codebook_sizes if levels is None else self.all_codebook_sizes[:levels]
        return sum(math.log2(size) for size in sizes) * self.sample_rate / self.hop / 1000

    def levels_at(self, bandwidth: float) -> int:
        """How many levels have exactly this nominal bit rate, in kb/s.

        Raises:
            ConfigError: no number of levels has it; the message names those that there are.
        """
        rates = {}
        for levels in range(1, len(self.all_codebook_sizes) + 1):
            try:
                rates[levels] = self.bandwidth(levels)
            except ConfigError:
                continue
        if isinstance(bandwidth, numbers.Real) and not isinstance(bandwidth, bool):
            for levels, rate in rates.items():
                if abs(rate - bandwidth) < 1e-6 * rate:
                    return levels
        known = ", ".join(f"{rate:g}" for rate in rates.values())
        raise ConfigError(f"got bandwidth {bandwidth!r}, expected one of {known} kb/s")

    @overload
    def encode(self, samples: Tensor, levels: int | None = ..., *, bandwidth: float | None = ...) -> Tensor: ...
    @overload
    def encode(
        self, samples: Sequence[Tensor], levels: int | None = ..., *, bandwidth: float | None = ...
    ) -> list[Tensor]: ...
    def encode(
        self, samples: Tensor | Sequence[Tensor], levels: int | None = None, *, bandwidth: float | None = None
    ) -> Tensor | list[Tensor]:
        """Codes of sounds.

        Args:
            samples: float32 [B, channels, T] in -1..1 at ``sample_rate``, or a sequence of sounds [channels, T] of
                different lengths; any T, 0 included.
            levels: the first so many codebooks; those of ``codebook_sizes`` by default. Fewer give the first rows of
                the codes of all.
            bandwidth: the same as a nominal bit rate in kb/s.

        Returns:
            int64 [B, levels, ceil(T / hop)]; for a sequence a list of int64 [levels, ceil(T / hop)].

        Raises:
            MediaError: wrong dtype or shape, or NaN.
            ConfigError: no such number of levels or bit rate, or both given.
        """
        levels = self.choose_levels(levels, bandwidth)
        if isinstance(samples, Tensor):
            self.check_samples(samples)
            return self._encode(samples, levels)
        self.check_sounds(samples)
        return [self._encode(x[None], levels)[0] for x in samples]

    @overload
    def decode(self, codes: Tensor, length: int | None = ...) -> Tensor: ...
    @overload
    def decode(self, codes: Sequence[Tensor], length: Sequence[int] | None = ...) -> list[Tensor]: ...
    def decode(
        self, codes: Tensor | Sequence[Tensor], length: int | Sequence[int] | None = None
    ) -> Tensor | list[Tensor]:
        """Sounds of codes.

        Args:
            codes: int64 [B, L, F], the first L levels; any F, 0 included. Or a sequence of [L, F].
            length: how many samples to keep, at most F * hop and more than (F - 1) * hop; all by default. For a
                sequence one for each.

        Returns:
            float32 [B, channels, length] in -1..1; for a sequence a list of [channels, length].

        Raises:
            VocabularyError: wrong dtype or shape, a code outside its codebook, or a length that the frames do not hold.
        """
        if isinstance(codes, Tensor):
            if isinstance(length, Sequence):
                raise VocabularyError(f"got {len(length)} lengths for one tensor of codes, expected one number")
            self.check_codes(codes)
            return self._decode(codes, self.check_length(length, codes.shape[-1]))
        if not isinstance(codes, Sequence):
            got = type(codes).__name__
            raise VocabularyError(f"got codes of type {got}, expected int64 [B, levels, F] or a list of [levels, F]")
        lengths = [None] * len(codes) if length is None else length
        if not isinstance(lengths, Sequence) or len(lengths) != len(codes):
            raise VocabularyError(f"got lengths {lengths!r} for {len(codes)} sounds, expected one for each")
        for i, x in enumerate(codes):
            if not isinstance(x, Tensor) or x.ndim != 2:
                got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise VocabularyError(f"codes {i} are {got}, expected int64 [levels, F]")
            self.check_codes(x[None], f"codes {i}: ")
        kept = [self.check_length(n, x.shape[-1]) for n, x in zip(lengths, codes, strict=True)]
        return [self._decode(x[None], n)[0] for x, n in zip(codes, kept, strict=True)]

    def near_ties(self, samples: Tensor, within: float) -> Tensor | None:
        """Which codes have a rival: another code of their level that is almost as near to what was quantized.

        Args:
            samples: float32 [B, channels, T], as for ``encode``.
            within: how much further the second code may be, as a share of the nearest's squared distance.

        Returns:
            bool, of the shape of the codes of all levels; None where the tokenizer cannot tell.
        """
        return None

    def stream_encoder(self, levels: int | None = None, *, bandwidth: float | None = None) -> StreamEncoder:
        """A new stream from samples to codes, whose codes are those of the whole sound but for near ties.

        Raises:
            ConfigError: this tokenizer has none, or ``levels`` as for ``encode``.
        """
        raise ConfigError(f"{type(self).__name__} cannot encode a stream: its codes depend on the whole sound")

    def stream_decoder(self, length: int | None = None) -> StreamDecoder:
        """A new stream from codes to samples, which are those of the whole sound but for rounding.

        Args:
            length: samples of the whole sound, where that is known: what lies beyond is cut.

        Raises:
            ConfigError: this tokenizer has none.
            VocabularyError: a length that is no number of samples.
        """
        raise ConfigError(f"{type(self).__name__} cannot decode a stream: its samples depend on all codes")

    def choose_levels(self, levels: int | None, bandwidth: float | None) -> int:
        """The number of levels that a call asks for; see ``encode``.

        Raises:
            ConfigError: there is none such, or both are given.
        """
        if levels is not None and bandwidth is not None:
            raise ConfigError(f"got levels {levels} and bandwidth {bandwidth}, expected one of the two")
        if bandwidth is not None:
            return self.levels_at(bandwidth)
        levels = len(self.codebook_sizes) if levels is None else levels
        self.check_levels(levels)
        return levels

    def check_samples(self, samples: Tensor, where: str = "") -> None:
        """Raise MediaError unless ``samples`` is finite float32 [B, channels, T]; ``where`` begins the message."""
        if samples.dtype != torch.float32 or samples.ndim != 3 or samples.shape[1] != self.channels:
            hint = "; mix to mono first" if self.channels == 1 and samples.ndim == 3 and samples.shape[1] == 2 else ""
            raise MediaError(
                f"{where}got {samples.dtype} {list(samples.shape)}, expected float32 [B, {self.channels}, T]{hint}"
            )
        # Of a long sound each elementwise comparison would be a copy.
        if samples.numel() and not torch.isfinite(torch.stack(samples.aminmax())).all():
            raise MediaError(f"{where}got NaN or infinity among the samples, expected float32 in -1..1")

    def check_sounds(self, sounds: Sequence[Tensor]) -> None:
        """Raise MediaError unless ``sounds`` is a sequence, each of it finite float32 [channels, T]."""
        if not isinstance(sounds, Sequence):
            form = f"float32 [B, {self.channels}, T] or a list of [{self.channels}, T]"
            raise MediaError(f"got {type(sounds).__name__}, expected {form}")
        for i, x in enumerate(sounds):
            if not isinstance(x, Tensor) or x.ndim != 2:
                got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise MediaError(f"sound {i} is {got}, expected float32 [{self.channels}, T]")
            self.check_samples(x[None], f"sound {i}: ")

    def check_codes(self, codes: Tensor, where: str = "") -> None:
        """Raise VocabularyError unless ``codes`` is int64 [B, L, F] within the codebooks."""
        if codes.dtype != torch.int64 or codes.ndim != 3:
            raise VocabularyError(f"{where}got codes {codes.dtype} {list(codes.shape)}, expected int64 [B, levels, F]")
        try:
            self.check_levels(codes.shape[1])
        except ConfigError as error:
            raise VocabularyError(f"{where}got codes {list(codes.shape)}: {error}") from error
        sizes = torch.tensor(self.all_codebook_sizes[: codes.shape[1]], device=codes.device)[:, None]
        bad = ((codes < 0) | (codes >= sizes)).nonzero()
        if len(bad):
            row, level, frame = bad[0].tolist()
            raise VocabularyError(
                f"{where}row {row}, level {level}, frame {frame}: got code {int(codes[row, level, frame])}, "
                f"expected 0 to {self.all_codebook_sizes[level] - 1}"
            )

    @exact
    def _encode(self, samples: Tensor, levels: int) -> Tensor:
        rows, _, length = samples.shape
        if not rows or not length:
            return samples.new_zeros(rows, levels, math.ceil(length / self.hop), dtype=torch.int64)
        return torch.cat([self.to_codes(row, levels) for row in samples.split(1)])

    @exact
    def _decode(self, codes: Tensor, length: int) -> Tensor:
        if not len(codes) or not length:
            return codes.new_zeros(len(codes), self.channels, length, dtype=torch.float32)
        rows = [self.to_samples(row)[..., :length] for row in codes.split(1)]
        return (rows[0] if len(rows) == 1 else torch.cat(rows)).clamp_(-1, 1)

    def check_length(self, length: int | None, frames: int) -> int:
        """How many samples to keep of so many frames; raise VocabularyError unless they hold ``length``."""
        total, least = frames * self.hop, max(0, (frames - 1) * self.hop + 1)
        if length is not None and not (_is_whole(length) and least <= length <= total):
            raise VocabularyError(f"got length {length!r}, but {frames} frames hold {least} to {total} samples")
        return total if length is None else length


def _is_whole(number: object) -> bool:
    return isinstance(number, numbers.Integral) and not isinstance(number, bool)


class StreamEncoder(ABC):
    """Samples in, codes out: all that ``push`` and ``finish`` give, end to end, is what ``encode`` gives of the whole.

    Memory does not grow with the sound. One stream is one sound or one batch of sounds of equal length.

    Attributes:
        latency: how many samples after the end of a frame its codes come out.
    """

    latency: int = 0

    def __init__(self, tokenizer: AudioTokenizer, levels: int) -> None:
        self.tokenizer, self.levels = tokenizer, levels
        self.nothing: Tensor | None = None  # no samples of as many sounds, where they are
        self.finished = False

    def push(self, samples: Tensor) -> Tensor:
        """The next samples, float32 [B, channels, n], any n -> codes of the frames that are complete now, [B, K, f].

        Raises:
            MediaError: wrong dtype or shape, NaN, another B than before, or a stream that has been finished.
        """
        self._check_open()
        self.tokenizer.check_samples(samples)
        if self.nothing is not None and len(samples) != len(self.nothing):
            raise MediaError(f"got {len(samples)} sounds, expected {len(self.nothing)} as in the push before")
        self.nothing = samples.new_zeros(*samples.shape[:2], 0)
        return self.advance(samples.detach(), last=False)

    def finish(self) -> Tensor:
        """End the sound -> the codes that are still to come, int64 [B, K, f].

        Raises:
            MediaError: the stream has been finished.
        """
        self._check_open()
        self.finished = True
        nothing = torch.zeros(1, self.tokenizer.channels, 0) if self.nothing is None else self.nothing
        return self.advance(nothing, last=True)

    @abstractmethod
    def advance(self, samples: Tensor, last: bool) -> Tensor:
        """Checked samples, possibly none -> codes that are certain now; all that is left if they are the last."""

    def _check_open(self) -> None:
        if self.finished:
            raise MediaError("the stream has been finished; begin another with stream_encoder()")


class StreamDecoder(ABC):
    """Codes in, samples out: the samples of ``push`` and ``finish``, end to end, are those that ``decode`` gives.

    Attributes:
        latency: how many samples of the frames that were pushed are still to come.
    """

    latency: int = 0

    def __init__(self, tokenizer: AudioTokenizer, length: int | None) -> None:
        if length is not None and (not _is_whole(length) or length < 0):
            raise VocabularyError(f"got length {length!r}, expected a number of samples")
        self.tokenizer, self.length = tokenizer, length
        self.nothing: Tensor | None = None  # no frames of as many sounds and levels, where they are
        self.frames = self.given = 0
        self.finished = False

    def push(self, codes: Tensor) -> Tensor:
        """The next codes, int64 [B, L, f], any f -> the samples that are certain now, float32 [B, channels, n].

        Raises:
            VocabularyError: wrong dtype or shape, a code outside its codebook, another B or L than before, or a stream
                that has been finished.
        """
        self._check_open()
        self.tokenizer.check_codes(codes)
        if self.nothing is not None and codes.shape[:2] != self.nothing.shape[:2]:
            rows, levels, _ = self.nothing.shape
            raise VocabularyError(
                f"got codes {list(codes.shape)}, expected {rows} sounds of {levels} levels as in the push before"
            )
        self.nothing = codes.new_zeros(*codes.shape[:2], 0)
        self.frames += codes.shape[-1]
        return self._cut(self.advance(codes, last=False))

    def finish(self) -> Tensor:
        """End the codes -> the samples that are still to come, float32 [B, channels, n].

        Raises:
            VocabularyError: the stream has been finished, or the frames do not hold ``length`` samples; it is not
                finished then.
        """
        self._check_open()
        self.tokenizer.check_length(self.length, self.frames)
        self.finished = True
        levels = len(self.tokenizer.codebook_sizes)
        nothing = torch.zeros(1, levels, 0, dtype=torch.int64) if self.nothing is None else self.nothing
        return self._cut(self.advance(nothing, last=True))

    @abstractmethod
    def advance(self, codes: Tensor, last: bool) -> Tensor:
        """Checked codes, possibly none -> samples that are certain now; all that is left if they are the last."""

    def _cut(self, samples: Tensor) -> Tensor:
        left = samples.shape[-1] if self.length is None else max(0, self.length - self.given)
        self.given += samples.shape[-1]
        return samples[..., :left]

    def _check_open(self) -> None:
        if self.finished:
            raise VocabularyError("the stream has been finished; begin another with stream_decoder()")

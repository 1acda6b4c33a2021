"""The windows of the 48 kHz EnCodec: one second every .99 s, each divided by its loudness.

``EncodecCodes``        -- all that the decoder needs: codes, the windows' scales, the length
``windows``             -- where they are in a sound
``encode_windows``, ``decode_windows`` -- some of them
``CrossFade``           -- decoded windows to a sound
``ScaledStreamEncoder`` -- push samples, get codes with scales, window by window
``ScaledStreamDecoder`` -- push codes with scales, get samples

In a stream a window comes out when all of its samples are in, or at the end. What the encoder gives, piece by piece,
are the codes and scales of the whole sound cut between windows; ``length`` is by how much each piece prolongs it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmtok.audio.encodec.network import HOP, Network
from mmtok.audio.tokenizer import AudioTokenizer
from mmtok.codec import exact
from mmtok.errors import MediaError

WINDOW, STRIDE = 48_000, 47_520


@dataclass(frozen=True, eq=False)
class EncodecCodes:
    """All that the decoder needs.

    Attributes:
        codes: int64 [B, K, F]; at 48 kHz the frames of all windows, one after the other.
        scales: float32 [B, S], one for each window at 48 kHz; [B, 0] at 24 kHz.
        length: samples.

    In a sequence, of sounds of different lengths, codes are [K, F] and scales [S].
    """

    codes: Tensor
    scales: Tensor
    length: int


def windows(length: int) -> list[tuple[int, int]]:
    """First and last-plus-one sample of each window of a sound."""
    return [(start, min(start + WINDOW, length)) for start in range(0, length, STRIDE)]


def frames_of(spans: list[tuple[int, int]]) -> list[int]:
    """Frames of each window."""
    return [math.ceil((end - start) / HOP) for start, end in spans]


@exact
def encode_windows(
    network: Network, samples: Tensor, spans: list[tuple[int, int]], levels: int
) -> tuple[Tensor, Tensor]:
    """Codes of these windows of sounds; each goes through the network alone.

    Args:
        network: of 48 kHz.
        samples: float32 [B, 2, T].
        spans: first and last-plus-one sample of each window.
        levels: how many.

    Returns:
        (int64 [B, levels, F], float32 [B, S]).
    """
    counts = frames_of(spans)
    codes = samples.new_zeros(len(samples), levels, sum(counts), dtype=torch.int64)
    scales = samples.new_zeros(len(samples), len(spans))
    for row, sound in enumerate(samples):
        for n, (out, (start, end)) in enumerate(zip(codes[row].split(counts, 1) if counts else (), spans, strict=True)):
            window = sound[:, start:end]
            scales[row, n] = scale = window.mean(dim=0).pow(2).mean().sqrt() + 1e-8
            out.copy_(network.quantize(network.latents((window / scale).T.contiguous()), levels))
    return codes, scales


@exact
def decode_windows(
    network: Network, fades: list[CrossFade], coded: EncodecCodes, spans: list[tuple[int, int]]
) -> Tensor:
    """The next windows of sounds.

    Args:
        network: of 48 kHz.
        fades: one for each sound, B; they are updated.
        coded: of these windows, checked.
        spans: the windows.

    Returns:
        float32 [B, 2, n], the samples that are certain.
    """
    counts = frames_of(spans)
    sounds = coded.scales.new_empty(len(fades), 2, sum(min(end - start, STRIDE) for start, end in spans))
    for row, fade in enumerate(fades):
        at = 0
        for n, codes in enumerate(coded.codes[row].split(counts, 1) if counts else ()):
            window = network.samples(network.restore(codes)).T * coded.scales[row, n]
            sound = fade.push(window, spans[n][1] - spans[n][0])
            sounds[row, :, at : at + sound.shape[1]] = sound
            at += sound.shape[1]
    return sounds.clamp_(-1, 1)


class CrossFade:
    """Windows in, sound out: where two overlap, their mean with triangular weights, as in the package.

    Each window is cut to its own length first: the package's sum fails where the last one ends before the one before.

    Attributes:
        tail: float32 [2, n], what the last window holds beyond its stride; n is 0 at the end of a sound.
    """

    def __init__(self) -> None:
        self.tail = torch.zeros(2, 0)
        self._fade = torch.zeros(0)

    def push(self, window: Tensor, length: int) -> Tensor:
        """The next window, float32 [2, f * HOP] of which ``length`` count -> the samples that are certain, [2, n]."""
        if not len(self._fade):  # as long as the first window
            ramp = torch.linspace(0, 1, window.shape[1] + 2, device=window.device)[1:-1]
            self._fade, self.tail = 0.5 - (ramp - 0.5).abs(), window[:, :0]
        n = self.tail.shape[1]
        old, new = self._fade[STRIDE : STRIDE + n], self._fade[:n]
        faded = (old * self.tail + new * window[:, :n]) / (old + new)
        self.tail = window[:, STRIDE:length].clone()
        return torch.cat([faded, window[:, n : min(length, STRIDE)]], 1)


class ScaledStreamEncoder:
    """See ``Encodec.stream_encoder_with_scale``.

    Attributes:
        latency: how many samples after its first one the codes of a window come out.
    """

    latency: int = WINDOW

    def __init__(self, codec: AudioTokenizer, network: Network, levels: int) -> None:
        self.codec, self.network, self.levels = codec, network, levels
        self._rest: Tensor | None = None
        self._finished = False

    def push(self, samples: Tensor) -> EncodecCodes:
        """The next samples, float32 [B, 2, n], any n -> codes of the windows that are complete now.

        Raises:
            MediaError: wrong dtype or shape, NaN, another B than before, or a stream that has been finished.
        """
        self.codec.check_samples(samples)
        self._check_open()
        rest = samples[..., :0] if self._rest is None else self._rest
        if len(samples) != len(rest):
            raise MediaError(f"got {len(samples)} sounds, expected {len(rest)} as in the push before")
        held = torch.cat([rest, samples], -1)
        spans = [(start, start + WINDOW) for start in range(0, held.shape[-1] - WINDOW + 1, STRIDE)]
        self._rest = held[..., len(spans) * STRIDE :].clone()
        return EncodecCodes(*encode_windows(self.network, held, spans, self.levels), len(spans) * STRIDE)

    def finish(self) -> EncodecCodes:
        """End the sound -> the codes that are still to come.

        Raises:
            MediaError: a stream that has been finished.
        """
        self._check_open()
        self._finished = True
        rest = torch.zeros(1, 2, 0) if self._rest is None else self._rest
        spans = windows(rest.shape[-1])
        return EncodecCodes(*encode_windows(self.network, rest, spans, self.levels), rest.shape[-1])

    def _check_open(self) -> None:
        if self._finished:
            raise MediaError("the stream has been finished; begin another with stream_encoder_with_scale()")


class ScaledStreamDecoder:
    """See ``Encodec.stream_decoder_with_scale``.

    Attributes:
        latency: how many samples of the windows that were pushed are still to come.
    """

    latency: int = WINDOW - STRIDE

    def __init__(self, codec: AudioTokenizer, network: Network) -> None:
        self.codec, self.network = codec, network
        self._fades: list[CrossFade] | None = None
        self._ended = self._finished = False

    def push(self, coded: EncodecCodes) -> Tensor:
        """The next piece, as the encoder gave it -> the samples that are certain now, float32 [B, 2, n].

        Raises:
            VocabularyError: codes of a wrong dtype or shape, or outside their codebooks.
            MediaError: codes, scales and length do not fit each other, another B than before, a piece after the last
                one of a sound, or a stream that has been finished.
        """
        self.codec.check_codes(coded.codes)
        self._check_open()
        rows, count = len(coded.codes), coded.scales.shape[-1]
        fades = [CrossFade() for _ in range(rows)] if self._fades is None else self._fades
        if rows != len(fades):
            raise MediaError(f"got {rows} sounds, expected {len(fades)} as in the push before")
        # Whole windows, after which others come, hold half a frame a window more than a sound of this length does.
        whole = coded.length == count * STRIDE and coded.codes.shape[-1] == count * WINDOW // HOP
        spans = [(0, WINDOW)] * count if whole else windows(coded.length)
        check_fit(coded, spans)
        if self._ended and spans:
            raise MediaError("got codes after the last window of the sound; begin another stream for another sound")
        self._fades, self._ended = fades, self._ended or not whole
        return decode_windows(self.network, fades, coded, spans)

    def finish(self) -> Tensor:
        """End the codes -> float32 [B, 2, n]; n is 0 unless the last window of the sound is missing.

        Raises:
            MediaError: a stream that has been finished.
        """
        self._check_open()
        self._finished = True
        tails = [fade.tail for fade in self._fades or []]
        return torch.stack(tails).clamp(-1, 1) if tails else torch.zeros(1, 2, 0)

    def _check_open(self) -> None:
        if self._finished:
            raise MediaError("the stream has been finished; begin another with stream_decoder_with_scale()")


def check_fit(coded: EncodecCodes, spans: list[tuple[int, int]], scaled: bool = True) -> None:
    """Raise MediaError unless codes [B, K, F] and scales [B, S], S = 0 if not scaled, are those of these windows."""
    frames, rows, count = sum(frames_of(spans)), len(coded.codes), len(spans) if scaled else 0
    if coded.length < 0 or coded.codes.shape[-1] != frames or tuple(coded.scales.shape) != (rows, count):
        raise MediaError(
            f"got codes {list(coded.codes.shape)} and scales {list(coded.scales.shape)}, expected {frames} frames and "
            f"{count} scales a row for {coded.length} samples"
        )

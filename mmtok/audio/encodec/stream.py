"""The 24 kHz EnCodec over a stream, or over a long sound in pieces of it.

``encode_next``, ``decode_next`` -- the next whole frames of some sounds
``EncodecStreamEncoder``         -- push samples, get codes
``EncodecStreamDecoder``         -- push codes, get samples

A frame comes out with its last sample, except at the start: the padding on the left is a reflection of the first seven
frames, so that these come out together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmtok.audio.encodec.network import HOP, LEAD, Memory, Network
from mmtok.audio.tokenizer import AudioTokenizer, StreamDecoder, StreamEncoder
from mmtok.codec import exact

# Frames that go through the network together: 2 s. Fewer cost more time for each frame, more cost more memory.
PIECE = 150


@exact
def encode_next(network: Network, memories: list[Memory], samples: Tensor, levels: int) -> Tensor:
    """The next frames of some sounds.

    Args:
        network: of 24 kHz.
        memories: one for each sound, B; they are updated.
        samples: float32 [B, 1, n], whole frames unless they are the last, at the start at least ``LEAD`` of them
            unless they are all.
        levels: how many.

    Returns:
        int64 [B, levels, ceil(n / HOP)].
    """
    codes = samples.new_zeros(len(samples), levels, math.ceil(samples.shape[-1] / HOP), dtype=torch.int64)
    if samples.shape[-1]:
        for row, memory, out in zip(samples, memories, codes, strict=True):
            for x, part in zip(row.split(PIECE * HOP, 1), out.split(PIECE, 1), strict=True):
                part.copy_(network.quantize(network.latents(x.T.contiguous(), memory), levels))
    return codes


@exact
def decode_next(network: Network, memories: list[Memory], codes: Tensor) -> Tensor:
    """The next frames of some sounds.

    Args:
        network: of 24 kHz.
        memories: one for each sound, B; they are updated.
        codes: int64 [B, L, f], at the start at least ``LEAD`` frames unless they are all.

    Returns:
        float32 [B, 1, f * HOP] in -1..1.
    """
    samples = codes.new_zeros(len(codes), 1, codes.shape[-1] * HOP, dtype=torch.float32)
    if codes.shape[-1]:
        for row, memory, out in zip(codes, memories, samples, strict=True):
            for x, part in zip(row.split(PIECE, 1), out.split(PIECE * HOP, 1), strict=True):
                part.copy_(network.samples(network.restore(x), memory).T)
    return samples.clamp_(-1, 1)


class EncodecStreamEncoder(StreamEncoder):
    """See ``Encodec.stream_encoder``; the latency is that at the start, and 0 later."""

    latency = (LEAD - 1) * HOP

    def __init__(self, codec: AudioTokenizer, network: Network, levels: int) -> None:
        super().__init__(codec, levels)
        self.network = network
        self._memories: list[Memory] | None = None
        self._rest = torch.zeros(0)
        self._least = LEAD * HOP  # samples before anything can come out

    def advance(self, samples: Tensor, last: bool) -> Tensor:
        """As ``StreamEncoder.advance``."""
        if self._memories is None:
            self._memories, self._rest = [{} for _ in samples], samples[..., :0]
        held = torch.cat([self._rest, samples], -1)
        whole = held.shape[-1] // HOP * HOP if held.shape[-1] >= self._least else 0
        self._least = 0 if whole else self._least
        if last:
            whole = held.shape[-1]
        self._rest = held[..., whole:].clone()
        return encode_next(self.network, self._memories, held[..., :whole], self.levels)


class EncodecStreamDecoder(StreamDecoder):
    """See ``Encodec.stream_decoder``; the latency is that at the start, and 0 later."""

    latency = (LEAD - 1) * HOP

    def __init__(self, codec: AudioTokenizer, network: Network, length: int | None) -> None:
        super().__init__(codec, length)
        self.network = network
        self._memories: list[Memory] | None = None
        self._rest = torch.zeros(0)
        self._least = LEAD  # frames before anything can come out

    def advance(self, codes: Tensor, last: bool) -> Tensor:
        """As ``StreamDecoder.advance``."""
        if self._memories is None:
            self._memories, self._rest = [{} for _ in codes], codes[..., :0]
        held = torch.cat([self._rest, codes], -1)
        whole = held.shape[-1] if last or held.shape[-1] >= self._least else 0
        self._least = 0 if whole else self._least
        self._rest = held[..., whole:].clone()
        return decode_next(self.network, self._memories, held[..., :whole])

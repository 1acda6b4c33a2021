"""EnCodec's network for use: the published weights, laid out for speed, over a whole window or a stream of chunks.

``Network`` -- encoder (samples to latents), decoder (latents to samples) and the residual quantizer between them
``Memory``  -- what the causal encoder or decoder carries from one chunk of a sound to the next

All signals are rows, float32 [T, C], time first. That is the channels-last layout, in which the CPU's convolutions are
quickest, and in which the transposed convolutions of this network, whose kernels are two strides long, are plain ones
of two taps and ``stride`` times the channels: the longer signal is the same memory read as more rows.

The causal (24 kHz) network in chunks gives what it gives at once, but for rounding, if each chunk is a whole number of
frames but the last one, and the first one has at least ``LEAD`` frames or is the whole sound: the padding on the left
is a reflection of what follows, which reaches so far in the last convolution.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from encodec.modules.conv import SConv1d, SConvTranspose1d
from encodec.modules.lstm import SLSTM
from encodec.modules.seanet import SEANetResnetBlock
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.nearest import nearest

HOP = 320
# Frames that the first chunk of a causal network must have: the kernel of its convolution over frames.
LEAD = 7
# The encoder's first and the decoder's last so many layers have the most rows: a long sound goes through them
# in pieces of so many frames, which stay in a processor's cache. The others have large weights: more rows are better.
HIGH_RATE, CACHED = 10, 38

# Of a convolution the rows before the next one, of the LSTM its state; empty before the sound begins.
Memory: TypeAlias = dict[nn.Module, Any]


class Convolution(nn.Module):
    """A convolution with the padding, and at 48 kHz the norm over the whole window, that EnCodec gives it."""

    weight: Tensor
    bias: Tensor

    def __init__(self, source: Any) -> None:
        super().__init__()
        conv, norm = source.conv.conv, source.conv.norm
        self.kernel: int = conv.kernel_size[0]
        self.stride: int = conv.stride[0]
        self.weight = _frozen(conv.weight[:, :, None].contiguous(memory_format=torch.channels_last))
        self.bias = _frozen(conv.bias)
        self.norm = norm if isinstance(norm, nn.GroupNorm) else None

    def forward(self, x: Tensor, memory: Memory | None = None, activated: bool = False) -> Tensor:
        """[T, C] -> [ceil(T / stride), C']; without a memory x is a whole window and the padding is on both sides.

        ``activated``: of ELU of x, which is taken of the padded copy, in place; for kernels that need padding.
        """
        padding, extra = self.kernel - self.stride, -len(x) % self.stride
        if memory is None:
            right = padding // 2
            x = _reflect(x, padding - right, right + extra)
        elif padding:
            before = memory.get(self)
            if before is None:
                x = _reflect(x, padding, extra)
            else:
                x = torch.cat([before, x])
                x = _reflect(x, 0, extra) if extra else x
            memory[self] = x[len(x) - padding :].clone()
        x = F.elu_(x) if activated else x
        return _normed(_convolve(x, self.weight, self.bias, self.stride), self.norm)


class Upsampling(nn.Module):
    """A transposed convolution with a kernel of two strides, as a convolution of two taps."""

    weight: Tensor
    bias: Tensor

    def __init__(self, source: Any) -> None:
        super().__init__()
        conv, norm = source.convtr.convtr, source.convtr.norm
        self.stride: int = conv.stride[0]
        self.channels: int = conv.out_channels
        # [C, C', 2 * stride]: the first half of the kernel is for the row itself, the second for the row before it.
        taps = conv.weight.unflatten(2, (2, self.stride)).flip(2).permute(3, 1, 0, 2).flatten(0, 1)
        self.weight = _frozen(taps[:, :, None].contiguous(memory_format=torch.channels_last))
        self.bias = _frozen(conv.bias.repeat(self.stride))
        self.norm = norm if isinstance(norm, nn.GroupNorm) else None

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """[T, C] -> [T * stride, C']."""
        silence = x.new_zeros(1, x.shape[1])
        before = silence if memory is None else memory.get(self, silence)
        x = torch.cat([before, x] if memory is not None else [before, x, silence])
        y = _convolve(x, self.weight, self.bias, 1).reshape(-1, self.channels)
        if memory is not None:
            memory[self] = x[-1:].clone()
            return y
        y = _normed(y, self.norm)
        right = self.stride // 2
        return y[self.stride - right : len(y) - right]


class Residual(nn.Module):
    """Activation and convolution twice, added to a convolution of the input."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.first, self.second = Convolution(source.block[1]), Convolution(source.block[3])
        self.shortcut = Convolution(source.shortcut)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        y = self.second(F.elu_(self.first(x, memory, activated=True)), memory)
        return y.add_(self.shortcut(x, memory))


class Recurrence(nn.Module):
    """The LSTM, added to its input."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.lstm = source.lstm

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        state = None if memory is None else memory.get(self)
        y, state = self.lstm(x, state)
        if memory is not None:
            memory[self] = state
        return y.add_(x)


class Activation(nn.Module):
    """ELU in place: nothing else reads the rows before it."""

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        return F.elu_(x)


class Network(nn.Module):
    """Encoder, quantizer and decoder.

    Args:
        source: the package's model, with weights, without weight norm; its LSTMs and norms become this network's.
    """

    books: Tensor

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(_own(layer) for layer in source.encoder.model)
        self.decoder = nn.ModuleList(_own(layer) for layer in source.decoder.model)
        self.register_buffer("books", torch.stack([layer.codebook for layer in source.quantizer.vq.layers]))
        self.eval().requires_grad_(False)

    def latents(self, samples: Tensor, memory: Memory | None = None) -> Tensor:
        """float32 [T, channels] -> [ceil(T / HOP), 128]; without a memory of a whole window (48 kHz)."""
        pieces = [samples] if memory is None else samples.split(CACHED * HOP)
        x = torch.cat([_run(self.encoder[:HIGH_RATE], piece, memory) for piece in pieces])
        return _run(self.encoder[HIGH_RATE:], x, memory)

    def samples(self, latents: Tensor, memory: Memory | None = None) -> Tensor:
        """float32 [F, 128] -> [F * HOP, channels]."""
        x = _run(self.decoder[:-HIGH_RATE], latents, memory)
        pieces = [x] if memory is None else x.split(len(x) // len(latents) * CACHED)
        return torch.cat([_run(self.decoder[-HIGH_RATE:], piece, memory) for piece in pieces])

    def quantize(self, latents: Tensor, levels: int) -> Tensor:
        """float32 [F, 128] -> int64 [levels, F]: the nearest entry, then that of what is left, and so on."""
        codes, rest = [], latents
        for book in self.books[:levels]:
            codes.append(nearest(rest, book))
            rest = rest - book[codes[-1]]
        return torch.stack(codes)

    def restore(self, codes: Tensor) -> Tensor:
        """int64 [L, F] -> float32 [F, 128], the sum of the entries."""
        total = self.books[0][codes[0]]
        for book, level in zip(self.books[1:], codes[1:], strict=False):
            total += book[level]
        return total


def _run(layers: Iterable[nn.Module], x: Tensor, memory: Memory | None) -> Tensor:
    for layer in layers:
        x = layer(x, memory)
    return x


def _own(layer: nn.Module) -> nn.Module:
    match layer:
        case SConv1d():
            return Convolution(layer)
        case SConvTranspose1d():
            return Upsampling(layer)
        case SEANetResnetBlock():
            return Residual(layer)
        case SLSTM():
            return Recurrence(layer)
        case _:
            return Activation()


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach(), requires_grad=False)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """[T, C] -> [T', C'] without padding."""
    if weight.shape[-1] == 1:
        return F.linear(x, weight[:, :, 0, 0], bias)
    y = F.conv2d(x.T[None, :, None], weight, bias, (1, stride))
    return y[0, :, 0].T.contiguous()


def _normed(x: Tensor, norm: nn.GroupNorm | None) -> Tensor:
    """A norm over all rows and channels, of which the time-first layout has a quick one in torch."""
    if norm is None:
        return x
    return torch.addcmul(norm.bias, F.layer_norm(x, x.shape, eps=norm.eps), norm.weight)


def _reflect(x: Tensor, left: int, right: int) -> Tensor:
    """Rows reflected about the first and the last one; where there are too few, zeros follow the last one first."""
    if not left and not right:
        return x
    short = max(0, max(left, right) + 1 - len(x))
    if short:
        x = torch.cat([x, x.new_zeros(short, x.shape[1])])
    x = torch.cat([x[1 : left + 1].flip(0), x, x[len(x) - 1 - right : len(x) - 1].flip(0)])
    return x[: len(x) - short]

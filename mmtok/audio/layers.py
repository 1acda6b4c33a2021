"""Layers over frames that run over a whole sound or, with the same outputs, over a stream of pieces.

``Windowed``       -- base: a layer that looks at a window of frames; ``valid`` is its computation without padding
``FrameConv``      -- a convolution
``ConvNeXtBlock``  -- a residual block (https://arxiv.org/abs/2201.03545, in one dimension)
``Stream``         -- runs a chain of them over pieces, keeping of each layer what the next piece needs
``OverlapAdd``     -- windows to samples, over pieces
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Windowed(nn.Module, ABC):
    """A layer [B, C, n] -> [B, out, n] whose output i depends on a window of inputs around i, or up to i if causal.

    Args:
        window: inputs that an output depends on.
        causal: the window ends at its output; else the output is in its middle.
        out: channels of the output.
    """

    def __init__(self, window: int, causal: bool, out: int) -> None:
        super().__init__()
        self.after = 0 if causal else (window - 1) // 2
        self.before = window - 1 - self.after
        self.out = out

    @abstractmethod
    def valid(self, x: Tensor) -> Tensor:
        """[B, C, before + n + after] -> [B, out, n]."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, n] -> [B, out, n], with zeros around."""
        return self.run(F.pad(x, (self.before, self.after)))

    def run(self, x: Tensor) -> Tensor:
        """As ``valid``; of fewer inputs than a window no outputs."""
        context = self.before + self.after
        return self.valid(x) if x.shape[-1] > context else x.new_zeros(len(x), self.out, 0)


class FrameConv(Windowed):
    """A convolution over frames."""

    def __init__(self, channels: int, out: int, kernel: int, causal: bool) -> None:
        super().__init__(kernel, causal, out)
        self.conv = nn.Conv1d(channels, out, kernel)

    def valid(self, x: Tensor) -> Tensor:
        """As ``Windowed.valid``."""
        return self.conv(x)


class ConvNeXtBlock(Windowed):
    """Depthwise convolution over 7 frames, layer norm, pointwise MLP, added to its input."""

    def __init__(self, dim: int, scale: float, causal: bool) -> None:
        super().__init__(7, causal, dim)
        self.depthwise = nn.Conv1d(dim, dim, 7, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 3 * dim)
        self.shrink = nn.Linear(3 * dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), scale))

    def valid(self, x: Tensor) -> Tensor:
        """As ``Windowed.valid``."""
        h = self.norm(self.depthwise(x).transpose(1, 2))
        h = self.scale * self.shrink(F.gelu(self.expand(h)))
        return x[..., self.before : x.shape[-1] - self.after] + h.transpose(1, 2)


class Stream:
    """A chain of layers over pieces of frames: outputs come as soon as all that they depend on is there.

    Args:
        layers: run one after the other.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers = [layer for layer in layers if isinstance(layer, Windowed)]
        self.kept: list[Tensor | None] = [None] * len(self.layers)

    @property
    def delay(self) -> int:
        """How many frames after an input its output comes."""
        return sum(layer.after for layer in self.layers)

    def push(self, x: Tensor, last: bool = False) -> Tensor:
        """The next frames [B, C, n], any n -> outputs [B, out, m] that are certain now; all that are left if last."""
        for i, layer in enumerate(self.layers):
            kept = self.kept[i]
            x = F.pad(x, (layer.before, 0)) if kept is None else torch.cat([kept, x], -1)
            if last:
                x = F.pad(x, (0, layer.after))
            self.kept[i] = x[..., max(0, x.shape[-1] - layer.before - layer.after) :]
            x = layer.run(x)
        return x


class OverlapAdd:
    """Adds up windows of samples a hop apart and divides by the sum of their squared weights, piece by piece.

    The first ``trim`` samples are left out: with (width - hop) / 2 a frame is the middle of its window, with 0 its
    beginning, and no sample then depends on a later frame.

    Args:
        weight: float [width], what the windows were weighted with.
        hop: samples between windows, at most ``width``.
        trim: samples.
        least: sums of squared weights below this count as this.
    """

    def __init__(self, weight: Tensor, hop: int, trim: int, least: float) -> None:
        self.square, self.hop, self.left, self.least = weight.square(), hop, trim, least
        self.tail: Tensor | None = None
        self.weights = weight.new_zeros(len(weight) - hop)
        self.owed = 0

    def push(self, windows: Tensor, last: bool = False) -> Tensor:
        """Windows [B, n, width], already weighted -> samples [B, m]; in all n * hop of them once the last came."""
        rows, count, width = windows.shape
        self.owed += count * self.hop
        total = count * self.hop + width - self.hop
        out, weights = windows.new_zeros(rows, total), self.square.new_zeros(total)
        if count:
            out = _fold(windows, self.hop)
            weights = _fold(self.square.expand(1, count, width), self.hop)[0]
        out[:, : width - self.hop] += 0 if self.tail is None else self.tail
        weights[: width - self.hop] += self.weights
        sure = total if last else count * self.hop
        self.tail, self.weights = out[:, sure:], weights[sure:]
        first = min(self.left, sure)
        self.left -= first
        out = (out[:, first:sure] / weights[first:sure].clamp(min=self.least))[:, : self.owed]
        self.owed -= out.shape[1]
        return out


def _fold(windows: Tensor, hop: int) -> Tensor:
    """[B, n, width] -> [B, (n - 1) * hop + width]: each window added a hop after the one before."""
    count, width = windows.shape[1:]
    return F.fold(windows.transpose(1, 2), (1, (count - 1) * hop + width), (1, width), stride=(1, hop))[:, 0, 0]

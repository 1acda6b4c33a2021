"""Tiny published files with random weights: names and shapes as the systems publish them, spelled out here.

``noise``, ``picture``, ``close``, ``write``, ``image_tokens`` -- what their tests share
``taming``, ``llamagen``, ``cosmos`` -- state dicts under the names of each system
``as_diffusers``                     -- the first two under the names of diffusers' ``VQModel``
``cosmos_modules``                   -- a plain network of Cosmos, to be traced into the two .jit files
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = 32  # group normalisation has 32 groups
State = dict[str, Tensor]


def noise(height: int, width: int) -> Tensor:
    """float32 [1, 3, H, W], -1..1."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def picture(height: int, width: int, channels: int = 3) -> Tensor:
    """uint8 [1, channels, H, W]."""
    return torch.randint(0, 256, (1, channels, height, width), generator=torch.Generator().manual_seed(9)).byte()


def close(a: Tensor, b: Tensor) -> None:
    """Equal within 1e-5."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def write(path: Path, state: Mapping[str, Tensor], wrapper: str = "state_dict") -> Path:
    """A checkpoint as trainers write it: weights under a key, beside other things."""
    torch.save({wrapper: dict(state), "global_step": 7}, path)
    return path


def image_tokens(encoded: Any) -> Any:
    """Of what ``encode`` of transformers returns: an object in version 5, a list (Emu3) or tuple (Chameleon) in 4."""
    return encoded[2] if type(encoded) is tuple else getattr(encoded, "image_tokens", encoded)


class Writer:
    """Collects random tensors by name."""

    def __init__(self, seed: int) -> None:
        self.state: State = {}
        self.random = torch.Generator().manual_seed(seed)

    def conv(self, name: str, inside: int, outside: int, kernel: int) -> None:
        scale = (inside * kernel**2) ** -0.5
        self.state[f"{name}.weight"] = (
            torch.randn(outside, inside, kernel, kernel, generator=self.random) * scale
        )  # fmt: skip
        self.state[f"{name}.bias"] = torch.randn(outside, generator=self.random) * 0.1

    def norm(self, name: str, channels: int) -> None:
        self.state[f"{name}.weight"] = 1 + torch.randn(channels, generator=self.random) * 0.2
        self.state[f"{name}.bias"] = torch.randn(channels, generator=self.random) * 0.2

    def block(self, name: str, inside: int, outside: int) -> None:
        self.norm(f"{name}.norm1", inside)
        self.conv(f"{name}.conv1", inside, outside, 3)
        self.norm(f"{name}.norm2", outside)
        self.conv(f"{name}.conv2", outside, outside, 3)
        if inside != outside:
            self.conv(f"{name}.nin_shortcut", inside, outside, 1)

    def attention(self, name: str, channels: int) -> None:
        self.norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.{part}", channels, channels, 1)

    def ends(self, latent: int, dim: int, size: int) -> None:
        self.conv("quant_conv", latent, dim, 1)
        self.conv("post_quant_conv", dim, latent, 1)
        self.state["quantize.embedding.weight"] = torch.randn(size, dim, generator=self.random) * 0.7


def taming(
    multipliers: Sequence[int] = (1, 2, 1), blocks: int = 2, attention: Sequence[int] = (2,), latent: int = 6,
    dim: int = 4, size: int = 64, seed: int = 0,
) -> State:  # fmt: skip
    """taming-transformers, and Chameleon."""
    w = Writer(seed)
    widths = [CHANNELS * m for m in multipliers]
    last = len(widths) - 1
    w.conv("encoder.conv_in", 3, CHANNELS, 3)
    inside = CHANNELS
    for i, width in enumerate(widths):
        for j in range(blocks):
            w.block(f"encoder.down.{i}.block.{j}", inside, width)
            inside = width
            if i in attention:
                w.attention(f"encoder.down.{i}.attn.{j}", width)
        if i < last:
            w.conv(f"encoder.down.{i}.downsample.conv", width, width, 3)
    w.conv("decoder.conv_in", latent, widths[-1], 3)
    for i in reversed(range(last + 1)):
        for j in range(blocks + 1):
            w.block(f"decoder.up.{i}.block.{j}", inside, widths[i])
            inside = widths[i]
            if i in attention:
                w.attention(f"decoder.up.{i}.attn.{j}", inside)
        if i > 0:
            w.conv(f"decoder.up.{i}.upsample.conv", inside, inside, 3)
    for side, end, out in (("encoder", widths[-1], latent), ("decoder", widths[0], 3)):
        w.block(f"{side}.mid.block_1", widths[-1], widths[-1])
        w.attention(f"{side}.mid.attn_1", widths[-1])
        w.block(f"{side}.mid.block_2", widths[-1], widths[-1])
        w.norm(f"{side}.norm_out", end)
        w.conv(f"{side}.conv_out", end, out, 3)
    w.ends(latent, dim, size)
    return w.state


def llamagen(multipliers: Sequence[int], blocks: int = 2, latent: int = 6, dim: int = 8, size: int = 64) -> State:
    """LlamaGen: levels of both sides in the order in which they run, attention in the coarsest, a usage counter."""
    w = Writer(1)
    widths = [CHANNELS * m for m in multipliers]
    last = len(widths) - 1
    w.conv("encoder.conv_in", 3, CHANNELS, 3)
    inside = CHANNELS
    for i, width in enumerate(widths):
        for j in range(blocks):
            w.block(f"encoder.conv_blocks.{i}.res.{j}", inside, width)
            inside = width
            if i == last:
                w.attention(f"encoder.conv_blocks.{i}.attn.{j}", width)
        if i < last:
            w.conv(f"encoder.conv_blocks.{i}.downsample.conv", width, width, 3)
    w.conv("decoder.conv_in", latent, widths[-1], 3)
    for i, width in enumerate(reversed(widths)):
        for j in range(blocks + 1):
            w.block(f"decoder.conv_blocks.{i}.res.{j}", inside, width)
            inside = width
            if i == 0:
                w.attention(f"decoder.conv_blocks.{i}.attn.{j}", width)
        if i < last:
            w.conv(f"decoder.conv_blocks.{i}.upsample.conv", width, width, 3)
    for side, end, out in (("encoder", widths[-1], latent), ("decoder", widths[0], 3)):
        w.block(f"{side}.mid.0", widths[-1], widths[-1])
        w.attention(f"{side}.mid.1", widths[-1])
        w.block(f"{side}.mid.2", widths[-1], widths[-1])
        w.norm(f"{side}.norm_out", end)
        w.conv(f"{side}.conv_out", end, out, 3)
    w.ends(latent, dim, size)
    w.state["quantize.codebook_used"] = torch.zeros(65536)
    return w.state


_TO_DIFFUSERS = (
    (r"encoder\.(?:down|conv_blocks)\.(\d+)\.", r"encoder.down_blocks.\1."),
    (r"decoder\.conv_blocks\.(\d+)\.", r"decoder.up_blocks.\1."),
    (r"\.(?:block|res)\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.(down|up)sample\.conv", r".\1samplers.0.conv"),
    (r"\.mid\.(?:block_1|0)\.", ".mid_block.resnets.0."),
    (r"\.mid\.(?:attn_1|1)\.", ".mid_block.attentions.0."),
    (r"\.mid\.(?:block_2|2)\.", ".mid_block.resnets.1."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def as_diffusers(state: Mapping[str, Tensor], levels: int) -> State:
    """The same weights for diffusers' ``VQModel``, whose attention has linear layers where these have convolutions."""
    out: State = {}
    for key, value in state.items():
        name = re.sub(r"decoder\.up\.(\d+)\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.", key)
        for pattern, replacement in _TO_DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        out[name] = value.squeeze() if "attentions" in name else value
    return out


def cosmos(halvings: int, levels: Sequence[int], latent: int = 6, blocks: int = 1) -> State:
    """Cosmos DI: pictures as wavelets of 4 x 4 pixels, three levels of which so many end in a halving, no attention."""
    w = Writer(2)
    widths = [CHANNELS, 2 * CHANNELS, CHANNELS]
    w.conv("encoder.conv_in", 48, CHANNELS, 3)
    inside = CHANNELS
    for i, width in enumerate(widths):
        for j in range(blocks):
            w.block(f"encoder.down.{i}.block.{j}", inside, width)
            inside = width
        if i < halvings:
            w.conv(f"encoder.down.{i}.downsample.conv", width, width, 3)
    w.conv("decoder.conv_in", latent, widths[-1], 3)
    for i in reversed(range(3)):
        for j in range(blocks + 1):
            w.block(f"decoder.up.{i}.block.{j}", inside, widths[i])
            inside = widths[i]
        if i >= 3 - halvings:
            w.conv(f"decoder.up.{i}.upsample.conv", inside, inside, 3)
    for side, end, out in (("encoder", widths[-1], latent), ("decoder", widths[0], 48)):
        w.block(f"{side}.mid.block_1", widths[-1], widths[-1])
        w.attention(f"{side}.mid.attn_1", widths[-1])
        w.block(f"{side}.mid.block_2", widths[-1], widths[-1])
        w.norm(f"{side}.norm_out", end)
        w.conv(f"{side}.conv_out", end, out, 3)
    w.conv("quant_conv", latent, len(levels), 1)
    w.conv("post_quant_conv", len(levels), latent, 1)
    w.state["quant_conv.weight"] *= 2  # so that all levels are reached
    return w.state


# --- Cosmos once more, plainly, as modules that torch.jit.trace can write


def index_table(levels: Sequence[int]) -> Tensor:
    """float32 [codes, dimensions]: the vector of each index, counted out; the first dimension changes fastest."""
    values = [[(k - n // 2) / (n // 2) for k in range(n)] for n in levels]
    return torch.tensor([row[::-1] for row in itertools.product(*reversed(values))])


class Tree(nn.Module):
    """Tensors as attributes of modules of modules, under their names."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in state.items():
            *path, leaf = name.split(".")
            node: nn.Module = self
            for part in path:
                if part not in dict(node.named_children()):
                    node.add_module(part, nn.Module())
                node = dict(node.named_children())[part]
            node.register_buffer(leaf, value)

    def conv(self, name: str, x: Tensor, **options: int) -> Tensor:
        p = dict(self.named_buffers())
        return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], **options)

    def norm(self, name: str, x: Tensor) -> Tensor:
        p = dict(self.named_buffers())
        groups = x.reshape(1, 32, -1)
        spread = (groups - groups.mean(2, keepdim=True)).pow(2).mean(2, keepdim=True)
        flat = ((groups - groups.mean(2, keepdim=True)) / (spread + 1e-6).sqrt()).reshape(x.shape)
        return flat * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]

    def swish(self, name: str, x: Tensor) -> Tensor:
        h = self.norm(name, x)
        return h * torch.sigmoid(h)

    def block(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", self.swish(f"{name}.norm1", x), padding=1)
        h = self.conv(f"{name}.conv2", self.swish(f"{name}.norm2", h), padding=1)
        short = f"{name}.nin_shortcut"
        return h + (self.conv(short, x) if f"{short}.weight" in dict(self.named_buffers()) else x)

    def middle(self, side: str, x: Tensor) -> Tensor:
        x = self.block(f"{side}.mid.block_1", x)
        name = f"{side}.mid.attn_1"
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2)[0] for part in "qkv")  # [C, positions]
        weights = torch.softmax(q.T @ k * CHANNELS**-0.5, 1)  # the middle is as wide as the first level
        x = x + self.conv(f"{name}.proj_out", (v @ weights.T).reshape(x.shape))
        return self.block(f"{side}.mid.block_2", x)


class CosmosEncoder(Tree):
    """float32 [1, 3, H, W] -> (int32 indices [1, h, w], their vectors, 0), as the published encoder.jit returns."""

    def __init__(self, state: Mapping[str, Tensor], halvings: int, levels: Sequence[int], shift: int = 0) -> None:
        super().__init__({
            **{k: v for k, v in state.items() if k.startswith(("encoder.", "quant_conv."))},
            "encoder.patcher.wavelets": torch.full((2,), 0.5**0.5),
            "encoder.patcher._arange": torch.arange(2),
            "quantizer._levels": torch.tensor(levels, dtype=torch.int32),
            "quantizer._basis": torch.tensor([math.prod(levels[:i]) for i in range(len(levels))], dtype=torch.int32),
            "quantizer.implicit_codebook": index_table(levels).roll(shift, 0),
        })  # fmt: skip
        self.halvings, self.levels = halvings, tuple(levels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for _ in range(2):
            a, b, c, d = (x[..., i::2, j::2] / 4 for i in (0, 1) for j in (0, 1))
            x = torch.cat([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d], 1)
        x = self.conv("encoder.conv_in", x, padding=1)
        for i in range(3):
            x = self.block(f"encoder.down.{i}.block.0", x)
            if i < self.halvings:
                x = torch.cat([x, torch.zeros_like(x[..., :1])], 3)
                x = torch.cat([x, torch.zeros_like(x[..., :1, :])], 2)
                x = self.conv(f"encoder.down.{i}.downsample.conv", x, stride=2)
        x = self.conv("encoder.conv_out", self.swish("encoder.norm_out", self.middle("encoder", x)), padding=1)
        z = self.conv("quant_conv", x)
        index, vectors = torch.zeros_like(z[:, 0]), []
        for i, n in enumerate(self.levels):
            reach = (n - 1) * 1.001 / 2
            middle = 0.5 if n % 2 == 0 else 0.0
            rounded = ((z[:, i] + math.atanh(middle / reach)).tanh() * reach - middle).round()
            index = index + (rounded + n // 2) * math.prod(self.levels[:i])
            vectors.append(rounded / (n // 2))
        return index.to(torch.int32), torch.stack(vectors, 1), torch.zeros(1)


class CosmosDecoder(Tree):
    """int32 indices [1, h, w] -> float32 [1, 3, H, W]."""

    def __init__(self, state: Mapping[str, Tensor], halvings: int, levels: Sequence[int], shift: int = 0) -> None:
        super().__init__({
            **{k: v for k, v in state.items() if k.startswith(("decoder.", "post_quant_conv."))},
            "decoder.unpatcher.wavelets": torch.full((2,), 0.5**0.5),
            "inv_quant.quantizer._levels": torch.tensor(levels, dtype=torch.int32),
            "inv_quant.quantizer.implicit_codebook": index_table(levels).roll(shift, 0),
        })  # fmt: skip
        self.halvings = halvings

    def forward(self, indices: Tensor) -> Tensor:
        table = dict(self.named_buffers())["inv_quant.quantizer.implicit_codebook"]
        z = self.conv("post_quant_conv", table[indices.long()].permute(0, 3, 1, 2))
        x = self.middle("decoder", self.conv("decoder.conv_in", z, padding=1))
        for i in (2, 1, 0):
            for j in (0, 1):
                x = self.block(f"decoder.up.{i}.block.{j}", x)
            if i >= 3 - self.halvings:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self.conv(f"decoder.up.{i}.upsample.conv", x, padding=1)
        x = self.conv("decoder.conv_out", self.swish("decoder.norm_out", x), padding=1)
        for _ in range(2):
            mean, rows, columns, both = x.chunk(4, 1)
            top = torch.stack([mean + rows + columns + both, mean + rows - columns - both], 4)
            bottom = torch.stack([mean - rows + columns - both, mean - rows - columns + both], 4)
            x = torch.stack([top.flatten(3), bottom.flatten(3)], 3).flatten(2, 3)
        return x

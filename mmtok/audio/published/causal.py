"""Parts of a causal network run over a sound piece by piece, with the outputs of the whole sound.

``Carry``      -- what a stream keeps between pieces
``run``        -- convolutions, residual blocks and activations, as in transformers' ``MimiEncoder`` and ``MimiDecoder``
``transform``  -- transformer layers with a sliding window, as in its ``MimiTransformerModel``

A convolution needs the last inputs of the piece before (https://arxiv.org/abs/2005.06720), a transposed convolution
what its last outputs add to the next ones, attention the keys and values of its window. transformers carries the first
and the last in its encoder, but the last alone in its decoder, which so breaks off at every border of two pieces.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Carry:
    """The state of one stream through one network.

    Attributes:
        kept: of each layer that needs it, what it must know of the pieces before.
        position: how many steps the transformer has seen.
    """

    def __init__(self) -> None:
        self.kept: dict[nn.Module, Tensor] = {}
        self.position = 0


def run(carry: Carry, layers: Iterable[Any], x: Tensor) -> Tensor:
    """The next piece through layers.

    Args:
        carry: of this stream; it is updated.
        layers: activations, convolutions (with ``conv`` and ``pad_mode``), residual blocks (``block``, ``shortcut``).
        x: float [B, C, n], n at least 1 and a multiple of the product of the strides.
    """
    for layer in layers:
        if hasattr(layer, "shortcut"):
            x = run(carry, [layer.shortcut], x) + run(carry, layer.block, x)
        elif isinstance(getattr(layer, "conv", None), nn.Conv1d):
            x = _convolve(carry, layer, x)
        elif isinstance(getattr(layer, "conv", None), nn.ConvTranspose1d):
            x = _upsample(carry, layer, x)
        else:
            x = layer(x)
    return x


def transform(carry: Carry, layers: Iterable[Any], x: Tensor, window: int, theta: float) -> Tensor:
    """The next steps through transformer layers with rotary positions (https://arxiv.org/abs/2104.09864).

    Args:
        carry: of this stream; it is updated.
        layers: in order.
        x: float [B, n, C], n at least 1.
        window: steps that a step sees, itself included.
        theta: base of the rotary frequencies.
    """
    steps, past = x.shape[1], min(carry.position, window - 1)
    ago = torch.arange(past, past + steps, device=x.device)[:, None] - torch.arange(past + steps, device=x.device)
    mask = (ago >= 0) & (ago < window)
    for layer in layers:
        attention = layer.self_attn
        h = layer.input_layernorm(x)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (p(h).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in projections)
        q, k = _rotate(q, carry.position, theta), _rotate(k, carry.position, theta)
        keys = torch.stack([k, v])
        if past:
            keys = torch.cat([carry.kept[layer], keys], -2)
        carry.kept[layer] = keys[..., max(0, keys.shape[-2] - window + 1) :, :].clone()
        h = F.scaled_dot_product_attention(
            q, keys[0], keys[1], attn_mask=mask, scale=attention.scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        x = x + layer.self_attn_layer_scale(attention.o_proj(h.transpose(1, 2).flatten(2)))
        x = x + layer.mlp_layer_scale(layer.mlp(layer.post_attention_layernorm(x)))
    carry.position += steps
    return x


def _convolve(carry: Carry, layer: Any, x: Tensor) -> Tensor:
    conv = layer.conv
    context = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1 - conv.stride[0]
    before = carry.kept.get(layer)
    if before is None:  # the beginning of the sound
        before = x[..., :1].expand(-1, -1, context)
        before = before if layer.pad_mode == "replicate" else torch.zeros_like(before)
    x = torch.cat([before, x], -1)
    carry.kept[layer] = x[..., x.shape[-1] - context :].clone()
    return conv(x)


def _upsample(carry: Carry, layer: Any, x: Tensor) -> Tensor:
    conv = layer.conv
    made = x.shape[-1] * conv.stride[0]
    y = F.conv_transpose1d(x, conv.weight, None, conv.stride, groups=conv.groups)
    before = carry.kept.get(layer)
    if before is not None:
        y[..., : before.shape[-1]] += before
    carry.kept[layer] = y[..., made:].clone()
    y = y[..., :made]
    return y if conv.bias is None else y + conv.bias[:, None]


def _rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """float [B, heads, n, d] -> the same, turned by the angles of the steps from ``position`` on."""
    steps, dim = x.shape[-2:]
    rates = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float, device=x.device) / dim)
    angles = torch.arange(position, position + steps, device=x.device)[:, None] * rates
    angles = torch.cat([angles, angles], -1)
    low, high = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-high, low], -1) * angles.sin()

"""The transformer laid out for generation: joined projections, any precision, a cache, nothing else.

At batch 1 a small model on a CPU is bound by reading its weights and by the overhead of each operation. ``Decoder``
copies the weights once, with queries, keys and values in one matrix and gate and up in another, and can read half the
bytes (bfloat16) or a quarter (int8, a scale per output). Tests hold it to ``Transformer``, its plain twin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.errors import ConfigError, VocabularyMismatchError
from mmtok.registry import VocabularyRegistry
from mmtok.transformer.cache import KVCache
from mmtok.transformer.model import Layer, Transformer

FEW = 4  # up to so many rows the int8 kernel is faster than widening the matrix to bfloat16


@dataclass(frozen=True)
class Matrix:
    """A weight matrix, maybe as int8 with a bfloat16 scale per output."""

    weight: Tensor  # [N, K]
    scale: Tensor | None  # [N]

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype) -> Matrix:
        """Convert; int8 rounds to 127 steps of the largest magnitude of each row."""
        weight = weight.detach()
        if dtype != torch.int8:
            return cls(weight.to(dtype), None)
        if weight.shape[1] % 32:  # the kernel reads beyond the end of such rows
            raise ConfigError(f"int8 needs sizes that are multiples of 32, got {weight.shape[1]}; use torch.bfloat16")
        scale = weight.float().abs().amax(1).clamp(min=1e-8) / 127
        return cls((weight.float() / scale[:, None]).round().to(torch.int8), scale.bfloat16())

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        weight, scale = self.weight, self.scale
        if scale is None:
            return F.linear(x, weight)
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > FEW or x.device.type != "cpu":
            return F.linear(x, weight.to(x.dtype)) * scale
        return torch._weight_int8pack_mm(rows, weight, scale).view(*x.shape[:-1], -1)

    def outputs(self, rows: slice) -> Matrix:
        """Some of the outputs only."""
        return Matrix(self.weight[rows], None if self.scale is None else self.scale[rows])


class Weights(NamedTuple):
    """Of one block."""

    norm: Tensor  # [C]
    qkv: Matrix  # [(H + 2 * H_kv) * D, C]
    qk_norm: Tensor  # [H + H_kv, D]
    out: Matrix  # [C, H * D]
    mlp_norm: Tensor  # [C]
    gate_up: Matrix  # [2 * M, C]
    down: Matrix  # [C, M]


class Decoder:
    """A read-only copy of a transformer's weights that runs only with a cache.

    Attributes:
        config: the transformer's.
        registry: the transformer's, None if it was not loaded from a checkpoint.
        body_bytes: of the weights that every step reads: all but embedding and output projection.
        itemsize: bytes of one weight.
    """

    def __init__(self, model: Transformer, dtype: torch.dtype = torch.float32) -> None:
        """Copy the weights of ``model``, on the device that it is on.

        Args:
            model: the transformer.
            dtype: of the matrices: torch.float32; torch.bfloat16; or torch.int8, fastest for up to 4 rows on a CPU,
                with all else in bfloat16.

        Raises:
            ConfigError: int8 for sizes that are not multiples of 32.
        """
        compute = torch.bfloat16 if dtype == torch.int8 else dtype
        self.config = model.config
        self.registry = model.registry
        self._heads, self._shared = model.config.num_attention_heads, model.config.num_key_value_heads
        self._embedding = model.model.embed_tokens.weight.detach().to(compute)
        self._head = Matrix.of(model.head_weight, dtype)
        self._norm = model.model.norm.weight.detach().to(compute)
        self._layers = [self._join(layer, dtype, compute) for layer in model.model.layers if isinstance(layer, Layer)]
        half = model.config.head_dim // 2
        self._cos = model.cos.to(compute)  # [P, D]
        self._sin = torch.cat((-model.sin[:, :half], model.sin[:, half:]), -1).to(compute)
        self.body_bytes = sum(w.weight.nbytes for layer in self._layers for w in layer if isinstance(w, Matrix))
        self.itemsize = dtype.itemsize

    def _join(self, layer: Layer, dtype: torch.dtype, compute: torch.dtype) -> Weights:
        a, m = layer.self_attn, layer.mlp
        norms = torch.cat((a.q_norm.weight.expand(self._heads, -1), a.k_norm.weight.expand(self._shared, -1)))
        return Weights(
            layer.input_layernorm.weight.detach().to(compute),
            Matrix.of(torch.cat((a.q_proj.weight, a.k_proj.weight, a.v_proj.weight)), dtype),
            norms.detach().to(compute),
            Matrix.of(a.o_proj.weight, dtype),
            layer.post_attention_layernorm.weight.detach().to(compute),
            Matrix.of(torch.cat((m.gate_proj.weight, m.up_proj.weight)), dtype),
            Matrix.of(m.down_proj.weight, dtype),
        )

    def check_vocabulary(self, registry: VocabularyRegistry) -> None:
        """Raise unless the ids of ``registry`` are the ones that this transformer knows.

        Raises:
            VocabularyMismatchError: another fingerprint, or another size where the weights carry no registry.
        """
        if self.registry is not None:
            registry.check_same(self.registry, "the transformer")
        elif registry.padded_size != self.config.vocab_size:
            raise VocabularyMismatchError(
                f"the transformer has vocab_size {self.config.vocab_size}, the registry has {registry.padded_size} ids "
                "(padded); use the registry that it was trained with"
            )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._embedding.device

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for ``batch`` rows of up to ``capacity`` ids.

        Raises:
            ConfigError: the capacity is more than max_position_embeddings.
        """
        c = self.config
        if capacity > c.max_position_embeddings:
            raise ConfigError(
                f"prompt and answer need {capacity} positions, this transformer has {c.max_position_embeddings}; "
                "shorten the prompt or lower max_new_tokens"
            )
        heads, dim, dtype = c.num_key_value_heads, c.head_dim, self._embedding.dtype
        return KVCache(c.num_hidden_layers, batch, heads, capacity, dim, self.device, dtype)

    def hidden(self, ids: Tensor, cache: KVCache) -> Tensor:
        """int64 [B, T] -> the normalised output of the last block [B, T, C]; the cache grows by T."""
        c = self.config
        b, t = ids.shape
        n, d, eps = self._heads + self._shared, c.head_dim, c.rms_norm_eps
        positions, mask = cache.begin(t)
        cos, sin = self._cos[positions][..., None, :], self._sin[positions][..., None, :]  # (T, 1, D) or (B, T, 1, D)
        shared = self._heads != self._shared
        x = self._embedding[ids]
        for i, w in enumerate(self._layers):
            qkv = w.qkv(F.rms_norm(x, (c.hidden_size,), w.norm, eps)).view(b, t, -1, d)
            qk = F.rms_norm(qkv[:, :, :n], (d,), None, eps) * w.qk_norm
            qk = torch.addcmul(qk * cos, qk.roll(d // 2, -1), sin).transpose(1, 2)
            k, v = cache.append(i, qk[:, self._heads :], qkv[:, :, n:].transpose(1, 2))
            y = F.scaled_dot_product_attention(qk[:, : self._heads], k, v, mask, enable_gqa=shared)
            x = x + w.out(y.transpose(1, 2).reshape(b, t, -1))
            gate, up = w.gate_up(F.rms_norm(x, (c.hidden_size,), w.mlp_norm, eps)).chunk(2, -1)
            x = x + w.down(F.silu(gate) * up)
        cache.advance(t)
        return F.rms_norm(x, (c.hidden_size,), self._norm, eps)

    def logits(self, hidden: Tensor, columns: slice = slice(None)) -> Tensor:
        """[..., C] -> [..., n]: scores of the ids in ``columns``."""
        return self._head.outputs(columns)(hidden)

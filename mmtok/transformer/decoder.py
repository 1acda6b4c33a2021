"""The transformer laid out for generation: joined projections, any precision, a cache, nothing else.

At batch 1 a small model on a CPU is bound by reading its weights and by the overhead of each operation. ``Decoder``
copies the weights once, with queries, keys and values in one matrix and gate and up in another, and can halve the
bytes with bfloat16. Tests hold it to ``Transformer``, its plain twin.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.errors import ConfigError, VocabularyMismatchError
from mmtok.registry import VocabularyRegistry
from mmtok.transformer.cache import KVCache
from mmtok.transformer.model import Layer, Transformer


class Weights(NamedTuple):
    """Of one block."""

    norm: Tensor  # [C]
    qkv: Tensor  # [(H + 2 * H_kv) * D, C]
    qk_norm: Tensor  # [H + H_kv, D]
    out: Tensor  # [C, H * D]
    mlp_norm: Tensor  # [C]
    gate_up: Tensor  # [2 * M, C]
    down: Tensor  # [C, M]


class Decoder:
    """A read-only copy of a transformer's weights that runs only with a cache.

    Attributes:
        config: the transformer's.
        registry: the transformer's, None if it was not loaded from a checkpoint.
        body_bytes: of the weights that every step reads: all but embedding and output projection.
        itemsize: bytes of one weight.
    """

    def __init__(self, model: Transformer, dtype: torch.dtype = torch.float32) -> None:
        """Copy the weights of ``model``, to the device that it is on, as ``dtype``."""
        self.config = model.config
        self.registry = model.registry
        self._heads, self._shared = model.config.num_attention_heads, model.config.num_key_value_heads
        self._embedding = model.model.embed_tokens.weight.detach().to(dtype)
        self._head = self._embedding if model.lm_head is None else model.lm_head.weight.detach().to(dtype)
        self._norm = model.model.norm.weight.detach().to(dtype)
        self._layers = [self._join(layer, dtype) for layer in model.model.layers if isinstance(layer, Layer)]
        half = model.config.head_dim // 2
        self._cos = model.cos.to(dtype)  # [P, D]
        self._sin = torch.cat((-model.sin[:, :half], model.sin[:, half:]), -1).to(dtype)
        self.body_bytes = sum(w.nbytes for layer in self._layers for w in layer)
        self.itemsize = dtype.itemsize

    def _join(self, layer: Layer, dtype: torch.dtype) -> Weights:
        a, m = layer.self_attn, layer.mlp
        joined = Weights(
            layer.input_layernorm.weight,
            torch.cat((a.q_proj.weight, a.k_proj.weight, a.v_proj.weight)),
            torch.cat((a.q_norm.weight.expand(self._heads, -1), a.k_norm.weight.expand(self._shared, -1))),
            a.o_proj.weight,
            layer.post_attention_layernorm.weight,
            torch.cat((m.gate_proj.weight, m.up_proj.weight)),
            m.down_proj.weight,
        )
        return Weights(*(w.detach().to(dtype) for w in joined))

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
        return self._head.device

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
        heads, dim, dtype = c.num_key_value_heads, c.head_dim, self._head.dtype
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
            qkv = F.linear(F.rms_norm(x, (c.hidden_size,), w.norm, eps), w.qkv).view(b, t, -1, d)
            qk = F.rms_norm(qkv[:, :, :n], (d,), None, eps) * w.qk_norm
            qk = torch.addcmul(qk * cos, qk.roll(d // 2, -1), sin).transpose(1, 2)
            k, v = cache.append(i, qk[:, self._heads :], qkv[:, :, n:].transpose(1, 2))
            y = F.scaled_dot_product_attention(qk[:, : self._heads], k, v, mask, enable_gqa=shared)
            x = x + F.linear(y.transpose(1, 2).reshape(b, t, -1), w.out)
            gate, up = F.linear(F.rms_norm(x, (c.hidden_size,), w.mlp_norm, eps), w.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, w.down)
        cache.advance(t)
        return F.rms_norm(x, (c.hidden_size,), self._norm, eps)

    def logits(self, hidden: Tensor, columns: slice = slice(None)) -> Tensor:
        """[..., C] -> [..., n]: scores of the ids in ``columns``."""
        return F.linear(hidden, self._head[columns])

"""The transformer laid out for generation: joined projections, any precision, a cache, nothing else.

At batch 1 a small model on a CPU is bound by reading its weights and by the overhead of each operation. ``Decoder``
copies the weights once, with queries, keys and values in one matrix and gate and up in another, and can read half the
bytes (bfloat16) or a quarter (int8, a scale per output). On a CPU all but the products with weights is float32, which
its attention runs faster in than in bfloat16. Tests hold it to ``Transformer``, its plain twin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.errors import ConfigError, VocabularyMismatchError
from mmtok.registry import VocabularyRegistry
from mmtok.transformer.cache import KVCache
from mmtok.transformer.matrix import FEW, Matrix, itemsize
from mmtok.transformer.model import Layer, Transformer

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, queries, new keys and values -> what they see


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
    """

    def __init__(self, model: Transformer, dtype: torch.dtype = torch.float32, compile: bool = False) -> None:
        """Copy the weights of ``model``, on the device that it is on.

        Args:
            model: the transformer.
            dtype: of the matrices: torch.float32; torch.bfloat16; or torch.int8, fastest for up to 3 rows on a CPU.
            compile: run steps of up to 3 rows through torch.compile. The first takes up to a minute, for each number
                of rows.

        Raises:
            ConfigError: int8 for sizes that are not multiples of 32.
        """
        small = torch.bfloat16 if dtype == torch.int8 else dtype
        self.config = model.config
        self.registry = model.registry
        self._dtype = dtype
        self._compile = compile
        self._compiled = torch.compile(self._step) if compile else self._step
        self._heads, self._shared = model.config.num_attention_heads, model.config.num_key_value_heads
        self._embedding = model.model.embed_tokens.weight.detach().to(small)
        self._active = torch.float32 if self.device.type == "cpu" else small  # of what is no matrix
        self._head = model.head_weight.detach()
        self._parts: dict[tuple[int, int], Matrix] = {}  # of the head
        self._norm = model.model.norm.weight.detach().to(self._active)
        self._layers = [self._join(layer) for layer in model.model.layers if isinstance(layer, Layer)]
        self._body = sum(w.shape.numel() for layer in self._layers for w in layer if isinstance(w, Matrix))
        self.body_bytes = self._body * dtype.itemsize
        half = model.config.head_dim // 2
        self._cos = model.cos.to(self._active)  # [P, D]
        self._sin = torch.cat((-model.sin[:, :half], model.sin[:, half:]), -1).to(self._active)

    def _join(self, layer: Layer) -> Weights:
        a, m, dtype, active = layer.self_attn, layer.mlp, self._dtype, self._active
        norms = torch.cat((a.q_norm.weight.expand(self._heads, -1), a.k_norm.weight.expand(self._shared, -1)))
        return Weights(
            layer.input_layernorm.weight.detach().to(active),
            Matrix(torch.cat((a.q_proj.weight, a.k_proj.weight, a.v_proj.weight)), dtype),
            norms.detach().to(active),
            Matrix(a.o_proj.weight, dtype),
            layer.post_attention_layernorm.weight.detach().to(active),
            Matrix(torch.cat((m.gate_proj.weight, m.up_proj.weight)), dtype),
            Matrix(m.down_proj.weight, dtype),
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

    def check_capacity(self, capacity: int) -> None:
        """Raise ConfigError for a cache of more slots than max_position_embeddings."""
        limit = self.config.max_position_embeddings
        if capacity > limit:
            raise ConfigError(
                f"prompt and answer need {capacity} positions, this transformer has {limit}; "
                "shorten the prompt or lower max_new_tokens"
            )

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for ``batch`` rows of up to ``capacity`` ids.

        Raises:
            ConfigError: the capacity is more than max_position_embeddings.
        """
        self.check_capacity(capacity)
        c = self.config
        heads, dim = c.num_key_value_heads, c.head_dim
        return KVCache(c.num_hidden_layers, batch, heads, capacity, dim, self.device, self._active)

    def hidden(self, ids: Tensor, cache: KVCache) -> Tensor:
        """int64 [B, T] -> the normalised output of the last block [B, T, C]; the cache grows by T."""
        b, t = ids.shape
        if self._compile and t == 1 and b <= FEW and max(cache.lengths) > 1:
            y = self._step_compiled(ids, cache)
        else:
            positions, mask = cache.begin(t)
            # (T, 1, D) or (B, T, 1, D)
            y = self._blocks(
                self._embed(ids),
                self._cos[positions][..., None, :],
                self._sin[positions][..., None, :],
                lambda i, q, k, v: self._attend(q, *cache.append(i, k, v), mask),
            )
        cache.advance(t)
        return y

    def _embed(self, ids: Tensor) -> Tensor:
        return self._embedding[ids].to(self._active)

    def _blocks(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """The blocks and the last norm: [B, T, C] -> [B, T, C]."""
        c = self.config
        b, t, width = x.shape
        n, d, eps = self._heads + self._shared, c.head_dim, c.rms_norm_eps
        x = x.reshape(-1, width)  # (B * T, C)
        for i, w in enumerate(self._layers):
            qkv = w.qkv(F.rms_norm(x, (width,), w.norm, eps)).view(b, t, -1, d)
            qk = F.rms_norm(qkv[:, :, :n], (d,), None, eps) * w.qk_norm
            qk = torch.addcmul(qk * cos, qk.roll(d // 2, -1), sin)
            k, v = qk[:, :, self._heads :].transpose(1, 2), qkv[:, :, n:].transpose(1, 2)
            x = x + w.out(attend(i, qk[:, :, : self._heads], k, v))
            gate, up = w.gate_up(F.rms_norm(x, (width,), w.mlp_norm, eps)).chunk(2, -1)
            x = x + w.down(F.silu(gate) * up)
        return F.rms_norm(x, (width,), self._norm, eps).view(b, t, -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, H, D] over keys and values [B, H_kv, S, D] -> [B * T, H * D]."""
        b, t = q.shape[:2]
        if t == 1:  # the heads that share a key are as many queries of it: nothing is repeated
            y = F.scaled_dot_product_attention(q.reshape(b, self._shared, -1, q.shape[-1]), k, v, mask)
            return y.reshape(b, -1)
        shared = self._heads != self._shared
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask, enable_gqa=shared)
        return y.transpose(1, 2).reshape(b * t, -1)

    def _step_compiled(self, ids: Tensor, cache: KVCache) -> Tensor:
        """One id in each of few rows. The cache is written after it, not by the compiled function."""
        seen = torch.tensor(cache.lengths, device=self.device)[:, None]
        positions, _ = cache.begin(1)
        keys, values, slots = cache.window()
        mask = (slots < seen)[:, None, None]
        for x in (keys, values, mask):
            torch._dynamo.mark_dynamic(x, 3)
        cos, sin = (x[positions].expand(len(ids), 1, -1)[:, :, None] for x in (self._cos, self._sin))
        y, keys, values = self._compiled(self._embed(ids), cos, sin, mask, keys, values)
        cache.append(slice(None), keys, values)
        return y

    def _step(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One id in each row, as a function of what it reads: the output, and its keys and values of all layers.

        Args:
            x: float [B, 1, C].
            cos, sin: float [B, 1, 1, D].
            mask: bool [B, 1, 1, S], the slots that hold something.
            keys, values: float [L, B, H_kv, S, D].
        """
        new: list[tuple[Tensor, Tensor]] = []
        mask = torch.cat((mask, torch.ones_like(mask[..., :1])), -1)

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            new.append((k, v))
            return self._attend(q, torch.cat((keys[i], k), 2), torch.cat((values[i], v), 2), mask)

        y = self._blocks(x, cos, sin, attend)
        return y, torch.stack([k for k, _ in new]), torch.stack([v for _, v in new])

    def logits(self, hidden: Tensor, columns: slice = slice(None)) -> Tensor:
        """[..., C] -> [..., n]: scores of the ids in ``columns``. The matrix of each range is kept: use few of them."""
        start, stop, _ = columns.indices(len(self._head))
        if (start, stop) not in self._parts:
            self._parts[start, stop] = Matrix(self._head[start:stop], self._dtype)
        return self._parts[start, stop](hidden.reshape(-1, hidden.shape[-1])).view(*hidden.shape[:-1], -1)

    def cost(self, rows: int, columns: int) -> tuple[int, int]:
        """Of a step of so many rows, with ``columns`` of the output projection: bytes of weights, operations."""
        weights = self._body + columns * self.config.hidden_size
        return weights * itemsize(self._dtype, rows), 2 * rows * weights

"""The decoder: the architecture, tensor names and config of Qwen3, so that a saved directory loads in transformers.

TransformerConfig -- sizes; ``hf_config`` and ``from_hf`` convert to and from Hugging Face's config.json
Transformer       -- ids [B, T] -> logits [B, T, V]; save and load

Pre-norm blocks of grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with per-head RMSNorm on queries
and keys, rotary positions (Su et al. 2021, arXiv:2104.09864) and SwiGLU (Shazeer 2020, arXiv:2002.05202); Qwen3
Technical Report, arXiv:2505.09388. Tests hold it to ``transformers.Qwen3ForCausalLM``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from functools import cache as once
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mmtok.checkpoints import WEIGHTS, load_strict, read_checkpoint, save_checkpoint, tensors_to_bytes
from mmtok.config import Config
from mmtok.errors import CheckpointError, ConfigError, VocabularyError, VocabularyMismatchError
from mmtok.registry import VOCAB_FILE, VocabularyRegistry
from mmtok.transformer.cache import KVCache

KIND = "transformer"
INIT_STD = 0.02


@dataclasses.dataclass(frozen=True)
class TransformerConfig(Config):
    """Sizes of the decoder, under the names of Qwen3's config.json."""

    vocab_size: int
    hidden_size: int = 384
    intermediate_size: int = 1024
    num_hidden_layers: int = 8
    num_attention_heads: int = 6
    num_key_value_heads: int = 6
    head_dim: int = 64
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        for name, value in self.to_dict().items():
            if not isinstance(value, bool) and value <= 0:
                raise ConfigError(f"TransformerConfig.{name}: got {value}, expected more than 0")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"TransformerConfig: {self.num_attention_heads} attention heads cannot share "
                f"{self.num_key_value_heads} key-value heads; the first must be a multiple of the second"
            )
        if self.head_dim % 2:
            raise ConfigError(f"TransformerConfig.head_dim: got {self.head_dim}, expected an even number")

    def hf_config(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The config.json under which ``transformers`` loads the saved weights as Qwen3ForCausalLM."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **self.to_dict(),
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "initializer_range": INIT_STD,
            "use_cache": True,
            "torch_dtype": str(dtype).removeprefix("torch."),
            # Without a version 4.57.6 takes any vocabulary above 100,000 ids for one of Mistral's, and warns.
            "transformers_version": "5.0.0",
        }

    @classmethod
    def from_hf(cls, values: dict[str, Any]) -> TransformerConfig:
        """Read a Qwen3 config.json; keys that do not change the result are passed over.

        Raises:
            ConfigError: another architecture, a missing size, or a setting that this decoder does not have.
        """
        supported: dict[str, tuple[Any, ...]] = {
            "model_type": ("qwen3",),
            "hidden_act": ("silu", None),
            "attention_bias": (False, None),
            "use_sliding_window": (False, None),
            "rope_scaling": (None,),
        }
        for key, allowed in supported.items():
            if values.get(key) not in allowed:
                raise ConfigError(f"config.json: {key} is {values.get(key)!r}, this decoder has only {allowed[0]!r}")
        flat = dict(values)
        rope = values.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default":
            raise ConfigError(f"config.json: rope_type is {rope['rope_type']!r}, this decoder has only 'default'")
        flat.setdefault("rope_theta", rope.get("rope_theta"))
        names = [f.name for f in dataclasses.fields(cls)]
        missing = [n for n in names if flat.get(n) is None]
        if missing:
            raise ConfigError(f"config.json lacks {', '.join(missing)}; it is not a complete Qwen3 config")
        return cls.from_dict({n: flat[n] for n in names})


class Step(NamedTuple):
    """What every layer of one forward pass shares."""

    cos: Tensor  # float [T, D] or [B, 1, T, D]
    sin: Tensor
    mask: Tensor | BlockMask | None  # bool, broadcast to [B, H, T, S]; True = visible
    causal: bool
    cache: KVCache | None


class RMSNorm(nn.RMSNorm):
    """As torch's, with the weight brought to the input's type: under autocast that keeps the fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """float [..., n] -> the same type and shape."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal grouped-query self-attention with RMSNorm on queries and keys."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        c, d = config.hidden_size, config.head_dim
        self.head_dim = d
        self.shared = config.num_attention_heads != config.num_key_value_heads
        self.q_proj = nn.Linear(c, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(c, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(c, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, c, bias=False)
        self.q_norm = RMSNorm(d, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(d, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        """float [B, T, C] -> float [B, T, C]."""
        b, t, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(b, t, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(b, t, -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(b, t, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, step.cos, step.sin).to(v.dtype), rotate(k, step.cos, step.sin).to(v.dtype)
        if step.cache is not None:
            k, v = step.cache.append(layer, k, v)
        if isinstance(step.mask, BlockMask):
            y = flex(q.is_cuda)(q, k, v, block_mask=step.mask, enable_gqa=self.shared)
        else:
            y = F.scaled_dot_product_attention(q, k, v, step.mask, is_causal=step.causal, enable_gqa=self.shared)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """float [B, T, C] -> float [B, T, C]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm block."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        """float [B, T, C] -> float [B, T, C]."""
        x = x + self.self_attn(self.input_layernorm(x), step, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Embedding, blocks and final norm: what Qwen3 calls ``model``."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Transformer(nn.Module):
    """The decoder over the shared vocabulary.

    Attributes:
        config: the sizes.
        registry: the vocabulary that the ids belong to; set by ``load``, else None.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.registry: VocabularyRegistry | None = None
        self.model = Backbone(config)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        angles = torch.arange(config.max_position_embeddings, dtype=torch.float32)[:, None] * (
            config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
        )
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)  # (P, D)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal init of std 0.02; projections into the residual stream are divided by sqrt(2 * layers)."""
        residual = INIT_STD / math.sqrt(2 * self.config.num_hidden_layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=residual if name.endswith(("o_proj", "down_proj")) else INIT_STD)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)

    @property
    def head_weight(self) -> Tensor:
        """float [V, C], the output projection; with tied embeddings the embedding itself."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | BlockMask | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The normalised output of the last block, from which ``logits`` are made.

        Args:
            ids: int64 [B, T], 0..V-1.
            positions: int64 [B, T], 0..max_position_embeddings-1; None means 0..T-1 in each row.
            mask: bool [B, 1, T, T], True where a query may see a key, or a ``BlockMask`` for flex attention (both of
                ``mmtok.transformer.packing``); None means causal.
            cache: keys and values of what went before; the new ones are appended and each row grows by T.
                Positions and mask then follow from the cache and must be None.

        Returns:
            float [B, T, C].

        Raises:
            ConfigError: the sequence is longer than max_position_embeddings.
        """
        t = ids.shape[1]
        causal = cache is None and mask is None and t > 1
        if cache is not None:
            if positions is not None or mask is not None:
                raise ValueError("positions and mask follow from the cache: pass them only without a cache")
            positions, mask = cache.begin(t)
        if positions is None:
            self._check_length(t)
        # (T, D), or (B, 1, T, D) where rows have positions of their own
        where: Any = slice(0, t) if positions is None else positions
        cos, sin = self.cos[where], self.sin[where]
        if cos.dim() == 3:
            cos, sin = cos[:, None], sin[:, None]
        step = Step(cos, sin, mask, causal, cache)
        x = self.model.embed_tokens(ids)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, step, i)
        if cache is not None:
            cache.advance(t)
        return self.model.norm(x)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for ``batch`` rows of up to ``capacity`` ids, on this model's device.

        Raises:
            ConfigError: the capacity is more than max_position_embeddings.
        """
        self._check_length(capacity)
        c, w = self.config, self.head_weight
        return KVCache(c.num_hidden_layers, batch, c.num_key_value_heads, capacity, c.head_dim, w.device, w.dtype)

    def logits(self, hidden: Tensor, columns: slice = slice(None)) -> Tensor:
        """float [..., C] -> float [..., n]: scores of the ids in ``columns``, by default of all."""
        return F.linear(hidden, self.head_weight[columns])

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | BlockMask | None = None,
        cache: KVCache | None = None,
        logits: Literal["all", "last", "none"] = "all",
    ) -> Tensor:
        """Scores of the next id. Arguments as in ``hidden``.

        Returns:
            float [B, T, V]; [B, 1, V] for ``logits="last"``; the hidden states [B, T, C] for ``logits="none"``.
        """
        x = self.hidden(ids, positions, mask, cache)
        if logits == "none":
            return x
        return self.logits(x[:, -1:] if logits == "last" else x)

    def save(
        self,
        path: str | Path,
        registry_json: str,
        extra: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Write a directory that ``load`` and ``transformers.AutoModelForCausalLM`` read.

        Args:
            path: the directory; written atomically.
            registry_json: ``VocabularyRegistry.to_json()`` of the vocabulary that the ids belong to.
            extra: more JSON entries for mmtok.json (steps trained, data, scores).
            dtype: of the stored weights, torch.float32 or torch.bfloat16.

        Raises:
            VocabularyMismatchError: the registry's padded size is not this model's vocab_size.
        """
        registry = VocabularyRegistry.from_json(registry_json)
        self._check_size(registry, "this transformer")
        config = {
            **self.config.hf_config(dtype),
            "pad_token_id": registry.pad,
            "bos_token_id": registry.bos,
            "eos_token_id": registry.eos,
            "mmtok": {"registry": registry.fingerprint},
        }
        weights = tensors_to_bytes({k: v.to(dtype) for k, v in self.state_dict().items()}, {"format": "pt"})
        files = {WEIGHTS: weights, VOCAB_FILE: registry_json.encode()}
        meta = {**(extra or {}), "registry": registry.fingerprint}
        save_checkpoint(path, KIND, json.dumps(config, indent=2) + "\n", files, meta)

    @classmethod
    def load(cls, path: str | Path, registry: VocabularyRegistry | None = None) -> Transformer:
        """Read a saved directory, or a bundled transformer by name; float32, on the CPU, in eval mode.

        Args:
            path: what ``save`` wrote.
            registry: the vocabulary that the caller uses; None takes the saved one.

        Raises:
            CheckpointError: missing, damaged, of another kind, or weights that do not fit the config.
            VocabularyMismatchError: the saved vocabulary is not ``registry``, or not the one trained with.
        """
        meta, config_json, files, directory = read_checkpoint(path)
        if meta["kind"] != KIND:
            raise CheckpointError(f"{directory} holds a {meta['kind']!r}, expected a {KIND!r}")
        absent = [name for name in (WEIGHTS, VOCAB_FILE) if name not in files]
        if absent:
            raise CheckpointError(f"{directory} lacks {', '.join(absent)}; save or fetch the checkpoint again")
        try:
            model = cls(TransformerConfig.from_hf(json.loads(config_json)))
            state = load_safetensors(files[WEIGHTS])
            saved = VocabularyRegistry.from_json(files[VOCAB_FILE].decode())
        except (ConfigError, VocabularyError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
            raise CheckpointError(f"{directory}: {error}") from error
        if saved.fingerprint != meta.get("registry"):
            raise VocabularyMismatchError(
                f"{directory}: {VOCAB_FILE} has fingerprint {saved.fingerprint[:12]}..., the weights were trained with "
                f"{str(meta.get('registry'))[:12]}...; put back the {VOCAB_FILE} that the transformer was saved with"
            )
        model._check_size(saved, str(directory))
        if registry is not None:
            registry.check_same(saved, str(directory))
        load_strict(model, {k: v.float() for k, v in state.items()}, str(directory))
        model.registry = saved
        return model.eval()

    def _check_length(self, length: int) -> None:
        limit = self.config.max_position_embeddings
        if length > limit:
            raise ConfigError(f"got a sequence of {length} ids, this transformer has {limit} positions; shorten it")

    def _check_size(self, registry: VocabularyRegistry, what: str) -> None:
        if registry.padded_size != self.config.vocab_size:
            raise VocabularyMismatchError(
                f"{what} has vocab_size {self.config.vocab_size}, its registry has {registry.padded_size} ids "
                "(padded); build the TransformerConfig with vocab_size=registry.padded_size"
            )


@once
def flex(compiled: bool) -> Any:
    """Flex attention; compiled for a GPU, where it is a kernel of its own. Elsewhere it is slow, and only forward."""
    return torch.compile(flex_attention) if compiled else flex_attention


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, halves paired as in Hugging Face: float [B, H, T, D], cos and sin [..., T, D]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin

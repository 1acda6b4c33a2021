"""A small vocabulary of all modalities, tiny transformers over it, and what holds of every answer they give."""

from __future__ import annotations

import numpy as np
import torch

from mmtok.grammar import Grammar
from mmtok.registry import TokenizerSpec, VocabularyRegistry
from mmtok.transformer.generate import Generation, Request
from mmtok.transformer.model import Transformer, TransformerConfig

REGISTRY = VocabularyRegistry.create(
    [
        TokenizerSpec("words", "text", (60,), "t"),
        TokenizerSpec("pixels", "image", (32,), "i"),
        TokenizerSpec("sound", "audio", (16, 16, 16), "a"),
        TokenizerSpec("sketch", "image", (8,), "s"),
    ],
    max_grid=6,
)
GRAMMAR = Grammar(REGISTRY)
MODALITIES = ("text", "image", "audio")


def tiny(seed: int = 0, scale: float = 1.0) -> Transformer:
    torch.manual_seed(seed)
    config = TransformerConfig(REGISTRY.padded_size, 32, 64, 2, 2, 1, 16, max_position_embeddings=256)
    model = Transformer(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * scale * torch.randn_like(p))
    return model


MODEL = tiny()
SEGMENTS = {
    "text": np.array([REGISTRY.block("text").start + i for i in (5, 9, 1)]),
    "image": GRAMMAR.segment_ids("pixels", np.arange(6).reshape(2, 3)),
    "audio": GRAMMAR.segment_ids("sound", np.arange(12).reshape(3, 4)),
}


def prompt(*modalities: str) -> np.ndarray:
    parts = [SEGMENTS[m] for m in modalities]
    return np.concatenate([[REGISTRY.bos, REGISTRY.user], *parts, [REGISTRY.assistant]])


def answered(generation: Generation, request: Request) -> list[str]:
    """Check what holds of every answer; the kinds of its segments."""
    assert generation.ids.dtype == np.int64
    assert np.array_equal(generation.ids[: generation.prompt_length], request.prompt)
    new = generation.new_ids
    assert 0 < len(new) <= request.max_new_tokens
    assert new[-1] == REGISTRY.eos
    assert sum(generation.tokens.values()) == len(new)
    spans = [s for s in GRAMMAR.spans(generation.ids) if s.start >= generation.prompt_length]
    segments = [s for s in spans if s.kind != "control"]
    assert [s.name for s in spans if s.kind == "control"] == ["<eos>"]
    for span in segments:
        assert GRAMMAR.segment_codes(generation.ids, span).size == np.prod(span.shape)
        if span.kind == "image" and request.grid:
            assert span.shape == request.grid
        if span.kind == "audio" and request.max_frames is not None:
            assert span.shape[1] <= request.max_frames
        if span.kind == "audio" and request.targets:
            assert span.shape[1] >= 1
    kinds = [s.kind for s in segments]
    if request.targets:
        wanted = [REGISTRY.tokenizer(t).modality for t in request.targets]
        assert kinds == wanted
        assert all(REGISTRY.tokenizer(t).name == s.tokenizer for t, s in zip(request.targets, segments, strict=True))
    return kinds

"""Tiny spectral codecs whose codebooks have been started, and sounds for them."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from mmtok.audio import SpectralCodec, SpectralCodecConfig

RATE, HOP, LEVELS, SIZE = 8000, 40, 3, 16
CONFIG = SpectralCodecConfig(
    sample_rate=RATE, hop=HOP, window=128, mels=20, short_window=32, shorts=4, short_mels=5, dim=16, encoder_blocks=1,
    decoder_blocks=2, levels=LEVELS, codebook_size=SIZE, codebook_dim=6,
)  # fmt: skip
# Other shapes by name, as overrides of CONFIG.
SHAPES = {
    "plain": [],
    "causal": ["causal=true"],
    "no short windows": ["shorts=0"],
    "fsq": ["quantizer=fsq", "fsq_levels=[4,4]", "levels=1"],
    "simvq": ["quantizer=simvq", "levels=1"],
    "lfq": ["quantizer=lfq", "levels=1"],
    "cosine": ["quantizer=cosine", "levels=1"],
}


def sounds(b: int, length: int, seed: int = 0) -> Tensor:
    """Chirps of several loudnesses with noise: float32 [B, 1, T] in -1..1."""
    g = torch.Generator().manual_seed(seed)
    t = torch.arange(length) / RATE
    pitch, loud = 100 + 2000 * torch.rand(b, 1, generator=g), 0.05 + 0.5 * torch.rand(b, 1, generator=g)
    x = loud * torch.sin(2 * torch.pi * pitch * (t + 3 * t**2)) + 0.02 * torch.randn(b, length, generator=g)
    return x.clamp(-1, 1)[:, None]


def build(config: SpectralCodecConfig) -> SpectralCodec:
    """A codec of random weights whose codebooks follow the sounds."""
    torch.manual_seed(0)
    model = SpectralCodec(config, vectors_per_batch=200)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        model.train()
        for step in range(2):
            model(sounds(4, 50 * config.hop, step)[:, 0])
    return model.eval()


@functools.cache
def tiny(name: str) -> SpectralCodec:
    """The codec of one of ``SHAPES``."""
    return build(CONFIG.replace(SHAPES[name]))


def pieces(x: Tensor, sizes: list[int]) -> list[Tensor]:
    """The last dimension cut into pieces of these sizes, and what is left."""
    ends = [0, *itertools.accumulate(sizes)]
    return [*(x[..., a:b] for a, b in itertools.pairwise(ends)), x[..., ends[-1] :]]


def assert_same_codes(model: SpectralCodec, got: Tensor, whole: Tensor, x: Tensor) -> None:
    """Equal codes, but that the first level which differs in a frame may be a near tie."""
    assert got.shape == whole.shape
    differ = got != whole
    if differ.any():
        ties = model.near_ties(x, 1e-4)
        assert ties is not None, f"{int(differ.sum())} of {differ.numel()} codes differ"
        first = differ & (differ.cumsum(1) == 1)
        assert ties[:, : got.shape[1]][first].all()
        assert differ.any(1).sum() <= 1

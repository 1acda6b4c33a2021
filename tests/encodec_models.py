"""The encodec package's models with random weights and codebooks that are not empty, and mmtok's of the same."""

from __future__ import annotations

import functools
import warnings

import torch
from encodec.model import EncodecModel

from mmtok.audio.encodec import Encodec, EncodecConfig


@functools.cache
def package_model(sample_rate: int) -> EncodecModel:
    """The package's model."""
    torch.manual_seed(sample_rate)
    make = EncodecModel.encodec_model_24khz if sample_rate == 24_000 else EncodecModel.encodec_model_48khz
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = make(pretrained=False)
    with torch.no_grad():
        frames = model.encoder(torch.randn(1, model.channels, 48_000) * 0.1)[0].T
        spread = frames.std(dim=0).mean()
        for n, layer in enumerate(model.quantizer.vq.layers):
            centres = frames[torch.randint(len(frames), (1024,))] if n == 0 else 0
            layer._codebook.embed.copy_(centres + torch.randn(1024, 128) * spread * 0.3 * 0.9**n)
    return model


@functools.cache
def tokenizer(sample_rate: int) -> Encodec:
    """mmtok's, with the same weights and 6 kb/s by default."""
    return Encodec(EncodecConfig(sample_rate, 6.0), package_model(sample_rate).state_dict())


def noise(batch: int, channels: int, length: int, seed: int = 0) -> torch.Tensor:
    """float32 [batch, channels, length]."""
    return torch.randn(batch, channels, length, generator=torch.Generator().manual_seed(seed)) * 0.1

"""Tiny published audio codecs with random weights, in the files that their systems publish.

``dac``, ``mimi``, ``snac``, ``xcodec`` -- the original networks
``as_package``                          -- DAC's tensors as the package descript-audio-codec writes them
``write``                               -- a directory of one of the four
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize

DAC_PACKAGE = {
    "encoder_dim": 4, "encoder_rates": [2, 5], "latent_dim": None, "decoder_dim": 16, "decoder_rates": [5, 2],
    "n_codebooks": 3, "codebook_size": 32, "codebook_dim": 4, "quantizer_dropout": 0.5, "sample_rate": 1000,
}  # fmt: skip
SNAC = {
    "sampling_rate": 1200, "encoder_dim": 4, "encoder_rates": [2, 3], "decoder_dim": 16, "decoder_rates": [3, 2],
    "attn_window_size": None, "codebook_size": 32, "codebook_dim": 4, "vq_strides": [4, 2, 1], "noise": True,
    "depthwise": True,
}  # fmt: skip
SNAC_WINDOWS = {**SNAC, "encoder_dim": 16, "decoder_dim": 64, "attn_window_size": 8}


def sound(length: int, rows: int = 1, seed: int = 0) -> Tensor:
    """float32 [rows, 1, length], -0.5..0.5."""
    return torch.rand(rows, 1, length, generator=torch.Generator().manual_seed(seed)) - 0.5


def lively(network: Any, loudness: float) -> Any:
    """The network with weights so large that its codes are many; its last convolution times ``loudness``."""
    torch.manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d | nn.Linear):
            weight = nn.init.kaiming_normal_(torch.empty_like(module.weight), nonlinearity="relu")
            if isinstance(module, nn.Conv1d) and module.out_channels <= 2:  # the last, which makes samples
                weight *= loudness
            if hasattr(module, "weight_g"):  # weight norm as descript-audio-codec has it
                module.weight_g = nn.Parameter(weight.flatten(1).norm(dim=1)[:, None, None])
                module.weight_v = nn.Parameter(weight)
            else:
                module.weight = weight if parametrize.is_parametrized(module, "weight") else nn.Parameter(weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.02)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        if type(module).__name__ == "MimiLayerScale":
            nn.init.constant_(module.scale, 0.5)
        for name in ("embed", "embed_sum"):
            if isinstance(dict(module.named_buffers(recurse=False)).get(name), Tensor):
                nn.init.normal_(getattr(module, name))
        if hasattr(module, "_embed"):
            module._embed = None
    return network.eval()


def dac() -> transformers.DacModel:
    config = transformers.DacConfig(
        encoder_hidden_size=4, downsampling_ratios=[2, 5], decoder_hidden_size=16, n_codebooks=3, codebook_size=32,
        codebook_dim=4, sampling_rate=1000,
    )  # fmt: skip
    return lively(transformers.DacModel(config), 0.0003)


def mimi(window: int = 64, channels: int = 1) -> transformers.MimiModel:
    config = transformers.MimiConfig(
        sampling_rate=800, audio_channels=channels, hidden_size=16, num_filters=4, upsampling_ratios=[4, 2, 2],
        codebook_size=32, codebook_dim=8, num_quantizers=4, vector_quantization_hidden_dimension=8,
        num_hidden_layers=2, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        upsample_groups=16, sliding_window=window,
    )  # fmt: skip
    return lively(transformers.MimiModel(config), 0.05)


def xcodec(semantic: str = "hubert") -> transformers.XcodecModel:
    shape = {
        "model_type": semantic, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "conv_dim": [4, 4], "conv_stride": [5, 2], "conv_kernel": [10, 3],
        "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2,
    }  # fmt: skip
    acoustic = {
        "model_type": "dac", "encoder_hidden_size": 4, "decoder_hidden_size": 16, "hidden_size": 8,
        "downsampling_ratios": [5, 2], "upsampling_ratios": [5, 2],
    }  # fmt: skip
    config = transformers.XcodecConfig(
        target_bandwidths=[0.25, 0.5, 1.0], sample_rate=500, codebook_size=32, acoustic_model_config=acoustic,
        semantic_model_config=shape,
    )  # fmt: skip
    return lively(transformers.XcodecModel(config), 0.0005)


def snac(settings: Mapping[str, Any] = SNAC) -> Any:
    from snac import SNAC as Original

    torch.manual_seed(0)
    return lively(Original(**settings), 0.00003)


def write(network: Any, directory: Path, settings: Mapping[str, Any] | None = None) -> Path:
    """As its system publishes it; SNAC, which has no ``save_pretrained``, with its settings."""
    directory.mkdir(parents=True, exist_ok=True)
    if settings is None:
        network.save_pretrained(directory)
    else:
        (directory / "config.json").write_text(json.dumps(settings))
        torch.save(network.state_dict(), directory / "pytorch_model.bin")
    return directory


def as_package(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ``dac()`` under the names of descript-audio-codec, weight norm included; each rule is spelled out."""
    unit = {"snake1": "block.0", "conv1": "block.1", "snake2": "block.2", "conv2": "block.3"}
    parts = {
        "encoder": {"res_unit1": "block.0", "res_unit2": "block.1", "res_unit3": "block.2", "snake1": "block.3",
                    "conv1": "block.4"},
        "decoder": {"snake1": "block.0", "conv_t1": "block.1", "res_unit1": "block.2", "res_unit2": "block.3",
                    "res_unit3": "block.4"},
    }  # fmt: skip
    ends = {
        "encoder.conv1": "encoder.block.0", "encoder.snake1": "encoder.block.3", "encoder.conv2": "encoder.block.4",
        "decoder.conv1": "decoder.model.0", "decoder.snake1": "decoder.model.3", "decoder.conv2": "decoder.model.4",
    }  # fmt: skip
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        words = key.split(".")
        if words[0] == "quantizer":
            name = ".".join(words[:-1])
        elif words[1] == "block":  # encoder.block.0.res_unit1.conv1.weight
            side = "encoder.block" if words[0] == "encoder" else "decoder.model"
            name = f"{side}.{int(words[2]) + 1}.{parts[words[0]][words[3]]}"
            name += "." + unit[words[4]] if len(words) == 6 else ""
        else:
            name = ends[".".join(words[:2])]
        if words[-1] == "weight" and "codebook" not in key:
            out[name + ".weight_g"] = value.flatten(1).norm(dim=1)[:, None, None]
            out[name + ".weight_v"] = value * 0.7
        else:
            out[f"{name}.{words[-1]}"] = value
    return out

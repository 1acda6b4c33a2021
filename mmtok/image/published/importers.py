"""VQGANs out of the files of the systems that published them. The shape of the network is read off the weights.

``import_taming``    -- CompVis/taming-transformers: ``last.ckpt``, checked against ``model.yaml`` where there is one
``import_chameleon`` -- facebookresearch/chameleon: ``vqgan.ckpt`` and ``vqgan.yaml``, the same format
``import_llamagen``  -- FoundationVision/LlamaGen: ``vq_ds16_c2i.pt``, ``vq_ds8_c2i.pt``, ``vq_ds16_t2i.pt``
``import_cosmos``    -- NVIDIA/Cosmos-Tokenizer: ``encoder.jit`` and ``decoder.jit`` of a DI8x8 or DI16x16

All four train on pictures in -1..1, as ``ImageTokenizer`` gives them. What only training needs is left out by name:
``loss.`` (perceptual loss and discriminator) of taming, ``quantize.codebook_used`` (a counter) of LlamaGen, the
constants of wavelets and levels in Cosmos' TorchScript. Everything else must fit exactly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mmtok.archive import module_tensors, read_archive
from mmtok.errors import CheckpointError, ConfigError
from mmtok.image.published.quantize import Scalars
from mmtok.image.published.vqgan import VQGAN, VQGANConfig
from mmtok.weights import read_state, without

COSMOS_LEVELS = (8, 8, 8, 5, 5, 5)  # cosmos_tokenizer/networks/configs.py: 64000 codes
# What model.yaml may say that changes the network in ways that leave no trace in the weights.
_PLAIN = {
    "double_z": False, "tanh_out": False, "give_pre_end": False, "use_linear_attn": False, "resamp_with_conv": True,
    "attn_type": "vanilla",
}  # fmt: skip


def import_taming(checkpoint: str | Path, config_yaml: str | Path | None = None) -> VQGAN:
    """A VQGAN of taming-transformers.

    Args:
        checkpoint: the ``.ckpt`` that Lightning wrote, or its state dict as .ckpt, .pt or .safetensors.
        config_yaml: the published config, which must agree with the weights. None takes the file of the same name
            with the suffix .yaml where there is one; the weights alone do as well.

    Raises:
        CheckpointError: a file is missing or damaged, tensors do not fit, or the yaml is of another model.
    """
    file = Path(checkpoint)
    state = without(read_state(file), "loss.")
    if "quantize.proj.weight" in state:
        raise CheckpointError(
            f"{file} is a GumbelVQ, whose codes are drawn at random; expected a VQModel with quantize.embedding"
        )
    config = read_shape(state, str(file))
    near = file.with_suffix(".yaml")
    if config_yaml is not None or near.is_file():
        _check_yaml(Path(config_yaml) if config_yaml is not None else near, config)
    return VQGAN.from_weights(config, state, str(file))


def import_chameleon(path: str | Path) -> VQGAN:
    """Chameleon's VQGAN: 8192 codes, 16 pixels each; encoder and decoder.

    Args:
        path: ``vqgan.ckpt``, beside ``vqgan.yaml``, or the directory that holds both (``data/tokenizer``).

    Raises:
        CheckpointError: as ``import_taming``.
    """
    place = Path(path)
    return import_taming(place / "vqgan.ckpt" if place.is_dir() else place)


def import_llamagen(path: str | Path) -> VQGAN:
    """LlamaGen's VQ-16 or VQ-8: 16384 codes of 8 numbers, vectors of length 1.

    Args:
        path: the published .pt (of its entries ``model`` is read, as LlamaGen does to generate), or a state dict.

    Raises:
        CheckpointError: the file is missing or damaged, or tensors do not fit.
    """
    state = _from_llamagen(without(read_state(path), "quantize.codebook_used"))
    return VQGAN.from_weights(read_shape(state, str(path), normalized=True), state, str(path))


def import_cosmos(directory: str | Path) -> VQGAN:
    """NVIDIA's discrete image tokenizer, DI8x8 or DI16x16: 64000 codes by finite scalar quantization.

    The files are TorchScript, which holds code as well as tensors: the tensors are read as data and the code is not
    run; the network is mmtok's own. The README of Cosmos-Tokenizer says that indices are 1..64K, but its code
    (``cosmos_tokenizer/modules/quantizers.py``) gives 0..63999, and takes 64000 for 0. Files made by that code hold the
    vector of each index, which is compared here. So codes are the indices as published, and nothing is subtracted.
    NVIDIA runs it in bfloat16, mmtok in float32: codes may differ where a value lies between two levels.

    Args:
        directory: with ``encoder.jit`` and ``decoder.jit``.

    Raises:
        CheckpointError: a file is missing or damaged, tensors do not fit, or its indices count otherwise.
    """
    state: dict[str, Tensor] = {}
    for name in ("encoder.jit", "decoder.jit"):
        file = Path(directory) / name
        if not file.is_file():
            raise CheckpointError(f"no file at {file}; expected the directory of a published Cosmos DI8x8 or DI16x16")
        state |= module_tensors(read_archive(file))
    constants = {k: v for k, v in state.items() if k.startswith(("quantizer.", "inv_quant."))}
    levels = _check_scalars(constants, str(directory))
    state = without(state, *constants, "encoder.patcher.", "decoder.unpatcher.")
    return VQGAN.from_weights(read_shape(state, str(directory), levels=levels), state, str(directory))


def read_shape(
    state: Mapping[str, Tensor], where: str, normalized: bool = False, levels: tuple[int, ...] = ()
) -> VQGANConfig:
    """The config of weights under taming's names.

    Args:
        state: the weights; without a decoder for a tokenizer that only encodes.
        where: the file, for messages.
        normalized: as in ``VQGANConfig``; it leaves no trace in the weights.
        levels: of finite scalar quantization, which works on Haar wavelets here; empty for a codebook.

    Raises:
        CheckpointError: a tensor that the shape is read off is missing, or it is no shape that ``VQGANConfig`` allows.
    """

    def shape(key: str, dimensions: int) -> torch.Size:
        if key not in state or state[key].ndim != dimensions:
            got = "no" if key not in state else f"a {state[key].ndim}-dimensional"
            raise CheckpointError(f"{where} has {got} {key}; expected the weights of a VQGAN")
        return state[key].shape

    def count(pattern: str) -> int:
        """How many of the numbers 0, 1, 2.. stand in names at the group of the pattern."""
        found = {int(m[1]) for m in (re.match(pattern, key) for key in state) if m}
        return next(i for i in range(len(found) + 1) if i not in found)

    channels, inputs = shape("encoder.conv_in.weight", 4)[:2]
    depth = count(r"encoder\.down\.(\d+)\.")
    widths = [shape(f"encoder.down.{i}.block.0.conv2.weight", 4)[0] for i in range(depth)]
    if not channels or any(width % channels for width in widths):
        raise CheckpointError(f"{where} has levels of {widths} channels, expected multiples of the first {channels}")
    dim, latent = shape("quant_conv.weight", 4)[:2]
    size = math.prod(levels) if levels else shape("quantize.embedding.weight", 2)[0]
    patch = max(1, math.isqrt(inputs // 3)) if levels else 1
    try:
        return VQGANConfig(
            channels=channels,
            multipliers=tuple(width // channels for width in widths),
            blocks=count(r"encoder\.down\.0\.block\.(\d+)\."),
            attention=tuple(i for i in range(depth) if f"encoder.down.{i}.attn.0.norm.weight" in state),
            halvings=sum(f"encoder.down.{i}.downsample.conv.weight" in state for i in range(depth)),
            patch=patch,
            latent_channels=latent,
            codebook_size=size,
            codebook_dim=dim,
            normalized=normalized,
            levels=levels,
            image_channels=inputs // patch**2,
            decoder=any(key.startswith("decoder.") for key in state),
        )
    except ConfigError as error:
        raise CheckpointError(f"{where} is of a network that mmtok has not ({error})") from error


def _from_llamagen(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LlamaGen's names, which count the decoder's levels from the coarsest, as taming's."""
    places = [re.match(r"decoder\.conv_blocks\.(\d+)\.", key) for key in state]
    last = max((int(place[1]) for place in places if place), default=0)

    def rename(key: str) -> str:
        key = re.sub(r"^encoder\.conv_blocks\.(\d+)\.", r"encoder.down.\1.", key)
        key = re.sub(r"^decoder\.conv_blocks\.(\d+)\.", lambda m: f"decoder.up.{last - int(m[1])}.", key)
        key = re.sub(r"^((?:encoder\.down|decoder\.up)\.\d+)\.res\.", r"\1.block.", key)
        parts = ("block_1", "attn_1", "block_2")
        return re.sub(r"^(encoder|decoder)\.mid\.([012])\.", lambda m: f"{m[1]}.mid.{parts[int(m[2])]}.", key)

    return {rename(key): value for key, value in state.items()}


def _check_scalars(constants: Mapping[str, Tensor], where: str) -> tuple[int, ...]:
    """The levels that the constants of Cosmos' quantizer tell; the published ones where they tell nothing."""
    levels: tuple[int, ...] = COSMOS_LEVELS
    for key, value in constants.items():
        if key.endswith("._levels"):
            levels = tuple(int(n) for n in value.flatten().tolist())
    ours = Scalars(levels)
    for key, value in constants.items():
        match key.rsplit(".", 1)[-1]:
            case "_levels":
                fits = value.tolist() == list(levels)
            case "_basis":
                fits = value.tolist() == list(ours.steps)
            case "implicit_codebook":
                fits = torch.equal(value.float(), ours.decode(torch.arange(math.prod(levels))))
            case _:
                fits = False
        if not fits:
            raise CheckpointError(
                f"{where}: {key} is not of finite scalar quantization with levels {levels} counted from 0; expected a "
                "Cosmos DI8x8 or DI16x16"
            )
    return levels


def _check_yaml(file: Path, config: VQGANConfig) -> None:
    """That a published config says what the weights are."""
    try:
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:120]
        raise CheckpointError(
            f"{file} cannot be read as YAML ({reason}); give the one published with the weights"
        ) from error
    params = said
    for key in ("model", "params"):
        params = params.get(key) if isinstance(params, dict) else None
    shape = params.get("ddconfig") if isinstance(params, dict) else None
    if not isinstance(params, dict) or not isinstance(shape, dict):
        raise CheckpointError(
            f"{file} has no model.params.ddconfig; expected the config of a VQGAN of taming-transformers"
        )
    known: dict[str, Any] = {
        "n_embed": config.codebook_size,
        "embed_dim": config.codebook_dim,
        "ch": config.channels,
        "ch_mult": list(config.multipliers),
        "num_res_blocks": config.blocks,
        "z_channels": config.latent_channels,
        "in_channels": config.image_channels,
        "out_ch": config.image_channels,
        "remap": None,
        **_PLAIN,
    }
    given = {**params, **shape}
    if isinstance(given.get("resolution"), int) and isinstance(given.get("attn_resolutions"), list):
        sides = [given["resolution"] // 2**i for i in range(len(config.multipliers))]
        known["attn_resolutions"] = [sides[i] for i in config.attention]
        given["attn_resolutions"] = [side for side in sides if side in given["attn_resolutions"]]
    wrong = [f"{key} {given[key]}, not {value}" for key, value in known.items() if key in given and given[key] != value]
    if wrong:
        raise CheckpointError(f"{file} is not the config of these weights: it says {'; '.join(wrong)}")

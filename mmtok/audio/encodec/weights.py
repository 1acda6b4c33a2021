"""EnCodec's published weights, and the network that they make.

``read``         -- the original file or a directory of transformers, as the original's tensors
``build``        -- the network of them; what cannot be used is refused
``BANDWIDTHS``   -- kb/s at which each of the two models was trained
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from encodec.model import ROOT_URL, EncodecModel
from torch import Tensor, nn

from mmtok import checkpoints
from mmtok.audio.encodec.network import Network
from mmtok.audio.published.base import read_transformers
from mmtok.errors import CheckpointError

# The names end in the first digits of the sha256, as the package publishes them.
WEIGHTS = {24_000: "encodec_24khz-d7cc33bc.th", 48_000: "encodec_48khz-7e698e3e.th"}
BANDWIDTHS = {24_000: (1.5, 3.0, 6.0, 12.0, 24.0), 48_000: (3.0, 6.0, 12.0, 24.0)}
# What config.json of transformers must say, where it says anything; the tensors' shapes tell the rest.
_SETTINGS: dict[int, dict[str, Any]] = {
    24_000: {"audio_channels": 1, "normalize": False, "norm_type": "weight_norm", "use_causal_conv": True},
    48_000: {
        "audio_channels": 2,
        "normalize": True,
        "norm_type": "time_group_norm",
        "use_causal_conv": False,
        "chunk_length_s": 1.0,
        "overlap": 0.01,
    },
}
_SHARED_SETTINGS = {"upsampling_ratios": [8, 5, 4, 2], "pad_mode": "reflect", "trim_right_ratio": 1.0}
# Of the original's names to those of transformers, in this order; weight norm has two spellings there.
_RENAMED = (
    ("quantizer.vq.", "quantizer."),
    ("._codebook.", ".codebook."),
    (".model.", ".layers."),
    (".conv.conv.", ".conv."),
    (".convtr.convtr.", ".conv."),
    (".conv.norm.", ".norm."),
    (".convtr.norm.", ".norm."),
)
_PARAMETRIZED = (
    (".weight_g", ".parametrizations.weight.original0"),
    (".weight_v", ".parametrizations.weight.original1"),
)
# Buffers of the codebooks that only training needs; they are not stored.
_TRAINING_ONLY = ("cluster_size", "embed_avg", "inited")


def read(sample_rate: int, given: str | Path | None) -> dict[str, Tensor]:
    """The weights under the original's names, without the buffers that only training needs.

    Args:
        sample_rate: 24000 or 48000.
        given: the ``.th`` file, the directory that holds it, or a directory that transformers saved; None is torch's
            hub directory, into which the file is downloaded unless it is there.

    Raises:
        CheckpointError: neither can be had, a file that is not the published one, or a directory of another model.
    """
    if given is not None and (Path(given) / "config.json").is_file():
        state = _of_transformers(Path(given), sample_rate)
    else:
        path = _find(WEIGHTS[sample_rate], given)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read as tensors ({' '.join(str(error).split())[:200]})") from error
    return needed(state)


def needed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the original without the buffers that only training needs."""
    return {k: v for k, v in state.items() if k.rsplit(".", 1)[-1] not in _TRAINING_ONLY}


def build(sample_rate: int, state: Mapping[str, Tensor]) -> Network:
    """The network with these weights, weight norm fused.

    Args:
        sample_rate: 24000 or 48000.
        state: as ``read`` gives it.

    Raises:
        CheckpointError: tensors are missing, misshapen or not finite, or a codebook is empty.
    """
    name = f"EnCodec {sample_rate} Hz"
    model = _package_model(sample_rate)
    model.to_empty(device="cpu")
    rest = {k: torch.zeros_like(v) for k, v in model.state_dict().items() if not needed({k: v})}
    checkpoints.load_strict(model, {**rest, **state}, name)
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{name}: {key} holds NaN or infinity; fetch the weights again")
        if key.endswith(".embed") and not value.any():
            raise CheckpointError(
                f"{name}: codebook {key} is empty (all 0), so every code would be 0; load trained weights"
            )
    for module in model.modules():
        if "weight_g" in module._parameters:
            nn.utils.remove_weight_norm(module)
    return Network(model)


def _package_model(sample_rate: int) -> EncodecModel:
    """The package's model, whose names and shapes are those of the published file, without memory for its weights."""
    make = EncodecModel.encodec_model_24khz if sample_rate == 24_000 else EncodecModel.encodec_model_48khz
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore", FutureWarning)  # weight_norm is deprecated; it is fused by those who call
        return make(pretrained=False)


def _of_transformers(directory: Path, sample_rate: int) -> dict[str, Tensor]:
    """The tensors of a directory of transformers under the original's names."""
    settings, state = read_transformers(directory, "encodec")
    expected = {"sampling_rate": sample_rate, **_SHARED_SETTINGS, **_SETTINGS[sample_rate]}
    for key, value in expected.items():
        if settings.get(key, value) != value:
            raise CheckpointError(
                f"{directory / 'config.json'} has {key} {settings[key]!r}, expected {value!r} as the published EnCodec "
                f"of {sample_rate} Hz"
            )
    names = {}
    for original in needed(_package_model(sample_rate).state_dict()):
        name = original
        for before, after in _RENAMED:
            name = name.replace(before, after)
        names[name] = original
        for before, after in _PARAMETRIZED:
            names[name.replace(before, after)] = original
    return {names.get(key, key): value for key, value in state.items()}


def _find(name: str, given: str | Path | None) -> Path:
    """The path of the published file, its checksum verified, downloaded if no place is given."""
    hub = Path(torch.hub.get_dir()) / "checkpoints" / name
    prefix = name.removesuffix(".th").rsplit("-", 1)[1]
    path = hub if given is None else Path(given)
    if path.is_dir():
        path = path / name
    if given is None and not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(ROOT_URL + name, str(path), hash_prefix=prefix, progress=False)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"the EnCodec weights {name} are not at {path} and cannot be downloaded from {ROOT_URL}{name} "
                f"({error}); put the file there, or give its path as weights="
            ) from error
    if not path.is_file():
        raise CheckpointError(
            f"no EnCodec weights at {path}; expected the published file {name} (from {ROOT_URL}{name}), or a "
            "directory that transformers saved"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(prefix):
        raise CheckpointError(
            f"{path}: sha256 is {digest[:12]}..., the published {name} begins with {prefix}; fetch the file again"
        )
    return path

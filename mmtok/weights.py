"""Weights out of published files, whatever they are wrapped in, and what they may and may not hold.

``read_state``     -- a state dict from one .safetensors, .ckpt, .pt or .bin file
``read_directory`` -- a state dict from a directory that ``save_pretrained`` wrote, in one file or in several
``read_json``      -- its config.json
``without``        -- a state dict less what only training needs
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmtok.archive import read_archive
from mmtok.checkpoints import load_tensors
from mmtok.errors import CheckpointError

WRAPPERS = ("state_dict", "model")  # keys under which Lightning and LlamaGen keep the weights, beside other things


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name: .safetensors, or what ``torch.save`` wrote of a state dict or of a dictionary
    that holds one under ``state_dict`` or ``model``. No code in the file runs.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it holds no state dict.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"no file at {file}; expected the published weights (.ckpt, .pt, .bin or .safetensors)")
    if file.suffix == ".safetensors":
        return load_tensors(file)
    held = read_archive(file)
    if isinstance(held, dict):
        held = next((held[key] for key in WRAPPERS if isinstance(held.get(key), dict)), held)
    if not isinstance(held, dict) or not held or not all(isinstance(v, Tensor) for v in held.values()):
        names = ", ".join(map(str, list(held)[:5])) if isinstance(held, dict) else type(held).__name__
        raise CheckpointError(
            f"{file} holds {names or 'nothing'}; expected tensors by name, or these under {' or '.join(WRAPPERS)}"
        )
    return {str(key): value for key, value in held.items()}


def read_directory(directory: Path, stem: str, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """The tensors of ``stem.safetensors``, of the files that ``stem.safetensors.index.json`` names, or of ``stem.bin``.

    Args:
        directory: that ``save_pretrained`` wrote.
        stem: ``model`` (transformers), ``diffusion_pytorch_model`` (diffusers).
        prefixes: only tensors with names that begin with one of these, without it; the rest of a large model is not
            read.

    Raises:
        CheckpointError: none of the files is there, or one is damaged.
    """
    whole, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if index.is_file() and not whole.is_file():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise CheckpointError(f"{index} is damaged (no weight_map); fetch the directory again")
        files = sorted({directory / Path(name).name for key, name in places.items() if key.startswith(prefixes)})
    else:
        files = [whole]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        older = directory / f"{'pytorch_model' if stem == 'model' else stem}.bin"
        if not older.is_file():
            raise CheckpointError(
                f"no weights at {missing}; fetch the directory again, or save it with save_pretrained"
            )
        return {_without(k, prefixes): v for k, v in read_state(older).items() if k.startswith(prefixes)}
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                wanted = [key for key in tensors.keys() if key.startswith(prefixes)]  # noqa: SIM118
                found |= {_without(key, prefixes): tensors.get_tensor(key) for key in wanted}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is not a readable safetensors file ({error})") from error
    return found


def _without(key: str, prefixes: tuple[str, ...]) -> str:
    return key.removeprefix(next(prefix for prefix in prefixes if key.startswith(prefix)))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: there is no such file, or it is none.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{file} cannot be read as JSON ({reason}); fetch the directory again") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{file} holds a {type(value).__name__}, expected a JSON object; fetch the directory again"
        )
    return value


def without(state: Mapping[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """Less the tensors with names that begin so."""
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}

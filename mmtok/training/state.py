"""The checkpoint of a run: everything that the next step depends on, written atomically and read strictly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mmtok.checkpoints import atomic_write, load_strict, load_tensors, tensors_to_bytes
from mmtok.config import Config
from mmtok.errors import CheckpointError, ConfigError
from mmtok.training.averaging import Average
from mmtok.training.distributed import rank
from mmtok.training.optimizers import Joint
from mmtok.training.sharding import part_as, whole

STATE = "state.safetensors"
# A run may be shortened or extended on purpose, and go on with more ranks or fewer.
FREE = {"steps", "eval_every", "save_every", "threads", "parallel"}


def save_state(
    model: nn.Module,
    optimizer: Joint,
    config: Config,
    run: Path,
    step: int,
    settings: Mapping[str, Any],
    average: Average | None = None,
) -> None:
    """Write everything that the next step depends on, atomically: all ranks gather it, rank 0 writes."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"optimizer.{k}": v for k, v in optimizer.state(model).items()}
    if average is not None:
        tensors |= {f"average.{k}": v for k, v in average.tensors.items()}
    tensors = {k: whole(v) for k, v in tensors.items()}
    if rank():
        return
    tensors["rng"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    meta = {"step": str(step), "config": config.to_json(), "sha256": _digest(tensors)}
    meta["settings"] = json.dumps(_by_name(settings))
    atomic_write(run / STATE, tensors_to_bytes(tensors, meta))


def load_state(
    model: nn.Module,
    optimizer: Joint,
    config: Config,
    run: Path,
    settings: Mapping[str, Any],
    average: Average | None = None,
) -> int:
    """Restore what ``save_state`` wrote; returns the step, 0 where there is no checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
        ConfigError: it was made with another schedule or other settings.
    """
    path = run / STATE
    if not path.exists():
        return 0
    tensors = load_tensors(path)
    with safe_open(path, "pt") as f:
        meta = f.metadata() or {}
    try:
        step, theirs, chance = int(meta["step"]), dict(json.loads(meta["config"])), tensors["rng"]
        mine = _by_name(settings)
        before = dict(json.loads(meta["settings"])) if "settings" in meta else mine
        if chance.shape != torch.get_rng_state().shape:
            raise ValueError("the state of another random generator")
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is no training state ({error}); remove it to start anew") from error
    if meta.get("sha256", digest := _digest(tensors)) != digest:
        raise CheckpointError(f"{path} is damaged: its sha256 is not the recorded one; remove it to start anew")
    schedule = {k: v for k, v in config.to_dict().items() if k not in FREE}
    for what, was, now in (("another schedule", theirs, schedule), ("other settings", before, mine)):
        other = [f"{k}: {was.get(k)} there, {v} here" for k, v in now.items() if was.get(k) != v]
        if other:
            raise ConfigError(f"{path} was made with {what} ({'; '.join(other)}); use the same, or another --out")

    def of(part: str) -> dict[str, Tensor]:
        return {k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)}

    have = model.state_dict()
    load_strict(model, {k: part_as(v, have.get(k, v)) for k, v in of("model.").items()}, str(path))
    if average is not None:
        kept = of("average.")
        if kept.keys() != average.tensors.keys() or any(kept[k].shape != v.shape for k, v in average.tensors.items()):
            raise CheckpointError(f"{path}: the averaged weights do not fit the model; remove it to start anew")
        for k, v in average.tensors.items():  # as it lies in memory
            v.copy_(part_as(kept[k], v))
    try:
        optimizer.load(model, of("optimizer."))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}; remove it to start anew") from error
    torch.set_rng_state(chance)
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return step


def _by_name(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back, those of a ``Config`` one by one: ``loss.l1``."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{k}": v for k, v in value.to_dict().items()} if isinstance(value, Config) else {name: value}
    return dict(json.loads(json.dumps(flat)))


def _digest(tensors: dict[str, Tensor]) -> str:
    """Hex sha256 over names and bytes."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        h.update(name.encode())
        h.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()

"""The loop that all recipes share: schedule, bf16, clipping, checkpoints, exact resume, progress, a metrics log.

Everything that the next step depends on is in the checkpoint: weights, buffers, optimizer state, the random
generator of torch and the step. Batches are drawn from (seed, step), never from a running iterator. A run that was
killed and resumed therefore continues to the last bit as if it had not been. Under torchrun the ranks share each batch
(``mmtok.training.distributed``); rank 0 evaluates, logs and saves.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from torch import Tensor, nn

from mmtok.checkpoints import atomic_write, load_strict, load_tensors, tensors_to_bytes
from mmtok.config import Config
from mmtok.errors import CheckpointError, ConfigError, DataError
from mmtok.media import write_audio, write_image
from mmtok.training import distributed
from mmtok.training.averaging import Average

STATE = "state.safetensors"
LOG = "metrics.jsonl"
HEARTBEAT_S = 30.0  # where the progress bar cannot be drawn, in a log file, a line this often

Metrics = dict[str, float]
Pictures = dict[str, np.ndarray]
Sounds = dict[str, tuple[np.ndarray, int]]


@dataclasses.dataclass(frozen=True)
class LoopConfig(Config):
    """How long, how fast, how often.

    Attributes:
        steps: optimizer steps of the whole run.
        batch_size: examples a step (rows of packed tokens, for the transformer), over all ranks.
        lr: peak learning rate of AdamW (https://arxiv.org/abs/1711.05101).
        warmup: steps of linear warm-up; cosine decay to a hundredth of the peak follows.
        weight_decay: on matrices and kernels, not on vectors.
        clip: largest gradient norm.
        ema: decay of the moving average of the weights that is evaluated and saved; 0 for none.
        bf16: bfloat16 autocast in the forward pass.
        seed: of initialisation and of the order of the data.
        eval_every, save_every: in steps.
        threads: CPU threads; 0 leaves torch's own choice.
    """

    steps: int = 1000
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.0
    bf16: bool = True
    seed: int = 0
    eval_every: int = 500
    save_every: int = 500
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"LoopConfig.{name}: got {getattr(self, name)}, expected at least 1")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"LoopConfig.ema: got {self.ema}, expected 0 to less than 1")

    def lr_at(self, step: int) -> float:
        """Learning rate of one step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def prepare_torch(config: LoopConfig) -> torch.device:
    """Seed torch, set the threads, join the other ranks, and choose the device: a GPU where there is one.

    Raises:
        ConfigError: the ranks cannot share a batch evenly, which the mean of their gradients takes for granted.
    """
    distributed.start()
    if config.batch_size % distributed.world():
        raise ConfigError(
            f"got a batch_size of {config.batch_size} for {distributed.world()} ranks, expected a multiple of them"
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    _keep_freed_memory()
    torch.manual_seed(config.seed)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks: returning them to the kernel at every step costs as much time as the step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
            libc.mallopt(m_mmap_threshold, 2**30)
            libc.mallopt(m_trim_threshold, 2**31 - 1)
            libc.mallopt(m_top_pad, 2**28)


def rng(config: LoopConfig, step: int, example: int | None = None) -> np.random.Generator:
    """The generator that draws the batch of one step, or one example of it, whichever rank takes it."""
    return np.random.default_rng((config.seed, step) if example is None else (config.seed, step, example))


def optimizer_for(model: nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    """AdamW (.9, .95) with weight decay on tensors of two and more dimensions only."""
    named = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in named if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))


def fit(
    model: nn.Module,
    config: LoopConfig,
    run: Path,
    loss: Callable[[int], tuple[Tensor, Metrics]],
    evaluate: Callable[[int], Metrics | tuple[Metrics, Pictures] | tuple[Metrics, Pictures, Sounds]],
    description: str,
    settings: Mapping[str, Any],
) -> None:
    """Train to ``config.steps``, resuming from ``run`` if a checkpoint is there.

    Args:
        model: on its device; left in eval mode, with the averaged weights where ``ema`` asks for them.
        config: the schedule; must be the one that the checkpoint was made with, but for ``steps``, the intervals
            and the threads.
        run: directory of the checkpoint and of metrics.jsonl.
        loss: step -> (scalar loss, metrics to show); must draw its data from ``rng(config, step)`` alone.
        evaluate: step -> metrics, and if there is something to look at or to hear, pictures uint8 [3, H, W] and sounds
            (float32 [C, T], Hz) by name, which go to ``run/samples`` and to TensorBoard. Called in eval mode without
            gradients, every ``eval_every`` steps and at the end, by rank 0 alone.
        description: shown before the progress bar.
        settings: all else that makes this run what it is, by name: each a ``Config`` or JSON-able, such as the model's
            shape, the weights of the loss and a digest of the data; must be those of the checkpoint too.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
        ConfigError: the checkpoint was made with another schedule or other settings.
        DataError: the loss is not finite.
    """
    device = next(model.parameters()).device
    optimizer = optimizer_for(model, config)
    run.mkdir(parents=True, exist_ok=True)
    average = Average(model, config.ema) if config.ema else None
    step = load_state(model, optimizer, config, run, settings, average)
    distributed.wait()  # until every rank has read the state, before one writes
    chief = distributed.rank() == 0
    if chief:
        # A run that was killed after logging but before saving has lines from the future: drop them.
        log = [x for x in _read_log(run / LOG) if x["step"] <= step]
        atomic_write(run / LOG, "".join(json.dumps(x) + "\n" for x in log).encode())
    board = _tensorboard(run) if chief else None
    console = Console(stderr=True, quiet=not chief)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, TextColumn("{task.fields[live]}"), console=console) as progress:
        bar = progress.add_task(description, total=config.steps, completed=step, live="")
        started, shown, spoken = time.monotonic(), step, time.monotonic()
        while step < config.steps:
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(step)
            model.train()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.bf16):
                value, live = loss(step)
            if not torch.isfinite(value):
                raise DataError(
                    f"step {step}: the loss is {value.item()}; lower lr ({config.lr}) or look for NaN in the data"
                )
            model.zero_grad(set_to_none=True)  # of frozen parts too: an earlier stage may have left theirs
            value.backward()
            distributed.average_gradients(model)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            step += 1
            if average is not None:
                average.update(step)
            text = " ".join(f"{k} {v:.4g}" for k, v in {**live, "grad": float(norm)}.items())
            progress.update(bar, completed=step, live=text)
            if not console.is_terminal and time.monotonic() - spoken > HEARTBEAT_S:
                spoken = time.monotonic()
                console.print(f"step {step} of {config.steps}: {text}", soft_wrap=True)
            last = step == config.steps
            if (step % config.eval_every == 0 or last) and chief:
                pace = (step - shown) / max(1e-9, time.monotonic() - started)
                model.eval()
                with torch.no_grad(), average.applied() if average else nullcontext():
                    metrics, pictures, sounds = _all(evaluate(step))
                line = {"step": step, "lr": config.lr_at(step - 1), "steps_per_s": round(pace, 3), **live, **metrics}
                with (run / LOG).open("a", encoding="utf-8") as f:
                    f.write(json.dumps(line) + "\n")
                if board is not None:
                    for key, number in line.items():
                        board.add_scalar(key, number, step)
                for name, picture in pictures.items():
                    write_image(run / "samples" / f"{step:06}{name and '-'}{name}.png", picture)
                    if board is not None:
                        board.add_image(name or "samples", picture, step)
                for name, (samples, rate) in sounds.items():
                    write_audio(run / "samples" / f"{step:06}-{name}.wav", samples, rate)
                    if board is not None:
                        board.add_audio(name, samples.mean(0, keepdims=True), step, rate)
                console.print(f"step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in line.items() if k != "step"))
                started, shown = time.monotonic(), step
            if step % config.save_every == 0 or last:
                if chief:
                    save_state(model, optimizer, config, run, step, settings, average)
                distributed.wait()
    if average is not None:
        average.apply()
    if board is not None:
        board.close()
    model.eval()


def save_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: LoopConfig,
    run: Path,
    step: int,
    settings: Mapping[str, Any],
    average: Average | None = None,
) -> None:
    """Write everything that the next step depends on, atomically."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for index, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in entry.items()}
    if average is not None:
        tensors |= {f"average.{k}": v for k, v in average.tensors.items()}
    tensors["rng"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    meta = {"step": str(step), "config": config.to_json(), "sha256": _digest(tensors)}
    meta["settings"] = json.dumps(_by_name(settings))
    atomic_write(run / STATE, tensors_to_bytes(tensors, meta))


def load_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: LoopConfig,
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
    free = {"steps", "eval_every", "save_every", "threads"}  # a run may be shortened or extended on purpose
    schedule = {k: v for k, v in config.to_dict().items() if k not in free}
    for what, was, now in (("another schedule", theirs, schedule), ("other settings", before, mine)):
        other = [f"{k}: {was.get(k)} there, {v} here" for k, v in now.items() if was.get(k) != v]
        if other:
            raise ConfigError(f"{path} was made with {what} ({'; '.join(other)}); use the same, or another --out")
    load_strict(model, {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}, str(path))
    if average is not None:
        kept = {k[8:]: v for k, v in tensors.items() if k.startswith("average.")}
        if kept.keys() != average.tensors.keys() or any(kept[k].shape != v.shape for k, v in average.tensors.items()):
            raise CheckpointError(f"{path}: the averaged weights do not fit the model; remove it to start anew")
        for k, v in average.tensors.items():  # as it lies in memory
            v.copy_(kept[k])
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    moments = ("exp_avg", "exp_avg_sq")
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    for number, entry in state.items():
        shape = parameters[number].shape if number < len(parameters) else None
        if entry.keys() != {"step", *moments} or any(entry[name].shape != shape for name in moments):
            raise CheckpointError(f"{path}: optimizer.{number} does not fit the model; remove it to start anew")
        for name in moments:  # as their parameter lies in memory (channels last): same kernels
            entry[name] = torch.empty_like(parameters[number]).copy_(entry[name])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(chance)
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return step


def _all(
    evaluated: Metrics | tuple[Metrics, Pictures] | tuple[Metrics, Pictures, Sounds],
) -> tuple[Metrics, Pictures, Sounds]:
    if not isinstance(evaluated, tuple):
        return evaluated, {}, {}
    return evaluated if len(evaluated) == 3 else (*evaluated, {})


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


def _read_log(path: Path) -> list[dict[str, float]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    out = []
    for line in lines:
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the line that was being written when the process was killed
    return out


def _tensorboard(run: Path):  # type: ignore[no-untyped-def]
    """A TensorBoard writer where the package is installed, else None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run / "tensorboard"))

"""The loop that all recipes share: schedule, bf16, clipping, checkpoints, exact resume, progress, a metrics log.

Everything that the next step depends on is in the checkpoint: weights, buffers, optimizer state, the random
generator of torch and the step. Batches are drawn from (seed, step), never from a running iterator. A run that was
killed and resumed therefore continues to the last bit as if it had not been. Under torchrun the ranks share each batch
(``mmtok.training.distributed``); rank 0 evaluates, logs and saves.
"""

from __future__ import annotations

import ctypes
import json
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
from torch import Tensor, nn

from mmtok.checkpoints import atomic_write
from mmtok.errors import ConfigError, DataError
from mmtok.media import write_audio, write_image
from mmtok.training import distributed
from mmtok.training.averaging import Average
from mmtok.training.optimizers import optimizer_for
from mmtok.training.schedule import LoopConfig as LoopConfig
from mmtok.training.schedule import rng as rng
from mmtok.training.state import STATE as STATE
from mmtok.training.state import load_state, save_state

LOG = "metrics.jsonl"
HEARTBEAT_S = 30.0  # where the progress bar cannot be drawn, in a log file, a line this often

Metrics = dict[str, float]
Pictures = dict[str, np.ndarray]
Sounds = dict[str, tuple[np.ndarray, int]]


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
        loss: number of a batch -> (scalar loss, metrics to show); must draw its data from ``rng(config, number)``
            alone. The number is the step; with ``accumulate`` the step times it, and one more for each further batch.
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
            model.train()
            model.zero_grad(set_to_none=True)  # of frozen parts too: an earlier stage may have left theirs
            lives = []
            for number in range(step * config.accumulate, (step + 1) * config.accumulate):
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.bf16):
                    value, live = loss(number)
                if not torch.isfinite(value):
                    raise DataError(
                        f"step {step}: the loss is {value.item()}; lower lr ({config.lr}) or look for NaN in the data"
                    )
                (value / config.accumulate).backward()
                lives.append(live)
            live = _mean(lives)
            distributed.average_gradients(model)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step(config.lr_at(step))
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
                    for key, figure in line.items():
                        board.add_scalar(key, figure, step)
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


def _mean(metrics: list[Metrics]) -> Metrics:
    """Of each name the mean where it occurs, in order of first appearance."""
    found: dict[str, list[float]] = {}
    for one in metrics:
        for name, number in one.items():
            found.setdefault(name, []).append(number)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _all(
    evaluated: Metrics | tuple[Metrics, Pictures] | tuple[Metrics, Pictures, Sounds],
) -> tuple[Metrics, Pictures, Sounds]:
    if not isinstance(evaluated, tuple):
        return evaluated, {}, {}
    return evaluated if len(evaluated) == 3 else (*evaluated, {})


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

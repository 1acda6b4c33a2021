"""The loop that all recipes share: schedule, bf16, clipping, checkpoints, exact resume, progress, a metrics log.

Everything that the next step depends on is in the checkpoint: weights, buffers, optimizer state, the random
generator of torch and the step. Batches are drawn from (seed, step), never from a running iterator. A run that was
killed and resumed therefore continues to the last bit as if it had not been. Under torchrun the ranks share each batch
(``mmtok.training.distributed``, or of the model, ``mmtok.training.sharding``); rank 0 evaluates, logs and saves.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmtok.errors import ConfigError, DataError
from mmtok.training import distributed
from mmtok.training.averaging import Average
from mmtok.training.journal import LOG as LOG
from mmtok.training.journal import Journal
from mmtok.training.journal import Metrics as Metrics
from mmtok.training.journal import Pictures as Pictures
from mmtok.training.journal import Sounds as Sounds
from mmtok.training.optimizers import optimizer_for
from mmtok.training.schedule import LoopConfig as LoopConfig
from mmtok.training.schedule import rng as rng
from mmtok.training.sharding import Shards, whole
from mmtok.training.state import STATE as STATE
from mmtok.training.state import load_state, save_state


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
    shards = Shards(model) if config.parallel == "fsdp" and distributed.world() > 1 else None
    optimizer = optimizer_for(model, config)
    average = Average(model, config.ema) if config.ema else None
    run.mkdir(parents=True, exist_ok=True)
    step = load_state(model, optimizer, config, run, settings, average)
    distributed.wait()  # until every rank has read the state, before one writes
    chief = distributed.rank() == 0
    with Journal(run, step, config.steps, description) if chief else nullcontext() as journal:
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
            if shards is None:  # else they are averaged in the backward pass
                distributed.average_gradients(model)
            norm = whole(nn.utils.clip_grad_norm_(model.parameters(), config.clip))
            optimizer.step(config.lr_at(step))
            step += 1
            if average is not None:
                average.update(step)
            if journal:
                journal.show(step, {**live, "grad": float(norm)})
            last = step == config.steps
            if step % config.eval_every == 0 or last:
                model.eval()
                with (
                    torch.no_grad(),
                    average.applied() if average else nullcontext(),
                    shards.gathered() if shards else nullcontext(),
                ):
                    if journal:
                        line = {"step": step, "lr": config.lr_at(step - 1), "steps_per_s": round(journal.pace(step), 3)}
                        metrics, pictures, sounds = _all(evaluate(step))
                        journal.enter({**line, **live, **metrics}, pictures, sounds)
            if step % config.save_every == 0 or last:
                save_state(model, optimizer, config, run, step, settings, average)
                distributed.wait()
    if average is not None:
        average.apply()
    if shards is not None:
        shards.gather()
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

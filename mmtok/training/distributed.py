"""Data parallelism under torchrun: every rank takes its share of a batch, gradients are averaged over all ranks.

    torchrun --standalone --nproc-per-node 2 recipes/image.py ...

Each rank holds the whole model (``mmtok.training.sharding`` has the other way). Gradients go through one all-reduce
after the backward pass rather than through DistributedDataParallel: what is trained here is small, a training step may
use several networks or, before the critic's start, not all of them, and every rank does the same arithmetic in the same
order. Codebooks reduce their own statistics (``mmtok.codebook``).
"""

from __future__ import annotations

import atexit
import os
import sys

import torch
from torch import nn

from mmtok.codebook import distributed


def start() -> None:
    """Join the run that torchrun began; nothing in a plain process. Once per process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.distributed.init_process_group("nccl" if gpu else "gloo")
        atexit.register(_leave)


def _leave() -> None:
    """Leave together, for torchrun ends the others when one ends badly, and leave no threads, which would end so."""
    if not hasattr(sys, "last_value"):  # after an error the others wait elsewhere, if at all
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def rank() -> int:
    """Number of this process, 0 where there is one."""
    return torch.distributed.get_rank() if distributed() else 0


def world() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if distributed() else 1


def share(batch_size: int) -> range:
    """Which examples of a batch this rank takes: every ``world()``-th."""
    return range(rank(), batch_size, world())


def average_gradients(model: nn.Module) -> None:
    """Give every rank the mean of all ranks' gradients."""
    if not distributed():
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients]) / world()
    torch.distributed.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def wait() -> None:
    """Until every rank is here."""
    if distributed():
        torch.distributed.barrier()

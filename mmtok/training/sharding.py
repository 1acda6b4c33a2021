"""Fully sharded data parallelism (FSDP2, https://arxiv.org/abs/2304.11277): every rank holds a part of each weight.

A block's weights are gathered when it is its turn and given up after it; gradients, the optimizer's state and the
average exist in parts only. For evaluation, and at the end, the model is whole again on every rank.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from mmtok.errors import ConfigError
from mmtok.transformer.model import Transformer


def whole(x: Tensor) -> Tensor:
    """A tensor of which every rank may hold a part, gathered from all of them; others as they are."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def part_as(x: Tensor, other: Tensor) -> Tensor:
    """Of a tensor that every rank has, the part that this rank holds of ``other``; all of it if that is whole."""
    if not isinstance(other, DTensor):
        return x
    return distribute_tensor(x.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


class Shards:
    """A model that lies in parts on all ranks. All of them must call the same methods in the same order."""

    def __init__(self, model: nn.Module) -> None:
        """Shard a model in place, block by block.

        Raises:
            ConfigError: it is not the transformer; of others it is not known which method needs which weights.
        """
        if not isinstance(model, Transformer):
            raise ConfigError(f"parallel fsdp shards the transformer, got a {type(model).__name__}; use parallel=ddp")
        # A twin that shares the buffers and has room for no weight yet.
        self.model = model
        self._room = {k: nn.Parameter(torch.empty_like(p, device="meta")) for k, p in model.named_parameters()}
        memo = {id(p): self._room[k] for k, p in model.named_parameters()} | {id(b): b for b in model.buffers()}
        self._twin = copy.deepcopy(model, memo)
        # A group of its own: caches of torch keep it, so its threads do not end with it, as those of the others do.
        mesh = DeviceMesh.from_group(torch.distributed.new_group(), model.head_weight.device.type)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "hidden")

    def gather(self) -> None:
        """Let the model have its whole weights, and none of the hooks that shard it."""
        self._twin.load_state_dict({k: whole(p.detach()) for k, p in self.model.named_parameters()}, assign=True)
        self._swap()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """The model is whole within the block; changes of its weights there are lost."""
        self.gather()
        try:
            yield
        finally:
            self._swap()
            self._twin.load_state_dict(self._room, assign=True)

    def _swap(self) -> None:
        """The model, which others refer to, and its twin change places."""
        model, twin = self.model, self._twin
        model.__class__, twin.__class__ = twin.__class__, model.__class__
        model.__dict__, twin.__dict__ = twin.__dict__, model.__dict__

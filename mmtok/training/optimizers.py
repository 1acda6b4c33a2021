"""The optimizers of the recipes: AdamW, or Muon for matrices with AdamW for the rest.

Muon (Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of a matrix;
its updates are scaled to the size of AdamW's (https://arxiv.org/abs/2502.16982, section 2.2), so that both share one
learning rate and one weight decay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mmtok.errors import ConfigError
from mmtok.training.schedule import LoopConfig
from mmtok.training.sharding import part_as

BETAS = (0.9, 0.95)
ENTRIES = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.Muon: {"momentum_buffer"}}
OUTPUT = "lm_head"  # the output projection: a matrix, but one row for each id, like an embedding


class Joint:
    """Optimizers of different parameters as one.

    Attributes:
        parts: the optimizers.
    """

    def __init__(self, parts: Iterable[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)

    def step(self, lr: float) -> None:
        """One step of each with this learning rate."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """What the next step depends on, as ``NAME.ENTRY`` with the name of the parameter in ``model``."""
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        found = [(names[p], entry) for part in self.parts for p, entry in part.state.items()]
        return {f"{name}.{key}": torch.as_tensor(value) for name, entry in found for key, value in entry.items()}

    def load(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Take what ``state`` gave.

        Raises:
            ConfigError: it is not that of these optimizers and this model; the message names the entry.
        """
        by_name: dict[str, dict[str, Any]] = {}
        for key, value in state.items():
            name, _, entry = key.rpartition(".")
            by_name.setdefault(name, {})[entry] = value
        parameters = dict(model.named_parameters())
        for part in self.parts:
            mine = {p: i for i, p in enumerate(p for group in part.param_groups for p in group["params"])}
            taken = {}
            for name in [n for n in by_name if n in parameters and parameters[n] in mine]:
                p, entries = parameters[name], by_name.pop(name)
                moments = entries.keys() - {"step"}
                if entries.keys() != ENTRIES[type(part)] or any(entries[m].shape != p.shape for m in moments):
                    raise ConfigError(f"the optimizer's state of {name} does not fit the model")
                for m in moments:  # as their parameter lies in memory (channels last): same kernels
                    entries[m] = torch.empty_like(p).copy_(part_as(entries[m], p))
                taken[mine[p]] = entries
            part.load_state_dict({"state": taken, "param_groups": part.state_dict()["param_groups"]})
        if by_name:
            raise ConfigError(f"the optimizer's state has {next(iter(by_name))!r}, which the model has not")


def optimizer_for(model: nn.Module, config: LoopConfig) -> Joint:
    """AdamW (.9, .95) with weight decay on tensors of two and more dimensions only; with ``optimizer="muon"`` Muon for
    the weights of all linear layers but the output projection.

    Raises:
        ConfigError: Muon is asked for and there is no such weight.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    parts: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        linear = {m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != OUTPUT}
        matrices = [p for p in trained if p in linear]
        if not matrices:
            raise ConfigError("optimizer muon needs weights of linear layers and the model has none; use adamw")
        trained = [p for p in trained if p not in linear]
        parts.append(
            torch.optim.Muon(matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return Joint([*parts, torch.optim.AdamW(groups, lr=config.lr, betas=BETAS)])

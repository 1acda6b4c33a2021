"""An exponential moving average of a model's weights, which is what is evaluated and saved.

Polyak and Juditsky: Acceleration of stochastic approximation by averaging, SIAM J. Control Optim. 1992.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Average:
    """The average of all floating-point weights and buffers of a model; others are left alone.

    Args:
        model: on its device; its present values are where the average starts.
        decay: share that stays at each step; less at the beginning, where it would remember the initial values.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.tensors = {k: v.detach().clone() for k, v in model.state_dict().items() if v.is_floating_point()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the model's values after ``step`` optimizer steps."""
        share = 1 - min(self.decay, step / (step + 10))
        now = self.model.state_dict()
        torch._foreach_lerp_(list(self.tensors.values()), [now[k] for k in self.tensors], share)

    @torch.no_grad()
    def apply(self) -> None:
        """Give the model the averages for good."""
        now = self.model.state_dict()
        for k, v in self.tensors.items():
            now[k].copy_(v)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averages within the block, and its own values again after it."""
        now = self.model.state_dict()
        own = {k: now[k].detach().clone() for k in self.tensors}
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for k, v in own.items():
                    now[k].copy_(v)

"""How long a run is, how fast it learns, and what every step of it draws."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from mmtok.config import Config
from mmtok.errors import ConfigError

LEAST = 0.01  # share of the peak learning rate at which a run ends
CHOICES = {"optimizer": ("adamw", "muon"), "schedule": ("cosine", "constant"), "parallel": ("ddp", "fsdp")}


@dataclasses.dataclass(frozen=True)
class LoopConfig(Config):
    """How long, how fast, how often.

    Attributes:
        steps: optimizer steps of the whole run.
        batch_size: examples of a batch (rows of packed tokens, for the transformer), over all ranks.
        accumulate: batches of a step, one after the other; their gradients are averaged.
        optimizer: "adamw" (https://arxiv.org/abs/1711.05101), or "muon" for the matrices within the model and AdamW
            for all else, see ``mmtok.training.optimizers``.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        schedule: what follows. "cosine": decay to a hundredth of the peak. "constant": the peak, and linear decay to a
            hundredth of it at the end (https://arxiv.org/abs/2404.06395, section 4), so that a run can be extended.
        decay: share of the steps in which "constant" decays.
        weight_decay: on matrices and kernels, not on vectors.
        clip: largest gradient norm.
        ema: decay of the moving average of the weights that is evaluated and saved; 0 for none.
        bf16: bfloat16 autocast in the forward pass.
        parallel: how the ranks of a run under torchrun share the work: "ddp", all hold the whole model; "fsdp", each
            holds a part of it, of the gradients, of the optimizer's state and of the average.
        seed: of initialisation and of the order of the data.
        eval_every, save_every: in steps.
        threads: CPU threads; 0 leaves torch's own choice.
    """

    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-3
    warmup: int = 50
    schedule: str = "cosine"
    decay: float = 0.2
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.0
    bf16: bool = True
    parallel: str = "ddp"
    seed: int = 0
    eval_every: int = 500
    save_every: int = 500
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"LoopConfig.{name}: got {getattr(self, name)}, expected at least 1")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"LoopConfig.{name}: got {getattr(self, name)!r}, expected {' or '.join(choices)}")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"LoopConfig.ema: got {self.ema}, expected 0 to less than 1")
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"LoopConfig.decay: got {self.decay}, expected a share of the steps, 0 to 1")

    def lr_at(self, step: int) -> float:
        """Learning rate of one step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            left = (self.steps - step) / max(1.0, self.decay * self.steps)
            return self.lr * (LEAST + (1 - LEAST) * min(1.0, left))
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (LEAST + (1 - LEAST) * 0.5 * (1 + math.cos(math.pi * progress)))


def rng(config: LoopConfig, number: int, example: int | None = None) -> np.random.Generator:
    """The generator that draws one batch, or one example of it, whichever rank takes it."""
    return np.random.default_rng((config.seed, number) if example is None else (config.seed, number, example))

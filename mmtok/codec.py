"""What the trained codecs have in common: config, weights, fingerprint, save and load."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar

import torch
from torch import nn

from mmtok import checkpoints
from mmtok.config import Config
from mmtok.errors import CheckpointError
from mmtok.quantizers import Quantizer

# Buffers of the codebooks that only training needs: they stay out of the shipped files.
TRAINING_ONLY = ("counts", "sums", "started")


P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=nn.Module)


def exact(method: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """For encode and decode: no gradients, and the weights' own precision inside a caller's autocast block too."""

    @functools.wraps(method)
    def wrapped(self: M, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(), torch.autocast(next(self.parameters()).device.type, enabled=False):
            return method(self, *args, **kwargs)

    return wrapped


class CodecModel(nn.Module):
    """Base of the tokenizers that are trained here. A subclass sets the class variables and builds from a config."""

    kind: ClassVar[str]
    modality: ClassVar[str]
    config_class: ClassVar[type[Config]]
    quantizer: Quantizer

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """sha256 over config and weights as they are stored: what the codes mean."""
        if self._fingerprint is None or self.training:
            return checkpoints.fingerprint(self.kind, self.config.to_json(), self._files())
        return self._fingerprint

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``; training forgets the fingerprint, because it moves the weights."""
        if mode:
            self._fingerprint = None
        return super().train(mode)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As ``nn.Module.load_state_dict``; other weights have another fingerprint."""
        self._fingerprint = None
        return super().load_state_dict(*args, **kwargs)

    def _files(self) -> dict[str, bytes]:
        state = {k: v for k, v in self.state_dict().items() if k.rsplit(".", 1)[-1] not in TRAINING_ONLY}
        half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
        return {checkpoints.WEIGHTS: checkpoints.tensors_to_bytes(half)}

    def save(self, path: str | Path) -> None:
        """Write config.json, model.safetensors (float16) and mmtok.json to a directory, atomically."""
        checkpoints.save_checkpoint(path, self.kind, self.config.to_json(), self._files())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a directory that ``save`` wrote; the weights are used in float32, in eval mode.

        Raises:
            CheckpointError: missing, damaged, of another kind, or not fitting its config.
        """
        config_json, files, state, directory = checkpoints.read_model(path, cls.kind)
        model = cls(cls.config_class.from_json(config_json))
        rest = {k: v for k, v in model.state_dict().items() if k.rsplit(".", 1)[-1] in TRAINING_ONLY}
        wide = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        checkpoints.load_strict(model, {**rest, **wide}, str(directory))
        bad = [k for k, v in wide.items() if not torch.isfinite(v).all()]
        if bad:
            raise CheckpointError(f"{directory}: {bad[0]} holds NaN or infinity; the training diverged")
        model.quantizer.restart_averages()
        model.eval()
        model._fingerprint = checkpoints.fingerprint(cls.kind, config_json, files)
        return model

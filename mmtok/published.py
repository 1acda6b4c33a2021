"""What the tokenizers that others trained have in common: frozen float32 weights, a fingerprint, save and load.

``Published`` -- the base beside that of the modality
``config_of`` -- a config out of the entries of somebody's config.json
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from mmtok import checkpoints
from mmtok.config import Config
from mmtok.errors import CheckpointError, ConfigError

C = TypeVar("C", bound=Config)


class Published(nn.Module):
    """A tokenizer that somebody else trained. A subclass sets the class variables and builds from a config."""

    kind: ClassVar[str]
    config_class: ClassVar[type[Config]]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_weights(cls, config: Config, state: Mapping[str, Tensor], where: str) -> Self:
        """A tokenizer with these weights, for use: float32, in eval mode, without gradients.

        Args:
            config: of this class.
            state: tensors under this class's names.
            where: the file, for messages.

        Raises:
            CheckpointError: tensors are missing, unexpected, misshapen or not finite.
        """
        with torch.random.fork_rng(devices=[]):  # the initial weights, which are replaced, draw random numbers
            model = cls(config)
        checkpoints.load_strict(model, state, where)  # widens to float32
        bad = next((k for k, v in model.state_dict().items() if not torch.isfinite(v).all()), None)
        if bad is not None:
            raise CheckpointError(f"{where}: {bad} holds NaN or infinity; fetch the weights again")
        return model.eval().requires_grad_(False)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config and weights: what the codes mean."""
        return checkpoints.fingerprint(self.kind, self.config.to_json(), self._files())

    def save(self, path: str | Path) -> None:
        """Write config.json, model.safetensors (float32) and mmtok.json to a directory, atomically."""
        checkpoints.save_checkpoint(path, self.kind, self.config.to_json(), self._files())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a directory that ``save`` wrote.

        Raises:
            CheckpointError: missing, damaged, of another kind, or not fitting its config.
        """
        config_json, _, state, directory = checkpoints.read_model(path, cls.kind)
        return cls.from_weights(cls.config_class.from_json(config_json), state, str(directory))

    def _files(self) -> dict[str, bytes]:
        return {checkpoints.WEIGHTS: checkpoints.tensors_to_bytes(self.state_dict())}


def config_of(config_class: type[C], settings: Any, file: Path) -> C:
    """The entries of a config.json that are fields; the rest is bookkeeping of the library that wrote it.

    Args:
        config_class: the class that has the fields.
        settings: a dictionary of JSON types.
        file: that they come from, for messages.

    Raises:
        CheckpointError: a value of the wrong type, or an impossible one.
    """
    names = {field.name for field in dataclasses.fields(config_class)}
    try:
        return config_class.from_dict({k: v for k, v in dict(settings).items() if k in names})
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be used: {error}; fetch it again") from error

"""What the trained codecs have in common: config, weights, fingerprint, save and load."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar

import torch
from torch import Tensor, nn

from mmtok import checkpoints
from mmtok.config import Config
from mmtok.errors import CheckpointError
from mmtok.quantizers import Quantizer

# Buffers of the codebooks that only training needs: they stay out of the shipped files.
TRAINING_ONLY = ("counts", "sums", "started")
TINY = 1e-30  # a row of weights below it is stored as zeros
SCALE = ".row_scale"  # follows the name of a tensor that is stored as int8


P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=nn.Module)


def exact(method: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """For encode and decode: no gradients, and the weights' own precision inside a caller's autocast block too.

    What comes out are ordinary tensors, not those of inference mode: a model may be trained on them.
    """

    @functools.wraps(method)
    def wrapped(self: M, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad(), torch.autocast(next(self.parameters()).device.type, enabled=False):
            return method(self, *args, **kwargs)

    return wrapped


def pack(state: Mapping[str, Tensor], bits: int = 16) -> dict[str, Tensor]:
    """Tensors as they are stored: float16, or with 8 bits int8 matrices and kernels and a float32 scale for each row.

    What ``unpack`` gives of the result is packed to the same bytes again.
    """
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if bits == 8 and value.is_floating_point() and value.ndim >= 2:
            rows = value.float().flatten(1)
            scale = _coarse(rows.abs().amax(1) / 127)
            steps = (rows / scale.clamp(min=TINY)[:, None]).round().clamp(-127, 127)
            out[name] = steps.to(torch.int8).view(value.shape)
            out[name + SCALE] = scale
        else:
            out[name] = value.half() if value.is_floating_point() else value
    return out


def _coarse(scale: Tensor) -> Tensor:
    """Float32 rounded to 16 bits of mantissa: its product with a step is exact, so that a row keeps its scale."""
    bits = (scale.contiguous().view(torch.int32) + 0x80) & ~0xFF
    return torch.where(scale < TINY, torch.zeros_like(scale), bits.view(torch.float32))


def unpack(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: float32 of what ``pack`` gave; a scale that is left over stays for the strict load.

    Raises:
        CheckpointError: an int8 tensor without a scale for each of its rows.
    """
    out: dict[str, Tensor] = {}
    for name, value in stored.items():
        if value.dtype == torch.int8:
            scale = stored.get(name + SCALE)
            if scale is None or scale.dtype != torch.float32 or scale.shape != value.shape[:1]:
                got = "nothing" if scale is None else f"{scale.dtype} {list(scale.shape)}"
                raise CheckpointError(f"{name}{SCALE}: got {got}, expected float32 {list(value.shape[:1])}")
            out[name] = value.float() * scale.view(-1, *[1] * (value.ndim - 1))
        elif not (name.endswith(SCALE) and stored.get(name.removesuffix(SCALE), value).dtype == torch.int8):
            out[name] = value.float() if value.is_floating_point() else value
    return out


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
        return {checkpoints.WEIGHTS: checkpoints.tensors_to_bytes(pack(state, getattr(self.config, "stored_bits", 16)))}

    def save(self, path: str | Path) -> None:
        """Write config.json, model.safetensors (see ``pack``) and mmtok.json to a directory, atomically."""
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
        try:
            wide = unpack(state)
        except CheckpointError as error:
            raise CheckpointError(f"{directory}: {error}") from error
        checkpoints.load_strict(model, {**rest, **wide}, str(directory))
        bad = [k for k, v in wide.items() if not torch.isfinite(v).all()]
        if bad:
            raise CheckpointError(f"{directory}: {bad[0]} holds NaN or infinity; the training diverged")
        model.quantizer.restart_averages()
        model.eval()
        model._fingerprint = checkpoints.fingerprint(cls.kind, config_json, files)
        return model

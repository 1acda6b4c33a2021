"""What the published audio codecs have in common.

``PublishedCodec``     -- the base: a published file or directory in, checked weights, no gradients
``build``              -- a network of somebody's package, with one error for all that can go wrong
``transformers_class`` -- such a network's class, of transformers
``read_transformers``  -- what ``save_pretrained`` of transformers wrote
``fuse_weight_norm``   -- weights as they are used, out of direction and length as they are trained
``check_positive``     -- of numbers in a config
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmtok.audio.tokenizer import AudioTokenizer
from mmtok.config import Config
from mmtok.errors import CheckpointError, ConfigError
from mmtok.published import Published
from mmtok.weights import read_directory, read_json


class PublishedCodec(Published, AudioTokenizer):
    """An audio codec that somebody else trained: float32 sounds <-> int64 codes, see ``AudioTokenizer``."""

    @classmethod
    @abstractmethod
    def from_published(cls, path: str | Path) -> Self:
        """The codec out of the file or the directory in which it was published, on this machine.

        Raises:
            CheckpointError: missing or damaged, of another model, or weights that do not fit or cannot be used.
        """

    @property
    @abstractmethod
    def codebooks(self) -> list[Tensor]:
        """float32 [size, dim] of each level: the vectors that its codes stand for."""

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes in each codebook, coarse to fine."""
        return tuple(len(book) for book in self.codebooks)

    @classmethod
    def from_weights(cls, config: Config, state: Mapping[str, Tensor], where: str) -> Self:
        """As ``Published.from_weights``; weight norm is fused, a codebook whose vectors are all equal is refused."""
        model = super().from_weights(config, fuse_weight_norm(state), where)
        for level, book in enumerate(model.codebooks):
            if torch.equal(book.amin(0), book.amax(0)):
                raise CheckpointError(
                    f"{where}: the codebook of level {level} is empty, its {len(book)} vectors are all equal; expected "
                    "trained weights: fetch them again"
                )
        return model


def build(name: str, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, without weight norm.

    Args:
        name: of the network, for messages.
        make: builds the network of somebody's package.

    Raises:
        CheckpointError: the package refuses the config.
    """
    from huggingface_hub.errors import StrictDataclassError  # transformers' error of a config

    try:
        return _without_weight_norm(make())
    except (StrictDataclassError, ValueError, TypeError, LookupError, RuntimeError, ArithmeticError) as error:
        line = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"cannot build {name}: {line}; fetch its config.json again") from error


def transformers_class(name: str) -> Any:
    """A class of transformers.

    Raises:
        CheckpointError: the version that is installed has none of this name.
    """
    import transformers  # takes a second

    found = getattr(transformers, name, None)
    if found is None:
        raise CheckpointError(
            f"transformers {transformers.__version__} has no {name}, expected 4.57 or later: pip install -U "
            "transformers"
        )
    return found


def read_transformers(directory: Path, model_type: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors of a directory that ``save_pretrained`` wrote.

    Raises:
        CheckpointError: missing or damaged, or of another type of model.
    """
    settings = read_json(directory / "config.json")
    if settings.get("model_type") != model_type:
        raise CheckpointError(
            f"{directory} holds a model of type {settings.get('model_type')!r}, expected {model_type!r}"
        )
    return settings, read_directory(directory, "model")


def fuse_weight_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``weight_g`` and ``weight_v`` of PyTorch's weight norm, under their old or new names, to ``weight``.

    The rest stays as it is, and so do pairs that do not fit each other.
    """
    new, old = ".parametrizations.weight.original{}", (".weight_g", ".weight_v")
    fused = {}
    for key, value in state.items():
        for place, name in enumerate(old):
            key = key.replace(new.format(place), name)
        fused[key] = value
    for stem in [key.removesuffix(old[1]) for key in fused if key.endswith(old[1])]:
        v, g = fused[stem + old[1]].float(), fused.get(stem + old[0], torch.empty(0)).float()
        dim = next((i for i, size in enumerate(g.shape) if size > 1), 0)
        if g.shape == tuple(size if i == dim else 1 for i, size in enumerate(v.shape)):
            fused[stem + ".weight"] = torch._weight_norm(v, g, dim)
            del fused[stem + old[0]], fused[stem + old[1]]
    return fused


def _without_weight_norm(network: nn.Module) -> nn.Module:
    """The same network, with plain weights in the place of those that weight norm computes in every pass."""
    for module in list(network.modules()):
        if parametrize.is_parametrized(module, "weight"):
            with torch.enable_grad():  # else it makes a buffer of the parameter
                parametrize.remove_parametrizations(module, "weight")
    return network


def check_positive(config: Config, *names: str) -> None:
    """Raise ConfigError unless these fields are at least 1, and so is each number of those that are tuples."""
    for name in names:
        value = getattr(config, name)
        if not value if isinstance(value, tuple) else value < 1:
            raise ConfigError(f"{type(config).__name__}.{name}: got {value}, expected at least 1")
        if isinstance(value, tuple) and min(value) < 1:
            raise ConfigError(f"{type(config).__name__}.{name}: got {value}, expected numbers from 1 up")

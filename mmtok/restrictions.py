"""What one generation may emit beyond the grammar: modalities, the segments that come next, sizes and durations.

Restriction   -- of one row, in the user's terms
Restrictions  -- of a batch, compiled to tensors by ``compile_restrictions``
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmtok.blocks import is_int
from mmtok.errors import ConfigError, VocabularyError
from mmtok.registry import MODALITIES, TokenizerSpec
from mmtok.states import EOS, FAR, FRAMES, SIZE, TURN, Bracketed, States

NEVER = 2**60  # a cost that no budget reaches


@dataclass(frozen=True)
class Restriction:
    """What one row may emit. Turns are the caller's: no <user> or <assistant> under a restriction.

    Args:
        modalities: which segments may be opened, where ``next`` does not say more.
        next: the segments that come next, in order: modalities, or names of tokenizers.
        stop: after them the document ends.
        grid: the exact image size (h, w) in codes; None for any.
        min_frames, max_frames: least and largest length of an audio segment, in frames of its codec; None for any.
        min_seconds, max_seconds: the same in seconds, for codecs that record ``sample_rate`` and ``hop``.

    Raises:
        ConfigError: an impossible value.
    """

    modalities: tuple[str, ...] = MODALITIES
    next: tuple[str, ...] = ()
    stop: bool = False
    grid: tuple[int, int] | None = None
    min_frames: int = 0
    max_frames: int | None = None
    min_seconds: float = 0.0
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.modalities, str) or any(m not in MODALITIES for m in self.modalities):
            raise ConfigError(f"modalities {self.modalities!r}, expected a tuple of {', '.join(MODALITIES)}")
        if isinstance(self.next, str):
            raise ConfigError(f"next {self.next!r}, expected a tuple of modalities or tokenizers")
        if self.grid is not None and (len(self.grid) != 2 or not all(is_int(n) and n >= 1 for n in self.grid)):
            raise ConfigError(f"grid {self.grid!r}, expected (height, width) in codes, each from 1 up")
        for unit, least, most in (
            ("frames", self.min_frames, self.max_frames),
            ("seconds", self.min_seconds, self.max_seconds),
        ):
            if not 0 <= least <= (2**31 if most is None else most) <= 2**31:
                raise ConfigError(f"min_{unit} {least}, max_{unit} {most}, expected 0 <= min <= max <= {2**31}")

    def frames(self, spec: TokenizerSpec) -> tuple[int, int]:
        """The least and the largest number of frames of a segment of this audio tokenizer.

        Raises:
            ConfigError: seconds for a tokenizer without ``sample_rate`` and ``hop``, or no number of frames fits.
        """
        least, most = self.min_frames, FAR if self.max_frames is None else self.max_frames
        if self.min_seconds or self.max_seconds is not None:
            if "sample_rate" not in spec.properties or "hop" not in spec.properties:
                raise ConfigError(
                    f"{spec.name} does not record sample_rate and hop, so seconds mean nothing to it; use frames"
                )
            rate = spec.properties["sample_rate"] / spec.properties["hop"]
            least = max(least, math.ceil(self.min_seconds * rate - 1e-9))
            if self.max_seconds is not None:
                most = min(most, math.floor(self.max_seconds * rate + 1e-9))
        if least > most:
            raise ConfigError(
                f"{spec.name}: at least {least} and at most {most} frames are asked for; no sound is like that"
            )
        return least, most


class Restrictions(NamedTuple):
    """Restrictions of a batch: R is its size, or 1 for all rows alike; S is one more than the longest ``next``."""

    row: Tensor  # int64 [R]: 0, 1, 2...
    gates: Tensor  # bool [R, S, C + 1]: the classes that may follow between segments, after so many segments
    reserve: Tensor  # int64 [R, S]: tokens that the segments still to come take at least
    last: Tensor  # int64 [1]: S - 1
    bounds: Tensor  # int64 [R, 2, N]: least and largest numbers, see states.ANY, SIZE and FRAMES
    smallest: Tensor  # int64 [R, 2]: the smallest image height and width

    def select(self, index: Tensor) -> Restrictions:
        """The restrictions of these rows, int64 [B]."""
        gates, reserve, bounds, smallest = (x[index] for x in (self.gates, self.reserve, self.bounds, self.smallest))
        return Restrictions(torch.arange(len(gates), device=gates.device), gates, reserve, self.last, bounds, smallest)


def compile_restrictions(
    states: States, rows: Sequence[Restriction | None], device: torch.device | str = "cpu"
) -> Restrictions:
    """Restrictions as tensors.

    Args:
        states: of the grammar.
        rows: None leaves a row free.
        device: where the states of the batch are.

    Raises:
        VocabularyError: an image grid that the registry has no size tokens for, or an unknown tokenizer.
        ConfigError: an empty list, or a restriction that no sequence meets.
    """
    if not rows:
        raise ConfigError("got no restrictions, expected one a row or one")
    registry, brackets = states.registry, tuple(states.brackets.items())
    audio = [b for _, b in brackets if b.modality == "audio"]
    stages = 1 + max(len(r.next) if r else 0 for r in rows)
    gates = np.zeros((len(rows), stages, len(states.names) + 1), bool)
    reserve = np.zeros((len(rows), stages), np.int64)
    bounds = np.zeros((len(rows), 2, FRAMES + len(audio)), np.int64)
    bounds[:, 1] = FAR
    smallest = np.ones((len(rows), 2), np.int64)
    for i, r in enumerate(rows):
        if r is None:
            gates[i] = True
            continue
        if r.grid is not None:
            if max(r.grid) > registry.max_grid:
                raise VocabularyError(
                    f"image grid {r.grid[0]}x{r.grid[1]}, expected at most {registry.max_grid}: make the image "
                    "smaller, or create a vocabulary with a larger max_grid"
                )
            smallest[i] = r.grid
            bounds[i, 1, SIZE] = 0  # no budget but for the smallest image, which is the exact one
        wanted = [registry.tokenizer(name) for name in r.next]
        for b in audio:
            spec = registry.tokenizer(b.tokenizer)
            reachable = "audio" in r.modalities or spec in wanted
            bounds[i, :, b.bound] = (r if reachable else replace(r, min_seconds=0.0, max_seconds=None)).frames(spec)
        height, width = (1, 1) if r.grid is None else r.grid
        by_name = {b.tokenizer: b for _, b in brackets}
        costs = [_least(by_name.get(s.name), height * width, bounds[i, 0]) for s in wanted]
        starts = {name: kind for kind, name in states.texts.items()} | {b.tokenizer: kind for kind, b in brackets}
        for j, spec in enumerate(wanted):
            if j and spec == wanted[j - 1] and spec.modality == "text":
                raise ConfigError(f"two segments of text {spec.name!r} in a row are one; give it once")
            gates[i, j, starts[spec.name]] = True
            reserve[i, j] = sum(costs[j:])
        after = gates[i, len(wanted) :]
        after[:, EOS] = True
        if not r.stop:
            after[:, [k for name, k in starts.items() if registry.tokenizer(name).modality in r.modalities]] = True
        after[:, TURN] = False
    arrays = (np.arange(len(rows)), gates, reserve, np.array([stages - 1]), bounds, smallest)
    return Restrictions(*(torch.from_numpy(a).to(device) for a in arrays))


def _least(bracket: Bracketed | None, area: int, least: np.ndarray) -> int:
    """The fewest ids of a segment; no bracket means text."""
    if bracket is None:
        return 1
    if bracket.layout is None:
        return 4 + area * len(bracket.codes)
    return 2 + bracket.layout.length(int(least[bracket.bound]))

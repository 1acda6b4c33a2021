"""Codebook layouts: residual codes [..., K, T] to flat streams and back, exactly. numpy and torch alike.

- ``Interleaved``: frame after frame, K codes each (EnCodec in AnyGPT; what our sequences hold).
- ``CodebookMajor``: all frames of level 0, then all of level 1.
- ``Delayed``: level q is shifted by ``delays[q]`` steps, the gaps hold ``fill`` (MusicGen, Copet et al. 2023; Moshi).

Convert between two of them with ``b.flatten(a.unflatten(stream))``. The inverses are strict: no modulo, no clamping,
no dropped tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmtok.arrays import first, like
from mmtok.errors import LayoutError


@dataclass(frozen=True)
class Interleaved:
    """Frame-major: position ``t * K + q`` holds code (q, t).

    Args:
        codebooks: K, from 1 up.
    """

    codebooks: int

    def __post_init__(self) -> None:
        _check_codebooks(self.codebooks)

    def flatten(self, codes: Any) -> Any:
        """[..., K, T] to [..., T * K]; the dtype stays.

        Raises:
            LayoutError: another number of codebooks.
        """
        *batch, k, t = _check_codes(codes, self.codebooks)
        return codes.swapaxes(-1, -2).reshape(*batch, t * k)

    def unflatten(self, stream: Any, levels: Any = None) -> Any:
        """[..., T * K] to [..., K, T].

        Args:
            stream: integers.
            levels: if known, the codebook level [..., T * K] of each position; it is then checked.

        Raises:
            LayoutError: an incomplete last frame, or a position of the wrong level.
        """
        *batch, n = _check_stream(stream)
        frames = _whole(n, self.codebooks)
        _check_levels(levels, self.levels(frames), stream)
        return stream.reshape(*batch, frames, self.codebooks).swapaxes(-1, -2)

    def levels(self, frames: int) -> np.ndarray:
        """int64 [T * K]: the codebook level of each position."""
        return np.tile(np.arange(self.codebooks), frames)


@dataclass(frozen=True)
class CodebookMajor:
    """Position ``q * T + t`` holds code (q, t).

    Args:
        codebooks: K, from 1 up.
    """

    codebooks: int

    def __post_init__(self) -> None:
        _check_codebooks(self.codebooks)

    def flatten(self, codes: Any) -> Any:
        """[..., K, T] to [..., K * T]; the dtype stays. Raises LayoutError as ``Interleaved`` does."""
        *batch, k, t = _check_codes(codes, self.codebooks)
        return codes.reshape(*batch, k * t)

    def unflatten(self, stream: Any, levels: Any = None) -> Any:
        """[..., K * T] to [..., K, T]. Arguments and errors as for ``Interleaved.unflatten``."""
        *batch, n = _check_stream(stream)
        frames = _whole(n, self.codebooks)
        _check_levels(levels, self.levels(frames), stream)
        return stream.reshape(*batch, self.codebooks, frames)

    def levels(self, frames: int) -> np.ndarray:
        """int64 [K * T]: the codebook level of each position."""
        return np.repeat(np.arange(self.codebooks), frames)


@dataclass(frozen=True)
class Delayed:
    """Code (q, t) at step ``t + delays[q]``; the steps, T + max(delays) of them, are then interleaved.

    Args:
        delays: steps of 0 and more, one a codebook.
        fill: the value of the positions that hold no code; it must not be a code.
    """

    delays: tuple[int, ...]
    fill: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "delays", tuple(self.delays))
        _check_codebooks(len(self.delays))
        if any(not isinstance(d, int | np.integer) or d < 0 for d in self.delays):
            raise LayoutError(f"delays {self.delays}, expected whole steps from 0 up, one a codebook")

    @property
    def codebooks(self) -> int:
        """K."""
        return len(self.delays)

    def flatten(self, codes: Any) -> Any:
        """[..., K, T] to int64 [..., (T + max(delays)) * K].

        Raises:
            LayoutError: another number of codebooks, or a code that equals ``fill``.
        """
        *batch, k, t = _check_codes(codes, self.codebooks)
        clash = codes == self.fill
        if clash.any():
            raise LayoutError(f"code {first(clash)} is {self.fill}, the fill value; choose a fill that is no code")
        shape = (*batch, k, t + max(self.delays))
        if hasattr(codes, "new_full"):
            steps = codes.long().new_full(shape, self.fill)
        else:
            steps = np.full(shape, self.fill, np.int64)
        for q, delay in enumerate(self.delays):
            steps[..., q, delay : delay + t] = codes[..., q, :]
        return Interleaved(k).flatten(steps)

    def unflatten(self, stream: Any, levels: Any = None) -> Any:
        """[..., (T + max(delays)) * K] to [..., K, T].

        Args:
            stream: integers.
            levels: if known, the codebook level of each position (-1 for a fill); it is then checked.

        Raises:
            LayoutError: an incomplete step, too few steps, a fill where a code belongs or the reverse.
        """
        *_, n = _check_stream(stream)
        frames = _whole(n, self.codebooks) - max(self.delays)
        if frames < 0:
            raise LayoutError(
                f"{n} tokens are {frames + max(self.delays)} steps, expected at least the largest delay, "
                f"{max(self.delays)} steps: the stream was cut"
            )
        expected = self.levels(frames)
        _check_levels(levels, expected, stream)
        filled = stream == self.fill
        wrong = filled != like(filled, expected < 0)
        if wrong.any():
            where = first(wrong)
            level = int(expected[where[-1] if isinstance(where, tuple) else where])
            want = f"a code of level {level}" if level >= 0 else f"the fill {self.fill}"
            raise LayoutError(
                f"position {where}: got {int(stream[where])}, expected {want}; are the delays {self.delays} right?"
            )
        steps = Interleaved(self.codebooks).unflatten(stream)
        if hasattr(stream, "new_full"):
            out = stream.new_full((*steps.shape[:-1], frames), 0)
        else:
            out = np.zeros((*steps.shape[:-1], frames), stream.dtype)
        for q, delay in enumerate(self.delays):
            out[..., q, :] = steps[..., q, delay : delay + frames]
        return out

    def levels(self, frames: int) -> np.ndarray:
        """int64 [(T + max(delays)) * K]: the codebook level of each position, -1 for a fill."""
        steps = np.full((self.codebooks, frames + max(self.delays)), -1, np.int64)
        for q, delay in enumerate(self.delays):
            steps[q, delay : delay + frames] = q
        return steps.T.reshape(-1)


def _check_codebooks(codebooks: Any) -> None:
    if not isinstance(codebooks, int | np.integer) or codebooks < 1:
        raise LayoutError(f"got {codebooks!r} codebooks, expected at least one")


def _check_codes(codes: Any, codebooks: int) -> Sequence[int]:
    """The shape [..., K, T], with K checked."""
    shape = tuple(codes.shape)
    if len(shape) < 2 or shape[-2] != codebooks:
        raise LayoutError(f"codes have shape {list(shape)}, expected [..., {codebooks}, T]")
    return shape


def _check_stream(stream: Any) -> Sequence[int]:
    shape = tuple(stream.shape)
    if not shape:
        raise LayoutError("the stream is a single number, expected an array [..., N]")
    return shape


def _whole(n: int, codebooks: int) -> int:
    """Number of whole frames in ``n`` tokens."""
    if n % codebooks:
        raise LayoutError(
            f"position {n}: the stream ends, expected level {n % codebooks} of {codebooks}: {n} tokens are "
            f"{n // codebooks} frames and {n % codebooks} tokens over"
        )
    return n // codebooks


def _check_levels(levels: Any, expected: np.ndarray, stream: Any) -> None:
    """Compare the known levels of a stream with those of the layout."""
    if levels is None:
        return
    if tuple(levels.shape) != tuple(stream.shape):
        raise LayoutError(f"levels have shape {list(levels.shape)}, expected the stream's, {list(stream.shape)}")
    wrong = levels != like(levels, expected)
    if wrong.any():
        where = first(wrong)
        level = int(expected[where[-1] if isinstance(where, tuple) else where])
        raise LayoutError(f"position {where}: got level {int(levels[where])}, expected level {level}")

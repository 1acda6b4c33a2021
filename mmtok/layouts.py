"""Codebook layouts: residual codes to flat streams and back, exactly. numpy and torch alike.

- ``Interleaved``: frame after frame, K codes each (AnyGPT's speech and music; EnCodec, Défossez et al. 2022).
- ``CodebookMajor``: all codes of level 0, then all of level 1.
- ``Delayed``: level q is shifted by ``delays[q]`` steps, the gaps hold a fill (MusicGen, Copet et al. 2023; Moshi).
- ``MultiRate``: a frame holds several codes of the finer levels, each in its slot (SNAC, Siuzdak et al. 2024).

A layout is an order of the codes with gaps: ``order`` says which code each position holds, and all else follows from
it. So ``b.flatten(a.unflatten(stream))`` converts without a codec. The inverses are strict: no modulo, no clamping, no
dropped tail. ``parse`` reads the short name that ``str`` gives: ``interleaved``, ``delayed:0,1,2,3``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmtok.arrays import blank, first, like
from mmtok.errors import LayoutError

MOST = 4096  # steps of a delay, codes of a level in a frame: no codec comes near, and a hostile file must not hang


class Layout(ABC):
    """What all layouts share.

    Codes are an array [..., K, T], K codebooks by T frames; where a frame holds several codes of a level, a sequence of
    K arrays [..., rates[q] * T]. A stream is an array [..., N].

    Attributes:
        rates: codes of each level in a frame.
        fill: the value of the positions that hold no code; None for a layout without gaps.
    """

    rates: tuple[int, ...]
    fill: int | None = None

    @property
    def size(self) -> int:
        """Codes in a frame, all levels together."""
        return sum(self.rates)

    @property
    def slot_levels(self) -> tuple[int, ...]:
        """The level of each code of a frame (of a step, where there are delays), in their order."""
        return tuple(q for q, rate in enumerate(self.rates) for _ in range(rate))

    def length(self, frames: int) -> int:
        """Positions that ``frames`` frames take."""
        return frames * self.size

    def frames(self, length: int) -> int:
        """The inverse of ``length``.

        Raises:
            LayoutError: an incomplete last frame.
        """
        return self._whole(length)

    @abstractmethod
    def order(self, frames: int) -> np.ndarray:
        """int64 [length]: which code each position holds, counted level by level; -1 for a fill."""

    def levels(self, frames: int) -> np.ndarray:
        """int64 [length]: the codebook level of each position, -1 for a fill."""
        order = self.order(frames)
        return np.where(order < 0, -1, np.searchsorted(np.cumsum(self.rates) * frames, order, side="right"))

    def flatten(self, codes: Any) -> Any:
        """Codes to a stream of their dtype, int64 where there are fills.

        Raises:
            LayoutError: another number of codebooks, levels that do not fit each other, or a code that equals ``fill``.
        """
        flat, frames = self._join(codes)
        order = self.order(frames)
        if self.fill is None:
            return flat[..., order]
        flat = flat.long() if hasattr(flat, "long") else flat.astype(np.int64)
        clash = flat == self.fill
        if clash.any():
            raise LayoutError(f"code {first(clash)} is {self.fill}, the fill value; choose a fill that is no code")
        stream = blank(flat, (*flat.shape[:-1], len(order)), wide=True)
        stream[...] = self.fill
        held = np.flatnonzero(order >= 0)
        stream[..., held] = flat[..., order[held]]
        return stream

    def unflatten(self, stream: Any, levels: Any = None) -> Any:
        """A stream to codes.

        Args:
            stream: integers [..., N].
            levels: if known, the codebook level of each position (-1 for a fill); it is then checked.

        Raises:
            LayoutError: an incomplete last frame, a position of the wrong level, a fill where a code belongs or the
                reverse.
        """
        if not tuple(stream.shape):
            raise LayoutError("the stream is a single number, expected an array [..., N]")
        frames = self.frames(stream.shape[-1])
        order = self.order(frames)
        self._check(stream, levels, frames)
        place = np.empty(frames * self.size, np.int64)
        place[order[order >= 0]] = np.flatnonzero(order >= 0)
        flat = stream[..., place]
        if set(self.rates) == {1}:
            return flat.reshape(*flat.shape[:-1], len(self.rates), frames)
        ends = np.cumsum(self.rates) * frames
        return tuple(flat[..., end - rate * frames : end] for rate, end in zip(self.rates, ends, strict=True))

    def _whole(self, length: int) -> int:
        """Number of whole frames in so many positions."""
        whole, over = divmod(length, self.size)
        if over:
            raise LayoutError(
                f"position {length}: the stream ends, expected level {self.slot_levels[over]} of {len(self.rates)}: "
                f"{length} tokens are {whole} frames and {over} tokens over"
            )
        return whole

    def _join(self, codes: Any) -> tuple[Any, int]:
        """The codes level by level, [..., size * T], and T."""
        k = len(self.rates)
        if set(self.rates) == {1}:
            shape = tuple(getattr(codes, "shape", ()))
            if len(shape) < 2 or shape[-2] != k:
                raise LayoutError(f"codes have shape {list(shape)}, expected [..., {k}, T]")
            return codes.reshape(*shape[:-2], k * shape[-1]), shape[-1]
        if not isinstance(codes, Sequence) or len(codes) != k:
            got = f"{len(codes)} arrays" if isinstance(codes, Sequence) else type(codes).__name__
            raise LayoutError(f"codes are {got}, expected a sequence of {k} arrays, one a level")
        shapes = [tuple(getattr(part, "shape", ())) for part in codes]
        if not all(shapes) or len({(shape[:-1], part.dtype) for shape, part in zip(shapes, codes, strict=True)}) > 1:
            raise LayoutError(f"levels have shapes {shapes}, expected [..., n] alike but for n, and of one dtype")
        lengths = [shape[-1] for shape in shapes]
        frames = lengths[0] // self.rates[0]
        if lengths != [rate * frames for rate in self.rates]:
            raise LayoutError(f"levels have {lengths} codes, expected {list(self.rates)} for each frame")
        flat = blank(codes[0], (*codes[0].shape[:-1], sum(lengths)))
        for part, end in zip(codes, np.cumsum(lengths), strict=True):
            flat[..., end - part.shape[-1] : end] = part
        return flat, frames

    def _check(self, stream: Any, levels: Any, frames: int) -> None:
        """Compare the levels and the fills of a stream with those of the layout."""
        if levels is not None:
            if tuple(levels.shape) != tuple(stream.shape):
                raise LayoutError(
                    f"levels have shape {list(levels.shape)}, expected the stream's, {list(stream.shape)}"
                )
            expected = self.levels(frames)
            wrong = levels != like(levels, expected)
            if wrong.any():
                where = first(wrong)
                level = int(expected[where[-1] if isinstance(where, tuple) else where])
                raise LayoutError(f"position {where}: got level {int(levels[where])}, expected level {level}")
        if self.fill is not None:
            expected = self.levels(frames)
            wrong = (stream == self.fill) != like(stream, expected < 0)
            if wrong.any():
                where = first(wrong)
                level = int(expected[where[-1] if isinstance(where, tuple) else where])
                want = f"a code of level {level}" if level >= 0 else f"the fill {self.fill}"
                raise LayoutError(
                    f"position {where}: got {int(stream[where])}, expected {want}; is the layout {self} right?"
                )


@dataclass(frozen=True)
class Interleaved(Layout):
    """Frame-major: position ``t * K + q`` holds code (q, t).

    Args:
        codebooks: K, from 1 up.
    """

    codebooks: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", (1,) * _codebooks(self.codebooks))

    def order(self, frames: int) -> np.ndarray:
        """As :meth:`Layout.order`."""
        return np.arange(self.codebooks * frames).reshape(self.codebooks, frames).T.reshape(-1)

    def flatten(self, codes: Any) -> Any:
        """As :meth:`Layout.flatten`: a transposition."""
        flat, _ = self._join(codes)
        return codes.swapaxes(-1, -2).reshape(flat.shape)

    def __str__(self) -> str:
        return "interleaved"


@dataclass(frozen=True)
class CodebookMajor(Layout):
    """All codes of level 0, then all of level 1: position ``q * T + t`` holds code (q, t).

    Args:
        codebooks: K, from 1 up.
        rates: codes of each level in a frame; by default one each.
    """

    codebooks: int
    rates: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        rates = tuple(self.rates) or (1,) * _codebooks(self.codebooks)
        if len(rates) != self.codebooks or not all(_natural(r) and 1 <= r <= MOST for r in rates):
            raise LayoutError(
                f"rates {rates}, expected {self.codebooks} whole numbers from 1 to {MOST}, one a codebook"
            )
        object.__setattr__(self, "rates", rates)

    def order(self, frames: int) -> np.ndarray:
        """As :meth:`Layout.order`."""
        return np.arange(self.length(frames))

    def __str__(self) -> str:
        return "codebook-major" + ("" if set(self.rates) == {1} else f":{_numbers(self.rates)}")


@dataclass(frozen=True)
class MultiRate(Layout):
    """Frame after frame, with several codes of a level in each: ``(0, 1, 2, 2, 1, 2, 2)`` is SNAC at three rates.

    Args:
        slots: the level of each position in a frame; all levels from 0 up must be there.
    """

    slots: tuple[int, ...]

    def __post_init__(self) -> None:
        slots = tuple(self.slots)
        if (
            not slots
            or not all(_natural(s) and s < len(slots) for s in slots)
            or set(slots) != set(range(max(slots) + 1))
        ):
            raise LayoutError(f"slots {slots}, expected the level of each position, with no level left out")
        object.__setattr__(self, "slots", slots)
        object.__setattr__(self, "rates", tuple(slots.count(q) for q in range(max(slots) + 1)))

    def order(self, frames: int) -> np.ndarray:
        """As :meth:`Layout.order`."""
        slots = np.array(self.slots)
        which = np.array([self.slots[:i].count(q) for i, q in enumerate(self.slots)])  # of its level in the frame
        start = np.cumsum([0, *self.rates])[slots] * frames + which
        return (start + np.arange(frames)[:, None] * np.array(self.rates)[slots]).reshape(-1)

    @property
    def slot_levels(self) -> tuple[int, ...]:
        """As :attr:`Layout.slot_levels`."""
        return self.slots

    def __str__(self) -> str:
        return f"multi-rate:{_numbers(self.slots)}"


@dataclass(frozen=True)
class Delayed(Layout):
    """Code (q, t) at step ``t + delays[q]``; the steps, T + max(delays) of them, are then interleaved.

    Args:
        delays: steps of 0 and more, one a codebook.
        fill: the value of the positions that hold no code; it must not be a code.
    """

    delays: tuple[int, ...]
    fill: int = -1

    def __post_init__(self) -> None:
        object.__setattr__(self, "delays", tuple(self.delays))
        if not all(_natural(d) and d <= MOST for d in self.delays):
            raise LayoutError(f"delays {self.delays}, expected whole steps from 0 to {MOST}, one a codebook")
        object.__setattr__(self, "rates", (1,) * _codebooks(len(self.delays)))

    @property
    def codebooks(self) -> int:
        """K."""
        return len(self.delays)

    def length(self, frames: int) -> int:
        """As :meth:`Layout.length`."""
        return (frames + max(self.delays)) * self.codebooks

    def frames(self, length: int) -> int:
        """As :meth:`Layout.frames`; fewer steps than the largest delay are an error too."""
        steps = self._whole(length)
        if steps < max(self.delays):
            raise LayoutError(
                f"{length} tokens are {steps} steps, expected at least the largest delay, {max(self.delays)} steps: "
                "the stream was cut"
            )
        return steps - max(self.delays)

    def order(self, frames: int) -> np.ndarray:
        """As :meth:`Layout.order`."""
        steps = np.full((self.codebooks, frames + max(self.delays)), -1, np.int64)
        for q, delay in enumerate(self.delays):
            steps[q, delay : delay + frames] = np.arange(q * frames, (q + 1) * frames)
        return steps.T.reshape(-1)

    def __str__(self) -> str:
        return f"delayed:{_numbers(self.delays)}"


def parse(name: str, codebooks: int) -> Layout:
    """The layout of a short name.

    Args:
        name: ``interleaved``, ``codebook-major``, ``codebook-major:1,2,4`` (codes of each level in a frame),
            ``delayed:0,1,2,3`` (delays), ``multi-rate:0,1,2,2,1,2,2`` (levels of the slots).
        codebooks: K, which the layout must have.

    Raises:
        LayoutError: no such layout, or one of another number of codebooks.
    """
    kind, _, rest = name.partition(":")
    kinds: dict[str, Callable[[tuple[int, ...]], Layout]] = {
        "interleaved": lambda n: Interleaved(codebooks),
        "codebook-major": lambda n: CodebookMajor(codebooks, n),
        "delayed": lambda n: Delayed(n),
        "multi-rate": lambda n: MultiRate(n),
    }
    if kind not in kinds:
        raise LayoutError(f"got layout {name!r}, expected one of {', '.join(kinds)}")
    try:
        layout = kinds[kind](tuple(int(x) for x in rest.split(",")) if rest else ())
    except ValueError as error:
        detail = error if isinstance(error, LayoutError) else "after the colon stand whole numbers and commas"
        raise LayoutError(f"got layout {name!r}: {detail}; expected such as 'delayed:0,1,2,3'") from error
    if len(layout.rates) != codebooks or str(layout) != name:
        raise LayoutError(f"layout {name!r} is for {len(layout.rates)} codebooks, expected {codebooks}")
    return layout


def _numbers(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))


def _natural(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 0)


def _codebooks(codebooks: Any) -> int:
    if not _natural(codebooks) or codebooks < 1:
        raise LayoutError(f"got {codebooks!r} codebooks, expected at least one")
    return int(codebooks)

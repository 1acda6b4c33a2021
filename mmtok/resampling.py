"""Sample rates: ``resample`` for a whole sound, ``Resampler`` for one that comes in pieces."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from scipy.signal import firwin, resample_poly
from torch import Tensor

from mmtok.errors import MediaError

SAMPLE_RATES = (1_000, 192_000)
_ZERO_CROSSINGS = 64
# Cut-off and Kaiser window of resampy's and torchaudio's "kaiser_best".
_ROWS = 256  # of the product of matrices that are held at once
_ROLLOFF, _BETA = 0.9475937167399596, 14.769656459379492


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Resample float32 [C, T] to [C, ceil(T * new_rate / rate)] with a Kaiser-windowed sinc, 64 zero crossings a side.

    Polyphase filtering keeps the filter small for any pair of rates: the dense kernel of torchaudio takes gigabytes for
    a pair without a common divisor. Where the dense kernel is small it is used, as a product of matrices.

    Raises:
        MediaError: an impossible rate.
    """
    up, down = _factors(rate, new_rate)
    if up == down or samples.shape[1] == 0:
        return samples
    return _filtered(samples, up, down)


class Resampler:
    """As ``resample``, for a sound in pieces: what ``push`` and ``finish`` give, end to end, is the whole resampled.

    Equal but for rounding; memory does not grow with the sound.

    Args:
        rate, new_rate: Hz.

    Raises:
        MediaError: an impossible rate.
    """

    def __init__(self, rate: int, new_rate: int) -> None:
        self.up, self.down = _factors(rate, new_rate)
        self._half = len(_sinc_filter(max(self.up, self.down))) // 2
        self._kept: np.ndarray | None = None  # the last inputs, from number _first, a multiple of down, on
        self._first = 0
        self._made = 0

    def push(self, samples: np.ndarray) -> np.ndarray:
        """The next samples float32 [C, n] -> those at the new rate that depend on no later ones, [C, m]."""
        held = samples if self._kept is None else np.concatenate([self._kept, samples], 1)
        got = self._first + held.shape[1]
        # Output m is centred on input m * down / up and reaches half of the filter to each side.
        return self._make(held, max(self._made, ((got - 1) * self.up - self._half) // self.down + 1))

    def finish(self) -> np.ndarray:
        """End the sound -> the samples that are still to come, float32 [C, m]."""
        held = np.zeros((1, 0), np.float32) if self._kept is None else self._kept
        return self._make(held, -(-(self._first + held.shape[1]) * self.up // self.down))

    def _make(self, held: np.ndarray, until: int) -> np.ndarray:
        if self.up == self.down:
            self._kept = held[:, held.shape[1] :]
            return held
        offset = self._first // self.down * self.up
        if until > self._made:
            out = _filtered(held, self.up, self.down)[:, self._made - offset : until - offset]
        else:
            out = np.zeros((len(held), 0), np.float32)
        self._made = until
        needed = max(0, (until * self.down - self._half) // self.up)
        drop = max(0, min(needed // self.down * self.down - self._first, held.shape[1]) // self.down * self.down)
        self._first += drop
        self._kept = held[:, drop:]
        return out


def check_rate(what: str, rate: int) -> None:
    """Raise :class:`MediaError` unless ``rate`` is an int within ``SAMPLE_RATES``; ``what`` begins the message."""
    low, high = SAMPLE_RATES
    if isinstance(rate, bool) or not isinstance(rate, int | np.integer) or not low <= rate <= high:
        raise MediaError(f"{what} is {rate!r}, expected a whole number of Hz, {low}..{high}")


def _factors(rate: int, new_rate: int) -> tuple[int, int]:
    check_rate("rate", rate)
    check_rate("new_rate", new_rate)
    divisor = math.gcd(rate, new_rate)
    return new_rate // divisor, rate // divisor


def _filtered(samples: np.ndarray, up: int, down: int) -> np.ndarray:
    """float32 [C, T] -> float32 [C, ceil(T * up / down)], with zeros around; computed in float64."""
    kernel = _kernel(up, down)
    if kernel is None:
        window = _sinc_filter(max(up, down))
        return np.stack([resample_poly(x, up, down, window=window) for x in samples]).astype(np.float32, copy=False)
    first, step, matrix = kernel
    span, made = matrix.shape
    length = -(-samples.shape[1] * up // down)
    out = np.empty((len(samples), -(-length // made), made), np.float32)
    for at in range(0, out.shape[1], _ROWS):
        rows = min(_ROWS, out.shape[1] - at)
        # Row r of the product is made of the inputs from (at + r) * step + first on.
        begin = at * step + first
        inputs = np.zeros((len(samples), (rows - 1) * step + span))
        low, high = max(0, begin), min(samples.shape[1], begin + inputs.shape[1])
        inputs[:, low - begin : high - begin] = samples[:, low:high]
        windows = torch.from_numpy(inputs).unfold(1, span, step)
        out[:, at : at + rows] = (windows @ matrix).numpy()
    return out.reshape(len(samples), -1)[:, :length]


@lru_cache(maxsize=8)
def _kernel(up: int, down: int) -> tuple[int, int, Tensor] | None:
    """The filter as a matrix float64 [span, made]: ``made`` outputs, a multiple of ``up``, of ``span`` inputs.

    Also the place of the first of these inputs, and how many inputs later the next outputs' begin. None where the
    matrix would be large.
    """
    taps = _sinc_filter(max(up, down))
    half = len(taps) // 2
    periods = -(-96 // up)  # fewer outputs together would take most inputs many times
    made, step = up * periods, down * periods
    first = -(half // up) - 1
    span = ((made - 1) * down + half) // up + 1 - first
    if made * span > 2**20:
        return None
    place = np.arange(made) * down - (np.arange(span)[:, None] + first) * up + half
    inside = (place >= 0) & (place < len(taps))
    return first, step, torch.from_numpy(np.where(inside, taps[place.clip(0, len(taps) - 1)] * up, 0.0))


@lru_cache(maxsize=4)
def _sinc_filter(factor: int) -> np.ndarray:
    """Low-pass taps at ``factor`` times the rate."""
    half = math.ceil(_ZERO_CROSSINGS * factor / _ROLLOFF)
    return firwin(2 * half + 1, _ROLLOFF / factor, window=("kaiser", _BETA))

"""Sample rates: ``resample`` for a whole sound, ``Resampler`` for one that comes in pieces."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.signal import firwin, resample_poly

from mmtok.errors import MediaError

SAMPLE_RATES = (1_000, 192_000)
_ZERO_CROSSINGS = 64
# Cut-off and Kaiser window of resampy's and torchaudio's "kaiser_best".
_ROLLOFF, _BETA = 0.9475937167399596, 14.769656459379492


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Resample float32 [C, T] to [C, ceil(T * new_rate / rate)] with a Kaiser-windowed sinc, 64 zero crossings a side.

    Polyphase filtering (scipy) keeps the filter small for any pair of rates: the dense kernel of torchaudio takes
    gigabytes for a pair without a common divisor.

    Raises:
        MediaError: an impossible rate.
    """
    up, down = _factors(rate, new_rate)
    if up == down or samples.shape[1] == 0:
        return samples
    window = _sinc_filter(max(up, down))
    return np.stack([resample_poly(x, up, down, window=window) for x in samples]).astype(np.float32, copy=False)


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
            window = _sinc_filter(max(self.up, self.down))
            rows = [
                resample_poly(x, self.up, self.down, window=window)[self._made - offset : until - offset] for x in held
            ]
            out = np.stack(rows).astype(np.float32, copy=False)
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


@lru_cache(maxsize=4)
def _sinc_filter(factor: int) -> np.ndarray:
    """Low-pass taps at ``factor`` times the rate."""
    half = math.ceil(_ZERO_CROSSINGS * factor / _ROLLOFF)
    return firwin(2 * half + 1, _ROLLOFF / factor, window=("kaiser", _BETA))

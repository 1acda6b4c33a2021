"""Reading a peer's curve between its settings: what it reaches at a rate, and which rate it needs.

Figures are interpolated linearly in the logarithm of the rate (Bjøntegaard: Calculation of average PSNR differences
between RD-curves, VCEG-M33, 2001); beyond the last setting there is no figure. A setting that costs more than another
and comes less close is never used: the peer is given its best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Point = Mapping[str, Any]


class Figure(NamedTuple):
    """How a figure is read.

    Attributes:
        digits: to which it is rounded.
        lower_is_closer: it is a distance.
    """

    digits: int = 3
    lower_is_closer: bool = False


def at_rate(points: Sequence[Point], axis: str, rate: float, figures: Mapping[str, Figure]) -> dict[str, float]:
    """The figures of a peer at exactly one rate.

    Args:
        points: its settings; a figure may be None.
        axis: the key of their rate; settings without a positive one do not count.
        rate: on that axis.
        figures: their keys.

    Returns:
        The figures, without those that the points lack; or only ``cannot_go_under`` or ``cannot_go_over``, a rate,
        where the peer has no such file.
    """
    rates = [p[axis] for p in points if p[axis] > 0]
    if not rates or rate > max(rates):
        return {"cannot_go_over": max(rates, default=0.0)}
    if rate < min(rates):
        return {"cannot_go_under": min(rates)}
    out = {}
    for key, figure in figures.items():
        curve = best_points(points, axis, key, figure)
        if not curve or curve[0][0] > rate:
            continue
        low, at_low = next((r, v) for r, v in reversed(curve) if r <= rate)
        high, at_high = next(((r, v) for r, v in curve if r > rate), (low, at_low))
        share = math.log(rate / low) / math.log(high / low) if high > low else 0.0
        out[key] = round((1 - share) * at_low + share * at_high, figure.digits)
    return out


def rate_for(points: Sequence[Point], axis: str, key: str, value: float, figure: Figure) -> dict[str, float]:
    """The rate at which a peer comes as close as ``value``: the inverse of ``at_rate`` for one figure.

    Returns:
        ``rate``; or ``at_most``, its lowest rate, where it comes closer already there; or ``more_than``, its highest,
        where it does not come as close at any.
    """
    curve = best_points(points, axis, key, figure)
    closer = [v <= value if figure.lower_is_closer else v >= value for _, v in curve]
    if not any(closer):
        return {"more_than": curve[-1][0] if curve else 0.0}
    at = closer.index(True)
    if at == 0 and curve[0][1] != value:
        return {"at_most": curve[0][0]}
    (low, at_low), (high, at_high) = curve[max(0, at - 1)], curve[at]
    share = (value - at_low) / (at_high - at_low) if at_high != at_low else 1.0
    return {"rate": round(low * (high / low) ** share, 3)}


def best_points(points: Sequence[Point], axis: str, key: str, figure: Figure) -> list[tuple[float, float]]:
    """(rate, value) of the settings that come closer than every cheaper one, in order of both."""
    sign = -1 if figure.lower_is_closer else 1
    curve: list[tuple[float, float]] = []
    have = [(p[axis], p[key]) for p in points if p[axis] > 0 and p[key] is not None]
    for rate, value in sorted(have, key=lambda x: (x[0], -sign * x[1])):
        if not curve or sign * value > sign * curve[-1][1]:
            curve.append((rate, value))
    return curve

"""Shares and what they are worth: intervals, chance, and how much of a text is right.

share        -- of right answers, with its 95% interval
binomial_p   -- how likely so many hits are by chance
shuffled     -- the same answers, judged as those to each other's questions
words        -- a text as it is compared: small letters, no punctuation
token_f1     -- how many words two texts share
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

Z = 1.959964  # of a 95% interval
SHUFFLES = 10_000


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95% interval of a share (E. B. Wilson 1927); (0, 1) of nothing."""
    if not count:
        return 0.0, 1.0
    p, z = hits / count, Z * Z / count
    middle, half = p + z / 2, Z * math.sqrt(p * (1 - p) / count + z / (4 * count))
    return max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z))


def share(hits: Sequence[bool]) -> dict[str, float | list[float] | int | None]:
    """``{"right": share, "interval": [low, high], "of": count}``; no share of nothing."""
    found, count = int(np.sum(hits)), len(hits)
    low, high = wilson(found, count)
    return {
        "right": round(found / count, 3) if count else None,
        "interval": [round(low, 3), round(high, 3)],
        "of": count,
    }


def binomial_p(hits: int, count: int, chance: float) -> float:
    """The probability of at least so many hits in ``count`` trials of probability ``chance`` each: exact, one-sided."""
    terms = (math.comb(count, k) * chance**k * (1 - chance) ** (count - k) for k in range(hits, count + 1))
    return min(1.0, math.fsum(terms))


def shuffled(scores: np.ndarray, alike: np.ndarray | None = None, seed: int = 0) -> tuple[float, float]:
    """What the same answers reach as answers to each other's questions.

    Args:
        scores: [n, n], how good answer i is as the answer to question j; more is better.
        alike: integers [n]; only questions of one number change places. None: all.
        seed: of the shuffles.

    Returns:
        (mean score of all pairs of an answer and a question, one-sided p-value of the mean on the diagonal: the share
        of ``SHUFFLES`` shuffles of the questions, and the true order, that reach it).
    """
    n = len(scores)
    if not n:
        return 0.0, 1.0
    r, rows = np.random.default_rng(seed), np.arange(n)
    orders = np.tile(rows, (SHUFFLES, 1))
    for group in [rows] if alike is None else [np.flatnonzero(alike == x) for x in np.unique(alike)]:
        orders[:, group] = r.permuted(orders[:, group], axis=1)
    reached = scores[rows, orders].sum(1) >= np.trace(scores) - 1e-9
    return float(scores.mean()), (1 + int(reached.sum())) / (1 + SHUFFLES)


def words(text: str) -> str:
    """Small letters and digits, a space between words, nothing else."""
    return " ".join(re.findall(r"\w+", text.casefold().replace("_", " ")))


def token_f1(made: str, wanted: str) -> float:
    """The harmonic mean of precision and recall of the words, each as often as it occurs."""
    a, b = words(made).split(), words(wanted).split()
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if a or b else 1.0

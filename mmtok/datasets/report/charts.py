"""Charts as inline SVG: they take the page's colour of text, and have a title that says what they show.

``shares``    -- parts of a whole as one bar
``histogram`` -- ``Sizes``, on a logarithmic axis, with marks
``heatmap``   -- pictures by width and height
``usages``    -- how much of each codebook is used
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mmtok.datasets.report.markup import Markup, tag
from mmtok.datasets.report.statistics import STEPS, Sizes

WIDTH = 760
COLOURS = {"text": "#4c78a8", "image": "#e08214", "audio": "#3f9b57", "control": "#8c8c8c"}
_MARGIN = 56
_SMALL = 12  # pixels of type


def shares(title: str, parts: Mapping[str, int]) -> Markup:
    """Parts of a whole: one bar, each with its name and share below; the names are keys of ``COLOURS``."""
    total = sum(parts.values()) or 1
    at, drawn = 0.0, []
    for i, (name, value) in enumerate(parts.items()):
        width = value / total * WIDTH
        drawn.append(_box(at, 0, width, 36, COLOURS[name], f"{name}: {value:,}"))
        x = i * WIDTH / len(parts)
        drawn.append(_box(x, 50, 12, 12, COLOURS[name]))
        drawn.append(_text(x + 18, 61, f"{name} {value / total:.1%}"))
        at += width
    return _svg(title, 70, drawn)


def histogram(
    title: str,
    sizes: Sizes,
    axis: str,
    noun: str,
    label: Callable[[float], str],
    colour: str,
    marks: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Bars over a logarithmic axis.

    Args:
        title: what it shows.
        sizes: what is drawn; at least one number.
        axis, noun: what is measured, and what is counted.
        label: a border of a bin in words.
        colour: of the bars.
        marks: (place on the axis, what is written there).
    """
    used = np.flatnonzero(sizes.counts)
    first, last = int(used[0]) // STEPS * STEPS, -(-(int(used[-1]) + 1) // STEPS) * STEPS
    step = (WIDTH - _MARGIN - 16) / (last - first)
    top, height = 28, 190
    floor, drawn = top + height, []
    most = int(sizes.counts.max())
    for value in _ticks(most):
        y = floor - value / most * height
        drawn += [_line(_MARGIN, y, WIDTH, y), _text(_MARGIN - 8, y + 4, f"{value:,}", "end")]
    for i in range(first, last):
        if count := int(sizes.counts[i]):
            size = max(1.0, count / most * height)
            about = f"{label(sizes.edge(i))} to {label(sizes.edge(i + 1))}: {count:,} {noun}"
            drawn.append(_box(_MARGIN + (i - first) * step + 1, floor - size, step - 2, size, colour, about))
    each = STEPS * math.ceil(44 / (step * STEPS))
    drawn += [
        _text(_MARGIN + (i - first) * step, floor + 18, label(sizes.edge(i)), "middle")
        for i in range(first, last + 1, each)
    ]
    drawn.append(_text((WIDTH + _MARGIN) / 2, floor + 38, axis, "middle"))
    for place, words in marks:
        x = _MARGIN + (math.log2(place / sizes.least) * STEPS - first) * step
        if _MARGIN < x < _MARGIN + (last - first) * step:
            drawn += [_line(x, top - 6, x, floor, "4 3", 0.7), _text(x, top - 12, words, "middle")]
    return _svg(title, floor + 46, drawn)


def heatmap(title: str, counts: np.ndarray, label: Callable[[float], str], edge: Callable[[int], float]) -> Markup:
    """Pictures by width (to the right) and height (upwards), the more the darker.

    Args:
        title: what it shows.
        counts: int64 [bins, bins], by height and width, at least one of them above 0.
        label: a number of pixels in words.
        edge: where a bin begins, in pixels.
    """
    used = np.flatnonzero(counts.any(0) | counts.any(1))
    first, last = int(used[0]) // STEPS * STEPS, -(-(int(used[-1]) + 1) // STEPS) * STEPS
    side = min(34.0, 400 / (last - first))
    far, top = (last - first) * side, 8
    drawn, most = [], int(counts.max())
    for row, column in np.argwhere(counts).tolist():
        count = int(counts[row, column])
        spans = [f"{label(edge(i))} to {label(edge(i + 1))}" for i in (column, row)]
        about = f"{spans[0]} pixels wide, {spans[1]} high: {count:,} images"
        x, y = _MARGIN + (column - first) * side, top + far - (row - first + 1) * side
        shade = 0.15 + 0.85 * math.sqrt(count / most)
        drawn.append(_box(x, y, side, side, COLOURS["image"], about, f"{shade:.3f}"))
    for i in range(0, last - first + 1, STEPS * math.ceil(44 / (side * STEPS))):
        words, x = label(edge(first + i)), i * side
        drawn += [
            _line(_MARGIN + x, top, _MARGIN + x, top + far),
            _line(_MARGIN, top + far - x, _MARGIN + far, top + far - x),
            _text(_MARGIN + x, top + far + 18, words, "middle"),
            _text(_MARGIN - 8, top + far - x + 4, words, "end"),
        ]
    drawn.append(_text(_MARGIN + far / 2, top + far + 38, "width in pixels", "middle"))
    drawn.append(_text(_MARGIN + far + 12, top + far / 2, "height in pixels, upwards"))
    return _svg(title, top + far + 46, drawn)


def usages(title: str, rows: Sequence[tuple[str, str, float, float]]) -> Markup:
    """Two bars for each codebook: pale, the share of its codes that occur; dark, its perplexity over its size.

    Args:
        title: what it shows.
        rows: (name, a key of ``COLOURS``, share that occurs, perplexity over size), shares 0..1.
    """
    left, right, each = 150, 60, 26
    room, drawn = WIDTH - left - right, []
    for i, (name, modality, used, perplexity) in enumerate(rows):
        y = i * each
        about = f"{name}: {used:.1%} of the codes occur, perplexity {perplexity:.1%} of their number"
        drawn += [
            _text(left - 10, y + 15, name if len(name) <= 20 else f"{name[:19]}…", "end"),
            _box(left, y + 3, room, 16, "currentColor", about, "0.08"),
            _box(left, y + 3, room * used, 16, COLOURS[modality], about, "0.45"),
            _box(left, y + 7, room * perplexity, 8, COLOURS[modality], about),
            _text(left + room + 8, y + 15, f"{used:.0%}"),
        ]
    return _svg(title, len(rows) * each, drawn)


def _ticks(most: int) -> list[int]:
    """Some round numbers from 0 to ``most``."""
    raw = max(1.0, most / 4)
    power = 10 ** math.floor(math.log10(raw))
    step = int(next(power * m for m in (1, 2, 5, 10) if power * m >= raw))
    return list(range(0, most + 1, step))


def _svg(title: str, height: float, drawn: Sequence[Markup]) -> Markup:
    return tag(
        "svg", tag("title", title), *drawn, xmlns="http://www.w3.org/2000/svg", role="img", aria_label=title,
        viewBox=f"0 0 {WIDTH} {height:.0f}", width=WIDTH, height=f"{height:.0f}", font_size=_SMALL,
        font_family="system-ui, sans-serif", fill="currentColor",
    )  # fmt: skip


def _box(
    x: float, y: float, width: float, height: float, colour: str, about: str = "", opacity: str | None = None
) -> Markup:
    title = [tag("title", about)] if about else []
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{max(0.0, width):.1f}", "height": f"{height:.1f}"}
    return tag("rect", *title, **place, fill=colour, fill_opacity=opacity)


def _text(x: float, y: float, words: str, anchor: str | None = None) -> Markup:
    return tag("text", words, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _line(x1: float, y1: float, x2: float, y2: float, dashes: str | None = None, opacity: float = 0.15) -> Markup:
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    return tag(
        "line", **{k: f"{v:.1f}" for k, v in ends.items()}, stroke="currentColor", stroke_dasharray=dashes,
        stroke_opacity=opacity,
    )  # fmt: skip

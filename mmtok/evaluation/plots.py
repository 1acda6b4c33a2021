"""Pictures of a report: the rate-distortion plot, and a contact sheet of what came back."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

CELL = 160  # pixels a side of a contact sheet's pictures
EACH = 4  # pictures of each kind: best, median, worst
_LINE, _GAP, _TEXT = 16, 8, 12  # pixels
_PEER_COLOURS = {"JPEG": "tab:gray", "WEBP": "tab:olive", "AVIF": "tab:cyan"}


def rate_distortion(report: dict[str, Any]) -> bytes | None:
    """A PNG of PSNR and SSIM over bits a pixel: a curve for each peer, a labelled point for each tokenizer.

    Peers are drawn with the bytes that share their header: over a mosaic, where sizes differ less a blank picture. A
    tokenizer's full point is at its nominal bits, the hollow one at its adaptive bits; the first levels of a residual
    quantizer are joined to it by a line.

    Args:
        report: of :func:`mmtok.evaluation.images.image_report`.

    Returns:
        None without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
    except ImportError:
        return None
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, key, label in zip(
        panels, ("psnr_of_mean_error_db", "ssim"), ("PSNR of the mean squared error, dB", "SSIM"), strict=True
    ):
        for form, curves in report["peers"].items():
            kind = "mosaic" if "mosaic" in curves else "minus_blank"
            points = [p for p in curves[kind] if p["bits_per_pixel"] > 0 and p[key] is not None]
            points.sort(key=lambda p: p["bits_per_pixel"])
            axes.plot(
                [p["bits_per_pixel"] for p in points], [p[key] for p in points], ".-",
                color=_PEER_COLOURS[form], label=f"{form}, {kind.replace('_', ' ')}",
            )  # fmt: skip
        for number, (name, figures) in enumerate(report["tokenizers"].items()):
            if figures[key] is None:
                continue
            colour = f"C{(3 * number + 3) % 10}"
            steps = [p for p in figures["prefixes"] if p[key] is not None]
            axes.plot([p["bits_per_pixel"] for p in steps], [p[key] for p in steps], "x--", color=colour)
            axes.plot(figures["bits_per_pixel"], figures[key], "o", color=colour)
            axes.plot(figures["adaptive_bits_per_pixel"], figures[key], "o", color=colour, mfc="none")
            # A dollar would begin a formula.
            axes.annotate(
                name.replace("$", r"\$"), (figures["bits_per_pixel"], figures[key]), (6, -12 - 11 * number),
                textcoords="offset points", color=colour,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("bits per pixel (tokenizers: full nominal, hollow adaptive)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3, which="both")
        if report["peers"]:
            axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def best_median_worst(scores: Sequence[float], each: int = EACH) -> list[tuple[str, list[int]]]:
    """Indices of the highest, middle and lowest scores, ``each`` at most, none twice, each group from high to low."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    k = max(1, min(each, len(order) // 3))
    best, rest = order[:k], order[k:]
    worst, rest = rest[len(rest) - min(k, len(rest)) :], rest[: len(rest) - min(k, len(rest))]
    middle = (len(rest) - min(k, len(rest))) // 2
    groups = (("best", best), ("median", rest[middle : middle + k]), ("worst", worst))
    return [(name, group) for name, group in groups if group]


def contact_sheet(
    scores: dict[str, list[float]],
    names: Sequence[str],
    original: Callable[[int], np.ndarray],
    reconstruction: Callable[[str, int], np.ndarray],
) -> np.ndarray:
    """Best, median and worst pictures: the original above what came back through each tokenizer.

    Args:
        scores: PSNR in dB of every picture, by tokenizer; the first one's choose the pictures.
        names: of the pictures.
        original: index -> uint8 [3, H, W].
        reconstruction: (tokenizer, index) -> uint8 [3, H, W].

    Returns:
        uint8 [3, H, W].
    """
    groups = best_median_worst(next(iter(scores.values())))
    columns = sum(len(group) for _, group in groups)
    rows = 1 + len(scores)
    width = columns * (CELL + _GAP) + (len(groups) - 1) * 2 * _GAP + _GAP
    height = _LINE + rows * (CELL + _LINE + _GAP) + _GAP
    sheet = PILImage.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT)

    def write(x: int, y: int, text: str, room: int) -> None:
        text = text.encode("latin-1", "replace").decode("latin-1")  # all that every font of Pillow has
        while pen.textlength(text, font) > room:
            text = text[1:]  # the end says more than the folder
        pen.text((x, y), text, "black", font)

    x = _GAP
    for group, indices in groups:
        write(x, 2, group, CELL)
        for i in indices:
            _paste(sheet, original(i), x, _LINE)
            write(x, _LINE + CELL, names[i], CELL)
            for row, (tokenizer, values) in enumerate(scores.items(), 1):
                y = _LINE + row * (CELL + _LINE + _GAP)
                _paste(sheet, reconstruction(tokenizer, i), x, y)
                label = f"{values[i]:.2f} dB"
                room = CELL - int(pen.textlength(f"  {label}", font))
                pen.text((x, y + CELL), label, "black", font)
                if len(scores) > 1:
                    write(x + CELL - room, y + CELL, tokenizer, room)
            x += CELL + _GAP
        x += 2 * _GAP
    return np.ascontiguousarray(np.asarray(sheet).transpose(2, 0, 1))


def _paste(sheet: PILImage.Image, pixels: np.ndarray, x: int, y: int) -> None:
    """Small pictures enlarged by a whole factor, so that their pixels can be seen; large ones made smaller."""
    image = PILImage.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    factor = CELL // max(image.size)
    if factor:
        image = image.resize((image.width * factor, image.height * factor), PILImage.Resampling.NEAREST)
    else:
        image.thumbnail((CELL, CELL), PILImage.Resampling.LANCZOS)
    sheet.paste(image, (x + (CELL - image.width) // 2, y + (CELL - image.height) // 2))
    ImageDraw.Draw(sheet).rectangle((x - 1, y - 1, x + CELL, y + CELL), outline="#dddddd")

"""Pictures of a report: plots over the rate, spectrograms, and a sheet of originals over what came back."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from torchaudio.functional import melscale_fbanks

from mmtok import media
from mmtok.evaluation.fidelity import FIGURES
from mmtok.evaluation.rates import best_points

CELL = 160  # pixels a side of a contact sheet's pictures
EACH = 4  # pictures of each kind: best, median, worst
SPECTROGRAM = (320, 160)  # pixels of width and height
_LINE, _GAP, _TEXT = 16, 8, 12  # pixels
_HEAT = ((0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191))  # from silent to loud
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
    labels = {"psnr_of_mean_error_db": "PSNR of the mean squared error, dB", "ssim": "SSIM"}
    drawn = _panels(list(labels.values()), "bits per pixel (tokenizers: full nominal, hollow adaptive)")
    if drawn is None:
        return None
    figure, panels = drawn
    for axes, key in zip(panels, labels, strict=True):
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
            _name(axes, name, number, colour, (figures["bits_per_pixel"], figures[key]))
        if report["peers"]:
            axes.legend()
    return _png(figure)


def rate_fidelity(report: dict[str, Any]) -> bytes | None:
    """A PNG of STOI and PESQ over kb/s: the best of Opus as a curve, a labelled line of levels for each tokenizer.

    Args:
        report: of :func:`mmtok.evaluation.sounds.sound_report`.

    Returns:
        None without matplotlib.
    """
    labels = {"stoi": "STOI", "pesq_wb": "PESQ-WB"}
    drawn = _panels(list(labels.values()), "kb/s (tokenizers: by levels, full nominal, hollow adaptive)")
    if drawn is None:
        return None
    figure, panels = drawn
    for axes, key in zip(panels, labels, strict=True):
        for form, points in report["peers"].get("opus", {}).items():
            curve = best_points(points, "kilobits_per_second", key, FIGURES[key])
            axes.plot([r for r, _ in curve], [v for _, v in curve], ".-", color="tab:gray", label=f"Opus, {form}")
        for number, (name, figures) in enumerate(report["tokenizers"].items()):
            steps = [p for p in figures["prefixes"] if p[key] is not None]
            if not steps:
                continue
            colour = f"C{(3 * number + 3) % 10}"
            for rate, style in (("kilobits_per_second", "o--"), ("adaptive_kilobits_per_second", "o")):
                mfc = colour if rate == "kilobits_per_second" else "none"
                axes.plot([p[rate] for p in steps], [p[key] for p in steps], style, color=colour, mfc=mfc)
            _name(axes, name, number, colour, (steps[-1]["kilobits_per_second"], steps[-1][key]))
        if report["peers"]:
            axes.legend()
    return _png(figure)


def spectrogram(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """A picture of a sound: its log-mel magnitudes over 80 dB, low bands at the bottom, all of it in one width.

    Args:
        samples: float32 [C, T], T at least 1; channels are averaged.
        sample_rate: Hz.

    Returns:
        uint8 [3, ``SPECTROGRAM[1]``, ``SPECTROGRAM[0]``].
    """
    x = torch.from_numpy(np.ascontiguousarray(samples.mean(0)))
    size, (width, height) = 1024, SPECTROGRAM
    hop = max(1, len(x) // width)
    frames = torch.nn.functional.pad(x, (size // 2, size // 2 + hop)).unfold(0, size, hop) * torch.hann_window(size)
    bank = melscale_fbanks(size // 2 + 1, 0.0, sample_rate / 2, 80, sample_rate, norm="slaney", mel_scale="slaney")
    level = 20 * (torch.fft.rfft(frames).abs() @ bank).clamp_min(1e-6).log10()
    share = ((level - level.max()) / 80 + 1).clamp(0, 1).T.flip(0).numpy()
    stops = np.linspace(0, 1, len(_HEAT))
    picture = np.stack([np.interp(share, stops, [c[i] for c in _HEAT]) for i in range(3)])
    return media.resize_image(picture.round().astype(np.uint8), height, width)


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
    cell: tuple[int, int] = (CELL, CELL),
    each: int = EACH,
    form: str = "{:.2f} dB",
) -> np.ndarray:
    """Best, median and worst pictures: the original above what came back through each tokenizer.

    Args:
        scores: of every picture, by tokenizer, high is good; the first one's choose the pictures.
        names: of the pictures.
        original: index -> uint8 [3, H, W].
        reconstruction: (tokenizer, index) -> uint8 [3, H, W].
        cell: pixels of width and height that a picture has.
        each: how many best, median and worst ones at most.
        form: how a score is written.

    Returns:
        uint8 [3, H, W].
    """
    groups = best_median_worst(next(iter(scores.values())), each)
    columns = sum(len(group) for _, group in groups)
    rows = 1 + len(scores)
    width = columns * (cell[0] + _GAP) + (len(groups) - 1) * 2 * _GAP + _GAP
    height = _LINE + rows * (cell[1] + _LINE + _GAP) + _GAP
    sheet = PILImage.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT)

    def write(x: int, y: int, text: str, room: int) -> None:
        text = text.encode("latin-1", "replace").decode("latin-1")  # all that every font of Pillow has
        while pen.textlength(text, font) > room:
            text = text[1:]  # the end says more than the folder
        pen.text((x, y), text, "black", font)

    x = _GAP
    for group, indices in groups:
        write(x, 2, group, cell[0])
        for i in indices:
            _paste(sheet, original(i), x, _LINE, cell)
            write(x, _LINE + cell[1], names[i], cell[0])
            for row, (tokenizer, values) in enumerate(scores.items(), 1):
                y = _LINE + row * (cell[1] + _LINE + _GAP)
                _paste(sheet, reconstruction(tokenizer, i), x, y, cell)
                label = form.format(values[i])
                room = cell[0] - int(pen.textlength(f"  {label}", font))
                pen.text((x, y + cell[1]), label, "black", font)
                if len(scores) > 1:
                    write(x + cell[0] - room, y + cell[1], tokenizer, room)
            x += cell[0] + _GAP
        x += 2 * _GAP
    return np.ascontiguousarray(np.asarray(sheet).transpose(2, 0, 1))


def _paste(sheet: PILImage.Image, pixels: np.ndarray, x: int, y: int, cell: tuple[int, int]) -> None:
    """Small pictures enlarged by a whole factor, so that their pixels can be seen; large ones made smaller."""
    image = PILImage.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    width, height = cell
    factor = min(width // image.width, height // image.height)
    if factor:
        image = image.resize((image.width * factor, image.height * factor), PILImage.Resampling.NEAREST)
    else:
        image.thumbnail(cell, PILImage.Resampling.LANCZOS)
    sheet.paste(image, (x + (width - image.width) // 2, y + (height - image.height) // 2))
    ImageDraw.Draw(sheet).rectangle((x - 1, y - 1, x + width, y + height), outline="#dddddd")


def _panels(labels: Sequence[str], rate: str) -> tuple[Any, Any] | None:
    """A figure with axes side by side, one for each label, over a logarithmic rate; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
    except ImportError:
        return None
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    panels = figure.subplots(1, len(labels))
    for axes, label in zip(panels, labels, strict=True):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(rate)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3, which="both")
    return figure, panels


def _name(axes: Any, name: str, number: int, colour: str, place: tuple[float, float]) -> None:
    """Write a tokenizer's name below its point, those of several one below the other."""
    text = name.replace("$", r"\$")  # a dollar would begin a formula
    axes.annotate(text, place, (6, -12 - 11 * number), textcoords="offset points", color=colour)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()

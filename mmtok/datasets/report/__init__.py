"""A token dataset as one HTML page that a person can read, look at and listen to; it needs no other file.

``write_report`` -- a dataset -> the page

The page has no script and loads nothing: charts are inline SVG, pictures and sounds data URIs, and its own policy
(https://www.w3.org/TR/CSP3) forbids the rest. Everything that comes from the dataset is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmtok.checkpoints import atomic_write
from mmtok.datasets.report import charts
from mmtok.datasets.report.markup import Markup, join, table, tag
from mmtok.datasets.report.samples import Gallery, Spectrogram, choose
from mmtok.datasets.report.statistics import CONTEXTS, Statistics, gather, usage
from mmtok.datasets.shards import TokenDataset
from mmtok.errors import MmtokError
from mmtok.multimodal import MultimodalTokenizer
from mmtok.registry import MODALITIES

_REASONS = 25  # kinds of reasons that are listed
_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 0 auto; padding: 1.5rem; }
h1, h2, h3 { line-height: 1.2; text-wrap: balance; overflow-wrap: anywhere; }
h2 { margin-top: 3rem; border-bottom: 1px solid #8886; padding-bottom: .3rem; }
svg, img { max-width: 100%; height: auto; }
img { image-rendering: pixelated; background: #8882; }
audio { display: block; width: 100%; max-width: 22rem; margin: .4rem 0; }
table { border-collapse: collapse; margin: 1.2rem 0; display: block; overflow-x: auto; }
caption, figcaption { text-align: left; font-weight: 600; padding: .2rem 0; }
th, td { text-align: left; padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid #8884; vertical-align: top; }
th { font-weight: 500; min-width: 6rem; }
thead th { font-size: .85rem; opacity: .75; min-width: 0; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
article { border: 1px solid #8886; border-radius: .5rem; padding: 0 1.2rem .8rem; margin: 1.2rem 0; }
figure { margin: .6rem 0; min-width: 0; }
blockquote { margin: .6rem 0 0; padding-left: .8rem; border-left: 3px solid #4c78a8; white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: isolate; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1.2rem; }
.note { font-size: .85rem; opacity: .8; margin: .2rem 0; overflow-wrap: anywhere; }
.turn { font-weight: 600; margin: .8rem 0 0; }
.fault { color: light-dark(#a11, #f88); overflow-wrap: anywhere; }
"""


def write_report(
    dataset: TokenDataset,
    out: str | Path,
    samples: int = 12,
    seed: int = 0,
    spectrogram: Spectrogram | None = None,
    advance: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Write the page, atomically. It has at most ``MEDIA_BYTES`` of pictures and sounds, whatever the dataset.

    Args:
        dataset: with its tokenizers in it, beside it or bundled, to show what ids decode to.
        out: the file.
        samples: how many documents to show, from 0 up.
        seed: of their draw.
        spectrogram: draws sounds; None to draw none.
        advance: is told how many more documents were counted.

    Returns:
        JSON-able: documents, tokens, tokens of each modality, the documents shown, originals that are gone, why nothing
        is decoded (empty if it is), bytes of the page.

    Raises:
        DataError: a block of a file is damaged.
    """
    statistics = gather(dataset, seed, advance)
    tokenizer, why = None, ""
    try:
        tokenizer = MultimodalTokenizer.load(dataset.path) if samples else None
    except MmtokError as error:
        why = str(error)
    gallery = Gallery(dataset, tokenizer, spectrogram)
    chosen = choose(dataset, statistics, samples, seed)
    shown = [gallery.document(number) for number in chosen]
    name = dataset.path.resolve().name
    parts = [
        tag("h1", name),
        _counts(dataset, statistics),
        _tokens(statistics),
        _documents(statistics),
        _media(statistics),
        _codebooks(statistics),
        _quarantine(statistics),
        _samples(shown, why),
        _settings(dataset),
    ]
    page = Markup("<!DOCTYPE html>\n") + tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("title", f"{name}: token dataset"),
            tag("style", Markup(_STYLE)),
        ),
        tag("body", tag("main", *parts)),
        lang="en",
    )
    data = page.encode() + b"\n"
    atomic_write(out, data)
    return {
        "documents": len(dataset),
        "tokens": dataset.tokens,
        "modalities": statistics.modalities(),
        "quarantined": sum(statistics.reasons.values()),
        "samples": chosen,
        "missing_originals": gallery.missing,
        "not_decoded": why,
        "bytes": len(data),
    }


def quantity(value: float) -> str:
    """A number with at most three digits behind the point, fewer of a large one: 1,234, 56.7, 0.123."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 3}f}" if value % 1 else f"{value:,.0f}"


def _counts(dataset: TokenDataset, statistics: Statistics) -> Markup:
    left_out = sum(statistics.reasons.values())
    rows = [
        ("documents", f"{len(dataset):,}"),
        ("tokens", f"{dataset.tokens:,}"),
        ("shards", f"{len(dataset.shards):,} of {dataset.dtype.name}"),
        ("images", f"{statistics.sides[0].number:,}"),
        ("audio", f"{statistics.seconds.total / 3600:,.2f} hours in {statistics.seconds.number:,} sounds"),
        ("left out, in quarantine", f"{left_out:,} documents"),
        ("vocabulary", dataset.registry.fingerprint),
        ("dataset", dataset.fingerprint),
    ]
    return table("Counts", (), rows)


def _tokens(statistics: Statistics) -> Markup:
    words = {"text": ("bytes", 1.0), "image": ("pixels", 1.0), "audio": ("seconds", 1.0)}
    total = max(1, statistics.lengths.total)
    rows = []
    for i, spec in enumerate(statistics.registry.tokenizers):
        tokens, units = int(statistics.span_tokens[i]), float(statistics.units[i])
        noun = words[spec.modality][0]
        rate = f"{quantity(tokens / units)} a second" if noun == "seconds" and units else ""
        rate = f"{quantity(units / tokens)} {noun} a token" if tokens and not rate else rate
        rows.append(
            (spec.name, spec.modality, f"{statistics.spans[i]:,}", f"{tokens:,}", f"{tokens / total:.1%}",
             f"{quantity(units)} {noun}", rate if tokens else "")
        )  # fmt: skip
    header = ("tokenizer", "modality", "segments", "tokens with brackets", "share", "of", "density")
    modalities = statistics.modalities()
    drawn = [charts.shares("Share of the modalities in the tokens", modalities)] if modalities else []
    return tag("section", tag("h2", "Tokens"), *drawn, table("Tokens by tokenizer", header, rows))


def _documents(statistics: Statistics) -> Markup:
    lengths, count = statistics.lengths, max(1, statistics.lengths.number)
    parts = []
    if lengths.number:
        about = (
            f"{quantity(lengths.mean)} tokens on average, from {lengths.smallest:,.0f} to {lengths.largest:,.0f}. "
            "Dashed: context lengths, with the share of documents that are longer."
        )
        marks = [(float(c), f"{statistics.beyond[c][0] / count:.0%}") for c in CONTEXTS]
        colour = charts.COLOURS["text"]
        parts = [
            charts.histogram(
                "Tokens of a document", lengths, "tokens of a document", "documents", _binary, colour, marks
            ),
            tag("p", about, class_="note"),
        ]
    rows = []
    for c, (n, cut) in statistics.beyond.items():
        rows.append((f"{c:,}", f"{n:,}", f"{n / count:.2%}", f"{cut:,}", f"{cut / max(1, lengths.total):.2%}"))
        if not n:
            break
    header = ("context length", "documents longer", "share", "tokens beyond", "share of all")
    parts.append(table("Documents and context lengths", header, rows))
    kinds = [
        (" and ".join(m for i, m in enumerate(MODALITIES) if kind >> i & 1) or "nothing", f"{n:,}", f"{n / count:.1%}")
        for kind, n in statistics.kinds.most_common()
    ]
    parts.append(table("What documents hold", ("modalities", "documents", "share"), kinds))
    return tag("section", tag("h2", "Documents"), *parts)


def _media(statistics: Statistics) -> Markup:
    parts = []
    height, width = statistics.sides
    if width.number:
        about = (
            f"{width.number:,} images, {quantity(width.mean)} pixels wide and {quantity(height.mean)} high on average, "
            f"from {width.smallest:.0f}x{height.smallest:.0f} to {width.largest:.0f}x{height.largest:.0f}."
        )
        chart = charts.heatmap("Sizes of the images", statistics.pixels, _binary, width.edge)
        parts.append(tag("section", tag("h2", "Images"), chart, tag("p", about, class_="note")))
    if statistics.seconds.number:
        seconds = statistics.seconds
        about = (
            f"{seconds.number:,} sounds, {quantity(seconds.mean)} s on average, from {quantity(seconds.smallest)} to "
            f"{quantity(seconds.largest)} s, {quantity(seconds.total / 3600)} hours together."
        )
        colour = charts.COLOURS["audio"]
        chart = charts.histogram("Lengths of the sounds", seconds, "seconds", "sounds", _decimal, colour)
        parts.append(tag("section", tag("h2", "Audio"), chart, tag("p", about, class_="note")))
    return join(parts)


def _codebooks(statistics: Statistics) -> Markup:
    rows, bars = [], []
    for block in statistics.registry.blocks:
        counts = statistics.of(block)
        if not block.tokenizer or not counts.any():
            continue
        used, perplexity = usage(counts)
        bars.append((block.name, block.modality, used, perplexity / block.size))
        rows.append(
            (block.name, block.tokenizer, f"{counts.sum():,}", f"{block.size:,}", f"{used:.1%}", f"{perplexity:,.1f}")
        )
    if not rows:
        return Markup()
    about = "Pale: the share of a codebook's codes that occur. Dark: its perplexity over its size."
    header = ("block", "tokenizer", "codes seen", "size", "occur", "perplexity")
    return tag(
        "section", tag("h2", "Codebooks"), charts.usages("How much of each codebook is used", bars),
        tag("p", about, class_="note"), table("Use of the codebooks", header, rows),
    )  # fmt: skip


def _quarantine(statistics: Statistics) -> Markup:
    if not statistics.reasons:
        return Markup()
    rows = [
        (reason, f"{n:,}", str(statistics.examples[reason].get("id")), str(statistics.examples[reason].get("reason")))
        for reason, n in statistics.reasons.most_common(_REASONS)
    ]
    header = ("kind of reason", "documents", "for example", "whose reason was")
    parts = [table("Documents that were left out", header, rows)]
    if (more := len(statistics.reasons) - _REASONS) > 0:
        parts.append(tag("p", f"and {more} more kinds of reasons", class_="note"))
    return tag("section", tag("h2", "Quarantine"), *parts)


def _samples(shown: list[Markup], why: str) -> Markup:
    if not shown:
        return Markup()
    note = [tag("p", f"Nothing is decoded, as the tokenizers are not at hand: {why}", class_="fault")] if why else []
    return tag("section", tag("h2", "Samples"), *note, *shown)


def _settings(dataset: TokenDataset) -> Markup:
    if not dataset.settings:
        return Markup()
    text = json.dumps(dataset.settings, indent=1, ensure_ascii=False)
    return tag("section", tag("h2", "How it was made"), tag("pre", text))


def _binary(value: float) -> str:
    """1024 -> 1k, 2 ** 20 -> 1M; other numbers as they are."""
    for unit, name in ((2**30, "G"), (2**20, "M"), (2**10, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def _decimal(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"

"""Documents of a token dataset to look at and listen to: each segment as it was and as its ids decode.

``choose``  -- which documents
``Gallery`` -- draws them as HTML
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import soundfile
from PIL import Image as PILImage

from mmtok import media
from mmtok.datasets.report.markup import Markup, embedded, join, tag
from mmtok.datasets.report.statistics import Statistics
from mmtok.datasets.shards import TokenDataset
from mmtok.datasets.sources.content import local_copy
from mmtok.documents import Text
from mmtok.errors import DataError, MmtokError
from mmtok.grammar import Grammar, Span
from mmtok.multimodal import MultimodalTokenizer

SIDE = 320  # pixels: larger pictures are shown smaller
SECONDS = 10.0  # of a sound that are decoded and played
CHARACTERS = 1200  # of a text
SEGMENTS = 8  # of a document
MEDIA_BYTES = 24 * 2**20  # of all pictures and sounds together, before base64 adds a third

Spectrogram = Callable[[np.ndarray, int], np.ndarray]
"""float32 [C, T] and a rate in Hz -> a picture, uint8 [3, H, W]."""


def choose(dataset: TokenDataset, statistics: Statistics, count: int, seed: int) -> list[int]:
    """Numbers of up to ``count`` documents, rising: spread over the dataset, one at least with each tokenizer.

    Args:
        dataset: any.
        statistics: of it, by ``gather`` with the same seed.
        count: how many, from 0 up.
        seed: of the draw; the same gives the same documents.
    """
    if count >= len(dataset):
        return list(range(len(dataset)))
    rng = np.random.default_rng(seed)
    chosen = set(list(statistics.samples.values())[:count])
    borders = np.linspace(0, len(dataset), count - len(chosen) + 1).astype(np.int64).tolist()
    chosen |= {int(rng.integers(low, high)) for low, high in itertools.pairwise(borders)}
    while len(chosen) < count:  # some were the same
        chosen.add(int(rng.integers(len(dataset))))
    return sorted(chosen)


class Gallery:
    """Documents as HTML.

    Args:
        dataset: where they are.
        tokenizer: what decodes them; None to show the originals alone.
        spectrogram: how a sound is drawn; None to draw none.

    Attributes:
        missing: how many originals could not be read.
    """

    def __init__(
        self, dataset: TokenDataset, tokenizer: MultimodalTokenizer | None, spectrogram: Spectrogram | None = None
    ) -> None:
        self.dataset, self.tokenizer, self.spectrogram = dataset, tokenizer, spectrogram
        self.grammar = Grammar(dataset.registry)
        self.missing = 0
        self._left = MEDIA_BYTES

    def document(self, number: int) -> Markup:
        """A document: its id, its other keys, and its segments, ``SEGMENTS`` of them at most."""
        meta, ids = self.dataset.meta(number), self.dataset[number]
        about = f"document {number:,}, {len(ids):,} tokens"
        further = [f"{k}: {v}" for k, v in meta.items() if k not in ("id", "segments")]
        note = "; ".join([about, *further])[:CHARACTERS]
        parts = [tag("h3", meta.get("id", number)), tag("p", note, class_="note")]
        try:
            spans = self.grammar.spans(ids)
        except MmtokError as error:
            return tag("article", *parts, tag("p", f"It breaks the grammar: {error}", class_="fault"))
        rows = {int(row[0]): row for row in self.dataset.spans(number)}
        shown = [x for x in spans if x.tokenizer or x.name in ("<user>", "<assistant>")]
        for span in shown[:SEGMENTS]:
            if span.tokenizer:
                parts.append(self._segment(number, ids, span, rows.get(span.start)))
            else:
                parts.append(tag("p", span.name.strip("<>"), class_="turn"))
        if len(shown) > SEGMENTS:
            parts.append(tag("p", f"and {len(shown) - SEGMENTS:,} more segments", class_="note"))
        return tag("article", *parts)

    def _segment(self, number: int, ids: np.ndarray, span: Span, row: np.ndarray | None) -> Markup:
        """The original beside what is decoded."""
        segments = self.dataset.segments(number)
        index, sizes = (int(row[3]), (int(row[4]), int(row[5]))) if row is not None else (-1, (0, 0))
        segment = segments[index] if 0 <= index < len(segments) else {}
        if span.kind == "text":
            return self._text(ids, span, segment, sizes[0])
        name = f"segment {index} of {self.dataset.meta(number).get('id')}"
        codes = "x".join(map(str, span.shape)) + f" codes of {span.tokenizer}"
        if span.kind == "image":
            size = sizes if min(sizes) > 0 else None
            both = [self._original(segment, lambda x: self._image(_read_image(x), f"original of {name}", ""))]
            both.append(self._decoded(ids, span, size, lambda x: self._image(x.pixels, f"decoded {name}", codes)))
        else:
            both = [self._original(segment, lambda x: self._sound(*_read_sound(x), f"original of {name}", ""))]
            cut = self._cut(ids, span)
            both.append(
                self._decoded(*cut, None, lambda x: self._sound(x.samples, x.sample_rate, f"decoded {name}", codes))
            )
        return tag("div", *both, class_="pair")

    def _text(self, ids: np.ndarray, span: Span, segment: dict[str, Any], size: int) -> Markup:
        def draw(text: Text) -> Markup:
            count = len(text.text.encode())
            same = "" if not size else ", as many as recorded" if count == size else f", but {size:,} are recorded"
            if isinstance(known := segment.get("text"), str):
                same += ", equal to the original" if known == text.text else ", not equal to the original"
            shown = text.text[:CHARACTERS]
            more = f"; the first {CHARACTERS:,} characters" if len(text.text) > CHARACTERS else ""
            note = f"{span.shape[0]:,} tokens of {span.tokenizer}, {count:,} bytes{same}{more}"
            return join([tag("blockquote", shown, dir="auto"), tag("p", note, class_="note")])

        if self.tokenizer is None:
            return tag("p", f"text: {span.shape[0]:,} tokens of {span.tokenizer}", class_="note")
        return self._decoded(ids, span, None, draw)

    def _original(self, segment: dict[str, Any], draw: Callable[[dict[str, Any]], Markup]) -> Markup:
        try:
            if not segment.get("path") and not segment.get("table"):
                raise DataError("the manifest's reference is not recorded")
            return _figure("original", draw(segment))
        except (MmtokError, OSError) as error:
            self.missing += 1
            return _figure("original", tag("p", f"not at hand: {error}", class_="fault"))

    def _decoded(
        self, ids: np.ndarray, span: Span, size: tuple[int, int] | None, draw: Callable[[Any], Markup]
    ) -> Markup:
        if self.tokenizer is None:
            return Markup()
        try:
            return _figure("decoded", draw(self.tokenizer.decode_span(ids, span, size)))
        except MmtokError as error:
            return _figure("decoded", tag("p", f"cannot be decoded: {error}", class_="fault"))

    def _cut(self, ids: np.ndarray, span: Span) -> tuple[np.ndarray, Span]:
        """The beginning of a sound, ``SECONDS`` long, as ids and span of its own."""
        properties = self.dataset.registry.tokenizer(span.tokenizer).properties
        frames = span.shape[1]
        if "hop" in properties and "sample_rate" in properties:
            frames = min(frames, int(SECONDS * properties["sample_rate"] / properties["hop"]) + 1)
        codes = self.grammar.segment_codes(ids, span)
        if isinstance(codes, tuple):
            codes = tuple(level[: frames * (len(level) // span.shape[1])] for level in codes) if frames else codes
        else:
            codes = codes[:, :frames]
        part = self.grammar.segment_ids(span.tokenizer, codes)
        return part, Span("audio", 0, len(part), span.tokenizer, (span.shape[0], frames))

    def _image(self, pixels: np.ndarray, alt: str, note: str) -> Markup:
        height, width = pixels.shape[1:]
        notes = [f"{width}x{height} pixels", *([note] if note else [])]
        if max(height, width) > SIDE:
            scale = SIDE / max(height, width)
            pixels = media.resize_image(pixels, max(1, round(height * scale)), max(1, round(width * scale)))
            notes.append(f"shown at {pixels.shape[2]}x{pixels.shape[1]}")
        return join([self._picture(pixels, alt, 160), tag("p", ", ".join(notes), class_="note")])

    def _picture(self, pixels: np.ndarray, alt: str, least: int = 0, colours: int = 0) -> Markup:
        """An img; one that is smaller than ``least`` pixels is enlarged by a whole factor."""
        image, buffer = PILImage.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))), io.BytesIO()
        (image.quantize(colours) if colours else image).save(buffer, "PNG")
        if not self._fits(buffer.getvalue()):
            return _full()
        height, width = pixels.shape[1:]
        factor = max(1, least // max(height, width))
        source = embedded("image/png", buffer.getvalue())
        return tag("img", src=source, alt=alt, width=width * factor, height=height * factor)

    def _sound(self, samples: np.ndarray, rate: int, alt: str, note: str) -> Markup:
        samples = samples[:, : round(SECONDS * rate)]
        if not samples.shape[1]:
            return tag("p", "a sound without samples", class_="note")
        buffer = io.BytesIO()
        soundfile.write(buffer, samples.T, rate, format="WAV", subtype="PCM_16")
        if not self._fits(buffer.getvalue()):
            return _full()
        source = embedded("audio/wav", buffer.getvalue())
        words = f"{samples.shape[1] / rate:.2f} s at {rate} Hz" + (f", {note}" if note else "")
        parts = [tag("audio", controls="", preload="none", src=source, aria_label=alt), tag("p", words, class_="note")]
        if self.spectrogram is not None:
            parts.insert(0, self._picture(self.spectrogram(samples, rate), f"spectrogram of the {alt}", colours=64))
        return join(parts)

    def _fits(self, data: bytes) -> bool:
        """Whether the page may hold so much more."""
        fits = len(data) <= self._left
        self._left -= len(data) if fits else 0
        return fits


def _figure(caption: str, content: Markup) -> Markup:
    return tag("figure", tag("figcaption", caption), content)


def _full() -> Markup:
    return tag("p", f"not shown: the page has {MEDIA_BYTES // 2**20} MiB of media already", class_="note")


def _read_image(segment: dict[str, Any]) -> np.ndarray:
    with local_copy({**segment, "type": "image"}) as content:
        return media.read_image(content.path)


def _read_sound(segment: dict[str, Any]) -> tuple[np.ndarray, int]:
    """The beginning of a sound, ``SECONDS`` long, float32 [1, T], and its rate in Hz."""
    with local_copy({**segment, "type": "audio"}) as content:
        rate, parts, have = media.audio_rate(content.path), [], 0
        for block in media.audio_blocks(content.path, None, segment.get("start"), segment.get("end")):
            parts.append(block)
            have += block.shape[1]
            if have >= SECONDS * rate:
                break
        return np.concatenate(parts, 1), rate

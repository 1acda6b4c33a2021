"""What a dataset will be, before any model runs over the data: :func:`plan`.

Texts are tokenized, which is quick; of pictures and sounds only the headers are read, since their size alone says how
many codes they have. Times come from the tokenizers' speed on noise and that of reading some of the files.
"""

from __future__ import annotations

import dataclasses
import math
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from mmtok import layouts, media
from mmtok.datasets.build.config import EncodeConfig, check_grid, chosen
from mmtok.datasets.build.encode import CHARACTERS, READERS
from mmtok.datasets.shards import token_dtype
from mmtok.datasets.sources.content import local_copy
from mmtok.datasets.sources.probe import image_size, sound_samples
from mmtok.documents import Audio, Image, check_text
from mmtok.errors import ConfigError, MediaError
from mmtok.multimodal import MultimodalTokenizer

TOGETHER = 256  # documents whose headers are read at once
TIMED = 12  # files of a modality that are read to see how long that takes
INDEX_BYTES = 24 + 16  # of a document in the tables of a shard; a span has 24


@dataclasses.dataclass(frozen=True)
class Modality:
    """What one modality contributes.

    Attributes:
        segments: how many, texts that follow each other counted one by one.
        tokens: ids, with the brackets of pictures and sounds.
        amount: pixels, seconds, or bytes of UTF-8.
        seconds: of one core, for reading and encoding.
    """

    segments: int
    tokens: int
    amount: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """A dataset that is not there yet.

    Attributes:
        documents: in the source.
        left_out: documents whose text or headers show already that they cannot be encoded.
        examples: a few of these: (id, reason).
        tokens: ids of all documents, with ``<bos>``, ``<eos>`` and turns.
        modalities: text, image, audio -> what they contribute.
        longest: ids of the longest document.
        context: the length asked for; ``over`` documents are longer than it.
        dtype: in which ids are stored.
        bytes: on the disk, about.
        ids: of the vocabulary, padded: rows of the embedding.
        hidden_size: columns of the embedding that were asked for; ``embedding`` is their product.
        workers: cores that were reckoned with.
        seconds: that a build will take with them, about.
        share: of the documents that were looked at; the counts are scaled by it.
    """

    documents: int
    left_out: int
    examples: list[tuple[str, str]]
    tokens: int
    modalities: dict[str, Modality]
    longest: int
    context: int
    over: int
    dtype: str
    bytes: int
    ids: int
    hidden_size: int
    embedding: int
    workers: int
    seconds: float
    share: float


def plan(
    documents: Iterable[dict[str, Any]],
    tokenizer: MultimodalTokenizer,
    config: EncodeConfig | None = None,
    *,
    context: int = 2048,
    hidden_size: int = 1024,
    workers: int = 1,
    share: float = 1.0,
) -> Plan:
    """Predict what ``build`` makes of documents.

    Args:
        documents: normalised, as ``open_source`` gives them.
        tokenizer: the vocabulary and its tokenizers.
        config: how documents become ids.
        context: the length, in ids, that documents should fit into.
        hidden_size: of the transformer that the embedding is reckoned for.
        workers: cores that a build will use.
        share: look at this share of the documents only, above 0, at most 1, chosen by a hash of their ids.

    Raises:
        ConfigError: a share, context, size or number of workers out of range, or as ``Encoder``.
    """
    if not 0 < share <= 1 or min(context, hidden_size, workers) < 1:
        raise ConfigError(
            f"got share {share}, context {context}, hidden size {hidden_size}, {workers} workers, expected a share "
            "above 0 and at most 1, and the others at least 1"
        )
    counter = _Counter(tokenizer, config or EncodeConfig(), context)
    seen = 0

    def looked_at() -> Iterator[dict[str, Any]]:
        nonlocal seen
        for document in documents:
            seen += 1
            if share == 1 or zlib.crc32(str(document.get("id")).encode(errors="replace")) < share * 2**32:
                yield document

    chosen_documents = looked_at()
    with ThreadPoolExecutor(READERS) as pool:
        for batch in _batches(chosen_documents):
            counter.add(batch, pool)
    r = tokenizer.registry
    scale = seen / counter.documents if counter.documents else 1.0
    costs = counter.costs()
    modalities = {
        m: Modality(
            round(counter.segments[m] * scale),
            round(counter.tokens[m] * scale),
            counter.amounts[m] * scale,
            costs[m] * scale,
        )
        for m in counter.names
    }
    tokens, spans = round(counter.total * scale), sum(x.segments for x in modalities.values())
    return Plan(
        documents=seen,
        left_out=round(counter.left_out * scale),
        examples=counter.examples,
        tokens=tokens,
        modalities=modalities,
        longest=counter.longest,
        context=context,
        over=round(counter.over * scale),
        dtype=token_dtype(r).name,
        bytes=tokens * token_dtype(r).itemsize + round(counter.meta * scale) + INDEX_BYTES * seen + 24 * spans,
        ids=r.padded_size,
        hidden_size=hidden_size,
        embedding=r.padded_size * hidden_size,
        workers=workers,
        seconds=sum(x.seconds for x in modalities.values()) / workers,
        share=counter.documents / seen if seen else 1.0,
    )


class _Counter:
    """Adds up documents."""

    def __init__(self, tokenizer: MultimodalTokenizer, config: EncodeConfig, context: int) -> None:
        self.mm, self.config, self.context = tokenizer, config, context
        self.names = chosen(tokenizer.registry, config)
        self.grid = next((b.size for b in tokenizer.registry.blocks if b.modality == "grid"), 0)
        self.segments = dict.fromkeys(self.names, 0)
        self.tokens = dict.fromkeys(self.names, 0)
        self.amounts = dict.fromkeys(self.names, 0.0)
        self.documents = self.left_out = self.total = self.longest = self.over = self.meta = 0
        self.examples: list[tuple[str, str]] = []
        self.files: dict[str, list[dict[str, Any]]] = {"image": [], "audio": []}
        self.text_seconds = 0.0
        if "text" in self.names:
            self.mm.tokenizers[self.names["text"]].encode(["the first call sets things up"])

    def add(self, documents: Sequence[dict[str, Any]], pool: ThreadPoolExecutor) -> None:
        """Count some documents."""
        measured = list(pool.map(self._measure, documents))
        texts = [text for sizes in measured if isinstance(sizes, list) for kind, _, text in sizes if kind == "text"]
        lengths = iter(self._lengths(texts))
        for document, sizes in zip(documents, measured, strict=True):
            self.documents += 1
            if isinstance(sizes, str):
                self.left_out += 1
                if len(self.examples) < 5:
                    self.examples.append((str(document.get("id", "")), sizes))
                continue
            total = 2
            for kind, amount, text in sizes:
                count = next(lengths) if kind == "text" else self._tokens(kind, amount)
                total += count
                if kind == "turn":
                    continue
                self.segments[kind] += 1
                self.tokens[kind] += count
                if kind == "text":
                    self.amounts[kind] += len(text.encode())
                elif kind == "image":
                    self.amounts[kind] += amount[0] * amount[1]
                else:
                    self.amounts[kind] += amount[0] / self._rate()
            for segment in document["segments"]:
                if segment["type"] in self.files and len(self.files[segment["type"]]) < TIMED:
                    self.files[segment["type"]].append(segment)
            self.total += total
            self.longest = max(self.longest, total)
            self.over += total > self.context
            self.meta += sum(len(str(x)) for x in (document["id"], *document["segments"]) if "text" not in x)

    def costs(self) -> dict[str, float]:
        """Seconds of one core that reading and encoding take, by modality."""
        out = {"text": self.text_seconds}
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for kind, files in self.files.items():
                if kind in self.names and self.segments[kind]:
                    read = _timed(lambda segment: self._read(segment), files) / len(files) * self.segments[kind]
                    out[kind] = read + self._encoding_seconds(kind)
        finally:
            torch.set_num_threads(before)
        return {kind: out.get(kind, 0.0) for kind in self.names}

    def _encoding_seconds(self, kind: str) -> float:
        """How long the codec takes for all segments, by its speed on noise of the mean size."""
        random = np.random.default_rng(0)
        mean = self.amounts[kind] / self.segments[kind]
        segments: list[Image | Audio]
        if kind == "image":
            side = max(1, round(math.sqrt(mean)))
            count = max(2, min(32, 2**18 // (side * side)))
            segments = [Image(random.integers(0, 256, (3, side, side), np.uint8)) for _ in range(count)]
        else:
            rate = self._rate()
            samples = round(min(10.0, max(mean, 0.1)) * rate)
            segments = [Audio(random.uniform(-0.3, 0.3, (1, samples)).astype(np.float32), rate) for _ in range(2)]
        name = self.names[kind]
        self.mm.codes_of(segments[:1], name)  # the first call also sets things up
        seconds = _timed(lambda x: self.mm.codes_of(x, name), [segments])
        amount = sum(x.pixels[0].size if isinstance(x, Image) else x.seconds for x in segments)
        return seconds / amount * self.amounts[kind]

    def _read(self, segment: dict[str, Any]) -> None:
        with local_copy(segment) as content:
            if segment["type"] == "image":
                pixels = media.read_image(content.path)
                if self.config.image_size:
                    media.fit_image(pixels, self.config.image_size)
            else:
                media.read_audio(content.path, self._rate(), segment.get("start"), segment.get("end"))

    def _rate(self) -> int:
        return int(self.mm.registry.tokenizer(self.names["audio"]).properties["sample_rate"])

    def _lengths(self, texts: list[str]) -> list[int]:
        if not texts:
            return []
        began = time.perf_counter()
        ids = self.mm.tokenizers[self.names["text"]].encode(texts)
        self.text_seconds += time.perf_counter() - began
        return [len(x) for x in ids]

    def _measure(self, document: dict[str, Any]) -> list[tuple[str, tuple[int, int], str]] | str:
        """(modality, size, text) of each segment; or why the document will be left out."""
        if "error" in document:
            return str(document["error"])
        sizes = []
        try:
            for segment in document.get("segments") or ():
                kind = segment["type"]
                if kind != "turn" and kind not in self.names:
                    return f"the vocabulary has no tokenizer for {kind}"
                size, text = (0, 0), ""
                if kind in ("image", "audio"):
                    with local_copy(segment) as content:
                        size = self._size(kind, content.path, content.label, segment)
                elif kind == "text":
                    text = segment["text"]
                    check_text(text)
                sizes.append((kind, size, text))
        except MediaError as error:
            return str(error)
        return sizes or "the document has no segments"

    def _size(self, kind: str, path: str, label: str, segment: dict[str, Any]) -> tuple[int, int]:
        """(H, W) of a picture as it will be encoded; (samples at the codec's rate, 0) of a sound."""
        if kind == "audio":
            return sound_samples(path, self._rate(), segment.get("start"), segment.get("end")), 0
        if self.config.image_size:
            image_size(path)
            return self.config.image_size, self.config.image_size
        height, width = self.config.fitted(image_size(path))
        check_grid(self.mm.registry.tokenizer(self.names["image"]).properties, self.grid, label, height, width)
        return height, width

    def _tokens(self, kind: str, size: tuple[int, int]) -> int:
        """Ids of a picture or a sound of this size, with its brackets; of a turn."""
        if kind == "turn":
            return 1
        spec = self.mm.registry.tokenizer(self.names[kind])
        levels = len(spec.codebook_sizes)
        if kind == "image":
            factor = int(spec.properties["downsample"])
            return -(-size[0] // factor) * -(-size[1] // factor) * levels + 4
        layout = layouts.parse(spec.layout or "interleaved", levels)
        return layout.length(-(-size[0] // int(spec.properties["hop"]))) + 2


def _batches(documents: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Up to ``TOGETHER`` documents, fewer of long texts."""
    batch: list[dict[str, Any]] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += sum(len(x["text"]) for x in document.get("segments") or () if x["type"] == "text")
        if len(batch) == TOGETHER or size > CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _timed(call: Any, arguments: Sequence[Any]) -> float:
    began = time.perf_counter()
    for x in arguments:
        try:
            call(x)
        except MediaError:
            continue
    return time.perf_counter() - began

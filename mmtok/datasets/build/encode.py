"""Documents of a manifest -> records of ids: media are read ahead in threads, tokenizers get batches across documents.

``EncodeConfig`` -- how pictures are sized and which tokenizers are used: a part of each document's key
``Encoder``      -- normalised documents -> ``Record`` or ``LeftOut``, in order

A document is encoded whole or left out with its reason. What comes out depends on the document alone, not on those
beside it. Memory depends on neither their number nor the length of sounds, which are streamed from ``STREAM_SECONDS``
on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from mmtok import media
from mmtok.config import Config
from mmtok.datasets.sources.content import Content, local_copy
from mmtok.datasets.sources.probe import sound_samples
from mmtok.datasets.shardfile import Record
from mmtok.documents import Audio, Image, Text, check_text
from mmtok.errors import ConfigError, MediaError
from mmtok.multimodal import MultimodalTokenizer
from mmtok.registry import MODALITIES

STREAM_SECONDS = 30.0  # longer sounds go through the codec as a stream, where it has one
AHEAD = 64  # segments that are read, or waiting to be encoded, at once
PIXELS = 2**20  # of pictures that are encoded together
CHARACTERS = 2**21  # of texts that are encoded together
READERS = 2


@dataclasses.dataclass(frozen=True)
class EncodeConfig(Config):
    """How documents become ids.

    Attributes:
        image_size: pictures are fitted into a white square of so many pixels a side; 0 keeps their own sizes.
        max_side: pictures with a longer side are scaled down to it; 0 for none. Not together with ``image_size``.
        text, image, audio: names of the tokenizers to use, where the vocabulary has several; empty for the default.
    """

    image_size: int = 0
    max_side: int = 0
    text: str = ""
    image: str = ""
    audio: str = ""

    def __post_init__(self) -> None:
        if self.image_size < 0 or self.max_side < 0 or (self.image_size and self.max_side):
            raise ConfigError(
                f"got image_size {self.image_size} and max_side {self.max_side}, expected pixels, and one of them 0"
            )

    def fitted(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of a picture after ``max_side``."""
        longest = max(size)
        if not self.max_side or longest <= self.max_side:
            return size
        height, width = (max(1, round(x * self.max_side / longest)) for x in size)
        return height, width


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A document that was not encoded: its id, the segment at fault (None for the whole), and the reason."""

    id: str
    segment: int | None
    reason: str


Known = Callable[[bytes], "tuple[np.ndarray, np.ndarray] | None"]


class Encoder:
    """Encode documents with the tokenizers of a vocabulary.

    Args:
        tokenizer: the vocabulary and its tokenizers.
        config: how.
        root: media paths and messages below this directory are kept relative to it.
        known: key -> (ids, spans) of documents that need no encoding; None for none.

    Raises:
        ConfigError: an image size that is no multiple of the tokenizer's downsample factor, or a tokenizer that the
            vocabulary has not.
    """

    def __init__(
        self, tokenizer: MultimodalTokenizer, config: EncodeConfig, root: str = "", known: Known | None = None
    ) -> None:
        self.mm, self.config, self.known = tokenizer, config, known
        self._root = root.rstrip("/") + "/" if root else ""
        self.names = chosen(tokenizer.registry, config)
        self._order = {x.name: i for i, x in enumerate(tokenizer.registry.tokenizers)}
        self._grid = next((b.size for b in tokenizer.registry.blocks if b.modality == "grid"), 0)
        about = {"vocabulary": tokenizer.registry.fingerprint, "config": config.to_dict()}
        self._salt = json.dumps(about, sort_keys=True).encode()

    def encode(self, documents: Iterable[dict[str, Any]]) -> Iterator[Record | LeftOut]:
        """Each document as its record, or why it has none, in order."""
        open_documents: deque[_Draft] = deque()
        waiting: deque[tuple[_Draft, int, Future[_Loaded] | _Loaded]] = deque()
        with ThreadPoolExecutor(READERS) as pool:
            try:
                for document in documents:
                    draft = self._draft(document)
                    open_documents.append(draft)
                    if draft.left_out is None and not draft.done:
                        for i, segment in enumerate(draft.segments):
                            waiting.append((draft, i, self._read_ahead(pool, draft, i, segment)))
                            if len(waiting) >= AHEAD:
                                self._encode_some(waiting, AHEAD // 2)
                    yield from self._complete(open_documents)
                while waiting:
                    self._encode_some(waiting, AHEAD // 2)
                    yield from self._complete(open_documents)
                yield from self._complete(open_documents)
            finally:
                for draft, _, _ in waiting:  # stopped half-way: what waits to be read need not be
                    draft.left_out = draft.left_out or LeftOut(draft.id, None, "stopped")
                for _, _, item in waiting:
                    if isinstance(item, Future) and not item.cancel() and item.exception() is None:
                        item.result().close()

    def key(self, document: dict[str, Any]) -> bytes:
        """16 bytes of what a document's ids are made of: its texts, the bytes of its media, vocabulary and config.

        Raises:
            MediaError: a media file cannot be read.
        """
        digests = []
        for segment in document["segments"]:
            if _is_media(segment):
                with local_copy(segment) as content:
                    digests.append(content.sha256)
            else:
                digests.append("")
        return self._key(document["segments"], digests)

    def _key(self, segments: Sequence[dict[str, Any]], digests: Sequence[str]) -> bytes:
        """What the segments say but for where they lie, and the digests of their media."""
        h = hashlib.sha256(self._salt)
        for segment, digest in zip(segments, digests, strict=True):
            said = {k: segment.get(k) for k in ("type", "start", "end", "role")}
            text = "" if digest else segment.get("text", "")
            h.update(json.dumps([said, digest, text]).encode())
        return h.digest()[:16]

    # --- reading

    def _draft(self, document: dict[str, Any]) -> _Draft:
        name = str(document.get("id", ""))
        draft = _Draft(name, document)
        if "error" in document:
            draft.left_out = LeftOut(name, None, self._relative(str(document["error"])))
        elif not document.get("segments"):
            draft.left_out = LeftOut(name, None, "the document has no segments")
        elif missing := [i for i, x in enumerate(document["segments"]) if x["type"] not in (*self.names, "turn")]:
            reason = f"the vocabulary has no tokenizer for {document['segments'][missing[0]]['type']}"
            draft.left_out = LeftOut(name, missing[0], reason)
        elif self.known is not None:
            try:
                key = self.key(document)
            except MediaError as error:
                draft.left_out = LeftOut(name, None, self._relative(str(error)))
                return draft
            found = self.known(key)
            if found is not None:
                draft.done = Record(found[0], found[1], self._meta(document), key)
        return draft

    def _read_ahead(
        self, pool: ThreadPoolExecutor, draft: _Draft, index: int, segment: dict[str, Any]
    ) -> Future[_Loaded] | _Loaded:
        """A segment that is being read; turns and texts are there at once."""
        if _is_media(segment):
            return pool.submit(self._read, draft, segment)
        if segment["type"] == "turn":
            return _Loaded(turn=segment["role"])
        try:
            check_text(segment["text"])
        except MediaError as error:
            return _Loaded(error=str(error))
        return _Loaded(segment=Text(segment["text"]))

    def _read(self, draft: _Draft, segment: dict[str, Any]) -> _Loaded:
        """Read a picture or a sound. Runs in a thread."""
        if draft.left_out is not None:
            return _Loaded(error="the document is left out")
        try:
            with contextlib.ExitStack() as stack:
                content = stack.enter_context(local_copy(segment))
                digest = content.sha256
                if segment["type"] == "image":
                    return _Loaded(segment=self._picture(content), digest=digest)
                sound = self._sound(content, segment)
                if isinstance(sound, Audio):
                    return _Loaded(segment=sound, digest=digest)
                return _Loaded(blocks=sound, digest=digest, stack=stack.pop_all())
        except MediaError as error:
            return _Loaded(error=str(error))

    def _picture(self, content: Content) -> Image:
        pixels = media.read_image(content.path)
        if self.config.image_size:
            return Image(media.fit_image(pixels, self.config.image_size))
        size = (pixels.shape[1], pixels.shape[2])
        fitted = self.config.fitted(size)
        check_grid(self.mm.tokenizers[self.names["image"]].properties, self._grid, content.label, *fitted)
        return Image(pixels if fitted == size else media.resize_image(pixels, *fitted))

    def _sound(self, content: Content, segment: dict[str, Any]) -> Audio | Iterator[np.ndarray]:
        """A sound, or of a long one its blocks, float32 [1, n] at the codec's rate."""
        model = self.mm.tokenizers[self.names["audio"]]
        rate = int(model.properties["sample_rate"])
        start, end = segment.get("start"), segment.get("end")
        if sound_samples(content.path, rate, start, end) > STREAM_SECONDS * rate and _can_stream(model):
            return media.audio_blocks(content.path, rate, start, end)
        return Audio(media.read_audio(content.path, rate, start, end), rate)

    # --- encoding

    def _encode_some(self, waiting: deque[tuple[_Draft, int, Future[_Loaded] | _Loaded]], count: int) -> None:
        """Encode some of the segments that were read first, as many as fit into a batch of each modality."""
        batches: dict[str, list[tuple[_Draft, int, _Loaded]]] = {m: [] for m in MODALITIES}
        pixels = characters = 0
        while waiting and count and pixels < PIXELS and characters < CHARACTERS:
            draft, index, item = waiting.popleft()
            loaded = item.result() if isinstance(item, Future) else item
            count -= 1
            if draft.left_out is not None:
                loaded.close()
            elif loaded.error:
                draft.left_out = LeftOut(draft.id, index, self._relative(loaded.error))
            elif loaded.turn:
                draft.add(index, "turn", np.array([self.mm.registry.control(f"<{loaded.turn}>")]), -1, (0, 0), "")
            elif loaded.blocks is not None:
                self._encode_stream(draft, index, loaded)
            else:
                segment = loaded.segment
                batches[type(segment).__name__.lower()].append((draft, index, loaded))
                if isinstance(segment, Image):
                    pixels += segment.pixels[0].size
                elif isinstance(segment, Text):
                    characters += len(segment.text)
        for modality, batch in batches.items():
            if batch:
                name = self.names[modality]
                codes = self.mm.codes_of([x.segment for _, _, x in batch if x.segment is not None], name)
                for (draft, index, loaded), code in zip(batch, codes, strict=True):
                    ids = self.mm.grammar.segment_ids(name, code)
                    draft.add(index, modality, ids, self._order[name], _sizes(loaded.segment), loaded.digest)

    def _encode_stream(self, draft: _Draft, index: int, loaded: _Loaded) -> None:
        """Encode a long sound block by block."""
        name = self.names["audio"]
        model, levels = self.mm.tokenizers[name], len(self.mm.registry.tokenizer(name).codebook_sizes)
        stream, parts, samples = model.stream_encoder(levels=levels), [], 0
        try:
            with loaded.stack or contextlib.ExitStack():
                for block in loaded.blocks or ():
                    samples += block.shape[1]
                    parts.append(stream.push(torch.from_numpy(block)[None])[0].numpy().astype(np.int32))
            parts.append(stream.finish()[0].numpy())
        except MediaError as error:
            draft.left_out = LeftOut(draft.id, index, self._relative(str(error)))
            return
        ids = self.mm.grammar.segment_ids(name, np.concatenate(parts, 1))
        sizes = (samples, int(model.properties["sample_rate"]))
        draft.add(index, "audio", ids, self._order[name], sizes, loaded.digest)

    def _complete(self, drafts: deque[_Draft]) -> Iterator[Record | LeftOut]:
        """Take from the left what is done."""
        while drafts:
            draft = drafts[0]
            if draft.left_out is not None:
                yield draft.left_out
            elif draft.done is not None:
                yield draft.done
            elif len(draft.pieces) == len(draft.segments):
                digests = [draft.pieces[i].digest for i in range(len(draft.segments))]
                key = self._key(draft.segments, digests)
                yield draft.record(self.mm.registry, self._meta(draft.document), key)
            else:
                return
            drafts.popleft()

    def _meta(self, document: dict[str, Any]) -> dict[str, Any]:
        """The document without its texts, which the ids hold, and with paths relative to the root."""
        segments = [
            {k: self._relative(v) if k in ("path", "table") else v for k, v in x.items() if k != "text"}
            for x in document["segments"]
        ]
        return {**document, "id": str(document["id"]), "segments": segments}

    def _relative(self, text: str) -> str:
        return text.replace(self._root, "") if self._root else text


def chosen(registry: Any, config: EncodeConfig) -> dict[str, str]:
    """modality -> name of the tokenizer that encodes it, for those that the vocabulary has.

    Raises:
        ConfigError: no such tokenizer, or an image size that is no multiple of its downsample factor.
    """
    names = {}
    for modality in MODALITIES:
        wanted = getattr(config, modality)
        have = [x for x in registry.tokenizers if x.modality == modality and wanted in ("", x.name)]
        if wanted and not have:
            own = ", ".join(x.name for x in registry.tokenizers if x.modality == modality) or "none"
            raise ConfigError(f"the vocabulary has no {modality} tokenizer {wanted!r}, it has {own}")
        if have:
            names[modality] = registry.tokenizer(wanted or modality).name
    if config.image_size and "image" in names:
        factor = int(registry.tokenizer(names["image"]).properties["downsample"])
        if config.image_size % factor:
            raise ConfigError(f"got an image size of {config.image_size} pixels, expected a multiple of {factor}")
    return names


def check_grid(properties: Any, grid: int, label: str, height: int, width: int) -> None:
    """Raise MediaError if a picture has more codes on a side than the vocabulary has sizes for."""
    most = int(properties["downsample"]) * grid
    if max(height, width) > most:
        raise MediaError(
            f"{label}: {width}x{height} pixels, the vocabulary has sizes up to {most}x{most}; give --max-side {most} "
            "or --image-size, or a vocabulary with a larger max_grid"
        )


@dataclasses.dataclass
class _Loaded:
    """A segment that was read, or why it was not."""

    segment: Text | Image | Audio | None = None
    turn: str = ""
    error: str = ""
    digest: str = ""
    blocks: Iterator[np.ndarray] | None = None
    stack: contextlib.ExitStack | None = None

    def close(self) -> None:
        """Remove the temporary file behind the blocks, if there is one."""
        if self.stack is not None:
            self.stack.close()


class _Piece(NamedTuple):
    """The ids of one segment."""

    kind: str
    ids: np.ndarray
    tokenizer: int
    sizes: tuple[int, int]
    digest: str


class _Draft:
    """A document while its segments are encoded."""

    def __init__(self, name: str, document: dict[str, Any]) -> None:
        self.id, self.document = name, document
        self.segments: list[dict[str, Any]] = document.get("segments") or []
        self.pieces: dict[int, _Piece] = {}
        self.left_out: LeftOut | None = None
        self.done: Record | None = None

    def add(self, index: int, kind: str, ids: np.ndarray, tokenizer: int, sizes: tuple[int, int], digest: str) -> None:
        self.pieces[index] = _Piece(kind, ids, tokenizer, sizes, digest)

    def record(self, registry: Any, meta: dict[str, Any], key: bytes) -> Record:
        """``<bos>``, the segments, ``<eos>``; texts that follow each other are one span, as the grammar has them."""
        parts, rows, at = [np.array([registry.bos])], list[list[int]](), 1
        joins = False
        for i in range(len(self.segments)):
            kind, ids, tokenizer, sizes, _ = self.pieces[i]
            if not len(ids):
                continue
            if kind == "text" and joins and rows[-1][2] == tokenizer:
                rows[-1][1] += len(ids)
                rows[-1][4] += sizes[0]
            elif kind != "turn":
                rows.append([at, at + len(ids), tokenizer, i, *sizes])
            joins = kind == "text"
            parts.append(ids)
            at += len(ids)
        ids = np.concatenate([*parts, np.array([registry.eos])])
        return Record(ids, np.array(rows, np.int32).reshape(-1, 6), meta, key)


def _sizes(segment: Text | Image | Audio | None) -> tuple[int, int]:
    match segment:
        case Image(pixels):
            return pixels.shape[1], pixels.shape[2]
        case Audio(samples, rate):
            return samples.shape[1], rate
        case Text(text):
            return len(text.encode()), 0
    return 0, 0


def _is_media(segment: dict[str, Any]) -> bool:
    """Whether a segment's content lies in a file."""
    return segment["type"] in ("image", "audio")


def _can_stream(model: Any) -> bool:
    try:
        model.stream_encoder()
    except ConfigError:
        return False
    return True

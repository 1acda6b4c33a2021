"""Documents of a manifest -> records of ids: media are read ahead in threads, tokenizers get batches across documents.

A document is encoded whole or left out with its reason. What comes out depends on the document alone, not on those
beside it. Memory depends on neither their number nor the length of sounds, of which the long ones are streamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from mmtok.datasets.build.config import REVISION, EncodeConfig, chosen
from mmtok.datasets.build.drafts import Draft, LeftOut
from mmtok.datasets.build.reading import Loaded, Reader, is_media
from mmtok.datasets.records import Record
from mmtok.datasets.sources.content import local_copy, suffix_of
from mmtok.datasets.sources.files import is_url, printable
from mmtok.documents import Audio, Image, Text
from mmtok.errors import MediaError
from mmtok.multimodal import MultimodalTokenizer
from mmtok.registry import MODALITIES

AHEAD = 64  # segments that are read, or waiting to be encoded, at once
PIXELS = 2**20  # of pictures that are encoded together
CHARACTERS = 2**21  # of texts that are encoded together
READERS = 1 if (os.cpu_count() or 1) <= 2 else 2  # threads; they must not take the core of the tokenizers

Known = Callable[[bytes], "tuple[np.ndarray, np.ndarray] | None"]
_Waiting = deque[tuple[Draft, int, "Future[Loaded] | Loaded"]]


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
        # In messages it begins a word; "/" is no name to look for.
        names = {re.escape(x) for x in (self._root, printable(self._root)) if x.strip("/")}
        self._root_in_text = re.compile(rf"(?<![^\s'\"(:=])(?:{'|'.join(sorted(names))})") if names else None
        self.names = chosen(tokenizer.registry, config)
        self._order = {x.name: i for i, x in enumerate(tokenizer.registry.tokenizers)}
        about = {"vocabulary": tokenizer.registry.fingerprint, "config": config.to_dict(), "revision": REVISION}
        self._salt = json.dumps(about, sort_keys=True).encode()

    def encode(self, documents: Iterable[dict[str, Any]]) -> Iterator[Record | LeftOut]:
        """Each document as its record, or why it has none, in order."""
        open_documents: deque[Draft] = deque()
        waiting: _Waiting = deque()
        with ThreadPoolExecutor(READERS) as pool:
            reader = Reader(self.mm, self.config, self.names, pool)
            try:
                for document in documents:
                    draft = self._draft(document)
                    open_documents.append(draft)
                    if draft.left_out is None and not draft.done:
                        for i, segment in enumerate(draft.segments):
                            waiting.append((draft, i, reader.ahead(draft, segment)))
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
            if is_media(segment):
                with local_copy(segment) as content:
                    digests.append(content.sha256)
            else:
                digests.append("")
        return self._key(document["segments"], digests)

    def _key(self, segments: Sequence[dict[str, Any]], digests: Sequence[str]) -> bytes:
        """What the segments say but for where they lie, and the digests of their media.

        Of a file's name its suffix counts: one that says another kind than the file holds is refused.
        """
        h = hashlib.sha256(self._salt)
        for segment, digest in zip(segments, digests, strict=True):
            said = {k: segment.get(k) for k in ("type", "start", "end", "role")}
            said["suffix"] = suffix_of(segment) if digest else ""
            text = "" if digest else segment.get("text", "")
            h.update(json.dumps([said, digest, text]).encode())
        return h.digest()[:16]

    def _draft(self, document: dict[str, Any]) -> Draft:
        name = str(document.get("id", ""))
        draft = Draft(name, document)
        if "error" in document:
            draft.left_out = LeftOut(name, None, self._relative(str(document["error"])))
        elif not document.get("segments"):
            draft.left_out = LeftOut(name, None, "the document has no segments")
        elif missing := [i for i, x in enumerate(document["segments"]) if x["type"] not in (*self.names, "turn")]:
            reason = f"the vocabulary has no tokenizer for {document['segments'][missing[0]]['type']}"
            draft.left_out = LeftOut(name, missing[0], reason)
        elif self.known is not None:
            with contextlib.suppress(MediaError):  # which comes again, with its segment, when that is read
                key = self.key(document)
                found = self.known(key)
                if found is not None:
                    draft.done = Record(found[0], found[1], self._meta(document), key)
        return draft

    # --- encoding

    def _encode_some(self, waiting: _Waiting, count: int) -> None:
        """Encode some of the segments that were read first, as many as fit into a batch of each modality."""
        batches: dict[str, list[tuple[Draft, int, Loaded]]] = {m: [] for m in MODALITIES}
        pixels = characters = 0
        begun = False
        while waiting and count and pixels < PIXELS and characters < CHARACTERS:
            draft, index, item = waiting[0]
            if begun and isinstance(item, Future) and not item.done():
                break  # rather encode what is there than wait
            waiting.popleft()
            begun = True
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

    def _encode_stream(self, draft: Draft, index: int, loaded: Loaded) -> None:
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

    def _complete(self, drafts: deque[Draft]) -> Iterator[Record | LeftOut]:
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
            {k: self._place(v) if k in ("path", "table") else v for k, v in x.items() if k != "text"}
            for x in document["segments"]
        ]
        return {**document, "id": str(document["id"]), "segments": segments}

    def _place(self, path: Any) -> Any:
        """A path as seen from the root if it lies below it; anything else as it is."""
        if not isinstance(path, str) or not self._root or not path.startswith(self._root):
            return path
        rest = path[len(self._root) :]
        return path if rest.startswith("/") or is_url(rest) else rest

    def _relative(self, text: str) -> str:
        """A message with the paths below the root as seen from there."""
        return self._root_in_text.sub("", text) if self._root_in_text else text


def _sizes(segment: Text | Image | Audio | None) -> tuple[int, int]:
    match segment:
        case Image(pixels):
            return pixels.shape[1], pixels.shape[2]
        case Audio(samples, rate):
            return samples.shape[1], rate
        case Text(text):
            return len(text.encode()), 0
    return 0, 0

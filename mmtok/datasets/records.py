"""Documents of a dataset: one as a ``Record``, several as the arrays of a ``Part``.

``SPAN_COLUMNS`` -- what is known of each text, image and sound
``find_spans``   -- where they are, by the grammar
``part_of``      -- records -> the arrays that a shard holds
``batches``      -- records in lists of bounded size
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmtok.grammar import Grammar

# start and end within the document, brackets included; the tokenizer's index in the registry; the index of the segment
# in the manifest (of texts that were joined, the first); sizes: of an image height and width in pixels, of a sound its
# samples at the codec's rate and that rate in Hz, of a text its bytes of UTF-8 and 0.
SPAN_COLUMNS = ("start", "end", "tokenizer", "segment", "size_0", "size_1")
NO_KEY = bytes(16)


def find_spans(grammar: Grammar, ids: np.ndarray) -> np.ndarray:
    """Where the texts, images and sounds of a document are: int32 [s, 6], ``SPAN_COLUMNS``, segment and sizes 0.

    Raises:
        SequenceError: the ids break the grammar.
    """
    order = {x.name: i for i, x in enumerate(grammar.registry.tokenizers)}
    rows = [(x.start, x.end, order[x.tokenizer], 0, 0, 0) for x in grammar.spans(ids) if x.tokenizer]
    return np.array(rows, np.int32).reshape(-1, 6)


class Record(NamedTuple):
    """One document.

    Attributes:
        ids: integers [n], n at least 1.
        spans: int32 [s, 6], ``SPAN_COLUMNS``, in order.
        meta: JSON-able: its id, and what else is known of it.
        key: 16 bytes: of what it was made.
    """

    ids: np.ndarray
    spans: np.ndarray
    meta: dict[str, Any]
    key: bytes = NO_KEY


class Part(NamedTuple):
    """Documents as arrays; see the module's table. ``documents`` counts from the part's own beginning."""

    documents: np.ndarray
    spans: np.ndarray
    tokens: np.ndarray
    meta: np.ndarray
    keys: np.ndarray


def part_of(records: Sequence[Record], dtype: np.dtype) -> Part:
    """The arrays of some documents; ids become ``dtype``, which must hold them."""
    lines = [_line(x.meta) for x in records]
    sizes = np.array([(len(x.ids), len(x.spans), len(y)) for x, y in zip(records, lines, strict=True)], "<i8")
    return Part(
        np.cumsum(sizes.reshape(-1, 3), axis=0, dtype="<i8"),
        np.concatenate([np.zeros((0, 6), "<i4"), *(np.asarray(x.spans, "<i4").reshape(-1, 6) for x in records)]),
        np.concatenate([np.zeros(0, dtype), *(np.asarray(x.ids).astype(dtype) for x in records)]),
        np.frombuffer(b"".join(lines), np.uint8),
        np.frombuffer(b"".join(x.key for x in records), np.uint8).reshape(-1, 16),
    )


def _line(meta: dict[str, Any]) -> bytes:
    text = json.dumps(meta, ensure_ascii=False, separators=(",", ":")) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:  # the name of a file need not be text
        return (json.dumps(meta, separators=(",", ":")) + "\n").encode()


def batches(records: Iterable[Record], tokens: int) -> Iterator[list[Record]]:
    """Documents in lists of at most ``tokens`` ids, or one document."""
    batch: list[Record] = []
    size = 0
    for record in records:
        if batch and size + len(record.ids) > tokens:
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += len(record.ids)
    if batch:
        yield batch

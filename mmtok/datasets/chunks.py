"""A dataset from front to back, some documents at a time, so that memory does not grow with it."""

from __future__ import annotations

from collections.abc import Iterator

from mmtok.datasets.records import Part
from mmtok.datasets.shardfile import Shard

CHUNK_TOKENS = 2**20
CHUNK_DOCUMENTS = 2**13
CHUNK_META = 2**23  # bytes


def chunks(shard: Shard, tokens: int = CHUNK_TOKENS) -> Iterator[tuple[int, Part]]:
    """The documents of a shard in order, as views of the file: (number in the shard of the first, several of them).

    Each chunk has at most ``tokens`` ids, ``CHUNK_DOCUMENTS`` documents and ``CHUNK_META`` bytes of meta, or is one
    document.

    Raises:
        DataError: a block of the file is damaged.
    """
    table, _ = shard.columns()
    first, begins = 0, table[0] * 0
    while first < shard.documents:
        last = min(
            first + CHUNK_DOCUMENTS,
            int(table[:, 0].searchsorted(begins[0] + tokens, side="right")),
            int(table[:, 2].searchsorted(begins[2] + CHUNK_META, side="right")),
        )
        last = max(last, first + 1)
        yield first, shard.part(first, last)
        first, begins = last, table[last - 1]


def meta_lines(part: Part) -> list[bytes]:
    """The meta of each document, one line of JSON without its end."""
    ends = part.documents[:, 2].tolist()
    data = part.meta.tobytes()
    return [data[start:end].rstrip(b"\n") for start, end in zip([0, *ends], ends, strict=False)]

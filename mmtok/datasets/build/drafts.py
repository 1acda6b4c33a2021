"""Documents while they are encoded: ``Draft``, a record when all its segments have ids, or ``LeftOut``."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from mmtok.datasets.records import Record


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A document that was not encoded: its id, the segment at fault (None for the whole), and the reason."""

    id: str
    segment: int | None
    reason: str


class Piece(NamedTuple):
    """The ids of one segment."""

    kind: str
    ids: np.ndarray
    tokenizer: int
    sizes: tuple[int, int]
    digest: str


class Draft:
    """A document while its segments are encoded."""

    def __init__(self, name: str, document: dict[str, Any]) -> None:
        self.id, self.document = name, document
        self.segments: list[dict[str, Any]] = document.get("segments") or []
        self.pieces: dict[int, Piece] = {}
        self.left_out: LeftOut | None = None
        self.done: Record | None = None

    def add(self, index: int, kind: str, ids: np.ndarray, tokenizer: int, sizes: tuple[int, int], digest: str) -> None:
        self.pieces[index] = Piece(kind, ids, tokenizer, sizes, digest)

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

"""The annotated listing: what each id of a document is, and where it stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mmtok.grammar import Grammar, Span


def listing(grammar: Grammar, ids: Any) -> list[dict[str, Any]]:
    """A document with notes, one row an id.

    Each row has ``position``, ``id``, ``kind`` and ``description``; codes have ``tokenizer`` and ``code``, image
    codes ``row``, ``column`` and, of several, ``level``, audio codes ``frame``, ``level``, of several in a frame the
    ``index`` among them, and, where the tokenizer says so, ``time_s``.

    Args:
        grammar: of the vocabulary.
        ids: integers [n], a whole document.

    Raises:
        SequenceError, VocabularyError: as ``Grammar.spans``.
    """
    array = grammar.checked(ids)
    rows: list[dict[str, Any]] = []
    for span in grammar.spans(array):
        note = _notes(grammar, span)
        for position in range(span.start, span.end):
            id = int(array[position])
            row: dict[str, Any] = {"position": position, "id": id, "kind": span.kind}
            row["description"] = grammar.registry.describe(id)
            rows.append(row | note(position, id))
    return rows


def _notes(grammar: Grammar, span: Span) -> Callable[[int, int], dict[str, Any]]:
    """What the listing adds to a row of this span: a function of position and id."""
    if not span.tokenizer:
        return lambda position, id: {}
    spec, blocks = grammar.registry.tokenizer(span.tokenizer), grammar.registry.blocks_of(span.tokenizer)
    lead = {"text": 0, "image": 3, "audio": 1}[span.kind]
    layout = grammar.layout_of(span)
    if layout is None:
        levels = order = np.resize(np.arange(len(blocks)), int(np.prod(span.shape)))
    else:
        levels, order = layout.levels(span.shape[1]), layout.order(span.shape[1])
        firsts = np.cumsum([0, *layout.rates]) * span.shape[1]
    rate = 0.0
    if "hop" in spec.properties and "sample_rate" in spec.properties:
        rate = spec.properties["sample_rate"] / spec.properties["hop"]

    def note(position: int, id: int) -> dict[str, Any]:
        i = position - span.start - lead
        if not 0 <= i < len(levels) or levels[i] < 0:
            return {}
        level = int(levels[i])
        out: dict[str, Any] = {"tokenizer": spec.name, "code": id - blocks[level].start}
        if span.kind == "image":
            out["row"], out["column"] = divmod(i // len(blocks), span.shape[1])
            if len(blocks) > 1:
                out["level"] = level
        elif layout is not None:
            index = int(order[i] - firsts[level])
            out["frame"], which = divmod(index, layout.rates[level])
            out["level"] = level
            if layout.rates[level] > 1:
                out["index"] = which
            if rate:
                out["time_s"] = index / (rate * layout.rates[level])
        return out

    return note

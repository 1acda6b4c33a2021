"""Document packing: several whole documents in one row of fixed length, none of which sees another.

First fit, longest first (first-fit decreasing; Krell et al. 2021, "Efficient Sequence Packing without
Cross-contamination", arXiv:2107.02027). Positions restart at 0 in every document.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmtok.errors import SequenceError


def pack(documents: Sequence[np.ndarray], length: int, pad: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pack whole documents into as few rows as first fit finds.

    Args:
        documents: 1-D integer arrays of ids; empty ones take no room.
        length: ids in a row, at least 1.
        pad: id for the room that is left (``registry.pad``).

    Returns:
        int64 [N, length] each: the ids; the index in ``documents`` of the document at each place, -1 for padding; the
        position within that document, 0 for padding.

    Raises:
        SequenceError: a document is longer than a row.
    """
    sizes = np.array([len(d) for d in documents], dtype=np.int64)
    if sizes.size and sizes.max() > length:
        worst = int(sizes.argmax())
        raise SequenceError(
            length,
            f"document {worst} of {sizes[worst]} ids",
            f"at most {length} ids in a row; use longer rows or leave the document out",
        )
    rooms = np.full(len(sizes), length)  # ids still free in each row; there are never more rows than documents
    rows: list[list[int]] = []
    for index in np.argsort(-sizes, kind="stable"):
        if sizes[index] == 0:
            continue
        row = int((rooms >= sizes[index]).argmax())
        if row == len(rows):
            rows.append([])
        rows[row].append(int(index))
        rooms[row] -= sizes[index]
    ids = np.full((len(rows), length), pad, dtype=np.int64)
    document = np.full((len(rows), length), -1, dtype=np.int64)
    positions = np.zeros((len(rows), length), dtype=np.int64)
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            end = start + int(sizes[index])
            ids[row, start:end] = documents[index]
            document[row, start:end] = index
            positions[row, start:end] = np.arange(end - start)
            start = end
    return ids, document, positions


def attention_mask(document: Tensor | np.ndarray) -> Tensor:
    """Causal within each document.

    Args:
        document: int64 [N, T], the second result of ``pack``.

    Returns:
        bool [N, 1, T, T], True where the query (second to last axis) may see the key. Padding sees padding only, so
        that no row of the attention is empty.
    """
    d = torch.as_tensor(document)
    t = d.shape[1]
    causal = torch.ones(t, t, dtype=torch.bool, device=d.device).tril()
    return ((d[:, :, None] == d[:, None, :]) & causal)[:, None]

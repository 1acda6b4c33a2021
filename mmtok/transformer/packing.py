"""Document packing: several whole documents in one row of fixed length, none of which sees another.

Best fit, longest first, as in token datasets (``mmtok.datasets.loader.packing``); here of documents in memory.
Positions restart at 0 in every document.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from mmtok.datasets.loader.packing import best_fit
from mmtok.errors import SequenceError


def pack(documents: Sequence[np.ndarray], length: int, pad: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pack whole documents into as few rows as best fit finds.

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
    there = np.flatnonzero(sizes)
    rows = best_fit(sizes[there], length)
    shape = (int(rows.max()) + 1 if len(rows) else 0, length)
    ids, document, positions = (np.full(shape, x, np.int64) for x in (pad, -1, 0))
    ends = np.zeros(len(ids), np.int64)
    for index, row in zip(there.tolist(), rows.tolist(), strict=True):
        here = slice(ends[row], ends[row] + sizes[index])
        ids[row, here], document[row, here], positions[row, here] = documents[index], index, np.arange(sizes[index])
        ends[row] = here.stop
    return ids, document, positions


def attention_mask(document: Tensor | np.ndarray) -> Tensor | BlockMask:
    """Causal within each document.

    Args:
        document: int64 [N, T], the second result of ``pack``.

    Returns:
        bool [N, 1, T, T], True where the query (second to last axis) may see the key; on a GPU the same as
        ``block_mask``. Padding sees padding only, so that no row of the attention is empty.
    """
    d = torch.as_tensor(document)
    if d.is_cuda:
        return block_mask(d)
    t = d.shape[1]
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    return ((d[:, :, None] == d[:, None, :]) & causal)[:, None]


def block_mask(document: Tensor) -> BlockMask:
    """``attention_mask`` for flex attention (https://arxiv.org/abs/2412.05496), which skips blocks of 128 x 128 places
    without a pair that may see each other.

    Args:
        document: int64 [N, T], on the device that the model is on.
    """
    n, t = document.shape

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[row, query] == document[row, key]) & (query >= key)

    return create_block_mask(visible, n, None, t, t, device=str(document.device))

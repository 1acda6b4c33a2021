"""Megatron-LM's indexed dataset: ``tokens.bin`` and ``tokens.idx``, one sequence for each document.

``--data-path OUT/tokens`` in Megatron-LM and NeMo. The index, little-endian: ``MMIDIDX`` and two zero bytes, uint64
version 1, uint8 code of the dtype, uint64 sequences S, uint64 S + 1; then int32 [S] lengths, int64 [S] byte offsets,
int64 [S + 1] the sequence at which each document begins and the last one ends. Source:
``megatron/core/datasets/indexed_dataset.py`` of Megatron-core 0.16.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmtok.datasets.chunks import chunks
from mmtok.datasets.export.directory import Advance, export_directory, silent, sizes_of, synced, write_array
from mmtok.datasets.shards import TokenDataset

STEM = "tokens"
_CODES = {"int32": 4, "uint16": 8}  # of Megatron's DType; it has no uint32
_TOGETHER = 2**12  # numbers


def export_megatron(dataset: TokenDataset, out: str | Path, advance: Advance = silent) -> dict[str, Any]:
    """Write ``out``/tokens.bin and .idx: uint16, or int32 where ids do not fit. The format has no room for spans.

    Args:
        dataset: what to export.
        out: the directory to write.
        advance: is told how many more documents are written.

    Returns:
        The contents of export.json.

    Raises:
        DataError: a damaged dataset, one without documents, a document of 2 ** 31 tokens or more, or a target that is
            no such export.
    """
    dtype = np.dtype("<u2" if dataset.dtype.itemsize == 2 else "<i4")
    with export_directory(dataset, out, "megatron", {"dtype": dtype.name, "prefix": STEM}) as (work, about):
        with synced(work / f"{STEM}.bin") as file:
            for shard in dataset.shards:
                for _, part in chunks(shard):
                    write_array(file, part.tokens.astype(dtype, copy=False))
                    advance(len(part.documents))
        with synced(work / f"{STEM}.idx") as file:
            count = len(dataset)
            file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, _CODES[dtype.name], count, count + 1))
            for sizes in _sizes(dataset):
                write_array(file, sizes.astype("<i4"))
            at = 0
            for sizes in _sizes(dataset):
                begins = np.cumsum(sizes) - sizes
                write_array(file, ((begins + at) * dtype.itemsize).astype("<i8"))
                at += int(sizes.sum())
            for first in range(0, count + 1, _TOGETHER):
                write_array(file, np.arange(first, min(first + _TOGETHER, count + 1), dtype="<i8"))
    return about


def _sizes(dataset: TokenDataset) -> Iterator[np.ndarray]:
    """int64 [D]: the sizes of the documents of each shard."""
    return (sizes_of(shard.ends) for shard in dataset.shards)

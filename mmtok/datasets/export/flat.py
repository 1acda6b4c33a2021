"""One file of ids after another, as nanoGPT and LitGPT read it: ``np.memmap("tokens.bin", dtype=..., mode="r")``.

tokens.bin  uint16 or uint32 [T], little-endian, as export.json says
ends.npy    int64 [D]: where each document ends
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmtok.datasets.chunks import chunks
from mmtok.datasets.export.directory import Advance, export_directory, silent, synced, write_array
from mmtok.datasets.shards import TokenDataset


def export_flat(dataset: TokenDataset, out: str | Path, advance: Advance = silent) -> dict[str, Any]:
    """Write ``out``/tokens.bin and ends.npy. There is no room for spans.

    Args:
        dataset: what to export.
        out: the directory to write.
        advance: is told how many more documents are written.

    Returns:
        The contents of export.json.

    Raises:
        DataError: a damaged dataset, one without documents, or a target that is no such export.
    """
    with export_directory(dataset, out, "flat", {"dtype": dataset.dtype.name}) as (work, about):
        with synced(work / "tokens.bin") as file:
            for shard in dataset.shards:
                for _, part in chunks(shard):
                    write_array(file, part.tokens)
                    advance(len(part.documents))
        with synced(work / "ends.npy") as file:
            header = {"descr": "<i8", "fortran_order": False, "shape": (len(dataset),)}
            np.lib.format.write_array_header_1_0(file, header)
            at = 0
            for shard in dataset.shards:
                write_array(file, (shard.ends + at).astype("<i8"))
                at += shard.tokens
    return about

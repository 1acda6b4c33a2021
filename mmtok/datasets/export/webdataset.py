"""WebDataset tar files, one for each shard: KEY.ids.npy, KEY.json and KEY.spans.npy of each document.

KEY is the document's number in the dataset, so that it is unique and fit for a file name; its id is in the json. A
comment in the head of each tar names the fingerprint of the vocabulary.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from mmtok.datasets.chunks import chunks, meta_lines
from mmtok.datasets.export.directory import Advance, export_directory, silent, synced
from mmtok.datasets.shards import TokenDataset


def export_webdataset(dataset: TokenDataset, out: str | Path, advance: Advance = silent) -> dict[str, Any]:
    """Write ``out``/shard-00000.tar and so on.

    ids are uint16 or uint32 [n], spans int32 [s, 6] (``SPAN_COLUMNS``), the json is the document's meta.

    Args:
        dataset: what to export.
        out: the directory to write.
        advance: is told how many more documents are written.

    Returns:
        The contents of export.json.

    Raises:
        DataError: a damaged dataset, one without documents, or a target that is no such export.
    """
    width = max(9, len(str(len(dataset))))
    comment = {"comment": f"mmtok vocabulary {dataset.registry.fingerprint}"}
    with export_directory(dataset, out, "webdataset", {"dtype": dataset.dtype.name}) as (work, about):
        number = 0
        for index, shard in enumerate(dataset.shards):
            with (
                synced(work / f"shard-{index:05d}.tar") as file,
                tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers=comment) as tar,
            ):
                for _, part in chunks(shard):
                    tokens, spans = (
                        np.split(x, part.documents[:-1, i]) for i, x in enumerate((part.tokens, part.spans))
                    )
                    for ids, rows, line in zip(tokens, spans, meta_lines(part), strict=True):
                        key = f"{number:0{width}d}"
                        _add(tar, f"{key}.ids.npy", _npy(ids))
                        _add(tar, f"{key}.json", line)
                        _add(tar, f"{key}.spans.npy", _npy(rows))
                        number += 1
                    tar.members.clear()  # type: ignore[attr-defined]  # it would remember every one
                    advance(len(part.documents))
    return about


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array))
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member whose header depends on nothing but its name and size."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))

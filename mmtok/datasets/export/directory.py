"""What the exports have in common: the directory that they write, and files that are on the disk when it appears."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmtok.checkpoints import atomic_directory
from mmtok.datasets.shards import TokenDataset
from mmtok.errors import DataError
from mmtok.registry import VOCAB_FILE

EXPORT_FILE = "export.json"
MOST_TOKENS = 2**31 - 1  # of a document: several formats count them in 32 bits

Advance = Callable[[int], object]


def silent(documents: int) -> None:
    """An ``Advance`` that tells nobody how many more documents are written."""


@contextmanager
def export_directory(
    dataset: TokenDataset, out: str | Path, form: str, about: dict[str, Any]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A directory to write an export into; with vocab.json and export.json it takes the place of ``out`` in the end.

    Args:
        dataset: what is exported.
        out: a free name, an empty directory, or an export of the same format to replace.
        form: name of the format.
        about: what export.json says besides the format, the counts and the vocabulary; may be filled until the end.

    Yields:
        The directory, and the contents of export.json.

    Raises:
        DataError: ``out`` is something else, or the dataset has no documents.
    """
    _check_target(Path(out), form)
    if not len(dataset):
        raise DataError(f"{dataset.path} has no documents, expected at least one to export")
    value = {
        "format": form,
        "registry": dataset.registry.fingerprint,
        "dataset": dataset.fingerprint,
        "documents": len(dataset),
        "tokens": dataset.tokens,
        **about,
    }
    with atomic_directory(out) as work:
        yield work, value
        with synced(work / VOCAB_FILE) as file:
            file.write(dataset.registry.to_json().encode())
        with synced(work / EXPORT_FILE) as file:
            file.write(json.dumps(value, indent=1).encode() + b"\n")


@contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """A file to write, flushed to the disk when it is closed."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_array(file: BinaryIO, array: np.ndarray) -> None:
    """The bytes of an array as they are, without a copy."""
    if array.size:
        file.write(np.ascontiguousarray(array).data.cast("B"))


def sizes_of(ends: np.ndarray) -> np.ndarray:
    """int64 [D]: the sizes of documents that end at ``ends``.

    Raises:
        DataError: one that is too large for the formats that count in 32 bits.
    """
    sizes = np.diff(ends, prepend=0)
    if len(sizes) and sizes.max() > MOST_TOKENS:
        raise DataError(f"a document of {sizes.max()} tokens, expected at most {MOST_TOKENS}; split it in the manifest")
    return sizes


def _check_target(out: Path, form: str) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        there = json.loads((out / EXPORT_FILE).read_bytes())["format"]
    except (OSError, ValueError, KeyError, TypeError):
        there = None
    if there != form:
        what = f"an export to {there}" if isinstance(there, str) else "no export of a dataset"
        raise DataError(f"{out} is there and is {what}; expected a free name, or an export to {form} to replace")

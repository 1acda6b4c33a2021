"""The file ids.json: documents as ids, together with the whole vocabulary that says what the ids mean.

    {"format": 1, "fingerprint": "3720...", "vocabulary": {vocab.json}, "documents": [
        {"name": "cow", "ids": [1, ...], "image_sizes": [[37, 53]]}]}

``image_sizes``, which may be left out, has height and width in pixels of each image, or null for one of unknown size,
which keeps the padding to whole codes. So the file describes itself: it can be inspected, decoded or migrated wherever
its tokenizers are, and never meets a model of another vocabulary unnoticed. For many documents there are the token
shards of ``mmtok.datasets.shards``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmtok.arrays import integers
from mmtok.checkpoints import atomic_write
from mmtok.errors import DataError, VocabularyError
from mmtok.registry import VocabularyRegistry

FORMAT = 1


class Entry(NamedTuple):
    """A document of an ids.json.

    Attributes:
        name: any.
        ids: integers [n].
        sizes: (H, W) in pixels of each image, in order, None for an unknown one; None or nothing if none is known.
            Whether they fit the images is for the tokenizers to say, when the ids are decoded.
    """

    name: str
    ids: Any
    sizes: Sequence[tuple[int, int] | None] | None = None


def write_ids(path: str | Path, registry: VocabularyRegistry, documents: Iterable[Entry | tuple[str, Any]]) -> None:
    """Write an ids.json, atomically.

    Args:
        path: the file.
        registry: the vocabulary of the ids.
        documents: each as an ``Entry``, or its name and ids: integers [n] in 0..padded_size-1, numpy, torch or a list.
            Whether they follow the grammar is not asked, so that broken sequences can be kept and repaired.

    Raises:
        DataError: a name that is no str, or a size that is none.
        VocabularyError: an id outside the vocabulary; its document and position are named.
    """
    entries = []
    for number, document in enumerate(documents):
        name, ids, sizes = Entry(*document)
        if not isinstance(name, str):
            raise DataError(f"document {number} has the name {name!r}, expected a str")
        array = integers(ids, f"document {number} ({name})")
        if array.ndim != 1:
            raise VocabularyError(f"document {number} ({name}) has shape {list(array.shape)}, expected [n]")
        entry = {"name": name, "ids": _checked(array.tolist(), registry, f"document {number} ({name})")}
        if sizes:
            entry["image_sizes"] = _checked_sizes(list(sizes), f"document {number} ({name})")
        entries.append(entry)
    value = {
        "format": FORMAT,
        "fingerprint": registry.fingerprint,
        "vocabulary": json.loads(registry.to_json()),
        "documents": entries,
    }
    atomic_write(path, (json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n").encode())


def read_ids(path: str | Path) -> tuple[VocabularyRegistry, list[Entry]]:
    """Read what ``write_ids`` wrote, and check it in full.

    Returns:
        The vocabulary, and the documents, their ids int64 [n].

    Raises:
        DataError: no such file, not JSON, another format, or a part that is missing or of the wrong type.
        VocabularyError: the vocabulary is damaged or is not the one that the fingerprint names, or an id outside it.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; expected an ids.json") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); is it cut short? Write it again with mmtok encode") from error
    if not isinstance(value, dict) or "format" not in value:
        raise DataError(f"{path} is no ids.json: expected an object with format, fingerprint, vocabulary and documents")
    if value["format"] != FORMAT:
        raise DataError(f"{path} has format {value['format']!r}; this mmtok reads format {FORMAT}")
    absent = [key for key in ("fingerprint", "vocabulary", "documents") if key not in value]
    if absent:
        raise DataError(f"{path} lacks {', '.join(absent)}; write it again with mmtok encode")
    try:
        registry = VocabularyRegistry.from_json(json.dumps(value["vocabulary"]))
    except VocabularyError as error:
        raise VocabularyError(f"{path}: {error}") from error
    if registry.fingerprint != value["fingerprint"]:
        raise VocabularyError(
            f"{path} says that its vocabulary is {str(value['fingerprint'])[:12]}, but holds the vocabulary "
            f"{registry.fingerprint[:12]}; one of them was edited: write the file again with mmtok encode"
        )
    if not isinstance(value["documents"], list):
        raise DataError(f"{path}: documents is of type {type(value['documents']).__name__}, expected a list")
    return registry, [_read(entry, registry, f"{path}: document {i}") for i, entry in enumerate(value["documents"])]


def _read(entry: Any, registry: VocabularyRegistry, where: str) -> Entry:
    if not isinstance(entry, dict) or {*entry, "image_sizes"} != {"name", "ids", "image_sizes"}:
        got = ", ".join(sorted(entry)) if isinstance(entry, dict) else type(entry).__name__
        raise DataError(f"{where}: got {got or 'nothing'}, expected an object with name, ids and perhaps image_sizes")
    name, ids = entry["name"], entry["ids"]
    if not isinstance(name, str) or not isinstance(ids, list):
        raise DataError(
            f"{where}: name and ids are of type {type(name).__name__} and {type(ids).__name__}, expected str and list"
        )
    array = np.array(_checked(ids, registry, f"{where} ({name})"), np.int64)
    sizes = entry.get("image_sizes")
    return Entry(name, array, None if sizes is None else _checked_sizes(sizes, f"{where} ({name})"))


def _checked(ids: list[Any], registry: VocabularyRegistry, where: str) -> list[int]:
    for position, x in enumerate(ids):
        if type(x) is not int:
            raise DataError(f"{where}, position {position}: got {x!r}, expected an integer")
        if not 0 <= x < registry.padded_size:
            raise VocabularyError(
                f"{where}, position {position}: got {registry.describe(x)}; is this sequence from another vocabulary?"
            )
    return ids


def _checked_sizes(sizes: Any, where: str) -> list[tuple[int, int] | None]:
    if not isinstance(sizes, list):
        raise DataError(f"{where}: image_sizes is of type {type(sizes).__name__}, expected a list")
    for i, size in enumerate(sizes):
        pair = isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int and n >= 1 for n in size)
        if size is not None and not pair:
            raise DataError(f"{where}, image {i}: got the size {size!r}, expected null or [height, width] in pixels")
    return [None if size is None else (size[0], size[1]) for size in sizes]

"""Any source as documents, one at a time: :func:`open_source`.

    X.jsonl, X.ndjson, X.jsonl.gz   a manifest (:mod:`mmtok.datasets.sources.manifest`)
    a folder                        of media and texts, of WebDataset shards, of Parquet files, or of ``save_to_disk``
    X.tar, X/*.tar, {000..009}.tar  WebDataset shards (:mod:`mmtok.datasets.sources.webdataset`)
    X.parquet, X/*.parquet          Parquet files (:mod:`mmtok.datasets.sources.tables`)
    hf:PATH_OR_NAME[:SPLIT]         a data set of the library ``datasets``

Each may be a local path or a URL of fsspec, except for ``hf:``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmtok.datasets.sources import files, tables, webdataset
from mmtok.datasets.sources.columns import Columns
from mmtok.datasets.sources.manifest import SUFFIXES, located, read_folder, read_manifest
from mmtok.errors import DataError

_KINDS = {
    ".jsonl": "manifest",
    ".ndjson": "manifest",
    ".jsonl.gz": "manifest",
    ".ndjson.gz": "manifest",
    ".tar": "shard",
    ".parquet": "table",
}
_UNDERSTOOD = (
    "expected a manifest (.jsonl), a folder of media, WebDataset shards (.tar, *.tar, {000..009}.tar), Parquet files "
    "(.parquet), or hf:PATH_OR_NAME"
)


def open_source(source: str | Path, columns: str | None = None) -> Iterator[dict[str, Any]]:
    """The documents of a source, normalised, in an order that depends on the source alone.

    Reading is streaming: memory does not grow with the number of documents, but for the names in one folder and the
    places in one shard.

    Args:
        source: as above.
        columns: of a table, which column is what, as ``text=caption,image=jpg``
            (:class:`mmtok.datasets.sources.columns.Columns`).

    Returns:
        Documents ``{"id": str, "segments": [...], ...}``. A text segment has ``text``; an image or audio segment is a
        reference that :func:`mmtok.datasets.sources.content.local_copy` takes. What cannot be used is
        ``{"id", "error"}``.

    Raises:
        DataError: nothing that is understood lies there, or it cannot be read; some of that shows as it is read.
    """
    name = str(source)
    try:
        kind, found = _resolve(name)
    except OSError as error:
        raise DataError(f"{files.printable(name)}: cannot be read ({files.reason(error)})") from error
    if columns is not None and kind not in ("table", "hf"):
        raise DataError(f"{name}: columns are of Parquet files and Hugging Face data sets, this is a {kind}")
    chosen = Columns.parse(columns) if columns is not None else None
    if kind == "hf":
        return tables.hugging_face(found[0], chosen)
    if kind == "folder":
        return located(read_folder(found[0]), found[0])
    return _each(kind, found, chosen)


def _each(kind: str, found: Sequence[str], columns: Columns | None) -> Iterator[dict[str, Any]]:
    """The documents of several files of one kind."""
    for name in found:
        if kind == "manifest":
            yield from located(read_manifest(name), files.parent(name))
        elif kind == "shard":
            yield from webdataset.documents(name)
        else:
            yield from tables.parquet(name, columns)


def _resolve(name: str) -> tuple[str, list[str]]:
    """What a source is ("manifest", "shard", "table", "folder", "hf"), and its files."""
    if name.startswith("hf:"):
        return "hf", [name.removeprefix("hf:")]
    name = files.absolute(name)
    webdataset.check_compression(name)
    there = files.exists(name)
    if not there and files.is_pattern(name):
        found = files.expand(name)
    elif there == "folder":
        if any(files.exists(files.join(name, x)) for x in tables.SAVED):
            return "hf", [name]
        found = _in_folder(name)
        if not found:
            return "folder", [name]
    elif there or _kind(name):
        found = [name]
    else:
        raise DataError(f"{files.printable(name)}: no such file or folder, {_UNDERSTOOD}")
    kinds = {_kind(x): x for x in found}
    if len(kinds) > 1 or "" in kinds:
        other = kinds.get("") or list(kinds.values())[1]
        told = f"{other} is something else" if len(found) > 1 else "not recognised by its name"
        raise DataError(f"{files.printable(name)}: {told}, {_UNDERSTOOD}")
    return next(iter(kinds)), found


def _kind(name: str) -> str:
    """What a file is by its suffix, or ""."""
    last = files.base(name).lower()
    return next((kind for suffix, kind in _KINDS.items() if last.endswith(suffix)), "")


def _in_folder(folder: str) -> list[str]:
    """The manifests, shards or tables in a folder; none if it holds images or sounds."""
    found = []
    for name in files.walk(folder):
        if any(name.lower().endswith(tuple(SUFFIXES[x])) for x in ("image", "audio")):
            return []
        if _kind(name):
            found.append(name)
    return found

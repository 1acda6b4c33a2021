"""Parquet files and Hugging Face ``datasets`` as documents: a row is a document, its cells are segments and keys.

    Columns       -- which column is what
    parquet       -- the documents of one Parquet file
    hugging_face  -- the documents of a data set of the library ``datasets``
    splits        -- such a data set itself
    read_cell     -- the bytes of an image or sound, again and in any process

Images and sounds are given as references, ``{"table", "row", "column", "name"}``, so that reading rows stays light.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import itertools
import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmtok.datasets import files
from mmtok.datasets.manifest import RESERVED, fault
from mmtok.errors import DataError, MediaError
from mmtok.sniffing import check_file, magic, one_line

# Files that ``save_to_disk`` of the library datasets leaves in its directory.
SAVED = ("dataset_dict.json", "state.json")
# Names that columns of text go by; of several the first is taken.
_TEXT = ("text", "caption", "content", "sentence", "transcription", "transcript")
_SNIFFED = 64  # rows that are looked at to tell what binary cells hold
_ROWS = 256  # read at once
_CELLS = 4 * 2**20  # bytes of media that are read at once, about
# What libraries raise on data that is missing or damaged. Nothing broader is caught.
_LIBRARY_ERRORS = (OSError, ValueError, RuntimeError, LookupError, EOFError, NotImplementedError)
_PLACES = 3  # in one column that are kept: readers may be at work in several
_BAD = object()


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of a table are segments, in their order, and which is the id.

    Attributes:
        segments: (``"text"``, ``"image"`` or ``"audio"``, column) each. Text is a column of strings; images and sounds
            are bytes, ``{bytes, path}`` as ``datasets`` has them, or strings that name files.
        id: the column of the documents' ids; None: ``id`` if there is one, else rows are numbered.
    """

    segments: tuple[tuple[str, str], ...]
    id: str | None = None

    @classmethod
    def parse(cls, text: str) -> Columns:
        """``text=caption,image=jpg,id=key``: segments in the order in which they are written.

        Raises:
            DataError: it is not of that form.
        """
        pairs = [part.partition("=")[::2] for part in text.split(",")]
        for kind, column in pairs:
            if kind not in ("text", "image", "audio", "id") or not column:
                raise DataError(f"got columns {text!r}, expected such as 'text=caption,image=jpg,audio=wav,id=key'")
        ids = [column for kind, column in pairs if kind == "id"]
        segments = tuple((kind, column) for kind, column in pairs if kind != "id")
        if len(ids) > 1 or not segments:
            raise DataError(f"got columns {text!r}, expected at least one of text, image and audio, and one id at most")
        return cls(segments, *ids)


# --- what the columns of a table are ----------------------------------------------------------------------------------


def _arrow(source: str) -> Any:
    """The library pyarrow, with its part for Parquet."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{source}: needs the library pyarrow; pip install 'mmtok[hf]'") from error
    return pyarrow


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_bytes(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _fields(kind: Any) -> dict[str, Any]:
    """The fields of a struct, or none."""
    from pyarrow import types

    return {x.name: x.type for x in kind} if types.is_struct(kind) else {}


def _is_media(kind: Any) -> bool:
    """Whether a column may hold images or sounds: bytes, or a struct with ``bytes`` in it."""
    return _is_bytes(_fields(kind).get("bytes", kind))


def _is_plain(kind: Any) -> bool:
    """Whether a column is kept as a key of the documents."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    tests = (types.is_boolean, types.is_integer, types.is_floating, types.is_date, types.is_time, types.is_timestamp)
    return _is_text(kind) or types.is_decimal(kind) or any(test(kind) for test in tests)


def _named(schema: Any) -> dict[str, str]:
    """The columns that the library ``datasets`` has marked as images and sounds."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {"Image": "image", "Audio": "audio"}
        return {name: kinds[x["_type"]] for name, x in features.items() if x.get("_type") in kinds}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _choose(source: str, schema: Any, columns: Columns | None, first: Any) -> Columns:
    """The columns as they were given, checked, or as their names and contents say.

    Args:
        first: gives the first cells of a column.
    """
    kinds = {x.name: x.type for x in schema}
    listing = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    if columns is not None:
        for kind, name in (*columns.segments, *([("id", columns.id)] if columns.id else [])):
            if name not in kinds:
                raise DataError(f"{source}: has no column {name!r}, its columns are: {listing}")
            fits = _is_text(kinds[name]) or (_is_media(kinds[name]) if kind != "id" else _is_plain(kinds[name]))
            if not fits or (kind == "text" and not _is_text(kinds[name])):
                raise DataError(f"{source}: column {name!r} cannot be the {kind}, its columns are: {listing}")
        return columns
    media = {k: v for k, v in _named(schema).items() if k in kinds and _is_media(kinds[k])}
    for name, kind in kinds.items():
        if name not in media and _is_media(kind) and (found := _sniff(first(name))):
            media[name] = found
    texts = [name for name, kind in kinds.items() if _is_text(kind) and name != "id"]
    text = next((x for x in _TEXT if x in texts), None)
    if text is None and not media and len(texts) == 1:
        text = texts[0]
    if text is None and not media:
        raise DataError(f"{source}: say which column is what, as columns='text=NAME'; its columns are: {listing}")
    both = [(kind, name) for kind in ("image", "audio") for name, found in media.items() if found == kind]
    return Columns(
        (*([("text", text)] if text else []), *both), "id" if "id" in kinds and _is_plain(kinds["id"]) else None
    )


def _sniff(cells: Iterable[Any]) -> str | None:
    """What the first cell that is not empty holds."""
    for cell in cells:
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if data:
            return magic(data[:65536])
    return None


# --- rows to documents ------------------------------------------------------------------------------------------------


# The number of the first row, how many rows there are, and their columns but for those that are known to be full.
_Batch = tuple[int, int, Mapping[str, Any]]


def _documents(
    source: str, columns: Columns, schema: Any, batches: Iterable[_Batch], prefix: str, folder: str
) -> Iterator[dict[str, Any]]:
    """The documents of batches of rows.

    Args:
        source: as references have it.
        prefix: of the ids of documents without one.
        folder: that paths in cells are relative to.
    """
    kept = _kept(schema, columns)
    for start, count, arrays in batches:
        keys = {name: _values(arrays[name]) for name in kept}
        ids = _values(arrays[columns.id]) if columns.id else [None] * count
        cells = [
            (kind, name, *(_cells(arrays[name], kind) if name in arrays else ("cell", [""] * count)))
            for kind, name in columns.segments
        ]
        for i in range(count):
            row = start + i
            identity = f"{prefix}/{row}" if ids[i] is None or ids[i] is _BAD else str(ids[i])
            bad = next((name for name, values in keys.items() if values[i] is _BAD), None)
            segments: list[dict[str, Any]] = []
            for kind, name, form, values in cells:
                value = values[i]
                if value is _BAD:
                    bad = name
                elif value is not None and form == "text":
                    segments.append({"type": kind, "text": value})
                elif value is not None and form == "path":
                    segments.append({"type": kind, "path": files.join(folder, value)})
                elif value is not None:
                    segments.append({"type": kind, "table": source, "row": row, "column": name, "name": value})
            if bad is not None:
                yield fault(identity, f"{source} row {row}: column {bad!r} is not UTF-8")
            elif not segments:
                names = ", ".join(name for _, name in columns.segments)
                yield fault(identity, f"{source} row {row}: nothing in {names}")
            else:
                yield {"id": identity, "segments": segments, **{name: values[i] for name, values in keys.items()}}


def _kept(schema: Any, columns: Columns) -> list[str]:
    """The columns that become keys."""
    used = {name for _, name in columns.segments} | {columns.id}
    return [x.name for x in schema if x.name not in used and x.name not in RESERVED and _is_plain(x.type)]


def _values(array: Any) -> list[Any]:
    """Cells as JSON has them: dates and decimals as strings, numbers that are not finite as None."""
    import pyarrow
    from pyarrow import types

    kind = array.type
    if types.is_dictionary(kind):
        array = array.cast(kind.value_type)
        kind = array.type
    if types.is_timestamp(kind):  # in UTC, as they are stored
        array = array.cast(pyarrow.timestamp(kind.unit)).cast(pyarrow.string())
    elif types.is_date(kind) or types.is_time(kind) or types.is_decimal(kind):
        array = array.cast(pyarrow.string())
    if types.is_floating(kind):
        return [x if x is None or math.isfinite(x) else None for x in array.to_pylist()]
    try:
        return list(array.to_pylist())
    except UnicodeDecodeError:
        return [_value(x) for x in array]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return _BAD


def _cells(array: Any, kind: str) -> tuple[str, list[Any]]:
    """What a column's cells are ("text", "path" or "cell"), and them: texts, paths, or the names of cells; or None."""
    import pyarrow.compute as pc

    fields = _fields(array.type)
    if not fields and not _is_bytes(array.type):
        return ("text" if kind == "text" else "path"), _values(array)
    if not fields:
        return "cell", ["" if x else None for x in array.is_valid().to_pylist()]
    there = pc.struct_field(array, "bytes").is_valid().to_pylist() if "bytes" in fields else [True] * len(array)
    names = _values(pc.struct_field(array, "path")) if _is_text(fields.get("path")) else [None] * len(array)
    return "cell", [
        files.base(name) if isinstance(name, str) else ("" if x else None) for name, x in zip(names, there, strict=True)
    ]


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _open_parquet(source: str) -> Any:
    """A Parquet file, opened so that it is read in pieces."""
    arrow = _arrow(source)
    try:
        if not files.is_url(source):
            check_file(source)
        handle = files.open_binary(source) if files.is_url(source) else source
        return arrow.parquet.ParquetFile(handle, buffer_size=files.BLOCK, pre_buffer=False)
    except MediaError as error:
        raise DataError(str(error)) from error
    except (arrow.ArrowException, *_LIBRARY_ERRORS) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{source}: damaged or no Parquet file ({one_line(error)})") from error


def parquet(source: str, columns: Columns | None = None) -> Iterator[dict[str, Any]]:
    """The documents of one Parquet file: one a row; all columns of plain values that are no segment become keys.

    Which columns are segments is found out if it is not said: images and sounds are what ``datasets`` has marked so, or
    binary cells that begin as such files do; text is the column ``text``, ``caption``, ``content``, ``sentence``,
    ``transcription`` or ``transcript``, or the only column of strings. An empty cell is no segment.

    Args:
        source: a path or URL.
        columns: which column is what.

    Raises:
        DataError: the file is missing or damaged, has no such column, or pyarrow is not installed.
    """
    arrow = _arrow(source)
    file = _open_parquet(source)
    try:

        def first(name: str) -> list[Any]:
            batch = next(file.iter_batches(_SNIFFED, columns=[name], use_threads=False), None)
            return batch.column(0).to_pylist() if batch is not None else []

        schema = file.schema_arrow
        chosen = _choose(source, schema, columns, first)
        prefix = files.base(source).partition(".")[0]
        yield from _documents(source, chosen, schema, _batches(file, schema, chosen), prefix, files.parent(source))
    except (arrow.ArrowException, *_LIBRARY_ERRORS) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{source}: damaged Parquet file ({one_line(error)}); fetch it again") from error


def _batches(file: Any, schema: Any, columns: Columns) -> Iterator[_Batch]:
    """Batches of rows, without the bytes of images and sounds where the file says that every row has them."""
    kinds = {x.name: x.type for x in schema}
    media = [name for kind, name in columns.segments if not _is_text(kinds[name])]
    plain = [name for kind, name in columns.segments if _is_text(kinds[name])] + _kept(schema, columns)
    plain += [columns.id] if columns.id else []
    row = 0
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        chunks = {(x := metadata.column(i)).path_in_schema: x for i in range(metadata.num_columns)}
        wanted, size = [*plain], 0
        for name in media:
            leaf = f"{name}.bytes" if _fields(kinds[name]) else name
            statistics = chunks[leaf].statistics
            if statistics is None or not statistics.has_null_count or statistics.null_count:
                wanted.append(leaf)
                size += chunks[leaf].total_uncompressed_size
            if f"{name}.path" in chunks:
                wanted.append(f"{name}.path")
        rows = _at_once(size, metadata.num_rows)
        if wanted:
            for batch in file.iter_batches(rows, [group], list(dict.fromkeys(wanted)), use_threads=False):
                yield row, batch.num_rows, {name: batch.column(name) for name in batch.schema.names}
                row += batch.num_rows
        else:
            for start in range(0, metadata.num_rows, _ROWS):
                yield row + start, min(_ROWS, metadata.num_rows - start), {}
            row += metadata.num_rows


def _at_once(size: int, rows: int) -> int:
    """How many of so many rows, of so many bytes in all, to read at once."""
    return max(1, min(_ROWS, _CELLS * rows // size if size else _ROWS))


class _ParquetCells:
    """Cells of one Parquet file; each column has a few places in it, from where consecutive rows are near."""

    def __init__(self, source: str) -> None:
        self._file = _open_parquet(source)
        counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._starts = [0, *itertools.accumulate(counts)]
        self._places: dict[str, list[_Place]] = {}

    def cell(self, row: int, column: str) -> Any:
        """The cell as Python has it."""
        if not 0 <= row < self._starts[-1]:
            raise IndexError(f"it has {self._starts[-1]} rows")
        group = bisect.bisect_right(self._starts, row) - 1
        places = self._places.setdefault(column, [])
        near = [x for x in places if x.group == group and x.first <= row]
        place = max(near, key=lambda x: x.first, default=None) or _Place(self._file, group, column, self._starts[group])
        places[:] = [*(x for x in places if x is not place), place][-_PLACES:]
        return place.cell(row)


class _Place:
    """A place in one column of one row group: the last batches of rows, and those to come."""

    def __init__(self, file: Any, group: int, column: str, start: int) -> None:
        metadata = file.metadata.row_group(group)
        chunks = [metadata.column(i) for i in range(metadata.num_columns)]
        size = sum(x.total_uncompressed_size for x in chunks if x.path_in_schema.partition(".")[0] == column)
        rows = _at_once(size, metadata.num_rows)
        self.group = group
        self._batches = file.iter_batches(rows, [group], [column], use_threads=False)
        self._held: collections.deque[tuple[int, Any]] = collections.deque(maxlen=2)
        self._next = start

    @property
    def first(self) -> int:
        """The first row that can be had from here."""
        return self._held[0][0] if self._held else self._next

    def cell(self, row: int) -> Any:
        while row >= self._next:
            batch = next(self._batches)
            self._held.append((self._next, batch.column(0)))
            self._next += batch.num_rows
        start, array = next(x for x in reversed(self._held) if x[0] <= row)
        return array[row - start].as_py()


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def splits(name: str, source: str) -> dict[str, Any]:
    """The splits of a data set of the library ``datasets``, by name; one that has no name is ``train``.

    Args:
        name: a directory of ``save_to_disk``, or what ``load_dataset`` takes.
        source: what messages call it.

    Raises:
        DataError: it cannot be opened, or the library is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{source}: needs the library datasets; pip install 'mmtok[hf]'") from error

    saved = any((Path(name) / x).is_file() for x in SAVED)
    try:
        found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except (*_LIBRARY_ERRORS, ImportError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source}: cannot be opened ({one_line(error)})") from error
    if isinstance(found, datasets.Dataset):
        found = {found.split or "train": found}
    return {str(k): v for k, v in found.items()}


_open_splits = functools.lru_cache(maxsize=4)(splits)


def hugging_face(name: str, columns: Columns | None = None) -> Iterator[dict[str, Any]]:
    """The documents of a data set of the library ``datasets``, with the key ``split``; columns as of :func:`parquet`.

    Args:
        name: ``PATH_OR_NAME`` or ``PATH_OR_NAME:SPLIT``; without a split, all of them one after another.
        columns: which column is what.

    Raises:
        DataError: it cannot be opened, is damaged, has no such split or column, or the library is not installed.
    """
    arrow = _arrow(f"hf:{name}")
    name, wanted = _place(name)
    source = f"hf:{name}"
    found = _open_splits(name, source)
    if wanted and wanted not in found:
        raise DataError(f"{source}: has no split {wanted!r}, it has {', '.join(found)}")
    for split, dataset in found.items():
        if wanted in ("", split):
            try:
                yield from _of_split(dataset, f"{source}:{split}", split, columns)
            except (arrow.ArrowException, *_LIBRARY_ERRORS) as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(f"{source}: damaged data set ({one_line(error)})") from error


def _place(name: str) -> tuple[str, str]:
    """The path or name of a data set, and the split or ""."""
    split = ""
    if ":" in name and not files.is_url(name) and not Path(name).exists():
        name, _, split = name.rpartition(":")
    return (files.absolute(name) if Path(name).exists() else name), split


def _of_split(dataset: Any, source: str, split: str, columns: Columns | None) -> Iterator[dict[str, Any]]:
    rows = dataset.with_format("arrow")
    schema = dataset.features.arrow_schema

    def first(name: str) -> list[Any]:
        return list(rows.select_columns([name])[:_SNIFFED].column(0).to_pylist())

    chosen = _choose(source, schema, columns, first)

    def batches() -> Iterator[_Batch]:
        for start in range(0, len(dataset), _ROWS):
            table = rows[start : start + _ROWS]
            yield start, table.num_rows, {name: table.column(name).combine_chunks() for name in table.column_names}

    for document in _documents(source, chosen, schema, batches(), split, os.getcwd()):
        document.setdefault("split", split)
        yield document


class _SplitCells:
    """Cells of one split of a data set, which is memory-mapped."""

    def __init__(self, source: str) -> None:
        name, _, split = source.removeprefix("hf:").rpartition(":")
        self._rows = _open_splits(name, f"hf:{name}")[split].with_format("arrow")
        self._columns: dict[str, Any] = {}

    def cell(self, row: int, column: str) -> Any:
        """The cell as Python has it."""
        if column not in self._columns:
            self._columns[column] = self._rows.select_columns([column])
        return self._columns[column][row].column(0)[0].as_py()


# --- cells again ------------------------------------------------------------------------------------------------------

_LOCK = threading.Lock()  # the libraries make no promise to threads


@functools.lru_cache(maxsize=8)
def _opened(source: str, _process: int) -> _ParquetCells | _SplitCells:
    return _SplitCells(source) if source.startswith("hf:") else _ParquetCells(source)


def read_cell(source: str, row: int, column: str, label: str) -> bytes | str:
    """The bytes of an image or sound in a table, or the path that the cell has instead.

    A table is opened once a process. Rows in ascending order are read from a place that moves with them, so that
    neither time nor memory depends on how large a row group is.

    Args:
        source: ``table`` of a reference.
        row, column: of the cell.
        label: what messages call the cell.

    Raises:
        MediaError: the cell is empty or cannot be read.
        DataError: the table cannot be opened.
    """
    arrow = _arrow(source)
    try:
        with _LOCK:
            value = _opened(source, os.getpid()).cell(row, column)
    except (arrow.ArrowException, *_LIBRARY_ERRORS) as error:
        if isinstance(error, DataError):
            raise
        raise MediaError(f"{label}: cannot be read ({one_line(error)})") from error
    if isinstance(value, dict):
        folder = os.getcwd() if source.startswith("hf:") else files.parent(source)
        path = value.get("path")
        value = value.get("bytes")
        if value is None and isinstance(path, str):
            return files.join(folder, path)
    if not isinstance(value, bytes):
        raise MediaError(f"{label}: is empty, expected the bytes of a file")
    return value

"""Parquet files and Hugging Face ``datasets`` as documents (:mod:`mmtok.datasets.sources.columns` says how).

parquet       -- the documents of one Parquet file
hugging_face  -- the documents of a data set of the library ``datasets``
splits        -- such a data set itself
read_cell     -- the bytes of an image or sound, again and in any process
"""

from __future__ import annotations

import bisect
import collections
import functools
import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmtok.datasets.sources import files
from mmtok.datasets.sources.columns import Batch, Columns, choose, documents, fields_of, is_text, kept
from mmtok.errors import DataError, MediaError
from mmtok.sniffing import check_file, one_line

# Files that ``save_to_disk`` of the library datasets leaves in its directory.
SAVED = ("dataset_dict.json", "state.json")
_SNIFFED = 64  # rows that are looked at to tell what binary cells hold
_ROWS = 256  # read at once
_CELLS = 4 * 2**20  # bytes of media that are read at once, about
_PLACES = 3  # in one column that are kept: readers may be at work in several
# What libraries raise on data that is missing or damaged. Nothing broader is caught.
_LIBRARY_ERRORS = (OSError, ValueError, RuntimeError, LookupError, EOFError, NotImplementedError)


def _arrow(source: str) -> Any:
    """The library pyarrow, with its part for Parquet."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{source}: needs the library pyarrow; pip install 'mmtok[hf]'") from error
    return pyarrow


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
        chosen = choose(source, schema, columns, first)
        prefix = files.base(source).partition(".")[0]
        yield from documents(source, chosen, schema, _batches(file, schema, chosen), prefix, files.parent(source))
    except (arrow.ArrowException, *_LIBRARY_ERRORS) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{source}: damaged Parquet file ({one_line(error)}); fetch it again") from error


def _batches(file: Any, schema: Any, columns: Columns) -> Iterator[Batch]:
    """Batches of rows, without the bytes of images and sounds where the file says that every row has them."""
    kinds = {x.name: x.type for x in schema}
    media = [name for kind, name in columns.segments if not is_text(kinds[name])]
    plain = [name for kind, name in columns.segments if is_text(kinds[name])] + kept(schema, columns)
    plain += [columns.id] if columns.id else []
    row = 0
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        chunks = {(x := metadata.column(i)).path_in_schema: x for i in range(metadata.num_columns)}
        wanted, size = [*plain], 0
        for name in media:
            leaf = f"{name}.bytes" if fields_of(kinds[name]) else name
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

    chosen = choose(source, schema, columns, first)

    def batches() -> Iterator[Batch]:
        for start in range(0, len(dataset), _ROWS):
            table = rows[start : start + _ROWS]
            yield start, table.num_rows, {name: table.column(name).combine_chunks() for name in table.column_names}

    for document in documents(source, chosen, schema, batches(), split, os.getcwd()):
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
    neither time nor memory depends on how large a row group is; a page of it is in memory, which is what 1,024 cells
    take where pyarrow wrote the file.

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

"""What the columns of a table are, and its rows as documents.

    Columns    -- which column is what
    choose     -- as it is said, or as names and contents say
    documents  -- batches of rows as documents

A row is a document, its cells are segments and keys. Images and sounds are given as references, ``{"table", "row",
"column", "name"}``, so that reading rows stays light.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mmtok.datasets.sources import files
from mmtok.datasets.sources.manifest import RESERVED, fault
from mmtok.errors import DataError
from mmtok.sniffing import magic

# Names that columns of text go by; of several the first is taken.
_TEXT = ("text", "caption", "content", "sentence", "transcription", "transcript")
_BAD = object()
# The number of the first row, how many rows there are, and their columns but for those that are known to be full.
Batch = tuple[int, int, Mapping[str, Any]]


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


def is_text(kind: Any) -> bool:
    """Whether a column is of strings."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_bytes(kind: Any) -> bool:
    """Whether a column is of bytes."""
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def fields_of(kind: Any) -> dict[str, Any]:
    """The fields of a struct, or none."""
    from pyarrow import types

    return {x.name: x.type for x in kind} if types.is_struct(kind) else {}


def _is_media(kind: Any) -> bool:
    """Whether a column may hold images or sounds: bytes, or a struct with ``bytes`` in it."""
    return _is_bytes(fields_of(kind).get("bytes", kind))


def _is_plain(kind: Any) -> bool:
    """Whether a column is kept as a key of the documents."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    tests = (types.is_boolean, types.is_integer, types.is_floating, types.is_date, types.is_time, types.is_timestamp)
    return is_text(kind) or types.is_decimal(kind) or any(test(kind) for test in tests)


def _named(schema: Any) -> dict[str, str]:
    """The columns that the library ``datasets`` has marked as images and sounds."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {"Image": "image", "Audio": "audio"}
        return {name: kinds[x["_type"]] for name, x in features.items() if x.get("_type") in kinds}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def choose(source: str, schema: Any, columns: Columns | None, first: Callable[[str], Iterable[Any]]) -> Columns:
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
            fits = is_text(kinds[name]) or (_is_media(kinds[name]) if kind != "id" else _is_plain(kinds[name]))
            if not fits or (kind == "text" and not is_text(kinds[name])):
                raise DataError(f"{source}: column {name!r} cannot be the {kind}, its columns are: {listing}")
        return columns
    media = {k: v for k, v in _named(schema).items() if k in kinds and _is_media(kinds[k])}
    for name, kind in kinds.items():
        if name not in media and _is_media(kind) and (found := _sniff(first(name))):
            media[name] = found
    texts = [name for name, kind in kinds.items() if is_text(kind) and name != "id"]
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


def documents(
    source: str, columns: Columns, schema: Any, batches: Iterable[Batch], prefix: str, folder: str
) -> Iterator[dict[str, Any]]:
    """The documents of batches of rows.

    Args:
        source: as references have it.
        prefix: of the ids of documents without one.
        folder: that paths in cells are relative to.
    """
    others = kept(schema, columns)
    for start, count, arrays in batches:
        keys = {name: _values(arrays[name]) for name in others}
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


def kept(schema: Any, columns: Columns) -> list[str]:
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

    fields = fields_of(array.type)
    if not fields and not _is_bytes(array.type):
        return ("text" if kind == "text" else "path"), _values(array)
    if not fields:
        return "cell", ["" if x else None for x in array.is_valid().to_pylist()]
    there = pc.struct_field(array, "bytes").is_valid().to_pylist() if "bytes" in fields else [True] * len(array)
    names = _values(pc.struct_field(array, "path")) if is_text(fields.get("path")) else [None] * len(array)
    return "cell", [
        files.base(name) if isinstance(name, str) else ("" if x else None) for name, x in zip(names, there, strict=True)
    ]

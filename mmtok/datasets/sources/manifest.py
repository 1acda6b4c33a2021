"""Manifests and folders as documents, one at a time.

    read_manifest  -- JSONL, one document a line
    read_folder    -- files that differ in their suffix alone are one document
    located        -- paths that were relative to the manifest or folder, made absolute

A manifest's line:

    {"id": "cow", "segments": [{"type": "text", "text": "a cow"}, {"type": "image", "path": "cow.png"},
     {"type": "audio", "path": "cow.ogg", "start": 0.0, "end": 1.2}, {"type": "turn", "role": "assistant"}]}

What is no document is given as ``{"id", "error"}``, with one line that says why, so that one bad line stops nothing.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from mmtok import media, sniffing
from mmtok.datasets.sources import files
from mmtok.documents import ROLES, check_text
from mmtok.errors import DataError, MediaError
from mmtok.sniffing import one_line

# By suffix; documents made of files have their segments in this order.
SUFFIXES = {
    "text": {*sniffing.SUFFIXES["text"], ".caption", ".py", ".rst"},
    "image": sniffing.SUFFIXES["image"],
    "audio": sniffing.SUFFIXES["audio"],
}
MAX_LINE = 64 * 2**20
MAX_DEPTH = 100
# Keys of a document that a source's own fields never become.
RESERVED = ("id", "segments", "error")
_MAX_SECONDS = 1e9
_NEEDS = {"text": "text", "image": "path", "audio": "path", "turn": "role"}


def fault(identity: object, error: str) -> dict[str, Any]:
    """The document that stands for one that cannot be used, and why."""
    return {"id": files.printable(str(identity)), "error": files.printable(error)}


def located(documents: Iterable[dict[str, Any]], folder: str) -> Iterator[dict[str, Any]]:
    """The documents with the paths of their media absolute, or URLs: as seen from ``folder`` if they were relative."""
    for document in documents:
        for segment in document.get("segments", ()):
            if isinstance(segment.get("path"), str):
                segment["path"] = files.join(folder, segment["path"])
        yield document


# --- manifests --------------------------------------------------------------------------------------------------------


def read_manifest(source: str | Path) -> Iterator[dict[str, Any]]:
    """The documents of a JSONL manifest, plain or gzip (``.gz``), with paths as they are written there.

    A text segment has ``text``, or the ``path`` of a UTF-8 file, which is read. A document without ``id`` is called
    ``line-N``. Empty lines are passed over.

    Args:
        source: a path or URL.

    Yields:
        ``{"id": str, "segments": [...], ...}`` with all further keys of the line, or ``{"id", "error"}``.

    Raises:
        DataError: the manifest itself cannot be read.
    """
    name = str(source)
    shown = files.printable(name)
    folder = files.parent(name)
    try:
        with files.translated(), contextlib.ExitStack() as stack:
            handle = stack.enter_context(files.open_binary(name))
            if name.endswith(".gz"):
                handle = stack.enter_context(cast(BinaryIO, gzip.GzipFile(fileobj=handle)))
            for number, line in _lines(handle):
                if number == 1:
                    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                        raise DataError(f"{shown}: looks like UTF-16, expected a manifest in UTF-8; save it as UTF-8")
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line := line.strip():
                    yield _document(line, number, shown, folder)
    except (OSError, EOFError, zlib.error) as error:
        why = files.reason(error) if isinstance(error, OSError) else one_line(error)
        raise DataError(f"{shown}: cannot read the manifest ({why})") from error


def _lines(handle: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, each of at most ``MAX_LINE`` + 1 bytes: the rest of a longer one is passed over."""
    number = 0
    while line := handle.readline(MAX_LINE + 1):
        number += 1
        rest = line
        while len(line) > MAX_LINE and rest and not rest.endswith(b"\n"):
            rest = handle.readline(files.BLOCK)
        yield number, line


def _document(line: bytes, number: int, shown: str, folder: str) -> dict[str, Any]:
    identity: object = f"line-{number}"
    try:
        document = parse_json(line)
        if not isinstance(document, dict):
            raise DataError(f"is {_kind(document)}, expected an object {{'id', 'segments': [...]}}")
        own = document.get("id")
        if own is not None:
            if isinstance(own, bool) or not isinstance(own, str | int | float):
                raise DataError(f"'id' is {_kind(own)}, expected a string")
            identity = str(own)
        if "error" in document:
            raise DataError("the key 'error' is reserved; rename it")
        segments = document.get("segments")
        if not isinstance(segments, list):
            raise DataError(f"'segments' is {_kind(segments)}, expected a list of segments")
        for position, segment in enumerate(segments):
            try:
                _check_segment(segment, folder)
            except (DataError, MediaError) as error:
                raise DataError(f"segment {position}: {error}") from error
        if b"\\u" in line:
            _check_unicode(document)
    except (DataError, MediaError) as error:
        return fault(identity, f"{shown}:{number}: {one_line(error)}")
    return {"id": identity} | document | {"id": identity}


def parse_json(data: bytes) -> Any:
    """What JSON text says, strictly: UTF-8, finite numbers, at most ``MAX_DEPTH`` levels and ``MAX_LINE`` bytes.

    Raises:
        DataError: it is something else.
    """
    if len(data) > MAX_LINE:
        raise DataError(f"longer than {MAX_LINE} bytes, which is the limit; split it")
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_constant, parse_float=_float)
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"not JSON ({one_line(error)})") from error
    except RecursionError as error:
        raise DataError(f"more than {MAX_DEPTH} levels deep, which is the limit") from error
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    return value


def _constant(name: str) -> float:
    raise DataError(f"holds {name}, which JSON has not; leave it out or write null")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise DataError(f"holds the number {digits[:40]}, which is too large")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for x in level
            if isinstance(x, dict | list)
            for inner in (x.values() if isinstance(x, dict) else x)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise DataError(f"more than {MAX_DEPTH} levels deep, which is the limit")


def _check_unicode(document: dict[str, Any]) -> None:
    """Escapes can write lone surrogates, which no UTF-8 file can hold."""
    try:
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise DataError(f"holds the lone surrogate U+{code:04X}, which is not Unicode text") from error


def _check_segment(segment: Any, folder: str) -> None:
    """Raise unless it is a segment; the text of a text file is put in."""
    if not isinstance(segment, dict):
        raise DataError(f"is {_kind(segment)}, expected an object with a type")
    kind = segment.get("type")
    if not isinstance(kind, str) or kind not in _NEEDS:
        raise DataError(f"type is {_shown(kind)}, expected 'text', 'image', 'audio' or 'turn'")
    if kind == "text" and "text" not in segment and "path" in segment:
        segment["text"] = _text_file(files.join(folder, _path(segment)))
    needed = _NEEDS[kind]
    if needed not in segment:
        raise DataError(f"{kind} without {needed!r}" + (" or 'path'" if kind == "text" else ""))
    if kind == "text":
        check_text(segment["text"])
    elif kind == "turn":
        if segment["role"] not in ROLES:
            raise DataError(f"role is {_shown(segment['role'])}, expected 'user' or 'assistant'")
    else:
        _path(segment)
        if "offset" in segment and "size" in segment:  # a part of a file, as members of WebDataset shards are
            for key in ("offset", "size"):
                if type(segment[key]) is not int or segment[key] < 0:
                    raise DataError(f"{key} is {_shown(segment[key])}, expected a count of bytes")
            if not isinstance(segment.setdefault("name", ""), str):
                raise DataError(f"name is {_shown(segment['name'])}, expected a string")
    if kind == "audio":
        for key in ("start", "end"):
            value = segment.get(key)
            if value is not None and (type(value) not in (int, float) or not abs(value) <= _MAX_SECONDS):
                raise DataError(f"{key} is {_shown(value)}, expected seconds")


def _path(segment: dict[str, Any]) -> str:
    path = segment["path"]
    if not isinstance(path, str) or not path or "\0" in path:
        raise DataError(f"path is {_shown(path)}, expected the path or URL of a file")
    return path


def _kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "missing or null"}
    return names.get(type(value), "a number")


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | None) else _kind(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _text_file(path: str) -> str:
    """The text of a UTF-8 file or URL."""
    if not files.is_url(path):
        return media.read_text(path)
    try:
        return media.decode_text(files.read_bytes(path, media.MAX_TEXT_BYTES), path)
    except OSError as error:
        raise MediaError(f"{path}: cannot be read ({files.reason(error)})") from error


# --- folders ----------------------------------------------------------------------------------------------------------


def read_folder(folder: str | Path, modalities: Sequence[str] = tuple(SUFFIXES)) -> Iterator[dict[str, Any]]:
    """A folder as documents: files that differ in their suffix alone (cow.png, cow.wav, cow.txt) are one document.

    Its segments are its texts, then its images, then its sounds, each by name. Documents come in the order of their
    names; those of one folder are in memory at a time. Hidden files and links to folders are passed over.

    Args:
        folder: a path or URL, searched to the bottom.
        modalities: which files are looked at.

    Yields:
        ``{"id": path without suffix, "segments": [...]}`` with paths relative to the folder, or ``{"id", "error"}``.

    Raises:
        DataError: the folder cannot be listed.
    """
    top = str(folder)
    try:
        entries = files.scan(top)
    except OSError as error:
        raise DataError(f"{files.printable(top)}: cannot list the folder ({files.reason(error)})") from error
    yield from _below(top, "", entries, modalities)


def _below(top: str, prefix: str, entries: list[tuple[str, bool]], modalities: Sequence[str]) -> Iterator[dict]:
    """The documents of one folder and of those in it, in the order of their first names."""
    together: dict[str, list[tuple[str, str]] | None] = {}
    for name, is_folder in entries:
        path = PurePosixPath(name)
        modality = next((m for m in SUFFIXES if m in modalities and path.suffix.lower() in SUFFIXES[m]), None)
        if is_folder:
            together[name + "/"] = None
        elif modality is not None:
            cast(list, together.setdefault(path.stem, [])).append((modality, name))
    order = tuple(SUFFIXES)
    for key, found in together.items():
        if found is None:
            try:
                inner = files.scan(files.join(top, prefix + key))
            except OSError as error:
                yield fault(prefix + key, f"{files.join(top, prefix + key)}: cannot be listed ({files.reason(error)})")
                continue
            yield from _below(top, prefix + key, inner, modalities)
        else:
            yield _together(top, prefix, key, sorted(found, key=lambda x: order.index(x[0])))


def _together(top: str, prefix: str, key: str, found: list[tuple[str, str]]) -> dict[str, Any]:
    segments: list[dict[str, Any]] = []
    for modality, name in found:
        path = prefix + name
        try:
            path.encode("utf-8")
            segments.append({"type": modality, "path": path})
            if modality == "text":
                segments[-1]["text"] = _text_file(files.join(top, path))
        except UnicodeEncodeError:
            return fault(prefix + key, f"{files.join(top, path)}: the name is not UTF-8; rename the file")
        except MediaError as error:
            return fault(prefix + key, str(error))
    return {"id": prefix + key, "segments": segments}

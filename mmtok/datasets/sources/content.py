"""The bytes of a media segment as a local file, wherever they are: :func:`local_copy`.

{"path": P}                                    a local file, used where it lies, or a URL
{"path": TAR, "offset": o, "size": n, "name"}  a part of a file or URL: a member of a WebDataset shard
{"table": SOURCE, "row": i, "column": c}       a cell of a Parquet file or Hugging Face data set
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from mmtok.datasets.sources import files, tables
from mmtok.errors import DataError, MediaError, MmtokError
from mmtok.media import MAX_IMAGE_BYTES
from mmtok.sniffing import SUFFIXES, check_file, one_line, os_call

_LIVE: set[str] = set()  # temporary files of this process
_KNOWN = set().union(*SUFFIXES.values())


class Content:
    """A media file while it is at hand.

    Attributes:
        path: of a local file, to be read with :mod:`mmtok.media`.
        label: what messages call it: where it is from.
    """

    def __init__(self, path: str, label: str, sha256: str | None = None) -> None:
        self.path = path
        self.label = label
        self._sha256 = sha256

    @property
    def sha256(self) -> str:
        """Of its bytes, in hex; of a file that was copied it is known already.

        Raises:
            MediaError: the file cannot be read.
        """
        if self._sha256 is None:
            check_file(self.path)

            def digest() -> str:
                with open(self.path, "rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest()

            self._sha256 = os_call(self.path, digest)
        return self._sha256


@contextlib.contextmanager
def local_copy(segment: Mapping[str, Any]) -> Iterator[Content]:
    """The content of an image or audio segment of a normalised document, as a local file.

    A local file is used in place. Anything else is copied to a temporary file, which keeps a known suffix of the name
    and is gone afterwards; a MediaError that is raised meanwhile says the label instead of the temporary path. Where a
    network fails, three tries are made.

    Raises:
        MediaError: the content is missing, empty, cannot be read, or is an image file of more than
            ``MAX_IMAGE_BYTES``; one line that starts with the label.
        DataError: it is not the content's fault: no room for temporary files, or a package is missing.
    """
    if "path" in segment and not _is_part(segment) and not files.is_url(segment["path"]):
        yield Content(segment["path"], segment["path"])
        return
    label = label_of(segment)
    if "path" not in segment:
        cell = tables.read_cell(segment["table"], segment["row"], segment["column"], label)
        if isinstance(cell, str):  # the table holds the name of a file
            with local_copy({"type": segment["type"], "path": cell}) as content:
                yield content
            return
    else:
        cell = None
    limit = MAX_IMAGE_BYTES if segment["type"] == "image" else None
    with _temporary(suffix_of(segment)) as (target, path):
        if cell is not None:
            digest = _copy_cell(cell, target, label, limit)
        else:
            digest = _copy_file(segment, target, label, limit)
        try:
            yield Content(path, label, digest)
        except MediaError as error:
            if path not in str(error):
                raise
            raise MediaError(str(error).replace(path, label)) from error


def label_of(segment: Mapping[str, Any]) -> str:
    """What messages call the content of a segment: its path, the shard and the name in it, or the table and the row."""
    if "path" not in segment:
        return f"{segment['table']} row {segment['row']} column {segment['column']!r}"
    if _is_part(segment):
        return files.printable(f"{segment['path']}/{segment['name']}")
    return files.printable(segment["path"])


def suffix_of(segment: Mapping[str, Any]) -> str:
    """The suffix of a segment's file, if it is one that says what a file holds: ".png", or ""."""
    if "path" not in segment:
        name = segment.get("name") or ""
    else:
        name = segment["name"] if _is_part(segment) else files.base(segment["path"])
    suffix = PurePosixPath(name).suffix.lower()
    return suffix if suffix in _KNOWN else ""


def _is_part(segment: Mapping[str, Any]) -> bool:
    """Whether it is a part of a file; an offset alone is the manifest's own affair."""
    return "offset" in segment and "size" in segment


@contextlib.contextmanager
def _temporary(suffix: str) -> Iterator[tuple[BinaryIO, str]]:
    """A temporary file, opened, and its path."""
    try:
        number, path = tempfile.mkstemp(prefix="mmtok-", suffix=suffix)
    except OSError as error:
        raise DataError(f"{tempfile.gettempdir()}: cannot write a temporary file ({files.reason(error)})") from error
    _LIVE.add(path)
    try:
        with open(number, "w+b", buffering=0) as file:
            yield file, path
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        _LIVE.discard(path)


def discard_copies() -> None:
    """Remove the temporary files of a process that is about to end at once."""
    for path in tuple(_LIVE):
        with contextlib.suppress(OSError):
            os.unlink(path)


def _write(target: BinaryIO, data: bytes | memoryview) -> None:
    """All of it, or DataError: a full disk says nothing about the content."""
    left = memoryview(data)
    try:
        while left:
            left = left[target.write(left) :]
    except OSError as error:
        raise DataError(f"{tempfile.gettempdir()}: cannot write a temporary file ({files.reason(error)})") from error


def _check_size(label: str, size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise MediaError(f"{label}: {size} bytes, the limit for an image file is {limit}")


def _copy_cell(cell: bytes, target: BinaryIO, label: str, limit: int | None) -> str:
    _check_size(label, len(cell), limit)
    _write(target, cell)
    return hashlib.sha256(cell).hexdigest()


def _copy_file(segment: Mapping[str, Any], target: BinaryIO, label: str, limit: int | None) -> str:
    """Copy a file or a part of it in blocks; gives the sha256."""
    size = segment["size"] if _is_part(segment) else None
    if size is not None:
        _check_size(label, size, limit)

    def copy() -> str:
        digest = hashlib.sha256()
        target.seek(0)
        target.truncate()
        done = 0
        with files.open_binary(segment["path"]) as source:
            if size is not None:
                source.seek(segment["offset"])
            while data := source.read(files.BLOCK if size is None else min(files.BLOCK, size - done)):
                done += len(data)
                _check_size(label, done, limit)
                digest.update(data)
                _write(target, data)
        if size is not None and done < size:
            raise MediaError(f"{label}: cut short: {done} bytes, expected {size}")
        return digest.hexdigest()

    try:
        return files.persistently(copy) if files.is_url(segment["path"]) else copy()
    except FileNotFoundError as error:
        raise MediaError(f"{label}: no such file") from error
    except MmtokError:
        raise
    except (OSError, ValueError, OverflowError) as error:  # the last two are of places that no file has
        why = files.reason(error) if isinstance(error, OSError) else one_line(error)
        raise MediaError(f"{label}: cannot be read ({why})") from error

"""WebDataset shards (https://github.com/webdataset/webdataset) read in place: nothing is unpacked.

    find_shards  -- the .tar files that a path, a directory or a pattern names
    pictures     -- the picture of each sample of a shard
    documents    -- the samples of a shard as documents: texts, images and sounds, and their further fields

Names in a shard are labels only; they are never used as paths.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mmtok.datasets.sources import files
from mmtok.datasets.sources.manifest import RESERVED, SUFFIXES, fault, parse_json
from mmtok.errors import DataError, MediaError
from mmtok.media import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, decode_text
from mmtok.sniffing import one_line

_DAMAGE = (tarfile.TarError, OSError, ValueError, LookupError, ArithmeticError, EOFError)
_ORDER = tuple(SUFFIXES)


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A file in a shard: its sample's key, its extension and name, and where its bytes lie."""

    shard: str
    key: str
    extension: str
    name: str
    offset: int
    size: int

    @property
    def suffix(self) -> str:
        """The last part of the extension, as of a file's name: ``.png``."""
        return "." + self.extension.rpartition(".")[2].lower()

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.shard}/{self.name}"

    def read(self) -> bytes:
        """Its bytes. The shard is opened anew each time, so that threads share nothing.

        Raises:
            MediaError: the shard cannot be read any more, or the picture is too large.
        """
        if self.size > MAX_IMAGE_BYTES:
            raise MediaError(f"{self.label}: {self.size} bytes, the limit for an image file is {MAX_IMAGE_BYTES}")
        try:
            with open(self.shard, "rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:
            raise MediaError(f"{self.label}: cannot be read ({error.strerror})") from error


def find_shards(source: str) -> list[Path]:
    """The shards that a local path, a directory, or a pattern with wildcards or braces names; none if it names none.

    Raises:
        DataError: a pattern matches nothing, or other files than shards; a shard of a range is missing; or they are
            compressed.
    """
    path = Path(source)
    check_compression(source)
    if path.is_dir():
        found = sorted(path.rglob("*.tar"))
        images = (x for x in path.rglob("*") if x.suffix.lower() in SUFFIXES["image"])
        return found if found and next(images, None) is None else []
    if path.exists() or not files.is_pattern(source):
        return [path] if path.suffix == ".tar" else []
    found = [Path(x) for x in files.expand(source)]
    if other := [x for x in found if x.suffix != ".tar"]:
        raise DataError(f"{source}: {other[0]} matches, expected only .tar shards; give a folder for pictures")
    return found


def check_compression(source: str) -> None:
    """Raise :class:`DataError` if a name says that a shard is compressed."""
    if re.search(r"\.(tgz|tar\.\w+)$", source):
        raise DataError(f"{source}: is compressed, expected plain .tar shards, which are read by offset; unpack it")


def members(shard: str, file: BinaryIO) -> Iterator[Member]:
    """The files in a shard, in order. Links, sparse files and names without a stem are passed over.

    Files of one name up to the first dot are one sample.

    Args:
        shard: what messages call it.
        file: the shard, opened; it may be moved about between two members.

    Raises:
        DataError: the shard is damaged or cut short; all members before that have been given, and the one in it.
        OSError: a URL cannot be read.
    """
    last = -1
    try:
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            while (entry := tar.next()) is not None:
                vars(tar)["members"].clear()  # tarfile would keep them all
                # Sizes below zero lead tarfile in a circle.
                if entry.size < 0 or entry.offset_data <= last:
                    raise tarfile.ReadError(f"{entry.name!r} has an impossible size")
                last = entry.offset_data
                folder, slash, name = entry.name.removeprefix("./").rpartition("/")
                stem, _, extension = name.partition(".")
                if not entry.isreg() or entry.issparse() or not stem or not extension:
                    continue
                yield Member(shard, folder + slash + stem, extension, entry.name, entry.offset_data, entry.size)
                if entry.offset_data + entry.size > end:
                    raise tarfile.ReadError(f"{entry.name!r} ends after it")
            file.seek(tar.offset)
            # tarfile takes a header that is cut short, or the end of the file, for the end of the archive.
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it has no end mark")
    except _DAMAGE as error:
        if isinstance(error, OSError) and files.is_url(shard):
            raise  # the network's fault, not the shard's
        name = files.printable(shard)
        raise DataError(f"{name}: damaged or cut short shard ({one_line(error)}); fetch it again") from error


@functools.cache
def pictures(shard: str, _size: int, _mtime_ns: int) -> tuple[Member, ...]:
    """The picture of each sample of a shard, which is read once for each size and time that it has.

    Of the pictures of a sample the one whose extension has no further dot counts (``cow.jpg``, not ``cow.mask.png``),
    then the first.

    Raises:
        DataError: the shard is missing, damaged or cut short.
    """
    chosen: dict[str, Member] = {}
    try:
        with open(shard, "rb") as file:
            for member in members(shard, file):
                if member.suffix in SUFFIXES["image"]:
                    before = chosen.get(member.key)
                    if before is None or ("." in before.extension and "." not in member.extension):
                        chosen[member.key] = member
    except FileNotFoundError as error:
        raise DataError(f"{shard}: no such shard") from error
    except OSError as error:
        raise DataError(f"{shard}: cannot read the shard ({files.reason(error)})") from error
    return tuple(chosen.values())


def documents(shard: str) -> Iterator[dict[str, Any]]:
    """The samples of a shard as documents; where its members lie is in memory, of one shard at a time.

    The segments of a sample are its texts (``.txt``, ``.caption``), its images, then its sounds, each in the order of
    the shard. A ``.json`` gives its further keys, and its ``text`` or ``caption`` is the text of a sample that has no
    other; ``.cls`` becomes the key ``cls``. An extension that comes again begins another sample of that name.

    Args:
        shard: a path or URL.

    Yields:
        ``{"id": name of the sample, "segments": [...], ...}``, or ``{"id", "error"}``. If the shard is damaged, what
        lies before is given, but for the last sample where it may lack a part, and then one ``{"id", "error"}``.

    Raises:
        DataError: the shard cannot be opened.
    """
    try:
        with files.translated(), files.open_binary(shard) as file:
            samples: list[list[Member]] = []
            latest: dict[str, list[Member]] = {}
            sample: list[Member] = []
            damage = None
            try:
                for member in members(shard, file):
                    sample = latest.get(member.key, [])
                    if not sample or any(x.extension == member.extension for x in sample):
                        sample = latest[member.key] = []
                        samples.append(sample)
                    sample.append(member)
            except DataError as error:
                damage = str(error)
            if damage and samples:
                samples.remove(sample)
                damage += f"; {sample[0].key!r} and all after it are left out"
            latest.clear()
            for found in samples:
                yield _sample(file, found)
            if damage:
                yield fault(files.base(shard), damage)
    except OSError as error:
        raise DataError(f"{files.printable(shard)}: cannot read the shard ({files.reason(error)})") from error


def _sample(file: BinaryIO, found: list[Member]) -> dict[str, Any]:
    """One sample as a document."""
    key = found[0].key
    fields: dict[str, Any] = {}
    segments: list[dict[str, Any]] = []
    try:
        key.encode("utf-8")
        for member in found:
            kind = next((k for k, v in SUFFIXES.items() if member.suffix in v), None)
            if kind == "text":
                segments.append({"type": kind, "text": decode_text(_content(file, member), member.label)})
            elif kind is not None:
                place = {"path": member.shard, "offset": member.offset, "size": member.size, "name": member.name}
                segments.append({"type": kind, **place})
            elif member.suffix == ".json":
                fields |= _fields(_content(file, member), member.label)
            elif member.suffix == ".cls":
                fields["cls"] = decode_text(_content(file, member), member.label).strip()
    except UnicodeEncodeError:
        return fault(key, f"{found[0].label}: the name is not UTF-8")
    except (DataError, MediaError) as error:
        return fault(key, str(error))
    caption = next((x for x in ("text", "caption") if isinstance(fields.get(x), str)), None)
    if caption is not None and all(x["type"] != "text" for x in segments):
        segments.append({"type": "text", "text": fields.pop(caption)})
    if not segments:
        names = ", ".join("." + x.extension for x in found)
        return fault(key, f"{found[0].label}: its sample has no text, image or audio, but {names}")
    segments.sort(key=lambda x: _ORDER.index(x["type"]))
    return {"id": key, "segments": segments, **{k: v for k, v in fields.items() if k not in RESERVED}}


def _content(file: BinaryIO, member: Member) -> bytes:
    """The bytes of a text, a label or a .json, which are small."""
    if member.size > MAX_TEXT_BYTES:
        raise MediaError(f"{member.label}: {member.size} bytes of text, the limit is {MAX_TEXT_BYTES}")
    file.seek(member.offset)
    return file.read(member.size)


def _fields(data: bytes, label: str) -> dict[str, Any]:
    try:
        value = parse_json(data)
    except DataError as error:
        raise DataError(f"{label}: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{label}: is no JSON object")
    return value

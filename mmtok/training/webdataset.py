"""WebDataset shards (https://github.com/webdataset/webdataset) read in place: nothing is unpacked.

    find_shards    -- the .tar files that a path, a directory or a pattern names
    expand_braces  -- shards/{000..009}.tar written out
    members        -- where in a shard the picture of each sample lies, and its bytes

Names in a shard are labels only; they are never used as paths.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from mmtok.errors import DataError, MediaError
from mmtok.media import MAX_IMAGE_BYTES
from mmtok.sniffing import one_line
from mmtok.training.corpus import SUFFIXES


@dataclasses.dataclass(frozen=True)
class Member:
    """The picture of one sample: the sample's key, the picture's name in the shard, and where its bytes lie."""

    shard: str
    key: str
    name: str
    offset: int
    size: int

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
    """The shards that a path, a directory, or a pattern with wildcards or braces names; none if it names no shards.

    Raises:
        DataError: a pattern matches nothing, or other files than shards; a shard of a range is missing; or they are
            compressed.
    """
    path = Path(source)
    if re.search(r"\.(tgz|tar\.\w+)$", source):
        raise DataError(f"{source}: is compressed, expected plain .tar shards, which are read by offset; unpack it")
    if path.is_dir():
        found = sorted(path.rglob("*.tar"))
        pictures = (x for x in path.rglob("*") if x.suffix.lower() in SUFFIXES["image"])
        return found if found and next(pictures, None) is None else []
    if path.exists() or not re.search(r"[*?\[{]", source):
        return [path] if path.suffix == ".tar" else []
    names: dict[str, None] = {}
    for name in expand_braces(source):
        wild = re.search(r"[*?\[]", name)
        if not wild and not Path(name).exists():
            raise DataError(f"{source}: no such shard: {name}")
        names |= dict.fromkeys(sorted(glob.glob(name, recursive=True)) if wild else [name])
    found = [Path(x) for x in names]
    if not found:
        raise DataError(f"{source}: no file matches, expected .tar shards")
    if other := [x for x in found if x.suffix != ".tar"]:
        raise DataError(f"{source}: {other[0]} matches, expected only .tar shards; give a folder for pictures")
    return found


def expand_braces(pattern: str) -> Iterator[str]:
    """A pattern with {000..009} and {a,b} written out as bash does it: leading zeros of one number widen all."""
    for match in re.finditer(r"\{([^{}]*)\}", pattern):
        inner = match[1]
        if ends := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
            width = max(map(len, ends.groups())) if any(len(x) > 1 and x[0] == "0" for x in ends.groups()) else 0
            first, last = int(ends[1]), int(ends[2])
            step = 1 if first <= last else -1
            options: Iterator[str] = (f"{x:0{width}}" for x in range(first, last + step, step))
        elif "," in inner:
            options = iter(inner.split(","))
        else:
            continue
        for option in options:
            yield from expand_braces(pattern[: match.start()] + option + pattern[match.end() :])
        return
    yield pattern


@functools.cache
def members(shard: str, size: int, _mtime_ns: int) -> tuple[Member, ...]:
    """The picture of each sample of a shard, which is read once for each size and time that it has.

    Files of one name up to the first dot are one sample. Of its pictures the one whose extension has no further dot
    counts (``cow.jpg``, not ``cow.mask.png``), then the first. Links and sparse files are passed over.

    Raises:
        DataError: the shard is missing, damaged or cut short.
    """
    chosen: dict[str, Member] = {}
    plain: set[str] = set()
    last = -1
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            for entry in tar:
                # Sizes below zero lead tarfile in a circle.
                if entry.size < 0 or entry.offset_data <= last:
                    raise tarfile.ReadError(f"{entry.name!r} has an impossible size")
                last = entry.offset_data
                folder, slash, base = entry.name.removeprefix("./").rpartition("/")
                stem, _, extension = base.partition(".")
                suffix = "." + extension.rpartition(".")[2].lower()
                if not entry.isreg() or entry.issparse() or not stem or suffix not in SUFFIXES["image"]:
                    continue
                if entry.offset_data + entry.size > size:
                    raise tarfile.ReadError(f"{entry.name!r} ends after it")
                key, simple = folder + slash + stem, "." not in extension
                if key not in chosen or (simple and key not in plain):
                    chosen[key] = Member(shard, key, entry.name, entry.offset_data, entry.size)
                if simple:
                    plain.add(key)
            file.seek(tar.offset)
            # tarfile takes a header that is cut short, or the end of the file, for the end of the archive.
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it has no end mark")
    except FileNotFoundError as error:
        raise DataError(f"{shard}: no such shard") from error
    except (tarfile.TarError, OSError, ValueError, LookupError, ArithmeticError, EOFError) as error:
        raise DataError(f"{shard}: damaged or cut short shard ({one_line(error)}); fetch it again") from error
    return tuple(chosen.values())

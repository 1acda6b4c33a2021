"""Names of files, local paths and fsspec URLs alike, and the bytes behind them.

    is_url, absolute, join, parent, base   -- names
    expand, expand_braces                  -- patterns: x/*.tar, x/{000..009}.tar
    open_binary, read_bytes, scan, exists  -- what lies there
    translated, persistently               -- faults of a network as OSError; three tries

URLs are opened by fsspec (https://filesystem-spec.readthedocs.io): ``s3://``, ``gs://``, ``https://``, ``memory://``
and more; some need one more package, which the message names.
"""

from __future__ import annotations

import contextlib
import glob
import io
import os
import posixpath
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar, cast

from mmtok.errors import DataError, MmtokError
from mmtok.sniffing import one_line

BLOCK = 1 << 20
_TOKENS = {"dataset.json", "vocab.json"}  # names of files in a token dataset
# Seconds before the second and the third try.
_PAUSES = (0.5, 2.0)
# What another try does not change.
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, io.UnsupportedOperation)
# What clients of fsspec raise that is no OSError; looked up only if the client is in use.
_CLIENT_ERRORS = (("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError"), ("gcsfs.retry", "HttpError"))

T = TypeVar("T")


def is_url(name: str) -> bool:
    """Whether a name is a URL (``s3://bucket/x``, ``simplecache::https://host/x``) rather than a local path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)", name) is not None


def absolute(name: str) -> str:
    """A URL as it is, except that ``file://`` becomes the path; a path made absolute, ``..`` and links kept."""
    if name.startswith("file://"):
        name = name.removeprefix("file://")
    return name if is_url(name) else os.path.join(os.getcwd(), name)


def join(folder: str, name: str) -> str:
    """The file ``name`` as seen from a folder: itself if it is absolute or a URL."""
    if is_url(name):
        return absolute(name)
    if not is_url(folder) or os.path.isabs(name):
        return os.path.join(absolute(folder), name)
    head, chain, tail = folder.partition("::") if "://" in folder.partition("::")[0] else (folder, "", "")
    scheme, mark, place = head.rpartition("://")
    return f"{scheme}{mark}{posixpath.normpath(posixpath.join(place, name))}{chain}{tail}"


def parent(name: str) -> str:
    """The folder that a file lies in."""
    if not is_url(name):
        return os.path.dirname(absolute(name))
    head, chain, tail = name.partition("::") if "://" in name.partition("::")[0] else (name, "", "")
    scheme, mark, place = head.partition("?")[0].rpartition("://")
    return f"{scheme}{mark}{posixpath.dirname(place)}{chain}{tail}"


def base(name: str) -> str:
    """The last part of a path or URL."""
    name = name.partition("?")[0] if is_url(name) else name
    return name.rstrip("/").replace(os.sep, "/").rpartition("/")[2]


def printable(name: str) -> str:
    """A name for messages: bytes that are not UTF-8 are written out, so that any file can hold the message."""
    return name.encode("utf-8", "backslashreplace").decode()


def reason(error: OSError) -> str:
    """What the system says of a fault, in one line."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return error.strerror or one_line(error)


def file_system(url: str) -> tuple[object, str]:
    """The fsspec file system of a URL and the path in it.

    Raises:
        DataError: there is none for it, or it needs a package that is not installed.
    """
    import fsspec

    try:
        return cast(tuple[object, str], fsspec.core.url_to_fs(url))
    except ImportError as error:
        raise DataError(f"{url}: cannot be opened ({one_line(error)}); install what it names with pip") from error
    except ValueError as error:
        raise DataError(f"{url}: cannot be opened ({one_line(error)}), expected a path or a URL of fsspec") from error


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """What clients of remote files raise, as OSError."""
    try:
        yield
    except (OSError, MmtokError):
        raise
    except ValueError as error:  # what a server cannot do, such as reading from the middle
        raise io.UnsupportedOperation(one_line(error)) from error
    except _client_errors() as error:
        raise OSError(one_line(error)) from error


def _client_errors() -> tuple[type[BaseException], ...]:
    return tuple(getattr(sys.modules[module], name) for module, name in _CLIENT_ERRORS if module in sys.modules)


def open_binary(name: str) -> BinaryIO:
    """A local file or a URL, opened for reading and seeking.

    Raises:
        OSError: missing, not permitted, not a regular file (a pipe is never waited for), or the network fails.
        DataError: see :func:`file_system`.
    """
    if not is_url(name):
        try:
            mode = os.stat(name).st_mode
        except ValueError as error:  # a NUL in the name
            raise OSError(str(error)) from error
        if not stat.S_ISREG(mode):
            raise OSError("is a directory" if stat.S_ISDIR(mode) else "is not a regular file")
        return open(name, "rb")
    system, path = file_system(name)
    with translated():
        raw = system.open(path, "rb")  # type: ignore[attr-defined]
    return cast(BinaryIO, io.BufferedReader(raw, BLOCK))


def persistently(call: Callable[[], T]) -> T:
    """The result of a call; an OSError that may pass by itself is tried three times."""
    for pause in _PAUSES:
        try:
            with translated():
                return call()
        except _LASTING:
            raise
        except OSError:
            time.sleep(pause)
    with translated():
        return call()


def read_bytes(name: str, limit: int) -> bytes:
    """A whole file or URL; no more than ``limit`` + 1 bytes are ever read.

    Raises:
        OSError, DataError: as :func:`open_binary`.
    """

    def read() -> bytes:
        with open_binary(name) as file:
            return file.read(limit + 1)

    return persistently(read) if is_url(name) else read()


def exists(name: str) -> str:
    """What a path or URL is: "file", "folder", or "" if nothing is there.

    Raises:
        OSError: the network fails, or access is refused.
    """
    if not is_url(name):
        return "folder" if os.path.isdir(name) else "file" if os.path.lexists(name) else ""
    system, path = file_system(name)

    def look() -> str:
        if system.isfile(path):  # type: ignore[attr-defined]
            return "file"
        return "folder" if system.isdir(path) else ""  # type: ignore[attr-defined]

    return persistently(look)


def scan(folder: str) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of what lies in a folder, sorted; hidden names are passed over.

    A link to a folder is not a folder, so that no loop of links is followed.

    Raises:
        OSError: it cannot be listed.
    """
    if not is_url(folder):
        with os.scandir(folder) as entries:
            return sorted((x.name, x.is_dir(follow_symlinks=False)) for x in entries if not x.name.startswith("."))
    system, path = file_system(folder)
    found = persistently(lambda: system.ls(path, detail=True))  # type: ignore[attr-defined]
    names = {(base(x["name"]), x["type"] == "directory") for x in found if x["name"].strip("/") != path.strip("/")}
    return sorted((name, below) for name, below in names if name and not name.startswith("."))


def walk(folder: str) -> Iterator[str]:
    """Every file in a folder and those below it, by name; token datasets, which may be made of it, are passed over.

    Raises:
        OSError: as :func:`scan`.
    """
    entries = scan(folder)
    if {name for name, below in entries if not below} >= _TOKENS:
        return
    for name, below in entries:
        path = join(folder, name)
        if below:
            yield from walk(path)
        else:
            yield path


def is_pattern(name: str) -> bool:
    """Whether a name has wildcards or braces; a question mark is part of a URL."""
    return re.search(r"[*\[{]" if is_url(name) else r"[*?\[{]", name) is not None


def expand(pattern: str) -> list[str]:
    """The files that a pattern with wildcards and braces names, those of each wildcard sorted, each file once.

    Raises:
        DataError: a local file of a range is missing, or no file matches.
        OSError: the network fails.
    """
    names: dict[str, None] = {}
    for name in expand_braces(pattern):
        wild = is_pattern(name)
        if not wild and not is_url(name) and not os.path.exists(name):
            raise DataError(f"{pattern}: no such file: {name}")
        names |= dict.fromkeys(_matches(name) if wild else [name])
    if not names:
        raise DataError(f"{pattern}: no file matches")
    return list(names)


def _matches(pattern: str) -> list[str]:
    if not is_url(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    system, path = file_system(pattern)
    found = persistently(lambda: system.glob(path))  # type: ignore[attr-defined]
    return sorted(str(system.unstrip_protocol(x)) for x in found)  # type: ignore[attr-defined]


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

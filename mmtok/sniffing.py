"""What a file is by its first bytes. Every fault is one :class:`MediaError` line."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mmtok.errors import MediaError

SUFFIXES = {
    "text": {".txt", ".md"},
    "image": {".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp"},
    "audio": {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"},
}
NOUN = {"text": "text", "image": "an image", "audio": "audio"}
KNOWN = "an image (png, jpeg, gif, webp, bmp), audio (wav, flac, ogg, opus, mp3) or UTF-8 text"

PathLike = str | os.PathLike[str]
T = TypeVar("T")


def one_line(error: BaseException) -> str:
    """An exception's text without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def os_call(path: PathLike, call: Callable[[], T]) -> T:
    """Run a file operation; what the system refuses is a MediaError."""
    try:
        return call()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise MediaError(f"{path}: cannot be read ({reason})") from error


def check_file(path: PathLike) -> int:
    """The size in bytes of a regular file."""
    try:
        info = os_call(path, lambda: os.stat(path))
    except MediaError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise MediaError(f"{path}: no such file") from error
        raise
    if stat.S_ISDIR(info.st_mode):
        raise MediaError(f"{path}: is a directory, expected a file")
    if not stat.S_ISREG(info.st_mode):
        raise MediaError(f"{path}: is not a regular file")
    return info.st_size


def kind_and_size(path: PathLike) -> tuple[str, int]:
    """(kind, size in bytes) of a file whose content agrees with its suffix."""
    size = check_file(path)
    suffix = Path(path).suffix.lower()
    claimed = next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), None)
    if size == 0:
        if claimed == "text":
            return "text", 0
        raise MediaError(f"{path}: is empty (0 bytes), expected {KNOWN}")

    def head() -> bytes:
        with open(path, "rb") as file:
            return file.read(65536)

    data = os_call(path, head)
    is_text = _is_utf8(data)
    # Text may begin with "GIF89a"; a name that says text and valid UTF-8 settle it.
    kind = "text" if is_text and claimed == "text" else magic(data) or ("text" if is_text else None)
    if kind is None:
        hint = "; it looks like UTF-16 text: save it as UTF-8" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise MediaError(f"{path}: not recognised by its content, expected {KNOWN}{hint}")
    if claimed not in (None, kind):
        raise MediaError(f"{path}: named {suffix} but holds {NOUN[kind]}; rename it or give the right file")
    return kind, size


def _is_utf8(head: bytes) -> bool:
    """Whether the first bytes of a file are UTF-8, a last character that is cut off allowed."""
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data" and error.start > 0
    return True


def magic(head: bytes) -> str | None:
    """What the first bytes of a file say it is: "image", "audio", or None for anything else."""
    if head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a")):
        return "image"
    if head[:4] in (b"RIFF", b"RF64", b"RIFX"):
        return {b"WAVE": "audio", b"WEBP": "image"}.get(head[8:12])
    # Two and four letters are weak evidence, so the fixed bytes that follow are looked at too.
    if head[:2] == b"BM" and head[6:10] == b"\0\0\0\0" and head[15:18] == b"\0\0\0":
        return "image"
    if head[:5] == b"OggS\0" or (head[:4] == b"fLaC" and head[4:5] in (b"\0", b"\x80")):
        return "audio"
    if head[:3] == b"ID3" and len(head) > 4 and head[3] < 16 and head[4] < 255:
        return "audio"
    if len(head) >= 4 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2 and head[2] < 0xF0 and head[2] & 12 != 12:
        return "audio"  # an MPEG layer III frame
    return None

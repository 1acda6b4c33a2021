"""Whether a sound file is whole: what its container says of itself, which the decoder does not compare.

``find_fault``  -- what is missing or damaged in a WAV, Ogg or MP3 file, and from which second on
``mp3_stream``  -- an MP3 file for a decoder that believes what an MP3 file says of its length

libsndfile reads a WAV or an MP3 file that is cut short, and an Ogg file with pages damaged or gone, without a word.
FLAC needs nothing: each of its frames has a checksum, which its decoder compares.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import os
import re
import zlib
from typing import BinaryIO

_BLOCK = 1 << 20
_TAIL_S = 0.1  # what a decoder may hold back or smear over a fault
_REVERSED = bytes(int(f"{i:08b}"[::-1], 2) for i in range(256))


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is wrong with a file.

    Attributes:
        seconds: from where on the sound cannot be trusted; infinity: its length alone is wrong.
        reason: in words.
    """

    seconds: float
    reason: str


def find_fault(path: str, rate: int) -> Fault | None:
    """The first fault of a sound file; None for a whole one, and for formats of which nothing is known here.

    Args:
        path: of a regular file.
        rate: sample rate in Hz that the file states.

    Raises:
        OSError: the file cannot be read.
    """
    info = os.stat(path)
    return _find_fault(path, rate, info.st_size, info.st_mtime_ns)


@functools.lru_cache(maxsize=256)  # parts of a file are read one after another
def _find_fault(path: str, rate: int, size: int, _mtime_ns: int) -> Fault | None:
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] in (b"RIFF", b"RIFX", b"RF64"):
            return _wav_fault(file, size, "big" if head[:4] == b"RIFX" else "little")
        if head[:4] == b"OggS":
            return _ogg_fault(_Window(file), size, rate)
        if head[:3] == b"ID3" or head[:1] == b"\xff":
            mp3 = _scan_mp3(path, size, _mtime_ns)
            return mp3.fault if mp3 is not None else None
    return None


class _Window:
    """A file of which a part is in memory, for reading here and there, mostly forward."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._start = 0
        self._data = b""

    def at(self, start: int, length: int) -> bytes:
        """Bytes from ``start`` on; fewer at the end of the file."""
        begin = start - self._start
        if begin < 0 or begin + length > len(self._data):
            self._file.seek(start)
            self._start, self._data, begin = start, self._file.read(max(_BLOCK, length)), 0
        return self._data[begin : begin + length]


# --- WAV --------------------------------------------------------------------------------------------------------------


def _wav_fault(file: BinaryIO, size: int, order: str) -> Fault | None:
    """Compare the length of the data chunk with the size of the file (EBU Tech 3306 for RF64)."""
    large = None
    while len(header := file.read(8)) == 8:
        name, length = header[:4], int.from_bytes(header[4:], order)  # type: ignore[arg-type]
        if name == b"data":
            left = size - file.tell()
            # Programs that write to a pipe leave the largest number there.
            stated = large if large is not None and length == 0xFFFFFFFF else length
            if stated > left and (large is not None or stated < 0x7FFFF000):
                return Fault(math.inf, f"cut short: {left} bytes of sound, the header says {stated}")
            return None
        if name == b"ds64":
            large = int.from_bytes(file.read(16)[8:], "little")
            length -= 16
        file.seek(length + length % 2, os.SEEK_CUR)
    return None


# --- Ogg --------------------------------------------------------------------------------------------------------------


def ogg_checksum(page: bytes) -> int:
    """CRC-32 of an Ogg page (RFC 3533: polynomial 0x04c11db7, no reflection, 0 at first), with its bits reversed.

    zlib's CRC-32 has that polynomial reflected, so it gives this of the bytes with their bits reversed.
    """
    return zlib.crc32((page[:22] + bytes(4) + page[26:]).translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF


def _ogg_fault(file: _Window, size: int, rate: int) -> Fault | None:
    """Follow the pages: each in its place, whole, with the right checksum, and none missing."""
    at, granule, reason = 0, 0, ""
    latest: dict[bytes, int] = {}
    going: set[bytes] = set()
    if file.at(28, 8) == b"OpusHead":
        rate = 48000  # of granules, whatever the rate was
    while at < size and not reason:
        head = file.at(at, 27 + 255)
        if head[:4] != b"OggS"[: len(head)]:
            if not going:
                return None  # a tag or padding after the end
            reason = f"damaged: no Ogg page at byte {at}"
            break
        lengths = head[27 : 27 + head[26]] if len(head) >= 27 else b""
        length = 27 + len(lengths) + sum(lengths)
        if len(head) < 27 or len(lengths) < head[26] or at + length > size:
            reason = "cut short: the last Ogg page is not complete"
            break
        page = file.at(at, length)
        serial, number = page[14:18], int.from_bytes(page[18:22], "little")
        if ogg_checksum(page) != int.from_bytes(page[22:26].translate(_REVERSED), "big"):
            reason = f"damaged: the Ogg page at byte {at} does not match its checksum"
        elif not page[5] & 2 and number != latest.get(serial, -1) + 1:
            reason = f"damaged: an Ogg page is missing before byte {at}"
        else:
            latest[serial] = number
            (going.discard if page[5] & 4 else going.add)(serial)
            place = int.from_bytes(page[6:14], "little", signed=True)
            granule = place if place >= 0 else granule  # -1: no packet ends on the page
            at += length
    if not reason and going:
        reason = "cut short: the last Ogg page is not the end of the stream"
    return Fault(granule / rate - _TAIL_S, reason) if reason else None


# --- MP3 --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Mp3:
    """The frames of an MP3 file.

    Attributes:
        start: where those with sound begin.
        first: the first of all, which may say of the others how many there are.
        frames: their number, counted.
        stated: their number as the first one has it; None: it has none.
        constant: whether they are all of one bit rate.
        fault: what is wrong with them.
    """

    start: int
    first: bytes
    frames: int
    stated: int | None
    constant: bool
    fault: Fault | None


_KBPS = {
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0),
}
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


@functools.cache
def _frame_length(second: int, third: int) -> int:
    """Bytes of an MPEG layer III frame by the second and third byte of its header; 0: they are of no such frame."""
    version, rate = second >> 3 & 3, third >> 2 & 3
    if second & 0xE6 != 0xE2 or version == 1 or rate == 3:
        return 0
    kbps = _KBPS[1 if version == 3 else 2][third >> 4]
    return (144000 if version == 3 else 72000) * kbps // _RATES[version][rate] + (third >> 1 & 1) if kbps else 0


def _side(header: bytes) -> int:
    """Bytes of the header and the side information of a frame."""
    mono, first = header[3] >> 6 == 3, header[1] >> 3 & 3 == 3
    return 4 + ((17 if mono else 32) if first else (9 if mono else 17))


def _tag_length(data: bytes) -> int:
    """Bytes of the tag that begins here: ID3v2, ID3v1, or else 0."""
    if data[:3] == b"ID3" and len(data) >= 10:
        size = 0
        for byte in data[6:10]:
            size = size << 7 | byte & 0x7F
        return 10 + size + (10 if data[5] & 16 else 0)
    return 128 if data[:3] == b"TAG" else 0


@functools.lru_cache(maxsize=256)
def _scan_mp3(path: str, size: int, _mtime_ns: int) -> _Mp3 | None:
    """Follow the frames from header to header; None where none begins."""
    with open(path, "rb") as raw:
        file = _Window(raw)
        at = 0
        while length := _tag_length(file.at(at, 10)):
            at += length
        at += _zeros(file, at, size)
        header = file.at(at, 4)
        if len(header) < 4 or header[0] != 0xFF or not _frame_length(header[1], header[2]):
            return None
        same = header[1] & 0xFE, header[2] & 0x0C
        first = file.at(at, _frame_length(header[1], header[2]))
        silent, stated = _stated(first)
        start = at = at + len(first) if silent else at
        frames, rates, reason = 0, set(), ""
        while at < size:
            head = file.at(at, 4)
            length = 0
            if len(head) == 4 and head[0] == 0xFF and (head[1] & 0xFE, head[2] & 0x0C) == same:
                length = _frame_length(head[1], head[2])
            if at + length > size:
                reason = "cut short: the last MP3 frame is not complete"
                break
            if length:
                frames += 1
                rates.add(head[2] >> 4)
                at += length
            elif tag := _tag_length(file.at(at, 10)):
                at += tag
            else:
                if _more_frames(file, at, size, same):
                    reason = f"damaged: no MP3 frame at byte {at}"
                break
        if not reason and stated is not None and frames < stated - 1:
            reason = f"cut short: {frames} MP3 frames, the header says {stated}"
        seconds = frames * _samples(header) / _RATES[header[1] >> 3 & 3][header[2] >> 2 & 3] - _TAIL_S
        return _Mp3(start, first, frames, stated, len(rates) < 2, Fault(seconds, reason) if reason else None)


def _samples(header: bytes) -> int:
    """Samples of each channel in a frame."""
    return 1152 if header[1] >> 3 & 3 == 3 else 576


def _stated(first: bytes) -> tuple[bool, int | None]:
    """Whether the first frame is one without sound (Xing, Info, VBRI), and the number of frames that it states."""
    side = _side(first)
    if first[side : side + 4] in (b"Xing", b"Info"):
        has_count = int.from_bytes(first[side + 7 : side + 8], "big") & 1  # the file may end here
        return True, int.from_bytes(first[side + 8 : side + 12], "big") if has_count else None
    if first[36:40] == b"VBRI":
        return True, int.from_bytes(first[50:54], "big")
    return False, None


def _zeros(file: _Window, at: int, size: int) -> int:
    """How many zero bytes there are from here on."""
    count = 0
    while at + count < size:
        data = file.at(at + count, 4096)
        left = data.lstrip(b"\0")
        count += len(data) - len(left)
        if left:
            break
    return count


def _more_frames(file: _Window, at: int, size: int, same: tuple[int, int]) -> bool:
    """Whether three frames follow one another somewhere further on: then what lies between is no tag or padding."""
    while at < size:
        data = file.at(at, 1 << 16)
        for match in re.finditer(b"\xff", data):
            place = at + match.start()
            for _ in range(3):
                head = file.at(place, 4)
                if len(head) < 4 or head[0] != 0xFF or (head[1] & 0xFE, head[2] & 0x0C) != same:
                    break
                length = _frame_length(head[1], head[2])
                if not length:
                    break
                place += length
            else:
                return True
        at += len(data)
    return False


class _Spliced(io.RawIOBase):
    """Some bytes, then a file from an offset on."""

    def __init__(self, head: bytes, path: str, start: int) -> None:
        self._head = head
        self._file = open(path, "rb")  # noqa: SIM115 - closed with this
        self._start = start
        self._at = 0
        self._size = len(head) + max(0, self._file.seek(0, os.SEEK_END) - start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._at < len(self._head):
            data = self._head[self._at : self._at + len(buffer)]
        else:
            self._file.seek(self._at - len(self._head) + self._start)
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def mp3_stream(path: str) -> BinaryIO | None:
    """An MP3 file with a true number of frames at its head, if what libsndfile would take for it is wrong; else None.

    That is what the file states or, if it states nothing, what the first frame's bit rate says: of a file of variable
    bit rate it would give a part of the sound.

    Raises:
        OSError: the file cannot be read.
    """
    info = os.stat(path)
    with open(path, "rb") as file:
        head = file.read(3)
    if head != b"ID3" and head[:1] != b"\xff":
        return None
    mp3 = _scan_mp3(path, info.st_size, info.st_mtime_ns)
    if mp3 is None or (mp3.stated is None and mp3.constant):
        return None
    side, count = _side(mp3.first), mp3.frames.to_bytes(4, "big")
    if mp3.stated is not None and mp3.first[36:40] != b"VBRI":
        if abs(mp3.stated - mp3.frames) <= 1:
            return None
        frame = mp3.first[: side + 8] + count + mp3.first[side + 12 :]  # the rest tells what to cut off at the ends
    else:  # a frame of the same kind, without a checksum, of 64 or 40 kb/s
        header = bytes([0xFF, mp3.first[1] | 1, 0x50 | mp3.first[2] & 0x0C, mp3.first[3]])
        frame = header.ljust(side, b"\0") + b"Xing" + (1).to_bytes(4, "big") + count
        frame = frame.ljust(_frame_length(header[1], header[2]), b"\0")
    return io.BufferedReader(_Spliced(frame, path, mp3.start), 1 << 16)

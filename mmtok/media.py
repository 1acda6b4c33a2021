"""Safe reading and writing of image and audio files; plain text files too.

Every fault of a file is one :class:`MediaError` line that starts with its path. What a file is comes from its
first bytes. Sizes are judged from headers, before anything large is allocated.

Images: PNG, JPEG, GIF (first frame), WebP, BMP. Audio: WAV, FLAC, Ogg Vorbis, Opus, MP3.
"""

from __future__ import annotations

import io
import math
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import soundfile
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError
from scipy.signal import firwin, resample_poly

from mmtok.checkpoints import atomic_write
from mmtok.errors import MediaError

MAX_PIXELS = 64_000_000
MAX_IMAGE_BYTES = 256 * 2**20
MAX_TEXT_BYTES = 64 * 2**20
MAX_SECONDS = 1800.0
SAMPLE_RATES = (1_000, 192_000)
MAX_CHANNELS = 64

# Amplitude above which a float file is taken to be badly scaled. Lossy codecs overshoot 1.0 by far less.
_PEAK_LIMIT = 8.0
# Manifests give times rounded to milliseconds: an end this much past the last sample is the end.
_END_TOLERANCE_S = 0.01
_IMAGE_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")
_SUFFIXES = {
    "text": {".txt", ".md"},
    "image": {".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp"},
    "audio": {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"},
}
_NOUN = {"text": "text", "image": "an image", "audio": "audio"}
_KNOWN = "an image (png, jpeg, gif, webp, bmp), audio (wav, flac, ogg, opus, mp3) or UTF-8 text"
# What Pillow raises on damaged files of these formats. Nothing broader is caught.
_PIL_ERRORS = (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, struct.error, zlib.error)

PathLike = str | os.PathLike[str]
T = TypeVar("T")


def sniff(path: PathLike) -> str:
    """What a file is by its content: "text", "image" or "audio".

    Raises:
        MediaError: missing, a directory, empty, of no known kind, or of another kind than its suffix says.
    """
    kind, _ = _open_kind(path)
    return kind


def read_text(path: PathLike) -> str:
    """The exact text of a UTF-8 file: line ends and a byte-order mark are kept.

    Raises:
        MediaError: not a file, larger than ``MAX_TEXT_BYTES``, or not UTF-8 (with the position of the first bad byte).
    """
    size = _check_file(path)
    if size > MAX_TEXT_BYTES:
        raise MediaError(f"{path}: {size} bytes of text, the limit is {MAX_TEXT_BYTES}; split the file")
    data = _os_call(path, Path(path).read_bytes)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MediaError(f"{path}: byte {error.start} is not UTF-8 ({error.reason}); save the text as UTF-8") from error


def read_image(path: PathLike, mode: str = "RGB", background: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """Read an image, turned as its EXIF orientation says; 16-bit grey is rounded to 8 bits.

    Args:
        path: a PNG, JPEG, GIF, WebP or BMP file.
        mode: "RGB", "RGBA" or "L".
        background: 0..255 each; transparent pixels of an "RGB" or "L" read are composited on it.

    Returns:
        uint8 [C, H, W] with C = 3, 4 or 1, 0..255.

    Raises:
        MediaError: not a readable image, cut short, or more than ``MAX_PIXELS`` pixels.
    """
    if mode not in ("RGB", "RGBA", "L"):
        raise MediaError(f"got image mode {mode!r}, expected 'RGB', 'RGBA' or 'L'")
    kind, size = _open_kind(path)
    if kind != "image":
        raise MediaError(f"{path}: holds {_NOUN[kind]}, expected an image (png, jpeg, gif, webp, bmp)")
    if size > MAX_IMAGE_BYTES:
        raise MediaError(f"{path}: {size} bytes, the limit for an image file is {MAX_IMAGE_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PILImage.DecompressionBombWarning)  # refused below, by our own limit
            with PILImage.open(path, formats=_IMAGE_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise MediaError(
                        f"{path}: {width}x{height} is {width * height} pixels, the limit is {MAX_PIXELS}; scale it down"
                    )
                if width < 1 or height < 1:
                    raise MediaError(f"{path}: {width}x{height} pixels, expected at least 1x1")
                pixels = _to_array(ImageOps.exif_transpose(image), mode, background)
    except MediaError:
        raise
    except PILImage.DecompressionBombError as error:
        raise MediaError(f"{path}: more than {MAX_PIXELS} pixels, which is the limit; scale it down") from error
    except UnidentifiedImageError as error:
        raise MediaError(f"{path}: damaged or cut short image (its header is not complete)") from error
    except _PIL_ERRORS as error:
        raise MediaError(f"{path}: damaged or cut short image ({_one_line(error)})") from error
    return pixels


def write_image(path: PathLike, pixels: np.ndarray) -> None:
    """Write uint8 [3, H, W] (or [1, H, W], [4, H, W]) as a PNG, atomically.

    Raises:
        MediaError: another shape or dtype.
    """
    check_pixels(pixels, channels=(1, 3, 4))
    buffer = io.BytesIO()
    _to_pil(pixels).save(buffer, format="PNG")
    atomic_write(os.fspath(path), buffer.getvalue())


def resize_image(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 [C, H, W] to uint8 [C, height, width] with an antialiased Lanczos filter."""
    check_pixels(pixels, channels=(1, 3, 4))
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise MediaError(f"got size {height}x{width}, expected at least 1x1 and at most {MAX_PIXELS} pixels")
    if pixels.shape[1:] == (height, width):
        return pixels.copy()
    resized = _to_pil(pixels).resize((width, height), PILImage.Resampling.LANCZOS)
    return _from_pil(resized)


def fit_image(pixels: np.ndarray, size: int, background: int = 255) -> np.ndarray:
    """Scale uint8 [C, H, W] so that the longer side is ``size``, then pad it, centred, to [C, size, size]."""
    check_pixels(pixels, channels=(1, 3, 4))
    channels, height, width = pixels.shape
    scale = size / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (size - new_height) // 2, (size - new_width) // 2
    out = np.full((channels, size, size), background, dtype=np.uint8)
    out[:, top : top + new_height, left : left + new_width] = resize_image(pixels, new_height, new_width)
    return out


def read_audio(
    path: PathLike,
    sample_rate: int | None,
    start: float | None = None,
    end: float | None = None,
    mono: bool = True,
    max_seconds: float = MAX_SECONDS,
) -> np.ndarray:
    """Read audio, or the part of it from ``start`` to ``end``, at a given sample rate.

    Args:
        path: a WAV, FLAC, Ogg Vorbis, Opus or MP3 file.
        sample_rate: of the result, in Hz; None keeps the file's own (see :func:`audio_rate`).
        start, end: seconds; None means the beginning and the end of the file.
        mono: average the channels into one.
        max_seconds: a longer selection is an error.

    Returns:
        float32 [C, T], clipped to -1..1, T = ceil(frames * sample_rate / file rate).

    Raises:
        MediaError: not readable, cut short, no samples, NaN, badly scaled, too long, or start/end out of range.
    """
    kind, size = _open_kind(path)
    if kind != "audio":
        raise MediaError(f"{path}: holds {_NOUN[kind]}, expected audio (wav, flac, ogg, opus, mp3)")
    if sample_rate is not None:
        check_rate("sample_rate", sample_rate)
    try:
        with soundfile.SoundFile(os.fspath(path)) as file:
            rate, channels, frames = file.samplerate, file.channels, file.frames
            check_rate(f"{path}: sample rate", rate)
            if channels > MAX_CHANNELS:
                raise MediaError(f"{path}: {channels} channels, the limit is {MAX_CHANNELS}")
            first, last = _frame_range(path, frames, rate, start, end, max_seconds)
            if start is None and end is None:
                _check_complete(Path(path), size)
            samples = _read_frames(file, first, last, mono)
            # The length of an MP3 is an estimate where the file carries no table, so it alone may be shorter.
            if samples.shape[1] < last - first and (file.format != "MP3" or samples.shape[1] == 0):
                raise MediaError(
                    f"{path}: damaged or cut short audio: {samples.shape[1]} of {last - first} frames could be read"
                )
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"{path}: damaged or cut short audio ({_one_line(error)})") from error
    if not np.isfinite(samples).all():
        raise MediaError(f"{path}: holds NaN or infinite samples, expected -1..1")
    peak = float(np.abs(samples).max())
    if peak > _PEAK_LIMIT:
        raise MediaError(f"{path}: samples reach {peak:.4g}, expected -1..1; scale the file")
    return np.clip(resample(samples, rate, sample_rate or rate), -1.0, 1.0)


def audio_rate(path: PathLike) -> int:
    """The sample rate in Hz that an audio file states."""
    if sniff(path) != "audio":
        raise MediaError(f"{path}: expected audio (wav, flac, ogg, opus, mp3)")
    try:
        rate = soundfile.info(os.fspath(path)).samplerate
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        raise MediaError(f"{path}: damaged or cut short audio ({_one_line(error)})") from error
    check_rate(f"{path}: sample rate", rate)
    return rate


def write_audio(path: PathLike, samples: np.ndarray, sample_rate: int) -> None:
    """Write float32 [C, T], clipped to -1..1, as a 16-bit PCM WAV, atomically.

    The scale is 32768, as for reading, so that a 16-bit file that is read and written again is unchanged.

    Raises:
        MediaError: another shape or dtype, NaN, or an impossible sample rate.
    """
    check_samples(samples)
    check_rate("sample_rate", sample_rate)
    integers = np.clip(np.rint(samples.T * 32768.0), -32768, 32767).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, integers, sample_rate, format="WAV", subtype="PCM_16")
    atomic_write(os.fspath(path), buffer.getvalue())


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Resample float32 [C, T] to [C, ceil(T * new_rate / rate)] with a Kaiser-windowed sinc, 64 zero crossings a side.

    The filter is that of resampy's and torchaudio's "kaiser_best". Polyphase filtering (scipy) keeps it small for any
    pair of rates: the dense kernel of torchaudio takes gigabytes for a pair without a common divisor.
    """
    check_rate("rate", rate)
    check_rate("new_rate", new_rate)
    if rate == new_rate or samples.shape[1] == 0:
        return samples
    divisor = math.gcd(rate, new_rate)
    up, down = new_rate // divisor, rate // divisor
    window = _sinc_filter(max(up, down))
    return np.stack([resample_poly(x, up, down, window=window) for x in samples]).astype(np.float32, copy=False)


def check_pixels(pixels: np.ndarray, channels: tuple[int, ...] = (3,)) -> None:
    """Raise :class:`MediaError` unless ``pixels`` is a uint8 array [C, H, W] with H, W >= 1 and C in ``channels``."""
    if not isinstance(pixels, np.ndarray):
        raise MediaError(f"got pixels of type {type(pixels).__name__}, expected a numpy array uint8 [3, H, W]")
    expected = f"uint8 [{' or '.join(map(str, channels))}, H, W] with H, W >= 1"
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[0] not in channels or 0 in pixels.shape:
        raise MediaError(f"got pixels {pixels.dtype} {list(pixels.shape)}, expected {expected}")


def check_samples(samples: np.ndarray) -> None:
    """Raise :class:`MediaError` unless ``samples`` is a finite float32 array [C, T] with 1 <= C <= ``MAX_CHANNELS``."""
    if not isinstance(samples, np.ndarray):
        raise MediaError(f"got samples of type {type(samples).__name__}, expected a numpy array float32 [C, T]")
    if samples.dtype != np.float32 or samples.ndim != 2 or not 1 <= samples.shape[0] <= MAX_CHANNELS:
        raise MediaError(f"got samples {samples.dtype} {list(samples.shape)}, expected float32 [C, T] with C >= 1")
    if not np.isfinite(samples).all():
        raise MediaError("samples hold NaN or infinite values, expected -1..1")


def check_rate(what: str, rate: int) -> None:
    """Raise :class:`MediaError` unless ``rate`` is an int within ``SAMPLE_RATES``; ``what`` begins the message."""
    low, high = SAMPLE_RATES
    if isinstance(rate, bool) or not isinstance(rate, int | np.integer) or not low <= rate <= high:
        raise MediaError(f"{what} is {rate!r}, expected a whole number of Hz, {low}..{high}")


# --- what a file is ---------------------------------------------------------------------------------------------------


def _one_line(error: BaseException) -> str:
    """An exception's text without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _os_call(path: PathLike, call: Callable[[], T]) -> T:
    """Run a file operation; what the system refuses is a MediaError."""
    try:
        return call()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or _one_line(error)
        raise MediaError(f"{path}: cannot be read ({reason})") from error


def _check_file(path: PathLike) -> int:
    """The size in bytes of a regular file."""
    try:
        info = _os_call(path, lambda: os.stat(path))
    except MediaError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise MediaError(f"{path}: no such file") from error
        raise
    if stat.S_ISDIR(info.st_mode):
        raise MediaError(f"{path}: is a directory, expected a file")
    if not stat.S_ISREG(info.st_mode):
        raise MediaError(f"{path}: is not a regular file")
    return info.st_size


def _open_kind(path: PathLike) -> tuple[str, int]:
    """(kind, size in bytes) of a file whose content agrees with its suffix."""
    size = _check_file(path)
    suffix = Path(path).suffix.lower()
    claimed = next((kind for kind, suffixes in _SUFFIXES.items() if suffix in suffixes), None)
    if size == 0:
        if claimed == "text":
            return "text", 0
        raise MediaError(f"{path}: is empty (0 bytes), expected {_KNOWN}")

    def head() -> bytes:
        with open(path, "rb") as file:
            return file.read(65536)

    data = _os_call(path, head)
    is_text = _is_utf8(data)
    # Text may begin with "GIF89a"; a name that says text and valid UTF-8 settle it.
    kind = "text" if is_text and claimed == "text" else _magic(data) or ("text" if is_text else None)
    if kind is None:
        hint = "; it looks like UTF-16 text: save it as UTF-8" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise MediaError(f"{path}: not recognised by its content, expected {_KNOWN}{hint}")
    if claimed not in (None, kind):
        raise MediaError(f"{path}: named {suffix} but holds {_NOUN[kind]}; rename it or give the right file")
    return kind, size


def _is_utf8(head: bytes) -> bool:
    """Whether the first bytes of a file are UTF-8, a last character that is cut off allowed."""
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data" and error.start > 0
    return True


def _magic(head: bytes) -> str | None:
    """ "image" or "audio" by the first bytes, None for anything else."""
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


# --- images -----------------------------------------------------------------------------------------------------------


def _to_array(image: PILImage.Image, mode: str, background: tuple[int, int, int]) -> np.ndarray:
    """Decode a Pillow image to uint8 [C, H, W]."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        grey = np.clip((values + 128) // 257, 0, 255).astype(np.uint8)
        image = PILImage.fromarray(grey)
    if image.has_transparency_data or mode == "RGBA":
        image = image.convert("RGBA")
        if mode != "RGBA":
            canvas = PILImage.new("RGBA", image.size, (*background, 255))
            image = PILImage.alpha_composite(canvas, image)
    return _from_pil(image.convert(mode))


def _from_pil(image: PILImage.Image) -> np.ndarray:
    """uint8 [C, H, W], contiguous."""
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def _to_pil(pixels: np.ndarray) -> PILImage.Image:
    """A Pillow image of uint8 [C, H, W]."""
    return PILImage.fromarray(pixels[0] if pixels.shape[0] == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


# --- audio ------------------------------------------------------------------------------------------------------------


def _frame_range(
    path: PathLike, frames: int, rate: int, start: float | None, end: float | None, max_seconds: float
) -> tuple[int, int]:
    """The frames to read, checked against the file's own count."""
    if frames < 1:
        raise MediaError(f"{path}: holds no samples")
    duration = frames / rate
    begin, finish = 0.0 if start is None else start, duration if end is None else end
    if not (0 <= begin < finish <= duration + _END_TOLERANCE_S):
        raise MediaError(
            f"{path}: start {begin:g} s and end {finish:g} s, expected 0 <= start < end <= {duration:g} s (its length)"
        )
    if finish - begin > max_seconds:
        raise MediaError(
            f"{path}: {finish - begin:.1f} s of audio, the limit is {max_seconds:g} s; select a part with start and end"
        )
    first = round(begin * rate)
    last = frames if end is None else min(frames, round(finish * rate))
    if first >= last:
        raise MediaError(f"{path}: no sample lies between {begin:g} s and {finish:g} s at {rate} Hz")
    return first, last


def _read_frames(file: soundfile.SoundFile, first: int, last: int, mono: bool) -> np.ndarray:
    """float32 [C, T] of frames first..last-1, block by block so that many channels never lie in memory at once."""
    if first:
        file.seek(first)
    blocks, left = [], last - first
    while left:
        block = file.read(min(left, 1 << 20), dtype="float32", always_2d=True)
        if not len(block):
            break
        left -= len(block)
        blocks.append(block.mean(axis=1, keepdims=True, dtype=np.float32) if mono else block)
    if not blocks:
        return np.zeros((1, 0), np.float32)
    return np.ascontiguousarray(np.concatenate(blocks).T)


def _check_complete(path: Path, size: int) -> None:
    """libsndfile reads a WAV or an Ogg file that is cut short without a word; their own sizes and flags tell."""
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF":
            _check_wav(path, file, size)
        elif head[:4] == b"OggS":
            file.seek(max(0, size - 65536 - 27 - 255))
            tail = file.read()
            page = tail.rfind(b"OggS")
            header = tail[page : page + 27] if page >= 0 else b""
            if len(header) == 27:
                lengths = tail[page + 27 : page + 27 + header[26]]
                whole = len(lengths) == header[26] and page + 27 + len(lengths) + sum(lengths) <= len(tail)
                if whole and header[5] & 4:
                    return
            raise MediaError(f"{path}: cut short: the last Ogg page is not the end of the stream")


def _check_wav(path: Path, file: io.BufferedReader, size: int) -> None:
    """Compare the length of the data chunk with the size of the file."""
    while len(header := file.read(8)) == 8:
        name, length = header[:4], int.from_bytes(header[4:], "little")
        if name == b"data":
            left = size - file.tell()
            # Programs that write to a pipe leave the largest number there.
            if length > left and length < 0x7FFFF000:
                raise MediaError(f"{path}: cut short: {left} bytes of sound, the header says {length}")
            return
        file.seek(length + length % 2, os.SEEK_CUR)


@lru_cache(maxsize=4)
def _sinc_filter(factor: int) -> np.ndarray:
    """Low-pass taps at ``factor`` times the rate; cut-off and Kaiser window as in resampy's "kaiser_best"."""
    rolloff = 0.9475937167399596
    half = math.ceil(64 * factor / rolloff)
    return firwin(2 * half + 1, rolloff / factor, window=("kaiser", 14.769656459379492))

"""Safe reading and writing of image and audio files; plain text files too.

Every fault of a file is one :class:`MediaError` line that starts with its path. What a file is comes from its
first bytes. Sizes are judged from headers, before anything large is allocated.

Images: PNG, JPEG, GIF (first frame), WebP, BMP. Audio: WAV, FLAC, Ogg Vorbis, Opus, MP3.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

from mmtok.checkpoints import atomic_write
from mmtok.containers import find_fault, mp3_stream
from mmtok.errors import MediaError
from mmtok.resampling import SAMPLE_RATES as SAMPLE_RATES
from mmtok.resampling import Resampler, check_rate
from mmtok.resampling import resample as resample
from mmtok.sniffing import NOUN, check_file, kind_and_size, magic, one_line, os_call
from mmtok.sniffing import PathLike as PathLike

MAX_PIXELS = 64_000_000
MAX_IMAGE_BYTES = 256 * 2**20
MAX_TEXT_BYTES = 64 * 2**20
MAX_SECONDS = 1800.0
MAX_CHANNELS = 64

# Amplitude above which a float file is taken to be badly scaled. Lossy codecs overshoot 1.0 by far less.
_PEAK_LIMIT = 8.0
# Manifests give times rounded to milliseconds: an end this much past the last sample is the end.
_END_TOLERANCE_S = 0.01
_BLOCK = 1 << 18  # frames that are read at once
# A frame of an MP3 needs bytes of frames before it: after a seek libsndfile gives up to a tenth of a second of zeros.
_MP3_LEAD = 32 * 1152
_WHITE = (255, 255, 255)
_IMAGE_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")
# What Pillow raises on damaged files of these formats. Nothing broader is caught.
_PIL_ERRORS = (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, struct.error, zlib.error)


def sniff(path: PathLike) -> str:
    """What a file is by its content: "text", "image" or "audio".

    Raises:
        MediaError: missing, a directory, empty, of no known kind, or of another kind than its suffix says.
    """
    kind, _ = kind_and_size(path)
    return kind


def read_text(path: PathLike) -> str:
    """The exact text of a UTF-8 file: line ends and a byte-order mark are kept.

    Raises:
        MediaError: not a file, larger than ``MAX_TEXT_BYTES``, or not UTF-8 (with the position of the first bad byte).
    """
    size = check_file(path)
    _check_text_bytes(path, size)
    return decode_text(os_call(path, Path(path).read_bytes), path)


def decode_text(data: bytes, name: PathLike) -> str:
    """As :func:`read_text`, of the bytes of a file; ``name`` begins the messages."""
    _check_text_bytes(name, len(data))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MediaError(f"{name}: byte {error.start} is not UTF-8 ({error.reason}); save the text as UTF-8") from error


def _check_text_bytes(name: PathLike, size: int) -> None:
    """Refuse a text file of more than ``MAX_TEXT_BYTES``."""
    if size > MAX_TEXT_BYTES:
        raise MediaError(f"{name}: more than {MAX_TEXT_BYTES} bytes of text, which is the limit; split the file")


def read_image(path: PathLike, mode: str = "RGB", background: tuple[int, int, int] = _WHITE) -> np.ndarray:
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
    kind, size = kind_and_size(path)
    if kind != "image":
        raise MediaError(f"{path}: holds {NOUN[kind]}, expected an image (png, jpeg, gif, webp, bmp)")
    _check_image_bytes(path, size)
    return _decode(lambda: PILImage.open(path, formats=_IMAGE_FORMATS), path, mode, background)


def decode_image(data: bytes, name: PathLike, mode: str = "RGB") -> np.ndarray:
    """As :func:`read_image` (on white), of the bytes of a file; ``name`` begins the messages."""
    if magic(data) != "image":
        raise MediaError(f"{name}: not recognised by its content, expected an image (png, jpeg, gif, webp, bmp)")
    _check_image_bytes(name, len(data))
    return _decode(lambda: PILImage.open(io.BytesIO(data), formats=_IMAGE_FORMATS), name, mode, _WHITE)


def convert_image(image: PILImage.Image, name: PathLike, mode: str = "RGB") -> np.ndarray:
    """As :func:`read_image` (on white), of a Pillow image of any format; it is closed. ``name`` begins the messages."""
    return _decode(lambda: image, name, mode, _WHITE)


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
    """Scale uint8 [C, H, W] so that the longer side is ``size``, then pad it, centred, to [C, size, size].

    The border is of the colour ``background``; of pictures with alpha (C = 4) it is also transparent.
    """
    check_pixels(pixels, channels=(1, 3, 4))
    channels, height, width = pixels.shape
    scale = size / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (size - new_height) // 2, (size - new_width) // 2
    out = np.full((channels, size, size), background, dtype=np.uint8)
    out[3:] = 0
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
    if sample_rate is not None:
        check_rate("sample_rate", sample_rate)
    rates, blocks = zip(*_audio_blocks(path, start, end, mono, max_seconds), strict=True)
    return np.clip(resample(np.concatenate(blocks, 1), rates[0], sample_rate or rates[0]), -1.0, 1.0)


def audio_blocks(
    path: PathLike,
    sample_rate: int | None,
    start: float | None = None,
    end: float | None = None,
    mono: bool = True,
) -> Iterator[np.ndarray]:
    """As ``read_audio``, block by block, for sounds of any length at constant memory: float32 [C, n], any n.

    A fault is raised when its block is reached; what came before is sound.
    """
    if sample_rate is not None:
        check_rate("sample_rate", sample_rate)
    resampler: Resampler | None = None
    for rate, block in _audio_blocks(path, start, end, mono, float("inf")):
        resampler = resampler or Resampler(rate, sample_rate or rate)
        yield np.clip(resampler.push(block), -1.0, 1.0)
    if resampler is not None:
        yield np.clip(resampler.finish(), -1.0, 1.0)


def audio_rate(path: PathLike) -> int:
    """The sample rate in Hz that an audio file states."""
    return audio_length(path)[1]


def audio_length(path: PathLike) -> tuple[int, int]:
    """The frames of an audio file and its sample rate in Hz, without decoding it; of an MP3 its frames are counted.

    Raises:
        MediaError: no audio file.
    """
    if sniff(path) != "audio":
        raise MediaError(f"{path}: expected audio (wav, flac, ogg, opus, mp3)")
    try:
        with _open_sound(path) as file:
            frames, rate = file.frames, file.samplerate
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        raise MediaError(f"{path}: damaged or cut short audio ({one_line(error)})") from error
    check_rate(f"{path}: sample rate", rate)
    return frames, rate


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


# --- images -----------------------------------------------------------------------------------------------------------


def _check_image_bytes(name: PathLike, size: int) -> None:
    """Refuse an image file of more than ``MAX_IMAGE_BYTES``."""
    if size > MAX_IMAGE_BYTES:
        raise MediaError(f"{name}: {size} bytes, the limit for an image file is {MAX_IMAGE_BYTES}")


def _decode(
    opened: Callable[[], PILImage.Image], name: PathLike, mode: str, background: tuple[int, int, int]
) -> np.ndarray:
    """uint8 [C, H, W] of what ``opened`` gives; every fault is a MediaError that begins with ``name``."""
    if mode not in ("RGB", "RGBA", "L"):
        raise MediaError(f"got image mode {mode!r}, expected 'RGB', 'RGBA' or 'L'")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PILImage.DecompressionBombWarning)  # refused below, by our own limit
            with opened() as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise MediaError(
                        f"{name}: {width}x{height} is {width * height} pixels, the limit is {MAX_PIXELS}; scale it down"
                    )
                if width < 1 or height < 1:
                    raise MediaError(f"{name}: {width}x{height} pixels, expected at least 1x1")
                return _to_array(ImageOps.exif_transpose(image), mode, background)
    except MediaError:
        raise
    except PILImage.DecompressionBombError as error:
        raise MediaError(f"{name}: more than {MAX_PIXELS} pixels, which is the limit; scale it down") from error
    except UnidentifiedImageError as error:
        raise MediaError(f"{name}: damaged or cut short image (its header is not complete)") from error
    except _PIL_ERRORS as error:
        raise MediaError(f"{name}: damaged or cut short image ({one_line(error)})") from error


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
    """uint8 [C, H, W], contiguous, and a copy: Pillow's own memory is read-only."""
    pixels = np.asarray(image)
    return np.array(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1), order="C")


def _to_pil(pixels: np.ndarray) -> PILImage.Image:
    """A Pillow image of uint8 [C, H, W]."""
    return PILImage.fromarray(pixels[0] if pixels.shape[0] == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


# --- audio ------------------------------------------------------------------------------------------------------------


class _Sound(soundfile.SoundFile):
    """A sound file that is read on from where it is.

    soundfile seeks to where it is after each read, where a file can be sought in. A decoder of MP3 begins anew by that:
    the first tenth of a second of each block would be zeros.
    """

    def seekable(self) -> bool:
        return False


@contextlib.contextmanager
def _open_sound(path: PathLike) -> Iterator[soundfile.SoundFile]:
    """A sound file whose ``frames`` are true."""
    with contextlib.ExitStack() as stack:
        name = os.fspath(path)
        stream = mp3_stream(name)
        source = name if stream is None else stack.enter_context(stream)
        yield stack.enter_context(_Sound(source))


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


def _audio_blocks(
    path: PathLike, start: float | None, end: float | None, mono: bool, max_seconds: float
) -> Iterator[tuple[int, np.ndarray]]:
    """The rate in Hz and float32 [C, n], one block or more, so that many channels never lie in memory at once."""
    kind, _ = kind_and_size(path)
    if kind != "audio":
        raise MediaError(f"{path}: holds {NOUN[kind]}, expected audio (wav, flac, ogg, opus, mp3)")
    rate = at = 0
    try:
        with _open_sound(path) as file:
            rate, channels, frames = file.samplerate, file.channels, file.frames
            check_rate(f"{path}: sample rate", rate)
            if channels > MAX_CHANNELS:
                raise MediaError(f"{path}: {channels} channels, the limit is {MAX_CHANNELS}")
            at, last = _frame_range(path, frames, rate, start, end, max_seconds)
            fault = find_fault(os.fspath(path), rate)
            if fault and (end is None or end > fault.seconds):
                raise MediaError(f"{path}: {fault.reason}")
            first = at
            if first:
                lead = min(first, _MP3_LEAD) if file.format == "MP3" else 0
                if first > lead:
                    file.seek(first - lead)
                file.read(lead, dtype="float32")
            while at < last:
                try:
                    block = file.read(min(last - at, _BLOCK), dtype="float32", always_2d=True)
                except soundfile.SoundFileError:
                    at = max(at, file.tell())  # how far it came in the block
                    raise
                # An MP3 may be shorter by what its decoder holds back.
                if not len(block) and (file.format != "MP3" or at == first):
                    ends = f"it ends at {at / rate:.3f} s, expected {last / rate:.3f} s"
                    raise MediaError(f"{path}: damaged or cut short audio: {ends}")
                if not len(block):
                    return
                _check_block(path, block, at, rate)
                at += len(block)
                mixed = block.mean(axis=1, keepdims=True, dtype=np.float32) if mono else block
                yield rate, np.ascontiguousarray(mixed.T)
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        where = f" at {at / rate:.3f} s" if rate else ""
        raise MediaError(f"{path}: damaged or cut short audio{where} ({one_line(error)})") from error


def _check_block(path: PathLike, block: np.ndarray, at: int, rate: int) -> None:
    """Raise MediaError, with the second, if a block [n, C] that begins at frame ``at`` holds what no sound does."""
    peak = np.abs(block).max(axis=1)
    bad = np.flatnonzero(~np.isfinite(peak))
    if len(bad):
        raise MediaError(
            f"{path}: holds NaN or infinite samples from {(at + int(bad[0])) / rate:.3f} s on, expected -1..1"
        )
    if peak.max() > _PEAK_LIMIT:
        where = (at + int(peak.argmax())) / rate
        raise MediaError(f"{path}: samples reach {peak.max():.4g} at {where:.3f} s, expected -1..1; scale the file")

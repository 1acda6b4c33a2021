"""Safe reading and writing of image and audio files; plain text files too.

Every fault of a file is one :class:`MediaError` line that starts with its path. What a file is comes from its
first bytes. Sizes are judged from headers, before anything large is allocated.

Images: PNG, JPEG, GIF (first frame), WebP, BMP. Sounds are those of :mod:`mmtok.sounds`, whose functions are here too.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

from mmtok.checkpoints import atomic_write
from mmtok.errors import MediaError
from mmtok.resampling import SAMPLE_RATES as SAMPLE_RATES
from mmtok.resampling import check_rate as check_rate
from mmtok.resampling import resample as resample
from mmtok.sniffing import NOUN, check_file, kind_and_size, magic, one_line, os_call
from mmtok.sniffing import PathLike as PathLike
from mmtok.sounds import MAX_CHANNELS as MAX_CHANNELS
from mmtok.sounds import MAX_SECONDS as MAX_SECONDS
from mmtok.sounds import audio_blocks as audio_blocks
from mmtok.sounds import audio_length as audio_length
from mmtok.sounds import audio_rate as audio_rate
from mmtok.sounds import check_samples as check_samples
from mmtok.sounds import read_audio as read_audio
from mmtok.sounds import write_audio as write_audio

MAX_PIXELS = 64_000_000
MAX_IMAGE_BYTES = 256 * 2**20
MAX_TEXT_BYTES = 64 * 2**20
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


def check_pixels(pixels: np.ndarray, channels: tuple[int, ...] = (3,)) -> None:
    """Raise :class:`MediaError` unless ``pixels`` is a uint8 array [C, H, W] with H, W >= 1 and C in ``channels``."""
    if not isinstance(pixels, np.ndarray):
        raise MediaError(f"got pixels of type {type(pixels).__name__}, expected a numpy array uint8 [3, H, W]")
    expected = f"uint8 [{' or '.join(map(str, channels))}, H, W] with H, W >= 1"
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[0] not in channels or 0 in pixels.shape:
        raise MediaError(f"got pixels {pixels.dtype} {list(pixels.shape)}, expected {expected}")


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

"""What the headers of media files say, without decoding them: the size of a picture, the length of a sound."""

from __future__ import annotations

from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from mmtok import media
from mmtok.errors import MediaError
from mmtok.sniffing import one_line
from mmtok.sounds import frame_range

_ORIENTATION = 0x0112  # EXIF: 5 to 8 turn the picture by a quarter


def image_size(path: media.PathLike) -> tuple[int, int]:
    """(H, W) in pixels, turned as its EXIF orientation says.

    Raises:
        MediaError: no picture, or more than ``media.MAX_PIXELS`` pixels.
    """
    if media.sniff(path) != "image":
        raise MediaError(f"{path}: expected an image (png, jpeg, gif, webp, bmp)")
    limit, PILImage.MAX_IMAGE_PIXELS = PILImage.MAX_IMAGE_PIXELS, None  # judged below, by our own limit
    try:
        with PILImage.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except UnidentifiedImageError as error:
        raise MediaError(f"{path}: damaged or cut short image (its header is not complete)") from error
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError) as error:
        raise MediaError(f"{path}: damaged or cut short image ({one_line(error)})") from error
    finally:
        PILImage.MAX_IMAGE_PIXELS = limit
    if width * height > media.MAX_PIXELS or min(width, height) < 1:
        raise MediaError(f"{path}: {width}x{height} pixels, expected 1 to {media.MAX_PIXELS} in all; scale it down")
    return (width, height) if turned else (height, width)


def sound_samples(path: media.PathLike, rate: int, start: float | None = None, end: float | None = None) -> int:
    """How many samples at ``rate`` Hz ``media.read_audio`` gives of a sound, or of a part of it in seconds.

    Raises:
        MediaError: no sound, or no such part of it.
    """
    frames, own = media.audio_length(path)
    first, last = frame_range(path, frames, own, start, end, float("inf"))
    return -(-(last - first) * rate // own)

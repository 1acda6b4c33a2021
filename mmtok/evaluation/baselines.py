"""JPEG, WebP and AVIF on the same pictures: what hand-made codecs reach at the bits of a tokenizer.

Bytes are counted in up to three ways, because a codec's header and tables can be larger than a small picture:

``file``        -- each picture a file, all its bytes
``minus_blank`` -- the same files, each less the bytes of a white picture of its size at the same setting
``mosaic``      -- pictures of one size side by side in one large picture of at most 4096 pixels a side, so that one
                   header is shared by up to 4096 pictures of 64x64. How many there are changes little: a header of
                   300 bytes over 100 pictures of 64x64 is .006 bits a pixel. The codec may use one picture to predict
                   its neighbour, and its filters cross their border.

Files carry no metadata. Chroma is subsampled 4:2:0, the codecs' default, which bounds the PSNR of colours at high
rates. Speeds are fixed, see ``PEERS``. Between two settings: :mod:`mmtok.evaluation.rates`.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import features

from mmtok.errors import ConfigError, MediaError
from mmtok.evaluation.closeness import Closeness, compare, summarize
from mmtok.evaluation.pictures import Pictures
from mmtok.evaluation.rates import Figure, Point, at_rate
from mmtok.evaluation.sets import progress

# The settings of Pillow's encoders. AVIF's speed is 0..10: at 4 it lies within .4 dB of 1 on clip art of 64x64 and
# takes half as long; at Pillow's own choice, 6, it loses another .6 dB.
PEERS: dict[str, dict[str, Any]] = {
    "JPEG": {"optimize": True, "subsampling": "4:2:0"},
    "WEBP": {"method": 6},
    "AVIF": {"speed": 4, "subsampling": "4:2:0", "max_threads": 1},
}
COARSE = (0, 10, 25, 45, 70, 90, 100)  # qualities at which every sweep is measured; then finer around the targets
NEAR = 1.1  # two rates within this factor need no setting between them
MOSAIC_SIDE = 4096  # pixels
BLOCK = 16  # pixels: pictures in a mosaic start at multiples of it, so that no block of JPEG or WebP holds two

_FEATURES = {"JPEG": "jpg", "WEBP": "webp", "AVIF": "avif"}
_METADATA = ("icc_profile", "exif", "xmp", "comment")
_COMPARED = {"psnr_of_mean_error_db": Figure(), "psnr_mean_db": Figure(), "ssim": Figure(digits=4)}


class Setting(NamedTuple):
    """A quality of a peer: bits a pixel for each way of counting the same bytes, and closeness."""

    rates: dict[str, float]
    closeness: dict[str, Any]


def available() -> list[str]:
    """The peers that this Pillow can write."""
    return [form for form in PEERS if features.check(_FEATURES[form])]


def check_peers(names: Sequence[str]) -> list[str]:
    """Names as they are in ``PEERS``, each once.

    Raises:
        ConfigError: unknown, or not in this Pillow.
    """
    forms = list(dict.fromkeys(name.strip().upper() for name in names))
    for form in forms:
        if form not in PEERS:
            raise ConfigError(f"got the peer {form!r}, expected some of {', '.join(PEERS)}")
        if form not in available():
            raise ConfigError(f"this Pillow cannot write {form}; leave it out of the peers, or install pillow>=11.3")
    return forms


def sweeps(form: str, pictures: Pictures, targets: Sequence[float]) -> dict[str, list[Point]]:
    """The curves of a peer, by way of counting its bytes; a mosaic only of pictures of one size.

    Args:
        form: one of ``PEERS``.
        pictures: the set.
        targets: bits a pixel around which the settings are fine.

    Returns:
        For each way points in order of quality: ``quality``, ``bits_per_pixel``, ``psnr_of_mean_error_db``,
        ``psnr_mean_db``, ``ssim``.
    """
    measures: list[Callable[[int], Setting]] = [lambda quality: _files(form, pictures, quality)]
    if len(set(pictures.sizes)) == 1 and 2 * max(pictures.sizes[0]) <= MOSAIC_SIDE:
        measures.append(lambda quality: _mosaics(form, pictures, quality))
    out: dict[str, list[Point]] = {}
    for measure in measures:
        found = refine(measure, targets)
        for kind in found[COARSE[0]].rates:
            out[kind] = [
                {"quality": q, "bits_per_pixel": round(s.rates[kind], 6), **{k: s.closeness[k] for k in _COMPARED}}
                for q, s in sorted(found.items())
            ]
    return out


def refine(measure: Callable[[int], Setting], targets: Sequence[float]) -> dict[int, Setting]:
    """Measure at ``COARSE``, then halve the steps of quality around each target until the rates are ``NEAR``."""
    found = {quality: measure(quality) for quality in COARSE}
    for kind in found[COARSE[0]].rates:
        for target in targets:
            while (quality := _between({q: s.rates[kind] for q, s in found.items()}, target)) is not None:
                found[quality] = measure(quality)
    return found


def at_bits(points: Sequence[Point], bits_per_pixel: float) -> dict[str, float]:
    """Closeness of a peer with exactly so many bits a pixel, linear in the logarithm of the rate.

    A setting that costs more than another and comes less close is never used: the peer is given its best.

    Returns:
        ``psnr_of_mean_error_db``, ``psnr_mean_db`` and ``ssim`` (without those that the points lack); or only
        ``cannot_go_under`` or ``cannot_go_over``, bits a pixel, where the peer has no such file.
    """
    return at_rate(points, "bits_per_pixel", bits_per_pixel, _COMPARED)


def encode(form: str, pixels: np.ndarray, quality: int) -> bytes:
    """A file of a peer, without metadata.

    Args:
        form: one of ``PEERS``.
        pixels: uint8 [3, H, W].
        quality: 0..100.

    Raises:
        MediaError: the format cannot hold a picture of this size.
    """
    buffer = io.BytesIO()
    try:
        PILImage.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(
            buffer, form, quality=quality, **PEERS[form]
        )
    except (OSError, ValueError) as error:
        height, width = pixels.shape[1:]
        raise MediaError(
            f"{form} cannot hold a picture of {height}x{width} pixels ({error}); leave it out of the peers, or fit the "
            "pictures into a size"
        ) from error
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    """uint8 [3, H, W] of a peer's file.

    Raises:
        MediaError: it carries metadata, whose bytes would count.
    """
    with PILImage.open(io.BytesIO(data)) as image:
        extra = [key for key in _METADATA if image.info.get(key)]
        if extra:
            raise MediaError(f"this Pillow writes {', '.join(extra)} into {image.format} files, expected no metadata")
        return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def _between(rates: dict[int, float], target: float) -> int | None:
    """The quality halfway between the two measured ones whose rates enclose a target, None where they are near."""
    qualities = sorted(rates)
    for a, b in itertools.pairwise(qualities):
        low, high = sorted((rates[a], rates[b]))
        if low < target < high:
            return (a + b) // 2 if b - a > 1 and high > NEAR * low else None
    return None


def _files(form: str, pictures: Pictures, quality: int) -> Setting:
    whole = 0
    scores: list[Closeness] = []
    for x in progress(pictures, f"{form} {quality}"):
        data = encode(form, x, quality)
        whole += len(data)
        scores += _compare(x[None], decode(data)[None])
    blank = {s: len(encode(form, np.full((3, *s), 255, np.uint8), quality)) for s in set(pictures.sizes)}
    rates = {"file": whole, "minus_blank": whole - sum(blank[s] for s in pictures.sizes)}
    return Setting({kind: 8 * n / pictures.pixels for kind, n in rates.items()}, summarize(scores))


def _mosaics(form: str, pictures: Pictures, quality: int) -> Setting:
    height, width = pictures.sizes[0]
    pitch = (-(-height // BLOCK) * BLOCK, -(-width // BLOCK) * BLOCK)
    rows, columns = MOSAIC_SIDE // pitch[0], MOSAIC_SIDE // pitch[1]
    size = 0
    scores: list[Closeness] = []
    starts = range(0, len(pictures), rows * columns)
    for start in progress(starts, f"{form} {quality}, mosaic"):
        tiles = np.stack(pictures[start : start + rows * columns])
        data = encode(form, mosaic(tiles, pitch), quality)
        size += len(data)
        scores += _compare(tiles, cut(decode(data), tiles.shape, pitch))
    return Setting({"mosaic": 8 * size / pictures.pixels}, summarize(scores))


def mosaic(tiles: np.ndarray, pitch: tuple[int, int]) -> np.ndarray:
    """uint8 [N, 3, H, W] -> [3, rows * pitch[0], columns * pitch[1]], about square, white where there is no tile."""
    n, channels, height, width = tiles.shape
    columns = math.ceil(math.sqrt(n))
    rows = -(-n // columns)
    grid = np.full((rows * columns, channels, *pitch), 255, np.uint8)
    grid[:n, :, :height, :width] = tiles
    grid = grid.reshape(rows, columns, channels, *pitch).transpose(2, 0, 3, 1, 4)
    return grid.reshape(channels, rows * pitch[0], columns * pitch[1])


def cut(canvas: np.ndarray, shape: tuple[int, ...], pitch: tuple[int, int]) -> np.ndarray:
    """The inverse of ``mosaic``: uint8 [N, 3, H, W], which is ``shape``."""
    n, channels, height, width = shape
    rows, columns = canvas.shape[1] // pitch[0], canvas.shape[2] // pitch[1]
    grid = canvas.reshape(channels, rows, pitch[0], columns, pitch[1]).transpose(1, 3, 0, 2, 4)
    return np.ascontiguousarray(grid.reshape(rows * columns, channels, *pitch)[:n, :, :height, :width])


def _compare(x: np.ndarray, y: np.ndarray) -> list[Closeness]:
    return compare(torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y), multiscale=False)

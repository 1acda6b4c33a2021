"""Pictures of noise, shards of them, and names that fall into a given split."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from mmtok.training.corpus import split_of
from mmtok.training.pictures import Picture, open_pictures

SPLITS = ("train", "val", "test")


def pixels(seed: int, height: int = 6, width: int = 5, channels: int = 3) -> np.ndarray:
    """uint8 [H, W, C] of noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def keys(split: str, count: int, form: str = "k{}") -> list[str]:
    """The first names that the hash puts into a split."""
    return [x for x in (form.format(i) for i in range(1000)) if split_of(x) == split][:count]


def names(source: object, split: str) -> list[str]:
    return [x.name for x in open_pictures(source, split)]  # type: ignore[arg-type]


def looks_like(picture: Picture, array: np.ndarray) -> bool:
    return np.array_equal(picture.read(), array.transpose(2, 0, 1))

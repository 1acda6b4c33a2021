"""Media of a manifest or folder as arrays in memory, decoded once and kept in a cache beside the run."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.progress import track

from mmtok import media
from mmtok.checkpoints import atomic_directory
from mmtok.errors import DataError, MediaError
from mmtok.training.corpus import Item
from mmtok.training.pictures import Picture

T = TypeVar("T", Item, Picture)


def load_images(pictures: Sequence[Picture], size: int, cache: Path, alpha: bool = False) -> np.ndarray:
    """Pictures fitted into a square: uint8 [N, 3, size, size] on white.

    With ``alpha``: uint8 [N, 4, size, size], straight, the border transparent. Pictures that cannot be read are
    reported and left out.
    """

    def decode(picture: Picture) -> np.ndarray:
        return media.fit_image(picture.read(alpha=alpha), size)

    label = f"images-{size}-alpha" if alpha else f"images-{size}"
    images, _ = _cached(pictures, label, decode, cache, lambda x: {"images": np.stack(x)})
    return images


def load_audio(items: Sequence[Item], sample_rate: int, cache: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mono sounds end to end: (int16 [total samples], offsets int64 [N + 1], which items they are int64 [N]).

    Files that cannot be read are reported and left out.
    """

    def decode(item: Item) -> np.ndarray:
        s = item.segment
        samples = media.read_audio(item.path, sample_rate, s.get("start"), s.get("end"))[0]
        return (samples.clip(-1, 1) * 32767).astype(np.int16)

    def join(x: list[np.ndarray]) -> dict[str, np.ndarray]:
        return {"samples": np.concatenate(x), "offsets": np.cumsum([0, *map(len, x)], dtype=np.int64)}

    samples, offsets, kept = _cached(items, f"audio-{sample_rate}", decode, cache, join)
    return samples, offsets, kept


def _cached(
    items: Sequence[T],
    label: str,
    decode: Callable[[T], np.ndarray],
    cache: Path,
    join: Callable[[list[np.ndarray]], dict[str, np.ndarray]],
) -> list[np.ndarray]:
    """Decode in threads and keep the arrays under a key made of the stamps."""
    key = hashlib.sha256(label.encode())
    for item in items:
        key.update(json.dumps(item.stamp, sort_keys=True).encode())
    directory = cache / f"{label}-{key.hexdigest()[:16]}"
    if not directory.is_dir():

        def attempt(item: T) -> np.ndarray | str:
            try:
                return decode(item)
            except MediaError as error:
                return str(error)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(track(pool.map(attempt, items), f"decoding {label}", total=len(items)))
        good = [x for x in results if isinstance(x, np.ndarray)]
        bad = [x for x in results if isinstance(x, str)]
        for line in bad[:20]:
            print(f"left out: {line}", file=sys.stderr)
        if len(bad) > 20:
            print(f"left out: {len(bad) - 20} more", file=sys.stderr)
        if not good:
            raise DataError(f"none of {len(items)} files could be read")
        arrays = join(good) | {"kept": np.flatnonzero([isinstance(x, np.ndarray) for x in results])}
        with atomic_directory(directory) as work:
            for name, array in arrays.items():
                np.save(work / f"{name}.npy", array)
            (work / "names.json").write_text(json.dumps(list(arrays)))
    names = json.loads((directory / "names.json").read_text())
    return [np.load(directory / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in names]

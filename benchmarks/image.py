"""How fast image tokenizers are beside their bare network, and what a large picture costs in tiles, in one run.

    python benchmarks/image.py --data data

Writes benchmarks/results/image.json. One torch thread; contenders take turns, a ratio is the median of the ratios of
the turns.

- ``tensors``: ``encode`` of uint8 batches beside ``encoder`` alone on the same pixels as float32, and beside
  ``encoder`` with the plain search ``(c2 - 2 x @ c.T).argmin``; codes of the batch are compared with each alone.
- ``files``: ``encode_files`` of JPEG files beside ``encoder`` alone on their pixels in memory, batch after batch.
- ``tiles``: a photograph of 2048x1536 encoded and decoded in tiles and whole, each in a process of its own with its
  peak memory (VmHWM of Linux); codes that differ are looked up among the near ties.
The search by itself is in benchmarks/image_search.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage

import mmtok
from mmtok import media
from mmtok.image.files import encode_files
from mmtok.nearest import near_ties
from mmtok.training.corpus import items

RESULTS = Path(__file__).resolve().parent / "results" / "image.json"
TURNS = 15
PHOTO = (1536, 2048)  # rows, columns


def photograph(data: Path) -> np.ndarray:
    """A photograph of the val split, uint8 [3, 1536, 2048]."""
    for item in items(data / "images.jsonl", "image", "val"):
        if "wallpapers" in item.source:
            return media.resize_image(media.read_image(item.path), *PHOTO)
    raise SystemExit(f"{data / 'images.jsonl'} has no photograph in its val split")


def windows(photo: np.ndarray, size: int, count: int, seed: int) -> np.ndarray:
    """Squares of the photograph at random places, uint8 [count, 3, size, size]."""
    r = np.random.default_rng(seed)
    at = [(r.integers(PHOTO[0] - size + 1), r.integers(PHOTO[1] - size + 1)) for _ in range(count)]
    return np.stack([photo[:, y : y + size, x : x + size] for y, x in at])


def turns(*calls: Callable[[], object]) -> list[list[float]]:
    """Seconds of each call, in turns, after two that do not count."""
    out: list[list[float]] = [[] for _ in calls]
    for turn in range(TURNS + 2):
        for times, call in zip(out, calls, strict=True):
            started = time.perf_counter()
            call()
            if turn >= 2:
                times.append(time.perf_counter() - started)
    return out


def ratio(a: list[float], b: list[float]) -> float:
    """Median of a / b over the turns."""
    return round(statistics.median(x / y for x, y in zip(a, b, strict=True)), 3)


def tensors(name: str, photo: np.ndarray, size: int, count: int) -> dict:
    """Shares of the bare network's speed that encode reaches on pictures of one size."""
    tokenizer = mmtok.load(name)
    book = tokenizer.quantizer.books[0].entries
    pixels = torch.from_numpy(windows(photo, size, count, 0))
    floats = pixels.float() / 127.5 - 1

    def bare() -> torch.Tensor:
        return tokenizer.encoder(floats)

    def with_plain_search() -> torch.Tensor:
        z = tokenizer.quantizer.project_in(bare().permute(0, 2, 3, 1)).flatten(0, 2)
        return (book.square().sum(1) - 2 * z @ book.T).argmin(1)

    with torch.inference_mode():
        encode, network, plain = turns(lambda: tokenizer.encode(pixels), bare, with_plain_search)
    codes = tokenizer.encode(pixels)
    alone = torch.cat([tokenizer.encode(x[None]) for x in pixels])
    return {
        "pixels": f"{size}x{size}",
        "batch": count,
        "images_per_second": round(count / min(encode), 1),
        "share_of_network": ratio(network, encode),
        "share_of_network_and_plain_search": ratio(plain, encode),
        "codes_equal_to_alone": bool(torch.equal(codes, alone)),
    }


def files(name: str, photo: np.ndarray, size: int = 256, count: int = 64) -> dict:
    """Share of the bare network's speed that JPEG files are encoded at."""
    tokenizer = mmtok.load(name)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.jpg" for i in range(count)]
        for path, window in zip(paths, windows(photo, size, count, 1), strict=True):
            PILImage.fromarray(window.transpose(1, 2, 0)).save(path, quality=90)
        batches = [
            torch.from_numpy(np.stack([media.read_image(p) for p in paths[i : i + 16]])).float() / 127.5 - 1
            for i in range(0, count, 16)
        ]

        def read() -> None:
            for path in paths:
                media.read_image(path)

        with torch.inference_mode():
            whole, network, reading = turns(
                lambda: list(encode_files(tokenizer, paths)), lambda: [tokenizer.encoder(x) for x in batches], read
            )
    return {
        "pixels": f"{size}x{size}",
        "files": count,
        "files_per_second": round(count / min(whole), 1),
        "share_of_network": ratio(network, whole),
        "reading_alone_takes": ratio(reading, network),
    }


def peak(photo: np.ndarray, name: str, tile: str) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Peak memory in MB of a process that encodes and decodes the photograph; its codes and pixels."""
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/photo.npy", photo)
        code = f"""
import numpy as np, torch, mmtok
torch.set_num_threads(1)
tokenizer = mmtok.load({name!r})
x = torch.from_numpy(np.load({folder!r} + "/photo.npy"))[None]
codes = tokenizer.encode(x, tile={tile})
pixels = tokenizer.decode(codes, tuple(x.shape[2:]), tile={tile})
np.save({folder!r} + "/codes.npy", codes.numpy()), np.save({folder!r} + "/pixels.npy", pixels.numpy())
status = open("/proc/self/status").read()
print(int(status.split("VmHWM:")[1].split()[0]) // 1024)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        arrays = (torch.from_numpy(np.load(f"{folder}/{x}.npy")) for x in ("codes", "pixels"))
        return int(done.stdout), *arrays


def tiles(name: str, photo: np.ndarray) -> dict:
    """Codes, pixels and memory of the photograph in tiles and whole."""
    tokenizer = mmtok.load(name)
    small, codes, pixels = peak(photo, name, "512")
    large, whole, expected = peak(photo, name, "None")
    idle, *_ = peak(photo[:, :8, :8], name, "512")
    different = (codes != whole).flatten()
    ties = 0
    if different.any():
        with torch.inference_mode():
            z = tokenizer.encoder(torch.from_numpy(photo)[None].float() / 127.5 - 1)
            z = tokenizer.quantizer.project_in(z.permute(0, 2, 3, 1)).flatten(0, 2)[different]
        ties = len(near_ties(z, tokenizer.quantizer.books[0].entries, 1e-4))
    return {
        "pixels": f"{PHOTO[1]}x{PHOTO[0]}",
        "codes": codes.numel(),
        "codes_different": int(different.sum()),
        "of_which_near_ties": ties,
        "greatest_difference_of_pixels": int((pixels.int() - expected.int()).abs().max()),
        "peak_mb_tiles": small,
        "peak_mb_whole": large,
        "peak_mb_of_an_8x8_picture": idle,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("names", nargs="*", default=["image-64-f8", "image-f4"], help="tokenizers with one codebook")
    args = parser.parse_args()
    torch.set_num_threads(1)
    photo = photograph(args.data)
    figures: dict = {"machine": f"{platform.machine()}, one thread, torch {torch.__version__}"}
    for name in args.names:
        figures[name] = {
            "fingerprint": mmtok.load(name).fingerprint,
            "tensors": [tensors(name, photo, size, count) for size, count in ((64, 32), (256, 8), (512, 2))],
            "files": files(name, photo),
            "tiles": tiles(name, photo),
        }
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

"""Encode image files as fast as the network allows: while one picture is encoded, the next ones are read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmtok import media
from mmtok.errors import MediaError
from mmtok.image.tokenizer import ImageTokenizer, Size


class EncodedFile(NamedTuple):
    """Codes of one file: int64 [h, w] or [h, w, levels], and the (H, W) of its pixels, for ``decode``."""

    path: Path
    codes: Tensor
    size: Size


def encode_files(
    tokenizer: ImageTokenizer, paths: Iterable[str | Path], batch_size: int = 16, readers: int = 2
) -> Iterator[EncodedFile]:
    """Codes of image files, in their order; decoding of files overlaps with encoding of pixels.

    Args:
        tokenizer: any image tokenizer; with four channels, alpha is read too.
        paths: files that ``media.read_image`` reads.
        batch_size: pictures that are given to the tokenizer at once.
        readers: threads that read ahead; at most two batches of pixels are held.

    Raises:
        MediaError: a file cannot be read, at its place in the order; or a number below 1.
    """
    if batch_size < 1 or readers < 1:
        raise MediaError(f"got a batch of {batch_size} and {readers} readers, expected at least 1 each")
    mode = "RGBA" if tokenizer.channels == 4 else "RGB"
    names = (Path(p) for p in paths)
    waiting: deque[tuple[Path, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(readers) as pool:
        try:
            while True:
                while len(waiting) < 2 * batch_size and (path := next(names, None)) is not None:
                    waiting.append((path, pool.submit(media.read_image, path, mode)))
                if not waiting:
                    return
                batch: list[tuple[Path, Tensor]] = []
                failed: MediaError | None = None
                while waiting and len(batch) < batch_size and failed is None:
                    path, future = waiting.popleft()
                    try:
                        batch.append((path, torch.from_numpy(future.result())))
                    except MediaError as error:
                        failed = error  # after the files before it
                pixels = [x for _, x in batch]
                for (path, x), codes in zip(batch, tokenizer.encode(pixels), strict=True):
                    yield EncodedFile(path, codes, (x.shape[1], x.shape[2]))
                if failed is not None:
                    raise failed
        finally:
            for _, future in waiting:
                future.cancel()

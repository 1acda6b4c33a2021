"""Every codec gives back exactly the length it got, proven length by length. Slow; ``pytest -m slow``, some minutes.

Our own codec (causal and not) at every length from 0 to 4,000 samples and at 100 longer ones in batches of 1 to 5; DAC,
Mimi, SNAC and X-Codec at every seventh, and EnCodec, mono and at 48 kHz stereo, at every eleventh.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import codec_files
import numpy as np
import pytest
import spectral_models
import torch
from encodec_models import tokenizer as encodec
from torch import Tensor

from mmtok.audio import published
from mmtok.audio.encodec import Encodec

pytestmark = pytest.mark.slow
EVERY = range(4001)


def lengths(every: Iterable[int], longest: int = 60_000) -> Iterator[tuple[int, int]]:
    """(samples, rows): all short lengths, one row each, then 100 longer ones with 1 to 5 rows."""
    yield from ((n, 1) for n in every)
    r = np.random.default_rng(0)
    yield from ((int(r.integers(4001, longest)), int(r.integers(1, 6))) for _ in range(100))


def sound(rows: int, channels: int, length: int) -> Tensor:
    return torch.randn(rows, channels, length, generator=torch.Generator().manual_seed(length)) * 0.1


def there_and_back(codec: Any, every: Iterable[int], longest: int = 60_000) -> int:
    count = 0
    for length, rows in lengths(every, longest):
        x = sound(rows, codec.channels, length)
        if isinstance(codec, Encodec) and codec.channels == 2:
            y = codec.decode_with_scale(codec.encode_with_scale(x, levels=2))
        else:
            y = codec.decode(codec.encode(x, 1), length)
        assert y.shape == x.shape, (length, rows)
        assert torch.isfinite(y).all(), (length, rows)
        count += 1
    return count


@pytest.mark.parametrize("shape", ["plain", "causal"])
def test_our_codec(shape: str) -> None:
    assert there_and_back(spectral_models.tiny(shape), EVERY) == 4101


@pytest.mark.parametrize("rate", [24_000, 48_000])
def test_encodec(rate: int) -> None:
    assert there_and_back(encodec(rate), EVERY[::11], 20_000) == 464


@pytest.mark.parametrize("name", ["dac", "mimi", "snac", "xcodec"])
def test_published(name: str, tmp_path: Path) -> None:
    codec_files.write(getattr(codec_files, name)(), tmp_path, codec_files.SNAC if name == "snac" else None)
    assert there_and_back(published.SYSTEMS[name].from_published(tmp_path), EVERY[::7], 20_000) == 672

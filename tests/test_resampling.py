"""Resampling in pieces against the whole, and reading of long files block by block."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import resample_poly

from mmtok import media, resampling, sounds
from mmtok.errors import MediaError
from mmtok.resampling import Resampler, resample

RATES = st.sampled_from([8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000, 44099])


@given(RATES, RATES, st.integers(0, 9000), st.lists(st.integers(0, 3000), max_size=8), st.integers(1, 2))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_pieces_are_the_whole(rate: int, new_rate: int, length: int, cuts: list[int], channels: int) -> None:
    x = np.random.default_rng(length).uniform(-1, 1, (channels, length)).astype(np.float32)
    whole = resample(x, rate, new_rate)
    stream = Resampler(rate, new_rate)
    pieces = np.split(x, sorted(min(c, length) for c in cuts), axis=1)
    got = np.concatenate([*map(stream.push, pieces), stream.finish()], 1)
    assert got.shape == whole.shape
    np.testing.assert_allclose(got, whole, atol=2e-6)


def test_memory_does_not_grow_with_the_sound() -> None:
    stream = Resampler(44100, 16000)
    block = np.zeros((1, 44100), np.float32)
    held = []
    for _ in range(20):
        stream.push(block)
        assert stream._kept is not None
        held.append(stream._kept.shape[1])
    assert max(held) < 2000


@pytest.mark.parametrize("sample_rate", [None, 16000, 48000])
@pytest.mark.parametrize("mono", [True, False])
def test_blocks_are_what_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample_rate: int | None, mono: bool
) -> None:
    monkeypatch.setattr(sounds, "_BLOCK", 1000)
    x = np.random.default_rng(0).uniform(-0.5, 0.5, (30_000, 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.flac", x, 22050, subtype="PCM_24")
    whole = media.read_audio(tmp_path / "a.flac", sample_rate, 0.1, 1.2, mono)
    blocks = list(media.audio_blocks(tmp_path / "a.flac", sample_rate, 0.1, 1.2, mono))
    assert len(blocks) > 20
    np.testing.assert_allclose(np.concatenate(blocks, 1), whole, atol=2e-6)


def test_longer_than_the_limit_of_a_whole_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(30_000, np.float32), 10_000)
    with pytest.raises(MediaError, match="limit is 2 s"):
        media.read_audio(tmp_path / "a.wav", 16000, max_seconds=2.0)
    assert sum(b.shape[1] for b in media.audio_blocks(tmp_path / "a.wav", 16000)) == 48_000


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "NaN or infinite samples from 1.500 s on"), (9.0, "samples reach 9 at 1.500 s")]
)
def test_a_bad_sample_is_named_by_its_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, words: str
) -> None:
    monkeypatch.setattr(sounds, "_BLOCK", 4000)
    x = np.zeros(20_000, np.float32)
    x[15_000] = value
    soundfile.write(tmp_path / "a.wav", x, 10_000, subtype="FLOAT")
    with pytest.raises(MediaError, match=words):
        media.read_audio(tmp_path / "a.wav", 16000)
    good = []
    with pytest.raises(MediaError, match=words):
        good.extend(media.audio_blocks(tmp_path / "a.wav", 10_000))
    assert sum(b.shape[1] for b in good) == 12_000  # three whole blocks came before it


def test_a_damaged_file_is_named_by_its_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sounds, "_BLOCK", 4096)
    x = np.random.default_rng(0).uniform(-0.5, 0.5, 32_000).astype(np.float32)
    soundfile.write(tmp_path / "a.flac", x, 16_000)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 9000] = bytes(9000)
    (tmp_path / "a.flac").write_bytes(data)
    with pytest.raises(MediaError, match=r"damaged or cut short audio.* at (0\.[5-9]|1\.)\d* s"):
        media.read_audio(tmp_path / "a.flac", 16_000)


@pytest.mark.parametrize(
    ("rate", "new_rate"), [(44100, 16000), (48000, 16000), (16000, 44100), (8000, 16000), (44100, 15999), (96000, 8000)]
)
def test_it_is_scipys_polyphase_filter(rate: int, new_rate: int) -> None:
    """As a product of matrices, where that is quick, or not: the same filter."""
    random = np.random.default_rng(0)
    divisor = math.gcd(rate, new_rate)
    up, down = new_rate // divisor, rate // divisor
    window = resampling._sinc_filter(max(up, down))
    for length in (1, 2, 50, 1001, 30_000, 150_000 if up < 1000 else 2):
        samples = random.uniform(-1, 1, (2, length)).astype(np.float32)
        expected = np.stack([resample_poly(x, up, down, window=window) for x in samples]).astype(np.float32)
        got = resample(samples, rate, new_rate)
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-7)

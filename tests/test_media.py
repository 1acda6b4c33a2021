"""Media files: exact round trips, good resampling, and one clear MediaError line for every bad file."""

from __future__ import annotations

import io
import os
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmtok import media
from mmtok.errors import MediaError


def png_header(width: int, height: int) -> bytes:
    data = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + data
    begin = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return begin + struct.pack(">I", 1000) + b"IDAT" + bytes(100)


def wav_header(data_bytes: int, rate: int = 16000, channels: int = 1, code: int = 1, bits: int = 16) -> bytes:
    block = channels * bits // 8
    fmt = struct.pack("<HHIIHH", code, channels, rate, rate * block, block, bits)
    body = b"WAVEfmt " + struct.pack("<I", 16) + fmt + b"data" + struct.pack("<I", data_bytes)
    return b"RIFF" + struct.pack("<I", min(len(body) + data_bytes, 2**32 - 1)) + body


def photo(height: int = 40, width: int = 56) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([4 * x, 5 * y, 2 * (x + y)]).clip(0, 255).astype(np.uint8)


def tone(rate: int, seconds: float = 0.5, frequency: float = 440.0, channels: int = 1) -> np.ndarray:
    t = np.arange(round(rate * seconds)) / rate
    return np.stack([0.5 * np.sin(2 * np.pi * frequency * (c + 1) * t) for c in range(channels)]).astype(np.float32)


def save_photo(path: Path, **options: object) -> np.ndarray:
    x = photo()
    Image.fromarray(x.transpose(1, 2, 0)).save(path, **options)
    return x


def expect_error(path: Path, call, *words: str) -> None:
    """The call raises a MediaError of one line that names the file and holds the words."""
    with pytest.raises(MediaError) as caught:
        call(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(path))
    for word in words:
        assert word in text, text


def audio16(path: Path) -> np.ndarray:
    return media.read_audio(path, 16000)


# --- images


def test_png_round_trip_is_exact(tmp_path: Path) -> None:
    x = photo()
    media.write_image(tmp_path / "a.png", x)
    assert media.sniff(tmp_path / "a.png") == "image"
    np.testing.assert_array_equal(media.read_image(tmp_path / "a.png"), x)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png"]


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("a.bmp", {}, 0),
        ("a.gif", {}, 40),
        ("a.jpg", {"quality": 95}, 12),
        ("a.webp", {"lossless": True}, 0),
        ("b.webp", {"quality": 95}, 16),
    ],
)
def test_every_image_format(tmp_path: Path, name: str, options: dict, tolerance: int) -> None:
    x = save_photo(tmp_path / name, **options)
    y = media.read_image(tmp_path / name)
    assert y.dtype == np.uint8
    assert y.shape == x.shape
    assert np.abs(y.astype(int) - x).max() <= tolerance


def test_alpha_is_composited_on_the_background(tmp_path: Path) -> None:
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[:, :3] = (200, 0, 0, 255)
    rgba[:, 3:] = (0, 200, 0, 0)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    x = media.read_image(tmp_path / "a.png", background=(1, 2, 3))
    assert x[:, 0, 0].tolist() == [200, 0, 0]
    assert x[:, 0, 5].tolist() == [1, 2, 3]
    assert media.read_image(tmp_path / "a.png")[:, 0, 5].tolist() == [255, 255, 255]
    np.testing.assert_array_equal(media.read_image(tmp_path / "a.png", "RGBA"), rgba.transpose(2, 0, 1))


def test_palette_with_a_transparent_entry(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.gif", transparency=0)
    x = media.read_image(tmp_path / "a.gif", background=(9, 9, 9))
    assert x[:, 0, 0].tolist() == [9, 9, 9]
    assert x[:, 1, 1].tolist() == [0, 0, 255]


def test_grey_and_16_bit(tmp_path: Path) -> None:
    values = np.array([[0, 257 * 7, 65535, 257 * 128 + 100]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert media.read_image(tmp_path / "a.png", "L")[0, 0].tolist() == [0, 7, 255, 128]
    assert media.read_image(tmp_path / "a.png")[:, 0, 1].tolist() == [7, 7, 7]


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (9, 9)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_pixels_may_be_written_to(tmp_path: Path, size: tuple[int, int], mode: str) -> None:
    Image.new(mode, size).save(tmp_path / "a.png")
    assert media.read_image(tmp_path / "a.png", mode).flags.writeable


def test_cmyk_and_one_bit(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 0, 0, 0)).save(tmp_path / "a.jpg", quality=95)
    assert media.read_image(tmp_path / "a.jpg").min() >= 250
    Image.new("1", (8, 8), 1).save(tmp_path / "b.png")
    assert media.read_image(tmp_path / "b.png").min() == 255


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    x = save_photo(tmp_path / "a.jpg", exif=exif, quality=95)
    y = media.read_image(tmp_path / "a.jpg")
    assert y.shape == (3, 56, 40)
    assert np.abs(y.astype(int) - np.rot90(x, -1, axes=(1, 2))).max() <= 12


def test_resize_and_fit() -> None:
    x = photo(30, 60)
    assert media.resize_image(x, 7, 9).shape == (3, 7, 9)
    np.testing.assert_array_equal(media.resize_image(x, 30, 60), x)
    checker = np.tile(np.indices((64, 64)).sum(0) % 2 * 255, (3, 1, 1)).astype(np.uint8)
    assert np.abs(media.resize_image(checker, 8, 8).astype(int) - 127).max() <= 3, "aliasing"
    y = media.fit_image(np.zeros((3, 30, 60), np.uint8), 32, background=255)
    assert y.shape == (3, 32, 32)
    assert (y[:, 8:24] == 0).all()
    assert (y[:, :8] == 255).all()
    assert (y[:, 24:] == 255).all()


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_fit_always_gives_the_square(height: int, width: int, size: int) -> None:
    assert media.fit_image(photo(height, width), size).shape == (3, size, size)


def test_fit_of_transparent_pictures() -> None:
    """Fitted and then laid on white, or laid on white and then fitted: the same, though hidden colours are loud."""
    y, x = np.mgrid[0:40, 0:90]
    rgba = np.stack([np.full_like(x, 200), 2 * x, 5 * y, (34 * x - 1020).clip(0, 255)]).astype(np.uint8)
    rgba[:3, :, :31] = [[[255]], [[0]], [[255]]]
    fitted = media.fit_image(rgba, 48)
    assert fitted.shape == (4, 48, 48)
    assert (fitted[3, :13] == 0).all()
    assert (fitted[3, 35:] == 0).all()
    on_white = [Image.fromarray(p.transpose(1, 2, 0)) for p in (rgba, fitted)]
    on_white = [Image.alpha_composite(Image.new("RGBA", p.size, "white"), p).convert("RGB") for p in on_white]
    expected = media.fit_image(np.asarray(on_white[0]).transpose(2, 0, 1), 48)
    assert np.abs(np.asarray(on_white[1]).transpose(2, 0, 1).astype(int) - expected).max() <= 3


def test_images_in_memory(tmp_path: Path) -> None:
    rgba = np.concatenate([photo(), np.full((1, 40, 56), 255, np.uint8)])
    rgba[3, :9] = 0
    media.write_image(tmp_path / "a.png", rgba)
    data = (tmp_path / "a.png").read_bytes()
    for mode in ("RGB", "RGBA", "L"):
        expected = media.read_image(tmp_path / "a.png", mode)
        np.testing.assert_array_equal(media.decode_image(data, "x", mode), expected)
        np.testing.assert_array_equal(media.convert_image(Image.open(io.BytesIO(data)), "x", mode), expected)
    for bad, words in ((b"", "not recognised"), (b"words", "not recognised"), (data[:-40], "cut short")):
        with pytest.raises(MediaError, match=f"^my/x.png: .*{words}"):
            media.decode_image(bad, "my/x.png")
    with pytest.raises(MediaError, match=r"^my/x.png: .*limit"):
        media.decode_image(png_header(9000, 9000), "my/x.png")
    with pytest.raises(MediaError, match=r"^my/x.png: .*limit"):
        media.convert_image(Image.new("1", (9000, 9000)), "my/x.png")
    with pytest.raises(MediaError, match=r"^my/x.png: .*cut short"):
        media.convert_image(Image.open(io.BytesIO(data[:-40])), "my/x.png")


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((3, 4, 4), np.float32),
        np.zeros((5, 4, 3), np.uint8),
        np.zeros((3, 0, 4), np.uint8),
        np.zeros((3, 4), np.uint8),
        [[1]],
    ],
)
def test_bad_pixel_arrays(tmp_path: Path, bad: object) -> None:
    with pytest.raises(MediaError, match="expected"):
        media.write_image(tmp_path / "a.png", bad)
    assert not list(tmp_path.iterdir())


# --- audio


@given(st.integers(0, 300), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_16_bit_round_trip_is_exact(tmp_path_factory: pytest.TempPathFactory, n: int, channels: int, seed: int) -> None:
    path = tmp_path_factory.getbasetemp() / "round.wav"
    integers = np.random.default_rng(seed).integers(-32768, 32768, (channels, n + 1))
    x = (integers / 32768).astype(np.float32)
    media.write_audio(path, x, 16000)
    np.testing.assert_array_equal(media.read_audio(path, 16000, mono=False), x)


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("a.wav", {"subtype": "PCM_16"}, 1e-4),
        ("a.wav", {"subtype": "PCM_24"}, 1e-6),
        ("a.wav", {"subtype": "PCM_U8"}, 1e-2),
        ("a.wav", {"subtype": "FLOAT"}, 1e-7),
        ("a.wav", {"subtype": "DOUBLE"}, 1e-7),
        ("a.flac", {"subtype": "PCM_24"}, 1e-6),
        ("a.ogg", {"format": "OGG", "subtype": "VORBIS"}, 0.05),
        ("a.opus", {"format": "OGG", "subtype": "OPUS"}, 0.05),
        ("a.mp3", {"format": "MP3"}, 0.05),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_audio_format(tmp_path: Path, name: str, options: dict, tolerance: float, channels: int) -> None:
    rate = 48000
    x = tone(rate, channels=channels)
    soundfile.write(tmp_path / name, x.T, rate, **options)
    assert media.sniff(tmp_path / name) == "audio"
    assert media.audio_rate(tmp_path / name) == rate
    y = media.read_audio(tmp_path / name, rate, mono=False)
    assert y.dtype == np.float32
    assert y.shape[0] == channels
    inner = slice(2000, 20000)
    assert np.abs(y[:, inner] - x[:, inner]).max() < tolerance
    mono = media.read_audio(tmp_path / name, rate)
    np.testing.assert_allclose(mono[0], y.mean(0), atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44100, 44101, 48000, 96000])
def test_resampling_keeps_a_tone(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", tone(rate).T, rate, subtype="FLOAT")
    y = media.read_audio(tmp_path / "a.wav", 16000)
    assert y.shape == (1, -(-round(rate * 0.5) * 16000 // rate))
    x = tone(16000)
    assert np.abs(y[0, 500:7500] - x[0, 500:7500]).max() < 2e-5


def test_resampling_rejects_what_would_alias() -> None:
    y = media.resample(tone(48000, 1.0, 9500.0), 48000, 16000)
    assert np.abs(y[:, 500:-500]).max() < 1e-4


def test_resampling_agrees_with_torchaudio() -> None:
    import torch
    import torchaudio

    x = np.random.default_rng(0).normal(0, 0.1, (2, 4000)).astype(np.float32)
    expected = torchaudio.functional.resample(
        torch.from_numpy(x), 44100, 16000, 64, 0.9475937167399596, "sinc_interp_kaiser", 14.769656459379492
    ).numpy()
    got = media.resample(x, 44100, 16000)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_selection_in_seconds(tmp_path: Path) -> None:
    x = (np.arange(16000) / 32768).astype(np.float32)[None]
    media.write_audio(tmp_path / "a.wav", x, 16000)
    y = media.read_audio(tmp_path / "a.wav", 16000, start=0.25, end=0.5)
    np.testing.assert_array_equal(y, x[:, 4000:8000])
    np.testing.assert_array_equal(media.read_audio(tmp_path / "a.wav", 16000, start=0.75), x[:, 12000:])
    assert media.read_audio(tmp_path / "a.wav", 16000, end=1.004).shape == (1, 16000)
    for start, end in [(-1, None), (0.5, 0.5), (0.6, 0.5), (1.0, None), (0, 1.2), (float("nan"), None), (2, 3)]:
        expect_error(tmp_path / "a.wav", lambda p, s=start, e=end: media.read_audio(p, 16000, s, e), "0 <= start < end")
    expect_error(tmp_path / "a.wav", lambda p: media.read_audio(p, 16000, 0.1, 0.10001), "no sample")
    expect_error(tmp_path / "a.wav", lambda p: media.read_audio(p, 16000, max_seconds=0.5), "1.0 s", "limit is 0.5 s")
    assert media.read_audio(tmp_path / "a.wav", 16000, 0.1, 0.2, max_seconds=0.5).shape == (1, 1600)


def test_overshoot_is_clipped_and_bad_scale_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.array([0.5, 1.5, -3.0]), 16000, subtype="FLOAT")
    assert audio16(tmp_path / "a.wav").tolist() == [[0.5, 1.0, -1.0]]
    soundfile.write(tmp_path / "b.wav", np.array([0.5, 12000.0]), 16000, subtype="FLOAT")
    expect_error(tmp_path / "b.wav", audio16, "1.2e+04", "-1..1")


def test_pipe_header_with_unknown_length_is_read(tmp_path: Path) -> None:
    data = wav_header(0xFFFFFFFF) + np.arange(100, dtype="<i2").tobytes()
    (tmp_path / "a.wav").write_bytes(data)
    assert audio16(tmp_path / "a.wav").shape == (1, 100)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros(5, np.float32),
        np.zeros((1, 5)),
        np.zeros((0, 5), np.float32),
        np.full((1, 5), np.nan, np.float32),
        np.full((1, 5), np.inf, np.float32),
        [[0.0]],
    ],
)
def test_bad_sample_arrays(tmp_path: Path, bad: object) -> None:
    with pytest.raises(MediaError, match="expected"):
        media.write_audio(tmp_path / "a.wav", bad, 16000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rate", [0, -1, 16000.0, True, 10**9])
def test_bad_rates(tmp_path: Path, rate: object) -> None:
    media.write_audio(tmp_path / "a.wav", tone(16000), 16000)
    with pytest.raises(MediaError, match="whole number of Hz"):
        media.read_audio(tmp_path / "a.wav", rate)
    with pytest.raises(MediaError, match="whole number of Hz"):
        media.write_audio(tmp_path / "b.wav", tone(16000), rate)


# --- text


def test_text_is_exact(tmp_path: Path) -> None:
    text = "\ufeffOne\r\ntwo\x00 \u0301 \U0001f600"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert media.read_text(tmp_path / "a.txt") == text
    (tmp_path / "b.txt").write_bytes(b"ok \xff")
    expect_error(tmp_path / "b.txt", media.read_text, "byte 3", "UTF-8")


@pytest.mark.parametrize(
    "text", ["GIF89a is a format", "OggS", "RIFF....WAVE", "BM and so on", "", "fLaC", "ID3\x03\x00"]
)
def test_text_that_begins_like_media(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert media.sniff(tmp_path / "a.txt") == "text"


def test_sniff_does_not_need_a_suffix(tmp_path: Path) -> None:
    media.write_image(tmp_path / "a", photo())
    media.write_audio(tmp_path / "b", tone(16000), 16000)
    (tmp_path / "c").write_text("é" * 40000, encoding="utf-8")
    (tmp_path / "d").write_text("x" + "é" * 40000, encoding="utf-8")
    assert [media.sniff(tmp_path / n) for n in "abcd"] == ["image", "audio", "text", "text"]


# --- bad files: every reader gives one line that names the file

BAD = [
    ("missing.png", "no such file"),
    ("directory.png", "directory"),
    ("empty.png", "empty"),
    ("text.png", "holds text"),
    ("image.wav", "holds an image"),
    ("audio.png", "holds audio"),
    ("noise.bin", "not recognised"),
    ("utf16", "UTF-16"),
    ("pipe", "regular file"),
]


@pytest.mark.parametrize(("name", "word"), BAD)
def test_wrong_kinds(tmp_path: Path, name: str, word: str) -> None:
    path = tmp_path / name
    if name == "directory.png":
        path.mkdir()
    elif name == "empty.png":
        path.touch()
    elif name == "text.png":
        path.write_text("just words")
    elif name == "image.wav":
        media.write_image(path, photo())
    elif name == "audio.png":
        media.write_audio(path, tone(16000), 16000)
    elif name == "noise.bin":
        path.write_bytes(bytes(range(128, 256)) * 4)
    elif name == "utf16":
        path.write_bytes("words".encode("utf-16"))
    elif name == "pipe":
        os.mkfifo(path)
    for call in (media.sniff, media.read_image, audio16):
        expect_error(path, call, word)


def test_right_name_wrong_reader(tmp_path: Path) -> None:
    media.write_image(tmp_path / "a.png", photo())
    media.write_audio(tmp_path / "a.wav", tone(16000), 16000)
    expect_error(tmp_path / "a.png", audio16, "holds an image")
    expect_error(tmp_path / "a.wav", media.read_image, "holds audio")


def test_a_path_with_a_nul() -> None:
    with pytest.raises(MediaError, match="cannot be read"):
        media.sniff("a\0b.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp"])
@pytest.mark.parametrize("keep", [0.3, 0.7])
def test_truncated_images(tmp_path: Path, name: str, keep: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * keep)])
    expect_error(tmp_path / name, media.read_image, "cut short")


@pytest.mark.parametrize("name", ["a.ogg", "a.opus", "a.flac", "a.wav"])
@pytest.mark.parametrize("keep", [0.02, 0.4, 0.95])
def test_truncated_audio(tmp_path: Path, name: str, keep: float) -> None:
    rate = 48000
    noise = np.random.default_rng(0).normal(0, 0.2, rate * 2)
    subtype = {"a.ogg": "VORBIS", "a.opus": "OPUS"}.get(name)
    soundfile.write(tmp_path / name, noise, rate, format="OGG" if subtype else None, subtype=subtype)
    data = (tmp_path / name).read_bytes()
    assert media.read_audio(tmp_path / name, rate).shape == (1, 2 * rate)
    (tmp_path / name).write_bytes(data[: int(len(data) * keep)])
    expect_error(tmp_path / name, lambda p: media.read_audio(p, rate), "cut short")


@pytest.mark.parametrize(
    "name", ["a.ogg", "a.opus", "a.flac", "a.wav", "a.mp3", "a.png", "a.jpg", "a.webp", "a.gif", "a.bmp"]
)
def test_flipped_bytes_never_escape(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(1)
    path = tmp_path / name
    image = name.split(".")[1] in ("png", "jpg", "webp", "gif", "bmp")
    if image:
        save_photo(path)
    else:
        subtype = {"a.ogg": "VORBIS", "a.opus": "OPUS"}.get(name)
        soundfile.write(path, tone(48000, 0.1)[0], 48000, format="OGG" if subtype else None, subtype=subtype)
    data = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(40):
        damaged = data.copy()
        damaged[rng.integers(0, min(len(data), 400), 3)] = rng.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        try:
            x = media.read_image(path) if image else media.read_audio(path, 48000)
        except MediaError:
            continue
        assert x.size


def test_bombs_are_refused_from_the_header(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse.png"
    with sparse.open("wb") as f:
        f.write(png_header(64, 64))
        f.truncate(2**30)
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_header(60000, 60000))
    big = tmp_path / "big.png"
    big.write_bytes(png_header(9000, 9000))
    tracemalloc.start()
    began = time.perf_counter()
    expect_error(sparse, media.read_image, "1073741824 bytes", "limit")
    expect_error(bomb, media.read_image, "pixels", "limit")
    expect_error(big, media.read_image, "9000x9000", "limit")
    assert time.perf_counter() - began < 1
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("form", "options", "marker", "skip", "layout"),
    [
        ("GIF", {}, b"GIF87a", 6, "<HH"), ("JPEG", {}, b"\xff\xc0", 5, ">HH"), ("BMP", {}, b"BM", 18, "<ii"),
        ("PNG", {}, b"IHDR", 4, ">II"), ("WEBP", {"lossless": True}, b"VP8L", 9, "14 bits"),
        ("WEBP", {"save_all": True, "append_images": [Image.new("RGB", (8, 8), "red")]}, b"VP8X", 12, "24 bits"),
    ],
)  # fmt: skip
def test_a_bomb_of_every_format(
    tmp_path: Path, form: str, options: dict, marker: bytes, skip: int, layout: str
) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, form, **options)
    data = bytearray(buffer.getvalue())
    size = 16_000
    if layout == "14 bits":
        edges = (size - 1 | size - 1 << 14).to_bytes(4, "little")
    elif layout == "24 bits":
        edges = 2 * (size - 1).to_bytes(3, "little")
    else:
        edges = struct.pack(layout, size, size)
    place = data.index(marker) + skip
    data[place : place + len(edges)] = edges
    if form == "PNG":
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path = tmp_path / f"bomb.{form.lower()}"
    path.write_bytes(data)
    tracemalloc.start()
    expect_error(path, media.read_image, "pixels", "limit")
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()


def test_sparse_text_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as f:
        f.truncate(2**30)
    expect_error(tmp_path / "a.txt", media.read_text, "limit")


def test_image_without_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_header(0, 0))
    expect_error(tmp_path / "a.png", media.read_image)


def test_wav_headers_that_lie(tmp_path: Path) -> None:
    hours = tmp_path / "hours.wav"
    hours.write_bytes(wav_header(4 * 3600 * 32000) + bytes(3200))
    expect_error(hours, audio16)
    sparse = tmp_path / "sparse.wav"
    with sparse.open("wb") as f:
        f.write(wav_header(4 * 3600 * 32000))
        f.truncate(44 + 4 * 3600 * 32000)
    began = time.perf_counter()
    expect_error(sparse, audio16, "14400.0 s", "limit")
    assert time.perf_counter() - began < 1
    empty = tmp_path / "empty.wav"
    empty.write_bytes(wav_header(0))
    expect_error(empty, audio16, "no samples")
    bare = tmp_path / "bare.wav"
    bare.write_bytes(wav_header(0)[:30])
    expect_error(bare, audio16)
    for name, header in {
        "rate.wav": wav_header(200, rate=0),
        "fast.wav": wav_header(200, rate=10**9),
        "wide.wav": wav_header(4000, channels=1000),
        "code.wav": wav_header(200, code=0x7777),
    }.items():
        (tmp_path / name).write_bytes(header + bytes(4000))
        expect_error(tmp_path / name, audio16)


def test_nan_audio(tmp_path: Path) -> None:
    x = tone(16000)[0]
    x[100] = np.nan
    soundfile.write(tmp_path / "a.wav", x, 16000, subtype="FLOAT")
    expect_error(tmp_path / "a.wav", audio16, "NaN")


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    media.write_image(tmp_path / "a.png", photo())
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(MediaError):
        media.write_image(tmp_path / "a.png", photo().astype(np.float32))
    assert (tmp_path / "a.png").read_bytes() == before
    assert Image.open(io.BytesIO(before)).format == "PNG"


def test_a_fault_within_a_block_is_told_by_its_second(tmp_path):
    path, rate = tmp_path / "x.flac", 16_000
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 10 * rate), rate)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 7 // 10])
    with pytest.raises(MediaError, match=r"damaged or cut short audio at (\d+\.\d+) s") as error:
        media.read_audio(path, rate)
    assert 6.5 < float(str(error.value).split(" at ")[1].split()[0]) < 7.2

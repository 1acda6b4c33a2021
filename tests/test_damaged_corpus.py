"""Damaged inputs of all kinds among good ones: each is left out with its reason, all the rest is built."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from commands import run
from corpora import document_of, write_corpus
from drawings import drawing
from PIL import Image as PILImage

from mmtok import media
from mmtok.datasets.shards import TokenDataset
from mmtok.multimodal import MultimodalTokenizer

RATE = 16_000
NOISE = np.random.default_rng(0)


def picture(path: Path, size: int = 64) -> bytes:
    PILImage.fromarray(drawing(size, size, 1).transpose(1, 2, 0)).save(path)
    return path.read_bytes()


def sound(path: Path, seconds: float = 0.5, **options: str) -> bytes:
    soundfile.write(path, 0.2 * np.sin(np.arange(int(seconds * RATE)) * 0.1), RATE, **options)
    return path.read_bytes()


def cut(make: Callable[[Path], bytes], share: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        data = make(path)
        path.write_bytes(data[: int(share * len(data))])

    return write


def garbled(make: Callable[[Path], bytes], at: float, count: int = 200) -> Callable[[Path], None]:
    """Random bytes in the middle."""

    def write(path: Path) -> None:
        data = bytearray(make(path))
        start = int(at * len(data))
        data[start : start + count] = NOISE.bytes(len(data[start : start + count]))
        path.write_bytes(data)

    return write


def content(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises this size, with little behind it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bomb(path: Path) -> None:
    """A real one: 900 million pixels in less than a megabyte."""
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(30_001) * 100) for _ in range(300)) + rows.flush()
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def wav(frames: int, data: bytes, kind: int = 1, bits: int = 16) -> bytes:
    """A WAV whose header promises so many frames."""
    width = bits // 8
    form = struct.pack("<HHIIHH", kind, 1, RATE, RATE * width, width, bits)
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", frames * width) + data
    return b"RIFF" + struct.pack("<I", min(2**32 - 1, len(body))) + body


def flac_of_hours(path: Path) -> None:
    """A FLAC whose header says ten hours, with half a second behind it."""
    data = bytearray(sound(path))
    # STREAMINFO: total samples are the low 36 bits of the eight bytes at 18.
    old = int.from_bytes(data[18:26], "big")
    data[18:26] = ((old >> 36 << 36) | 36_000 * RATE).to_bytes(8, "big")
    path.write_bytes(data)


def directory(path: Path) -> None:
    path.mkdir()


def no_permission(path: Path) -> None:
    sound(path)
    path.chmod(0)


FLOATS = np.array([0.1, np.nan, 0.2, np.inf], "<f4")
DAMAGED: dict[str, Callable[[Path], object]] = {
    **{f"cut{int(100 * x)}.png": cut(picture, x) for x in (0.01, 0.3, 0.9)},
    **{f"cut{int(100 * x)}.jpg": cut(picture, x) for x in (0.02, 0.5, 0.9)},
    **{f"cut{int(100 * x)}.gif": cut(picture, x) for x in (0.005, 0.5)},
    **{f"cut{int(100 * x)}.webp": cut(picture, x) for x in (0.05, 0.5)},
    **{f"cut{int(100 * x)}.bmp": cut(picture, x) for x in (0.001, 0.5)},
    **{f"cut{int(100 * x)}.ogg": cut(sound, x) for x in (0.01, 0.5, 0.95)},
    **{f"cut{int(100 * x)}.flac": cut(sound, x) for x in (0.01, 0.5, 0.95)},
    **{f"cut{int(100 * x)}.wav": cut(sound, x) for x in (0.001, 0.5, 0.95)},
    **{f"cut{int(100 * x)}.opus": cut(lambda p: sound(p, format="OGG", subtype="OPUS"), x) for x in (0.05, 0.6)},
    **{f"cut{int(100 * x)}.mp3": cut(sound, x) for x in (0.01,)},
    "garbled.png": garbled(picture, 0.5),
    "garbled.ogg": garbled(lambda path: sound(path, 3.0), 0.6),
    "garbled.flac": garbled(lambda path: sound(path, 3.0), 0.5),
    **{f"zero.{x}": content(b"") for x in ("png", "jpg", "webp", "ogg", "flac", "wav", "mp3")},
    "zeros.png": content(bytes(5000)),
    "noise.jpg": content(NOISE.bytes(3000)),
    "noise.ogg": content(NOISE.bytes(3000)),
    "text.png": content(b"not a picture"),
    "page.jpg": content(b"<html><body>404 Not Found</body></html>"),
    "picture.wav": lambda path: path.write_bytes(picture(path.with_suffix(".png"))),
    "sound.png": lambda path: path.write_bytes(sound(path.with_suffix(".wav"))),
    "bomb.png": bomb,
    "huge.png": content(png(200_000, 200_000)),
    "short.png": content(png(4000, 4000)),
    "0x0.png": content(png(0, 0)),
    "0x5.png": content(png(0, 5)),
    "large.png": lambda path: PILImage.new("RGB", (600, 20)).save(path),  # more codes than the grid has
    "missing.png": lambda path: None,
    "missing.flac": lambda path: None,
    "directory.png": directory,
    "nowhere.png/cow.png": lambda path: None,
    "pipe.wav": os.mkfifo,
    "link.png": lambda path: path.symlink_to("link.png"),
    "nan.wav": lambda path: path.write_bytes(wav(4, FLOATS.tobytes(), 3, 32)),
    "loud.wav": lambda path: path.write_bytes(wav(4, (FLOATS[[0, 0, 2, 2]] * 1e6).tobytes(), 3, 32)),
    "empty.wav": content(wav(0, b"")),
    "hours.wav": content(wav(36_000 * RATE, bytes(4000))),
    "hours.flac": flac_of_hours,
}
LINES = {
    "not JSON": '{"id": "x", "segments": [',
    "a list": "[1, 2]",
    "no segments": '{"id": "bare"}',
    "empty": '{"id": "empty", "segments": []}',
    "unknown type": '{"id": "video", "segments": [{"type": "video", "path": "x.mp4"}]}',
    "no path": '{"id": "nowhere", "segments": [{"type": "image"}]}',
    "surrogate": '{"id": "half", "segments": [{"type": "text", "text": "\\ud800"}]}',
    "role": '{"id": "robot", "segments": [{"type": "turn", "role": "robot"}]}',
    "times": '{"id": "times", "segments": [{"type": "audio", "path": "good.wav", "start": 3, "end": 1}]}',
    "beyond": '{"id": "beyond", "segments": [{"type": "audio", "path": "good.wav", "start": 3000}]}',
    "NaN": '{"id": "when", "segments": [{"type": "audio", "path": "good.wav", "start": NaN}]}',
}


def test_there_are_enough_kinds() -> None:
    assert len(DAMAGED) + len(LINES) >= 50


def test_all_is_left_out_and_the_rest_is_built(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "corpus"
    manifest = write_corpus(folder, 30)
    good = manifest.read_text(encoding="utf-8").splitlines()
    sound(folder / "good.wav")
    bad: dict[str, str] = {}
    for name, damage in DAMAGED.items():
        path = folder / "bad" / name
        path.parent.mkdir(exist_ok=True)
        damage(path)
        kind = "image" if name.endswith((".png", ".jpg", ".gif", ".webp", ".bmp")) else "audio"
        # Damage in the second segment must not leave the first one behind.
        segments = [{"type": "text", "text": "lost"}, {"type": kind, "path": f"bad/{name}"}]
        bad[name] = json.dumps({"id": name, "segments": segments})
    bad |= LINES
    lines, order = [], np.random.default_rng(1).permutation(len(good) + len(bad)).tolist()
    every = [*good, *bad.values()]
    lines = [every[i] for i in order]
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")

    code, out, err = run("dataset", "build", manifest, "-o", tmp_path / "d", "--workers", 1, "--json", capsys=capsys)
    assert code == 2, err
    assert err.count("\n") == 1
    assert f"{len(bad)} of {len(every)} documents are left out" in err
    report = json.loads(out)
    dataset = TokenDataset.open(tmp_path / "d")
    dataset.verify()
    left_out = list(dataset.quarantined())
    assert {x["index"] for x in left_out} == {i for i, n in enumerate(order) if n >= len(good)}
    assert (len(dataset), report["left_out"], dataset.left_out) == (len(good), len(bad), len(bad))
    assert sum(report["reasons"].values()) == len(bad)

    mm = MultimodalTokenizer.load("any-to-any")
    kept = [every[n] for n in order if n < len(good)]
    for ids, line in zip(dataset, kept, strict=True):
        assert np.array_equal(ids, mm.encode(document_of(line, folder)))

    reasons = {x["id"]: x for x in left_out}
    for name in DAMAGED:
        entry = reasons[name]
        assert entry["segment"] == 1
        assert entry["reason"].startswith(f"bad/{name}: "), (
            entry
        )  # relative to the corpus, one line, with the file first
        assert "\n" not in entry["reason"]
    assert "no such file" in reasons["missing.png"]["reason"]
    assert "the limit" in reasons["bomb.png"]["reason"]
    assert "0x" in reasons["0x5.png"]["reason"] or "0 pixels" in reasons["0x5.png"]["reason"]
    assert "NaN" in reasons["nan.wav"]["reason"]
    assert "rename it" in reasons["picture.wav"]["reason"]
    assert "512x512" in reasons["large.png"]["reason"]
    assert str(tmp_path) not in json.dumps(left_out)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Also where the tests run as a user who may read everything."""
    manifest = write_corpus(tmp_path / "corpus", 5)
    no_permission(tmp_path / "corpus" / "locked.wav")
    with manifest.open("a") as file:
        file.write('{"id": "locked", "segments": [{"type": "audio", "path": "locked.wav"}]}\n')
    if os.access(tmp_path / "corpus" / "locked.wav", os.R_OK):
        opened = open

        def refuse(name: object, *how: object, **more: object) -> object:
            if str(name).endswith("locked.wav"):
                raise PermissionError(13, os.strerror(13), str(name))
            return opened(name, *how, **more)  # type: ignore[call-overload]

        monkeypatch.setattr("builtins.open", refuse)
    assert run("dataset", "build", manifest, "-o", tmp_path / "d", "--workers", 1, capsys=capsys)[0] == 2
    (entry,) = TokenDataset.open(tmp_path / "d").quarantined()
    assert entry["reason"].startswith("locked.wav: cannot be read (Permission denied)")


def test_the_good_ones_are_good(tmp_path: Path) -> None:
    """What the damage is done to can be read."""
    for name in ("a.png", "a.jpg", "a.gif", "a.webp", "a.bmp"):
        picture(tmp_path / name)
        assert media.read_image(tmp_path / name).shape == (3, 64, 64)
    for name in ("a.ogg", "a.flac", "a.wav", "a.mp3"):
        sound(tmp_path / name)
        assert media.read_audio(tmp_path / name, RATE).shape[1] >= 8000
    sound(tmp_path / "a.opus", format="OGG", subtype="OPUS")
    assert media.read_audio(tmp_path / "a.opus", RATE).shape[1] >= 8000

"""Damage that decoders pass over: cut, changed or missing parts of WAV, Ogg and MP3 files are found."""

from __future__ import annotations

import io
import os
import struct

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok import media, sounds
from mmtok.containers import find_fault, mp3_stream, ogg_checksum
from mmtok.errors import MediaError

RATE = 48000


def sound(seconds: float = 3.0, rate: int = RATE) -> np.ndarray:
    """A tone that swells, then noise: of variable bit rate."""
    n = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(0).normal(0, 0.2, len(n))
    return np.clip(0.3 * np.sin(2 * np.pi * 440 * n) + np.where(n > seconds / 2, noise, 0), -1, 1).astype(np.float32)


def encoded(kind: str, samples: np.ndarray, rate: int = RATE, **options: str) -> bytes:
    buffer = io.BytesIO()
    form, subtype = {"ogg": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS")}.get(kind, (kind.upper(), None))
    with soundfile.SoundFile(buffer, "w", rate, samples.ndim, subtype, format=form, **options) as file:
        for i in range(0, len(samples), rate):  # libsndfile's Vorbis encoder fails on much at once
            file.write(samples[i : i + rate])
    return buffer.getvalue()


OGG = encoded("ogg", sound())
OPUS = encoded("opus", sound())
MP3 = encoded("mp3", sound(), bitrate_mode="VARIABLE")


def pages(data: bytes) -> list[bytes]:
    out = []
    while data:
        count = data[26]
        length = 27 + count + sum(data[27 : 27 + count])
        out.append(data[:length])
        data = data[length:]
    return out


def plain_checksum(page: bytes) -> int:
    """RFC 3533, bit by bit."""
    value = 0
    for byte in page[:22] + bytes(4) + page[26:]:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value >> 31 else 0)) & 0xFFFFFFFF
    return value


@given(st.binary(min_size=27, max_size=300))
@settings(max_examples=50, derandomize=True, deadline=None)
def test_checksums_are_those_of_the_standard(page):
    assert ogg_checksum(page) == int(f"{plain_checksum(page):032b}"[::-1], 2)


def put(folder, name, data):
    path = folder / name
    path.write_bytes(data)
    os.utime(path, ns=(1, abs(hash(bytes(data))) % 10**15))  # files of one name and size in quick succession
    return path


def refused(folder, name, data, words):
    path = put(folder, name, data)
    with pytest.raises(MediaError) as caught:
        media.read_audio(path, None)
    assert str(caught.value).startswith(f"{path}: {words}"), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "data"), [("a.ogg", OGG), ("a.opus", OPUS)])
def test_every_flipped_bit_of_an_ogg_file_is_found(tmp_path, name, data):
    r = np.random.default_rng(0)
    assert find_fault(str(put(tmp_path, name, data)), RATE) is None
    for place in {*range(40), len(data) - 1, *r.integers(0, len(data), 150).tolist()}:
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(r.integers(8))
        path = put(tmp_path, name, damaged)
        with pytest.raises(MediaError, match=r"Ogg|not recognised|damaged or cut short"):
            media.read_audio(path, None)


def test_what_happens_to_ogg_files(tmp_path):
    every = pages(OGG)
    middle = sum(map(len, every[:4]))
    assert len(every) > 5
    refused(tmp_path, "a.ogg", OGG[:middle] + b"x" * 500 + OGG[middle:], f"damaged: no Ogg page at byte {middle}")
    refused(tmp_path, "a.ogg", OGG[:middle] + bytes(64) + OGG[middle + 64 :], f"damaged: no Ogg page at byte {middle}")
    refused(tmp_path, "a.ogg", b"".join(every[:4] + every[5:]), f"damaged: an Ogg page is missing before byte {middle}")
    refused(tmp_path, "a.ogg", b"".join(every[:-1]), "cut short: the last Ogg page is not the end of the stream")
    for length in (middle + 2, middle + 26, middle + 40, len(OGG) - 1):
        refused(tmp_path, "a.ogg", OGG[:length], "cut short: the last Ogg page is not complete")
    whole = media.read_audio(put(tmp_path, "a.ogg", OGG), None)
    for tail in (b"TAG" + bytes(125), bytes(1000)):
        assert np.array_equal(media.read_audio(put(tmp_path, "b.ogg", OGG + tail), None), whole)


def test_a_part_before_the_fault_is_sound(tmp_path):
    for name, data in (("a.ogg", OGG), ("a.opus", OPUS), ("a.mp3", MP3)):
        whole = media.read_audio(put(tmp_path, name, data), None)
        damaged = bytearray(data)
        damaged[len(data) * 3 // 4 : len(data) * 3 // 4 + 900] = bytes(900)
        path = put(tmp_path, name, damaged)
        fault = find_fault(str(path), RATE)
        assert fault is not None
        assert 0.5 < fault.seconds < 2.7
        part = media.read_audio(path, None, 0.1, 0.4)
        assert np.abs(part - whole[:, int(0.1 * RATE) : int(0.4 * RATE)]).max() < 1e-3
        for start, end in ((0.1, 2.9), (2.8, 2.9), (0.1, None)):
            with pytest.raises(MediaError, match=r"damaged|its length"):
                media.read_audio(path, None, start, end)
        cut = put(tmp_path, "cut" + path.suffix, data[: len(data) // 2])
        media.read_audio(cut, None, 0.1, 0.4)
        with pytest.raises(MediaError, match=r"cut short|its length"):
            media.read_audio(cut, None, 2.0, 2.8)


def frames(data: bytes) -> list[bytes]:
    """The frames of an MP3 file as libsndfile writes it: MPEG 1, 48 kHz."""
    kbps = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
    out = []
    while data:
        length = 3 * kbps[data[2] >> 4] + (data[2] >> 1 & 1)
        out.append(data[:length])
        data = data[length:]
    return out


def test_an_mp3_file_of_unknown_length_is_read_to_its_end(tmp_path):
    first, *rest = frames(MP3)
    assert len({len(x) for x in rest}) > 2
    assert b"Xing" in first
    whole = media.read_audio(put(tmp_path, "a.mp3", MP3), None)[0]
    assert mp3_stream(str(tmp_path / "a.mp3")) is None
    assert media.audio_length(tmp_path / "a.mp3") == (len(whole), RATE) == (3 * RATE, RATE)

    bare = put(tmp_path, "bare.mp3", b"".join(rest))
    assert soundfile.info(bare).frames < len(whole) * 0.9  # what is believed otherwise
    found = media.read_audio(bare, None)[0]
    assert len(found) == media.audio_length(bare)[0] == pytest.approx(len(rest) * 1152, abs=1152)
    delay = len(found) - len(whole)
    shift = min(range(0, delay + 1), key=lambda i: np.abs(found[i : i + 20000] - whole[:20000]).sum())
    assert np.abs(found[shift : shift + len(whole)] - whole).max() < 0.02
    assert np.abs(found[-2000:]).max() > 0.1
    assert media.read_audio(bare, None, 2.5, 2.9).shape == (1, round(0.4 * RATE))

    twice = media.read_audio(put(tmp_path, "twice.mp3", MP3 + MP3), None)[0]
    assert len(twice) > 2 * len(whole)
    vbri = bytearray(len(first))
    vbri[:4], vbri[36:40], vbri[50:54] = first[:4], b"VBRI", (len(rest)).to_bytes(4, "big")
    assert media.audio_length(put(tmp_path, "vbri.mp3", bytes(vbri) + b"".join(rest)))[0] > len(whole) * 0.99


@pytest.mark.parametrize("level", [0.0, 0.99])
def test_an_mp3_file_is_read_without_seams(tmp_path, monkeypatch, level):
    data = encoded("mp3", sound(6), bitrate_mode="CONSTANT", compression_level=level)
    path = put(tmp_path, "a.mp3", data)
    whole = soundfile.read(path, dtype="float32")[0]
    assert find_fault(str(path), RATE) is None
    monkeypatch.setattr(sounds, "_BLOCK", 10_000)
    assert np.array_equal(media.read_audio(path, None)[0], np.clip(whole, -1, 1))
    for start in (0.01, 0.5, 2.345, 5.0):
        part = media.read_audio(path, None, start, start + 0.5)[0]
        assert np.abs(part - np.clip(whole, -1, 1)[round(start * RATE) :][: len(part)]).max() < 1e-6


def test_tags_and_padding_are_no_damage(tmp_path):
    tag = b"ID3\4\0\0\0\0\1\0" + bytes(128)
    whole = media.read_audio(put(tmp_path, "a.mp3", MP3), None)
    for data in (
        tag + MP3,
        tag + tag + MP3,
        MP3 + b"TAG" + bytes(125),
        MP3 + bytes(3000),
        MP3 + b"APETAGEX" + b"\xff" * 99,
    ):
        assert np.array_equal(media.read_audio(put(tmp_path, "b.mp3", data), None), whole)
    rest = frames(MP3)[1:]
    noted = b"".join(rest[:50]) + tag + b"".join(rest[50:])
    assert find_fault(str(put(tmp_path, "c.mp3", noted)), RATE) is None


def test_what_happens_to_mp3_files(tmp_path):
    first, *rest = frames(MP3)
    bare = b"".join(rest)
    ends = len(b"".join(rest[:40]))
    for data in (MP3, bare):
        for keep in (0.3, 0.6, 0.9):
            refused(tmp_path, "a.mp3", data[: int(len(data) * keep)], "cut short: the last MP3 frame is not complete")
        refused(tmp_path, "a.mp3", data[: len(data) - 1], "cut short: the last MP3 frame is not complete")
        place = len(data) - len(bare) + ends
        refused(tmp_path, "a.mp3", data[:place] + bytes(700) + data[place:], f"damaged: no MP3 frame at byte {place}")
        for change in (data[: place + 9] + data[place + 60 :], data[: place + 9] + b"x" * 500 + data[place + 9 :]):
            refused(tmp_path, "a.mp3", change, "damaged: no MP3 frame at byte")
    words = f"cut short: {len(rest) - 9} MP3 frames, the header says {len(rest)}"
    refused(tmp_path, "a.mp3", b"".join([first, *rest[:-9]]), words)


@given(st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=40), st.integers(0, 400)), max_size=3), st.integers(0, 3))
@settings(max_examples=150, derandomize=True, deadline=None)
def test_no_file_is_a_crash(tmp_path_factory, changes, which):
    data = [OGG, OPUS, MP3, encoded("wav", sound(0.1))][which]
    for where, put_in, taken in changes:
        place = int(where**2 * len(data))
        data = data[:place] + put_in + data[place + taken :]
    path = put(tmp_path_factory.getbasetemp(), f"x.{('ogg', 'opus', 'mp3', 'wav')[which]}", data)
    find_fault(str(path), RATE)
    stream = mp3_stream(str(path))
    if stream is not None:
        with stream:
            assert stream.read()[:1] == b"\xff"


def test_wav_in_every_order_and_size(tmp_path):
    samples = sound(0.5)
    for form, name in (("WAV", "a.wav"), ("RF64", "b.wav")):
        path = tmp_path / name
        soundfile.write(path, samples, RATE, format=form, subtype="PCM_16")
        assert media.read_audio(path, None).shape == (1, len(samples))
        whole = path.read_bytes()
        refused(tmp_path, name, whole[:-1000], f"cut short: {2 * len(samples) - 1000} bytes of sound, the header says")
    soundfile.write(tmp_path / "c.wav", samples, RATE, format="WAV", subtype="PCM_16", endian="BIG")
    whole = (tmp_path / "c.wav").read_bytes()
    assert whole[:4] == b"RIFX"
    assert media.read_audio(tmp_path / "c.wav", None).shape == (1, len(samples))
    refused(tmp_path, "c.wav", whole[:-1000], "cut short: ")

    hours = struct.pack("<4sIQQQI", b"ds64", 28, 2**35, 10 * 3600 * RATE * 2, 10 * 3600 * RATE, 0)
    head = b"RF64\xff\xff\xff\xffWAVE" + hours + struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, RATE * 2, 2, 16)
    path = put(tmp_path, "hours.wav", head + b"data\xff\xff\xff\xff" + bytes(9600))
    with pytest.raises(MediaError, match=r"cut short: 9600 bytes of sound, the header says 3456000000|limit|damaged"):
        media.read_audio(path, None)
    fault = find_fault(str(path), RATE)
    assert fault is not None
    assert fault.reason == "cut short: 9600 bytes of sound, the header says 3456000000"


def test_no_beginning_of_a_file_is_a_crash(tmp_path):
    """Cut anywhere in its headers: a MediaError, or a sound; and MP3 files anywhere in their first frames."""
    for name, data in (("ogg", OGG), ("opus", OPUS), ("mp3", MP3), ("wav", encoded("wav", sound(0.1)))):
        for keep in [*range(1, 120), *range(120, 700, 9)]:
            path = put(tmp_path, f"x.{name}", data[:keep])
            try:
                media.audio_length(path)
                media.read_audio(path, None)
            except MediaError as error:
                assert str(error).startswith(str(path))  # noqa: PT017

"""Opus as a peer: its bits are those of the packets, and what comes back lies where the original is."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest

from mmtok import media
from mmtok.errors import ConfigError
from mmtok.evaluation import opus
from mmtok.evaluation.opus import Setting, Sweep
from mmtok.evaluation.recordings import Recordings
from mmtok.evaluation.sets import choose

SPEECH = Setting("voip", 20, "on", 32_000)


def chirp(length: int = 9_600, rate: int = 16_000) -> np.ndarray:
    """float32 [1, length]: a rising tone in the middle of silence."""
    t = np.arange(length) / rate
    seconds = length / rate
    return (0.5 * np.sin(2 * np.pi * (200 + 900 * t) * t) * np.exp(-((8 * (t / seconds - 0.5)) ** 2)))[None].astype(
        np.float32
    )


def packets_of_ogg(data: bytes) -> list[bytes]:
    """The packets of an Ogg stream but for its two headers (RFC 3533, RFC 7845)."""
    packets, rest, at = [], b"", 0
    while data[at : at + 4] == b"OggS":
        count = data[at + 26]
        sizes, at = data[at + 27 : at + 27 + count], at + 27 + count
        for size in sizes:
            rest += data[at : at + size]
            at += size
            if size < 255:
                packets.append(rest)
                rest = b""
    assert not rest
    return packets[2:]


def through_ogg(x: np.ndarray, rate: int, setting: Setting) -> bytes:
    """The same sound written by PyAV's own container."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="ogg") as container:
        options = {"application": setting.application, "frame_duration": str(setting.frame_ms), "vbr": setting.vbr}
        stream = container.add_stream("libopus", rate=rate, options=options, layout="mono", format="flt")
        stream.bit_rate = setting.asked
        for start in range(0, x.shape[1], rate * setting.frame_ms // 1000):
            part = np.ascontiguousarray(x[:, start : start + rate * setting.frame_ms // 1000])
            frame = av.AudioFrame.from_ndarray(part, format="flt", layout="mono")
            frame.sample_rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize("setting", [SPEECH, Setting("audio", 60, "on", 8_000), Setting("voip", 20, "off", 5_000)])
def test_bits_are_those_of_the_packets_in_a_file(setting: Setting) -> None:
    x = chirp(16_000)
    file = through_ogg(x, 16_000, setting)
    packets = packets_of_ogg(file)
    back, bits = opus.through(x, 16_000, setting)
    assert bits == 8 * sum(map(len, packets))
    assert bits < 8 * len(file)
    # All of the sound and the look-ahead of 6.5 ms, no more.
    assert len(packets) == -(-(16_000 + 104) // (16 * setting.frame_ms))
    assert back.shape == x.shape


@pytest.mark.parametrize("application", ["voip", "audio"])
@pytest.mark.parametrize(("frame_ms", "asked"), [(60, 8_000), (20, 32_000)])
@pytest.mark.parametrize("rate", [8_000, 16_000, 24_000, 44_100])
def test_nothing_is_delayed(application: str, frame_ms: int, asked: int, rate: int) -> None:
    x = chirp(rate * 6 // 10, rate)
    y, _ = opus.through(x, rate, Setting(application, frame_ms, "on", asked))
    near = np.correlate(y[0], x[0], "full")
    top = int(near.argmax())
    before, at, after = near[top - 1 : top + 2]
    lag = top - (x.shape[1] - 1) + (before - after) / (before - 2 * at + after) / 2  # a parabola through the highest
    assert abs(lag) / rate < 1e-4, "seconds; the look-ahead alone is 65 times as long"


@pytest.mark.parametrize("length", [1, 7, 319, 320, 321, 1_001])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_length(length: int, channels: int) -> None:
    x = np.random.default_rng(length).uniform(-1, 1, (channels, length)).astype(np.float32)
    for setting in (Setting("audio", 20, "off", 64_000), Setting("audio", 60, "on", 64_000)):
        y, bits = opus.through(x, 16_000, setting)
        assert (y.shape, y.dtype) == (x.shape, np.float32)
        assert np.abs(y).max() <= 1
        frames = -(-(length + 104) // (16 * setting.frame_ms))
        assert 0 < bits <= 8 * 1275 * 3 * frames


def test_a_constant_rate_is_that_which_was_asked() -> None:
    x = chirp(16_000)
    for asked in (2_000, 4_000, 12_000):
        _, bits = opus.through(x, 16_000, Setting("voip", 20, "off", asked))
        assert bits == pytest.approx(asked * 51 * 0.02, rel=0.1)


def test_settings_reach_twice_the_dearest_tokenizer() -> None:
    assert {s.application for s in opus.settings(4_000)} == {"voip", "audio"}
    assert max(s.asked for s in opus.settings(4_000)) == 16_000
    assert max(s.asked for s in opus.settings(24_000)) == 48_000
    assert max(s.asked for s in opus.settings(1e9)) == 96_000
    assert min(s.asked for s in opus.settings(4_000)) == 1_000


def test_a_curve_over_a_set_and_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for name, seconds in (("a", 1.0), ("b", 0.5), ("c", 0.7)):
        tone = chirp(round(16_000 * seconds)) + rng.normal(0, 0.01, (1, round(16_000 * seconds)))
        media.write_audio(tmp_path / f"{name}.wav", tone.astype(np.float32), 16_000)
    tried = [Setting("voip", 20, "off", 5_000), Setting("audio", 60, "on", 12_000)]
    monkeypatch.setattr(opus, "settings", lambda highest: tried)
    recordings = Recordings(choose(tmp_path, "audio")[0], 16_000)
    sweep = Sweep(recordings, 4_000)
    curve = sweep.curve()
    assert [{k: p[k] for k in Setting._fields} for p in curve] == [s._asdict() for s in tried]
    bits = [sum(opus.through(x, 16_000, s)[1] for x in recordings) for s in tried]
    assert [p["kilobits_per_second"] for p in curve] == pytest.approx([b / 2200 for b in bits], abs=1e-4)
    assert curve[1]["stoi"] > curve[0]["stoi"]
    assert curve[1]["log_mel_distance_db"] < curve[0]["log_mel_distance_db"]
    (part, _) = sweep.curve([1])
    assert part["kilobits_per_second"] == pytest.approx(
        opus.through(recordings[1], 16_000, tried[0])[1] / 500, abs=1e-4
    )
    assert part["sounds_with_stoi"] == 1


def test_without_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    assert opus.available()
    monkeypatch.setattr(opus, "find_spec", lambda name: None)
    assert not opus.available()
    with pytest.raises(ConfigError, match=r"PyAV with libopus.*pip install 'mmtok\[evaluation\]'"):
        opus.check_available()

"""Opus on the same sounds: what it reaches at the bits of a tokenizer (RFC 6716, libopus through PyAV).

The bits are those of the packets alone, whatever file or network they travel in: no Ogg pages, no headers. All packets
count that a decoder needs for the sound's own length, the first of which also carry the encoder's look-ahead of 6.5 ms.
Every bit rate is tried for speech (``voip``) and for any sound (``audio``), and the best of all settings stands for
Opus, figure by figure. Complexity is 10, the highest.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from mmtok import media
from mmtok.errors import ConfigError
from mmtok.evaluation.fidelity import Fidelity, compare, summarize
from mmtok.evaluation.recordings import Recordings
from mmtok.evaluation.sets import progress

RATE = 48_000  # Hz at which Opus decodes, and encodes what is at none of its own rates
OWN_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)  # Hz


class Setting(NamedTuple):
    """How libopus encodes.

    Attributes:
        application: ``voip`` or ``audio``.
        frame_ms: milliseconds a packet.
        vbr: ``on`` or ``off``.
        asked: bits a second; what the encoder makes of them is measured.
    """

    application: str
    frame_ms: int
    vbr: str
    asked: int


# Long frames at a variable rate are best from 5.4 kb/s on; from 4 kb/s down, where they end, a constant rate in short
# frames is. Between the two, which is better depends on the figure, and so it does from 12 kb/s on, where Opus codes
# the high bands apart. Frames of 40 and 120 ms and constrained VBR were never better (8 and 16 recordings of speech).
_FRAMES = {
    (20, "off"): (1_000, 2_000, 3_000, 4_000, 5_000),
    (60, "on"): (4_000, 5_000, 6_000, 7_000, 8_000, 10_000, 12_000, 16_000, 24_000),
    (20, "on"): (12_000, 16_000, 24_000, 32_000, 48_000, 64_000, 96_000),
}
_ALWAYS = 16_000  # bits a second up to which every sweep goes


def available() -> bool:
    """Whether PyAV is installed and carries libopus."""
    if find_spec("av") is None:
        return False
    import av

    return "libopus" in av.codecs_available


def check_available() -> None:
    """Raise ConfigError unless Opus can be measured here."""
    if not available():
        raise ConfigError(
            "Opus needs PyAV with libopus, which its wheels carry: pip install 'mmtok[evaluation]', or --peers none"
        )


def settings(highest: float) -> list[Setting]:
    """Those to try beside tokenizers of at most ``highest`` bits a second: up to twice as many, and all low ones."""
    every = sorted(rate for rates in _FRAMES.values() for rate in rates)
    most = max(_ALWAYS, next((rate for rate in every if rate >= 2 * highest), every[-1]))
    return [
        Setting(application, *frames, rate)
        for frames, rates in _FRAMES.items()
        for application in ("voip", "audio")
        for rate in rates
        if rate <= most
    ]


def encode(samples: np.ndarray, sample_rate: int, setting: Setting) -> tuple[list[bytes], bytes]:
    """Packets of a sound, and the header that a decoder needs.

    Args:
        samples: float32 [C, T], C 1 or 2, T at least 1.
        sample_rate: Hz, one of ``OWN_RATES``.
        setting: how.
    """
    import av

    context = av.CodecContext.create("libopus", "w")
    context.sample_rate, context.bit_rate = sample_rate, setting.asked
    context.format, context.layout = "flt", ("mono", "stereo")[len(samples) - 1]
    context.options = {
        "application": setting.application, "frame_duration": str(setting.frame_ms), "vbr": setting.vbr,
        "compression_level": "10",
    }  # fmt: skip
    context.open()
    packets = []
    interleaved = np.ascontiguousarray(samples.T)
    for start in range(0, len(interleaved), context.frame_size):
        part = interleaved[start : start + context.frame_size].reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(part, format="flt", layout=context.layout.name)
        frame.sample_rate, frame.pts = sample_rate, start
        packets += context.encode(frame)
    packets += context.encode(None)
    return [bytes(p) for p in packets], bytes(context.extradata or b"")


def decode(packets: Sequence[bytes], header: bytes, channels: int) -> np.ndarray:
    """float32 [channels, T] at 48 kHz of packets; what precedes the sound is cut as the header says."""
    import av

    context = av.CodecContext.create("libopus", "r")
    context.extradata, context.sample_rate, context.layout = header, RATE, ("mono", "stereo")[channels - 1]
    frames = [f for p in (*map(av.Packet, packets), None) for f in context.decode(p)]
    flat = np.concatenate([f.to_ndarray().reshape(-1, channels) for f in frames])
    return np.ascontiguousarray(flat.T).astype(np.float32) / 32768


def through(samples: np.ndarray, sample_rate: int, setting: Setting) -> tuple[np.ndarray, int]:
    """A sound through Opus: float32 [C, T] of the same shape and rate, and the bits of the packets.

    Args:
        samples: float32 [C, T], C 1 or 2, T at least 1.
        sample_rate: Hz, any.
        setting: how.
    """
    rate = sample_rate if sample_rate in OWN_RATES else RATE
    packets, header = encode(media.resample(samples, sample_rate, rate), rate, setting)
    back = media.resample(decode(packets, header, len(samples)), RATE, sample_rate)[:, : samples.shape[1]]
    back = np.pad(back, ((0, 0), (0, samples.shape[1] - back.shape[1])))
    return np.clip(back, -1, 1), 8 * sum(map(len, packets))


class Sweep:
    """Opus on a set, at every setting.

    Args:
        recordings: the set.
        highest: bits a second of the dearest tokenizer.
    """

    def __init__(self, recordings: Recordings, highest: float) -> None:
        self._recordings = recordings
        self._settings = settings(highest)
        self._bits: list[list[int]] = []
        self._scores: list[list[Fidelity]] = []
        for x in progress(recordings, "Opus"):
            made = [through(x, recordings.sample_rate, setting) for setting in self._settings]
            self._bits.append([bits for _, bits in made])
            self._scores.append([compare(x, y, recordings.sample_rate) for y, _ in made])

    def curve(self, indices: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """A point for each setting, over some of the sounds or all: the setting, ``kilobits_per_second``, figures."""
        chosen = range(len(self._recordings)) if indices is None else indices
        seconds = self._recordings.seconds(chosen)
        return [
            {
                **setting._asdict(),
                "kilobits_per_second": round(sum(self._bits[i][n] for i in chosen) / seconds / 1000, 4),
                **summarize([self._scores[i][n] for i in chosen]),
            }
            for n, setting in enumerate(self._settings)
        ]

"""Safe reading and writing of sound files, at any rate, whole or block by block.

Every fault of a file is one :class:`MediaError` line that starts with its path; its second is told where there is one.
Lengths are judged from headers, before anything large is allocated. WAV, FLAC, Ogg Vorbis, Opus, MP3.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator

import numpy as np
import soundfile

from mmtok.checkpoints import atomic_write
from mmtok.containers import find_fault, mp3_stream
from mmtok.errors import MediaError
from mmtok.resampling import Resampler, check_rate, resample
from mmtok.sniffing import NOUN, PathLike, kind_and_size, one_line

MAX_SECONDS = 1800.0
MAX_CHANNELS = 64

# Amplitude above which a float file is taken to be badly scaled. Lossy codecs overshoot 1.0 by far less.
_PEAK_LIMIT = 8.0
# Manifests give times rounded to milliseconds: an end this much past the last sample is the end.
_END_TOLERANCE_S = 0.01
_BLOCK = 1 << 18  # frames that are read at once
# A frame of an MP3 needs bytes of frames before it: after a seek libsndfile gives up to a tenth of a second of zeros.
_MP3_LEAD = 32 * 1152


def read_audio(
    path: PathLike,
    sample_rate: int | None,
    start: float | None = None,
    end: float | None = None,
    mono: bool = True,
    max_seconds: float = MAX_SECONDS,
) -> np.ndarray:
    """Read audio, or the part of it from ``start`` to ``end``, at a given sample rate.

    Args:
        path: a WAV, FLAC, Ogg Vorbis, Opus or MP3 file.
        sample_rate: of the result, in Hz; None keeps the file's own (see :func:`audio_rate`).
        start, end: seconds; None means the beginning and the end of the file.
        mono: average the channels into one.
        max_seconds: a longer selection is an error.

    Returns:
        float32 [C, T], clipped to -1..1, T = ceil(frames * sample_rate / file rate).

    Raises:
        MediaError: not readable, cut short, no samples, NaN, badly scaled, too long, or start/end out of range.
    """
    if sample_rate is not None:
        check_rate("sample_rate", sample_rate)
    rates, blocks = zip(*_audio_blocks(path, start, end, mono, max_seconds), strict=True)
    return np.clip(resample(np.concatenate(blocks, 1), rates[0], sample_rate or rates[0]), -1.0, 1.0)


def audio_blocks(
    path: PathLike,
    sample_rate: int | None,
    start: float | None = None,
    end: float | None = None,
    mono: bool = True,
) -> Iterator[np.ndarray]:
    """As ``read_audio``, block by block, for sounds of any length at constant memory: float32 [C, n], any n.

    A fault is raised when its block is reached; what came before is sound.
    """
    if sample_rate is not None:
        check_rate("sample_rate", sample_rate)
    resampler: Resampler | None = None
    for rate, block in _audio_blocks(path, start, end, mono, float("inf")):
        resampler = resampler or Resampler(rate, sample_rate or rate)
        yield np.clip(resampler.push(block), -1.0, 1.0)
    if resampler is not None:
        yield np.clip(resampler.finish(), -1.0, 1.0)


def audio_rate(path: PathLike) -> int:
    """The sample rate in Hz that an audio file states."""
    return audio_length(path)[1]


def audio_length(path: PathLike) -> tuple[int, int]:
    """The frames of an audio file and its sample rate in Hz, without decoding it; of an MP3 its frames are counted.

    Raises:
        MediaError: no audio file.
    """
    if kind_and_size(path)[0] != "audio":
        raise MediaError(f"{path}: expected audio (wav, flac, ogg, opus, mp3)")
    try:
        with _open_sound(path) as file:
            frames, rate = file.frames, file.samplerate
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        raise MediaError(f"{path}: damaged or cut short audio ({one_line(error)})") from error
    check_rate(f"{path}: sample rate", rate)
    return frames, rate


def write_audio(path: PathLike, samples: np.ndarray, sample_rate: int) -> None:
    """Write float32 [C, T], clipped to -1..1, as a 16-bit PCM WAV, atomically.

    The scale is 32768, as for reading, so that a 16-bit file that is read and written again is unchanged.

    Raises:
        MediaError: another shape or dtype, NaN, or an impossible sample rate.
    """
    check_samples(samples)
    check_rate("sample_rate", sample_rate)
    integers = np.clip(np.rint(samples.T * 32768.0), -32768, 32767).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, integers, sample_rate, format="WAV", subtype="PCM_16")
    atomic_write(os.fspath(path), buffer.getvalue())


def check_samples(samples: np.ndarray) -> None:
    """Raise :class:`MediaError` unless ``samples`` is a finite float32 array [C, T] with 1 <= C <= ``MAX_CHANNELS``."""
    if not isinstance(samples, np.ndarray):
        raise MediaError(f"got samples of type {type(samples).__name__}, expected a numpy array float32 [C, T]")
    if samples.dtype != np.float32 or samples.ndim != 2 or not 1 <= samples.shape[0] <= MAX_CHANNELS:
        raise MediaError(f"got samples {samples.dtype} {list(samples.shape)}, expected float32 [C, T] with C >= 1")
    if not np.isfinite(samples).all():
        raise MediaError("samples hold NaN or infinite values, expected -1..1")


class _Sound(soundfile.SoundFile):
    """A sound file that is read on from where it is.

    soundfile seeks to where it is after each read, where a file can be sought in. A decoder of MP3 begins anew by that:
    the first tenth of a second of each block would be zeros.
    """

    def seekable(self) -> bool:
        return False


@contextlib.contextmanager
def _open_sound(path: PathLike) -> Iterator[soundfile.SoundFile]:
    """A sound file whose ``frames`` are true."""
    with contextlib.ExitStack() as stack:
        name = os.fspath(path)
        stream = mp3_stream(name)
        source = name if stream is None else stack.enter_context(stream)
        yield stack.enter_context(_Sound(source))


def frame_range(
    path: PathLike, frames: int, rate: int, start: float | None, end: float | None, max_seconds: float
) -> tuple[int, int]:
    """First and last + 1 of the frames that lie between two times in seconds, of a file that has so many.

    Raises:
        MediaError: there are none, or the times are not within the file or too far apart.
    """
    if frames < 1:
        raise MediaError(f"{path}: holds no samples")
    duration = frames / rate
    begin, finish = 0.0 if start is None else start, duration if end is None else end
    if not (0 <= begin < finish <= duration + _END_TOLERANCE_S):
        raise MediaError(
            f"{path}: start {begin:g} s and end {finish:g} s, expected 0 <= start < end <= {duration:g} s (its length)"
        )
    if finish - begin > max_seconds:
        raise MediaError(
            f"{path}: {finish - begin:.1f} s of audio, the limit is {max_seconds:g} s; select a part with start and end"
        )
    first = round(begin * rate)
    last = frames if end is None else min(frames, round(finish * rate))
    if first >= last:
        raise MediaError(f"{path}: no sample lies between {begin:g} s and {finish:g} s at {rate} Hz")
    return first, last


def _audio_blocks(
    path: PathLike, start: float | None, end: float | None, mono: bool, max_seconds: float
) -> Iterator[tuple[int, np.ndarray]]:
    """The rate in Hz and float32 [C, n], one block or more, so that many channels never lie in memory at once."""
    kind, _ = kind_and_size(path)
    if kind != "audio":
        raise MediaError(f"{path}: holds {NOUN[kind]}, expected audio (wav, flac, ogg, opus, mp3)")
    rate = at = 0
    try:
        with _open_sound(path) as file:
            rate, channels, frames = file.samplerate, file.channels, file.frames
            check_rate(f"{path}: sample rate", rate)
            if channels > MAX_CHANNELS:
                raise MediaError(f"{path}: {channels} channels, the limit is {MAX_CHANNELS}")
            at, last = frame_range(path, frames, rate, start, end, max_seconds)
            fault = find_fault(os.fspath(path), rate)
            if fault and (end is None or end > fault.seconds):
                raise MediaError(f"{path}: {fault.reason}")
            first = at
            if first:
                lead = min(first, _MP3_LEAD) if file.format == "MP3" else 0
                if first > lead:
                    file.seek(first - lead)
                file.read(lead, dtype="float32")
            while at < last:
                try:
                    block = file.read(min(last - at, _BLOCK), dtype="float32", always_2d=True)
                except soundfile.SoundFileError:
                    at = max(at, file.tell())  # how far it came in the block
                    raise
                # An MP3 may be shorter by what its decoder holds back.
                if not len(block) and (file.format != "MP3" or at == first):
                    ends = f"it ends at {at / rate:.3f} s, expected {last / rate:.3f} s"
                    raise MediaError(f"{path}: damaged or cut short audio: {ends}")
                if not len(block):
                    return
                _check_block(path, block, at, rate)
                at += len(block)
                yield rate, _mixed(block) if mono else np.ascontiguousarray(block.T)
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        where = f" at {at / rate:.3f} s" if rate else ""
        raise MediaError(f"{path}: damaged or cut short audio{where} ({one_line(error)})") from error


def _check_block(path: PathLike, block: np.ndarray, at: int, rate: int) -> None:
    """Raise MediaError, with the second, if a block [n, C] that begins at frame ``at`` holds what no sound does."""
    low, high = block.min(), block.max()  # of the whole block: quick, and NaN where there is one
    if low >= -_PEAK_LIMIT and high <= _PEAK_LIMIT:
        return
    peak = np.abs(block).max(axis=1)
    bad = np.flatnonzero(~np.isfinite(peak))
    if len(bad):
        raise MediaError(
            f"{path}: holds NaN or infinite samples from {(at + int(bad[0])) / rate:.3f} s on, expected -1..1"
        )
    if peak.max() > _PEAK_LIMIT:
        where = (at + int(peak.argmax())) / rate
        raise MediaError(f"{path}: samples reach {peak.max():.4g} at {where:.3f} s, expected -1..1; scale the file")


def _mixed(block: np.ndarray) -> np.ndarray:
    """float32 [n, C] -> the mean of the channels, [1, n]; column by column, which numpy's mean of short rows is not."""
    channels = block.shape[1]
    if channels == 1:
        return np.ascontiguousarray(block.T)
    if channels == 2:
        return ((block[:, 0] + block[:, 1]) / np.float32(2))[None]
    return np.ascontiguousarray(block.mean(axis=1, keepdims=True, dtype=np.float32).T)

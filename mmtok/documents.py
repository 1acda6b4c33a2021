"""Documents: text, images, audio and turns in order, as plain Python and numpy values; files in, files out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmtok import media
from mmtok.checkpoints import atomic_write
from mmtok.errors import MediaError

ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Text:
    """A piece of text: any sequence of Unicode scalar values, the empty one included.

    Raises:
        MediaError: not a str, or a lone surrogate (which no UTF-8 can hold).
    """

    text: str

    def __post_init__(self) -> None:
        check_text(self.text)


@dataclass(frozen=True, eq=False)
class Image:
    """An image: uint8 [3, H, W], RGB, 0..255, H and W at least 1.

    Raises:
        MediaError: another type, dtype or shape.
    """

    pixels: np.ndarray

    def __post_init__(self) -> None:
        media.check_pixels(self.pixels)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and np.array_equal(self.pixels, other.pixels)

    def __hash__(self) -> int:
        return hash((self.pixels.shape, self.pixels.tobytes()))

    def __repr__(self) -> str:
        return f"Image({self.pixels.shape[2]}x{self.pixels.shape[1]})"


@dataclass(frozen=True, eq=False)
class Audio:
    """A sound: float32 [C, T], -1..1, finite; T may be 0; ``sample_rate`` in Hz.

    Raises:
        MediaError: another type, dtype or shape, NaN, a sample out of range, or an impossible rate.
    """

    samples: np.ndarray
    sample_rate: int

    def __post_init__(self) -> None:
        media.check_samples(self.samples)
        media.check_rate("sample_rate", self.sample_rate)
        peak = float(np.abs(self.samples).max(initial=0.0))
        if peak > 1.0:
            raise MediaError(f"samples reach {peak:.4g}, expected -1..1; clip or scale them")

    @property
    def seconds(self) -> float:
        """The duration in seconds."""
        return self.samples.shape[1] / self.sample_rate

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Audio):
            return False
        return self.sample_rate == other.sample_rate and np.array_equal(self.samples, other.samples)

    def __hash__(self) -> int:
        # Adding 0 makes -0.0 and 0.0, which are equal, hash alike.
        return hash((self.sample_rate, self.samples.shape, (self.samples + 0.0).tobytes()))

    def __repr__(self) -> str:
        return f"Audio({self.samples.shape[0]} x {self.seconds:.3f} s, {self.sample_rate} Hz)"


@dataclass(frozen=True)
class Turn:
    """From here on the user or the assistant speaks.

    Raises:
        MediaError: a role other than "user" and "assistant".
    """

    role: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise MediaError(f"got role {self.role!r}, expected 'user' or 'assistant'")


Segment = Text | Image | Audio | Turn


@dataclass(frozen=True)
class Document:
    """Segments in order. A list is taken too and kept as a tuple.

    Raises:
        MediaError: something that is not a segment, with its position.
    """

    segments: tuple[Segment, ...] = ()

    def __post_init__(self) -> None:
        segments = self.segments
        if not isinstance(segments, Sequence) or isinstance(segments, str | bytes):
            raise MediaError(f"got {type(segments).__name__}, expected a tuple of Text, Image, Audio and Turn")
        for position, segment in enumerate(segments):
            if not isinstance(segment, Segment):
                kind = type(segment).__name__
                raise MediaError(f"segment {position} is a {kind}, expected Text, Image, Audio or Turn")
        object.__setattr__(self, "segments", tuple(segments))

    def normalized(self) -> Document:
        """Adjacent texts merged, empty texts dropped: the form in which a round trip through ids is the identity.

        Text on two sides of a :class:`Turn` stays apart.
        """
        merged: list[Segment] = []
        for segment in self.segments:
            if isinstance(segment, Text):
                if not segment.text:
                    continue
                if merged and isinstance(merged[-1], Text):
                    segment = Text(merged.pop().text + segment.text)  # type: ignore[union-attr]
            merged.append(segment)
        return dataclasses.replace(self, segments=tuple(merged))


def check_text(text: str) -> None:
    """Raise :class:`MediaError` unless ``text`` is a str of Unicode scalar values, which is what UTF-8 can hold."""
    if not isinstance(text, str):
        raise MediaError(f"got text of type {type(text).__name__}, expected str")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MediaError(
            f"character {error.start} of the text is the lone surrogate U+{ord(text[error.start]):04X}, which is not "
            "Unicode text; decode the source as UTF-8 or replace it with U+FFFD"
        ) from error


def load_segment(
    path: media.PathLike,
    sample_rate: int | None = None,
    start: float | None = None,
    end: float | None = None,
    mono: bool = True,
) -> Text | Image | Audio:
    """Read a file as the segment that its content says it is.

    Args:
        path: UTF-8 text, an image or audio (:mod:`mmtok.media` lists the formats).
        sample_rate: of the audio in Hz; None keeps the file's own.
        start, end, mono: for audio, as in :func:`mmtok.media.read_audio`.

    Raises:
        MediaError: unreadable, or ``start`` or ``end`` for a file that is not audio.
    """
    kind = media.sniff(path)
    if kind == "audio":
        rate = media.audio_rate(path) if sample_rate is None else sample_rate
        return Audio(media.read_audio(path, rate, start, end, mono), rate)
    if start is not None or end is not None:
        raise MediaError(f"{path}: start and end are for audio, this file holds {kind}")
    if kind == "image":
        return Image(media.read_image(path))
    return Text(media.read_text(path))


def save_document(document: Document, directory: media.PathLike) -> list[Path]:
    """Write each segment to its own file, atomically: ``text_0.txt``, ``image_1.png``, ``audio_2.wav``.

    The number is the position in ``document.segments``; a :class:`Turn` takes a number but no file.

    Returns:
        The paths written, in order.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for position, segment in enumerate(document.segments):
        match segment:
            case Text(text):
                paths.append(folder / f"text_{position}.txt")
                atomic_write(paths[-1], text.encode("utf-8"))
            case Image(pixels):
                paths.append(folder / f"image_{position}.png")
                media.write_image(paths[-1], pixels)
            case Audio(samples, sample_rate):
                paths.append(folder / f"audio_{position}.wav")
                media.write_audio(paths[-1], samples, sample_rate)
    return paths

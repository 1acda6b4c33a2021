"""An answer shown as it comes: text is printed, pictures are written when they are whole, sounds grow on disk."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from mmtok import media
from mmtok.documents import Audio, Image, Text
from mmtok.transformer.streaming import Event


class Live:
    """Takes the events of one answer.

    Args:
        out: directory of the files, which have the names that the finished answer gives them.
        first: number of the answer's first segment in the document.
        quiet: print to stderr, as stdout is for something else.
    """

    def __init__(self, out: Path, first: int, quiet: bool) -> None:
        self._out, self._first = out, first
        self._to = sys.stderr if quiet else sys.stdout
        self._sound: list[np.ndarray] = []  # the pieces of the one that is open

    def take(self, event: Event) -> None:
        """Show a piece."""
        number = self._first + event.segment
        if isinstance(event.piece, Text):
            text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in event.piece.text)
            print(text, end="\n" if event.last else "", file=self._to, flush=True)
            return
        self._out.mkdir(parents=True, exist_ok=True)
        if isinstance(event.piece, Image):
            path = self._out / f"image_{number}.png"
            media.write_image(path, event.piece.pixels)
        else:
            path = self._out / f"audio_{number}.wav"
            self._write(path, event.piece)
        if event.last:
            self._sound = []
            print(path, file=self._to, flush=True)

    def _write(self, path: Path, piece: Audio) -> None:
        """The sound so far, anew: the file is whole at any time."""
        self._sound.append(piece.samples)
        media.write_audio(path, np.concatenate(self._sound, -1), piece.sample_rate)

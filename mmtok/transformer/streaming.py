"""Answers as they come: text by characters, sound in chunks, pictures when they are whole.

Event     -- a piece of an answer
Streamer  -- the ids of one answer in, events out
stream    -- one request -> its events, then the Generation
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from mmtok.documents import Audio, Image, Text
from mmtok.errors import ConfigError
from mmtok.layouts import CodebookMajor, Delayed
from mmtok.multimodal import MultimodalTokenizer
from mmtok.states import Bracketed
from mmtok.transformer.decoder import Decoder
from mmtok.transformer.generate import DEFAULT, Run
from mmtok.transformer.model import Transformer
from mmtok.transformer.requests import Generation, Request
from mmtok.transformer.sampling import Sampling

CHUNK = 0.2  # seconds of sound that a piece has at least, but for the last


@dataclass(frozen=True)
class Event:
    """A piece of a segment of an answer.

    Attributes:
        segment: number of the segment in the answer, from 0 up.
        piece: text that goes on from the pieces before it, samples that do, or a whole picture.
        last: the segment is complete; what completes a text or a sound may be empty.
    """

    segment: int
    piece: Text | Image | Audio
    last: bool


class Streamer:
    """Turns the ids of one answer, given one after another, into events.

    The pieces of a text, joined, are the text; those of a sound are the sound, but for rounding. A sound whose codec
    cannot decode a stream, or whose layout shows no frame before the end, comes as one piece.
    """

    def __init__(self, tokenizer: MultimodalTokenizer) -> None:
        self._tokenizer = tokenizer
        self._blocks = {b.start: b for b in tokenizer.registry.blocks if b.modality == "text"}
        self._openings = {b.opening: b for b in tokenizer.grammar.states.brackets.values()}
        self._segment = -1
        self._open: _Text | _Sound | _Whole | None = None

    def push(self, id: int) -> list[Event]:
        """What the next id completes; an <eos> completes a text."""
        events = []
        if isinstance(self._open, _Text) and id not in self._open.ids:
            events.append(Event(self._segment, Text(self._open.decoder.finish()), True))
            self._open = None
        if self._open is None:
            self._open = self._begin(id)
            self._segment += self._open is not None
        if self._open is not None and (piece := self._open.push(id)) is not None:
            last = id == self._open.closing
            events.append(Event(self._segment, piece, last))
            if last:
                self._open = None
        return events

    def _begin(self, id: int) -> _Text | _Sound | _Whole | None:
        """The segment that an id begins; None for a control token."""
        if id in self._openings:
            bracket = self._openings[id]
            try:
                return _Sound(self._tokenizer, bracket)
            except ConfigError:
                return _Whole(self._tokenizer, bracket)
        for block in self._blocks.values():
            if block.start <= id < block.end:
                return _Text(self._tokenizer, block.tokenizer, range(block.start, block.end))
        return None


class _Text:
    """A text that is open."""

    closing = None

    def __init__(self, tokenizer: MultimodalTokenizer, name: str, ids: range) -> None:
        self.ids = ids
        self.decoder = tokenizer.tokenizers[name].stream()

    def push(self, id: int) -> Text | None:
        text = self.decoder.push(id - self.ids.start)
        return Text(text) if text else None


class _Whole:
    """A picture, or a sound that comes as one piece."""

    def __init__(self, tokenizer: MultimodalTokenizer, bracket: Bracketed) -> None:
        self.tokenizer, self.closing = tokenizer, bracket.closing
        self.ids = [tokenizer.registry.bos]

    def push(self, id: int) -> Image | Audio | None:
        self.ids.append(id)
        if id != self.closing:
            return None
        (segment,) = self.tokenizer.decode([*self.ids, self.tokenizer.registry.eos]).segments
        assert isinstance(segment, Image | Audio)
        return segment


class _Sound:
    """A sound that comes in pieces; ConfigError for what else opens."""

    def __init__(self, tokenizer: MultimodalTokenizer, bracket: Bracketed) -> None:
        layout = bracket.layout
        blocks = tokenizer.registry.blocks_of(bracket.tokenizer)
        if layout is None or set(layout.rates) != {1} or (isinstance(layout, CodebookMajor) and len(blocks) > 1):
            raise ConfigError(f"{bracket.tokenizer} has no frames before its end")
        codec = tokenizer.tokenizers[bracket.tokenizer]
        self.decoder = codec.stream_decoder()
        self.rate = int(codec.sample_rate)
        self.least = max(1, round(CHUNK * codec.sample_rate / codec.hop))  # frames of a piece
        self.closing = bracket.closing
        self.starts = np.array([b.start for b in blocks])[:, None]
        self.delays = np.array(layout.delays if isinstance(layout, Delayed) else [0] * len(blocks))[:, None]
        self.stream: list[int] = []
        self.opened = False
        self.given = 0  # frames

    def push(self, id: int) -> Audio | None:
        if not self.opened:
            self.opened = True
            return None
        last = id == self.closing
        if not last:
            self.stream.append(id)
        levels = len(self.starts)
        whole = max(0, len(self.stream) // levels - int(self.delays.max()))
        if not last and whole - self.given < self.least:
            return None
        places = (np.arange(self.given, whole) + self.delays) * levels + np.arange(levels)[:, None]
        codes = np.array(self.stream, np.int64)[places] - self.starts
        parts = [self.decoder.push(torch.from_numpy(codes)[None])]
        if last:
            parts.append(self.decoder.finish())
        self.given = whole
        samples = torch.cat(parts, -1)[0].clamp(-1, 1).numpy()
        return Audio(samples, self.rate) if last or samples.shape[1] else None


def stream(
    model: Transformer | Decoder,
    tokenizer: MultimodalTokenizer,
    request: Request,
    sampling: Sampling | Mapping[str, Sampling] = DEFAULT,
    seed: int = 0,
) -> Iterator[Event | Generation]:
    """Answer one request and give the answer as it comes.

    Args:
        model, request, sampling, seed: as for ``generate``, whose answer this is.
        tokenizer: of the vocabulary that the transformer was trained with.

    Returns:
        The events, and at last the whole answer.

    Raises:
        As ``generate``, at once.
    """
    return _events(Run(model, tokenizer.grammar, [request], sampling, seed), Streamer(tokenizer))


def _events(run: Run, streamer: Streamer) -> Iterator[Event | Generation]:
    while run.going:
        for _, id in run.step():
            yield from streamer.push(id)
    yield from run.generations()

"""Reading of segments ahead of the tokenizers, in threads: ``Reader`` gives ``Loaded``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from mmtok import media
from mmtok.datasets.build.config import EncodeConfig, check_grid
from mmtok.datasets.build.drafts import Draft
from mmtok.datasets.sources.content import Content, local_copy
from mmtok.datasets.sources.probe import sound_samples
from mmtok.documents import Audio, Image, Text, check_text
from mmtok.errors import ConfigError, MediaError
from mmtok.multimodal import MultimodalTokenizer

STREAM_SECONDS = 30.0  # longer sounds go through the codec as a stream, where it has one


@dataclasses.dataclass
class Loaded:
    """A segment that was read, or why it was not."""

    segment: Text | Image | Audio | None = None
    turn: str = ""
    error: str = ""
    digest: str = ""
    blocks: Iterator[np.ndarray] | None = None
    stack: contextlib.ExitStack | None = None

    def close(self) -> None:
        """Remove the temporary file behind the blocks, if there is one."""
        if self.stack is not None:
            self.stack.close()


class Reader:
    """Reads segments as the tokenizers of a vocabulary take them.

    Args:
        tokenizer: the vocabulary and its tokenizers.
        config: how pictures are sized.
        names: modality -> name of the tokenizer, see ``chosen``.
        pool: the threads.
    """

    def __init__(
        self, tokenizer: MultimodalTokenizer, config: EncodeConfig, names: dict[str, str], pool: ThreadPoolExecutor
    ) -> None:
        self.mm, self.config, self.names, self.pool = tokenizer, config, names, pool
        self._grid = next((b.size for b in tokenizer.registry.blocks if b.modality == "grid"), 0)

    def ahead(self, draft: Draft, segment: dict[str, Any]) -> Future[Loaded] | Loaded:
        """A segment that is being read; turns and texts are there at once."""
        if is_media(segment):
            return self.pool.submit(self._read, draft, segment)
        if segment["type"] == "turn":
            return Loaded(turn=segment["role"])
        try:
            check_text(segment["text"])
        except MediaError as error:
            return Loaded(error=str(error))
        return Loaded(segment=Text(segment["text"]))

    def _read(self, draft: Draft, segment: dict[str, Any]) -> Loaded:
        """Read a picture or a sound. Runs in a thread."""
        if draft.left_out is not None:
            return Loaded(error="the document is left out")
        try:
            with contextlib.ExitStack() as stack:
                content = stack.enter_context(local_copy(segment))
                digest = content.sha256
                if segment["type"] == "image":
                    return Loaded(segment=self._picture(content), digest=digest)
                sound = self._sound(content, segment)
                if isinstance(sound, Audio):
                    return Loaded(segment=sound, digest=digest)
                return Loaded(blocks=sound, digest=digest, stack=stack.pop_all())
        except MediaError as error:
            return Loaded(error=str(error))

    def _picture(self, content: Content) -> Image:
        pixels = media.read_image(content.path)
        if self.config.image_size:
            return Image(media.fit_image(pixels, self.config.image_size))
        size = (pixels.shape[1], pixels.shape[2])
        fitted = self.config.fitted(size)
        check_grid(self.mm.tokenizers[self.names["image"]].properties, self._grid, content.label, *fitted)
        return Image(pixels if fitted == size else media.resize_image(pixels, *fitted))

    def _sound(self, content: Content, segment: dict[str, Any]) -> Audio | Iterator[np.ndarray]:
        """A sound, or of a long one its blocks, float32 [1, n] at the codec's rate."""
        model = self.mm.tokenizers[self.names["audio"]]
        rate = int(model.properties["sample_rate"])
        start, end = segment.get("start"), segment.get("end")
        if sound_samples(content.path, rate, start, end) > STREAM_SECONDS * rate and _can_stream(model):
            return media.audio_blocks(content.path, rate, start, end)
        return Audio(media.read_audio(content.path, rate, start, end), rate)


def is_media(segment: dict[str, Any]) -> bool:
    """Whether a segment's content lies in a file."""
    return segment["type"] in ("image", "audio")


def _can_stream(model: Any) -> bool:
    try:
        model.stream_encoder()
    except ConfigError:
        return False
    return True

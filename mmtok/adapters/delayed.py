"""MusicGen and Moshi: parallel streams [K, S], each stream delayed by its own number of steps.

A position in a SequenceError is the flat index ``step * K + stream``.

MusicGen, github.com/facebookresearch/audiocraft: ``audiocraft/modules/codebooks_patterns.py``
(``DelayedPatternProvider``), ``config/model/lm/musicgen_lm.yaml``. The special token is the number of codes
(``audiocraft/models/lm.py``); it fills the first step and the gaps. S = 1 + T + the largest delay: all steps of the
pattern, where training cuts the last ones off (``keep_only_valid_steps``).

Moshi, github.com/kyutai-labs/moshi: ``moshi/moshi/models/loaders.py`` and ``configs/`` (sizes, delays),
``moshi/moshi/models/lm.py`` and ``lm_utils.py`` (initial tokens in the first step and in the gaps). Stream 0 is text,
then Moshi's speech, then the user's. Moshi's own delay rolls a sequence of T steps and so loses the last codes of the
delayed streams, unless the sequence was padded first. Here the streams are flushed: as many further steps as the
largest delay hold those codes, and initial tokens where a stream has ended already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmtok.adapters.base import Adapter, Segment
from mmtok.arrays import integers
from mmtok.blocks import TokenizerSpec
from mmtok.errors import LayoutError, SequenceError, VocabularyError
from mmtok.layouts import Delayed, Interleaved

_GAP = -1  # no code of any stream


class _Streams(Adapter):
    """What the two share: codes [K, T] to delayed streams [K, S] and back, at least one frame.

    Attributes:
        layout: the delays of the streams.
        sizes: int64 [K]: codes of each stream; the next number is what fills its first step and its gaps.
    """

    layout: Delayed
    sizes: np.ndarray

    def _codes(self, ids: Any) -> np.ndarray:
        array = integers(ids, "ids")
        k, delays = self.layout.codebooks, np.array(self.layout.delays)
        if array.ndim != 2 or array.shape[0] != k:
            raise LayoutError(f"ids have shape {list(array.shape)}, expected [{k}, steps]")
        steps = np.arange(array.shape[1])[:, None]
        frames = len(steps) - 1 - int(delays.max())
        values = array.T  # [steps, K]
        code, fill = (values >= 0) & (values < self.sizes), values == self.sizes
        gap = (steps <= delays) | ((frames > 0) & (steps > delays + frames))
        # Of streams that are cut before the largest delay it is not known where they end.
        wrong = np.where(gap, ~fill, ~code & ~((frames <= 0) & fill & (steps > delays + 1)))
        if wrong.any():
            step, q = (int(x) for x in np.argwhere(wrong)[0])
            got, size = int(values[step, q]), int(self.sizes[q])
            words = f"code {got}" if 0 <= got < size else f"fill {got}" if got == size else f"id {got}"
            expected = f"fill {size}" if gap[step, q] else f"code 0..{size - 1}"
            raise SequenceError(step * k + q, f"{words} of stream {q}", f"{expected} of stream {q} at step {step}")
        if frames <= 0:
            least = f"at least {2 + int(delays.max())} steps"
            raise SequenceError(array.size, "the end of the sequence", least)
        marked = np.where(fill, _GAP, values.astype(np.int64))[1:]
        return self.layout.unflatten(marked.reshape(-1))

    def _steps(self, codes: np.ndarray) -> np.ndarray:
        if codes.shape[1] < 1:
            raise VocabularyError(f"{self.name}: no frames, expected at least one")
        streams = Interleaved(self.layout.codebooks).unflatten(self.layout.flatten(codes))
        streams = np.pad(streams, ((0, 0), (1, 0)), constant_values=_GAP)
        return np.where(streams == _GAP, self.sizes[:, None], streams)


class MusicGen(_Streams):
    """MusicGen: the codes of one piece, one audio segment [K, T]; the text that describes it is not in the sequence.

    Args:
        delays: of each codebook; (0, 0, 1, 1, 2, 2, 3, 3) for the stereo models (``docs/MUSICGEN.md``).

    Raises:
        LayoutError: no delays, or not whole steps from 0 up.
    """

    name = "musicgen"
    source = "github.com/facebookresearch/audiocraft: audiocraft/modules/codebooks_patterns.py, audiocraft/models/lm.py"

    def __init__(self, delays: Sequence[int] = (0, 1, 2, 3)) -> None:
        self.layout = Delayed(tuple(delays), _GAP)
        self.sizes = np.full(self.layout.codebooks, 2048)
        properties = {"sample_rate": 32000, "hop": 640}
        sizes = tuple(self.sizes.tolist())
        self.specs = (TokenizerSpec("audio", "audio", sizes, "published:musicgen/encodec", properties=properties),)

    def segments(self, ids: Any) -> list[Segment]:
        """Integers [K, S] to one audio segment [K, S - 1 - largest delay]. Errors as ``Adapter.segments``."""
        return [Segment("audio", self._codes(ids))]

    def ids(self, segments: Sequence[Segment]) -> np.ndarray:
        """One audio segment [K, T] to int64 [K, 1 + T + largest delay]. Raises VocabularyError as ``Adapter.ids``."""
        checked = self._checked(segments)
        if len(checked) != 1:
            raise VocabularyError(f"{len(checked)} segments; {self.name} can only hold one of audio")
        return self._steps(checked[0].codes)


class Moshi(_Streams):
    """Moshi's dialogue: a text segment [T], Moshi's audio [K, T] and the user's audio [K, T], in this order.

    Args:
        codebooks: K, of each of the two speakers; 16 in ``configs/moshi_dev_2b.json``.
        delay: steps that all but the first codebook of a speaker are delayed by; 2 there.
        text_size: ids of the text model; 48000 there.

    Raises:
        VocabularyError, LayoutError: a number out of range.
    """

    name = "moshi"
    source = "github.com/kyutai-labs/moshi: moshi/moshi/models/loaders.py, moshi/moshi/models/lm.py, lm_utils.py"

    def __init__(self, codebooks: int = 8, delay: int = 1, text_size: int = 32000) -> None:
        properties = {"sample_rate": 24000, "hop": 1920}
        self.specs = (
            TokenizerSpec("text", "text", (text_size,), "published:moshi/text"),
            TokenizerSpec("audio", "audio", (2048,) * codebooks, "published:moshi/mimi", properties=properties),
        )
        speaker = (0, *[delay] * (codebooks - 1))
        self.layout = Delayed((0, *speaker, *speaker), _GAP)
        self.sizes = np.array([text_size, *[2048] * (2 * codebooks)])

    def segments(self, ids: Any) -> list[Segment]:
        """Integers [1 + 2K, S] to text, Moshi's audio and the user's audio. Errors as ``Adapter.segments``."""
        text, *audio = self._codes(ids)
        k = len(audio) // 2
        return [Segment("text", text), Segment("audio", np.array(audio[:k])), Segment("audio", np.array(audio[k:]))]

    def ids(self, segments: Sequence[Segment]) -> np.ndarray:
        """The three segments to int64 [1 + 2K, 1 + T + delay]. Raises VocabularyError as ``Adapter.ids``."""
        checked = self._checked(segments)
        kinds, lengths = [s.tokenizer for s in checked], {s.codes.shape[-1] for s in checked}
        if kinds != ["text", "audio", "audio"] or len(lengths) > 1:
            got = ", ".join(f"{s.tokenizer} {list(s.codes.shape)}" for s in checked) or "nothing"
            raise VocabularyError(
                f"got {got}; {self.name} can only hold text [T], audio [K, T] and audio [K, T] of one length"
            )
        return self._steps(np.vstack([np.atleast_2d(s.codes) for s in checked]))

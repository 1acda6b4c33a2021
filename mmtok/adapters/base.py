"""Adapters to the token layouts of published any-to-any systems: what they have in common.

- ``Segment``: a piece of text, an image or a sound as codes local to its tokenizer.
- ``Adapter``: their ids to segments and back, strictly; the segments fit a registry of ours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mmtok.arrays import first, integers
from mmtok.blocks import TokenizerSpec
from mmtok.errors import VocabularyError
from mmtok.registry import VocabularyRegistry

_FORMS = {"text": "[n]", "image": "[h, w] with sides from 1 up"}


@dataclass(frozen=True, eq=False)
class Segment:
    """Codes of one tokenizer. Segments are equal when their tokenizers and codes are.

    Args:
        tokenizer: name of a spec of the adapter.
        codes: integers, kept as an int64 copy, local to the tokenizer: text [n], image [h, w], audio [K, T].

    Raises:
        VocabularyError: the codes are not an array of integers.
    """

    tokenizer: str
    codes: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes", integers(self.codes, f"codes of {self.tokenizer}").astype(np.int64))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Segment):
            return NotImplemented
        return self.tokenizer == other.tokenizer and np.array_equal(self.codes, other.codes)


class Adapter(ABC):
    """The token layout of a published system.

    ``segments`` and ``ids`` are each other's inverse, once adjacent texts are merged and empty ones left out. Codes of
    a text are the system's own ids of the text model, its special ids (begin, end, roles) among them: nothing is lost.
    Only what holds images and sounds together (start and end, sizes, ends of rows, offsets, delays) is taken away and
    put back.

    Attributes:
        name: of the system, its key in ``ADAPTERS``.
        source: the public repository and the files that the facts come from.
        specs: one for each tokenizer that a sequence holds. The fingerprints are names, for the weights are not ours.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    specs: tuple[TokenizerSpec, ...]

    @abstractmethod
    def segments(self, ids: Any) -> list[Segment]:
        """A whole sequence of the system as segments, in order.

        Args:
            ids: integers, numpy, torch or lists; [n], but [K, S] where the system has parallel streams.

        Raises:
            SequenceError: the first id that cannot stand where it stands, or the end if the sequence is cut short.
            VocabularyError: not integers, or not one-dimensional.
            LayoutError: another number of streams.
        """

    @abstractmethod
    def ids(self, segments: Sequence[Segment]) -> np.ndarray:
        """The inverse of ``segments``.

        Returns:
            int64, [n] or [K, S].

        Raises:
            VocabularyError: an unknown tokenizer, a code out of range, or a shape that the layout cannot hold.
        """

    def registry(self, max_grid: int = 128) -> VocabularyRegistry:
        """A new vocabulary of ours for the same tokenizers: ``Grammar(...).segment_ids`` takes the segments into it.

        Args:
            max_grid: the largest image height or width, in codes.

        Raises:
            VocabularyError: as ``VocabularyRegistry.create``.
        """
        return VocabularyRegistry.create(self.specs, max_grid=max_grid)

    def _checked(self, segments: Sequence[Segment]) -> list[Segment]:
        """The segments, of known tokenizers, with shapes and codes that these have."""
        known = {spec.name: spec for spec in self.specs}
        for i, segment in enumerate(segments):
            if not isinstance(segment, Segment):
                raise VocabularyError(f"segment {i}: got {type(segment).__name__}, expected Segment")
            if segment.tokenizer not in known:
                raise VocabularyError(
                    f"segment {i}: {self.name} has no tokenizer {segment.tokenizer!r}; known: {', '.join(known)}"
                )
            spec, shape = known[segment.tokenizer], segment.codes.shape
            k = len(spec.codebook_sizes)
            fits = {
                "text": len(shape) == 1,
                "image": len(shape) == 2 and min(shape) >= 1,
                "audio": len(shape) == 2 and shape[0] == k,
            }
            if not fits[spec.modality]:
                form = _FORMS.get(spec.modality, f"[{k}, T]")
                raise VocabularyError(f"segment {i}: {spec.name} codes have shape {list(shape)}, expected {form}")
            limit = np.reshape(spec.codebook_sizes, (-1, 1) if spec.modality == "audio" else ())
            wrong = (segment.codes < 0) | (segment.codes >= limit)
            if wrong.any():
                where = first(wrong)
                size = np.broadcast_to(limit, shape)[where]
                raise VocabularyError(
                    f"segment {i}: {spec.name} code {segment.codes[where]} at {where}, expected 0..{size - 1}"
                )
        return list(segments)

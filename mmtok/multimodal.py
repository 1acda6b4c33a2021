"""MultimodalTokenizer: documents of text, images and audio <-> ids of one vocabulary.

It joins a registry (who owns which ids), the tokenizers that the registry names, and the grammar. Every tokenizer's
fingerprint is checked against the registry, so that ids never meet a codec that did not make them.

An image of any size is padded to whole codes. Ids say how many codes it has, not how many pixels: its size travels
beside the ids (``sizes``), and ``decode`` crops to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtok import media
from mmtok.documents import Audio, Document, Image, Text, Turn
from mmtok.errors import MediaError, VocabularyError, VocabularyMismatchError
from mmtok.grammar import Grammar, Span
from mmtok.image.tokenizer import match_channels
from mmtok.loading import find_tokenizer, load, read_vocabulary
from mmtok.recovery import Edit, Policy, Recovery, recover
from mmtok.registry import MODALITIES, TokenizerSpec, VocabularyRegistry

Segment = Text | Image | Audio | Turn
ImageSizes = Sequence[tuple[int, int] | None]


def spec_of(name: str, tokenizer: Any, levels: int | None = None, headroom: int = 0, layout: str = "") -> TokenizerSpec:
    """What a registry needs to know of a tokenizer.

    Args:
        name: under which it will be found again: the name of its checkpoint directory.
        tokenizer: any object with the tokenizer protocol.
        levels: of a residual image tokenizer or audio codec, use only the first so many codebooks.
        headroom: ids to reserve behind each of its blocks.
        layout: of the codebooks in a sequence, see :func:`mmtok.layouts.parse`; empty for the tokenizer's own, where
            it has one (SNAC, whose levels have rates of their own), else the default.

    Raises:
        VocabularyError: more levels than the tokenizer has.
    """
    sizes = tuple(tokenizer.codebook_sizes)
    if levels is not None and not 1 <= levels <= len(sizes):
        raise VocabularyError(f"{name}: got {levels} levels, expected 1 to {len(sizes)}")
    if not layout and hasattr(tokenizer, "layout_of"):
        layout = tokenizer.layout_of(levels or len(sizes))
    return TokenizerSpec(
        name, tokenizer.modality, sizes[:levels], tokenizer.fingerprint, headroom, dict(tokenizer.properties), layout
    )


class MultimodalTokenizer:
    """Encode documents to ids and decode ids to documents.

    Args:
        registry: the vocabulary.
        tokenizers: name -> tokenizer, one for each that the registry names.

    Raises:
        VocabularyMismatchError: a tokenizer is missing or has another fingerprint than the registry recorded.
    """

    def __init__(self, registry: VocabularyRegistry, tokenizers: Mapping[str, Any]) -> None:
        self.registry = registry
        self.grammar = Grammar(registry)
        self.tokenizers = dict(tokenizers)
        for spec in registry.tokenizers:
            if spec.name not in self.tokenizers:
                raise VocabularyMismatchError(
                    f"the vocabulary needs the tokenizer {spec.name!r} ({spec.modality}); "
                    f"got {', '.join(tokenizers) or 'none'}"
                )
            have = self.tokenizers[spec.name].fingerprint
            if have != spec.fingerprint:
                raise VocabularyMismatchError(
                    f"tokenizer {spec.name!r} has fingerprint {have[:12]}..., the vocabulary was made with "
                    f"{spec.fingerprint[:12]}...: its codes mean something else. Load the checkpoint that the "
                    "vocabulary was made with, or create a new vocabulary and train anew"
                )

    @classmethod
    def create(
        cls, tokenizers: Mapping[str, Any], *, audio_levels: int | None = None, max_grid: int = 64
    ) -> MultimodalTokenizer:
        """A new vocabulary over these tokenizers.

        Args:
            tokenizers: name -> tokenizer; the first of a modality is its default.
            audio_levels: use only the first so many levels of residual audio codecs; None for all.
            max_grid: largest image height or width, in codes.
        """
        specs = [spec_of(n, t, audio_levels if t.modality == "audio" else None) for n, t in tokenizers.items()]
        return cls(VocabularyRegistry.create(specs, max_grid=max_grid), tokenizers)

    @classmethod
    def load(cls, path: str | Path) -> MultimodalTokenizer:
        """The vocabulary of a checkpoint directory (its vocab.json) with the tokenizers that it names.

        A tokenizer is looked for in the directory, beside it, and among the bundled ones, by its name.

        Args:
            path: a directory with a vocab.json, that file itself, or the name of a bundled model.

        Raises:
            CheckpointError: no vocab.json, or a tokenizer cannot be found.
            VocabularyError: the vocab.json is damaged.
            VocabularyMismatchError: a tokenizer was found but is another one.
        """
        registry, directory = read_vocabulary(path)
        return cls(registry, {t.name: load(find_tokenizer(t.name, directory)) for t in registry.tokenizers})

    # --- encode

    def choose(self, modality: str, tokenizer: str | None = None) -> TokenizerSpec:
        """The tokenizer of this name, or the default one of a modality.

        Raises:
            VocabularyError: no such tokenizer, or one of another modality.
        """
        spec = self.registry.tokenizer(tokenizer or modality)
        if spec.modality != modality:
            own = ", ".join(t.name for t in self.registry.tokenizers if t.modality == modality)
            raise VocabularyError(
                f"tokenizer {spec.name!r} is for {spec.modality}, expected one for {modality}; the vocabulary has: "
                f"{own or 'none'}"
            )
        return spec

    def encode(self, document: Document, use: Mapping[str, str] | None = None) -> np.ndarray:
        """Ids of a whole document, int64 [n], from <bos> to <eos>.

        Args:
            document: what to encode.
            use: modality -> name of the tokenizer to use, where the vocabulary has several; else the default one.

        Audio is mixed to mono and resampled to its codec's rate; images are padded to whole codes, see ``sizes``.

        Raises:
            MediaError: text with a lone surrogate.
            VocabularyError: an image with more codes on a side than the vocabulary's grid; an unknown tokenizer.
        """
        r = self.registry
        return np.concatenate([np.array([r.bos]), *self._segments(document.segments, use or {}), np.array([r.eos])])

    def sizes(self, document: Document) -> list[tuple[int, int]]:
        """(H, W) in pixels of each image of a document, in order: what ``decode`` crops to."""
        shapes = [segment.pixels.shape for segment in document.segments if isinstance(segment, Image)]
        return [(height, width) for _, height, width in shapes]

    def prompt(self, segments: Sequence[Segment], use: Mapping[str, str] | None = None) -> np.ndarray:
        """A user turn and the start of the answer: ``<bos> <user> segments <assistant>``, int64 [n]; as ``encode``."""
        r = self.registry
        before, after = np.array([r.bos, r.user]), np.array([r.assistant])
        return np.concatenate([before, *self._segments(segments, use or {}), after])

    def codes(self, segment: Text | Image | Audio, tokenizer: str | None = None) -> Any:
        """Codes of one segment, int64, as ``Grammar.segment_ids`` takes them.

        They are text [n], image [h, w], of several levels [h, w, L], audio [K, F], or of a codec with several rates K
        arrays.

        Args:
            segment: what to encode.
            tokenizer: its name; None for the default of the modality.

        Raises:
            VocabularyError: no such tokenizer, or one of another modality.
        """
        return self.codes_of([segment], tokenizer)[0]

    def codes_of(self, segments: Sequence[Text | Image | Audio], tokenizer: str | None = None) -> list[Any]:
        """Codes of several segments of one modality, which the tokenizer gets together: each as ``codes`` gives it.

        Raises:
            VocabularyError: as ``codes``, or segments of several modalities.
        """
        modalities = {type(segment).__name__.lower() for segment in segments}
        if len(modalities) != 1:
            raise VocabularyError(
                f"got {', '.join(sorted(modalities)) or 'nothing'}, expected segments of one modality"
            )
        spec = self.choose(modalities.pop(), tokenizer)
        model = self.tokenizers[spec.name]
        levels = len(spec.codebook_sizes)  # the first levels of a residual quantizer do not depend on how many follow
        if spec.modality == "text":
            return list(model.encode([x.text for x in segments if isinstance(x, Text)]))
        if spec.modality == "image":
            found = model.encode([torch.from_numpy(x.pixels.copy()) for x in segments if isinstance(x, Image)])
            several = [codes.numpy() for codes in found]
            # of a residual quantizer
            return [c if c.ndim == 2 else c[..., 0] if levels == 1 else c[..., :levels] for c in several]
        return [self._sound_codes(x, model, levels, spec) for x in segments if isinstance(x, Audio)]

    def _sound_codes(self, sound: Audio, model: Any, levels: int, spec: TokenizerSpec) -> Any:
        samples = sound.samples
        mono = samples if len(samples) == 1 else samples.mean(0, keepdims=True)
        mono = media.resample(mono, sound.sample_rate, int(spec.properties["sample_rate"]))
        codes = model.encode(torch.from_numpy(np.array(mono, np.float32))[None], levels=levels)
        if isinstance(codes, Sequence):
            return tuple(level[0].numpy() for level in codes[:levels])
        return codes[0, :levels].numpy()

    def fit(self, segment: Segment, image_size: int | None = None, tokenizer: str | None = None) -> Segment:
        """An image fitted into a square of whole codes, on white; any other segment stays as it is.

        Args:
            segment: any.
            image_size: side of the square in pixels; None leaves the image as it is.
            tokenizer: name of the image tokenizer that will encode it; None for the default one.

        Raises:
            MediaError: an ``image_size`` that is no multiple of the tokenizer's downsample factor.
            VocabularyError: no image tokenizer of this name.
        """
        if not isinstance(segment, Image) or image_size is None:
            return segment
        factor = self.tokenizers[self.choose("image", tokenizer).name].properties["downsample"]
        if image_size < 1 or image_size % factor:
            raise MediaError(f"got an image size of {image_size} pixels, expected a multiple of {factor}")
        return Image(media.fit_image(segment.pixels, image_size))

    def _segments(self, segments: Sequence[Segment], use: Mapping[str, str]) -> list[np.ndarray]:
        unknown = sorted(set(use) - set(MODALITIES))
        if unknown:
            raise VocabularyError(f"got a tokenizer for {unknown[0]!r}, expected one for {', '.join(MODALITIES)}")
        parts = []
        for segment in segments:
            if isinstance(segment, Turn):
                parts.append(np.array([self.registry.control(f"<{segment.role}>")]))
            else:
                modality = type(segment).__name__.lower()
                name = use.get(modality, modality)
                parts.append(self.grammar.segment_ids(name, self.codes(segment, name)))
        return parts

    # --- decode

    def decode(self, ids: Any, sizes: ImageSizes | None = None) -> Document:
        """The document of a whole id sequence; strict: nothing is repaired or dropped.

        Text that is not UTF-8, which only sampled ids can give, has U+FFFD in the place of the bad bytes.

        Args:
            ids: integers [n].
            sizes: (H, W) in pixels of each image, in order, as ``sizes`` gives them; None, for one or for all, keeps
                the padding to whole codes.

        Raises:
            SequenceError: the ids break the grammar; position, got and expected are named.
            MediaError: another number of sizes than of images, or a size that an image's codes are not of.
        """
        ids = self.grammar.checked(ids)
        spans = self.grammar.spans(ids)
        images = [span for span in spans if span.kind == "image"]
        sizes = [None] * len(images) if sizes is None else sizes
        if len(sizes) != len(images):
            raise MediaError(f"got {len(sizes)} image sizes for {len(images)} images, expected one of each, or none")
        of = dict(zip(images, sizes, strict=True))
        return Document(tuple(x for span in spans if (x := self.decode_span(ids, span, of.get(span))) is not None))

    def recover(self, ids: Any, policy: Policy, sizes: ImageSizes | None = None) -> tuple[Document, Recovery]:
        """The document of ids that may break the grammar, and what was changed to read it.

        Args:
            ids: integers [n].
            policy: ``repair`` or ``drop``, see :mod:`mmtok.recovery`.
            sizes: as for ``decode``, one for each image opening in ``ids``. What is no size of the image that was
                recovered is not used, and the edits say so.

        Raises:
            ConfigError: another policy.
            VocabularyError: not a one-dimensional array of integers.
        """
        recovery = recover(self.grammar, ids, policy)
        if sizes is None:
            return self.decode(recovery.ids), recovery
        openings = [self.registry.opening(t.name) for t in self.registry.tokenizers if t.modality == "image"]
        before = np.flatnonzero(np.isin(self.grammar.checked(ids), openings))
        images = [span for span in self.grammar.spans(recovery.ids) if span.kind == "image"]
        used: list[tuple[int, int] | None] = []
        edits = list(recovery.edits)
        for span, position in zip(images, recovery.images, strict=True):
            why = f"{len(before)} images have {len(sizes)} sizes"
            size = None
            if len(before) == len(sizes):
                size = sizes[int(np.searchsorted(before, position))]
                fits = size is None or self.tokenizers[span.tokenizer].grid(size) == span.shape[:2]
                why = "" if fits else f"it has another grid than its size, {'x'.join(map(str, size or ()))} pixels"
            used.append(None if why else size)
            if why:
                what = f"an image of {span.shape[0]}x{span.shape[1]} codes keeps its padding, as {why}"
                edits.append(Edit("padded", position, span.end - span.start, what))
        edits.sort(key=lambda edit: edit.position)
        return self.decode(recovery.ids, used), dataclasses.replace(recovery, edits=tuple(edits))

    def decode_span(self, ids: Any, span: Span, size: tuple[int, int] | None = None) -> Segment | None:
        """The segment of one span; None for control tokens that are no turn.

        Args:
            ids: integers [n], those that the span was parsed from.
            span: of ``grammar.spans(ids)``.
            size: (H, W) in pixels of an image; None for the size of its codes.

        Raises:
            MediaError: a size that the codes are not of.
        """
        if span.kind == "control":
            return Turn(span.name.strip("<>")) if span.name in ("<user>", "<assistant>") else None
        codes = self.grammar.segment_codes(ids, span)
        tokenizer = self.tokenizers[span.tokenizer]
        if span.kind == "text":
            return Text(tokenizer.decode([codes])[0])
        if span.kind == "image":
            if codes.ndim == 2 and len(tokenizer.codebook_sizes) > 1:
                codes = codes[..., None]  # the first level of several
            try:
                return Image(match_channels(tokenizer.decode(torch.from_numpy(codes)[None], size), 3)[0].numpy())
            except MediaError as error:
                raise MediaError(f"image at {span.start}: {error}") from error
        if isinstance(codes, tuple):
            x = tokenizer.decode([torch.from_numpy(level)[None] for level in codes])[0].numpy()
        else:
            x = tokenizer.decode(torch.from_numpy(codes)[None])[0].numpy()
        return Audio(x, int(self.registry.tokenizer(span.tokenizer).properties["sample_rate"]))

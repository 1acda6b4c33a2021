"""Blocks of ids and the tokenizers behind them: the parts of a vocabulary registry, their layout and their checks."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmtok.errors import LayoutError, VocabularyError
from mmtok.layouts import Delayed, Layout, parse

CONTROL = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>")
MODALITIES = ("text", "image", "audio")
MAX_IDS = 2**24  # a damaged or hostile vocab.json must not make us allocate tables without end
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Block:
    """A contiguous range of ids.

    Attributes:
        name: unique: ``control``, ``text``, ``grid``, ``image``, of several codebooks ``image.0``..., ``audio.0``...;
            of further tokenizers ``image:NAME``.
        modality: ``control``, ``grid``, ``text``, ``image`` or ``audio``.
        start: the first id.
        size: ids in use.
        capacity: ids reserved, at least ``size``; ids ``start + size`` up to ``start + capacity`` are head-room.
        tokenizer: name of the tokenizer that owns the codes, empty for control and grid.
        codebook: level of a residual quantizer, else 0.
        fingerprint: of the tokenizer, empty for control and grid.
        names: of a control block, the literal name of each id.
    """

    name: str
    modality: str
    start: int
    size: int
    capacity: int
    tokenizer: str
    codebook: int
    fingerprint: str
    names: tuple[str, ...] = ()

    @property
    def end(self) -> int:
        """One past the last id in use."""
        return self.start + self.size


@dataclass(frozen=True)
class TokenizerSpec:
    """What a registry needs to know of a tokenizer.

    Args:
        name: letters, digits, ``.``, ``_`` and ``-``.
        modality: ``text``, ``image`` or ``audio``.
        codebook_sizes: codes in each codebook, one for text; of a residual quantizer one a level, coarse to fine.
        fingerprint: what the codes mean (sha256 over config and weights).
        headroom: ids to reserve behind each of its blocks.
        properties: JSON-able: image ``{"downsample": 8}``, audio ``{"sample_rate": 16000, "hop": 320}``, text ``{}``.
        layout: of an audio tokenizer's codebooks; empty means ``interleaved``, which is that of all images.

    Raises:
        VocabularyError: a value is of the wrong type or impossible.
    """

    name: str
    modality: str
    codebook_sizes: tuple[int, ...]
    fingerprint: str
    headroom: int = 0
    properties: dict[str, Any] = field(default_factory=dict)
    layout: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise VocabularyError(f"tokenizer name {self.name!r}: expected letters, digits, '.', '_' and '-'")
        if self.modality not in MODALITIES:
            raise VocabularyError(f"{self.name}: modality {self.modality!r}, expected one of {', '.join(MODALITIES)}")
        if self.name in MODALITIES and self.name != self.modality:
            raise VocabularyError(f"a tokenizer of modality {self.modality!r} must not be named {self.name!r}; rename")
        sizes = tuple(self.codebook_sizes)
        if not sizes or not all(is_int(s) and s >= 1 for s in sizes):
            raise VocabularyError(f"{self.name}: codebook_sizes {sizes!r}, expected one or more integers from 1 up")
        if self.modality == "text" and len(sizes) != 1:
            raise VocabularyError(f"{self.name}: {len(sizes)} codebooks, expected one for text")
        if not isinstance(self.fingerprint, str) or not self.fingerprint:
            raise VocabularyError(f"{self.name}: fingerprint {self.fingerprint!r}, expected a non-empty string")
        if not is_int(self.headroom) or self.headroom < 0:
            raise VocabularyError(f"{self.name}: headroom {self.headroom!r}, expected an integer from 0 up")
        try:
            properties = json.loads(json.dumps(self.properties, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise VocabularyError(f"{self.name}: properties are not JSON ({error})") from error
        if not isinstance(properties, dict):
            raise VocabularyError(f"{self.name}: properties {properties!r}, expected a dict")
        for key in ("sample_rate", "hop", "downsample"):
            value = properties.get(key, 1)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_IDS:
                raise VocabularyError(f"{self.name}: properties[{key!r}] is {value!r}, expected a number above 0")
        extends = properties.get("extends", [])
        if not isinstance(extends, list) or not all(isinstance(x, str) for x in extends):
            raise VocabularyError(f"{self.name}: properties['extends'] is {extends!r}, expected a list of fingerprints")
        if not isinstance(self.layout, str) or (self.layout and self.modality != "audio"):
            raise VocabularyError(f"{self.name}: layout {self.layout!r}, expected none for {self.modality}")
        if self.modality == "audio":
            object.__setattr__(self, "layout", self.layout or "interleaved")
            try:
                parse(self.layout, len(sizes))
            except LayoutError as error:
                raise VocabularyError(f"{self.name}: {error}") from error
        object.__setattr__(self, "codebook_sizes", tuple(int(s) for s in sizes))
        object.__setattr__(self, "headroom", int(self.headroom))
        object.__setattr__(self, "properties", properties)

    @property
    def numbered(self) -> bool:
        """Whether blocks and codes are named by their level: those of sounds, and of images with several levels."""
        return self.modality == "audio" or len(self.codebook_sizes) > 1

    @property
    def codebook_layout(self) -> Layout:
        """The layout of an audio tokenizer.

        Raises:
            LayoutError: a text or image tokenizer.
        """
        return parse(self.layout, len(self.codebook_sizes))


def is_int(value: object) -> bool:
    """True for Python and numpy integers, not for bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def lineage(spec: TokenizerSpec) -> tuple[str, ...]:
    """The fingerprint of a tokenizer and those that it extends."""
    return (spec.fingerprint, *spec.properties.get("extends", ()))


def label(spec: TokenizerSpec, all_specs: Sequence[TokenizerSpec]) -> str:
    """``image`` for the first tokenizer of its modality, ``image:NAME`` for the others."""
    first = next(t for t in all_specs if t.modality == spec.modality)
    return spec.modality if first.name == spec.name else f"{spec.modality}:{spec.name}"


def brackets(spec: TokenizerSpec, all_specs: Sequence[TokenizerSpec]) -> tuple[str, ...]:
    """Names of the control tokens of an image or audio tokenizer: opening, closing, the fill of a delayed layout."""
    name = label(spec, all_specs)
    fill = (f"<fill:{name}>",) if spec.modality == "audio" and isinstance(spec.codebook_layout, Delayed) else ()
    return f"<{name}>", f"</{name}>", *fill


def control_ids(blocks: Sequence[Block]) -> dict[str, int]:
    """The id of every control token, by its name, in order of the ids."""
    return {name: b.start + i for b in blocks for i, name in enumerate(b.names)}


def lay_out(
    blocks: tuple[Block, ...],
    all_specs: tuple[TokenizerSpec, ...],
    new: tuple[TokenizerSpec, ...],
    control: tuple[str, ...],
    control_name: str,
    max_grid: int | None,
) -> tuple[Block, ...]:
    """Append the blocks of ``new`` tokenizers, after a control block for their openings and closings."""
    out = list(blocks)
    by = {m: [t for t in new if t.modality == m] for m in MODALITIES}
    literals = (*control, *(x for t in (*by["image"], *by["audio"]) for x in brackets(t, all_specs)))

    def add(name: str, modality: str, size: int, spec: TokenizerSpec | None = None, codebook: int = 0) -> None:
        start = out[-1].start + out[-1].capacity if out else 0
        owner, mark, room = (spec.name, spec.fingerprint, spec.headroom) if spec else ("", "", 0)
        names = literals if modality == "control" else ()
        out.append(Block(name, modality, start, size, size + room, owner, codebook, mark, names))

    if literals:
        add(control_name, "control", len(literals))
    for spec in by["text"]:
        add(label(spec, all_specs), "text", spec.codebook_sizes[0], spec)
    if max_grid is not None:
        add("grid", "grid", max_grid)
    for spec in (*by["image"], *by["audio"]):
        for level, size in enumerate(spec.codebook_sizes):
            name = label(spec, all_specs) + (f".{level}" if spec.numbered else "")
            add(name, spec.modality, size, spec, level)
    return tuple(out)


def check_blocks(blocks: Sequence[Block], tokenizers: Sequence[TokenizerSpec]) -> None:
    """Everything that must hold of the blocks of a registry.

    Raises:
        VocabularyError: blocks overlap, are out of order, have impossible sizes, or do not fit the tokenizers.
    """
    end, seen = 0, set[str]()
    for b in blocks:
        if not all(type(x) is int for x in (b.start, b.size, b.capacity, b.codebook)):
            raise VocabularyError(f"block {b.name!r}: start, size, capacity and codebook must be integers")
        if not all(type(x) is str for x in (b.name, b.modality, b.tokenizer, b.fingerprint, *b.names)):
            raise VocabularyError(f"block {b.name!r}: name, modality, tokenizer, fingerprint and names must be strings")
        if b.start < end:
            raise VocabularyError(f"block {b.name!r} starts at {b.start}, but ids below {end} are taken")
        if not 1 <= b.size <= b.capacity:
            raise VocabularyError(f"block {b.name!r}: got size {b.size}, expected 1 to its capacity {b.capacity}")
        if b.name in seen:
            raise VocabularyError(f"two blocks are named {b.name!r}; give one of their tokenizers another name")
        seen.add(b.name)
        end = b.start + b.capacity
    if end > MAX_IDS:
        raise VocabularyError(f"the vocabulary has {end} ids, expected at most {MAX_IDS}")
    grids = sum(b.modality == "grid" for b in blocks)
    if grids != 1:
        raise VocabularyError(f"{grids} grid blocks, expected exactly one")
    _check_owners(blocks, tokenizers)
    literals = [name for b in blocks for name in b.names]
    if len(set(literals)) != len(literals):
        raise VocabularyError("two control tokens have the same name")
    for literal in (*CONTROL, *(x for t in tokenizers if t.modality != "text" for x in brackets(t, tokenizers))):
        if literal not in literals:
            raise VocabularyError(f"no control token {literal!r}; known: {', '.join(literals)}")


def _check_owners(blocks: Sequence[Block], tokenizers: Sequence[TokenizerSpec]) -> None:
    """Each tokenizer has one block for each codebook, and each block of codes has a tokenizer."""
    names = [t.name for t in tokenizers]
    owned: dict[str, list[tuple[int, str, int, str]]] = {name: [] for name in names}
    if len(owned) < len(names):
        raise VocabularyError(f"two tokenizers have the same name ({', '.join(sorted(names))}); names must differ")
    for b in blocks:
        if b.modality in ("control", "grid"):
            if b.tokenizer or b.fingerprint or len(b.names) != (b.size if b.modality == "control" else 0):
                raise VocabularyError(f"block {b.name!r}: a {b.modality} block has no tokenizer and names all its ids")
        elif b.tokenizer not in owned or b.names:
            raise VocabularyError(
                f"block {b.name!r}: no tokenizer {b.tokenizer!r}; known: {', '.join(names) or 'none'}"
            )
        else:
            owned[b.tokenizer].append((b.codebook, b.modality, b.size, b.fingerprint))
    for t in tokenizers:
        first = next(x for x in tokenizers if x.modality == t.modality)
        if t.name in MODALITIES and t is not first:
            raise VocabularyError(f"tokenizer {t.name!r} comes after {first.name!r}, which the name means; rename it")
        expected = [(q, t.modality, size, t.fingerprint) for q, size in enumerate(t.codebook_sizes)]
        if sorted(owned[t.name]) != expected:
            raise VocabularyError(
                f"tokenizer {t.name!r}: blocks (codebook, modality, size, fingerprint) are {sorted(owned[t.name])}, "
                f"expected {expected}"
            )

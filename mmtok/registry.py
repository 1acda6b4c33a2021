"""The vocabulary registry: which ids belong to which tokenizer. An immutable value with a canonical JSON form.

``create`` lays out contiguous blocks of ids; ``extend`` appends and never moves an old id; ``split`` and ``merge``
are the vectorised maps between ids and (block, code); ``remap`` says where the ids of another registry went.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmtok.arrays import integers, like
from mmtok.blocks import CONTROL, MAX_IDS, brackets, check_blocks, control_ids, is_int, lay_out, lineage
from mmtok.blocks import MODALITIES as MODALITIES
from mmtok.blocks import Block as Block
from mmtok.blocks import TokenizerSpec as TokenizerSpec
from mmtok.comparison import changes, correspondence
from mmtok.errors import VocabularyError, VocabularyMismatchError
from mmtok.idmap import IdMap

FORMAT = 2
VOCAB_FILE = "vocab.json"


@dataclass(frozen=True, eq=False)
class VocabularyRegistry:
    """Who owns which ids. Immutable; two registries are equal when their fingerprints are.

    Build one with :meth:`create`, :meth:`extend` or :meth:`from_json`; the constructor checks everything.

    Attributes:
        blocks: in order of their ids.
        tokenizers: in the order in which they were added; the first of a modality is its default.
        revision: 0 when created, one more with each ``extend``.
        pad_multiple: ``padded_size`` is a multiple of this.

    Raises:
        VocabularyError: blocks overlap, are out of order, or do not fit the tokenizers.
    """

    blocks: tuple[Block, ...]
    tokenizers: tuple[TokenizerSpec, ...]
    revision: int = 0
    pad_multiple: int = 64

    @classmethod
    def create(
        cls, tokenizers: Sequence[TokenizerSpec], *, max_grid: int = 64, pad_multiple: int = 64
    ) -> VocabularyRegistry:
        """Lay out control, text, grid, image and audio blocks, in this order, without gaps.

        Args:
            tokenizers: any number of each modality.
            max_grid: the largest image height or width, in codes.
            pad_multiple: round ``padded_size`` up to a multiple of this.

        Raises:
            VocabularyError: two tokenizers share a name, or a number is out of range.
        """
        if not is_int(max_grid) or max_grid < 1:
            raise VocabularyError(f"max_grid {max_grid!r}, expected an integer from 1 up")
        specs = tuple(tokenizers)
        blocks = lay_out((), specs, specs, CONTROL, "control", int(max_grid))
        return cls(blocks, specs, 0, int(pad_multiple) if is_int(pad_multiple) else pad_multiple)

    def extend(self, tokenizers: Sequence[TokenizerSpec]) -> VocabularyRegistry:
        """A new revision with more tokenizers, in which no old id moves.

        A tokenizer whose name is there already grows into the head-room of its blocks: the caller vouches that
        its old codes keep their meaning. Its earlier fingerprints are kept in ``properties["extends"]``, so that
        ``remap`` still finds its rows.

        Raises:
            VocabularyError: a known name with other codebooks, or without the head-room to grow.
        """
        old = {t.name: t for t in self.tokenizers}
        blocks, specs, new = list(self.blocks), list(self.tokenizers), []
        for spec in tokenizers:
            if spec.name in old:
                grown = self._grow(old[spec.name], spec, blocks)
                specs[specs.index(old[spec.name])] = grown
                old[spec.name] = grown
            else:
                new.append(spec)
        name = f"control.{self.revision + 1}"
        blocks = list(lay_out(tuple(blocks), tuple(specs + new), tuple(new), (), name, None))
        return VocabularyRegistry(tuple(blocks), tuple(specs + new), self.revision + 1, self.pad_multiple)

    def _grow(self, old: TokenizerSpec, new: TokenizerSpec, blocks: list[Block]) -> TokenizerSpec:
        """Enlarge ``old``'s blocks in place in ``blocks``; the spec that takes its place."""
        mine, theirs = ((t.modality, len(t.codebook_sizes), t.layout) for t in (old, new))
        if mine != theirs:
            raise VocabularyError(
                f"tokenizer {new.name!r} is there already with (modality, codebooks, layout) {mine}; got {theirs}: "
                "give it another name"
            )
        room = []
        for i, block in enumerate(blocks):
            if block.tokenizer == new.name:
                size = new.codebook_sizes[block.codebook]
                if not block.size <= size <= block.capacity:
                    raise VocabularyError(
                        f"block {block.name!r} holds {block.size} codes and can grow to {block.capacity}, got {size}: "
                        "add the tokenizer under another name, or create a new registry and remap"
                    )
                room.append(block.capacity - size)
                blocks[i] = dataclasses.replace(block, size=size, fingerprint=new.fingerprint)
        earlier = [f for f in (*lineage(old), *lineage(new)) if f != new.fingerprint]
        properties = {**new.properties, "extends": list(dict.fromkeys(earlier))} if earlier else new.properties
        return dataclasses.replace(new, headroom=min(room), properties=properties)

    def __post_init__(self) -> None:
        if type(self.revision) is not int or self.revision < 0:
            raise VocabularyError(f"revision {self.revision!r}, expected an integer from 0 up")
        if type(self.pad_multiple) is not int or not 1 <= self.pad_multiple <= MAX_IDS:
            raise VocabularyError(f"pad_multiple {self.pad_multiple!r}, expected an integer from 1 to {MAX_IDS}")
        check_blocks(self.blocks, self.tokenizers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VocabularyRegistry) and other.fingerprint == self.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    # --- sizes and names

    @property
    def size(self) -> int:
        """One past the last reserved id: the head-room of the last block is included."""
        return self.blocks[-1].start + self.blocks[-1].capacity

    @property
    def padded_size(self) -> int:
        """``size`` rounded up to ``pad_multiple``: the rows of an embedding table."""
        return -(-self.size // self.pad_multiple) * self.pad_multiple

    @property
    def max_grid(self) -> int:
        """The largest image height or width, in codes."""
        return self.block("grid").size

    @property
    def pad(self) -> int:
        """Id of ``<pad>``."""
        return self.controls["<pad>"]

    @property
    def bos(self) -> int:
        """Id of ``<bos>``."""
        return self.controls["<bos>"]

    @property
    def eos(self) -> int:
        """Id of ``<eos>``."""
        return self.controls["<eos>"]

    @property
    def user(self) -> int:
        """Id of ``<user>``."""
        return self.controls["<user>"]

    @property
    def assistant(self) -> int:
        """Id of ``<assistant>``."""
        return self.controls["<assistant>"]

    def control(self, name: str) -> int:
        """Id of a control token such as ``<image>``.

        Raises:
            VocabularyError: no such control token.
        """
        return self._lookup(self.controls, name, "control token")

    def block(self, name: str) -> Block:
        """The block of this name.

        Raises:
            VocabularyError: no such block.
        """
        return self.blocks[self._lookup({b.name: i for i, b in enumerate(self.blocks)}, name, "block")]

    def blocks_of(self, tokenizer: str) -> tuple[Block, ...]:
        """The blocks that a tokenizer's codes live in, in codebook order; a modality means its default tokenizer."""
        name = self.tokenizer(tokenizer).name
        return tuple(sorted((b for b in self.blocks if b.tokenizer == name), key=lambda b: b.codebook))

    def tokenizer(self, modality_or_name: str) -> TokenizerSpec:
        """A tokenizer by its name, or the default (first) one of a modality.

        Raises:
            VocabularyError: neither a name nor a modality that is there.
        """
        return self._lookup(self._named, modality_or_name, "tokenizer")

    def opening(self, tokenizer: str) -> int:
        """Control id that opens a segment of this image or audio tokenizer.

        Raises:
            VocabularyError: unknown, or a text tokenizer: text has no opening.
        """
        return self.control(self._brackets(tokenizer)[0])

    def closing(self, tokenizer: str) -> int:
        """Control id that closes a segment of this image or audio tokenizer; errors as for ``opening``."""
        return self.control(self._brackets(tokenizer)[1])

    def fill(self, tokenizer: str) -> int:
        """Control id that stands where a delayed audio layout has no code.

        Raises:
            VocabularyError: unknown, or a tokenizer without a delayed layout.
        """
        if len(names := self._brackets(tokenizer)) < 3:
            raise VocabularyError(f"{tokenizer!r} has no delayed layout and so no fill")
        return self.control(names[2])

    def _brackets(self, tokenizer: str) -> tuple[str, ...]:
        spec = self.tokenizer(tokenizer)
        if spec.modality == "text":
            raise VocabularyError(f"{spec.name!r} is a text tokenizer; only image and audio segments open and close")
        return brackets(spec, self.tokenizers)

    @staticmethod
    def _lookup(known: dict[str, Any], name: str, what: str) -> Any:
        if name not in known:
            raise VocabularyError(f"no {what} {name!r}; known: {', '.join(known) or 'none'}")
        return known[name]

    # --- ids <-> (block, code)

    def split(self, ids: Any) -> tuple[Any, Any]:
        """Ids to (index into ``blocks``, code within the block).

        Args:
            ids: integers of any shape, numpy, torch or nested lists.

        Returns:
            Two int64 arrays of the same shape; torch tensors on the same device if ``ids`` is one.

        Raises:
            VocabularyError: an id that no block uses; the first one is named with its position.
        """
        array = integers(ids, "ids")
        parts = self._map.split(array.reshape(-1))
        if isinstance(parts, int):
            where = _position(parts, array.shape)
            raise VocabularyError(
                f"position {where}: {self.describe(int(array.reshape(-1)[parts]))}, expected an id that a block uses; "
                "is this sequence from another vocabulary?"
            )
        return like(ids, parts[0].reshape(array.shape)), like(ids, parts[1].reshape(array.shape))

    def merge(self, block_index: Any, codes: Any) -> Any:
        """The inverse of ``split``. The arguments broadcast against each other.

        Args:
            block_index: integers, each an index into ``blocks``.
            codes: integers, each within its block's size.

        Returns:
            int64 ids, as a torch tensor if ``codes`` is one.

        Raises:
            VocabularyError: an index or a code out of range, with the first position.
        """
        index, array = integers(block_index, "block_index"), integers(codes, "codes")
        try:
            shape = np.broadcast_shapes(index.shape, array.shape)
        except ValueError as error:
            raise VocabularyError(f"block_index {index.shape} and codes {array.shape} do not broadcast") from error
        flat_index = index.reshape(-1) if index.size == 1 else np.broadcast_to(index, shape).reshape(-1)
        flat = np.broadcast_to(array, shape).reshape(-1)
        ids = self._map.merge(flat_index, flat)
        if isinstance(ids, int):
            where, code = _position(ids, shape), int(flat[ids])
            owner = int(flat_index[0 if index.size == 1 else ids])
            if not 0 <= owner < len(self.blocks):
                raise VocabularyError(f"position {where}: block index {owner}, expected 0..{len(self.blocks) - 1}")
            block = self.blocks[owner]
            raise VocabularyError(
                f"position {where}: code {code}, expected 0..{block.size - 1} in block {block.name!r}"
            )
        return like(codes, ids.reshape(shape))

    def kind(self, block: Block) -> str:
        """What the ids of a block are, in words: ``image code``, ``audio level 2 code``, ``text id``, ``grid size``."""
        if block.tokenizer and self.tokenizer(block.tokenizer).numbered:
            return f"{block.name.rpartition('.')[0]} level {block.codebook} code"
        noun = {"text": "id", "grid": "size"}.get(block.modality, "code")
        return f"{block.name} {noun}"

    def describe(self, id: int) -> str:
        """An id in words: ``image code 17``, ``audio level 2 code 5``, ``<bos>``, ``text id 42``, ``unused id 900``."""
        index = self._map.block_of(id)
        if index < 0:
            inside = 0 <= id < self.padded_size
            return f"unused id {id}" if inside else f"id {id} outside the vocabulary of {self.padded_size}"
        block = self.blocks[index]
        code = id - block.start
        if block.modality == "control":
            return block.names[code]
        return f"{self.kind(block)} {code + (block.modality == 'grid')}"

    # --- identity, JSON, comparison

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: the contents of ``vocab.json``."""
        value = {
            "format": FORMAT,
            "revision": self.revision,
            "pad_multiple": self.pad_multiple,
            "blocks": [dataclasses.asdict(b) for b in self.blocks],
            "tokenizers": [dataclasses.asdict(t) for t in self.tokenizers],
        }
        return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> VocabularyRegistry:
        """Read ``to_json``'s text and check it in full.

        Raises:
            VocabularyError: not JSON, another format, a missing or unknown key, or blocks that do not fit.
        """
        try:
            value = json.loads(text)
            if value["format"] != FORMAT:
                raise VocabularyError(f"vocabulary format {value['format']!r}; this mmtok reads format {FORMAT}")
            blocks = tuple(Block(**{**b, "names": tuple(b["names"])}) for b in value["blocks"])
            specs = tuple(
                TokenizerSpec(**{**t, "codebook_sizes": tuple(t["codebook_sizes"])}) for t in value["tokenizers"]
            )
            return cls(blocks, specs, value["revision"], value["pad_multiple"])
        except VocabularyError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise VocabularyError(
                f"not a vocabulary ({type(error).__name__}: {error}); expected the text of {VOCAB_FILE}"
            ) from error

    def diff(self, other: VocabularyRegistry) -> str:
        """What changes from this registry to another, a line each, the last on what became of the ids; empty if they
        are equal."""
        if self == other:
            return ""
        numbers = ("revision", "pad_multiple", "size", "padded_size")
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in numbers]
        lines = [f"{name.replace('_', ' ')}: {a} -> {b}" for name, a, b in pairs if a != b]
        lines += changes(self.blocks, self.tokenizers, other.blocks, other.tokenizers)
        moved = other.moved(self)
        used = sum(b.size for b in self.blocks)
        if len(moved):
            lost = int(moved[0])
            was, now = self.describe(lost), other.describe(lost)
            lines.append(
                f"ids: {len(moved)} of {used} mean something else or nothing; the first is {lost}, "
                f"{was} -> {now if now != was else 'the same of another tokenizer'}"
            )
        else:
            lines.append(f"ids: all {used} keep their meaning")
        return "\n".join(lines)

    def moved(self, old: VocabularyRegistry) -> np.ndarray:
        """The ids of ``old`` that mean something else here, or nothing: int64 [n], in ascending order."""
        used = np.concatenate([np.arange(b.start, b.end) for b in old.blocks])
        return used[self.remap(old)[used] != used]

    def remap(self, old: VocabularyRegistry) -> np.ndarray:
        """Where each id of ``old`` is in this registry.

        Control tokens match by name, grid sizes by value. The codes of a tokenizer, and the control tokens that open,
        close and fill its segments, go to the tokenizer of the same fingerprint, or that extends it: see
        :func:`mmtok.comparison.counterpart`.

        Returns:
            int64 [old.size]: the id here, -1 where there is no counterpart. Row i of a new embedding table comes
            from row j of the old one where ``remap[j] == i``.
        """
        return correspondence(old.blocks, old.tokenizers, self.blocks, self.tokenizers)

    def check_same(self, other: VocabularyRegistry | str, what: str) -> None:
        """Raise unless ``other``, a registry or a fingerprint, is this vocabulary.

        Args:
            what: the thing that carries the other fingerprint, for the message: ``"shard 3 of corpus"``.

        Raises:
            VocabularyMismatchError: with the difference as far as it is known.
        """
        theirs = other if isinstance(other, str) else other.fingerprint
        if theirs != self.fingerprint:
            detail = "" if isinstance(other, str) else f". To this one: {'; '.join(other.diff(self).splitlines())}"
            raise VocabularyMismatchError(
                f"{what} has vocabulary {theirs[:12]}, expected {self.fingerprint[:12]}; use the one that it was made "
                f"with, or migrate it (mmtok vocab migrate SOURCE --to VOCAB -o OUT){detail}"
            )

    # --- tables

    @functools.cached_property
    def controls(self) -> dict[str, int]:
        """The id of every control token, by its name, in order of the ids."""
        return control_ids(self.blocks)

    @functools.cached_property
    def _named(self) -> dict[str, TokenizerSpec]:
        """The first tokenizer of each modality, and all by name."""
        known: dict[str, TokenizerSpec] = {}
        for spec in self.tokenizers:
            known.setdefault(spec.modality, spec)
        return known | {spec.name: spec for spec in self.tokenizers}

    @functools.cached_property
    def _map(self) -> IdMap:
        return IdMap(self.blocks)


def _position(flat: int, shape: tuple[int, ...]) -> int | tuple[int, ...]:
    """Where the element with this number is in an array: an int in one dimension, else one index a dimension."""
    where = tuple(int(i) for i in np.unravel_index(flat, shape))
    return where if len(where) > 1 else flat

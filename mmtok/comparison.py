"""Two vocabularies: which tokenizer and which id of the one is which of the other, and what changed, in words."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from mmtok.blocks import Block, TokenizerSpec, brackets, control_ids, lineage


def counterpart(spec: TokenizerSpec, tokenizers: Sequence[TokenizerSpec]) -> TokenizerSpec | None:
    """The tokenizer whose codes mean what the codes of ``spec``, of another vocabulary, mean; None if there is none.

    It has the fingerprint of ``spec``, or extends it. Of several, one with as many codebooks goes before one with more,
    and that before one with fewer, since only then a sequence of codes stays one; then its name decides.
    """
    levels = len(spec.codebook_sizes)

    def unlike(t: TokenizerSpec) -> tuple[bool, bool, bool]:
        return len(t.codebook_sizes) != levels, len(t.codebook_sizes) < levels, t.name != spec.name

    same = [t for t in tokenizers if t.modality == spec.modality and spec.fingerprint in lineage(t)]
    return min(same, key=unlike, default=None)


def correspondence(
    before: Sequence[Block],
    tokenizers_before: Sequence[TokenizerSpec],
    after: Sequence[Block],
    tokenizers_after: Sequence[TokenizerSpec],
) -> np.ndarray:
    """Where each id of one vocabulary is in the other: int64 [n], one for each reserved id, -1 for none.

    Control tokens match by name, grid sizes by value. The codes of a tokenizer, and the control tokens that open, close
    and fill its segments, go to its :func:`counterpart`.

    Args:
        before: blocks of the one vocabulary, with its ``tokenizers_before``.
        after: blocks of the other, with its ``tokenizers_after``.
    """
    table = np.full(before[-1].start + before[-1].capacity, -1, np.int64)
    literals, old_literals = (control_ids(blocks) for blocks in (after, before))
    for name, id in old_literals.items():
        table[id] = literals.get(name, -1)
    targets = {t.name: counterpart(t, tokenizers_after) for t in tokenizers_before}
    for spec in tokenizers_before:
        if spec.modality != "text":
            target = targets[spec.name]
            theirs = brackets(target, tokenizers_after) if target else ()
            for mine, other in itertools.zip_longest(brackets(spec, tokenizers_before), theirs, fillvalue=""):
                if mine:
                    table[old_literals[mine]] = literals.get(other, -1)
    homes = {(b.modality, b.tokenizer, b.codebook): b for b in after}
    for block in before:
        owner = targets.get(block.tokenizer)
        home = homes.get((block.modality, owner.name if owner else "", block.codebook))
        if home is not None and block.modality != "control":
            n = min(block.size, home.size)
            table[block.start : block.start + n] = np.arange(home.start, home.start + n)
    return table


def changes(
    before: Sequence[Block],
    tokenizers_before: Sequence[TokenizerSpec],
    after: Sequence[Block],
    tokenizers_after: Sequence[TokenizerSpec],
) -> list[str]:
    """One line for each tokenizer, control token and block that came, went, or is another one.

    Args:
        before: blocks of the one vocabulary, with its ``tokenizers_before``.
        after: blocks of the other, with its ``tokenizers_after``.
    """
    old, new = ({t.name: t for t in specs} for specs in (tokenizers_before, tokenizers_after))
    lines = [f"tokenizer {_titled(t, before)} removed" for name, t in old.items() if name not in new]
    lines += [f"tokenizer {_titled(t, after)} added" for name, t in new.items() if name not in old]
    for name, spec in old.items():
        if name in new:
            lines += [f"tokenizer {name}: {change}" for change in _spec_changes(spec, new[name])]
    kept = [[name for name in specs if name in old and name in new] for specs in (old, new)]
    if kept[0] != kept[1]:
        lines.append(f"order of the tokenizers: {', '.join(kept[0])} -> {', '.join(kept[1])}")
    controls = (_controls(before, tokenizers_before), _controls(after, tokenizers_after))
    return lines + _control_changes(*controls) + _block_changes(before, after)


def _titled(spec: TokenizerSpec, blocks: Sequence[Block]) -> str:
    """``vq2 (image, 512 codes, ids 857..1368)``."""
    own = [b for b in blocks if b.tokenizer == spec.name]
    where = f"{own[0].start}..{own[-1].end - 1}"
    layout = f", layout {spec.layout}" if spec.layout else ""
    return f"{spec.name} ({spec.modality}, {_sizes(spec)}{layout}, ids {where})"


def _sizes(spec: TokenizerSpec) -> str:
    first, *rest = spec.codebook_sizes
    if not rest:
        return f"{first} codes"
    each = str(first) if set(rest) == {first} else ", ".join(map(str, spec.codebook_sizes))
    return f"{len(rest) + 1} codebooks of {each} codes"


def _spec_changes(a: TokenizerSpec, b: TokenizerSpec) -> list[str]:
    lines = []
    if a.modality != b.modality:
        lines.append(f"{a.modality} -> {b.modality}")
    if a.codebook_sizes != b.codebook_sizes:
        lines.append(f"{_sizes(a)} -> {_sizes(b)}")
    if a.fingerprint != b.fingerprint:
        lines.append(f"other weights, fingerprint {a.fingerprint[:12]} -> {b.fingerprint[:12]}")
    if a.layout != b.layout:
        lines.append(f"layout {a.layout} -> {b.layout}")
    for key in sorted(set(a.properties) | set(b.properties)):
        one, other = a.properties.get(key), b.properties.get(key)
        if one != other:
            lines.append(f"{key} {_short(one)} -> {_short(other)}")
    return lines


def _short(value: Any) -> str:
    """A property for a line: fingerprints, alone or in a list, are cut to 12 characters."""
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    return "none" if value is None else value[:12] if isinstance(value, str) else str(value)


def _controls(blocks: Sequence[Block], specs: Sequence[TokenizerSpec]) -> dict[Hashable, tuple[str, int]]:
    """What a control token is for -> its name and id. Its name depends on which tokenizer is the default."""
    own = [t for t in specs if t.modality != "text"]
    use = {literal: (t.name, place) for t in own for place, literal in enumerate(brackets(t, specs))}
    return {use.get(name, name): (name, id) for name, id in control_ids(blocks).items()}


def _control_changes(old: dict[Hashable, tuple[str, int]], new: dict[Hashable, tuple[str, int]]) -> list[str]:
    lines = []
    for verb, some, others in (("removed", old, new), ("added", new, old)):
        if gone := [f"{name} {id}" for use, (name, id) in some.items() if use not in others]:
            lines.append(f"control tokens {verb}: {', '.join(gone)}")
    both = [(*old[use], *new[use]) for use in old if use in new]
    if moved := [f"{a} {i} -> {b + ' ' if a != b else ''}{j}" for a, i, b, j in both if (a, i) != (b, j)]:
        lines.append(f"control tokens moved: {', '.join(moved)}")
    return lines


def _block_changes(before: Sequence[Block], after: Sequence[Block]) -> list[str]:
    """Places and head-room of the blocks that both have; the sizes of codebooks are their tokenizer's."""
    new = {b.name: b for b in after}
    lines = []
    for a in before:
        b = new.get(a.name)
        if b is None or a.modality == "control":
            continue
        if a.start != b.start:
            lines.append(f"block {a.name} moved: ids {a.start}..{a.end - 1} -> {b.start}..{b.end - 1}")
        if a.modality == "grid" and a.size != b.size:
            lines.append(f"block {a.name}: sizes up to {a.size} -> {b.size}")
        if a.capacity - a.size != b.capacity - b.size:
            lines.append(f"block {a.name}: head-room {a.capacity - a.size} -> {b.capacity - b.size}")
        if a.tokenizer != b.tokenizer:
            lines.append(f"block {a.name}: codes of {a.tokenizer or 'none'} -> {b.tokenizer or 'none'}")
    return lines

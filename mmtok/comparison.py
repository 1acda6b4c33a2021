"""What changed between two vocabularies, in words: tokenizers, control tokens and places of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmtok.blocks import Block, TokenizerSpec


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
    return lines + _control_changes(before, after) + _block_changes(before, after)


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


def _control_changes(before: Sequence[Block], after: Sequence[Block]) -> list[str]:
    old, new = ({name: b.start + i for b in blocks for i, name in enumerate(b.names)} for blocks in (before, after))
    lines = []
    for verb, some, others in (("removed", old, new), ("added", new, old)):
        if gone := [f"{name} {id}" for name, id in some.items() if name not in others]:
            lines.append(f"control tokens {verb}: {', '.join(gone)}")
    if moved := [f"{name} {id} -> {new[name]}" for name, id in old.items() if new.get(name, id) != id]:
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

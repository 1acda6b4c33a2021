"""What the recipes read: manifests or folders of media (:mod:`mmtok.datasets.sources.manifest`), and the splits.

documents      -- every document of a manifest or a folder, with its split
items          -- every segment of one modality in one split
split_of       -- the split of a document that names none, fixed by a hash of its name
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmtok.datasets.sources.manifest import SUFFIXES, read_folder, read_manifest
from mmtok.errors import DataError


@dataclasses.dataclass(frozen=True)
class Item:
    """One segment of one document: its document's id, split and source, and where its media is."""

    document: str
    split: str
    source: str
    segment: dict[str, Any]
    root: Path

    @property
    def path(self) -> Path:
        """Absolute path of the media file (images and sounds)."""
        return self.root / str(self.segment["path"])

    @property
    def stamp(self) -> tuple[Any, ...]:
        """JSON-able values that change when the media file changes: its path, segment, size and time."""
        try:
            status = self.path.stat()
        except OSError:
            return str(self.path), self.segment, []
        return str(self.path), self.segment, [status.st_size, status.st_mtime_ns]


def bucket(key: str) -> int:
    """The first 32 bits of sha256 of the key: the number that all splits are made from."""
    return int(hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:8], 16)


def split_of(key: str) -> str:
    """``test`` for one path in twenty, ``val`` for another, else ``train``; the key has no suffix and no language."""
    return {0: "test", 1: "val"}.get(bucket(key) % 20, "train")


def digest_of(names: Iterable[str]) -> str:
    """How many names there are and what they are, in one short line: equal for the same names in the same order."""
    names = list(names)
    found = hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{len(names)} named {found[:12]}"


def documents(source: Path, modalities: Sequence[str] = tuple(SUFFIXES)) -> Iterator[dict[str, Any]]:
    """The documents of a manifest or a folder, with ``split``, and paths relative to it.

    Args:
        source: a JSONL file, or a folder; what cannot be read in a folder is reported and left out.
        modalities: which files of a folder are looked at.

    Raises:
        DataError: the source is missing, or a line of a manifest is not a document; the message names the line.
    """
    folder = source.is_dir()
    if not folder and not source.exists():
        raise DataError(f"{source}: cannot read the manifest (no such file); run recipes/prepare.py first?")
    for document in read_folder(source, modalities) if folder else read_manifest(source):
        if "error" in document and not folder:
            raise DataError(document["error"])
        if "error" in document:
            print(f"left out: {document['error']}", file=sys.stderr)
            continue
        document.setdefault("split", split_of(document["id"]))
        if folder:
            document["source"] = source.name
        yield document


def items(source: Path, modality: str, split: str | None) -> list[Item]:
    """Every segment of one modality in one split of a manifest (a file) or a folder; None: in all of them.

    Raises:
        DataError: there is none.
    """
    root = source if source.is_dir() else source.parent
    out = [
        Item(document["id"], str(document["split"]), str(document.get("source", "")), segment, root)
        for document in documents(source, (modality,))
        for segment in document["segments"]
        if segment["type"] == modality
    ]
    chosen = [x for x in out if split in (None, x.split)]
    if not chosen:
        if split is None:
            raise DataError(f"{source}: no {modality} in it")
        raise DataError(f"{source}: no {modality} in split {split!r} ({len(out)} in all splits)")
    return chosen

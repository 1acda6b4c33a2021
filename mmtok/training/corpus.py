"""What the recipes read: manifests or folders of media, and the splits, fixed by a hash of the path.

A manifest is JSONL, one document a line, paths relative to the manifest:

    {"id": "cow", "split": "train",
     "segments": [{"type": "text", "text": "a cow"}, {"type": "image", "path": "cow.png"}]}

In a folder, files that differ in their suffix alone are one document.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmtok.errors import DataError

SUFFIXES = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"),
    "audio": (".wav", ".flac", ".ogg", ".opus", ".mp3"),
    "text": (".txt", ".md", ".py", ".rst"),
}


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


def read_manifest(path: Path) -> Iterator[dict[str, Any]]:
    """The documents of a JSONL manifest.

    Raises:
        DataError: the file is missing, or a line is not a document; the message names the line.
    """
    try:
        handle = path.open("rb")
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the manifest ({error.strerror}); run recipes/prepare.py first?"
        ) from error
    with handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)
                segments = document["segments"]
                ok = isinstance(segments, list) and all(
                    isinstance(s["text"] if s["type"] == "text" else s["path"], str) for s in segments
                )
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}:{number}: not a document ({error}); expected {{'id', 'segments': [...]}}"
                ) from error
            if not ok:
                raise DataError(f"{path}:{number}: every segment needs a type, and text or path")
            document["id"] = str(document.get("id", f"line-{number}"))
            document.setdefault("split", split_of(document["id"]))
            yield document


def read_folder(folder: Path, modalities: Sequence[str] = tuple(SUFFIXES)) -> Iterator[dict[str, Any]]:
    """A folder as documents: files that differ in their suffix alone (cow.png, cow.wav, cow.txt) are one document.

    Args:
        folder: searched to the bottom.
        modalities: which files are looked at.
    """
    together: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        modality = next((m for m in modalities if path.suffix.lower() in SUFFIXES[m]), None)
        if modality is None:
            continue
        relative = path.relative_to(folder)
        segment = {"type": modality, "path": str(relative)}
        if modality == "text":
            segment["text"] = path.read_text(encoding="utf-8", errors="ignore")
        together.setdefault(relative.with_suffix("").as_posix(), []).append(segment)
    for key, segments in together.items():
        yield {"id": key, "split": split_of(key), "source": folder.name, "segments": segments}


def items(source: Path, modality: str, split: str | None) -> list[Item]:
    """Every segment of one modality in one split of a manifest (a file) or a folder; None: in all of them.

    Raises:
        DataError: there is none.
    """
    folder = source.is_dir()
    root = source if folder else source.parent
    out = [
        Item(document["id"], str(document["split"]), str(document.get("source", "")), segment, root)
        for document in (read_folder(source, (modality,)) if folder else read_manifest(source))
        for segment in document["segments"]
        if segment["type"] == modality
    ]
    chosen = [x for x in out if split in (None, x.split)]
    if not chosen:
        if split is None:
            raise DataError(f"{source}: no {modality} in it")
        raise DataError(f"{source}: no {modality} in split {split!r} ({len(out)} in all splits)")
    return chosen

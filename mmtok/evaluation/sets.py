"""Which files a report is about, and the progress bar of its passes over them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from mmtok.training.corpus import Item, bucket, items

T = TypeVar("T")


def choose(
    source: Path, modality: str, split: str | None = None, limit: int | None = None
) -> tuple[list[Item], str | None]:
    """Files of a folder or a manifest, and the split that they are from.

    Args:
        source: a folder, or a manifest (:mod:`mmtok.training.corpus`).
        modality: ``image`` or ``audio``.
        split: ``train``, ``val`` or ``test``; None: all of a folder, ``val`` of a manifest, never ``test``.
        limit: at most so many, spread over the data by the hash of their names.

    Raises:
        DataError: there is none.
    """
    if split is None and not source.is_dir():
        split = "val"
    return spread(items(source, modality, split), limit), split


def spread(found: Sequence[Item], limit: int | None) -> list[Item]:
    """At most ``limit`` of the items, by the hash of their names; all as they are where that is None."""
    return list(found) if limit is None else sorted(found, key=lambda x: (bucket(x.document), x.document))[:limit]


def progress(sequence: Sequence[T], label: str) -> Iterable[T]:
    """The sequence, with a progress bar on stderr while it is gone through, if that is a terminal."""
    console = Console(stderr=True)
    return track(sequence, label, console=console, transient=True, disable=not console.is_terminal)

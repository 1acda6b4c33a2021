"""Which files a report is about, which of them can be read, and the progress bar of its passes over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from mmtok.errors import DataError, MediaError
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


def readable(chosen: Sequence[Item], read: Callable[[Item], T], noun: str) -> tuple[list[Item], list[T], list[str]]:
    """The files that can be read, what ``read`` gave of each, and a line for each file that cannot.

    Args:
        chosen: the files.
        read: raises MediaError for a file that cannot be read.
        noun: what they are, in the plural, for the message.

    Raises:
        DataError: none can be read.
    """
    kept: list[Item] = []
    found: list[T] = []
    unreadable: list[str] = []
    for item in progress(chosen, "reading"):
        try:
            found.append(read(item))
        except MediaError as error:
            unreadable.append(str(error))
            continue
        kept.append(item)
    if not kept:
        raise DataError(
            f"none of {len(chosen)} {noun} can be read; the first: {unreadable[0]}"
            if chosen
            else f"got no {noun}, expected at least one"
        )
    return kept, found, unreadable


def progress(sequence: Sequence[T], label: str) -> Iterable[T]:
    """The sequence, with a progress bar on stderr while it is gone through, if that is a terminal."""
    console = Console(stderr=True)
    return track(sequence, label, console=console, transient=True, disable=not console.is_terminal)

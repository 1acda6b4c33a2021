"""Units of work: a listing of the documents, cut into pieces that are encoded once each, in any order, by anyone.

``write_listing`` -- normalised documents -> documents.jsonl and its units
``Job``           -- what a worker needs to know
``Worker``        -- encodes units
``Unit``          -- where a unit's documents stand in the listing, and the name of its result

A unit's result is a shard in the build's directory, of long documents several, and ``unit-NAME.json``, which is written
last and says that the unit is done. NAME is a hash of its documents, the vocabulary and the config, so that a
result is never taken for that of other documents, or of files that have changed since. A unit that is encoded twice
gives the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtok.checkpoints import atomic_write
from mmtok.datasets.build.config import EncodeConfig
from mmtok.datasets.build.encode import Encoder
from mmtok.datasets.records import Part, Record, batches, part_of
from mmtok.datasets.shardfile import Shard, write_shard
from mmtok.datasets.shards import TokenDataset, token_dtype
from mmtok.datasets.sources.files import is_url
from mmtok.errors import DataError
from mmtok.multimodal import MultimodalTokenizer
from mmtok.registry import VocabularyRegistry

DOCUMENTS = 256  # in a unit: enough for full batches, few enough to lose little when a build is killed
LINE_BYTES = 2**22  # of a unit's documents in the listing, if one alone has not more
TRIES = 3  # how often a unit is begun in one build
RESULT_TOKENS = 2**22  # of a unit's documents that are held before they are written
LISTING = "documents.jsonl"


@dataclasses.dataclass(frozen=True)
class Unit:
    """Some documents of the listing.

    Attributes:
        name: of its result.
        first: number of its first document.
        documents: how many.
        start, stop: its bytes in the listing.
    """

    name: str
    first: int
    documents: int
    start: int
    stop: int


def write_listing(
    folder: Path, documents: Iterable[dict[str, Any]], salt: str, tick: Callable[[int], None]
) -> list[Unit]:
    """Write the documents, one a line, and cut them into units.

    Args:
        folder: the build's directory.
        documents: normalised.
        salt: goes into the units' names: of what, beside the documents, the result depends.
        tick: called now and then with the number of documents so far.
    """
    units: list[Unit] = []
    start = stop = first = count = 0
    digest = hashlib.sha256()

    def close() -> None:
        nonlocal start, first, count, digest
        if count:
            digest.update(f"{salt} {first}".encode())
            units.append(Unit(digest.hexdigest()[:24], first, count, start, stop))
        start, first, count, digest = stop, first + count, 0, hashlib.sha256()

    with (folder / LISTING).open("wb") as file:
        for document in documents:
            line = json.dumps(document).encode() + b"\n"
            if count == DOCUMENTS or (count and stop - start + len(line) > LINE_BYTES):
                close()
                tick(first)
            file.write(line)
            digest.update(line)
            digest.update(_stamps(document))
            stop += len(line)
            count += 1
    close()
    tick(first)
    return units


def _stamps(document: dict[str, Any]) -> bytes:
    """Size and time of the local files that a document's media lie in: a result is of the files as they were."""
    stamps = []
    for segment in document.get("segments") or ():
        if segment["type"] in ("image", "audio"):
            name = segment.get("path") or segment["table"]
            try:
                info = None if is_url(name) else os.stat(name)
            except (OSError, ValueError):  # whose reason comes when it is read
                info = None
            stamps.append(f"{info.st_size} {info.st_mtime_ns}" if info is not None else "")
    return "\n".join(stamps).encode()


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker needs to know; can be sent to another process or machine that sees the same directories.

    Attributes:
        model: path or name of the vocabulary.
        folder: the build's directory.
        config: how documents become ids.
        root: media paths below it are kept relative to it.
        registry: fingerprint that the vocabulary must have.
        dataset: an older dataset whose documents need no encoding; empty for none.
    """

    model: str
    folder: str
    config: EncodeConfig
    root: str
    registry: str
    dataset: str = ""


class Worker:
    """Encodes units, one after another. Made once in each process.

    Args:
        job: what to do.
        tokenizer: the vocabulary's, if it is loaded already.

    Raises:
        DataError: the build's directory cannot be seen from here, or another vocabulary is found here.
    """

    def __init__(self, job: Job, tokenizer: MultimodalTokenizer | None = None) -> None:
        torch.set_num_threads(1)  # codes are the same for any number of workers; cores are filled with workers
        self.folder = Path(job.folder)
        if not (self.folder / LISTING).is_file():
            raise DataError(f"{self.folder} is not there for this worker; expected a directory that all machines share")
        mm = MultimodalTokenizer.load(job.model) if tokenizer is None else tokenizer
        if mm.registry.fingerprint != job.registry:
            raise DataError(f"{job.model} is another vocabulary for this worker; expected the same one everywhere")
        known = Known(job.dataset, self.folder) if job.dataset else None
        self.registry, self.dtype = mm.registry, token_dtype(mm.registry)
        self.encoder = Encoder(mm, job.config, job.root, known)

    def __call__(self, unit: Unit) -> dict[str, Any]:
        """Encode a unit, if that is not done yet; the contents of its ``unit-NAME.json``."""
        done = read_result(self.folder, unit, self.registry)
        if done is not None:
            return done
        self._count_try(unit)
        left_out: list[dict[str, Any]] = []
        entries = [
            write_shard(
                self.folder,
                f"unit-{unit.name}-{i}",
                [part_of(batch, self.dtype)],
                self.dtype,
                self.registry.fingerprint,
            )
            for i, batch in enumerate(batches(self._records(unit, left_out), RESULT_TOKENS))
        ]
        result = {"unit": unit.name, "shards": entries, "left_out": left_out}
        atomic_write(result_file(self.folder, unit), json.dumps(result).encode())
        (self.folder / f"unit-{unit.name}.tries").unlink(missing_ok=True)
        return result

    def _count_try(self, unit: Unit) -> None:
        """Give up a unit whose worker died ``TRIES`` times: a byte in its file for each time that it was begun."""
        with (self.folder / f"unit-{unit.name}.tries").open("ab") as file:
            if file.tell() >= TRIES:
                last = unit.first + unit.documents - 1
                raise DataError(
                    f"a worker died {TRIES} times while documents {unit.first} to {last} were encoded; is there enough "
                    "memory? Give fewer --workers, or leave out the document that does it, and run it again"
                )
            file.write(b".")

    def _records(self, unit: Unit, left_out: list[dict[str, Any]]) -> Iterator[Record]:
        """The records of a unit; what has none is added to ``left_out``."""
        found = self.encoder.encode(self._documents(unit))
        for number, one in enumerate(found, unit.first):
            if isinstance(one, Record):
                yield one
            else:
                left_out.append({"index": number, **dataclasses.asdict(one)})

    def _documents(self, unit: Unit) -> Iterator[dict[str, Any]]:
        with (self.folder / LISTING).open("rb") as file:
            file.seek(unit.start)
            for _ in range(unit.documents):
                yield json.loads(file.readline())


def result_file(folder: Path, unit: Unit) -> Path:
    """What is written when a unit is done."""
    return folder / f"unit-{unit.name}.json"


def read_result(folder: Path, unit: Unit, registry: VocabularyRegistry) -> dict[str, Any] | None:
    """What was written when a unit was done; None if it is not, or its result is damaged."""
    try:
        result = json.loads(result_file(folder, unit).read_bytes())
        for entry in result["shards"]:
            open_shard(folder, entry, registry).check_all()
    except (OSError, ValueError, KeyError, DataError):
        return None
    return result


def open_shard(folder: Path, entry: dict[str, Any], registry: VocabularyRegistry) -> Shard:
    """A shard of a unit that is done, by its entry in the result."""
    return Shard(folder / entry["file"], entry, token_dtype(registry), registry.fingerprint)


class Parts(Sequence[Part]):
    """Shards of units as parts of a larger one, each mapped only while it is used, so that memory stays small."""

    def __init__(self, folder: Path, entries: Sequence[dict[str, Any]], registry: VocabularyRegistry) -> None:
        self._folder, self._entries, self._registry = folder, entries, registry

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        return open_shard(self._folder, self._entries[index], self._registry).part()


class Known:
    """The documents of an older dataset by their keys: ``known(key)`` -> (ids, spans), or None, also if damaged.

    Args:
        dataset: its directory.
        folder: where ``index_known`` put the index.
    """

    def __init__(self, dataset: str, folder: Path) -> None:
        self._data = TokenDataset.open(dataset)
        self._index = sqlite3.connect(f"{(folder / 'known.sqlite').absolute().as_uri()}?mode=ro", uri=True)

    def __call__(self, key: bytes) -> tuple[np.ndarray, np.ndarray] | None:
        row = self._index.execute("SELECT document FROM known WHERE key = ?", (key,)).fetchone()
        try:
            return None if row is None else (self._data[row[0]], self._data.spans(row[0]))
        except DataError:
            return None


def index_known(dataset: TokenDataset, folder: Path) -> int:
    """Write the index of a dataset's keys, on the disk, so that memory does not grow with it; how many there are."""
    file = folder / "known.sqlite"
    file.unlink(missing_ok=True)
    index = sqlite3.connect(file)
    with index:
        index.execute("PRAGMA journal_mode = OFF")
        index.execute("CREATE TABLE known (key BLOB PRIMARY KEY, document INTEGER) WITHOUT ROWID")
        first = 0
        for shard in dataset.shards:
            rows = ((shard.key(i), first + i) for i in range(shard.documents))
            with contextlib.suppress(DataError):  # of a damaged shard what can be read
                index.executemany("INSERT OR IGNORE INTO known VALUES (?, ?)", rows)
            first += shard.documents
    index.close()
    return first

"""Token datasets: documents as ids in memory-mapped, checked shards, with their spans and what is known of them.

``TokenDataset``  -- a dataset directory as a sequence of int64 arrays
``write_dataset`` -- documents -> such a directory, which appears complete or not at all
``publish``       -- shards that lie in a directory already -> a dataset

    dataset.json                      format, vocabulary fingerprint, dtype, settings, counts, an entry for each shard
    vocab.json                        the vocabulary
    quarantine.5a6b7c8d.jsonl         documents that could not be encoded, each with its reason
    shard-00000.1f2e3d4c.safetensors  see :mod:`mmtok.datasets.shardfile`

The names have a part of the files' sha256, so that a dataset can be replaced while it is read: the new dataset.json
names other files. A document is never split over two shards.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmtok.arrays import integers
from mmtok.checkpoints import atomic_directory, atomic_write, sha256_file
from mmtok.datasets.records import Record, batches, part_of
from mmtok.datasets.shardfile import Shard, write_shard
from mmtok.errors import DataError, VocabularyError
from mmtok.registry import VOCAB_FILE, VocabularyRegistry

FORMAT = 2
DATASET_FILE = "dataset.json"
QUARANTINE = "quarantine"
SHARD_TOKENS = 2**26  # 128 MiB of uint16
_OWN = re.compile(rf"shard-\d{{5,}}\.[0-9a-f]{{8}}\.safetensors|{QUARANTINE}\.[0-9a-f]{{8}}\.jsonl")  # names of files
_LEFT_OUT = {"file": str, "documents": int, "sha256": str}
_ENTRY = {"file": str, "documents": int, "tokens": int, "bytes": int, "sha256": str, "sums": str}
_VALUE = {"registry": str, "vocabulary": str, "dtype": str, "settings": dict, "shards": list, "quarantine": dict}


def token_dtype(registry: VocabularyRegistry) -> np.dtype:
    """The smallest of uint16 and uint32, little-endian, that holds every id of a vocabulary."""
    return np.dtype("<u2" if registry.padded_size <= 2**16 else "<u4")


def write_dataset(
    path: str | Path,
    registry: VocabularyRegistry,
    documents: Iterable[Any],
    shard_tokens: int = SHARD_TOKENS,
    settings: Mapping[str, Any] | None = None,
    quarantine: Iterable[Mapping[str, Any]] = (),
) -> None:
    """Write documents to a dataset directory. It appears, or takes the place of an older dataset, when it is complete.

    Args:
        path: the directory.
        registry: the vocabulary of the ids.
        documents: each a ``Record``, or integers [n], n at least 1; taken one at a time, so that no more than a shard
            is in memory.
        shard_tokens: begin a new shard rather than let one grow beyond so many ids.
        settings: JSON-able: how the documents were made.
        quarantine: JSON-able: the documents that were left out, as ``TokenDataset.quarantined`` gives them.

    Raises:
        DataError: ``path`` holds something other than a token dataset, ``shard_tokens`` is below 1, or a document is
            empty.
        VocabularyError: an id that no block of the vocabulary uses; its document and position are named.
    """
    check_target(path)
    if shard_tokens < 1:
        raise DataError(f"shard_tokens is {shard_tokens}, expected at least 1")
    dtype = token_dtype(registry)
    with atomic_directory(path) as work:
        checked = (_checked(x, number, registry) for number, x in enumerate(documents))
        entries = [
            write_shard(work, stem(number), [part_of(batch, dtype)], dtype, registry.fingerprint)
            for number, batch in enumerate(batches(checked, shard_tokens))
        ]
        publish(work, registry, entries, settings or {}, (json.dumps(x).encode() + b"\n" for x in quarantine))


def stem(number: int) -> str:
    """How the name of a dataset's shard begins."""
    return f"shard-{number:05d}"


def publish(
    path: str | Path,
    registry: VocabularyRegistry,
    entries: list[dict[str, Any]],
    settings: Mapping[str, Any],
    quarantine: Iterable[bytes] = (),
) -> None:
    """Make a dataset of the shards in a directory: dataset.json appears, or takes an older one's place, at the end.

    Args:
        path: the directory, with the shards in it, and with no dataset of another vocabulary.
        registry: their vocabulary.
        entries: what ``write_shard`` returned for each, in order.
        settings: JSON-able: how the documents were made.
        quarantine: a line of JSON for each document that was left out.
    """
    folder = Path(path)
    lines, digest = 0, hashlib.sha256()
    temporary = folder / f".{QUARANTINE}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            for line in quarantine:
                file.write(line)
                digest.update(line)
                lines += 1
            file.flush()
            os.fsync(file.fileno())
        name = f"{QUARANTINE}.{digest.hexdigest()[:8]}.jsonl"
        os.replace(temporary, folder / name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    vocabulary = registry.to_json().encode()
    atomic_write(folder / VOCAB_FILE, vocabulary)
    value = {
        "format": FORMAT,
        "registry": registry.fingerprint,
        "vocabulary": hashlib.sha256(vocabulary).hexdigest(),
        "dtype": token_dtype(registry).name,
        "documents": sum(x["documents"] for x in entries),
        "tokens": sum(x["tokens"] for x in entries),
        "settings": dict(settings),
        "quarantine": {"file": name, "documents": lines, "sha256": digest.hexdigest()},
        "shards": entries,
    }
    atomic_write(folder / DATASET_FILE, _render(value))
    named = {name, *(x["file"] for x in entries)}
    for old in folder.iterdir():
        if _OWN.fullmatch(old.name) and old.name not in named:
            old.unlink()


def check_target(path: str | Path) -> None:
    """Refuse to put a dataset in the place of anything but a dataset, an empty directory or nothing.

    Raises:
        DataError: what is there.
    """
    target = Path(path)
    empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not empty and not (target / DATASET_FILE).is_file():
        raise DataError(f"{path} is there and is no token dataset; expected a free name, or a dataset to replace")


class TokenDataset:
    """Documents of a dataset directory, in order: ``len(d)``, ``d[i]`` -> int64 [n], iteration. Make it with ``open``.

    Attributes:
        path: the directory.
        registry: the vocabulary of the ids.
        dtype: in which they are stored: uint16 or uint32.
        settings: how the documents were made, as the builder recorded it.
        shards: the files, in order.
        tokens: ids in all documents together.
        fingerprint: sha256 of dataset.json, hence of everything in the dataset.
        left_out: how many documents could not be encoded, see ``quarantined``.
    """

    def __init__(self, path: Path, registry: VocabularyRegistry, value: dict[str, Any], check: bool) -> None:
        self.path, self.registry, self.dtype = path, registry, token_dtype(registry)
        self.settings: dict[str, Any] = value["settings"]
        self.fingerprint: str = value["sum"]
        self.left_out: int = value["quarantine"]["documents"]
        self._value, self._check = value, check
        self.shards = tuple(
            Shard(path / x["file"], x, self.dtype, registry.fingerprint, check) for x in value["shards"]
        )
        self.tokens = sum(x.tokens for x in self.shards)
        self._ends = list(itertools.accumulate(x.documents for x in self.shards))

    @classmethod
    def open(cls, path: str | Path, registry: VocabularyRegistry | None = None, check: bool = True) -> TokenDataset:
        """Map a dataset into memory.

        Args:
            path: what ``write_dataset`` or ``mmtok dataset build`` wrote.
            registry: the vocabulary that the caller uses; None takes the one of the dataset.
            check: compare every block of 64 KiB with its sum when it is first read.

        Raises:
            DataError: no dataset, another format, or a file that is missing, damaged or of another size.
            VocabularyError: vocab.json is damaged or is not the vocabulary of the dataset.
            VocabularyMismatchError: the dataset has another vocabulary than ``registry``; the difference is named.
        """
        folder = Path(path)
        value = read_index(folder)
        try:
            own = VocabularyRegistry.from_json((folder / VOCAB_FILE).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{folder / VOCAB_FILE} cannot be read ({error}); build the dataset again") from error
        if own.fingerprint != value["registry"]:
            raise VocabularyError(
                f"{folder / VOCAB_FILE} is the vocabulary {own.fingerprint[:12]}, {DATASET_FILE} names "
                f"{value['registry'][:12]}; put back the {VOCAB_FILE} that the dataset was written with"
            )
        if registry is not None:
            registry.check_same(own, str(path))
        if value["dtype"] != token_dtype(own).name:
            raise DataError(
                f"{folder} has dtype {value['dtype']}, expected {token_dtype(own).name} for {own.padded_size} ids"
            )
        return cls(folder, own, value, check)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenDataset.open, (self.path, None, self._check)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> np.ndarray:
        """The ids of a document, int64 [n]; as in a list, -1 is the last.

        Raises:
            IndexError: no such document.
            DataError: its part of the file is damaged.
        """
        shard, at = self.locate(index)
        return shard.ids(*shard.bounds(at)).astype(np.int64)

    def __iter__(self) -> Iterator[np.ndarray]:
        for shard in self.shards:
            start = 0
            for end in shard.ends.tolist():
                yield shard.ids(start, end).astype(np.int64)
                start = end

    def locate(self, index: int) -> tuple[Shard, int]:
        """The shard that holds a document, and its number there.

        Raises:
            IndexError: no such document.
        """
        i = index + len(self) if index < 0 else index
        if not 0 <= i < len(self):
            raise IndexError(f"document {index}, expected one of {len(self)}")
        number = bisect.bisect_right(self._ends, i)
        return self.shards[number], i - (self._ends[number - 1] if number else 0)

    def spans(self, index: int) -> np.ndarray:
        """The text, image and audio spans of a document, int32 [s, 6]: ``mmtok.datasets.shardfile.SPAN_COLUMNS``."""
        shard, at = self.locate(index)
        return shard.spans(at)

    def span(self, index: int, span: int) -> np.ndarray:
        """The ids of one span of a document, int64 [n], without reading the others.

        Raises:
            IndexError: no such document or span.
        """
        shard, at = self.locate(index)
        rows = shard.spans(at)
        if not -len(rows) <= span < len(rows):
            raise IndexError(f"span {span} of document {index}, expected one of {len(rows)}")
        begin = shard.bounds(at)[0]
        return shard.ids(begin + int(rows[span, 0]), begin + int(rows[span, 1])).astype(np.int64)

    def meta(self, index: int) -> dict[str, Any]:
        """What is known of a document: its id, its segments as in the manifest (without their text), and other keys."""
        shard, at = self.locate(index)
        return shard.meta(at)

    def segments(self, index: int) -> list[dict[str, Any]]:
        """The segments of a document as in the manifest (without their text), with the paths of media made absolute."""
        listed = self.meta(index).get("segments")
        root = str(self.settings.get("root", ""))
        out = []
        for segment in listed if isinstance(listed, list) else []:
            whole = dict(segment) if isinstance(segment, dict) else {}
            key = "path" if "path" in whole else "table"
            place = whole.get(key)
            if root and isinstance(place, str) and "://" not in place and not place.startswith("hf:"):
                whole[key] = os.path.join(root, place)  # what is absolute stays so
            out.append(whole)
        return out

    def image_sizes(self, index: int) -> list[tuple[int, int]]:
        """(H, W) in pixels of each image of a document, in order: what ``MultimodalTokenizer.decode`` crops to."""
        images = [x.modality == "image" for x in self.registry.tokenizers]
        return [(int(row[4]), int(row[5])) for row in self.spans(index) if images[row[2]]]

    def quarantined(self) -> Iterator[dict[str, Any]]:
        """The documents that could not be encoded: index in the source, id, segment, reason.

        Raises:
            DataError: the file is missing or damaged.
        """
        file = self.path / self._value["quarantine"]["file"]
        try:
            with file.open("rb") as handle:
                yield from map(json.loads, handle)
        except (OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read ({error}); build the dataset again") from error

    def check_unchanged(self) -> None:
        """Whether the directory still holds what was opened.

        Raises:
            DataError: another dataset took its place, or a shard has another size.
        """
        if (found := read_index(self.path)["sum"]) != self.fingerprint:
            raise DataError(
                f"{self.path} was changed while it was open: it is dataset {found[:12]}, expected "
                f"{self.fingerprint[:12]}; open it again"
            )
        for shard in self.shards:
            shard.check_size()

    def verify(self) -> None:
        """Compare the sha256 of every file, and every block of the shards, with what is recorded.

        Raises:
            DataError: the first file that was damaged or edited.
        """
        sums = {x["file"]: x["sha256"] for x in (*self._value["shards"], self._value["quarantine"])}
        sums[VOCAB_FILE] = self._value["vocabulary"]
        for name, expected in sums.items():
            try:
                got = sha256_file(self.path / name)
            except OSError as error:
                raise DataError(f"{self.path / name}: {error.strerror}; build the dataset again") from error
            if got != expected:
                raise DataError(
                    f"{self.path / name}: sha256 is {got[:12]}..., {DATASET_FILE} says {expected[:12]}...; "
                    "the file is damaged or was edited: fetch or build the dataset again"
                )
        for shard in self.shards:
            shard.check_all()


def _checked(document: Any, number: int, registry: VocabularyRegistry) -> Record:
    record = document if isinstance(document, Record) else None
    ids = integers(document if record is None else record.ids, f"document {number}")
    if ids.ndim != 1 or not len(ids):
        raise DataError(f"document {number} has shape {list(ids.shape)}, expected [n] with n at least 1")
    try:
        registry.split(ids)
    except VocabularyError as error:
        raise VocabularyError(f"document {number}, {error}") from error
    if record is None:
        return Record(ids, np.zeros((0, 6), np.int32), {"id": str(number)})
    return record._replace(ids=ids)


def _render(value: dict[str, Any]) -> bytes:
    """The bytes of dataset.json: the value, and the sum of it."""
    body = json.dumps({k: v for k, v in value.items() if k != "sum"}, indent=1)
    total = hashlib.sha256(body.encode()).hexdigest()
    return (body.removesuffix("\n}") + f',\n "sum": "{total}"\n}}\n').encode()


def read_index(folder: Path) -> dict[str, Any]:
    """dataset.json of a directory, with every part of the right type, and unchanged.

    Raises:
        DataError: it is missing, of another format, damaged, or was edited.
    """
    file = folder / DATASET_FILE
    try:
        data = file.read_bytes()
        value = json.loads(data)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; expected the directory of a token dataset") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON ({error}); fetch or build the dataset again") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        got = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{file} has format {got!r}; this mmtok reads format {FORMAT}")
    fine = all(isinstance(value.get(k), kind) for k, kind in _VALUE.items())
    fine = fine and all(type(value["quarantine"].get(k)) is kind for k, kind in _LEFT_OUT.items())
    for entry in value["shards"] if fine else []:
        fine &= isinstance(entry, dict) and all(type(entry.get(k)) is kind for k, kind in _ENTRY.items())
        fine = fine and entry["documents"] >= 1 and entry["tokens"] >= 1 and Path(entry["file"]).name == entry["file"]
    if not fine or _render(value) != data:
        raise DataError(f"{file} is damaged or was edited; fetch or build the dataset again")
    return value


def kind_of(reason: str) -> str:
    """A reason without the name of the file, its numbers and what is in brackets, so that equal ones can be counted."""
    head, _, tail = reason.partition(": ")
    text = reason if not tail or re.search(r"\b(got|expected)\b", head) else tail
    return re.sub(r"\d+(\.\d+)?", "#", text.split(" (")[0].split("; ")[0])[:80]

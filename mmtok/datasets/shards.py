"""Token shards: many documents as ids, in files that are memory-mapped and checked.

``write_dataset`` -- documents -> a directory, which appears complete or not at all
``TokenDataset``  -- that directory as a sequence of int64 arrays

    dataset.json         format, registry fingerprint, dtype; documents, tokens and sha256 of each shard
    vocab.json           the vocabulary
    shard-00000.tokens   ids of whole documents one after another, little-endian uint16 or uint32
    shard-00000.offsets  where each document ends, little-endian int64

Raw arrays can be mapped and read at random; a flipped bit in them would be another id, hence the sums. A document is
never split over two shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmtok.arrays import integers
from mmtok.checkpoints import atomic_directory, sha256_file
from mmtok.errors import DataError, VocabularyError
from mmtok.registry import VOCAB_FILE, VocabularyRegistry

FORMAT = 1
DATASET_FILE = "dataset.json"
SHARD_TOKENS = 2**26  # 128 MiB of uint16
KINDS = ("tokens", "offsets")


def token_dtype(registry: VocabularyRegistry) -> np.dtype:
    """The smallest of uint16 and uint32, little-endian, that holds every id of a vocabulary."""
    return np.dtype("<u2" if registry.padded_size <= 2**16 else "<u4")


def write_dataset(
    path: str | Path, registry: VocabularyRegistry, documents: Iterable[Any], shard_tokens: int = SHARD_TOKENS
) -> None:
    """Write documents to a dataset directory. It appears, or takes the place of an older dataset, when it is complete.

    Args:
        path: the directory.
        registry: the vocabulary of the ids.
        documents: integers [n] each, n at least 1; taken one at a time, so memory stays bounded.
        shard_tokens: begin a new shard rather than let one grow beyond so many ids.

    Raises:
        DataError: ``path`` holds something other than a token dataset, ``shard_tokens`` is below 1, or a document is
            empty.
        VocabularyError: an id that no block of the vocabulary uses; its document and position are named.
    """
    check_target(path)
    if shard_tokens < 1:
        raise DataError(f"shard_tokens is {shard_tokens}, expected at least 1")
    with atomic_directory(path) as work:
        shards: list[_Shard] = []
        for number, document in enumerate(documents):
            ids = integers(document, f"document {number}")
            if ids.ndim != 1 or not len(ids):
                raise DataError(f"document {number} has shape {list(ids.shape)}, expected [n] with n at least 1")
            try:
                registry.split(ids)
            except VocabularyError as error:
                raise VocabularyError(f"document {number}, {error}") from error
            if not shards or shards[-1].tokens + len(ids) > shard_tokens:
                if shards:
                    shards[-1].close()
                shards.append(_Shard(work, len(shards), token_dtype(registry)))
            shards[-1].append(ids)
        value = {
            "format": FORMAT,
            "registry": registry.fingerprint,
            "dtype": token_dtype(registry).name,
            "shards": [shard.close() for shard in shards],
        }
        (work / VOCAB_FILE).write_text(registry.to_json(), encoding="utf-8")
        (work / DATASET_FILE).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


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
        shard_sizes: ids in each shard.
        tokens: ids in all documents together.
    """

    def __init__(self, path: Path, registry: VocabularyRegistry, sums: dict[str, str], shards: list[_Arrays]) -> None:
        self.path = path
        self.registry = registry
        self.shard_sizes = tuple(len(tokens) for tokens, _ in shards)
        self.tokens = sum(self.shard_sizes)
        self._sums = sums
        self._shards = shards
        self._ends = np.cumsum([len(ends) for _, ends in shards], dtype=np.int64)

    @classmethod
    def open(cls, path: str | Path, registry: VocabularyRegistry | None = None) -> TokenDataset:
        """Map a dataset into memory and check everything but the sums, which are ``verify``'s.

        Args:
            path: what ``write_dataset`` wrote.
            registry: the vocabulary that the caller uses; None takes the one of the dataset.

        Raises:
            DataError: no dataset, another format, or a file that is missing, damaged or of another size.
            VocabularyError: vocab.json is damaged or is not the vocabulary of the dataset.
            VocabularyMismatchError: the dataset has another vocabulary than ``registry``; the difference is named.
        """
        folder = Path(path)
        value = _read_json(folder)
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
        dtype = token_dtype(own)
        if value["dtype"] != dtype.name:
            raise DataError(f"{folder} has dtype {value['dtype']}, expected {dtype.name} for {own.padded_size} ids")
        sums: dict[str, str] = {}
        shards: list[_Arrays] = []
        for number, entry in enumerate(value["shards"]):
            names = [f"shard-{number:05d}.{kind}" for kind in KINDS]
            tokens = _map(folder / names[0], dtype, entry["tokens"])
            ends = _map(folder / names[1], np.dtype("<i8"), entry["documents"])
            if ends[0] < 1 or ends[-1] != len(tokens) or (ends[1:] <= ends[:-1]).any():
                raise DataError(
                    f"{folder / names[1]} does not rise to the {len(tokens)} ids of its shard; build the dataset again"
                )
            sums.update(zip(names, (entry["sha256"][kind] for kind in KINDS), strict=True))
            shards.append((tokens, ends))
        return cls(folder, own, sums, shards)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> np.ndarray:
        """The ids of a document, int64 [n]; as in a list, -1 is the last.

        Raises:
            IndexError: no such document.
        """
        i = index + len(self) if index < 0 else index
        if not 0 <= i < len(self):
            raise IndexError(f"document {index}, expected one of {len(self)}")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        tokens, ends = self._shards[shard]
        at = i - (int(self._ends[shard - 1]) if shard else 0)
        return tokens[int(ends[at - 1]) if at else 0 : int(ends[at])].astype(np.int64)

    def __iter__(self) -> Iterator[np.ndarray]:
        for tokens, ends in self._shards:
            start = 0
            for end in ends.tolist():
                yield tokens[start:end].astype(np.int64)
                start = end

    def verify(self) -> None:
        """Compare the sha256 of every file with the recorded one.

        Raises:
            DataError: the first file that was damaged or edited.
        """
        for name, expected in self._sums.items():
            got = sha256_file(self.path / name)
            if got != expected:
                raise DataError(
                    f"{self.path / name}: sha256 is {got[:12]}..., {DATASET_FILE} says {expected[:12]}...; "
                    "the file is damaged or was edited: fetch or build the dataset again"
                )


_Arrays = tuple[np.ndarray, np.ndarray]  # the ids of a shard, and where each document ends


class _Shard:
    """A shard while it is written."""

    def __init__(self, folder: Path, number: int, dtype: np.dtype) -> None:
        self.files = [(folder / f"shard-{number:05d}.{kind}").open("wb") for kind in KINDS]
        self.hashes = [hashlib.sha256() for _ in KINDS]
        self.dtype = dtype
        self.documents = self.tokens = 0

    def append(self, ids: np.ndarray) -> None:
        self.documents += 1
        self.tokens += len(ids)
        parts = ids.astype(self.dtype).tobytes(), np.array([self.tokens], "<i8").tobytes()
        for file, digest, data in zip(self.files, self.hashes, parts, strict=True):
            file.write(data)
            digest.update(data)

    def close(self) -> dict[str, Any]:
        """Flush to the disk; the shard's entry in dataset.json."""
        for file in self.files:
            if not file.closed:
                file.flush()
                os.fsync(file.fileno())
                file.close()
        sums = {kind: digest.hexdigest() for kind, digest in zip(KINDS, self.hashes, strict=True)}
        return {"documents": self.documents, "tokens": self.tokens, "sha256": sums}


def _read_json(folder: Path) -> dict[str, Any]:
    """dataset.json, with every part of the right type."""
    file = folder / DATASET_FILE
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; expected the directory of a token dataset") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON ({error}); fetch or build the dataset again") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        got = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{file} has format {got!r}; this mmtok reads format {FORMAT}")
    shards = value.get("shards")
    fine = isinstance(value.get("registry"), str) and isinstance(value.get("dtype"), str) and isinstance(shards, list)
    for entry in shards if isinstance(shards, list) else []:
        counts = isinstance(entry, dict) and [entry.get(key) for key in ("documents", "tokens")]
        sums = isinstance(entry, dict) and entry.get("sha256")
        fine &= isinstance(counts, list) and all(type(n) is int and n >= 1 for n in counts)
        fine &= isinstance(sums, dict) and all(isinstance(sums.get(kind), str) for kind in KINDS)
    if not fine:
        raise DataError(
            f"{file} is damaged: expected registry, dtype, and of each shard documents, tokens and sha256; "
            "fetch or build the dataset again"
        )
    return value


def _map(file: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """``count`` numbers of a file, memory-mapped."""
    try:
        size = file.stat().st_size
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; fetch or build the dataset again") from error
    if size != count * dtype.itemsize:
        raise DataError(
            f"{file} has {size} bytes, expected {count * dtype.itemsize} ({count} of {dtype.name}); it was cut or "
            "belongs to another dataset: fetch or build the dataset again"
        )
    return np.memmap(file, dtype, "r")

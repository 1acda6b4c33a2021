"""A corpus -> a token dataset: exactly once, whatever interrupts it, and the same bytes whoever does the work.

    1. the source is listed in OUT/.build/documents.jsonl and cut into units (``mmtok.datasets.build.units``)
    2. workers encode units, whose results appear in OUT/.build one by one (``mmtok.datasets.build.engines``)
    3. the results are joined to shards in the order of the source, and dataset.json is written: the dataset is there

A build that was stopped, by whatever, goes on where it was when the same command is given again: results that are there
are not made again. If OUT is a dataset already, documents of which it has the key (texts, bytes of the media,
vocabulary and config) are taken from it, and it stays readable until the new one takes its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mmtok.datasets.build import engines
from mmtok.datasets.build.config import REVISION, EncodeConfig, chosen
from mmtok.datasets.build.units import Job, Parts, Unit, index_known, read_result, write_listing
from mmtok.datasets.shardfile import write_shard
from mmtok.datasets.shards import (
    DATASET_FILE,
    SHARD_TOKENS,
    TokenDataset,
    check_target,
    kind_of,
    publish,
    read_index,
    stem,
    token_dtype,
)
from mmtok.datasets.sources import open_source
from mmtok.datasets.sources.files import is_url
from mmtok.errors import DataError, MmtokError, VocabularyError, VocabularyMismatchError
from mmtok.multimodal import MultimodalTokenizer
from mmtok.registry import VocabularyRegistry

WORK, LOCK = ".build", "lock"


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a build is.

    Attributes:
        stage: ``listing``, ``encoding`` or ``joining``.
        documents, of: that are done, and in all.
        tokens: that were made.
        left_out: documents that were quarantined.
        seconds: since the stage began.
    """

    stage: str
    documents: int
    of: int
    tokens: int = 0
    left_out: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        documents, tokens, shards: of the dataset.
        left_out: documents that were quarantined.
        reasons: how many of each kind of reason, most frequent first.
        encoded: documents of the units that this run encoded; the others were there from a run before.
        seconds: that it took.
        fingerprint: of the dataset.
    """

    documents: int
    tokens: int
    shards: int
    left_out: int
    reasons: dict[str, int]
    encoded: int
    seconds: float
    fingerprint: str


def build(
    source: str,
    out: str | Path,
    model: str,
    config: EncodeConfig | None = None,
    *,
    columns: str | None = None,
    engine: str = "local",
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[Progress], None] = lambda _: None,
) -> BuildReport:
    """Encode a corpus into a token dataset.

    Args:
        source: a manifest, folder, WebDataset shards, Parquet or Hugging Face data, see ``open_source``.
        out: the dataset's directory: a free name, an unfinished build, or a dataset of the same vocabulary.
        model: directory or name of a vocabulary, see ``MultimodalTokenizer.load``.
        config: how documents become ids.
        columns: of tables, see ``open_source``.
        engine: ``local`` or ``ray``.
        workers: how many encode at once, a core each; None for all cores.
        shard_tokens: about the size of a shard, in ids.
        progress: called now and then.

    Raises:
        DataError: the source cannot be read or has no documents, ``out`` is something else, or another build is at
            work there.
        VocabularyMismatchError: ``out`` is a dataset of another vocabulary.
        OSError: the disk is full or read-only; the next run goes on.
    """
    started = time.monotonic()
    config = config or EncodeConfig()
    if shard_tokens < 1:
        raise DataError(f"shard_tokens is {shard_tokens}, expected at least 1")
    out = Path(out)
    mm = MultimodalTokenizer.load(model)
    chosen(mm.registry, config)
    older = _older(out, mm.registry)
    place, root = canonical(source)
    with _working(out) as folder, _threads():
        salt = json.dumps([REVISION, mm.registry.fingerprint, config.to_dict(), root], sort_keys=True)
        units = _list(place, columns, folder, salt, progress)
        known = str(out.resolve()) if older is not None and index_known(older, folder) else ""
        job = Job(str(model), str(folder.resolve()), config, root, mm.registry.fingerprint, known)
        wanted = [x for x in units if read_result(folder, x, mm.registry) is None]
        _encode(engine, job, units, wanted, workers or os.cpu_count() or 1, mm, progress)
        entries, reasons = _join(folder, out, units, mm.registry, shard_tokens, progress)
        left_out = sum(reasons.values())
        settings = {"config": config.to_dict(), "root": job.root, "source": source}
        publish(out, mm.registry, entries, settings, _quarantine(folder, units, mm.registry))
        shutil.rmtree(folder)
    made = TokenDataset.open(out)
    return BuildReport(
        len(made), made.tokens, len(entries), left_out, reasons, sum(x.documents for x in wanted),
        time.monotonic() - started, made.fingerprint,
    )  # fmt: skip


def canonical(source: str) -> tuple[str, str]:
    """A source and the directory below which its media are expected, the same however it was given and from wherever.

    Links to directories are followed; one to a file is not, since media lie beside the link. The directory is empty for
    URLs and ``hf:``.
    """
    if is_url(source) or source.startswith("hf:"):
        return source, ""
    if os.path.isdir(source):
        return os.path.realpath(source), os.path.realpath(source)
    plain = source if os.path.lexists(source) else re.split(r"[*?\[{]", source, maxsplit=1)[0]
    root = os.path.realpath(os.path.dirname(plain))
    return os.path.join(root, source[len(os.path.dirname(plain)) :].lstrip("/")), root


def _older(out: Path, registry: VocabularyRegistry) -> TokenDataset | None:
    """The dataset that is in the place of the new one; None if there is none, or it is damaged, hence built anew."""
    if not (out / DATASET_FILE).is_file():
        if not (out / WORK / LOCK).is_file():  # an unfinished build
            check_target(out)
        return None
    try:
        return TokenDataset.open(out, registry)
    except VocabularyMismatchError:
        raise
    except (DataError, VocabularyError) as error:
        try:
            same = read_index(out)["registry"] == registry.fingerprint
        except DataError:
            same = False
        if same:
            return None
        raise DataError(f"{out} cannot be built over ({error}); remove it or give another name") from error


@contextlib.contextmanager
def _working(out: Path) -> Iterator[Path]:
    """The build's directory, for one build at a time; what a killed build left half-written in ``out`` is removed."""
    folder = out / WORK
    made = [x for x in (out, *out.parents) if not x.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise OSError(error.errno, f"the dataset cannot be written there ({error.strerror})", str(out)) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{out}: another build is at work there; wait for it, or stop it") from error
        for pattern in (".shard-*.tmp", ".quarantine.*.tmp", f".{DATASET_FILE}.*", ".vocab.json.*"):
            for file in out.glob(pattern):
                file.unlink()
        for pattern in (".unit-*.tmp", ".unit-*.json.*", "unit-*.tries"):
            for file in folder.glob(pattern):
                file.unlink()
        try:
            yield folder
        except MmtokError:
            if not any(folder.glob("unit-*")):  # nothing was begun
                shutil.rmtree(folder)
                with contextlib.suppress(OSError):  # that are empty
                    for x in made:
                        x.rmdir()
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                text = f"{error.strerror}; what is done is kept: make room and run the same command again"
                raise OSError(error.errno, text, str(out)) from error
            raise


@contextlib.contextmanager
def _threads() -> Iterator[None]:
    """One thread for torch while this process encodes, see ``Worker``; then as many as before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _list(
    source: str, columns: str | None, folder: Path, salt: str, progress: Callable[[Progress], None]
) -> list[Unit]:
    began = time.monotonic()

    def tick(documents: int) -> None:
        progress(Progress("listing", documents, documents, seconds=time.monotonic() - began))

    units = write_listing(folder, open_source(source, columns), salt, tick)
    if not units:
        raise DataError(f"{source}: no documents in it")
    return units


def _encode(
    engine: str,
    job: Job,
    units: Sequence[Unit],
    wanted: Sequence[Unit],
    workers: int,
    tokenizer: MultimodalTokenizer,
    progress: Callable[[Progress], None],
) -> None:
    began, tokens, left_out = time.monotonic(), 0, 0
    of = {x.name: x.documents for x in units}
    total = sum(of.values())
    done = total - sum(x.documents for x in wanted)
    progress(Progress("encoding", done, total))
    if not wanted:
        return
    for result in engines.run(engine, job, wanted, workers, tokenizer):
        done += of[result["unit"]]
        tokens += sum(x["tokens"] for x in result["shards"])
        left_out += len(result["left_out"])
        progress(Progress("encoding", done, total, tokens, left_out, time.monotonic() - began))


def _join(
    folder: Path,
    out: Path,
    units: Sequence[Unit],
    registry: VocabularyRegistry,
    shard_tokens: int,
    progress: Callable[[Progress], None],
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Write the shards, each from the results of whole units; their entries, and the reasons of what is left out."""
    began, dtype, total = time.monotonic(), token_dtype(registry), sum(x.documents for x in units)
    entries: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    group: list[dict[str, Any]] = []
    size = 0

    def close(number: int) -> None:
        if group:
            parts = Parts(folder, group, registry)
            entries.append(write_shard(out, stem(len(entries)), parts, dtype, registry.fingerprint))
        progress(Progress("joining", number, total, seconds=time.monotonic() - began))

    for unit in units:
        result = _result(folder, unit, registry)
        tokens = sum(x["tokens"] for x in result["shards"])
        reasons.update(kind_of(x["reason"]) for x in result["left_out"])
        if group and size + tokens > shard_tokens:
            close(unit.first)
            group, size = [], 0
        group += result["shards"]
        size += tokens
    close(total)
    return entries, dict(reasons.most_common())


def _result(folder: Path, unit: Unit, registry: VocabularyRegistry) -> dict[str, Any]:
    result = read_result(folder, unit, registry)
    if result is None:
        raise DataError(f"{folder}: the result of documents {unit.first} and on is gone; run the same command again")
    return result


def _quarantine(folder: Path, units: Sequence[Unit], registry: VocabularyRegistry) -> Iterator[bytes]:
    for unit in units:
        for line in _result(folder, unit, registry)["left_out"]:
            yield json.dumps(line).encode() + b"\n"

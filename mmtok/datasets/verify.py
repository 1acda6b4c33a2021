"""Everything that can be wrong with a token dataset, found and told one by one.

``faults``  -- the faults of a dataset directory
``Fault``   -- one of them: where, what was got and expected, what to do
``size_of`` -- how many documents and tokens its shards should have

What a trainer relies on is checked, not only that no bit has changed: every document parses under the grammar, and the
table of spans is what the grammar finds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmtok.checkpoints import sha256_file
from mmtok.datasets.chunks import chunks, meta_lines
from mmtok.datasets.records import SPAN_COLUMNS
from mmtok.datasets.shardfile import Shard
from mmtok.datasets.shards import DATASET_FILE, read_index, token_dtype
from mmtok.errors import CheckpointError, DataError, MmtokError, SequenceError, VocabularyError
from mmtok.grammar import Grammar, Span
from mmtok.loading import find_tokenizer, load
from mmtok.registry import VOCAB_FILE, VocabularyRegistry

_AGAIN = "fetch or build the dataset again"


@dataclass(frozen=True)
class Fault:
    """Something that is wrong.

    Attributes:
        message: what was got, what was expected and what to do.
        file: name of the file in the dataset directory.
        document: number of the document in the dataset.
        position: of the id in the document.
    """

    message: str
    file: str
    document: int | None = None
    position: int | None = None

    def __str__(self) -> str:
        places = ((None, self.file), ("document", self.document), ("position", self.position))
        where = ", ".join(f"{name} {x}" if name else str(x) for name, x in places if x is not None)
        return f"{where}: {self.message}"


def faults(
    path: str | Path, tokenizers: bool = False, advance: Callable[[int], object] | None = None
) -> Iterator[Fault]:
    """Find the faults of a dataset, in the order of its files; memory does not grow with it.

    The sha256 of every file and every block's sum; the counts; and of each document in a shard that is as it was
    written: that it parses, that its spans are those that the grammar finds, that the sizes of its pictures and sounds
    go with their codes, and that its meta has an id.

    Args:
        path: the dataset directory.
        tokenizers: load the tokenizers of the vocabulary too and compare their fingerprints.
        advance: is told how many more documents are done.

    Raises:
        DataError: no dataset, another format, or a dataset.json that is damaged, without which nothing can be told.
    """
    folder = Path(path)
    index = read_index(folder)
    yield from _compare(folder, VOCAB_FILE, index["vocabulary"])
    yield from _compare(folder, index["quarantine"]["file"], index["quarantine"]["sha256"])
    yield from _quarantine(folder, index["quarantine"]["file"], index["quarantine"]["documents"])
    registry = None
    try:
        registry = _registry(folder, index["registry"], index["dtype"])
    except MmtokError as error:
        yield Fault(str(error), VOCAB_FILE)
    for key in ("documents", "tokens"):
        if index.get(key) != (total := sum(x[key] for x in index["shards"])):
            yield Fault(f"{index.get(key)} {key}, expected {total} as the shards have; {_AGAIN}", DATASET_FILE)
    if registry is not None and tokenizers:
        yield from _tokenizers(registry, folder)
    grammar = Grammar(registry) if registry is not None else None
    number = 0
    for entry in index["shards"]:
        broken = list(_compare(folder, entry["file"], entry["sha256"], entry["bytes"]))
        yield from broken
        if not broken and grammar is not None:
            yield from _shard(folder, entry, number, grammar, advance)
        elif advance is not None:
            advance(entry["documents"])
        number += entry["documents"]


def size_of(path: str | Path) -> tuple[int, int]:
    """Documents and tokens of a dataset as its dataset.json says; raises as ``faults``."""
    shards = read_index(Path(path))["shards"]
    return sum(x["documents"] for x in shards), sum(x["tokens"] for x in shards)


def _compare(folder: Path, name: str, sha256: str, size: int | None = None) -> Iterator[Fault]:
    """A file that is missing or not the recorded one."""
    try:
        found, got = (folder / name).stat().st_size, sha256_file(folder / name)
    except OSError as error:
        yield Fault(f"{error.strerror or error}, expected a file; {_AGAIN}", name)
        return
    if size is not None and found != size:
        yield Fault(f"{found} bytes, expected {size}: it was cut or is another file; {_AGAIN}", name)
    elif got != sha256:
        yield Fault(f"sha256 {got[:12]}..., expected {sha256[:12]}...: it is damaged or was edited; {_AGAIN}", name)


def _registry(folder: Path, fingerprint: str, dtype: str) -> VocabularyRegistry:
    try:
        registry = VocabularyRegistry.from_json((folder / VOCAB_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read ({error}); put back that of the dataset") from error
    if registry.fingerprint != fingerprint:
        raise VocabularyError(
            f"is the vocabulary {registry.fingerprint[:12]}, expected {fingerprint[:12]}; put back that of the dataset"
        )
    if token_dtype(registry).name != dtype:
        raise VocabularyError(f"its ids need {token_dtype(registry).name}, the dataset has {dtype}; {_AGAIN}")
    return registry


def _quarantine(folder: Path, name: str, count: int) -> Iterator[Fault]:
    """The list of what was left out."""
    lines = 0
    try:
        with (folder / name).open("rb") as file:
            for lines, line in enumerate(file, 1):
                value = _json(line)
                if not isinstance(value, dict) or "reason" not in value:
                    yield Fault(f"line {lines} is no JSON object with a reason; {_AGAIN}", name)
    except OSError:
        return  # said already
    if lines != count:
        yield Fault(f"{lines} lines, expected {count}, as {DATASET_FILE} says; {_AGAIN}", name)


def _tokenizers(registry: VocabularyRegistry, folder: Path) -> Iterator[Fault]:
    for spec in registry.tokenizers:
        try:
            got = load(find_tokenizer(spec.name, folder)).fingerprint
        except CheckpointError as error:
            yield Fault(str(error), VOCAB_FILE)
            continue
        if got != spec.fingerprint:
            yield Fault(
                f"the tokenizer {spec.name!r} at hand has fingerprint {got[:12]}, expected {spec.fingerprint[:12]}: "
                "its codes mean something else; put the one beside the dataset that it was built with",
                VOCAB_FILE,
            )


def _shard(
    folder: Path, entry: dict[str, Any], number: int, grammar: Grammar, advance: Callable[[int], object] | None
) -> Iterator[Fault]:
    """The faults of a shard's documents, of which the first is ``number``."""
    name, registry = entry["file"], grammar.registry
    try:
        shard = Shard(folder / name, entry, token_dtype(registry), registry.fingerprint)
        shard.check_all()
        for first, part in chunks(shard):
            at = number + first
            tokens, spans = (np.split(x, part.documents[:-1, i]) for i, x in enumerate((part.tokens, part.spans)))
            for document, (ids, rows, line) in enumerate(zip(tokens, spans, meta_lines(part), strict=True), at):
                for fault in (*_ids(grammar, ids, rows), *_meta(line)):
                    yield dataclasses.replace(fault, file=name, document=document)
            if advance is not None:
                advance(len(part.documents))
    except DataError as error:
        yield Fault(str(error), name)


def _ids(grammar: Grammar, ids: np.ndarray, rows: np.ndarray) -> Iterator[Fault]:
    """A document that breaks the grammar, and a table of spans that is not that of the document."""
    try:
        found = [span for span in grammar.spans(ids) if span.tokenizer]
    except SequenceError as error:
        yield Fault(f"got {error.got}, expected {error.expected}; {_AGAIN}", "", position=error.position)
        return
    specs = grammar.registry.tokenizers
    index = {spec.name: i for i, spec in enumerate(specs)}
    want = np.array([(x.start, x.end, index[x.tokenizer]) for x in found], np.int64).reshape(-1, 3)
    if len(rows) != len(want):
        yield Fault(f"{len(rows)} spans, expected {len(want)} as the grammar finds; {_AGAIN}", "")
        return
    for wrong in np.flatnonzero((rows[:, :3] != want).any(1)).tolist()[:1]:
        got, right = (dict(zip(SPAN_COLUMNS, x[wrong, :3].tolist(), strict=False)) for x in (rows, want))
        yield Fault(f"span {wrong} is {got}, expected {right}; {_AGAIN}", "", position=int(want[wrong, 0]))
    segments = rows[:, 3].tolist()
    if segments != sorted(segments) or (segments and segments[0] < 0):
        yield Fault(f"spans of the segments {segments}, expected numbers that rise; {_AGAIN}", "")
    for number, (span, (first, second)) in enumerate(zip(found, rows[:, 4:].tolist(), strict=True)):
        if fault := _sizes(grammar, span, first, second):
            yield Fault(f"span {number} is {fault}; {_AGAIN}", "", position=span.start)


def _sizes(grammar: Grammar, span: Span, first: int, second: int) -> str:
    """What is wrong with the sizes of a span, of which two zeros say nothing; empty if nothing is."""
    properties = grammar.registry.tokenizer(span.tokenizer).properties
    if first == second == 0:
        return ""
    if span.kind == "text":
        return f"a text of {first} bytes and {second}, expected 1 or more and 0" if first < 1 or second else ""
    if span.kind == "image":
        factor = properties.get("downsample")
        fits = min(first, second) >= 1 and (not factor or (-(-first // factor), -(-second // factor)) == span.shape[:2])
        grid = f"{span.shape[0]}x{span.shape[1]}"
        return "" if fits else f"an image of {first}x{second} pixels, expected a size that has {grid} codes"
    rate, hop = properties.get("sample_rate", second), properties.get("hop")
    most = span.shape[1] * hop if hop else first
    fits = second == rate and 0 <= first <= most and (first > 0) == (span.shape[1] > 0)
    return "" if fits else f"a sound of {first} samples at {second} Hz, expected up to {most} at {rate} Hz"


def _meta(line: bytes) -> Iterator[Fault]:
    value = _json(line)
    if not isinstance(value, dict) or "id" not in value:
        yield Fault(f"its meta is {line[:60]!r}, expected a JSON object with an id; {_AGAIN}", "")


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None

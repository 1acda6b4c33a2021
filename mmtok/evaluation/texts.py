"""The figures of text tokenizers: tokens by language, what comes back, which ids are used, and speed.

``Text``         -- one text with its language
``read_texts``   -- the texts of any source
``language_of``  -- what a document says, else the script of its letters
``texts_report`` -- the figures of one tokenizer
``encode_speed`` -- its rate beside that of ``tokenizers``
"""

from __future__ import annotations

import os
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from mmtok.datasets.sources import open_source
from mmtok.datasets.sources.manifest import SUFFIXES
from mmtok.errors import DataError
from mmtok.text import ByteLevelTokenizer, TextTokenizer
from mmtok.training.corpus import split_of

_BATCH = 4_000_000  # characters encoded at once
_PIECE = 65_536  # characters of a text file that are one document
_LETTERS = 2000  # of a text that tell its script


class Text(NamedTuple):
    """One text segment: the name of its document and its place there, its split, language, and text."""

    name: str
    split: str
    language: str
    text: str


def read_texts(source: str | Path, columns: str | None = None, unreadable: list[str] | None = None) -> Iterator[Text]:
    """Every text of a source that is not empty, as a stream.

    Args:
        source: what :func:`mmtok.datasets.sources.open_source` takes, or one text file, of which each 65,536 characters
            and the rest of the line are a document.
        columns: of a table.
        unreadable: a line is added for each document that cannot be used; None leaves them out silently.

    Raises:
        DataError: the source cannot be read.
    """
    path = Path(source)
    one = path.suffix.lower() in SUFFIXES["text"] and path.is_file()
    for document in _text_file(path) if one else open_source(source, columns):
        if "error" in document:
            if unreadable is not None:
                unreadable.append(document["error"])
            continue
        split = str(document.get("split") or split_of(document["id"]))
        for number, segment in enumerate(document["segments"]):
            if segment["type"] == "text" and segment["text"]:
                yield Text(f"{document['id']}:{number}", split, language_of(document, segment), segment["text"])


def _text_file(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            number = 0
            while text := file.read(_PIECE) + file.readline(_PIECE):
                yield {"id": f"{path.name}:{number}", "segments": [{"type": "text", "text": text}]}
                number += 1
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"{path}: cannot be read as text ({reason})") from error


def language_of(document: Mapping[str, Any], segment: Mapping[str, Any]) -> str:
    """What the segment or its document names as ``language``; else the commonest script of its first letters."""
    named = segment.get("language") or document.get("language")
    if named:
        return str(named)
    words: Counter[str] = Counter()
    for character in filter(str.isalpha, segment["text"][:_LETTERS]):
        words[unicodedata.name(character, "unknown").split(" ")[0]] += 1
    return f"{words.most_common(1)[0][0].title()} script" if words else "no letters"


def texts_report(tokenizer: TextTokenizer, texts: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Figures of one tokenizer on (language, text) pairs, which are read once, as a stream.

    Returns:
        ``documents``, ``identical`` (documents that come back the same), ``bytes``, ``tokens``, ``bytes_per_token``,
        ``mean_of_languages`` (of their bytes per token, each language alike), ``vocabulary``, ``unused_ids``, and for
        each of ``languages``, the largest first, the like with ``tokens_per_word`` (words are what white space
        separates) and ``tokens_per_character``.
    """
    sums: dict[str, Counter[str]] = {}
    used = np.zeros(tokenizer.codebook_sizes[0], bool)
    for batch in _batches(texts):
        ids = tokenizer.encode([text for _, text in batch])
        used[np.concatenate(ids)] = True
        for (language, text), own, back in zip(batch, ids, tokenizer.decode(ids), strict=True):
            sums.setdefault(language, Counter()).update(
                documents=1, identical=back == text, bytes=len(text.encode()), characters=len(text),
                words=len(text.split()), tokens=len(own),
            )  # fmt: skip
    total = sum(sums.values(), Counter())
    languages = {x: _figures(sums[x]) for x in sorted(sums, key=lambda x: (-sums[x]["bytes"], x))}
    each = [figures["bytes_per_token"] for figures in languages.values()]
    return {
        **_figures(total),
        "mean_of_languages": round(sum(each) / max(1, len(each)), 3),
        "vocabulary": len(used),
        "unused_ids": int((~used).sum()),
        "languages": languages,
    }


def _batches(texts: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    size = 0
    for pair in texts:
        batch.append(pair)
        size += len(pair[1])
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _figures(sums: Counter[str]) -> dict[str, Any]:
    return {
        **{key: sums[key] for key in ("documents", "identical", "bytes", "tokens")},
        "bytes_per_token": round(sums["bytes"] / max(1, sums["tokens"]), 3),
        "tokens_per_word": round(sums["tokens"] / max(1, sums["words"]), 3),
        "tokens_per_character": round(sums["tokens"] / max(1, sums["characters"]), 3),
    }


def encode_speed(tokenizer: TextTokenizer, texts: Sequence[str], repeats: int = 3) -> dict[str, Any]:
    """Rates of encoding, the best of several runs over the same texts, so with warm caches.

    Returns:
        ``megabytes_per_second``; of a tokenizer.json also ``engine``, that of ``tokenizers``' ``encode_batch_fast`` in
        the same process, and the ``ratio``; ``threads``: those that both may use.
    """
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    own = megabytes / min(_seconds(tokenizer.encode, texts) for _ in range(repeats))
    out: dict[str, Any] = {
        "megabytes_per_second": round(own, 2),
        "threads": int(os.environ.get("RAYON_NUM_THREADS") or os.cpu_count() or 1),
    }
    if isinstance(tokenizer, ByteLevelTokenizer):
        reference = Tokenizer.from_str(tokenizer.tokenizer_json)
        seconds = min(_seconds(reference.encode_batch_fast, texts, add_special_tokens=False) for _ in range(repeats))
        out |= {
            "engine": tokenizer.engine,
            "tokenizers_megabytes_per_second": round(megabytes / seconds, 2),
            "ratio": round(own * seconds / megabytes, 2),
        }
    return out


def _seconds(action: Any, *arguments: Any, **keywords: Any) -> float:
    started = time.perf_counter()
    action(*arguments, **keywords)
    return time.perf_counter() - started

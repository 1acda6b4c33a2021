"""What ``mmtok evaluate`` does for text tokenizers: tokens by language, what comes back, unused ids and speed."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtok.cli.tables import print_table
from mmtok.errors import DataError
from mmtok.evaluation.texts import Text, encode_speed, read_texts, texts_report
from mmtok.text import TextTokenizer
from mmtok.training.corpus import bucket

_SHOWN = 40  # languages in the table; all are in the report
_TIMED = 8_000_000  # characters


def evaluate_texts(
    tokenizers: Mapping[str, TextTokenizer], data: Path, split: str | None, limit: int | None
) -> tuple[dict[str, Any], str | None]:
    """Measure.

    Args:
        tokenizers: by the names that the report gives them.
        data: any source of documents.
        split: train, val or test; None: all of a folder, val of anything else.
        limit: at most so many texts, spread over the data by the hash of their names.

    Returns:
        The report, and the split.

    Raises:
        DataError: the data cannot be read, or has no such text.
    """
    if split is None and not data.is_dir():
        split = "val"
    unreadable: list[str] = []
    found = (text for text in read_texts(data, unreadable=unreadable) if split in (None, text.split))
    texts = list(found) if limit is None else heapq.nsmallest(limit, found, key=_order)
    if not texts:
        raise DataError(f"{data}: no text" + (f" in split {split!r}" if split else " in it"))
    timed: list[str] = []
    size = 0
    for text in sorted(texts, key=_order):
        if size + len(text.text) <= _TIMED or not timed:
            timed.append(text.text)
            size += len(text.text)
    made = {}
    for name, tokenizer in tokenizers.items():
        figures = texts_report(tokenizer, ((text.language, text.text) for text in texts))
        made[name] = {"fingerprint": tokenizer.fingerprint, **figures, "speed": encode_speed(tokenizer, timed)}
    return {"texts": len(texts), "unreadable": unreadable, "tokenizers": made}, split


def _order(text: Text) -> tuple[int, str]:
    return bucket(text.name), text.name


def show_texts(report: dict[str, Any]) -> None:
    """Print the figures of each tokenizer, and of each language."""
    tokenizers = report["tokenizers"]
    first = next(iter(tokenizers.values()))
    languages = list(first["languages"])
    size = f"{first['bytes'] / 1e6:.3g} MB"
    print(f"{report['texts']} texts, {size}, {len(languages)} languages, {len(report['unreadable'])} unreadable\n")
    print_table(
        ("tokenizer", "ids", "unused", "bytes/token", "mean of languages", "identical", "encode MB/s", "tokenizers"),
        (
            (
                name,
                f["vocabulary"],
                f"{f['unused_ids'] / f['vocabulary']:.1%}",
                f"{f['bytes_per_token']:.3f}",
                f"{f['mean_of_languages']:.3f}",
                f"{f['identical']}/{f['documents']}",
                _speed(f["speed"]),
                f["speed"].get("tokenizers_megabytes_per_second", "-"),
            )
            for name, f in tokenizers.items()
        ),
    )
    print("\nbytes per token, tokens per word, tokens per character")
    print_table(
        ("language", "bytes", *tokenizers),
        (
            (
                language,
                first["languages"][language]["bytes"],
                *(_cell(f["languages"][language]) for f in tokenizers.values()),
            )
            for language in languages[:_SHOWN]
        ),
    )
    if len(languages) > _SHOWN:
        print(f"and {len(languages) - _SHOWN} more, see report.json")


def _speed(speed: dict[str, Any]) -> str:
    engine = f" ({speed['engine']})" if "engine" in speed else ""
    return f"{speed['megabytes_per_second']}{engine}"


def _cell(figures: dict[str, Any]) -> str:
    keys = ("bytes_per_token", "tokens_per_word", "tokens_per_character")
    return "  ".join(f"{figures[key]:.3f}" for key in keys)

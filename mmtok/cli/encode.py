"""``mmtok encode``: text, image and audio files to ids."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from mmtok.cli.generate import IMAGE_SIZE
from mmtok.cli.tables import print_table
from mmtok.documents import Document, Text, load_segment
from mmtok.errors import ConfigError, VocabularyError
from mmtok.multimodal import MultimodalTokenizer, Segment
from mmtok.registry import MODALITIES
from mmtok.sequences import Entry, write_ids


def encode(
    files: Annotated[list[Path], typer.Argument(help="Text, image and audio files, in order.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", dir_okay=False, help="The file to write.")] = Path("ids.json"),
    model: Annotated[
        str, typer.Option(help="Vocabulary: a vocab.json, a directory with one, or the name of a bundled model.")
    ] = "any-to-any",
    use: Annotated[
        list[str] | None, typer.Option(help="MODALITY=NAME: another tokenizer than the first of a modality.")
    ] = None,
    image_size: Annotated[
        int, typer.Option(min=0, help="Fit pictures into a square of so many pixels; 0 keeps their size.")
    ] = IMAGE_SIZE,
    separate: Annotated[bool, typer.Option("--separate", help="Make a document of each file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Encode files to ids of one vocabulary.

    The files become one document, in their order. The vocabulary goes into the output with the ids, so that
    mmtok decode and mmtok vocab migrate know what they mean.

    Example: mmtok encode cow.png word.ogg note.txt -o ids.json
    """
    segments = [load_segment(path) for path in files]
    torch.set_num_threads(min(2, torch.get_num_threads()))
    tokenizer = MultimodalTokenizer.load(model)
    chosen = _chosen(use or [], tokenizer)
    fitted = [tokenizer.fit(segment, image_size or None, chosen.get("image")) for segment in segments]
    parts = list(zip(files, fitted, strict=True))
    groups = [[part] for part in parts] if separate else [parts]
    documents: list[Entry] = []
    entries = []
    for group in groups:
        document = Document(tuple(segment for _, segment in group))
        ids = tokenizer.encode(document, use=chosen)
        name = _text(group[0][0].stem if separate else out.stem)
        documents.append(Entry(name, ids, tokenizer.sizes(document)))
        entries.append({"name": name, "tokens": len(ids), "segments": _segments(tokenizer, ids, group)})
    write_ids(out, tokenizer.registry, documents)
    report = {
        "file": str(out),
        "model": model,
        "vocabulary": tokenizer.registry.fingerprint,
        "tokens": sum(len(document.ids) for document in documents),
        "documents": entries,
    }
    if as_json:
        print(json.dumps(report))
    else:
        _show(report)


def _text(name: str) -> str:
    """The name of a file, whose bytes may be no text, as text."""
    return os.fsencode(name).decode(errors="replace")


def _chosen(use: Sequence[str], tokenizer: MultimodalTokenizer) -> dict[str, str]:
    """``["audio=NAME"]`` to ``{"audio": NAME}``, each a tokenizer of the vocabulary."""
    chosen = named(use)
    for modality, name in chosen.items():
        try:
            chosen[modality] = tokenizer.choose(modality, name).name
        except VocabularyError as error:
            raise ConfigError(f"--use {modality}={name}: {error}") from error
    return chosen


def named(use: Sequence[str]) -> dict[str, str]:
    """``["audio=NAME"]`` to ``{"audio": NAME}``."""
    chosen: dict[str, str] = {}
    for item in use:
        modality, _, name = item.partition("=")
        if modality not in MODALITIES or not name:
            raise ConfigError(f"got --use {item!r}, expected MODALITY=NAME with one of {', '.join(MODALITIES)}")
        if modality in chosen:
            raise ConfigError(f"--use is given twice for {modality!r}; give it once")
        chosen[modality] = name
    return chosen


def _segments(
    tokenizer: MultimodalTokenizer, ids: np.ndarray, parts: Sequence[tuple[Path, Segment]]
) -> list[dict[str, Any]]:
    """A row for each segment of a document, with the files that it came from: texts that follow each other are one."""
    rows: list[dict[str, Any]] = []
    spans = (span for span in tokenizer.grammar.spans(ids) if span.kind != "control")
    for path, segment in parts:
        if segment == Text(""):
            continue
        if isinstance(segment, Text) and rows and rows[-1]["modality"] == "text":
            rows[-1]["files"].append(str(path))
            continue
        span = next(spans)
        own = ids[span.start : span.end]
        rows.append(
            {
                "files": [str(path)],
                "modality": span.kind,
                "tokenizer": span.tokenizer,
                "shape": list(span.shape),
                "start": span.start,
                "end": span.end,
                "tokens": len(own),
                "lowest_id": int(own.min()),
                "highest_id": int(own.max()),
            }
        )
    return rows


def _show(report: dict[str, Any]) -> None:
    print_table(
        ("document", "file", "modality", "tokenizer", "tokens", "positions", "ids"),
        (
            (
                entry["name"],
                " + ".join(s["files"]),
                s["modality"],
                s["tokenizer"],
                s["tokens"],
                f"{s['start']}..{s['end'] - 1}",
                f"{s['lowest_id']}..{s['highest_id']}",
            )
            for entry in report["documents"]
            for s in entry["segments"]
        ),
    )
    print(f"{report['tokens']} ids with <bos> and <eos>, vocabulary {report['vocabulary'][:12]}: {report['file']}")

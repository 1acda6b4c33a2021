"""``mmtok decode``: ids to text, image and audio files."""

from __future__ import annotations

import json
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mmtok.cli.tables import print_table
from mmtok.documents import Document, Turn, save_document
from mmtok.errors import DataError, MediaError, SequenceError
from mmtok.multimodal import MultimodalTokenizer
from mmtok.sequences import read_ids


class Policy(StrEnum):
    """What to do with ids that break the grammar."""

    strict = "strict"
    repair = "repair"
    drop = "drop"


def decode(
    file: Annotated[Path, typer.Argument(help="An ids.json.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", file_okay=False, help="Directory for the media.")] = Path(
        "decoded"
    ),
    model: Annotated[
        str, typer.Option(help="Vocabulary: a vocab.json, a directory with one, or the name of a bundled model.")
    ] = "any-to-any",
    policy: Annotated[
        Policy, typer.Option(help="Ids that break the grammar: refuse, repair the segment, or drop it.")
    ] = Policy.strict,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Decode ids to the texts, pictures and sounds that they stand for.

    The ids must be of the model's vocabulary. Several documents go to one sub-directory each.

    Example: mmtok decode ids.json --out decoded
    """
    registry, documents = read_ids(file)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    tokenizer = MultimodalTokenizer.load(model)
    tokenizer.registry.check_same(registry, str(file))
    decoded: list[tuple[str, Document, list[dict[str, Any]]]] = []
    for name, ids, sizes in documents:
        edits: list[dict[str, Any]] = []
        if policy is Policy.strict:
            try:
                document = tokenizer.decode(ids, sizes)
            except (SequenceError, MediaError) as error:
                raise DataError(f"{file}, document {name!r}, {error}; --policy repair or drop goes on") from error
        else:
            document, recovery = tokenizer.recover(ids, "repair" if policy is Policy.repair else "drop", sizes)
            edits = [
                {"action": e.action, "position": e.position, "count": e.count, "what": e.what, "text": str(e)}
                for e in recovery.edits
            ]
        decoded.append((name, document, edits))
    entries = []
    for number, (name, document, edits) in enumerate(decoded):
        # The name is the file's, not ours: no part of it may lead out of the directory.
        folder = out / f"{number}_{re.sub(r'[^A-Za-z0-9_-]', '_', name)[:60]}" if len(decoded) > 1 else out
        paths = iter(save_document(document, folder))
        kinds = [type(segment).__name__.lower() for segment in document.segments if not isinstance(segment, Turn)]
        files = [{"modality": kind, "file": str(next(paths))} for kind in kinds]
        entries.append({"name": name, "files": files, "edits": edits})
    report = {"model": model, "vocabulary": registry.fingerprint, "policy": policy.value, "documents": entries}
    if as_json:
        print(json.dumps(report))
    else:
        _show(report)


def _show(report: dict[str, Any]) -> None:
    print_table(
        ("document", "modality", "file"),
        ((entry["name"], x["modality"], x["file"]) for entry in report["documents"] for x in entry["files"]),
    )
    for entry in report["documents"]:
        for edit in entry["edits"]:
            print(f"{entry['name']}: {edit['text']}")

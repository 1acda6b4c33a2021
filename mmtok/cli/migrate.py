"""``mmtok vocab migrate``: data and models from one vocabulary to another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mmtok import migration
from mmtok.checkpoints import read_checkpoint, resolve
from mmtok.datasets.shards import DATASET_FILE
from mmtok.errors import CheckpointError
from mmtok.export import read_vocabulary, refuse_other
from mmtok.registry import VocabularyRegistry
from mmtok.transformer.model import KIND


def migrate(
    source: Annotated[
        str,
        typer.Argument(
            help="An ids.json, a token dataset, or a transformer's directory or bundled name.", show_default=False
        ),
    ],
    to: Annotated[str, typer.Option("--to", help="The new vocabulary: a vocab.json or a directory with one.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file or directory to write.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Move ids, a token dataset or a transformer to another vocabulary, and prove that nothing changed.

    No file is encoded again: ids are mapped, and laid out anew where a codebook layout changed. Of a transformer the
    embedding rows move; its scores are compared with the old ones.

    Example: mmtok vocab migrate any-to-any --to larger/vocab.json -o larger-model
    """
    registry, _ = read_vocabulary(to)
    torch.set_num_threads(1)  # a forward pass of a short sequence is too short to share
    path = Path(source)
    if (path / DATASET_FILE).is_file():
        figures = _data("dataset", migration.migrate_dataset(path, out, registry))
    elif path.is_file():
        figures = _data("ids", migration.migrate_ids(path, out, registry))
    else:
        figures = _transformer(source, out, registry)
    report = {"source": source, "out": str(out), "vocabulary": registry.fingerprint, **figures}
    if as_json:
        print(json.dumps(report))
    else:
        _show(report)


def _data(kind: str, done: migration.DataReport) -> dict[str, Any]:
    return {
        "kind": kind,
        "documents": done.documents,
        "tokens": done.tokens_before,
        "tokens_after": done.tokens_after,
        "laid_out_anew": list(done.relaid),
        "without_counterpart": list(done.dropped),
    }


def _transformer(source: str, out: Path, registry: VocabularyRegistry) -> dict[str, Any]:
    try:
        resolve(source)
    except CheckpointError as error:
        raise CheckpointError(
            f"nothing to migrate at {source!r}: expected an ids.json, a token dataset (a directory with "
            f"{DATASET_FILE}), or the directory or bundled name of a transformer"
        ) from error
    refuse_other(out, registry)
    meta, config, _, _ = read_checkpoint(source)
    model, proof = migration.migrate_transformer(source, registry)
    extra = {key: value for key, value in meta.items() if key not in ("format", "kind", "sha256")}
    stored = getattr(torch, json.loads(config).get("torch_dtype", "float32"))
    model.save(out, registry.to_json(), {**extra, "migrated_from": meta["registry"]}, stored)
    return {
        "kind": KIND,
        "sequences": proof.sequences,
        "tokens": proof.tokens,
        "ids_compared": proof.columns,
        "largest_logit": proof.largest_logit,
        "largest_logit_difference": proof.largest_difference,
        "without_counterpart": list(proof.dropped),
    }


def _show(report: dict[str, Any]) -> None:
    print(f"{report['source']} -> {report['out']}, vocabulary {report['vocabulary'][:12]}")
    if report["kind"] == KIND:
        print(
            f"scores of {report['ids_compared']} ids after {report['tokens']} random tokens in {report['sequences']} "
            f"sequences differ by at most {report['largest_logit_difference']:.3g} (they reach "
            f"{report['largest_logit']:.3g})"
        )
    else:
        many = "s" * (report["documents"] != 1)
        proof = "equal codes segment by segment" if report["laid_out_anew"] else "mapped back they are the original"
        print(
            f"{report['documents']} document{many}, {report['tokens']} tokens before, {report['tokens_after']} after; "
            f"{proof}"
        )
        if report["laid_out_anew"]:
            print(f"laid out anew: {', '.join(report['laid_out_anew'])}")
    gone = report["without_counterpart"]
    print("ids without counterpart: " + ("; ".join(gone) or "none"))

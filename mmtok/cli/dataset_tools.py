"""``mmtok dataset verify``, ``report`` and ``export``: what to do with a dataset that is built."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmtok.cli.tables import print_table
from mmtok.datasets.export.flat import export_flat
from mmtok.datasets.export.megatron import export_megatron
from mmtok.datasets.export.parquet import export_parquet
from mmtok.datasets.export.webdataset import export_webdataset
from mmtok.datasets.report import write_report
from mmtok.datasets.shards import TokenDataset
from mmtok.datasets.verify import faults, size_of
from mmtok.evaluation.plots import spectrogram

SHOWN = 50  # faults that are told one by one


class Format(StrEnum):
    """What can be asked for with --format."""

    megatron = "megatron"
    flat = "flat"
    parquet = "parquet"
    webdataset = "webdataset"


_EXPORTS = {
    Format.megatron: export_megatron,
    Format.flat: export_flat,
    Format.parquet: export_parquet,
    Format.webdataset: export_webdataset,
}
Dataset = Annotated[Path, typer.Argument(metavar="DIR", help="What mmtok dataset build wrote.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")]


def verify(
    path: Dataset,
    tokenizers: Annotated[
        bool, typer.Option("--tokenizers", help="Load the vocabulary's tokenizers too and compare their fingerprints.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every file and every document of a dataset.

    Sums of files and blocks, vocabulary, grammar, spans, sizes, counts. Each fault is a line, the first 50 are told;
    the exit code is 2 if there is any.

    Example: mmtok dataset verify tokens --tokenizers
    """
    count, tokens = size_of(path)
    first: list[str] = []
    total, began = 0, time.perf_counter()
    with _progress("verifying", count) as advance:
        for fault in faults(path, tokenizers, advance):
            total += 1
            if total <= SHOWN:
                first.append(str(fault))
    seconds = time.perf_counter() - began
    if as_json:
        rates = {"seconds": round(seconds, 3), "documents_per_second": round(count / max(seconds, 1e-9), 1)}
        print(json.dumps({"documents": count, "tokens": tokens, "faults": total, "first": first, **rates}))
    else:
        for line in first:
            print(line)
        if total > SHOWN:
            print(f"and {total - SHOWN} more")
        print(f"{total or 'no'} fault{'s' * (total != 1)} in {count:,} documents, {tokens:,} tokens; {seconds:.1f} s")
    if total:
        raise typer.Exit(2)


def report(
    path: Dataset,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", dir_okay=False, help="The page to write.")] = Path(
        "report.html"
    ),
    samples: Annotated[int, typer.Option(min=0, max=200, help="Documents to show beside their originals.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of these documents.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Write a page to look at: counts, charts, and documents decoded beside their originals.

    It is one HTML file without scripts that loads nothing, so it can be sent and opened anywhere. Tokenizers are
    looked for in the dataset's directory, beside it and among the bundled ones; originals where the manifest had them.

    Example: mmtok dataset report tokens -o report.html --samples 20
    """
    torch.set_num_threads(min(2, torch.get_num_threads()))
    dataset = TokenDataset.open(path)
    with _progress("counting", len(dataset)) as advance:
        about = write_report(dataset, out, samples, seed, spectrogram, advance)
    if as_json:
        print(json.dumps({"out": str(out), **about}))
        return
    if about["not_decoded"]:
        print(f"nothing is decoded: {about['not_decoded']}")
    if about["missing_originals"]:
        print(f"originals that cannot be read: {about['missing_originals']}")
    print(f"written {out}: {about['bytes'] / 1e6:.1f} MB, {len(about['samples'])} documents to look at")


def export(
    path: Dataset,
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="OUT", file_okay=False, help="The directory to write.", show_default=False),
    ],
    to: Annotated[Format, typer.Option("--format", help="What to write.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Write a dataset as another trainer reads it.

    megatron: tokens.bin and tokens.idx; flat: tokens.bin for numpy.memmap, with ends.npy; parquet: data/*.parquet with
    ids, spans and meta; webdataset: tar files. vocab.json and export.json, with the fingerprint of the vocabulary, go
    beside them. OUT appears complete or not at all; the same dataset gives the same bytes.

    Example: mmtok dataset export tokens --format megatron -o megatron
    """
    dataset = TokenDataset.open(path)
    with _progress("exporting", len(dataset)) as advance:
        about = _EXPORTS[to](dataset, out, advance)
    if as_json:
        print(json.dumps({"out": str(out), **about}))
        return
    print_table(("", to.value), about.items())
    print(f"written {out}")


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[int], object]]:
    """Something to tell of finished documents: a bar on stderr, if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)

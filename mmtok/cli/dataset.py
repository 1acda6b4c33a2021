"""``mmtok dataset``: plan and build token datasets; verify, report and export are in ``dataset_tools``."""

from __future__ import annotations

import dataclasses
import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mmtok.cli import dataset_tools
from mmtok.cli.encode import named
from mmtok.cli.tables import print_table
from mmtok.datasets.build import BuildReport, Progress
from mmtok.datasets.build import build as build_dataset
from mmtok.datasets.build.config import EncodeConfig
from mmtok.datasets.plan import Plan
from mmtok.datasets.plan import plan as plan_dataset
from mmtok.datasets.shards import SHARD_TOKENS
from mmtok.datasets.sources import open_source
from mmtok.multimodal import MultimodalTokenizer

app = typer.Typer(help="Turn a corpus into a token dataset, check it, look at it, hand it on.", no_args_is_help=True)


class Engine(StrEnum):
    """What can be asked for with --engine."""

    local = "local"
    ray = "ray"


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A manifest (.jsonl), a folder of media with .txt captions, WebDataset shards (X.tar, '*.tar', "
        "'{000..009}.tar'), Parquet files, or hf:PATH_OR_NAME; a path or a URL.",
        show_default=False,
    ),
]
Model = Annotated[
    str, typer.Option(metavar="VOCABULARY", help="A directory with a vocab.json, or the name of a bundled model.")
]
Columns = Annotated[
    str | None,
    typer.Option(
        metavar="M=COLUMN,...", help="Columns of a table, such as text=caption,image=jpg.", show_default=False
    ),
]
ImageSize = Annotated[
    int, typer.Option(min=0, help="Fit pictures into a white square of so many pixels; 0 keeps their sizes.")
]
MaxSide = Annotated[int, typer.Option(min=0, help="Scale pictures with a longer side down to it; 0 for none.")]
Use = Annotated[
    list[str] | None,
    typer.Option(metavar="MODALITY=NAME", help="The tokenizer to use, where the vocabulary has several."),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="How many encode at once, a core each.", show_default="all cores")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")]


@app.command("plan", no_args_is_help=True)
def plan(
    source: Source,
    model: Model = "any-to-any",
    columns: Columns = None,
    image_size: ImageSize = 0,
    max_side: MaxSide = 0,
    use: Use = None,
    context: Annotated[int, typer.Option(min=1, help="Length in ids that documents should fit into.")] = 2048,
    hidden_size: Annotated[int, typer.Option(min=1, help="Of the transformer: columns of its embedding.")] = 1024,
    share: Annotated[float, typer.Option(help="Look at this share of the documents only.")] = 1.0,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Predict tokens, bytes, lengths, embedding parameters and time, before any model runs over the data.

    Texts are tokenized; of pictures and sounds only the headers are read.

    Example: mmtok dataset plan data/manifest.jsonl --image-size 64
    """
    mm = MultimodalTokenizer.load(model)
    found = plan_dataset(
        open_source(source, columns),
        mm,
        _config(image_size, max_side, use),
        context=context,
        hidden_size=hidden_size,
        workers=workers or os.cpu_count() or 1,
        share=share,
    )
    if as_json:
        print(json.dumps(dataclasses.asdict(found)))
    else:
        _show_plan(found)


@app.command("build", no_args_is_help=True)
def build(
    source: Source,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", file_okay=False, help="The dataset.", show_default=False)
    ],
    model: Model = "any-to-any",
    columns: Columns = None,
    image_size: ImageSize = 0,
    max_side: MaxSide = 0,
    use: Use = None,
    engine: Annotated[Engine, typer.Option(help="Processes of this machine, or the actors of a Ray cluster.")] = (
        Engine.local
    ),
    workers: Workers = None,
    shard_tokens: Annotated[int, typer.Option(min=1, help="About so many ids in a shard.")] = SHARD_TOKENS,
    as_json: AsJson = False,
) -> None:
    """Encode a corpus into a token dataset.

    A build that was stopped goes on when the same command is given again, and ends with the same bytes as one that was
    not. If DIR is a dataset already, only what is new in SOURCE is encoded. Documents that cannot be read are left out
    and listed with their reasons in DIR/quarantine.*.jsonl; the exit code is then 2.

    Example: mmtok dataset build data/manifest.jsonl -o tokens --image-size 64
    """
    with _bar() as bar:
        task = bar.add_task("listing", total=None, note="")

        def show(p: Progress) -> None:
            rate = f"{p.tokens / p.seconds:,.0f} tokens/s" if p.tokens and p.seconds else ""
            note = f"{rate}  {p.left_out} left out" if p.left_out else rate
            total = None if p.stage == "listing" else p.of
            bar.update(task, description=p.stage, completed=p.documents, total=total, note=note)

        report = build_dataset(
            source,
            out,
            model,
            _config(image_size, max_side, use),
            columns=columns,
            engine=engine.value,
            workers=workers,
            shard_tokens=shard_tokens,
            progress=show,
        )
    if as_json:
        print(json.dumps({"dataset": str(out), **dataclasses.asdict(report)}))
    else:
        _show_build(report, out)
    if report.left_out:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"mmtok: {report.left_out} of {report.documents + report.left_out} documents are left out; "
            f"see quarantine.*.jsonl in {out}",
            markup=False,
        )
        raise typer.Exit(2)


def _config(image_size: int, max_side: int, use: list[str] | None) -> EncodeConfig:
    return EncodeConfig(image_size=image_size, max_side=max_side, **named(use or []))


def _bar() -> Bar:
    console = Console(stderr=True)
    return Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _show_plan(p: Plan) -> None:
    amounts = {"text": ("bytes", 1.0), "image": ("megapixels", 1e6), "audio": ("hours", 3600.0)}
    print_table(
        ("modality", "segments", "amount", "tokens", "share", "core hours"),
        (
            (
                m,
                f"{x.segments:,}",
                f"{x.amount / amounts[m][1]:,.4g} {amounts[m][0]}",
                f"{x.tokens:,}",
                f"{x.tokens / max(1, p.tokens):.1%}",
                f"{x.seconds / 3600:.3g}",
            )
            for m, x in p.modalities.items()
        ),
    )
    print(f"{p.documents:,} documents, {p.tokens:,} tokens, about {p.bytes / 1e6:,.3g} MB as {p.dtype}")
    print(f"{p.over:,} documents are longer than {p.context:,} tokens, the longest has {p.longest:,}")
    print(f"embedding: {p.ids:,} ids x {p.hidden_size:,} = {p.embedding:,} parameters")
    unit, size = next(((u, n) for u, n in (("hours", 3600), ("minutes", 60)) if p.seconds >= 2 * n), ("seconds", 1))
    print(f"a build takes about {p.seconds / size:,.3g} {unit} with {p.workers} workers, once their models are loaded")
    if p.share < 1:
        print(f"from {p.share:.2%} of the documents")
    if p.left_out:
        print(f"{p.left_out:,} documents cannot be encoded, among them:")
        for name, reason in p.examples:
            print(f"  {name}: {reason}")


def _show_build(r: BuildReport, out: Path) -> None:
    print(
        f"{r.documents:,} documents, {r.tokens:,} tokens in {r.shards} shards: {out} ({r.fingerprint[:12]}); "
        f"{r.encoded:,} documents looked at in this run, {r.seconds:.1f} s"
    )
    if r.reasons:
        print_table(("left out", "reason"), ((n, reason) for reason, n in r.reasons.items()))


app.command("verify", no_args_is_help=True)(dataset_tools.verify)
app.command("report", no_args_is_help=True)(dataset_tools.report)
app.command("export", no_args_is_help=True)(dataset_tools.export)

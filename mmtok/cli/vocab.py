"""``mmtok vocab``: make, look at, extend, compare and export vocabularies."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from mmtok.checkpoints import atomic_write
from mmtok.cli.tables import print_table
from mmtok.errors import CheckpointError, ConfigError, VocabularyError, VocabularyMismatchError
from mmtok.export import export_hf, read_vocabulary, refuse_other
from mmtok.loading import find_tokenizer, load
from mmtok.multimodal import spec_of
from mmtok.registry import VOCAB_FILE, Block, TokenizerSpec, VocabularyRegistry

app = typer.Typer(help="Make, look at, extend, compare and export vocabularies.", no_args_is_help=True)


class Format(StrEnum):
    """What can be asked for with --format."""

    hf = "hf"


Tokenizers = Annotated[
    list[str],
    typer.Argument(
        metavar="TOKENIZER",
        help="Name of a bundled tokenizer, a checkpoint directory, or NAME=DIRECTORY. The first of a modality is its "
        "default.",
        show_default=False,
    ),
]
Vocabulary = Annotated[
    str, typer.Argument(metavar="PATH", help="A vocab.json, a directory with one, or the name of a bundled model.")
]
Out = Annotated[
    Path,
    typer.Option("-o", "--out", metavar="DIR", file_okay=False, help="The directory to write.", show_default=False),
]
Levels = Annotated[
    list[str] | None, typer.Option(metavar="NAME=N", help="Use only the first N codebooks of a residual tokenizer.")
]
Layout = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=LAYOUT", help="Order of an audio codec's codes, such as interleaved or delayed:0,1."),
]
Headroom = Annotated[
    list[str] | None, typer.Option(metavar="NAME=N", help="Ids to keep free behind each codebook of a tokenizer.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")]


@app.command("create", no_args_is_help=True)
def create(
    tokenizers: Tokenizers,
    out: Out,
    levels: Levels = None,
    layout: Layout = None,
    headroom: Headroom = None,
    max_grid: Annotated[int, typer.Option(min=1, help="Largest picture height or width, in codes.")] = 64,
    pad_multiple: Annotated[int, typer.Option(min=1, help="Round the number of ids up to a multiple of this.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Lay out one vocabulary for some tokenizers.

    Writes DIR/vocab.json, and copies into DIR/NAME each tokenizer that is neither bundled nor beside DIR, so that DIR
    can be loaded wherever it goes. A directory that holds another vocabulary is left alone.

    Example: mmtok vocab create text-4k image-64-f8 audio-16k -o vocabulary --levels audio-16k=4
    """
    sources, specs = _specs(tokenizers, levels, layout, headroom)
    registry = VocabularyRegistry.create(specs, max_grid=max_grid, pad_multiple=pad_multiple)
    copied = _write(registry, sources, out, out)
    if as_json:
        print(json.dumps({**_summary(registry), "out": str(out), "copied": copied}))
        return
    _show(registry)
    _written(out, copied)


@app.command("show", no_args_is_help=True)
def show(
    path: Vocabulary,
    ids: Annotated[str, typer.Option(metavar="ID,ID...", help="Explain these ids.", show_default=False)] = "",
    as_json: AsJson = False,
) -> None:
    """Print the blocks of a vocabulary, or what some ids mean.

    Example: mmtok vocab show any-to-any --ids 5,4200,9000
    """
    registry, _ = read_vocabulary(path)
    explained = [{"id": id, "meaning": registry.describe(id)} for id in _integers(ids)]
    if as_json:
        print(json.dumps({**_summary(registry), **({"ids": explained} if ids else {})}))
        return
    if not ids:
        _show(registry)
    for row in explained:
        print(f"{row['id']}: {row['meaning']}")


@app.command("extend", no_args_is_help=True)
def extend(
    path: Vocabulary,
    tokenizers: Tokenizers,
    out: Out,
    levels: Levels = None,
    layout: Layout = None,
    headroom: Headroom = None,
    as_json: AsJson = False,
) -> None:
    """Add tokenizers to a vocabulary so that no id moves.

    The new vocabulary goes to DIR as with create; the old one stays. A tokenizer of a name that is there already grows
    into the head-room of its blocks: you vouch that its old codes keep their meaning.

    Example: mmtok vocab extend any-to-any pictures=runs/image/model -o extended
    """
    old, home = read_vocabulary(path)
    sources, specs = _specs(tokenizers, levels, layout, headroom)
    new = old.extend(specs)
    if len(moved := new.moved(old)):
        raise VocabularyError(f"{len(moved)} ids would move, the first is {moved[0]}; nothing was written")
    kept = sum(b.size for b in old.blocks)
    copied = _write(new, sources, out, home)
    differences = old.diff(new).splitlines()
    if as_json:
        report = {"out": str(out), "copied": copied, "kept": kept, "moved": 0, "differences": differences}
        print(json.dumps({**_summary(new), **report}))
        return
    print("\n".join(differences))
    print(f"no id moved: {kept} of {kept} checked")
    _written(out, copied)


@app.command("diff", no_args_is_help=True)
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="As the PATH of show.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Say what changes from vocabulary A to vocabulary B, and how many ids of A mean something else in B.

    Example: mmtok vocab diff any-to-any extended
    """
    (one, _), (other, _) = read_vocabulary(a), read_vocabulary(b)
    differences, moved = one.diff(other).splitlines(), len(other.moved(one))
    if as_json:
        fingerprints = {"a": one.fingerprint, "b": other.fingerprint}
        print(json.dumps({"equal": one == other, **fingerprints, "differences": differences, "moved": moved}))
        return
    print("\n".join(differences) or f"equal: both have fingerprint {one.fingerprint}")


@app.command("export", no_args_is_help=True)
def export(
    path: Vocabulary,
    out: Out,
    to: Annotated[Format, typer.Option("--format", help="hf: for transformers.AutoTokenizer.")] = Format.hf,
    as_json: AsJson = False,
) -> None:
    """Write a vocabulary as files that other libraries load.

    DIR may be the directory of a transformer of this vocabulary: then AutoTokenizer and AutoModelForCausalLM both load
    from it. Every id is checked before the files are put in place.

    Example: mmtok vocab export any-to-any --format hf -o exported
    """
    registry, home = read_vocabulary(path)
    names = [t.name for t in registry.tokenizers if t.modality == "text"][:1]
    export_hf(registry, {name: load(find_tokenizer(name, home)) for name in names}, out)
    if as_json:
        sizes = {"fingerprint": registry.fingerprint, "padded_size": registry.padded_size}
        print(json.dumps({"out": str(out), "format": to.value, **sizes}))
        return
    print(f"{registry.padded_size} ids, each checked, for transformers.AutoTokenizer in {out}")


def _specs(
    tokenizers: Sequence[str], levels: list[str] | None, layout: list[str] | None, headroom: list[str] | None
) -> tuple[dict[str, str], list[TokenizerSpec]]:
    """Name -> checkpoint, and what a registry needs to know of each."""
    sources: dict[str, str] = {}
    for argument in tokenizers:
        name, given, place = argument.partition("=")
        if not given:
            name, place = Path(argument).resolve().name, argument
        if name in sources:
            raise ConfigError(f"two tokenizers are named {name!r}; give one of them another name: NAME={place}")
        sources[name] = place
    count = _values("--levels", levels, sources, int)
    order = _values("--layout", layout, sources, str)
    room = _values("--headroom", headroom, sources, int)
    specs = [
        spec_of(name, load(place), count.get(name), room.get(name, 0), order.get(name, ""))
        for name, place in sources.items()
    ]
    return sources, specs


def _values(
    option: str, pairs: list[str] | None, names: Mapping[str, str], convert: Callable[[str], Any]
) -> dict[str, Any]:
    """NAME=VALUE options as a dict."""
    out: dict[str, Any] = {}
    for pair in pairs or []:
        name, _, value = pair.partition("=")
        if name not in names:
            raise ConfigError(f"{option} {pair}: no tokenizer {name!r} here; known: {', '.join(names)}")
        if name in out:
            raise ConfigError(f"{option} is given twice for {name!r}; give it once")
        try:
            out[name] = convert(value)
        except ValueError as error:
            raise ConfigError(f"{option} {pair}: got {value!r}, expected {name}=NUMBER") from error
        if value == "":
            raise ConfigError(f"{option} {pair}: got nothing, expected {name}=VALUE")
    return out


def _integers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")] if text else []
    for part in parts:
        if not re.fullmatch(r"-?[0-9]{1,18}", part):
            raise ConfigError(f"--ids {text}: got {part!r}, expected integers with commas between them")
    return [int(part) for part in parts]


def _write(registry: VocabularyRegistry, sources: Mapping[str, str], out: Path, home: Path) -> list[str]:
    """Write vocab.json, after the tokenizers that could not be found from there; the directories of those.

    What is no source is where the vocabulary in ``home`` has it.
    """
    file = out / VOCAB_FILE
    refuse_other(out, registry)
    missing = [spec for spec in registry.tokenizers if not _holds(out, spec)]
    for spec in missing:
        if (out / spec.name).exists():
            raise CheckpointError(
                f"{out / spec.name} is not the tokenizer {spec.name!r} of this vocabulary; choose another directory "
                "or give the tokenizer another name"
            )
    models = {}
    for spec in missing:
        source = sources.get(spec.name) or find_tokenizer(spec.name, home)
        models[spec.name] = load(source)
        if models[spec.name].fingerprint != spec.fingerprint:
            raise VocabularyMismatchError(
                f"{source}: tokenizer {spec.name!r} has fingerprint {models[spec.name].fingerprint[:12]}, the "
                f"vocabulary was made with {spec.fingerprint[:12]}; put back that checkpoint"
            )
    for name, model in models.items():
        model.save(out / name)
    atomic_write(file, registry.to_json().encode())
    return [str(out / spec.name) for spec in missing]


def _holds(out: Path, spec: TokenizerSpec) -> bool:
    """Whether a vocabulary in this directory would find the tokenizer that the registry means."""
    try:
        return load(find_tokenizer(spec.name, out)).fingerprint == spec.fingerprint
    except CheckpointError:
        return False


def _summary(registry: VocabularyRegistry) -> dict[str, Any]:
    return {
        "fingerprint": registry.fingerprint,
        "revision": registry.revision,
        "used": sum(b.size for b in registry.blocks),
        "size": registry.size,
        "padded_size": registry.padded_size,
        "pad_multiple": registry.pad_multiple,
        "blocks": [_row(registry, block) for block in registry.blocks],
    }


def _row(registry: VocabularyRegistry, block: Block) -> dict[str, Any]:
    """A block in words."""
    spec = registry.tokenizer(block.tokenizer) if block.tokenizer else None
    return {
        "name": block.name,
        "first": block.start,
        "last": block.end - 1,
        "size": block.size,
        "headroom": block.capacity - block.size,
        "modality": block.modality,
        "tokenizer": block.tokenizer,
        "level": block.codebook if spec and spec.numbered else None,
        "layout": spec.layout if spec else "",
        "names": list(block.names),
    }


def _show(registry: VocabularyRegistry) -> None:
    summary = _summary(registry)
    columns = ("name", "size", "headroom", "modality", "tokenizer", "level", "layout")
    print_table(
        ("block", "ids", "size", "head-room", "modality", "tokenizer", "level", "layout"),
        (
            (row["name"], f"{row['first']}..{row['last']}", *("" if row[c] is None else row[c] for c in columns[1:]))
            for row in summary["blocks"]
        ),
    )
    print(f"{summary['used']} ids in use, {summary['size']} reserved, {summary['padded_size']} with padding")
    print(f"revision {registry.revision}, fingerprint {registry.fingerprint}")


def _written(out: Path, copied: Sequence[str]) -> None:
    for place in copied:
        print(f"copied {place}")
    print(f"written {out / VOCAB_FILE}")

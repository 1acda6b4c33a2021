"""``mmtok generate``: any of text, images and audio in, any of them out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from mmtok import media
from mmtok.checkpoints import atomic_write
from mmtok.cli.live import Live
from mmtok.cli.tables import print_table
from mmtok.documents import Audio, Image, Text, Turn, load_segment, save_document
from mmtok.errors import ConfigError, MediaError
from mmtok.listing import listing as list_ids
from mmtok.multimodal import MultimodalTokenizer, Segment
from mmtok.sequences import write_ids
from mmtok.transformer.decoder import Decoder
from mmtok.transformer.generate import generate as run_model
from mmtok.transformer.model import Transformer
from mmtok.transformer.requests import Generation, Request
from mmtok.transformer.sampling import Sampling
from mmtok.transformer.streaming import Streamer


class Modality(StrEnum):
    """What can be asked for with --to."""

    text = "text"
    image = "image"
    audio = "audio"


class Precision(StrEnum):
    """Of the weights: what --precision takes."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


IMAGE_SIZE = 64  # pixels of the pictures that the bundled model was trained on
SAMPLING = {"text": Sampling(0.0), "image": Sampling(0.4), "audio": Sampling(0.4)}  # what suits the bundled model


def _defaults(name: str) -> str:
    """The defaults of an option, in words."""
    values = {m: getattr(s, name) for m, s in SAMPLING.items() if name != "guidance" or m != "text"}
    if len(set(values.values())) == 1:
        return f"{next(iter(values.values())):g}"
    return ", ".join(f"{v:g} for {m}" for m, v in values.items())


def generate(
    context: typer.Context,
    text: Annotated[list[str] | None, typer.Option(help="Text of the question; may be given several times.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Image file; may be given several times.")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="Audio file; may be given several times.")] = None,
    to: Annotated[
        list[Modality] | None, typer.Option(help="What to answer with, in order; default: the model chooses.")
    ] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Directory for the answer.")] = Path("samples"),
    samples: Annotated[
        int,
        typer.Option(min=1, help="Answers to give, all in one batch; several go to directories 0, 1, ... of --out."),
    ] = 1,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print text as it comes; write sounds while they grow, and whole pictures.")
    ] = False,
    model: Annotated[str, typer.Option(help="Checkpoint directory, or the name of a bundled one.")] = "any-to-any",
    precision: Annotated[
        Precision, typer.Option(help="Of the weights. int8 is fastest for one answer, bfloat16 for many.")
    ] = Precision.int8,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal answers.")] = 0,
    temperature: Annotated[
        float | None, typer.Option(min=0, help=f"Of every modality; default: {_defaults('temperature')}.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help=f"Only the k best ids; 0 is no limit; default: {_defaults('top_k')}.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help=f"Only the best ids that reach this probability; default: {_defaults('top_p')}."),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help=f"Of ids that a segment has already; 1 is none; default: {_defaults('repetition_penalty')}."),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help=f"How much more pictures and sounds heed the question; 1 is none; default: {_defaults('guidance')}.",
        ),
    ] = None,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile", help="Run int8 about a third faster by torch.compile, which first takes up to a minute."
        ),
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most ids of the answer.")] = 1200,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Generate any modality from any other with the reference transformer.

    The parts of the question keep the order in which they are given. Leaves the pictures, sounds and texts of question
    and answer, ids.json, listing.jsonl and report.json in the output directory.

    Example: mmtok generate --text "a cow" --to image --to audio --out samples
    """
    question = _question(context.obj or [], text or [], image or [], audio or [])
    if stream and samples > 1:
        raise ConfigError(f"--stream shows one answer, got --samples {samples}; leave out one of the two")
    sampling = sampling_of(
        temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty, guidance=guidance
    )
    torch.set_num_threads(1)  # a step of so small a model is too short to share
    tokenizer = MultimodalTokenizer.load(model)
    decoder = Decoder(Transformer.load(model, tokenizer.registry), getattr(torch, precision), compile)
    prompt = tokenizer.prompt([tokenizer.fit(x, IMAGE_SIZE) for x in question])
    requests = [Request(prompt, tuple(m.value for m in to or []), max_tokens, sample=i) for i in range(samples)]
    on_token = None
    if stream:
        shown, pieces = Live(out, _segments(tokenizer, prompt), as_json), Streamer(tokenizer)

        def on_token(_: int, id: int) -> None:
            for event in pieces.push(id):
                shown.take(event)

    answers = run_model(decoder, tokenizer.grammar, requests, sampling, seed, on_token)
    about = {"model": model, "vocabulary": tokenizer.registry.fingerprint, "seed": seed, "precision": precision.value}
    about["sampling"] = {m: s.to_dict() for m, s in sampling.items()}
    reports = []
    for number, answer in enumerate(answers):
        folder = out if samples == 1 else out / str(number)
        reports.append({**about, **write_answer(tokenizer, answer, folder)})
        atomic_write(folder / "report.json", (json.dumps(reports[-1], indent=2) + "\n").encode())
        if not as_json:
            _show(reports[-1], folder)
    if as_json:
        print(json.dumps(reports[0] if samples == 1 else reports))


def sampling_of(temperature: float | None = None, **others: float | None) -> dict[str, Sampling]:
    """Sampling of each modality: the defaults that suit the bundled model, with what is given in their place.

    Args:
        temperature: of every modality.
        others: more fields of ``Sampling``; guidance is of images and sounds only.

    Raises:
        ConfigError: an impossible value.
    """
    given: dict[str, Any] = {k: v for k, v in {"temperature": temperature, **others}.items() if v is not None}
    text = {k: v for k, v in given.items() if k != "guidance"}
    return {m: dataclasses.replace(s, **(text if m == "text" else given)) for m, s in SAMPLING.items()}


def _segments(tokenizer: MultimodalTokenizer, prompt: np.ndarray) -> int:
    """How many segments of a document, turns among them, stand in a prompt."""
    return len(tokenizer.grammar.spans([*prompt, tokenizer.registry.eos])) - 2  # but for <bos> and <eos>


def write_answer(tokenizer: MultimodalTokenizer, answer: Generation, out: Path) -> dict[str, Any]:
    """Decode an answer, write its media, ids and listing, and check each output.

    Returns:
        The report: segments with their files and checks, tokens of each modality, speed.
    """
    document = tokenizer.decode(answer.ids)
    listing = list_ids(tokenizer.grammar, answer.ids)
    paths = iter(save_document(document, out))
    spans = [
        s for s in tokenizer.grammar.spans(answer.ids) if s.kind != "control" or s.name in ("<user>", "<assistant>")
    ]
    segments: list[dict[str, Any]] = []
    role = "user"
    for segment, span in zip(document.segments, spans, strict=True):
        if isinstance(segment, Turn):
            role = segment.role
            continue
        path = next(paths)
        entry: dict[str, Any] = {
            "role": role,
            "modality": type(segment).__name__.lower(),
            "file": path.name,
            "tokens": span.end - span.start,
        }
        if isinstance(segment, Text):
            entry["text"] = segment.text
        elif isinstance(segment, Image):
            entry["pixels"] = list(segment.pixels.shape[1:])
        elif isinstance(segment, Audio):
            entry["seconds"] = round(segment.seconds, 3)
        ids = answer.ids[span.start : span.end]
        entry["check"] = _check(tokenizer, segment, ids, listing[span.start : span.end], path)
        segments.append(entry)
    write_ids(out / "ids.json", tokenizer.registry, [("generated", answer.ids)])
    atomic_write(out / "listing.jsonl", b"".join(_json(row) for row in listing))
    stats = answer.stats
    return {
        "segments": segments,
        "tokens": {k: v for k, v in answer.tokens.items() if v},
        "new_tokens": len(answer.new_ids),
        "prompt_tokens": answer.prompt_length,
        "tokens_per_second": round(stats.tokens_per_second, 1),
        "prefill_seconds": round(stats.prefill_seconds, 3),
        "decode_seconds": round(stats.decode_seconds, 3),
        "weights_gb_per_second": round(stats.weight_bytes / max(stats.decode_seconds, 1e-9) / 1e9, 2),
        "gflop_per_second": round(stats.flops / max(stats.decode_seconds, 1e-9) / 1e9, 2),
        "files": sorted(p.name for p in out.iterdir() if p.is_file() and p.name != "report.json"),
    }


def _check(
    tokenizer: MultimodalTokenizer, segment: Segment, ids: np.ndarray, rows: list[dict[str, Any]], path: Path
) -> dict[str, Any]:
    """ids -> media -> file and ids -> listing -> ids, and how many codes survive a second encoding."""
    modality = type(segment).__name__.lower()
    from_listing = _ids_of_listing(tokenizer, modality, rows)
    again = tokenizer.grammar.segment_ids(modality, tokenizer.codes(segment))  # type: ignore[arg-type]
    kept = float((again == ids).mean()) if len(again) == len(ids) else 0.0
    if isinstance(segment, Text):
        same = media.read_text(path) == segment.text
    elif isinstance(segment, Image):
        same = bool(np.array_equal(media.read_image(path), segment.pixels))
    elif isinstance(segment, Audio) and segment.samples.shape[1]:
        same = bool(np.abs(media.read_audio(path, segment.sample_rate) - segment.samples).max() < 1 / 16384)
    else:
        same = path.is_file()
    return {
        "listing_gives_the_ids": bool(np.array_equal(from_listing, ids)),
        "file_gives_the_media": same,
        "ids_kept_by_encoding_again": round(kept, 4),
    }


def _ids_of_listing(tokenizer: MultimodalTokenizer, modality: str, rows: list[dict[str, Any]]) -> np.ndarray:
    """The ids of one segment, rebuilt from the codes and places that its listing names; its ``id`` is not looked at."""
    coded = [row for row in rows if "code" in row]
    if modality == "text":
        codes = np.array([row["code"] for row in coded], np.int64)
    else:
        levels = len(tokenizer.registry.blocks_of(modality))
        image = ("row", "column") if levels == 1 else ("row", "column", "level")
        axes = image if modality == "image" else ("level", "frame")
        at = np.array([[row[axis] for axis in axes] for row in coded], np.int64).reshape(-1, len(axes))
        shape = at.max(0) + 1 if len(at) else np.array([levels, 0])
        codes = np.full(shape, -1, np.int64)  # a place that the listing leaves out is no code, and is refused
        codes[tuple(at.T)] = [row["code"] for row in coded]
    return tokenizer.grammar.segment_ids(modality, codes)


def _question(arguments: Sequence[str], text: list[str], image: list[Path], audio: list[Path]) -> list[Segment]:
    """The parts of the question, read, in the order of the command line."""
    if not (text or image or audio):
        raise ConfigError("nothing to answer: give at least one of --text, --image and --audio")
    values: dict[str, list[Any]] = {"text": list(text), "image": list(image), "audio": list(audio)}
    readers = {"text": Text, "image": _load_as(Image), "audio": _load_as(Audio)}
    order, skip = [], False
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--")
        if skip:
            skip = False
        elif argument.startswith("--") and name in values:
            order.append(name)
            skip = "=" not in argument
    counts = {m: order.count(m) for m in values}
    if counts != {m: len(v) for m, v in values.items()}:  # called without a command line: by modality
        order = [m for m in values for _ in values[m]]
    return [readers[m](values[m].pop(0)) for m in order]


def _load_as(kind: type) -> Any:
    def load(path: Path) -> Segment:
        segment = load_segment(path)
        if not isinstance(segment, kind):
            raise MediaError(f"{path}: got {type(segment).__name__.lower()}, expected {kind.__name__.lower()}")
        return segment

    return load


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()


def _show(report: dict[str, Any], out: Path) -> None:
    print_table(("role", "modality", "file", "tokens", "what", "checks"), map(_row, report["segments"]))
    print(
        f"{report['new_tokens']} tokens, {report['tokens_per_second']} tok/s, "
        f"{report['weights_gb_per_second']} GB/s of weights, {report['gflop_per_second']} GFLOP/s: {out}"
    )


def _row(segment: dict[str, Any]) -> tuple[object, ...]:
    size = f"{segment['seconds']} s" if "seconds" in segment else "x".join(map(str, segment.get("pixels", [])))
    fine = all(v for v in segment["check"].values() if isinstance(v, bool))
    what = segment.get("text", size)[:60]
    return (*(segment[c] for c in ("role", "modality", "file", "tokens")), what, "ok" if fine else "FAILED")

"""``mmtok roundtrip``: what the tokenizers do to your own files, with figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mmtok import loading, media
from mmtok.checkpoints import atomic_write
from mmtok.cli.tables import print_table
from mmtok.documents import Audio, Image, Text, load_segment
from mmtok.errors import CheckpointError
from mmtok.evaluation.roundtrip import roundtrip_audio, roundtrip_image, roundtrip_text


def roundtrip(
    files: Annotated[list[Path], typer.Argument(help="Text, image and audio files.", show_default=False)],
    out: Annotated[Path, typer.Option(file_okay=False, help="Directory for the reconstructions.")] = Path("roundtrip"),
    text: Annotated[str, typer.Option(help="Text tokenizer: a directory or the name of a bundled one.")] = "text-4k",
    image: Annotated[str, typer.Option(help="Image tokenizer.")] = "image-64-f8",
    audio: Annotated[str, typer.Option(help="Audio codec.")] = "audio-16k",
    levels: Annotated[int | None, typer.Option(min=1, help="Use only the first codebooks of the audio codec.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Encode each file, decode it again, and measure what came back.

    Prints tokens and bits, and PSNR and SSIM of pictures, STOI and log-mel distance of sounds, identity of texts.

    Example: mmtok roundtrip cow.png word.ogg note.txt --out rt --json
    """
    # All files are read before any is written: a bad one leaves nothing half-done.
    segments = [load_segment(path) for path in files]
    torch.set_num_threads(min(2, torch.get_num_threads()))
    tokenizers: dict[str, Any] = {}
    for modality, name in (("text", text), ("image", image), ("audio", audio)):
        if any(type(s).__name__.lower() == modality for s in segments):
            tokenizers[modality] = loading.load(name)
            if tokenizers[modality].modality != modality:
                raise CheckpointError(
                    f"{name}: got a tokenizer for {tokenizers[modality].modality}, expected {modality}"
                )
    entries, results = [], []
    for path, segment in zip(files, segments, strict=True):
        modality = type(segment).__name__.lower()
        tokenizer = tokenizers[modality]
        back: Text | Image | Audio
        match segment:
            case Text():
                back, figures = roundtrip_text(tokenizer, segment)
            case Image():
                back, figures = roundtrip_image(tokenizer, segment)
            case Audio():
                back, figures = roundtrip_audio(tokenizer, segment, levels)
        entries.append({"file": str(path), "modality": modality, **figures})
        results.append(back)
    for number, (path, entry, back) in enumerate(zip(files, entries, results, strict=True)):
        entry["reconstruction"] = str(_write(out, f"{number}_{path.stem}", back))
    report = {"tokenizers": {m: t.fingerprint for m, t in tokenizers.items()}, "files": entries}
    atomic_write(out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    if as_json:
        print(json.dumps(report))
    else:
        _show(entries)


def _write(out: Path, stem: str, back: Text | Image | Audio) -> Path:
    match back:
        case Text(text):
            path = out / f"{stem}.txt"
            atomic_write(path, text.encode())
        case Image(pixels):
            path = out / f"{stem}.png"
            media.write_image(path, pixels)
        case Audio(samples, rate):
            path = out / f"{stem}.wav"
            media.write_audio(path, samples, rate)
    return path


def _show(entries: list[dict[str, Any]]) -> None:
    print_table(
        ("file", "tokens", "bits", "how close"), ((e["file"], e["tokens"], e["bits"], _closeness(e)) for e in entries)
    )


def _closeness(entry: dict[str, Any]) -> str:
    match entry["modality"]:
        case "text":
            return "identical" if entry["identity"] else "DIFFERENT"
        case "image":
            return f"PSNR {entry['psnr_db']} dB, SSIM {entry['ssim']}, {entry['bits_per_pixel']} bits/pixel"
    return f"STOI {entry['stoi']}, log-mel {entry['log_mel_distance_db']} dB, {entry['kilobits_per_second']} kb/s"

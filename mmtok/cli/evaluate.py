"""``mmtok evaluate``: the health report of tokenizers; of images and audio beside hand-made codecs at the same bits."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mmtok import loading
from mmtok.audio.tokenizer import AudioTokenizer
from mmtok.checkpoints import atomic_write
from mmtok.cli import evaluate_images, evaluate_sounds, evaluate_texts
from mmtok.errors import CheckpointError, ConfigError
from mmtok.evaluation.sets import choose
from mmtok.image.tokenizer import ImageTokenizer
from mmtok.text import TextTokenizer

NO_PEERS = "none"


def evaluate(
    tokenizers: Annotated[
        list[str],
        typer.Argument(
            metavar="TOKENIZER...",
            help="All for images, audio or text: directories or names of bundled ones.",
            show_default=False,
        ),
    ],
    data: Annotated[
        Path, typer.Option(help="A folder of pictures, sounds or texts, or a manifest.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Directory for the report.")] = Path("evaluation"),
    split: Annotated[
        str | None, typer.Option(help="train, val or test; without it all of a folder, val of a manifest.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Fit pictures into a square of so many pixels, on white.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many files, spread over the data.")] = None,
    peers: Annotated[
        str | None,
        typer.Option(help="Of JPEG,WEBP,AVIF for images, opus for audio; none for none; without it all that are here."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Measure tokenizers on your pictures, sounds or texts: closeness, bits, use of codebooks, stability and speed.

    Images: PSNR and SSIM over bits per pixel, beside JPEG, WebP and AVIF; contact_sheet.png has the best, median and
    worst pictures. Audio: STOI and PESQ by number of levels, beside Opus; spectrograms.png and samples/ have the best,
    median and worst sounds. Both write rate_distortion.png, and run on one thread, so that speeds can be compared.
    Text: bytes per token, tokens per word and per character by language, what comes back, unused ids, and speed beside
    that of tokenizers. All write report.json.

    Examples: mmtok evaluate image-64-f8 --data my/pictures --size 64 --out evaluation;
    mmtok evaluate audio-16k --data my/sounds; mmtok evaluate text-16k --data my/texts
    """
    torch.set_num_threads(1)
    _check_writable(out)  # before minutes of measuring
    loaded = {label: loading.load(name) for label, name in _labels(tokenizers).items()}
    names = None if peers is None else [] if peers == NO_PEERS else peers.split(",")
    images = {label: x for label, x in loaded.items() if isinstance(x, ImageTokenizer)}
    sounds = {label: x for label, x in loaded.items() if isinstance(x, AudioTokenizer)}
    texts = {label: x for label, x in loaded.items() if isinstance(x, TextTokenizer)}
    if len(images) == len(loaded):
        chosen, split = choose(data, "image", split, limit)
        made, plot = evaluate_images.evaluate_images(images, chosen, size, names, out)
    elif len(sounds) == len(loaded):
        if size is not None:
            raise ConfigError(f"got --size {size} for audio tokenizers, expected none: it is for pictures")
        chosen, split = choose(data, "audio", split, limit)
        made, plot = evaluate_sounds.evaluate_sounds(sounds, chosen, names, out)
    elif len(texts) == len(loaded):
        for option, value in (("--size", size), ("--peers", peers)):
            if value is not None:
                raise ConfigError(f"got {option} {value} for text tokenizers, expected none")
        made, split = evaluate_texts.evaluate_texts(texts, data, split, limit)
        plot = None
    else:
        got = ", ".join(f"{label} for {x.modality}" for label, x in loaded.items())
        raise CheckpointError(f"got the tokenizers {got}; expected all for images, all for audio, or all for text")
    files = {"report": str(out / "report.json"), **made.pop("files", {})}
    if plot is not None:
        files["rate_distortion"] = str(out / "rate_distortion.png")
        atomic_write(out / "rate_distortion.png", plot)
    report = {"data": str(data), "split": split or "all", **made, "torch": torch.__version__, "files": files}
    atomic_write(out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    _tell(report, plot is None and not texts)
    if as_json:
        print(json.dumps(report))
        return
    if not texts:
        show: Any = evaluate_images if images else evaluate_sounds
        show.show_figures(report)
        show.show_peers(report)
    else:
        evaluate_texts.show_texts(report)
    print("\n" + ", ".join(files.values()))


def _check_writable(out: Path) -> None:
    """Raise OSError unless files can be made in a directory, or it in what there is of its path; nothing is left."""
    place = next(p for p in (out, *out.resolve().parents) if p.exists())
    try:
        with tempfile.TemporaryDirectory(dir=place):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(out)) from error


def _labels(names: Sequence[str]) -> dict[str, str]:
    """What each tokenizer is called in the report: the last part of its path where that says which."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"got the tokenizer {twice!r} twice, expected each once")
    short = [Path(name).name or name for name in names]
    return {s if short.count(s) == 1 else name: name for s, name in zip(short, names, strict=True)}


def _tell(report: dict[str, Any], no_plot: bool) -> None:
    unreadable = report["unreadable"]
    for line in unreadable[:20]:
        print(f"left out: {line}", file=sys.stderr)
    if len(unreadable) > 20:
        print(f"left out: {len(unreadable) - 20} more, see report.json", file=sys.stderr)
    if no_plot:
        print("no rate_distortion.png: that needs matplotlib; pip install 'mmtok[evaluation]'", file=sys.stderr)

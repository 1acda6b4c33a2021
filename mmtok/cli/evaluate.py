"""``mmtok evaluate``: the health report of image tokenizers, beside JPEG, WebP and AVIF at the same bits."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mmtok import loading, media
from mmtok.checkpoints import atomic_write
from mmtok.cli.tables import print_table
from mmtok.errors import CheckpointError, ConfigError
from mmtok.evaluation.baselines import available, check_peers
from mmtok.evaluation.images import image_report, reconstruct
from mmtok.evaluation.pictures import Pictures
from mmtok.evaluation.plots import contact_sheet, rate_distortion
from mmtok.evaluation.sets import choose
from mmtok.image.tokenizer import ImageTokenizer

NO_PEERS = "none"


def evaluate(
    tokenizers: Annotated[
        list[str],
        typer.Argument(
            metavar="TOKENIZER...", help="Image tokenizers: directories or names of bundled ones.", show_default=False
        ),
    ],
    data: Annotated[Path, typer.Option(help="A folder of pictures, or a manifest.", show_default=False)],
    out: Annotated[Path, typer.Option(file_okay=False, help="Directory for the report.")] = Path("evaluation"),
    split: Annotated[
        str | None, typer.Option(help="train, val or test; without it all of a folder, val of a manifest.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Fit pictures into a square of so many pixels, on white.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many pictures, spread over the data.")] = None,
    peers: Annotated[
        str | None, typer.Option(help="Of JPEG,WEBP,AVIF; none for none; without it all that Pillow can write.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Measure image tokenizers on your pictures: closeness, bits, use of codebooks, stability and speed.

    Writes report.json, rate_distortion.png (PSNR and SSIM over bits per pixel, beside JPEG, WebP and AVIF) and
    contact_sheet.png (best, median and worst pictures). Runs on one thread, so that speeds can be compared.

    Example: mmtok evaluate image-64-f8 --data my/pictures --size 64 --out evaluation
    """
    torch.set_num_threads(1)
    forms = available() if peers is None else [] if peers == NO_PEERS else check_peers(peers.split(","))
    loaded = {label: _load(name) for label, name in _labels(tokenizers).items()}
    found, split = choose(data, "image", split, limit)
    pictures = Pictures(found, size)
    report, psnrs = image_report(loaded, pictures, forms)
    report = {
        "data": str(data),
        "split": split or "all",
        "size": size,
        "pictures": len(pictures),
        "pixels": pictures.pixels,
        "unreadable": pictures.unreadable,
        **report,
        "torch": torch.__version__,
        "files": {"report": str(out / "report.json"), "contact_sheet": str(out / "contact_sheet.png")},
    }
    plot = rate_distortion(report)
    if plot is not None:
        report["files"]["rate_distortion"] = str(out / "rate_distortion.png")
        atomic_write(out / "rate_distortion.png", plot)
    sheet = contact_sheet(
        psnrs,
        pictures.names,
        pictures.__getitem__,
        lambda name, index: reconstruct(loaded[name], pictures, index).numpy(),
    )
    media.write_image(out / "contact_sheet.png", sheet)
    atomic_write(out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    _tell(pictures.unreadable, plot is None)
    if as_json:
        print(json.dumps(report))
    else:
        show_figures(report)
        show_peers(report)
        print("\n" + ", ".join(report["files"].values()))


def _load(name: str) -> ImageTokenizer:
    tokenizer = loading.load(name)
    if not isinstance(tokenizer, ImageTokenizer):
        raise CheckpointError(
            f"{name}: got a tokenizer for {tokenizer.modality}, expected one for images, which mmtok evaluate measures"
        )
    return tokenizer


def _labels(names: Sequence[str]) -> dict[str, str]:
    """What each tokenizer is called in the report: the last part of its path where that says which."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"got the tokenizer {twice!r} twice, expected each once")
    short = [Path(name).name or name for name in names]
    return {s if short.count(s) == 1 else name: name for s, name in zip(short, names, strict=True)}


def _tell(unreadable: Sequence[str], no_plot: bool) -> None:
    for line in unreadable[:20]:
        print(f"left out: {line}", file=sys.stderr)
    if len(unreadable) > 20:
        print(f"left out: {len(unreadable) - 20} more, see report.json", file=sys.stderr)
    if no_plot:
        print("no rate_distortion.png: that needs matplotlib; pip install 'mmtok[evaluation]'", file=sys.stderr)


def show_figures(report: dict[str, Any]) -> None:
    """Print the figures of each tokenizer, and of each level and prefix of a residual one."""
    pixels = f"{report['pixels'] / 1e6:.3g} megapixels"
    print(f"{report['pictures']} pictures, {pixels}, {len(report['unreadable'])} unreadable\n")
    print_table(
        ("tokenizer", "bits/px", "adaptive", "PSNR dB", "mean dB", "SSIM", "MS-SSIM", "kept", "encode/s", "decode/s"),
        (
            (
                name,
                f"{f['bits_per_pixel']:.4f}",
                f"{f['adaptive_bits_per_pixel']:.4f}",
                f"{f['psnr_of_mean_error_db']:.2f}",
                f"{f['psnr_mean_db']:.2f}",
                _or_dash(f["ssim"]),
                _or_dash(f["ms_ssim"]) if f["ms_ssim"] is not None else f"{_or_dash(f['ms_ssim_3_scales'])} (3 scales)",
                f"{f['codes_kept']:.1%}",
                f"{f['speed']['encode_images_per_second']}",
                f"{f['speed']['decode_images_per_second']}",
            )
            for name, f in report["tokenizers"].items()
        ),
    )
    print()
    print_table(
        ("tokenizer", "level", "codes", "used", "perplexity", "bits/token", "adaptive", "kept", "PSNR dB up to it"),
        (
            (
                name,
                number,
                level["codebook_size"],
                f"{level['usage']:.1%}",
                level["perplexity"],
                level["entropy_bits"],
                level["adaptive_bits"],
                f"{level['codes_kept']:.1%}",
                f"{(f['prefixes'][number] if f['prefixes'] else f)['psnr_of_mean_error_db']:.2f}",
            )
            for name, f in report["tokenizers"].items()
            for number, level in enumerate(f["levels"])
        ),
    )
    for note in dict.fromkeys(note for f in report["tokenizers"].values() for note in f["notes"]):
        print(note)


def show_peers(report: dict[str, Any]) -> None:
    """Print what each peer reaches at exactly the nominal bits of each tokenizer."""
    if not report["peers"]:
        return
    kinds = list(next(iter(report["peers"].values())))
    print(
        "\nPSNR of the mean squared error and SSIM at the same bits per pixel, by what is counted of the peer's bytes"
    )
    rows: list[tuple[str, ...]] = []
    for name, f in report["tokenizers"].items():
        own = f"{f['psnr_of_mean_error_db']:.2f} dB {_or_dash(f['ssim'])}"
        rows.append((name, f"{f['bits_per_pixel']:.4f}", name, *(own for _ in kinds)))
        for form, cells in f["at_equal_bits"]["bits_per_pixel"].items():
            rows.append((name, f"{f['bits_per_pixel']:.4f}", form, *(_cell(cells[kind]) for kind in kinds)))
    print_table(("tokenizer", "bits/px", "codec", *(kind.replace("_", " ") for kind in kinds)), rows)


def _cell(figures: dict[str, float]) -> str:
    for key in ("cannot_go_under", "cannot_go_over"):
        if key in figures:
            return f"{key.replace('_', ' ')} {figures[key]:.3f}"
    return f"{figures['psnr_of_mean_error_db']:.2f} dB {_or_dash(figures.get('ssim'))}"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"

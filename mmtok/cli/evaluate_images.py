"""What ``mmtok evaluate`` does for image tokenizers: the report beside JPEG, WebP and AVIF, its pictures and tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtok import media
from mmtok.cli.tables import print_table
from mmtok.evaluation.baselines import available, check_peers
from mmtok.evaluation.images import image_report, reconstruct
from mmtok.evaluation.pictures import Pictures
from mmtok.evaluation.plots import contact_sheet, rate_distortion
from mmtok.image.tokenizer import ImageTokenizer
from mmtok.training.corpus import Item


def evaluate_images(
    tokenizers: Mapping[str, ImageTokenizer], chosen: list[Item], size: int | None, peers: list[str] | None, out: Path
) -> tuple[dict[str, Any], bytes | None]:
    """Measure, and write contact_sheet.png.

    Args:
        tokenizers: by the names that the report gives them.
        chosen: the pictures' files.
        size: fit pictures into a square of so many pixels; None leaves them as they are.
        peers: names of JPEG, WEBP and AVIF; None for all that Pillow can write.
        out: the directory.

    Returns:
        The report, and the PNG of the rates, None without matplotlib.
    """
    forms = available() if peers is None else check_peers(peers)
    pictures = Pictures(chosen, size)
    report, psnrs = image_report(tokenizers, pictures, forms)
    report = {
        "size": size,
        "pictures": len(pictures),
        "pixels": pictures.pixels,
        "unreadable": pictures.unreadable,
        **report,
        "files": {"contact_sheet": str(out / "contact_sheet.png")},
    }
    sheet = contact_sheet(
        psnrs,
        pictures.names,
        pictures.__getitem__,
        lambda name, index: reconstruct(tokenizers[name], pictures, index).numpy(),
    )
    media.write_image(out / "contact_sheet.png", sheet)
    return report, rate_distortion(report)


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

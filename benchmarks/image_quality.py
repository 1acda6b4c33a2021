"""Figures of the bundled image tokenizers, beside JPEG, WebP and AVIF on the same pictures in the same run.

    python benchmarks/image_quality.py --data data

Clip art and stamps, each picture at 64x64 on white. Writes benchmarks/results/image_quality.json from the test split,
which no other script reads; with --split val it only prints.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch

from mmtok import loading
from mmtok.checkpoints import META, bundled_directory, read_meta
from mmtok.cli.evaluate_images import show_figures, show_peers
from mmtok.evaluation.baselines import available
from mmtok.evaluation.images import image_report
from mmtok.evaluation.pictures import Pictures
from mmtok.evaluation.sets import choose
from mmtok.image.tokenizer import ImageTokenizer

RESULTS = Path(__file__).resolve().parent / "results" / "image_quality.json"
SOURCES = ("openclipart-png", "tuxpaint-stamps-default")
SIZE = 64


def bundled() -> list[str]:
    """Names of the image tokenizers that come with mmtok."""
    homes = sorted(path.parent for path in bundled_directory().glob(f"*/{META}"))
    kinds = {home.name: loading.TOKENIZERS.get(read_meta(home)["kind"]) for home in homes}
    return [name for name, kind in kinds.items() if kind is not None and issubclass(kind, ImageTokenizer)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizers", nargs="*", help="names of bundled image tokenizers; all without any")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--split", default="test", choices=("test", "val"))
    parser.add_argument("--limit", type=int, help="pictures of each source, for a quick try of val")
    args = parser.parse_args()
    if args.split == "test" and args.limit is not None:
        parser.error("--limit is for --split val: published figures are of all pictures")
    torch.set_num_threads(1)
    tokenizers = {name: loading.load(name) for name in args.tokenizers or bundled()}
    chosen, _ = choose(args.data / "images.jsonl", "image", args.split)
    figures: dict = {"machine": f"{platform.machine()}, one thread, torch {torch.__version__}", "split": args.split}
    for source in SOURCES:
        pictures = Pictures([item for item in chosen if item.source == source][: args.limit], SIZE)
        report = {
            "pictures": len(pictures),
            "pixels": pictures.pixels,
            "unreadable": pictures.unreadable,
            **image_report(tokenizers, pictures, available())[0],
        }
        print(f"--- {source}, {args.split}, {SIZE}x{SIZE}")
        show_figures(report)
        show_peers(report)
        figures[source] = report
    if args.split == "test":
        RESULTS.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Figures of the bundled text tokenizer on the test split.

    python benchmarks/text.py --data data

Writes benchmarks/results/text.json. The only script that reads the test split of texts; that of pictures is read by
image_quality.py, that of sounds by audio_quality.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mmtok
from mmtok.training.corpus import items

RESULTS = Path(__file__).resolve().parent / "results" / "text.json"


def text_figures(data: Path) -> dict:
    """Bytes per token and losslessness, by source."""
    tokenizer = mmtok.load("text-4k")
    out: dict = {"fingerprint": tokenizer.fingerprint, "vocabulary": tokenizer.codebook_sizes[0]}
    test = items(data / "text.jsonl", "text", "test")
    for source in sorted({x.source for x in test}):
        texts = [str(x.segment["text"]) for x in test if x.source == source]
        ids = tokenizer.encode(texts)
        size = sum(len(x.encode()) for x in texts)
        out[source] = {
            "documents": len(texts),
            "bytes_per_token": round(size / sum(map(len, ids)), 3),
            "identical": sum(a == b for a, b in zip(tokenizer.decode(ids), texts, strict=True)),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    args = parser.parse_args()
    figures = text_figures(args.data)
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

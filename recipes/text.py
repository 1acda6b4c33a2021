"""Train the text subword model: byte-level BPE, lossless for every string.

    python recipes/text.py --data data/text.jsonl --out runs/text-4k
    python recipes/text.py --data my/documents --out runs/mine --vocab-size 16384

--data is a manifest or a folder. Training takes seconds and is repeated from the start when it is interrupted.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from rich.progress import track

from mmtok.text import ByteLevelBPE
from mmtok.training.corpus import items

# Characters of one source that are read: without a cap, source code would drown the eighty languages of the names.
CAPS = {"stamps": 4_000_000, "doc": 1_500_000}
DEFAULT_CAP = 3_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/text.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("runs/text-4k"))
    parser.add_argument("--vocab-size", type=int, default=4096)
    args = parser.parse_args()

    texts, spent = [], {}
    for item in track(items(args.data, "text", "train"), "reading"):
        used = spent.get(item.source, 0)
        text = str(item.segment["text"])[: max(0, CAPS.get(item.source, DEFAULT_CAP) - used)]
        spent[item.source] = used + len(text)
        if text:
            texts.append(text)
    started = time.monotonic()
    model = ByteLevelBPE.train(texts, args.vocab_size)
    seconds = time.monotonic() - started

    held_out = [str(x.segment["text"]) for x in items(args.data, "text", "val")]
    ids = model.encode(held_out)
    if model.decode(ids) != held_out:
        raise SystemExit("the model is not lossless on the val split: this is a bug, please report it")
    size = sum(len(x.encode()) for x in held_out)
    figures = {"train_characters": spent, "seconds": round(seconds, 2), "vocab_size": model.codebook_sizes[0]}
    figures["val_bytes_per_token"] = round(size / sum(map(len, ids)), 3)
    model.save(args.out / "model")
    print(json.dumps(figures))
    print(f"wrote {args.out / 'model'}; use it with mmtok.load")


if __name__ == "__main__":
    main()

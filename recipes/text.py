"""Train a text subword model, byte-level BPE or Unigram: lossless for every string.

    python recipes/text.py --data data/text.jsonl --out runs/text-16k --vocab-size 16384
    python recipes/text.py --data my/documents notes.txt 'web/*.parquet' --out runs/mine --model unigram

--data takes manifests (.jsonl), folders, text files, Parquet files (the column "text", or --columns text=NAME) and all
else that mmtok.datasets.sources reads. They are read three times, as streams: to count, to train, and for the report.

Languages are balanced as in XLM-R (https://arxiv.org/abs/1911.02116): one with n bytes gets a share of the training
text in proportion to n ** alpha. A language is what a document or its text segment names as "language", else its
script. Of one that has more than its share, the documents are thinned by the hash of their names; one that has less is
repeated, ten times at most. --megabytes bounds the training text, and with it the memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.progress import track

from mmtok.errors import DataError, MmtokError
from mmtok.evaluation.texts import Text, read_texts, texts_report
from mmtok.text import ByteLevelBPE, ByteLevelUnigram
from mmtok.training.corpus import bucket

MODELS = {"bpe": ByteLevelBPE, "unigram": ByteLevelUnigram}
MAX_REPEATS = 10


def read(sources: list[str], columns: str | None, unreadable: list[str] | None = None) -> Iterator[Text]:
    """The texts of all sources."""
    for source in sources:
        yield from read_texts(source, columns, unreadable)


def repeats(sizes: Mapping[str, int], alpha: float, budget: int) -> dict[str, float]:
    """How often the text of each language is to be read, so that all together are at most ``budget`` bytes.

    Args:
        sizes: the bytes that there are of each language.
        alpha: 1 leaves the shares as they are, 0 makes all equal.
        budget: bytes.
    """
    shares = {language: size**alpha for language, size in sizes.items()}
    budget = min(budget, sum(sizes.values()))
    return {x: min(MAX_REPEATS, budget * share / sum(shares.values()) / sizes[x]) for x, share in shares.items()}


def chosen(texts: Iterator[Text], often: Mapping[str, float]) -> Iterator[str]:
    """The texts for training: each as often as its language says, what is left of that by the hash of its name."""
    for text in texts:
        if text.split == "train":
            whole, rest = divmod(often[text.language], 1)
            for _ in range(int(whole) + (bucket(f"balance {text.name}") < rest * 2**32)):
                yield text.text


def train(args: argparse.Namespace) -> None:
    """Count, train, report."""
    sizes: Counter[str] = Counter()
    texts: Counter[str] = Counter()
    unreadable: list[str] = []
    for text in track(read(args.data, args.columns, unreadable), "counting", total=None):
        if text.split == "train":
            sizes[text.language] += len(text.text.encode())
            texts[text.language] += 1
    for line in unreadable[:20]:
        print(f"left out: {line}", file=sys.stderr)
    if not sizes:
        raise DataError(f"{', '.join(args.data)}: no text in split 'train', expected some to train on")
    often = repeats(sizes, args.alpha, round(args.megabytes * 1e6))
    taken = {language: round(size * often[language]) for language, size in sizes.items()}
    print(f"{sum(sizes.values()) / 1e6:.1f} MB in {len(sizes)} languages; trains on {sum(taken.values()) / 1e6:.1f} MB")

    started = time.monotonic()
    total = sum(round(n * often[language]) for language, n in texts.items())
    feed = track(chosen(read(args.data, args.columns), often), "training", total=total)
    model = MODELS[args.model].train(feed, args.vocab_size)
    seconds = time.monotonic() - started
    model.save(args.out / "model")

    report = texts_report(model, ((t.language, t.text) for t in read(args.data, args.columns) if t.split == "val"))
    row = "{:24}{:>12}{:>8}{:>8}{:>12}{:>13}{:>13}".format
    print("\n" + row("language", "bytes", "of all", "read", "val bytes", "bytes/token", "tokens/word"))
    for language in sorted(sizes, key=lambda x: -taken[x]):
        share, val = taken[language] / sum(taken.values()), report["languages"].get(language, {})
        measured = (val.get(key, "-") for key in ("bytes", "bytes_per_token", "tokens_per_word"))
        print(row(language, sizes[language], f"{share:.2%}", f"{often[language]:.2f}", *measured))
    if report["documents"] != report["identical"]:
        raise SystemExit("the model is not lossless on the val split: this is a bug, please report it")
    figures = {
        "model": args.model,
        "vocab_size": model.codebook_sizes[0],
        "alpha": args.alpha,
        "train_bytes": sum(taken.values()),
        "seconds": round(seconds, 2),
        "val": {k: v for k, v in report.items() if k != "languages"},
        "languages": {
            x: {"train_bytes": sizes[x], "read": round(often[x], 3), "val": report["languages"].get(x)} for x in sizes
        },
    }
    (args.out / "metrics.json").write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    told = f"{report['bytes_per_token']} bytes per token over all" if report["documents"] else "no text to report on"
    print(f"\nsplit val: {told}; {seconds:.1f} s of training")
    print(f"wrote {args.out / 'model'}; use it with mmtok.load")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["data/text.jsonl"])
    parser.add_argument("--columns", help="of Parquet files, such as text=content")
    parser.add_argument("--out", type=Path, default=Path("runs/text"))
    parser.add_argument("--model", choices=MODELS, default="bpe")
    parser.add_argument("--vocab-size", type=int, default=16_384)
    parser.add_argument("--alpha", type=float, default=0.5, help="1: languages as they are; 0: all equal")
    parser.add_argument("--megabytes", type=float, default=64, help="of text to train on, at most")
    args = parser.parse_args()
    try:
        train(args)
    except MmtokError as error:
        sys.exit(f"text.py: {error}")


if __name__ == "__main__":
    main()

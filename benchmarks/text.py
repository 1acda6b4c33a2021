"""Figures of the bundled text tokenizers on the test split, by source and by language.

    python benchmarks/text.py --data data

Writes benchmarks/results/text.json. The only script that reads the test split of texts; that of pictures is read by
image_quality.py, that of sounds by audio_quality.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mmtok
from mmtok.evaluation.texts import language_of, texts_report
from mmtok.training.corpus import items

RESULTS = Path(__file__).resolve().parent / "results" / "text.json"
NAMES = ("text-4k", "text-16k")


def text_figures(data: Path) -> dict:
    """Of each tokenizer: tokens and losslessness, by source, and by language where the source says it."""
    test = items(data / "text.jsonl", "text", "test")
    texts = [str(x.segment["text"]) for x in test]
    told = [i for i, x in enumerate(test) if "language" in x.segment]
    out = {}
    for name in NAMES:
        tokenizer = mmtok.load(name)
        by_source = texts_report(tokenizer, [(x.source, text) for x, text in zip(test, texts, strict=True)])
        by_language = texts_report(tokenizer, [(language_of({}, test[i].segment), texts[i]) for i in told])
        out[name] = {
            "fingerprint": tokenizer.fingerprint,
            "vocabulary": by_source["vocabulary"],
            "unused_ids": by_source["unused_ids"],
            "documents": by_source["documents"],
            "identical": by_source["identical"],
            "sources": by_source["languages"],
            "mean_of_languages": by_language["mean_of_languages"],
            "languages": by_language["languages"],
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    args = parser.parse_args()
    figures = text_figures(args.data)
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")
    for name, found in figures.items():
        print(f"{name}: {found['vocabulary']} ids, {found['identical']} of {found['documents']} texts identical")
        for group in ("sources", "languages"):
            for key, f in found[group].items():
                print(
                    f"  {key:24}{f['documents']:6}{f['bytes']:10}{f['bytes_per_token']:8.3f}{f['tokens_per_word']:8.3f}"
                )


if __name__ == "__main__":
    main()

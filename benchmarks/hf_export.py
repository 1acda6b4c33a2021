"""Is an exported vocabulary the same in transformers, id for id? Written by mmtok, checked without it.

    python benchmarks/hf_export.py make --vocabulary any-to-any --codes 140000 --out exported     # with mmtok
    python benchmarks/hf_export.py check exported                # with transformers alone: any version, without torch

``make`` exports the vocabulary, with an image tokenizer of ``--codes`` more codes if asked, and writes beside it, in
expected.json, what mmtok says of every id and how it encodes many texts. ``check`` loads the directory with
AutoTokenizer, compares everything, and writes benchmarks/results/hf_export.json: what was compared and the seconds that
loading took, by version. It fails on the first difference.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "hf_export.json"
EXPECTED = "expected.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("make")
    made.add_argument("--vocabulary", default="any-to-any")
    made.add_argument("--codes", type=int, default=0)
    made.add_argument("--out", type=Path, required=True)
    checked = commands.add_parser("check")
    checked.add_argument("directory", type=Path)
    checked.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.command == "make":
        make(args.vocabulary, args.codes, args.out)
    else:
        check(args.directory, args.results)


def make(vocabulary: str, codes: int, out: Path) -> None:
    """Export with mmtok and note what it says of ids and texts."""
    from mmtok import MultimodalTokenizer
    from mmtok.export import export_hf
    from mmtok.registry import TokenizerSpec

    mm = MultimodalTokenizer.load(vocabulary)
    registry = mm.registry
    if codes:
        registry = registry.extend([TokenizerSpec("more", "image", (codes,), "codes of a benchmark")])
    export_hf(registry, mm.tokenizers, out)
    text, block = mm.tokenizers[registry.tokenizer("text").name], registry.block("text")
    samples = texts([name for b in registry.blocks for name in b.names])
    expected = {
        "fingerprint": registry.fingerprint,
        "padded_size": registry.padded_size,
        "control": {name: registry.control(name) for b in registry.blocks for name in b.names},
        "roles": {"pad": registry.pad, "bos": registry.bos, "eos": registry.eos},
        "text": [block.start, block.end],
        "meaning": [registry.describe(id) for id in range(registry.padded_size)],
        "texts": [
            {"text": s, "ids": (ids + block.start).tolist()}
            for s, ids in zip(samples, text.encode(samples), strict=True)
        ],
    }
    (out / EXPECTED).write_text(json.dumps(expected), encoding="utf-8")
    print(f"{registry.padded_size} ids and {len(samples)} texts in {out}")


def texts(control: list[str]) -> list[str]:
    """Names of control tokens and codes in all places, every script, and random strings."""
    names = [*control, "<|image:5|>", "<|audio.0:5|>", "<|grid:7|>", "<|unused:9300|>", "<|image:more:5|>", "<s>"]
    rng = random.Random(0)
    alphabets = [
        [chr(c) for c in range(1, 0x250)],
        [chr(c) for c in (*range(0x370, 0x2000), *range(0x3000, 0x9FFF), *range(0x1F300, 0x1FAFF))],
        [*names, " ", "\n", "a", "image", "<", ">", "|", ":", "5", "</"],
    ]
    fuzz = ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for alphabet in alphabets for _ in range(1000)]
    plain = [
        "",
        " ",
        "a cow",
        "une vache \u00e0 l'\u00e9table",
        "it's  12345 \r\n\t \ufeff\u2581 \U0001f404",
        "x" * 10_000,
    ]
    return [*plain, *names, *(f"a{n}b {n}\n{n}" for n in names), "".join(names), *fuzz]


def check(directory: Path, results: Path) -> None:
    """Compare the directory under the installed transformers with what mmtok noted."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import tokenizers
    import transformers
    from transformers import AutoTokenizer

    expected = json.loads((directory / EXPECTED).read_text(encoding="utf-8"))
    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    seconds = time.perf_counter() - start
    compare(tokenizer, expected)
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        compare(AutoTokenizer.from_pretrained(saved), expected)
    key = f"transformers {transformers.__version__}, {expected['padded_size']} ids"
    figures = json.loads(results.read_text()) if results.is_file() else {}
    figures[key] = {
        "tokenizers": tokenizers.__version__,
        "mmtok_imported": "mmtok" in sys.modules,
        "torch_imported": "torch" in sys.modules,
        "ids_compared": len(expected["meaning"]),
        "texts_compared": len(expected["texts"]),
        "load_seconds": round(seconds, 2),
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"{key}: {json.dumps(figures[key])}")


def compare(tokenizer, expected: dict) -> None:
    """Every id, every role, every text; the first difference ends the program."""

    def same(what: str, got: object, want: object) -> None:
        if got != want:
            sys.exit(f"{what}: got {str(got)[:200]}, expected {str(want)[:200]}")

    size, control = expected["padded_size"], expected["control"]
    same("len", len(tokenizer), size)
    same("fingerprint", tokenizer.init_kwargs["mmtok"]["fingerprint"], expected["fingerprint"])
    roles = {"pad": tokenizer.pad_token_id, "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    same("roles", roles, expected["roles"])
    same("special ids", sorted(tokenizer.all_special_ids), sorted(control.values()))
    tokens = tokenizer.convert_ids_to_tokens(list(range(size)))
    same("ids without a token", [i for i, t in enumerate(tokens) if t is None], [])
    same("back", tokenizer.convert_tokens_to_ids(tokens), list(range(size)))
    first, last = expected["text"]
    for id, (token, meaning) in enumerate(zip(tokens, expected["meaning"], strict=True)):
        if not first <= id < last:
            same(f"id {id}", in_words(token), meaning)
    for case in expected["texts"]:
        text, ids = case["text"], case["ids"]
        same(f"encode {text[:60]!r}", tokenizer(text)["input_ids"], ids)
        same(f"decode {text[:60]!r}", tokenizer.decode(ids), text)
    batch = tokenizer([case["text"] for case in expected["texts"]])["input_ids"]
    same("a batch", batch, [case["ids"] for case in expected["texts"]])
    for name, id in control.items():
        same(f"trusted {name}", tokenizer(name, split_special_tokens=False)["input_ids"], [id])


def in_words(token: str) -> str:
    """What mmtok calls a token: ``<|audio.0:5|>`` is ``audio level 0 code 5``."""
    if not token.startswith("<|"):
        return token
    block, _, number = token[2:-2].rpartition(":")
    if block in ("unused", "grid"):
        return f"{'unused id' if block == 'unused' else 'grid size'} {number}"
    tokenizer, _, level = block.rpartition(".")
    if block.startswith("audio"):
        return f"{tokenizer} level {level} code {number}"
    return f"{block} {'id' if block.startswith('text') else 'code'} {number}"


if __name__ == "__main__":
    main()

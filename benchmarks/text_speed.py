"""Encoding text: mmtok with each engine, and the bare engines, beside ``tokenizers``' own ``encode_batch_fast``.

    python benchmarks/text_speed.py --data data/text.jsonl

Writes benchmarks/results/text_speed.json: megabytes (10**6 bytes of UTF-8) a second, and ratios to ``tokenizers`` in
the same process. Texts are those of the train and val splits: as documents, cut into lines, and joined to a megabyte
each. Cold is the first pass of a fresh engine over texts that it has not seen, warm the best of the passes that follow;
every pass gets fresh strings. With one thread seconds are those of the processor, so that other work on the machine
does not count; with all they are those of the clock. Each in a process of its own. The ids are compared with those of
``tokenizers``. Then the whole train split once, as a stream in batches of two million characters.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

import mmtok
from mmtok.evaluation.texts import read_texts
from mmtok.text import ByteLevelBPE, engines

RESULTS = Path(__file__).resolve().parent / "results" / "text_speed.json"
NAME = "text-16k"
Encode = Callable[[list[str]], Any]
Maker = Callable[[], Encode]
STREAM = 2_000_000  # characters at once
COLD, WARM = 2, 3  # fresh engines, further passes of each


def sets_of(data: Path, megabytes: float) -> dict[str, list[str]]:
    """Documents of train and val, evenly spread, of so many megabytes together; their lines; and them joined."""
    texts = [x.text for x in read_texts(data) if x.split in ("train", "val")]
    step = max(1, round(sum(len(x.encode()) for x in texts) / 1e6 / megabytes))
    documents = texts[::step]
    whole = "\n".join(documents)
    return {
        "documents": documents,
        "lines": [line for text in documents for line in text.splitlines(keepends=True)],
        "joined": [whole[i : i + 1_000_000] for i in range(0, len(whole), 1_000_000)],
    }


def fresh(texts: list[str]) -> list[str]:
    """Copies: a string keeps its UTF-8 once it was asked for."""
    return [(text + " ")[:-1] for text in texts]


def measure(make: Maker, texts: list[str], flat: Callable[[Any], np.ndarray]) -> tuple[dict, np.ndarray]:
    """Rates, cold and warm, and the ids."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    clock = time.process_time if os.environ["RAYON_NUM_THREADS"] == "1" else time.perf_counter
    cold: list[float] = []
    warm: list[float] = []
    for _ in range(COLD):
        encode = make()
        for n in range(1 + WARM):
            copies = fresh(texts)
            started = clock()
            out = encode(copies)
            (warm if n else cold).append(clock() - started)
    return {"cold": megabytes / min(cold), "warm": megabytes / min(warm)}, flat(out)


def stream(make: Maker, data: Path) -> tuple[float, float]:
    """Megabytes of the train split, and the rate at which a fresh engine encodes it, once."""
    clock = time.process_time if os.environ["RAYON_NUM_THREADS"] == "1" else time.perf_counter
    encode, batch, size, megabytes, seconds = make(), [], 0, 0.0, 0.0
    for text in read_texts(data):
        if text.split == "train":
            batch.append(text.text)
            size += len(text.text)
        if size > STREAM:
            megabytes += sum(len(x.encode()) for x in batch) / 1e6
            copies = fresh(batch)
            started = clock()
            encode(copies)
            seconds += clock() - started
            batch, size = [], 0
    return megabytes, megabytes / seconds


def plain(source: str) -> Encode:
    """``tokenizers``."""
    return partial(Tokenizer.from_str(source).encode_batch_fast, add_special_tokens=False)


def ids_of(encodings: list[Any]) -> np.ndarray:
    """What ``plain`` gives, as ids in a row."""
    return np.array([i for encoding in encodings for i in encoding.ids])


def through_mmtok(source: str, engine: type[engines.Engine]) -> Encode:
    """A model that uses this engine."""
    known, engines.ENGINES = engines.ENGINES, (engine,)
    try:
        model = ByteLevelBPE(source)
        if model.engine != engine.name:
            raise SystemExit(f"{engine.name} is not installed, or its ids are not those of tokenizers")
    finally:
        engines.ENGINES = known
    return model.encode


def bare(source: str, engine: type[engines.Engine]) -> Encode:
    """The engine with neither proof nor checks of the texts nor conversion to int64."""
    return engine(source, mmtok.load(NAME)._id_to_bytes).encode


def one_process(data: Path, megabytes: float) -> dict:
    """All figures with the threads that this process has."""
    source = mmtok.load(NAME).tokenizer_json
    started = time.perf_counter()
    model = ByteLevelBPE(source)
    loaded = time.perf_counter()
    out: dict = {"engine": model.engine}
    out |= {"load_seconds": round(loaded - started, 3), "proof_seconds": round(time.perf_counter() - loaded, 3)}
    makers: dict[str, tuple[Maker, Callable[[Any], np.ndarray]]] = {}
    for engine in engines.ENGINES:
        makers[f"mmtok with {engine.name}"] = partial(through_mmtok, source, engine), np.concatenate
        makers[f"{engine.name} alone"] = partial(bare, source, engine), itemgetter(0)
    for name, texts in sets_of(data, megabytes).items():
        found = {}
        found["tokenizers"], ids = measure(partial(plain, source), texts, ids_of)
        for label, (make, flat) in makers.items():
            found[label], own = measure(make, texts, flat)
            if not np.array_equal(own, ids):
                raise SystemExit(f"{label}: other ids than tokenizers on {name}")
        base = found["tokenizers"]
        out[name] = {
            "texts": len(texts),
            "megabytes": round(sum(len(x.encode()) for x in texts) / 1e6, 2),
            "tokens": len(ids),
            "ids_equal": True,
            "megabytes_per_second": {x: {k: round(v, 1) for k, v in r.items()} for x, r in found.items()},
            "ratio": {x: {k: round(v / base[k], 1) for k, v in r.items()} for x, r in found.items()},
        }
    runs = {label: stream(make, data) for label, (make, _) in makers.items()}
    runs = {"tokenizers": stream(partial(plain, source), data), **runs}
    out["stream"] = {
        "megabytes": round(runs["tokenizers"][0], 2),
        "megabytes_per_second": {x: {"once": round(rate, 1)} for x, (_, rate) in runs.items()},
        "ratio": {x: {"once": round(rate / runs["tokenizers"][1], 1)} for x, (_, rate) in runs.items()},
    }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/text.jsonl"))
    parser.add_argument("--megabytes", type=float, default=10, help="of text, about")
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inner:
        print(json.dumps(one_process(args.data, args.megabytes)))
        return
    versions = {x: importlib.metadata.version(x) for x in ("tokenizers", "fastokens", "gigatoken", "tiktoken")}
    results: dict = {"tokenizer": NAME, "cores": os.cpu_count(), "machine": platform.machine(), "versions": versions}
    command = [sys.executable, __file__, "--inner", "--data", str(args.data), "--megabytes", str(args.megabytes)]
    for threads in (1, os.cpu_count()):
        env = {**os.environ, "RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
        results[f"threads_{threads}"] = found = json.loads(done.stdout)
        print(
            f"{threads} threads: {found['load_seconds']} s to load, {found['proof_seconds']} to prove {found['engine']}"
        )
        for name in ("documents", "lines", "joined", "stream"):
            print(f"  {name}: {found[name]['megabytes']} MB in {found[name].get('texts', 'many')} texts")
            for label, rates in found[name]["megabytes_per_second"].items():
                told = (f"{kind} {rate:7} MB/s {found[name]['ratio'][label][kind]:6}x" for kind, rate in rates.items())
                print(f"    {label:24} {'   '.join(told)}")
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

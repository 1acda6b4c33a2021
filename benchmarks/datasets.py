"""How fast datasets are built beside the bare tokenizers, and that memory does not grow with the number of documents.

    python benchmarks/datasets.py --data data

Writes benchmarks/results/datasets.json. Reading is measured by dataset_reader.py, text encoding by text_speed.py, what
a dataset survives by dataset_proofs.py, whose corpus is used here: recorded names of the stamps, a picture, a text and
a sound each.

- bare: the three tokenizers get all texts, all pictures and all sounds as arrays that were read before. One thread.
- builder: from the manifest to the finished dataset, files read, decoded, resized and resampled on the way, without
  the time to load the models. One worker, which reads ahead in threads on another core.
- with a worker on each core, beside as many processes of bare tokenizers, each with its share: there reading has no
  core of its own. Documents a second between the first and the last result.
- memory: the largest resident set of a process that builds text documents, and of one that reads them packed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from dataset_proofs import write_manifest

from mmtok import media
from mmtok.datasets.build import Progress, build
from mmtok.datasets.build.config import EncodeConfig
from mmtok.multimodal import MultimodalTokenizer

RESULTS = Path(__file__).resolve().parent / "results" / "datasets.json"
MODEL, CONFIG = "any-to-any", EncodeConfig(image_size=64)
COUNTS = (10_000, 100_000, 1_000_000)


class Bare:
    """Texts, pictures and sounds in memory, and what the tokenizers need for them."""

    def __init__(self, lines: list[str], root: Path) -> None:
        torch.set_num_threads(1)
        self.mm = MultimodalTokenizer.load(MODEL)
        self.texts, self.pictures, self.sounds = [], [], []
        for line in lines:
            text, image, audio = json.loads(line)["segments"]
            self.texts.append(text["text"])
            pixels = media.fit_image(media.read_image(root / image["path"]), CONFIG.image_size)
            self.pictures.append(torch.from_numpy(pixels))
            self.sounds.append(torch.from_numpy(media.read_audio(root / audio["path"], 16_000)))

    def seconds(self) -> float:
        began = time.perf_counter()
        for modality, values in (("text", self.texts), ("image", self.pictures), ("audio", self.sounds)):
            spec = self.mm.registry.tokenizer(modality)
            levels = {"levels": len(spec.codebook_sizes)} if modality == "audio" else {}  # no more than are used
            self.mm.tokenizers[spec.name].encode(values, **levels)
        return time.perf_counter() - began


def timed_build(manifest: Path, out: Path, workers: int) -> tuple[float, float]:
    """Seconds from the first document that is listed to the finished dataset; documents a second between results."""
    marks: list[tuple[float, Progress]] = []
    shutil.rmtree(out, ignore_errors=True)
    build(str(manifest), out, MODEL, CONFIG, workers=workers, progress=lambda p: marks.append((time.perf_counter(), p)))
    done = [(t, p.documents) for t, p in marks if p.stage == "encoding" and p.documents]
    (t0, n0), (t1, n1) = done[0], done[-1]
    return time.perf_counter() - marks[0][0], (n1 - n0) / (t1 - t0) if n1 > n0 else 0.0


def one_worker(manifest: Path, work: Path, documents: int, rounds: int) -> dict:
    lines = manifest.read_text(encoding="utf-8").splitlines()
    part = manifest.parent / "names-part.jsonl"
    part.write_text("\n".join(lines[:: max(1, len(lines) // documents)][:documents]) + "\n", encoding="utf-8")
    chosen = part.read_text(encoding="utf-8").splitlines()
    bare = Bare(chosen, manifest.parent)
    ratios, rates = [], []
    for _ in range(rounds):
        alone = bare.seconds()
        whole, _ = timed_build(part, work / "one", 1)
        ratios.append(alone / whole)
        rates.append((len(chosen) / alone, len(chosen) / whole))
        print(f"bare {alone:.2f} s, builder {whole:.2f} s", flush=True)
    part.unlink()
    return {
        "documents": len(chosen),
        "bare documents/s": round(statistics.median(x for x, _ in rates), 1),
        "builder documents/s": round(statistics.median(x for _, x in rates), 1),
        "builder / bare": round(statistics.median(ratios), 3),
        "of each round": [round(x, 3) for x in ratios],
    }


def bare_share(manifest: Path, first: int, step: int) -> None:
    """In a process of its own: encode every ``step``-th document; wait for a line before."""
    lines = manifest.read_text(encoding="utf-8").splitlines()[first::step]
    bare = Bare(lines, manifest.parent)
    bare.mm.tokenizers[bare.mm.registry.tokenizer("image").name].encode(bare.pictures[:2])  # sets things up
    print("ready", flush=True)
    sys.stdin.readline()
    print(bare.seconds(), flush=True)


def all_cores(manifest: Path, work: Path, workers: int) -> dict:
    documents = len(manifest.read_text(encoding="utf-8").splitlines())
    call = [sys.executable, __file__, "--bare", str(manifest)]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*call, str(i), str(workers)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet
        )
        for i in range(workers)
    ]
    for process in processes:
        if process.stdout is None or process.stdout.readline() != "ready\n":
            raise SystemExit("a process with bare tokenizers did not start")
    began = time.perf_counter()
    for process in processes:
        process.stdin.write("go\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    for process in processes:
        process.stdout.readline()  # type: ignore[union-attr]
        process.wait()
    bare = documents / (time.perf_counter() - began)
    _, rate = timed_build(manifest, work / "all", workers)
    return {
        "workers": workers,
        "bare documents/s": round(bare, 1),
        "builder documents/s": round(rate, 1),
        "builder / bare": round(rate / bare, 3),
    }


# The kernel's figures for this program alone: getrusage's has that of the program that started it. The peak has pages
# of mapped files, which the system takes back when it needs them; own memory, at the end, has not.
PEAK = '*(x.split()[1] for x in open("/proc/self/status") if x.startswith(("VmHWM", "RssAnon")))'
BUILD = f"""
import sys, time
from mmtok.datasets.build import build
began = time.monotonic()
report = build(sys.argv[1], sys.argv[2], "any-to-any", workers=1)
print(report.documents, report.tokens, time.monotonic() - began, {PEAK})
"""
READ = f"""
import itertools, sys, time
from mmtok.datasets.loader import Batches
from mmtok.datasets.loader.packing import Packs
from mmtok.datasets.shards import TokenDataset
began = time.monotonic()
packs = Packs(TokenDataset.open(sys.argv[2]), 2048)
batches = Batches(packs, batch_size=8, seed=0)
rows = sum(len(x["ids"]) for x in itertools.islice(batches, len(packs) // 8))
print(len(packs.dataset), rows, time.monotonic() - began, {PEAK})
"""


def memory(work: Path) -> dict:
    """Peak of a process, in MB, for more and more documents of twelve words each."""
    out: dict = {"build": {}, "read": {}}
    choice = random.Random(0)
    words = ["".join(choice.choices("abcdefghijklmnopqrstuvwxyz", k=choice.randint(2, 9))) for _ in range(20_000)]
    for count in COUNTS:
        manifest, dataset = work / f"{count}.jsonl", work / f"{count}"
        with manifest.open("w") as file:
            for i in range(count):
                segment = {"type": "text", "text": " ".join(choice.choices(words, k=12))}
                file.write(json.dumps({"id": f"document {i}", "segments": [segment]}) + "\n")
        for name, program in (("build", BUILD), ("read", READ)):
            call = [sys.executable, "-c", program, str(manifest), str(dataset)]
            done = subprocess.run(call, check=True, capture_output=True, text=True)
            documents, _, seconds, peak, own = done.stdout.split()
            out[name][documents] = {
                "peak MB": round(int(peak) / 1024),
                "own MB at the end": round(int(own) / 1024),
                "seconds": round(float(seconds), 1),
            }
            print(name, documents, out[name][documents], flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--documents", type=int, default=600, help="for the builder with one worker")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bare", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        bare_share(Path(args.bare[0]), int(args.bare[1]), int(args.bare[2]))
        return
    manifest, _ = write_manifest(args.data.resolve())
    work = Path(tempfile.mkdtemp())
    try:
        cores = os.cpu_count() or 1
        results = {
            "machine": f"{platform.processor() or platform.machine()}, {cores} cores",
            "one worker": one_worker(manifest, work, args.documents, args.rounds),
            "a worker on each core": all_cores(manifest, work, cores),
            "memory": memory(work),
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

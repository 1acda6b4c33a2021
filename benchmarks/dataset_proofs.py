"""What a dataset survives, on a real corpus: kills, any number of workers, flipped bits, a full and a read-only disk.

    python benchmarks/dataset_proofs.py --data data

The corpus is recorded names of the stamps in ten languages (train split): each document is a picture, its name as
text, and the name spoken; 2,400 of them, evenly spread. Writes benchmarks/results/dataset_proofs.json. The disks are
made with mount, for which one must be root; without, that part says that it was not run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mmtok.datasets.shards import TokenDataset
from mmtok.errors import DataError, VocabularyError

RESULTS = Path(__file__).resolve().parent / "results" / "dataset_proofs.json"
STAMPS = "corpora/tuxpaint-stamps-default/usr/share/tuxpaint/stamps"
DOCUMENTS, KILLS, FLIPS = 2_400, 10, 10_000


def write_manifest(data: Path) -> tuple[Path, int]:
    """One document for each recorded name of a train concept whose picture is at hand."""
    lines = []
    for line in (data / "audio.jsonl").read_text(encoding="utf-8").splitlines():
        sound = json.loads(line)
        match = re.fullmatch(r"stamps/(.+)_desc(?:_\w+)?", sound["id"])
        if sound["split"] != "train" or sound["source"] != "speech" or not match:
            continue
        concept, language = match[1], sound["language"]
        pictures = (data / STAMPS / f"{concept}.png", data / "stamps-png" / f"{concept}.png")
        picture = next((x for x in pictures if x.is_file()), None)
        written = data / STAMPS / f"{concept}.txt"
        captions = written.read_text(encoding="utf-8", errors="replace") if written.is_file() else ""
        name = re.search(rf"^{language}(?:\.utf8)?=(.+)$", captions, re.M)
        if picture is None or not captions or (language != "en" and name is None):
            continue
        text = name[1].strip() if name else captions.splitlines()[0].strip()
        segments = [
            {"type": "text", "text": text, "language": language},
            {"type": "image", "path": str(picture.relative_to(data))},
            sound["segments"][0],
        ]
        lines.append(json.dumps({"id": sound["id"], "language": language, "segments": segments}, ensure_ascii=False))
    path = data / "names.jsonl"
    spread = [lines[i * len(lines) // DOCUMENTS] for i in range(DOCUMENTS)]
    path.write_text("\n".join(spread) + "\n", encoding="utf-8")
    return path, len(spread)


def command(manifest: Path, out: Path, workers: int, engine: str = "local") -> list[str]:
    call = "from mmtok.cli import main; main()"
    options = ["--image-size", "64", "--workers", str(workers), "--engine", engine, "--shard-tokens", "500000"]
    return [sys.executable, "-c", call, "dataset", "build", str(manifest), "-o", str(out), *options]


def run(*arguments: object) -> tuple[float, subprocess.CompletedProcess[str]]:
    began = time.monotonic()
    done = subprocess.run(command(*arguments), check=False, capture_output=True, text=True)  # type: ignore[arg-type]
    return time.monotonic() - began, done


def bytes_of(folder: Path) -> str:
    """sha256 over the names and the bytes of every file."""
    digest = hashlib.sha256()
    for file in sorted(x for x in folder.rglob("*") if x.is_file()):
        digest.update(f"{file.relative_to(folder)} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest()


def any_workers(manifest: Path, work: Path) -> dict:
    """Seconds and bytes of builds with 1, 2 and 4 workers, local and on Ray."""
    out = {}
    for engine in ("local", "ray"):
        for workers in (1, 2, 4):
            folder = work / f"{engine}-{workers}"
            seconds, done = run(manifest, folder, workers, engine)
            if done.returncode:
                raise SystemExit(f"{engine} with {workers} workers: {done.stderr[-2000:]}")
            out[f"{engine} {workers}"] = {"seconds": round(seconds, 1), "sha256": bytes_of(folder)}
            print(f"{engine} {workers}", out[f"{engine} {workers}"], flush=True)
    return out


def kills(manifest: Path, work: Path, whole: float) -> dict:
    """SIGKILL at random moments, the whole group and the parent alone in turn; then the last run.

    Where a build was over before its moment came, that does not count, and all begins anew.
    """
    choice, folder, moments = random.Random(0), work / "killed", []
    while len(moments) < KILLS:
        process = subprocess.Popen(
            command(manifest, folder, 2), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        moment = choice.uniform(0.1, whole * 0.6)
        alone = len(moments) % 2 == 1
        time.sleep(moment)
        if process.poll() is not None:
            shutil.rmtree(folder)
            continue
        (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(1.5)  # workers whose parent is gone end by themselves
        units = len(list((folder / ".build").glob("unit-*.json"))) if folder.exists() else 0
        moments.append({"after": round(moment, 2), "alone": alone, "units done": units})
        print(moments[-1], flush=True)
    _, done = run(manifest, folder, 2)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return {"kills": moments, "sha256": bytes_of(folder)}


def flips(folder: Path) -> dict:
    """Flip one bit of a shard, read all documents; so many times, each time another bit."""
    shard = max(folder.glob("shard-*"), key=lambda x: x.stat().st_size)
    data = bytearray(shard.read_bytes())
    found = 0
    bits = np.random.default_rng(0).choice(8 * len(data), FLIPS, replace=False).tolist()
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
        shard.write_bytes(data)
        try:
            for part in TokenDataset.open(folder).shards:
                part.part()
        except (DataError, VocabularyError):
            found += 1
        data[bit // 8] ^= 1 << bit % 8
    shard.write_bytes(data)
    TokenDataset.open(folder).verify()
    return {"bytes": len(data), "flipped": FLIPS, "found": found}


def disks(manifest: Path, work: Path) -> dict:
    """A disk of too few megabytes, which then gets more; and one that is read-only."""
    place = work / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], check=False, capture_output=True
    )
    if mounted.returncode:
        return {"not run": "mount is not permitted here"}
    try:
        _, full = run(manifest, place / "d", 2)
        subprocess.run(["mount", "-o", "remount,size=200m", place], check=True)
        readable = (place / "d" / "dataset.json").exists()
        _, after = run(manifest, place / "d", 2)
        total = bytes_of(place / "d") if not after.returncode else ""
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        _, locked = run(manifest, place / "e", 2)
        same = bytes_of(place / "d") == total
    finally:
        subprocess.run(["umount", "-l", place], check=True)
    return {
        "full": {"exit code": full.returncode, "lines": full.stderr.strip().splitlines(), "dataset.json": readable},
        "after": {"exit code": after.returncode, "sha256": total},
        "read-only": {"exit code": locked.returncode, "lines": locked.stderr.strip().splitlines(), "unchanged": same},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    args = parser.parse_args()
    manifest, documents = write_manifest(args.data)
    work = Path(tempfile.mkdtemp())
    try:
        results = {"documents": documents, "builds": any_workers(manifest, work)}
        whole = work / "local-2"
        results["killed"] = kills(manifest, work, results["builds"]["local 2"]["seconds"])
        dataset = TokenDataset.open(whole)
        results |= {"tokens": dataset.tokens, "shards": len(dataset.shards), "left out": dataset.left_out}
        results["disks"] = disks(manifest, work)
        results["flips"] = flips(whole)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    sums = {x["sha256"] for x in results["builds"].values()} | {results["killed"]["sha256"]}
    if "after" in results["disks"]:
        sums.add(results["disks"]["after"]["sha256"])
        for part in ("full", "read-only"):  # the place is a temporary one
            lines = results["disks"][part]["lines"]
            results["disks"][part]["lines"] = [x.replace(str(work / "disk"), "DISK") for x in lines]
    results["all byte-identical"] = len(sums) == 1
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

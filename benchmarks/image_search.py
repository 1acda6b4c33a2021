"""What the nearest-code search costs beside vector-quantize-pytorch's and beside plain torch, in one run.

    python benchmarks/image_search.py

Writes benchmarks/results/image_search.json. Random normal vectors and codebooks, one thread. Contenders take turns; a
ratio is the median of the ratios of the turns, a time the least.

- ``large``: 16,384 vectors, 262,144 codes, beside ``VectorQuantize`` in eval mode with the same codebook. It cannot do
  all at once (one N x K matrix is 16 GiB and it holds several): its time is that of ``SHARE`` vectors times N / SHARE,
  in calls of each size of ``SLICES``, and ratios are to the quicker size. GFLOP/s count 2 N K d, beside those
  of a large square product and of products of a tile's shape. Codes that differ from the peer's are counted, and by how
  much their distances differ. Peak memory, for d = 8, is that of a process of its own for each contender beyond what it
  held before the search (VmHWM of Linux): the peer's in one call of ``SHARE`` vectors, ours of all.
- ``small``: the sizes of pictures, beside the plain ``(c2 - 2 x @ c.T).argmin(1)`` and ``VectorQuantize``.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from mmtok import nearest as module
from mmtok.nearest import near_ties, nearest

RESULTS = Path(__file__).resolve().parent / "results" / "image_search.json"
VECTORS, CODES = 16_384, 262_144
SHARE, SLICES = 256, (256, 8)
TURNS = 3


def main(argv: list[str] | None = None) -> dict:
    """Measure, print and write all figures; with arguments "memory CONTENDER" print one contender's peak memory."""
    arguments = sys.argv[1:] if argv is None else argv
    torch.set_num_threads(1)
    if arguments[:1] == ["memory"]:
        figures = {"peak_mb": memory(arguments[1])}
        print(json.dumps(figures))
        return figures
    figures = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, one thread",
        "load_before": round(os.getloadavg()[0], 1),
        "large": {f"N {VECTORS}, K {CODES}, d {d}": large(d) for d in (8, 16, 64)},
        "peak_mb": {f"ours, {VECTORS} vectors": apart("ours"), f"peer, {SHARE} vectors": apart("peer")},
        "small": {f"N {n}, K {k}, d 8": small(n, k) for k in (1024, 4096) for n in (64, 1024, 4096)},
        "load_after": round(os.getloadavg()[0], 1),
    }
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    return figures


def problem(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Vectors and codebook, float32 [n, d] and [k, d]."""
    chance = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=chance), torch.randn(k, d, generator=chance)


def peer(codebook: Tensor, size: int) -> Callable[[Tensor], Tensor]:
    """vector-quantize-pytorch's own search of a codebook, ``size`` vectors at a time."""
    k, d = codebook.shape
    library = VectorQuantize(dim=d, codebook_size=k, decay=0.99).eval()
    library._codebook.embed.data.copy_(codebook[None])

    @torch.no_grad()
    def search(x: Tensor) -> Tensor:
        return torch.cat([library(part[None])[1][0] for part in x.split(size)])

    return search


def large(d: int) -> dict:
    """Time, ratio, GFLOP/s and agreement for one dimension."""
    x, c = problem(VECTORS, CODES, d)
    share = x[:SHARE]
    theirs = [peer(c, size) for size in SLICES]
    tile = module.TILE // module.ROWS
    a, b, out = torch.randn(tile, d + 1), torch.randn(module.ROWS, d + 1), torch.empty(tile, module.ROWS)
    square = torch.randn(1024, 1024)
    shaped = [2 * tile * module.ROWS * d / seconds(lambda: torch.mm(a, b.T, out=out)) / 1e9 for _ in range(50)]
    squared = [2 * 1024**3 / seconds(lambda: square @ square) / 1e9 for _ in range(10)]
    raw = turns(lambda: nearest(x, c), *(lambda search=search: search(share) for search in theirs))
    times = [[ours, *(t * VECTORS / SHARE for t in others)] for ours, *others in raw]
    ours, *others = (min(column) for column in zip(*times, strict=True))
    best = 1 + others.index(min(others))
    ours_codes, their_codes = nearest(share, c), theirs[best - 1](share)
    other = (ours_codes != their_codes).nonzero()[:, 0]
    mine, their = (
        (x[other].double() - c[codes[other]].double()).square().sum(1) for codes in (ours_codes, their_codes)
    )
    operations = 2 * VECTORS * CODES * d / 1e9
    return {
        "seconds": round(ours, 2),
        "peer_seconds": {f"{size} vectors a call": round(t, 2) for size, t in zip(SLICES, others, strict=True)},
        "peer_over_ours": round(median(t[best] / t[0] for t in times), 2),
        "gflops": round(operations / ours, 1),
        "peer_gflops": round(operations / min(others), 1),
        "gflops_of_products_of_a_tile": round(max(shaped), 1),
        "gflops_of_a_square_product": round(max(squared), 1),
        "codes_compared": SHARE,
        "codes_unlike_the_peers": len(other),
        "of_these_farther_than_the_peers": int((mine > their).sum()),
        "largest_relative_excess_of_the_peers": float(((their - mine) / mine).max()) if len(other) else 0.0,
        "near_ties_within_1e-6": len(near_ties(share, c)),
    }


def small(n: int, k: int) -> dict:
    """Microseconds and ratios for the size of a picture or a batch of them."""
    x, c = problem(n, k, 8)
    theirs = peer(c, n)
    times = turns(
        lambda: nearest(x, c),
        lambda: (c.square().sum(1) - 2 * x @ c.T).argmin(1),
        lambda: theirs(x),
        count=max(15, 2**25 // (n * k)),
    )
    ours, plain, library = (min(column) * 1e6 for column in zip(*times, strict=True))
    return {
        "microseconds": round(ours),
        "plain_microseconds": round(plain),
        "peer_microseconds": round(library),
        "ours_over_plain": round(median(t[0] / t[1] for t in times), 2),
        "peer_over_ours": round(median(t[2] / t[0] for t in times), 2),
    }


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def turns(*calls: Callable[[], object], count: int = TURNS) -> list[list[float]]:
    """Seconds of each call, in turns, after one that does not count."""
    for call in calls:
        call()
    return [[seconds(call) for call in calls] for _ in range(count)]


def memory(contender: str) -> int:
    """MB by which this process's peak rises in one search."""

    def peak() -> int:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024

    x, c = problem(VECTORS, CODES, 8)
    search = peer(c, SHARE) if contender == "peer" else lambda vectors: nearest(vectors, c)
    search(x[:1])
    before = peak()
    search(x[:SHARE] if contender == "peer" else x)
    return peak() - before


def apart(contender: str) -> int:
    """``memory`` in a process of its own."""
    command = [sys.executable, __file__, "memory", contender]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["peak_mb"]


if __name__ == "__main__":
    main()

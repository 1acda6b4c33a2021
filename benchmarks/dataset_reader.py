"""How fast packed rows are read, beside a bare memory map and three other readers, in one run.

    python benchmarks/dataset_reader.py

Writes benchmarks/results/dataset_reader.json. Documents of random ids (log-normal lengths, about 600) make 32,768 rows
of 2,048 ids, as uint16 and as uint32. Every reader gives int64 batches [32, 2048]; one process, one thread, no
workers, page cache warm, files opened before, except in the "first pass". In each round every reader goes once through
all rows; the ratio of CPU times to the bare memory map is taken within the round, and the median over the rounds
counts. Above 1 is faster than the map.

- ``memmap``: ``batch[k] = ids[r * 2048 : (r + 1) * 2048]``, on a plain array over the map; ``sliced itself``: on the
  ``numpy.memmap``, as most code has it. Of ``whole`` rows the bare map copies the same pieces of documents.
- ``mmtok``: ``Batches``, whose sums were compared before, of a dataset opened with ``check=False``, and with
  ``document`` and ``positions``, which are twice as many bytes again; ``Packs[i]`` row by row. In the first pass the
  files are mapped anew, and every block is compared with its sum when it is first touched.
- MosaicML streaming (MDS, no compression, no hashes), LitData (``TokensLoader``, and an array an item): ``dataset[i]``,
  which is faster than to iterate, except for LitData's items in random order, which are iterated with its own shuffle;
  WebDataset (a tar of raw arrays): it reads in sequence only, its random order is a shuffle buffer of 1,000 rows.

The others are optional: ``pip install mosaicml-streaming litdata webdataset``, in an environment of their own (they
hold numpy and transformers back); without them their lines are missing.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import io
import itertools
import json
import os
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtok.datasets.loader import Batches
from mmtok.datasets.loader.packing import Packs
from mmtok.datasets.shards import TokenDataset, write_dataset
from mmtok.registry import TokenizerSpec, VocabularyRegistry

RESULTS = Path(__file__).resolve().parent / "results" / "dataset_reader.json"
LENGTH, BATCH = 2048, 32
VOCABULARY = {"uint16": 50_000, "uint32": 140_000}
Reader = Callable[[], Iterable[torch.Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    rows = args.rows // BATCH * BATCH
    torch.set_num_threads(1)
    figures: dict = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}, torch {torch.__version__}",
        "rows": rows, "length": LENGTH, "batch": BATCH, "rounds": args.rounds, "page_cache": "warm",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for kind in VOCABULARY:
            figures[kind] = measure(Path(folder) / kind, kind, rows, args.rounds)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n")


def measure(folder: Path, kind: str, rows: int, rounds: int) -> dict:
    """Ratios to the bare map, by order."""
    folder.mkdir()
    registry = VocabularyRegistry.create([TokenizerSpec("words", "text", (VOCABULARY[kind],), "t")], max_grid=4)
    block, rng = registry.blocks_of("words")[0], np.random.default_rng(0)
    flat = rng.integers(block.start, block.end, rows * LENGTH).astype(kind)
    cuts = np.cumsum(rng.lognormal(6, 1, rows * 5).astype(int) + 1)
    cuts = [0, *cuts[cuts < len(flat)].tolist(), len(flat)]
    write_dataset(folder / "ours", registry, (flat[a:b] for a, b in itertools.pairwise(cuts)))
    flat.tofile(folder / "flat.bin")
    array = flat.reshape(-1, LENGTH)
    others = {
        "MosaicML streaming": ("streaming", write_mds, read_mds),
        "LitData TokensLoader": ("litdata", write_tokens, read_tokens),
        "LitData": ("litdata", write_items, read_items),
        "WebDataset": ("webdataset", write_tar, read_tar),
    }
    others = {name: x for name, x in others.items() if importlib.util.find_spec(x[0])}
    for i, (_, write, _) in enumerate(others.values()):
        write(folder / str(i), array)
    out: dict = {}
    dataset, unchecked = (TokenDataset.open(folder / "ours", check=x) for x in (True, False))
    assert dataset.dtype == kind, dataset.dtype
    plans = {}
    for how in ("stream", "whole"):
        start = time.perf_counter()
        plans[how] = Packs(dataset, LENGTH, how), Packs(unchecked, LENGTH, how)
        out[f"plan_{how}"] = {
            "seconds": round((time.perf_counter() - start) / 2, 3), "rows": len(plans[how][0]),
            "padding": plans[how][0].padding,
        }  # fmt: skip
    out["documents"] = len(dataset)
    mapped = np.asarray(np.memmap(folder / "flat.bin", kind, "r"))
    for random in (True, False):
        order = (rng.permutation(rows) if random else np.arange(rows)).tolist()
        for how, (packs, plain) in plans.items():
            bare = by_rows if how == "stream" else by_pieces(packs, order)
            readers: dict[str, Reader] = {
                "memmap": lambda f=bare, o=order: f(mapped, o),
                "mmtok": running(packs, rows, random, False),
                "mmtok, check=False": running(plain, rows, random, False),
                "mmtok, with document and positions": running(packs, rows, random, True),
                "mmtok, Packs[i]": lambda p=packs, o=order: stacked(p[i]["ids"].numpy() for i in o),
            }
            sliced = lambda f=bare, o=order: f(np.memmap(folder / "flat.bin", kind, "r"), o)  # noqa: E731
            readers["memmap, sliced itself"] = sliced
            if how == "stream":
                for i, (name, (_, _, read)) in enumerate(others.items()):
                    readers[name] = lambda i=i, read=read, o=order, r=random: read(folder / str(i), o, r)
                for name, reader in readers.items():
                    if (got := sum(int(x.sum()) for x in reader())) != (total := int(flat.sum(dtype=np.int64))):
                        raise SystemExit(f"{name} gave other ids: their sum is {got}, expected {total}")
            first = {
                "memmap": lambda f=bare, o=order: f(np.asarray(np.memmap(folder / "flat.bin", kind, "r")), o),
                "memmap, sliced itself": sliced,
                "mmtok": lambda p=packs, r=random: running(anew(p), rows, r, False)(),
            }
            for name, some in (("", readers), (", first pass", first)):
                name = f"{how}, {'random' if random else 'sequential'}{name}"
                out[name] = compare(some, rounds, rows)
                print(f"{kind}, {name}")
                for reader, x in out[name].items():
                    print(f"  {reader:36} {x['microseconds_a_row']:8.2f} us a row   {x['ratio']:6.3f} of memmap")
    return out


def compare(readers: dict[str, Reader], rounds: int, rows: int) -> dict:
    """Median microseconds a row, and median of the ratios to the first reader within a round."""
    times: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds + 1):
        for name, reader in readers.items():
            batches = iter(reader())
            start = time.process_time()
            for batch in batches:
                assert batch.shape == (BATCH, LENGTH)
            if number:  # the first round warms up
                times[name].append(time.process_time() - start)
    first = next(iter(times.values()))
    return {
        name: {
            "microseconds_a_row": round(statistics.median(x) / rows * 1e6, 3),
            "ratio": round(statistics.median(a / b for a, b in zip(first, x, strict=True)), 4),
        }
        for name, x in times.items()
    }


# --- the bare map


def by_rows(ids: np.ndarray, order: Sequence[int]) -> Iterator[torch.Tensor]:
    for i in range(0, len(order), BATCH):
        batch = np.empty((BATCH, LENGTH), np.int64)
        for k, row in enumerate(order[i : i + BATCH]):
            batch[k] = ids[row * LENGTH : (row + 1) * LENGTH]
        yield torch.from_numpy(batch)


def by_pieces(packs: Packs, order: Sequence[int]) -> Callable[[np.ndarray, Sequence[int]], Iterator[torch.Tensor]]:
    """As ``by_rows``, of the pieces of documents that rows are made of; where they are is known beforehand."""
    pieces, first = packs.pieces.tolist(), packs.first.tolist()
    rows = []
    for row in order:
        end, here = 0, []
        for document, start, _, size in pieces[first[row] : first[row + 1]]:
            if document >= 0:
                here.append((end, end + size, start, start + size))
            end += size
        rows.append((here, sum(x[1] - x[0] for x in here)))
    pad = packs.dataset.registry.pad

    def read(ids: np.ndarray, _: Sequence[int]) -> Iterator[torch.Tensor]:
        for i in range(0, len(rows), BATCH):
            batch = np.empty((BATCH, LENGTH), np.int64)
            for out, (here, end) in zip(batch, rows[i : i + BATCH], strict=True):
                for begin, stop, start, last in here:
                    out[begin:stop] = ids[start:last]
                if end < LENGTH:
                    out[end:] = pad
            yield torch.from_numpy(batch)

    return read


# --- mmtok


def anew(packs: Packs) -> Packs:
    """The same plan over a dataset that is opened anew, of which nothing was read yet."""
    fresh = object.__new__(Packs)
    fresh.__dict__.update(packs.__dict__, dataset=TokenDataset.open(packs.dataset.path))
    return fresh


def running(packs: Packs, rows: int, shuffle: bool, dense: bool) -> Reader:
    """Passes through the endless batches: each takes as many as one epoch of full rows has."""
    batches = iter(Batches(packs, BATCH, shuffle=shuffle, dense=dense))
    return lambda: (x["ids"] for x in itertools.islice(batches, rows // BATCH))


def stacked(rows: Iterable[np.ndarray]) -> Iterator[torch.Tensor]:
    """Batches of single rows of any integer type."""
    batch, k = np.empty((BATCH, LENGTH), np.int64), 0
    for row in rows:
        batch[k] = row
        k += 1
        if k == BATCH:
            yield torch.from_numpy(batch)
            batch, k = np.empty((BATCH, LENGTH), np.int64), 0


# --- the others


def write_mds(folder: Path, array: np.ndarray) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"ids": f"ndarray:{array.dtype.name}:{LENGTH}"}, hashes=[]) as writer:
        for row in array:
            writer.write({"ids": row})


@functools.cache
def open_mds(folder: Path) -> Any:
    from streaming import StreamingDataset

    return StreamingDataset(local=str(folder), batch_size=BATCH)


def read_mds(folder: Path, order: Sequence[int], random: bool) -> Iterator[torch.Tensor]:
    dataset = open_mds(folder)
    return stacked(dataset[i]["ids"] for i in order)


def optimized(folder: Path, items: Iterable[torch.Tensor], loader: object) -> None:
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes=2**26, item_loader=loader)
    for i, item in enumerate(items):
        writer[i] = item
    writer.done()
    writer.merge()


def signed(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array if array.dtype == np.uint16 else array.view(np.int32))


def write_tokens(folder: Path, array: np.ndarray) -> None:
    from litdata.streaming.item_loader import TokensLoader

    optimized(folder, signed(array), TokensLoader(LENGTH))


@functools.cache
def open_litdata(folder: Path, tokens: bool, shuffle: bool = False) -> Any:
    from litdata import StreamingDataset, TokensLoader

    return StreamingDataset(str(folder), item_loader=TokensLoader(LENGTH) if tokens else None, shuffle=shuffle)


def read_tokens(folder: Path, order: Sequence[int], random: bool) -> Iterator[torch.Tensor]:
    dataset = open_litdata(folder, True)
    return stacked(dataset[i].numpy() for i in order)


def write_items(folder: Path, array: np.ndarray) -> None:
    from litdata.streaming.item_loader import PyTreeLoader

    optimized(folder, signed(array), PyTreeLoader())


def read_items(folder: Path, order: Sequence[int], random: bool) -> Iterator[torch.Tensor]:
    dataset = open_litdata(folder, False, random)
    return stacked(x.numpy() for x in (dataset if random else (dataset[i] for i in order)))


def write_tar(folder: Path, array: np.ndarray) -> None:
    folder.mkdir()
    with tarfile.open(folder / "rows.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, row in enumerate(array):
            member = tarfile.TarInfo(f"{i:08d}.{array.dtype.name}")
            member.size = row.nbytes
            tar.addfile(member, io.BytesIO(row.tobytes()))


def read_tar(folder: Path, order: Sequence[int], random: bool) -> Iterator[torch.Tensor]:
    import webdataset

    dataset = webdataset.WebDataset(str(folder / "rows.tar"), shardshuffle=False, empty_check=False)
    if random:
        dataset = dataset.shuffle(1000)
    kinds = VOCABULARY.keys()
    return stacked(np.frombuffer(x[kind], kind) for x in dataset for kind in kinds if kind in x)


if __name__ == "__main__":
    main()

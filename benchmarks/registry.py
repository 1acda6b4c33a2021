"""What the registry and the grammar cost, as ratios to what they cannot do without, in one run.

    python benchmarks/registry.py

Writes benchmarks/results/registry.json. The best of the repeats counts; each pair is timed in turns.

- ``split`` and ``merge`` of ten million ids of a mixed vocabulary, beside numpy operations that only read and write as
  many bytes: a copy and a fill for ``split``, one addition for ``merge``. Short arrays take one thread; arrays of a
  million and more are shared among some, so both are given.
- ``MultimodalTokenizer.encode`` of documents beside the time of the tokenizers' own encode within it (median call).
- the grammar's mask, and mask and state together, beside the rest of decoding with the bundled transformer, as they
  occur in real generations of a picture, and of a text, a picture and a sound.
- reading a vocabulary of 50 blocks and a million ids from its file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mmtok import idmap
from mmtok.documents import Audio, Document, Image, Text
from mmtok.grammar import Grammar
from mmtok.multimodal import MultimodalTokenizer
from mmtok.registry import TokenizerSpec, VocabularyRegistry
from mmtok.transformer import Request, Sampling, Transformer, generate
from mmtok.transformer.decoder import Decoder

RESULTS = Path(__file__).resolve().parent / "results" / "registry.json"
IDS = 10_000_000
PARAGRAPH = "A cow is a large animal that eats grass; une vache, eine Kuh, una vaca, 牛. "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="any-to-any")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}, torch {torch.__version__}"
    }
    figures["split_and_merge"] = arithmetic(args.repeats)
    mm = MultimodalTokenizer.load(args.model)
    figures["encode"] = encoding(mm, args.repeats)
    figures["mask"] = masks(mm, Transformer.load(args.model, mm.registry), args.repeats)
    figures["load"] = loading(args.repeats)
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def arithmetic(repeats: int) -> dict:
    """Times of split and merge over the time of plain operations on as many bytes."""
    sound = TokenizerSpec("sound", "audio", (1024,) * 8, "a")
    registry = VocabularyRegistry.create(
        [TokenizerSpec("words", "text", (16_000,), "t"), TokenizerSpec("pixels", "image", (8192,), "i", 100), sound]
    )
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, len(registry.blocks), IDS)
    ids = registry.merge(blocks, rng.integers(0, 2**31, IDS) % np.array([b.size for b in registry.blocks])[blocks])
    index, codes = registry.split(ids)
    assert np.array_equal(registry.merge(index, codes), ids)
    out: dict = {"ids": IDS, "blocks": len(registry.blocks)}
    for threads in (1, idmap.THREADS):
        idmap.THREADS = threads
        split, floor_of_split, merge, floor_of_merge = best(
            repeats,
            lambda: registry.split(ids),
            lambda: (ids.copy(), np.full_like(ids, 0)),
            lambda: registry.merge(index, codes),
            lambda: index + codes,
        )
        out[f"threads_{threads}"] = {
            "split_times_floor": round(split / floor_of_split, 2),
            "merge_times_floor": round(merge / floor_of_merge, 2),
            "split_ns_per_id": round(split / IDS * 1e9, 2),
            "merge_ns_per_id": round(merge / IDS * 1e9, 2),
        }
    return out


class TimedTokenizer:
    """A tokenizer that counts the time spent in its encode."""

    def __init__(self, tokenizer: object) -> None:
        self._tokenizer, self.seconds = tokenizer, 0.0

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)

    def encode(self, x: object) -> object:
        start = time.perf_counter()
        out = self._tokenizer.encode(x)  # type: ignore[attr-defined]
        self.seconds += time.perf_counter() - start
        return out


def encoding(mm: MultimodalTokenizer, repeats: int) -> dict:
    """What registry, grammar and documents add to the tokenizers' own time within the same calls; the median call."""
    rng = np.random.default_rng(0)
    image = Image(rng.integers(0, 256, (3, 64, 64), np.uint8))
    rate = int(mm.registry.tokenizer("audio").properties["sample_rate"])
    sound = Audio(rng.uniform(-0.5, 0.5, (1, 2 * rate)).astype(np.float32), rate)
    word, paragraph = Text("a cow"), Text(PARAGRAPH * 40)
    timed = {name: TimedTokenizer(tokenizer) for name, tokenizer in mm.tokenizers.items()}
    mm = MultimodalTokenizer(mm.registry, timed)
    out = {}
    for name, segments in (
        ("word, picture and sound", (word, image, sound)),
        ("twenty of each", (word, image, sound) * 20),
        ("picture", (image,)),
        ("sound", (sound,)),
        ("long text", (paragraph,)),
    ):
        document, shares = Document(segments), []
        for _ in range(repeats * 3):
            for tokenizer in timed.values():
                tokenizer.seconds = 0.0
            start = time.perf_counter()
            ids = mm.encode(document)
            whole, own = time.perf_counter() - start, sum(t.seconds for t in timed.values())
            shares.append(whole / own - 1)
        out[name] = {"ids": len(ids), "overhead_percent": round(100 * sorted(shares)[len(shares) // 2], 2)}
    return out


class Timed(Grammar):
    """A grammar that counts the time spent in it."""

    def __init__(self, registry: VocabularyRegistry) -> None:
        super().__init__(registry)
        self.masks = self.states_time = 0.0

    def mask(self, *args: object, **kwargs: object) -> torch.Tensor:
        start = time.perf_counter()
        out = super().mask(*args, **kwargs)  # type: ignore[arg-type]
        self.masks += time.perf_counter() - start
        return out

    def advance(self, *args: object, **kwargs: object):
        start = time.perf_counter()
        out = super().advance(*args, **kwargs)  # type: ignore[arg-type]
        self.states_time += time.perf_counter() - start
        return out


def masks(mm: MultimodalTokenizer, model: Transformer, repeats: int) -> dict:
    """What the grammar adds to a decode step: its time in real generations over the time of all else in them."""
    grammar, prompt = Timed(mm.registry), mm.prompt([Text("a cow")])
    out: dict = {}
    for what, targets in (("picture", ("image",)), ("text, picture and sound", ("text", "image", "audio"))):
        for batch in (1, 32):
            for name, dtype in (("float32", torch.float32), ("int8", torch.int8)):
                decoder, runs = Decoder(model, dtype), []
                requests = [Request(prompt, targets, 400, grid=(8, 8), sample=i) for i in range(batch)]
                for _ in range(repeats):
                    grammar.masks = grammar.states_time = 0.0
                    stats = generate(decoder, grammar, requests, Sampling(temperature=1.0))[0].stats
                    runs.append((stats.decode_seconds, grammar.masks, grammar.states_time, stats.steps))
                seconds, mask, state, steps = min(runs)
                rest = seconds - mask - state
                out[f"{what}, batch {batch}, {name}"] = {
                    "mask_percent": round(100 * mask / rest, 2),
                    "mask_and_state_percent": round(100 * (mask + state) / rest, 2),
                    "step_ms_without": round(1e3 * rest / steps, 3),
                }
    return out


def loading(repeats: int) -> dict:
    """Milliseconds to read a large vocabulary."""
    specs = [TokenizerSpec(f"text{i}", "text", (128_000,), "t" * 64) for i in range(2)]
    specs += [TokenizerSpec(f"image{i}", "image", (65_536,), "i" * 64) for i in range(6)]
    specs += [TokenizerSpec(f"audio{i}", "audio", (8_800,) * 8, "a" * 64) for i in range(5)]
    registry = VocabularyRegistry.create(specs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(registry.to_json())

        def read() -> None:
            again = VocabularyRegistry.from_json(path.read_text())
            again.split([again.size - 1])
            assert again.fingerprint == registry.fingerprint

        (seconds,) = best(repeats, read)
    return {"blocks": len(registry.blocks), "ids": registry.size, "milliseconds": round(1e3 * seconds, 2)}


def best(repeats: int, *calls: Callable[[], object]) -> list[float]:
    """The least time of each call, in turns, in seconds."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, record in zip(calls, times, strict=True):
            start = time.perf_counter()
            result = call()
            record.append(time.perf_counter() - start)
            del result
    return [min(record) for record in times]


if __name__ == "__main__":
    main()

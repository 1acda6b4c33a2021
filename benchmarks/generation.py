"""Decoding speed of the bundled model against transformers' generate on the same weights, in one run.

    python benchmarks/generation.py

Writes benchmarks/results/generation.json. One thread. Both sample at temperature 1 from float32 weights; mmtok also
in bfloat16 and int8, and always under its grammar, which transformers' generate does not have. The best of the repeats
counts. The machine's limit is the rate at which it reads memory, measured by summing an array larger than the caches.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from mmtok.checkpoints import resolve
from mmtok.documents import Text
from mmtok.multimodal import MultimodalTokenizer
from mmtok.transformer import Request, Sampling, Transformer, generate
from mmtok.transformer.decoder import Decoder

RESULTS = Path(__file__).resolve().parent / "results" / "generation.json"
TOKENS = 64  # of a picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="any-to-any")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    mm = MultimodalTokenizer.load(args.model)
    model = Transformer.load(args.model, mm.registry)
    prompt = mm.prompt([Text("a cow")])

    theirs = AutoModelForCausalLM.from_pretrained(resolve(args.model), dtype=torch.float32).eval()
    figures: dict = {
        "machine": f"{platform.machine()}, one thread, torch {torch.__version__}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "memory_gb_per_second": round(memory_rate(), 1),
    }
    for batch in (1, 32):
        rates = {}
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("int8", torch.int8)):
            decoder = Decoder(model, dtype)
            requests = [Request(prompt, ("image",), 80, grid=(8, 8), sample=i) for i in range(batch)]

            def ours(decoder: Decoder = decoder, requests: list[Request] = requests) -> None:
                generate(decoder, mm.grammar, requests, Sampling(temperature=1.0))

            rates[f"mmtok {name}"] = round(batch * TOKENS / best(ours, args.repeats), 1)
        ids = torch.from_numpy(prompt)[None].expand(batch, -1)

        def peer(ids: torch.Tensor = ids) -> None:
            theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, min_new_tokens=TOKENS,
                            max_new_tokens=TOKENS)  # fmt: skip

        rates["transformers float32"] = round(batch * TOKENS / best(peer, args.repeats), 1)
        ratio = {k: round(v / rates["transformers float32"], 2) for k, v in rates.items() if k.startswith("mmtok")}
        figures[f"batch_{batch}"] = {"tokens_per_second": rates, "times_transformers": ratio}
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def best(call, repeats: int) -> float:  # type: ignore[no-untyped-def]
    """Seconds of the fastest call after one that warms up."""
    call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def memory_rate() -> float:
    """GB/s of one thread reading 512 MB."""
    x = torch.ones(128 * 2**20)
    return x.numel() * 4 / best(lambda: x.sum(), 5) / 1e9


if __name__ == "__main__":
    main()

"""Decoding speed of the bundled model against transformers' generate on the same weights, in one run.

    python benchmarks/generation.py

Writes benchmarks/results/generation.json. One thread. Both sample pictures of 8x8 codes at temperature 1, mmtok always
under its grammar, which transformers' generate does not have, and with and without guidance; transformers from float32
weights, mmtok in each precision. Calls take turns, and the best of the repeats of each counts. Besides:

- the limits of the machine: the rate at which it reads memory, by a sum over an array larger than the caches, and the
  rate of products of large matrices in each type; and the share of each that decoding reached
- what bfloat16 and int8 cost in quality: answers sampled in float32 are read again, id by id as they would be decoded
- what torch.compile gives, and what it takes
- seconds of a request for a picture with guidance, from the question to the pixels, on one thread and on two
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch._inductor.utils import fresh_cache
from transformers import AutoModelForCausalLM

from mmtok.checkpoints import resolve
from mmtok.documents import Text
from mmtok.multimodal import MultimodalTokenizer
from mmtok.transformer import Request, Sampling, Transformer, generate
from mmtok.transformer.decoder import Decoder
from mmtok.transformer.generate import without_question

RESULTS = Path(__file__).resolve().parent / "results" / "generation.json"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
SIDE = 8  # codes
TOKENS = SIDE * SIDE  # of a picture
GUIDANCE = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="any-to-any")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--answers", type=int, default=12, help="to measure the errors of the precisions on")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args.model, args.repeats)
    figures = {
        "machine": f"{platform.machine()}, one thread",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "parameters": sum(p.numel() for p in bench.model.parameters()),
        "limits": limits(),
    }
    for batch in (1, 32):
        figures[f"batch_{batch}"] = bench.against_transformers(batch, figures["limits"])
    figures["errors"] = bench.errors(args.answers)
    figures["picture_seconds"] = bench.picture()
    figures["compile"] = bench.compiled()
    args.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


class Bench:
    """The model in all forms."""

    def __init__(self, name: str, repeats: int) -> None:
        self.repeats = repeats
        self.mm = MultimodalTokenizer.load(name)
        self.model = Transformer.load(name, self.mm.registry)
        self.decoders = {k: Decoder(self.model, dtype) for k, dtype in PRECISIONS.items()}
        self.theirs = AutoModelForCausalLM.from_pretrained(resolve(name), dtype=torch.float32).eval()
        self.prompt = self.mm.prompt([Text("a cow")])

    def ours(self, decoder: Decoder, batch: int, guidance: float) -> Callable:
        """Pictures by mmtok; gives the stats."""
        requests = [Request(self.prompt, ("image",), 80, grid=(SIDE, SIDE), sample=i) for i in range(batch)]
        sampling = {"image": Sampling(1.0, guidance=guidance)}
        return lambda: generate(decoder, self.mm.grammar, requests, sampling)[0].stats

    def peer(self, batch: int, guidance: float) -> Callable:
        """As many ids by transformers, of whatever kind."""
        ids, unasked = (
            torch.as_tensor(prompt)[None].expand(batch, -1).clone()
            for prompt in (self.prompt, without_question(self.mm.registry, self.prompt))
        )
        more = {}
        if guidance != 1:
            more = {"guidance_scale": guidance, "negative_prompt_ids": unasked,
                    "negative_prompt_attention_mask": torch.ones_like(unasked)}  # fmt: skip
        return lambda: self.theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, min_new_tokens=TOKENS,
            max_new_tokens=TOKENS, **more,
        )  # fmt: skip

    def against_transformers(self, batch: int, limit: dict) -> dict:
        """Ids of codes a second, and how many times theirs."""
        ours = [(p, g) for p in PRECISIONS for g in (1.0, GUIDANCE)]
        calls = {f"mmtok {p}{named(g)}": self.ours(self.decoders[p], batch, g) for p, g in ours}
        calls |= {f"transformers float32{named(g)}": self.peer(batch, g) for g in (1.0, GUIDANCE)}
        seconds, results = in_turns(calls, self.repeats)
        rates = {k: round(batch * TOKENS / s, 1) for k, s in seconds.items()}
        out: dict = {"tokens_per_second": rates}
        for g in (1.0, GUIDANCE):
            peer = f"transformers float32{named(g)}"
            out[f"times_{peer.replace(' ', '_')}"] = {
                k: round(v / rates[peer], 2) for k, v in rates.items() if k.startswith("mmtok")
            }
        reached = {}
        for p, g in ours:
            stats = results[f"mmtok {p}{named(g)}"]
            read, work = (x / stats.decode_seconds / 1e9 for x in (stats.weight_bytes, stats.flops))
            # int8 in batches is multiplied as bfloat16
            kind = "bfloat16" if p == "int8" else p
            reached[f"mmtok {p}{named(g)}"] = {
                "gb_per_second": round(read, 2),
                "gflop_per_second": round(work, 1),
                "percent_of_memory_rate": round(100 * read / limit["memory_gb_per_second"], 1),
                "percent_of_product_rate": round(100 * work / limit["product_gflop_per_second"][kind], 1),
            }
        return {**out, "reached": reached}

    @torch.inference_mode()
    def errors(self, count: int) -> dict:
        """bfloat16 and int8 against float32 on the ids of answers, each of which was fed what came before."""
        targets = [("text",), ("image",), ("audio",)]
        names = ("a cow", "a dog", "a house", "the sun")
        requests = [
            Request(self.mm.prompt([Text(names[i % len(names)])]), targets[i % 3], 400, grid=(SIDE, SIDE), sample=i)
            for i in range(count)
        ]
        answers = generate(self.decoders["float32"], self.mm.grammar, requests, Sampling(1.0))
        scores: dict[str, list[torch.Tensor]] = {p: [] for p in PRECISIONS}
        for answer in answers:
            ids = torch.from_numpy(answer.ids)[None]
            for precision, decoder in self.decoders.items():
                cache = decoder.new_cache(1, ids.shape[1])
                decoder.hidden(ids[:, : answer.prompt_length - 1], cache)
                for at in range(answer.prompt_length - 1, ids.shape[1] - 1):
                    hidden = decoder.hidden(ids[:, at : at + 1], cache)[:, -1]
                    scores[precision].append(decoder.logits(hidden)[0].double())
        out: dict = {"ids": len(scores["float32"])}
        exact = torch.stack(scores.pop("float32"))
        for precision, rows in scores.items():
            got = torch.stack(rows)
            p, q = (x.log_softmax(-1) for x in (exact, got))
            out[precision] = {
                "largest_difference_of_scores": round(float((got - exact).abs().max()), 4),
                "same_best_percent": round(100 * float((got.argmax(-1) == exact.argmax(-1)).double().mean()), 2),
                "mean_kl_nats": float(f"{float((p.exp() * (p - q)).sum(-1).mean()):.3g}"),
            }
        out["range_of_scores"] = round(float((exact.amax(-1) - exact.amin(-1)).mean()), 2)
        return out

    def picture(self) -> dict:
        """From the question to the pixels, in int8, with guidance, the picture's size chosen by the model."""
        request, sampling = Request(self.prompt, ("image",)), {"image": Sampling(0.4, guidance=GUIDANCE)}

        def whole() -> None:
            self.mm.decode(generate(self.decoders["int8"], self.mm.grammar, [request], sampling)[0].ids)

        out = {}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out[f"{threads} threads"] = round(in_turns({"": whole}, self.repeats)[0][""], 3)
        torch.set_num_threads(1)
        return out

    def compiled(self) -> dict:
        """Ids a second at batch 1 with a compiled step, beside the same without, and the seconds of the first call."""
        out: dict = {}
        for precision, dtype in PRECISIONS.items():
            call = self.ours(Decoder(self.model, dtype, compile=True), 1, 1.0)
            with fresh_cache():  # what was compiled before is not found again
                started = time.perf_counter()
                call()
                first = time.perf_counter() - started
                plain = self.ours(self.decoders[precision], 1, 1.0)
                seconds, _ = in_turns({"compiled": call, "plain": plain}, self.repeats)
            out[precision] = {
                "first_call_seconds": round(first, 1),
                **{f"tokens_per_second_{k}": round(TOKENS / s, 1) for k, s in seconds.items()},
                "times": round(seconds["plain"] / seconds["compiled"], 2),
            }
        return out


def named(guidance: float) -> str:
    return "" if guidance == 1 else " with guidance"


def in_turns(calls: dict[str, Callable], repeats: int) -> tuple[dict[str, float], dict]:
    """Seconds of the fastest of the repeats of each call, made in turns after one that warms up, and what it gave."""
    best: dict[str, float] = {}
    results: dict = {}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            result = call()
            seconds = time.perf_counter() - started
            if turn and seconds < best.get(name, float("inf")):
                best[name], results[name] = seconds, result
    return best, results


def limits() -> dict:
    """What one thread reads of 512 MB, and computes in products of matrices of 1024 rows and columns."""
    x = torch.ones(128 * 2**20)
    read = x.numel() * 4 / in_turns({"": x.sum}, 5)[0][""] / 1e9
    products = {}
    n = 1024
    for name, dtype in PRECISIONS.items():
        a, b = (torch.randn(n, n).mul(10).to(dtype) for _ in range(2))
        call = (lambda a=a, b=b: torch._int_mm(a, b)) if dtype == torch.int8 else (lambda a=a, b=b: a @ b)
        products[name] = round(2 * n**3 / in_turns({"": call}, 5)[0][""] / 1e9, 1)
    return {"memory_gb_per_second": round(read, 1), "product_gflop_per_second": products}


if __name__ == "__main__":
    main()

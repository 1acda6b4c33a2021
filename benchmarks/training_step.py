"""Speed of one optimizer step: our transformer and its packed loss against transformers' model of the same shape.

    python benchmarks/training_step.py [--threads 2] [--steps 15]

Writes benchmarks/results/training_step.json. Both have the same weights and learn the same targets of the same packed
rows, with the same AdamW, gradient clipping and types (bfloat16 autocast, and float32); their steps take turns, and
medians count. Theirs is given the same mask and positions, and computes its own loss, which has no grammar: all ids
compete at every place. The GFLOP/s are of the products that each really computes, beside the fastest product of two
matrices of that type in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from mmtok.grammar import Grammar
from mmtok.training.lm import SequenceLoss
from mmtok.training.loop import LoopConfig
from mmtok.training.optimizers import optimizer_for
from mmtok.transformer import Transformer
from mmtok.transformer.packing import attention_mask, pack

RESULTS = Path(__file__).resolve().parent / "results" / "training_step.json"
LENGTH, ROWS = 384, 8  # ids in a row, rows of a batch
TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CONFIG = LoopConfig(lr=1e-4, weight_decay=0.05)


def rows(grammar: Grammar, seed: int) -> tuple[Tensor, ...]:
    """A batch of exchanges, each a name, a picture or a sound asked with and another answered: ids, document,
    positions, answer.
    """
    registry, r = grammar.registry, np.random.default_rng(seed)
    owner = {b.modality: b.tokenizer for b in registry.blocks if b.tokenizer}

    def segment(modality: str) -> np.ndarray:
        sizes = [b.size for b in registry.blocks_of(owner[modality])]
        if modality == "text":
            return grammar.segment_ids(owner[modality], r.integers(0, sizes[0], r.integers(2, 6)))
        shape = (8, 8) if modality == "image" else (int(r.integers(25, 60)),)
        codes = [r.integers(0, size, shape) for size in sizes]
        return grammar.segment_ids(owner[modality], codes[0] if modality == "image" else np.stack(codes))

    documents, starts = [], []
    while sum(map(len, documents)) < 2 * ROWS * LENGTH:
        question, answer = (segment(m) for m in r.permutation(["text", "image", "audio"])[:2])
        ids = np.concatenate([[registry.bos, registry.user], question, [registry.assistant], answer, [registry.eos]])
        if len(ids) <= LENGTH:
            documents.append(ids)
            starts.append(len(question) + 3)
    ids, document, positions = (torch.from_numpy(x[:ROWS]) for x in pack(documents, LENGTH, registry.pad))
    return ids, document, positions, (positions >= torch.tensor([*starts, 0])[document]) & (document >= 0)


def step_of(model: nn.Module, loss: Callable[[], Tensor], context: Callable[[], AbstractContextManager]) -> Callable:
    """A function that does one optimizer step and returns the loss."""
    optimizer = optimizer_for(model, CONFIG)

    def step() -> float:
        model.zero_grad(set_to_none=True)
        with context():
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CONFIG.clip)
        optimizer.step(CONFIG.lr)
        return value.item()

    return step


def peak(dtype: torch.dtype, size: int = 2048) -> float:
    """GFLOP/s of the product of two square matrices, the best of five."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="any-to-any", help="whose shape, weights and vocabulary; default: bundled")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    first = Transformer.load(args.model)
    assert first.registry is not None
    grammar = Grammar(first.registry)
    ids, document, positions, answer = rows(grammar, 0)
    chosen = answer & torch.from_numpy(grammar.loss_mask(ids))
    chosen[:, 1:] &= document[:, 1:] == document[:, :-1]
    figures: dict = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "transformers": transformers.__version__,
        "parameters": sum(p.numel() for p in first.parameters()),
        "rows": ROWS,
        "ids_in_a_row": LENGTH,
        "documents": int(document.max()) + 1,
        "targets": int(chosen[:, 1:].sum()),
    }
    for name, dtype in TYPES.items():

        def context(dtype: torch.dtype = dtype) -> AbstractContextManager:
            return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)

        ours = Transformer(first.config)
        theirs = Qwen3ForCausalLM(Qwen3Config(**first.config.hf_config(), attn_implementation="sdpa")).train()
        for model in (ours, theirs):
            model.load_state_dict(first.state_dict(), strict=model is ours)
        sequence_loss = SequenceLoss(grammar)
        labels = ids.where(chosen, -100)

        def our_loss(model: Transformer = ours, loss: SequenceLoss = sequence_loss) -> Tensor:
            return loss(model, ids, document, positions, answer)[0]

        def their_loss(model: nn.Module = theirs, labels: Tensor = labels) -> Tensor:
            mask = attention_mask(document)
            return model(ids, attention_mask=mask, position_ids=positions, labels=labels, use_cache=False).loss

        steps = {
            "mmtok": step_of(ours, our_loss, context),
            "transformers": step_of(theirs, their_loss, context),
        }
        work, times = {}, {key: [] for key in steps}
        for key, step in steps.items():
            with FlopCounterMode(display=False) as counter:
                step()
            work[key] = counter.get_total_flops()
            step()
        for _ in range(args.steps):
            for key, step in steps.items():
                begin = time.perf_counter()
                step()
                times[key].append(time.perf_counter() - begin)
        limit = peak(dtype)
        found = {
            key: {
                "milliseconds": round(1e3 * median(seen), 1),
                "tokens_per_second": round(ids.numel() / median(seen)),
                "gflop": round(work[key] / 1e9, 1),
                "gflop_per_second": round(work[key] / median(seen) / 1e9, 1),
            }
            for key, seen in times.items()
        }
        ratio = median(times["transformers"]) / median(times["mmtok"])
        figures[name] = {**found, "ratio": round(ratio, 2), "matrix_product_gflop_per_second": round(limit, 1)}
        for key, line in found.items():
            print(
                f"{name} {key}: {line['milliseconds']} ms a step, {line['tokens_per_second']} tokens/s, "
                f"{line['gflop']} GFLOP at {line['gflop_per_second']} of {limit:.0f} GFLOP/s"
            )
        print(f"{name}: {ratio:.2f} times as fast as transformers (at least 1.2 wanted)")
    args.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The bundled any-to-any model, judged: is it right, does it do what is asked for, and does everything decode?

    python -m pip install -e '.[benchmarks]' && python benchmarks/any_to_any.py --data data

Writes each part as it is done to benchmarks/results/any_to_any.json, where those of another model are dropped, and
pictures and speech to --out (never into the repository: the stamps are GPL). --parts runs some of them:

    judges         the judges (``judges``) on real data
    directions     right answers, of `train` (recall), `pair-test` (composition: picture and written name are trained
                   on, no speech) and `test` (generalisation: nothing is), in nine directions and in French
    routing        held-out phrasings, no target forced: are the modalities of the answer those that were asked for?
    decodability   answers at temperature 1, no target forced: is each a document that decodes?
    bits           bits a token of the true answers
    diversity      several answers to one question
    sheet          pictures and sounds, to look at and listen to
    tune           settings of sampling, on concepts of train that no other part asks about; not by default

Sampling is the command line's default, unless said otherwise; weights are bfloat16. Shares have their 95% interval
(Wilson).
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from answers import Answers
from asking import Corpus
from judges import Judges
from parts import Bench, bits, decodability, directions, diversity, judged, routing, sheet, tune

from mmtok.checkpoints import atomic_write
from mmtok.cli.generate import sampling_of

RESULTS = Path(__file__).resolve().parent / "results" / "any_to_any.json"
PARTS: dict[str, Callable[[Bench], object]] = {
    "judges": judged,
    "directions": directions,
    "routing": routing,
    "decodability": decodability,
    "bits": bits,
    "diversity": diversity,
    "sheet": sheet,
    "tune": tune,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--model", default="any-to-any")
    parser.add_argument("--out", type=Path, default=Path("runs/any_to_any"), help="for pictures and sounds")
    parser.add_argument("--cache", type=Path, default=Path("runs/judges"), help="for the judges' weights")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--limit", type=int, default=100, help="concepts of each split; other counts go with it")
    parser.add_argument("--generations", type=int, default=1000, help="in each direction, for decodability")
    parser.add_argument("--parts", default=",".join(k for k in PARTS if k != "tune"), help="separated by commas")
    args = parser.parse_args()
    chosen = args.parts.split(",")
    if unknown := sorted(set(chosen) - set(PARTS)):
        parser.error(f"got the part {unknown[0]!r}, expected some of {', '.join(PARTS)}")
    torch.set_num_threads(1)
    corpus = Corpus(args.data, args.limit)
    answers = Answers(args.model)
    bench = Bench(corpus, Judges(corpus.concepts, args.cache), answers, sampling_of(None), args.out, args.generations)
    model = {
        "vocabulary": answers.mm.registry.fingerprint,
        "weights": answers.weights,
        "parameters": sum(p.numel() for p in answers.model.parameters()),
    }
    for name in chosen:
        started = time.perf_counter()
        found = PARTS[name](bench)
        before = json.loads(args.results.read_text()) if args.results.exists() else {}
        figures = before if before.get("model") == model else {"model": model, "parts": {}}
        figures["machine"] = f"{platform.machine()}, one thread, torch {torch.__version__}"
        seconds = round(time.perf_counter() - started)
        sampling = {k: v.to_dict() for k, v in bench.sampling.items()}
        figures["parts"][name] = {"limit": args.limit, "sampling": sampling, "seconds": seconds, "figures": found}
        args.results.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(args.results, (written(figures) + "\n").encode())
        print(f"{name}, {seconds} s:\n{written(found)}")


def written(figures: object) -> str:
    """JSON, indented, in which what holds nothing that holds anything is one line: a share with its interval."""
    text = json.dumps(figures, indent=1)
    for pair in (r"\[[^][{}]*\]", r"\{[^{}]*\}"):
        text = re.sub(pair, lambda found: re.sub(r"(?<=[\[{])\s+|\s+(?=[]}])", "", re.sub(r"\s+", " ", found[0])), text)
    return text


if __name__ == "__main__":
    main()

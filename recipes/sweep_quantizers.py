"""Compare quantizers at equal bits and equal time: the image recipe with each of them, a table and a plot.

    python recipes/sweep_quantizers.py --data data/images.jsonl --out runs/sweep --minutes 5 --bits 12

Each quantizer first trains for a few steps to see how fast it is, and then for as many steps as fill its minutes, so
that the schedule of each ends in time. Runs that are finished are not repeated: a killed sweep continues. Leaves
sweep.json, sweep.md and sweep.png in --out; progress is the image recipe's own.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

from mmtok.checkpoints import atomic_write
from mmtok.errors import ConfigError

PROBE = 60  # steps to measure the speed
COLUMNS = ("val_psnr_of_mse", "val_ssim", "val_usage", "val_perplexity")


def contestants(bits: int) -> dict[str, list[str]]:
    """Model settings of each quantizer that spend so many bits a position."""
    half = bits // 2
    out = {kind: [f"quantizer={kind}", f"codebook_size={2**bits}"] for kind in ("vq", "cosine", "simvq", "lfq")}
    channels = -(-bits // 3)  # at most 8 values each
    per = [2 ** (bits // channels + (i < bits % channels)) for i in range(channels)]
    out["fsq"] = ["quantizer=fsq", f"fsq_levels={per}".replace(" ", ""), f"codebook_size={2**bits}"]
    if bits % 2 == 0:
        out["residual vq"] = ["quantizer=vq", "levels=2", f"codebook_size={2**half}"]
    return out


def train(args: argparse.Namespace, name: str, model: list[str], steps: int, label: str) -> list[dict]:
    """Run the image recipe; the lines of its log."""
    out = args.out / f"{name.replace(' ', '-')}{label}"
    every = max(1, steps // 10)
    command = [
        sys.executable, str(Path(__file__).with_name("image.py")), "--data", args.data, "--out", str(out),
        "--set", f"steps={steps}", f"warmup={min(100, steps)}", f"eval_every={every}", f"save_every={every}", *args.set,
        "--model", *model, *args.model,
    ]  # fmt: skip
    if (code := subprocess.run(command).returncode) != 0:
        raise SystemExit(f"{name}: the image recipe ended with {code}")
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data/images.jsonl", help="as for recipes/image.py")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--minutes", type=float, default=5.0, help="training time of each quantizer")
    parser.add_argument("--bits", type=int, default=12, help="bits of a position of the code grid")
    parser.add_argument("--only", nargs="*", default=[], metavar="QUANTIZER", help="leave out all others")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="override the schedule")
    parser.add_argument("--model", nargs="*", default=[], metavar="key=value", help="override the model's shape")
    args = parser.parse_args()
    entries = contestants(args.bits)
    if unknown := sorted(set(args.only) - set(entries)):
        raise ConfigError(f"got {unknown[0]!r}, expected some of: {', '.join(entries)}")
    chosen = {k: v for k, v in entries.items() if not args.only or k in args.only}

    results = []
    for name, model in chosen.items():
        plan = args.out / f"{name.replace(' ', '-')}.json"
        if not plan.exists():  # the number of steps is measured once: the schedule of a continued run must not change
            rate = train(args, name, model, PROBE, "-probe")[-1]["steps_per_s"]
            steps = max(PROBE, round(rate * args.minutes * 60))
            atomic_write(plan, json.dumps({"steps": steps, "minutes": args.minutes}).encode())
        planned = json.loads(plan.read_text())
        if planned.get("minutes", args.minutes) != args.minutes:
            raise ConfigError(
                f"{plan} was planned for {planned['minutes']:g} minutes, not for {args.minutes:g}; use the same, or "
                "another --out"
            )
        steps = planned["steps"]
        log = train(args, name, model, steps, "")
        spent = sum((b["step"] - a["step"]) / b["steps_per_s"] for a, b in zip([{"step": 0}, *log], log, strict=False))
        curve = [(x["step"] / steps, x["val_psnr_of_mse"]) for x in log]
        results.append({
            "quantizer": name, "settings": model, "bits": args.bits, "steps": steps, "minutes": round(spent / 60, 2),
            **{k: round(log[-1][k], 4) for k in COLUMNS}, "curve": curve,
        })  # fmt: skip
        write(args.out, sorted(results, key=lambda x: -x["val_psnr_of_mse"]))
    print((args.out / "sweep.md").read_text(encoding="utf-8"))


def write(out: Path, results: list[dict]) -> None:
    """The table as JSON and Markdown, and the curves as a picture where matplotlib is installed."""
    atomic_write(out / "sweep.json", (json.dumps(results, indent=2) + "\n").encode())
    head = ("quantizer", "steps", "minutes", "PSNR dB", "SSIM", "usage", "perplexity")
    rows = [
        (
            r["quantizer"],
            r["steps"],
            r["minutes"],
            *(f"{r[k]:.{d}f}" for k, d in zip(COLUMNS, (2, 3, 3, 0), strict=True)),
        )
        for r in results
    ]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    bits = results[0]["bits"]
    title = (
        f"{bits} bits a position (as {2**bits} codes); figures of the val split, PSNR of the mean squared error.\n\n"
    )
    atomic_write(out / "sweep.md", (title + "\n".join(lines) + "\n").encode())
    try:
        import matplotlib
    except ImportError:
        print("no plot: python -m pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for r in results:
        axes.plot(*zip(*r["curve"], strict=True), marker=".", label=f"{r['quantizer']} {r['val_psnr_of_mse']:.2f} dB")
    low = min(y for r in results for x, y in r["curve"] if x >= 0.2 or math.isclose(x, 1))
    axes.set(xlabel="share of the time", ylabel="PSNR dB (val)", ylim=(low - 0.2, None), title=title.split(";")[0])
    axes.legend()
    figure.tight_layout()
    figure.savefig(out / "sweep.png", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

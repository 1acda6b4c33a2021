"""Train an audio codec: log-mel -> ConvNeXt -> residual VQ -> ConvNeXt -> inverse STFT, several bit rates in one model.

    python recipes/audio.py --data data/audio.jsonl --out runs/audio-16k
    python recipes/audio.py --data my/recordings --out runs/mine --set steps=3000 --then steps=2000 --model dim=128
    python recipes/audio.py --data my/recordings --out runs/live --model causal=true sample_rate=24000 hop=480
    python recipes/audio.py --data my/recordings --out runs/sharp --loss critic=0.1 feature=0.2 critic_start=5000
    torchrun --standalone --nproc-per-node 2 recipes/audio.py --data my/recordings --out runs/two

Two stages. First encoder and decoder learn without a quantizer: with one from the start the encoder learns to say
little. Then the codebooks start at k-means of what the encoder says, and all three learn on, with another number of
levels at each step, so that every prefix of the codes decodes; from some step on against critics.

--data is a manifest or a folder. A killed run continues where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmtok.audio import SpectralCodec, SpectralCodecConfig
from mmtok.evaluation.metrics import has_pesq, pesq_wb, stoi
from mmtok.evaluation.plots import spectrogram
from mmtok.training.corpus import digest_of, items
from mmtok.training.data import load_audio
from mmtok.training.distributed import rank, share
from mmtok.training.loop import STATE, LoopConfig, Metrics, Pictures, Sounds, fit, prepare_torch, rng
from mmtok.training.sound_critics import SoundCritics
from mmtok.training.sounds import SoundLoss, SpectralDistance
from mmtok.training.usage import CodebookUsage

SECONDS = 0.96  # of a training crop
# Share of each kind of sound in a batch; within a kind every recording is as likely as any other.
MIXTURE = {"speech": 0.5, "synthetic speech": 0.3, "sound": 0.12, "music": 0.08}
QUIETEST, LOUDEST = -18.0, -0.5  # dB of a crop's peak
MARKS = (1 / 3, 2 / 3, 1.0)  # shares of the levels that are trained most, and evaluated
MARKED = 0.8  # how often one of them is drawn rather than any number of levels
VECTORS_A_CODE = 64  # from which the codebooks start
HEARD = 36  # recordings of the val split that are evaluated; the first four are written and drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/audio.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("runs/audio-16k"))
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="schedule of the first stage")
    parser.add_argument("--then", nargs="*", default=[], metavar="key=value", help="schedule of the second stage")
    parser.add_argument("--model", nargs="*", default=[], metavar="key=value", help="override the model's shape")
    parser.add_argument("--loss", nargs="*", default=[], metavar="key=value", help="override the weights of the loss")
    parser.add_argument("--critic-width", type=int, default=16, help="channels of the critics")
    args = parser.parse_args()
    first = LoopConfig(
        steps=10500, batch_size=16, lr=2e-3, warmup=200, ema=0.999, eval_every=1000, save_every=500
    ).replace(args.set)
    second = first.replace(["steps=6500", "lr=7e-4", "eval_every=500", *args.then])
    shape = SpectralCodecConfig(dim=256, levels=12, codebook_dim=64).replace(args.model)
    weights = SoundLoss().replace(args.loss)
    for config in (first, second):
        device = prepare_torch(config)

    # Data: all recordings end to end in memory, sampled by kind.
    cache = args.out.parent / "cache"
    train = items(args.data, "audio", "train")
    samples, offsets, kept = load_audio(train, shape.sample_rate, cache)
    kinds = {k: [i for i, j in enumerate(kept) if train[j].source == k] for k in MIXTURE}
    kinds = {k: v for k, v in kinds.items() if v} or {"all": list(range(len(kept)))}
    chances = np.array([MIXTURE.get(k, 1.0) for k in kinds])
    chances /= chances.sum()
    crop = round(SECONDS * shape.sample_rate / shape.hop)  # frames
    length = crop * shape.hop

    def example(r: np.random.Generator) -> np.ndarray:
        members = kinds[list(kinds)[r.choice(len(kinds), p=chances)]]
        i = members[r.integers(len(members))]
        start, end = int(offsets[i]), int(offsets[i + 1])
        spare = end - start - length
        begin = start + (int(r.integers(spare + 1)) if spare > 0 else 0)
        piece = samples[begin : min(end, begin + length)].astype(np.float32)
        peak = max(1.0, float(np.abs(piece).max()))
        at = int(r.integers(length - len(piece) + 1))
        out = np.zeros(length, np.float32)
        out[at : at + len(piece)] = piece / peak * 10 ** (r.uniform(QUIETEST, LOUDEST) / 20)
        return out

    def batch(config: LoopConfig, step: int, rows: range) -> Tensor:
        return torch.from_numpy(np.stack([example(rng(config, step, i)) for i in rows])).to(device)

    held_out = items(args.data, "audio", "val")
    speech = [x for x in held_out if "speech" in x.source] or held_out
    chosen = [speech[i] for i in np.random.default_rng(0).permutation(len(speech))[:HEARD]]
    val_samples, val_offsets, _ = load_audio(chosen, shape.sample_rate, cache)
    val = [
        torch.from_numpy(val_samples[a:b].astype(np.float32) / 32768)[None] for a, b in itertools.pairwise(val_offsets)
    ]

    def whole(x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, -x.shape[-1] % shape.hop)).to(device)

    def judge(rebuilt: list[Tensor]) -> Metrics:
        pairs = list(
            zip(val, (y[..., : x.shape[-1]].cpu().float() for x, y in zip(val, rebuilt, strict=True)), strict=True)
        )
        figures = {
            "loss": [float(distance(y.to(device), x.to(device))) for x, y in pairs if x.shape[-1] > 1024],
            "stoi": [float(stoi(x[None], y[None], shape.sample_rate)) for x, y in pairs],
        }
        if has_pesq():
            figures["pesq"] = [float(pesq_wb(x[None], y[None], shape.sample_rate)) for x, y in pairs]
        return {k: float(np.nanmean(v)) for k, v in figures.items() if not np.isnan(v).all()}

    def show(rebuilt: list[Tensor]) -> tuple[Pictures, Sounds]:
        pictures: Pictures = {}
        sounds: Sounds = {}
        for i, (x, y) in enumerate(list(zip(val, rebuilt, strict=True))[:4]):
            both = [z[:, : x.shape[-1]].cpu().float().numpy() for z in (x, y)]
            pictures[f"{i}"] = np.concatenate([spectrogram(z, shape.sample_rate) for z in both], axis=1)
            sounds |= {f"{i}{k}": (z, shape.sample_rate) for k, z in zip(("-original", ""), both, strict=True)}
        return pictures, sounds

    codec = SpectralCodec(shape, vectors_per_batch=second.batch_size * crop).to(device)
    distance = SpectralDistance(shape.sample_rate, weights).to(device)
    settings = {"model": shape, "data": digest_of(x.document for x in train)}

    # First stage: no quantizer.
    def bare_loss(step: int) -> tuple[Tensor, Metrics]:
        x = batch(first, step, share(first.batch_size))
        error = distance(codec.sound(codec.latent(x)), x)
        return error, {"loss": error.item()}

    def bare_evaluate(step: int) -> tuple[Metrics, Pictures, Sounds]:
        distance.eval()
        rebuilt = [codec.sound(codec.latent(whole(x))) for x in val]
        figures = {f"val_{k}": v for k, v in judge(rebuilt).items()}
        distance.train()
        return figures, *show(rebuilt)

    bare = {k: v for k, v in weights.to_dict().items() if k in ("mel", "stft")}
    fit(codec, first, args.out / "bare", bare_loss, bare_evaluate, "without codes", settings | bare)

    # Between them: the codebooks start from the encoder's vectors, the same on every rank.
    if not (args.out / STATE).exists():
        found: list[Tensor] = []
        with torch.no_grad():
            while sum(map(len, found)) < VECTORS_A_CODE * shape.codebook_size:
                x = batch(first, first.steps + len(found), range(first.batch_size))
                found.append(codec.latent(x).flatten(0, 1))
        codec.quantizer.align(torch.cat(found))
        codec.quantizer.initialise(torch.cat(found))

    # Second stage.
    critics = SoundCritics(width=args.critic_width) if weights.critic or weights.feature else None
    usage = CodebookUsage(codec.codebook_sizes)
    model = nn.ModuleDict({"codec": codec, "usage": usage, **({"critics": critics} if critics else {})}).to(device)

    def loss(step: int) -> tuple[Tensor, Metrics]:
        x, r = batch(second, step, share(second.batch_size)), rng(second, step)
        marked = r.random() < MARKED
        levels = round(shape.levels * MARKS[r.integers(len(MARKS))]) if marked else int(r.integers(shape.levels) + 1)
        levels = max(1, levels)
        y, codes, own = codec(x, levels)
        error = distance(y, x)
        total = error + weights.commitment * own
        live = {"loss": error.item(), "levels": float(levels)}
        if levels == shape.levels:
            usage.count(codes)
        if critics and step >= weights.critic_start - weights.critic_warmup:
            rows = weights.critic_rows or len(x)
            judged, adversarial, feature = critics.losses(x[:rows], y[:rows])
            total = total + judged
            live |= {"critics": judged.item(), "fooled": adversarial.item(), "feature": feature.item()}
            if step >= weights.critic_start:
                total = total + weights.critic * adversarial + weights.feature * feature
        return total, live

    def evaluate(step: int) -> tuple[Metrics, Pictures, Sounds]:
        distance.eval()
        figures: Metrics = {}
        on_val = CodebookUsage(codec.codebook_sizes).eval()
        for levels in sorted({max(1, round(shape.levels * mark)) for mark in MARKS}):
            coded = [codec.quantizer.encode(codec.latent(whole(x)), levels) for x in val]
            rebuilt = [codec.sound(codec.quantizer.decode(codes)) for codes in coded]
            figures |= {f"val_{k}_{levels}": v for k, v in judge(rebuilt).items()}
        for codes in coded:
            on_val.count(codes.cpu())
        figures |= {f"val_{k}": v for k, v in on_val.figures().items()} | usage.figures()
        usage.reset()
        distance.train()
        return figures, *show(rebuilt)

    settings |= {"loss": weights, "first_steps": first.steps}
    fit(model, second, args.out, loss, evaluate, "audio codec", settings)
    if rank() == 0:
        codec.save(args.out / "model")
        print(f"wrote {args.out / 'model'}; use it with mmtok.load")


if __name__ == "__main__":
    main()

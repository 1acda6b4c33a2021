"""Train the 16 kHz audio codec: 50 frames a second, up to 8 codebooks of 1024 (0.5 to 4 kb/s).

    python recipes/audio.py --data data/audio.jsonl --out runs/audio-16k
    python recipes/audio.py --data my/recordings --out runs/mine --set steps=3000 --model dim=256

--data is a manifest or a folder. A killed run continues where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from pystoi import stoi
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

from mmtok import media
from mmtok.audio import SpectralCodec, SpectralCodecConfig
from mmtok.training.corpus import digest_of, items
from mmtok.training.data import load_audio
from mmtok.training.loop import LoopConfig, fit, prepare_torch, rng

CROP = 48  # frames of a training crop: 0.96 s
# Share of each kind of sound in a batch; within a kind every recording is as likely as any other.
MIXTURE = {"speech": 0.5, "synthetic speech": 0.35, "sound": 0.1, "music": 0.05}
# How many levels are trained, and how often: all of them, the four of the any-to-any model, or any number.
FULL, HALF = 0.4, 0.35


class SpectralLoss(nn.Module):
    """L1 between log-mel and between linear-mel spectra at five resolutions, as in DAC (arXiv:2306.06546)."""

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        self.scales = [(128, 10), (256, 20), (512, 40), (1024, 80), (2048, 160)]
        for n, mels in self.scales:
            self.register_buffer(f"window{n}", torch.hann_window(n))
            self.register_buffer(f"bank{n}", melscale_fbanks(n // 2 + 1, 0.0, sample_rate / 2, mels, sample_rate))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Samples float32 [B, T] against samples -> scalar."""
        total, both = x.new_zeros(()), torch.cat([y, x])
        for n, _ in self.scales:
            window, bank = self.get_buffer(f"window{n}"), self.get_buffer(f"bank{n}")
            spectrum = torch.stft(both, n, n // 4, window=window, return_complex=True)
            power = torch.view_as_real(spectrum).square().sum(-1)
            mel = bank.T @ (power + 1e-9).sqrt()
            a, b = mel.chunk(2)
            ratio = (a.clamp(min=1e-4).log10() - b.clamp(min=1e-4).log10()).abs().mean()
            total = total + ratio + (a - b).abs().mean() * (8 / n**0.5)
        return total / len(self.scales)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/audio.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("runs/audio-16k"))
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="override the schedule")
    parser.add_argument("--model", nargs="*", default=[], metavar="key=value", help="override the model's shape")
    args = parser.parse_args()
    config = LoopConfig(steps=2800, batch_size=32, lr=8e-4, warmup=100, eval_every=500, save_every=500).replace(
        args.set
    )
    shape = SpectralCodecConfig().replace(args.model)
    device = prepare_torch(config)

    # Data: all recordings end to end in memory, sampled by kind.
    cache = args.out.parent / "cache"
    train = items(args.data, "audio", "train")
    samples, offsets, kept = load_audio(train, shape.sample_rate, cache)
    kinds = {k: [i for i, j in enumerate(kept) if train[j].source == k] for k in MIXTURE}
    kinds = {k: v for k, v in kinds.items() if v} or {"all": list(range(len(kept)))}
    shares = np.array([MIXTURE.get(k, 1.0) for k in kinds])
    shares /= shares.sum()
    length = CROP * shape.hop

    def batch(r: np.random.Generator) -> Tensor:
        out = np.zeros((config.batch_size, length), np.float32)
        for row in out:
            members = kinds[list(kinds)[r.choice(len(kinds), p=shares)]]
            i = members[r.integers(len(members))]
            start, end = int(offsets[i]), int(offsets[i + 1])
            spare = end - start - length
            begin = start + (int(r.integers(spare + 1)) if spare > 0 else 0)
            piece = samples[begin : min(end, begin + length)].astype(np.float32)
            peak = max(1.0, float(np.abs(piece).max()))
            at = int(r.integers(length - len(piece) + 1))
            row[at : at + len(piece)] = piece / peak * 10 ** (r.uniform(-15, -0.5) / 20)  # peak at -15 to -0.5 dB
        return torch.from_numpy(out).to(device)

    held_out = items(args.data, "audio", "val")
    speech = [x for x in held_out if "speech" in x.source] or held_out
    chosen = [speech[i] for i in np.random.default_rng(0).permutation(len(speech))[:24]]
    val_samples, val_offsets, _ = load_audio(chosen, shape.sample_rate, cache)
    val = [
        torch.from_numpy(val_samples[a:b].astype(np.float32) / 32768)[None, None]
        for a, b in itertools.pairwise(val_offsets)
    ]

    model = SpectralCodec(shape, vectors_per_batch=config.batch_size * CROP).to(device)
    spectral = SpectralLoss(shape.sample_rate).to(device)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        r = rng(config, step)
        x = batch(r)
        draw = r.random()
        levels = shape.levels if draw < FULL else (shape.levels + 1) // 2 if draw < FULL + HALF else None
        levels = levels or int(r.integers(1, shape.levels + 1))
        y, codes, commitment = model(x, levels)
        with torch.autocast(device.type, enabled=False):
            distance = spectral(y.float(), x)
        live = {"loss": distance.item(), "commit": commitment.item(), "levels": levels}
        live["used"] = codes[..., 0].unique().numel() / shape.codebook_size
        return distance + 0.2 * commitment, live

    def evaluate(step: int) -> dict[str, float]:
        out: dict[str, float] = {}
        counts = torch.zeros(shape.levels, shape.codebook_size)
        for levels in (shape.levels, (shape.levels + 1) // 2):
            scores, distances = [], []
            for i, x in enumerate(val):
                codes = model.encode(x.to(device), levels)
                y = model.decode(codes, x.shape[-1]).cpu()
                if levels == shape.levels:
                    counts += torch.stack([torch.bincount(c, minlength=shape.codebook_size) for c in codes[0].cpu()])
                distances.append(float(spectral(y[0].to(device), x[0].to(device))))
                if x.shape[-1] > shape.sample_rate * 0.45:
                    scores.append(stoi(x[0, 0].numpy(), y[0, 0].numpy(), shape.sample_rate))
                if i < 4:
                    media.write_audio(
                        args.out / "samples" / f"{step:06}-{levels}-{i}.wav", y[0].numpy(), shape.sample_rate
                    )
                    media.write_audio(args.out / "samples" / f"original-{i}.wav", x[0].numpy(), shape.sample_rate)
            if scores:
                out[f"val_stoi_{levels}"] = float(np.mean(scores))
            out[f"val_loss_{levels}"] = float(np.mean(distances))
        out["val_usage_first"] = float((counts[0] > 0).float().mean())
        out["val_usage_last"] = float((counts[-1] > 0).float().mean())
        return out

    data = digest_of(x.document for x in train)
    fit(model, config, args.out, loss, evaluate, "audio codec", {"model": shape, "data": data})
    model.save(args.out / "model")
    print(f"wrote {args.out / 'model'}; use it with mmtok.load")


if __name__ == "__main__":
    main()

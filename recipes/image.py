"""Train the image tokenizer: a convolutional VQ-VAE with downsample factor 8 (64 tokens for 64x64 pixels).

    python recipes/image.py --data data/images.jsonl --out runs/image-64-f8
    python recipes/image.py --data my/pictures --out runs/mine --set steps=2000 --model channels=96

--data is a manifest or a folder. A killed run continues where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from mmtok import media
from mmtok.image import ImageVQVAE, ImageVQVAEConfig
from mmtok.training.corpus import items
from mmtok.training.data import load_images
from mmtok.training.loop import LoopConfig, fit, prepare_torch, rng
from mmtok.training.ssim import ssim

SIZE = 64  # pixels of a training picture
# Where a training picture comes from: a window of the whole picture fitted into so many pixels, or of a photograph.
SHARES = {64: 0.5, 80: 0.15, 160: 0.2}
PHOTOS = 0.15  # share of photographs in a batch, of which there are few files but many windows
TURNED, RECOLOURED = 0.25, 0.25  # share of pictures turned by quarters or with channels exchanged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/images.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("runs/image-64-f8"))
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="override the schedule")
    parser.add_argument("--model", nargs="*", default=[], metavar="key=value", help="override the model's shape")
    parser.add_argument("--ssim", type=float, default=0.05, help="weight of 1 - SSIM beside the squared error")
    args = parser.parse_args()
    config = LoopConfig(steps=15000, batch_size=64, lr=1.5e-3, warmup=100, ema=0.999, eval_every=500, save_every=500).replace(args.set)
    shape = ImageVQVAEConfig(channels=64, encoder_blocks=1, decoder_blocks=2, codebook_size=2048).replace(args.model)
    device = prepare_torch(config)

    cache = args.out.parent / "cache"
    train = items(args.data, "image", "train")
    photos = [x for x in train if "wallpapers" in x.source]
    sources = [(load_images(train, size, cache), share) for size, share in SHARES.items()]
    if photos:
        sources.append((load_images(photos, 1024, cache), PHOTOS))
    chances = np.array([share for _, share in sources]) / sum(share for _, share in sources)
    val = torch.from_numpy(np.array(load_images(items(args.data, "image", "val"), SIZE, cache))).to(device)

    def batch(step: int) -> torch.Tensor:
        r = rng(config, step)
        out = np.empty((config.batch_size, 3, SIZE, SIZE), np.uint8)
        for i, kind in enumerate(r.choice(len(sources), config.batch_size, p=chances)):
            pictures = sources[kind][0]
            picture = pictures[r.integers(len(pictures))]
            y, x = (r.integers(side - SIZE + 1) for side in picture.shape[1:])
            window = picture[:, y : y + SIZE, x : x + SIZE]
            if r.random() < 0.5:
                window = window[:, :, ::-1]
            if r.random() < TURNED:
                window = np.rot90(window, r.integers(1, 4), (1, 2))
            if r.random() < RECOLOURED:
                window = window[r.permutation(3)]
            out[i] = window
        return torch.from_numpy(out).to(device)

    model = ImageVQVAE(shape, vectors_per_batch=config.batch_size * (SIZE // shape.downsample) ** 2)
    model = model.to(device, memory_format=torch.channels_last)

    # Loss: squared error, structure, and the commitment of the encoder to its codes.
    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        x = (batch(step).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        y, codes, commitment = model(x)
        with torch.autocast(device.type, enabled=False):  # SSIM subtracts nearly equal numbers: not in bfloat16
            mse = F.mse_loss(y.float(), x)
            structure = 1 - ssim(y.float(), x, data_range=2.0).mean()
        total = mse + args.ssim * structure + commitment
        psnr = 10 * torch.log10(4 / mse.detach())
        return total, {"loss": total.item(), "psnr": psnr.item(), "used": codes.unique().numel() / shape.codebook_size}

    # Evaluation: figures over the val split, and a sheet of fixed originals over reconstructions.
    def evaluate(step: int) -> dict[str, float]:
        codes = model.encode(val)
        back = model.decode(codes)
        counts = torch.bincount(codes.flatten(), minlength=shape.codebook_size).double()
        p = counts / counts.sum()
        error = (back.float() - val.float()).square().mean((1, 2, 3))
        rows = [torch.cat(list(x[i : i + 16]), 2) for i in (0, 16) for x in (val, back) if len(val) >= i + 16]
        if rows:
            media.write_image(args.out / "samples" / f"{step:06}.png", torch.cat(rows, 1).cpu().numpy())
        return {
            "val_psnr": float((10 * torch.log10(65025 / error.clamp(min=1e-3))).mean()),
            "val_psnr_of_mse": float(10 * torch.log10(65025 / error.mean())),
            "val_ssim": float(ssim(back.float() / 255, val.float() / 255).mean()),
            "val_usage": float((counts > 0).double().mean()),
            "val_perplexity": float(torch.exp(-(p[p > 0] * p[p > 0].log()).sum())),
        }

    fit(model, config, args.out, loss, evaluate, "image tokenizer")
    model.save(args.out / "model")
    print(f"wrote {args.out / 'model'}; use it with mmtok.load")


if __name__ == "__main__":
    main()

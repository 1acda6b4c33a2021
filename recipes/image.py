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
LARGE = 160  # pixels of the copies that crops are cut from: detail at several scales
CROPS = 0.4  # share of crops in a batch; the rest is whole pictures
PHOTOS = 0.15  # share of photographs in a batch, of which there are few files but many crops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/images.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("runs/image-64-f8"))
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="override the schedule")
    parser.add_argument("--model", nargs="*", default=[], metavar="key=value", help="override the model's shape")
    args = parser.parse_args()
    config = LoopConfig(steps=2600, batch_size=64, lr=1.5e-3, eval_every=500, save_every=500).replace(args.set)
    shape = ImageVQVAEConfig(channels=64, encoder_blocks=2, decoder_blocks=2).replace(args.model)
    device = prepare_torch(config)

    # Data: whole pictures at 64 pixels, and larger copies for crops.
    cache = args.out.parent / "cache"
    train = items(args.data, "image", "train")
    whole, large = load_images(train, SIZE, cache), load_images(train, LARGE, cache)
    photos = [x for x in train if "wallpapers" in x.source]
    photographs = load_images(photos, 1024, cache) if photos else None
    val = torch.from_numpy(np.array(load_images(items(args.data, "image", "val"), SIZE, cache))).to(device)

    def batch(step: int) -> torch.Tensor:
        r = rng(config, step)
        out = np.empty((config.batch_size, 3, SIZE, SIZE), np.uint8)
        for i in range(config.batch_size):
            kind = r.random()
            if photographs is not None and kind < PHOTOS:
                out[i] = crop(photographs[r.integers(len(photographs))], r)
            elif kind < PHOTOS + CROPS:
                out[i] = crop(large[r.integers(len(large))], r)
            else:
                out[i] = whole[r.integers(len(whole))]
            if r.random() < 0.5:
                out[i] = out[i, :, :, ::-1]
        return torch.from_numpy(out).to(device)

    def crop(picture: np.ndarray, r: np.random.Generator) -> np.ndarray:
        y, x = r.integers(picture.shape[1] - SIZE + 1), r.integers(picture.shape[2] - SIZE + 1)
        return picture[:, y : y + SIZE, x : x + SIZE]

    model = ImageVQVAE(shape, vectors_per_batch=config.batch_size * (SIZE // shape.downsample) ** 2)
    model = model.to(device, memory_format=torch.channels_last)

    # Loss: squared error, structure, and the commitment of the encoder to its codes.
    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        x = (batch(step).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        y, codes, commitment = model(x)
        with torch.autocast(device.type, enabled=False):  # SSIM subtracts nearly equal numbers: not in bfloat16
            mse = F.mse_loss(y.float(), x)
            structure = 1 - ssim(y.float(), x, data_range=2.0).mean()
        total = mse + 0.1 * structure + 0.25 * commitment
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

"""Train an image tokenizer: a convolutional VQ-VAE with the quantizer of your choice.

    python recipes/image.py --data data/images.jsonl --out runs/image-64-f8
    python recipes/image.py --data my/pictures --out runs/mine --set steps=2000 --model downsample=4 channels=96
    python recipes/image.py --data my/pictures --out runs/fsq --model quantizer=fsq fsq_levels=[8,8,8] codebook_size=512
    python recipes/image.py --data my/pictures --out runs/sharp --loss critic=0.1 critic_start=10000 gradient=0.2
    torchrun --standalone --nproc-per-node 2 recipes/image.py --data my/pictures --out runs/two

--data is a folder, a manifest, WebDataset shards, torchvision:NAME:ROOT or hf:NAME (recipes/README.md). A killed run
continues where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmtok.errors import ConfigError
from mmtok.image import ImageVQVAE, ImageVQVAEConfig, match_channels, premultiply
from mmtok.quantizers import VectorQuantizer
from mmtok.training.adversarial import Critic, adaptive_weight
from mmtok.training.corpus import digest_of
from mmtok.training.data import load_images
from mmtok.training.distributed import rank, share
from mmtok.training.loop import STATE, LoopConfig, Metrics, Pictures, fit, prepare_torch, rng
from mmtok.training.losses import PictureLoss, perceptual_distance
from mmtok.training.pictures import Picture, open_pictures
from mmtok.training.ssim import ssim
from mmtok.training.usage import CodebookUsage

# Where a training picture comes from: a window of the whole picture fitted into so many times the side of a window,
# or of a photograph, of which there are few files but many windows.
SHARES = {1.0: 0.5, 1.25: 0.15, 2.5: 0.2}
PHOTOS, PHOTO_SIDE = 0.15, 1024
TURNED, RECOLOURED = 0.25, 0.25  # share of pictures turned by quarters or with colours exchanged
VECTORS_A_CODE = 32  # from which the codebook is initialised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data/images.jsonl", help="folder, manifest, shards, torchvision:.. or hf:..")
    parser.add_argument("--out", type=Path, default=Path("runs/image-64-f8"))
    parser.add_argument("--size", type=int, default=64, help="pixels a side of a training picture")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="override the schedule")
    parser.add_argument("--model", nargs="*", default=[], metavar="key=value", help="override the model's shape")
    parser.add_argument("--loss", nargs="*", default=[], metavar="key=value", help="override the weights of the loss")
    args = parser.parse_args()
    config = LoopConfig(
        steps=13000, batch_size=64, lr=1.5e-3, warmup=100, ema=0.999, eval_every=500, save_every=250
    ).replace(args.set)
    shape = ImageVQVAEConfig(channels=64, encoder_blocks=1, decoder_blocks=2, codebook_size=2048).replace(args.model)
    distance = PictureLoss().replace(args.loss)
    size, channels = args.size, 4 if shape.alpha else 3
    if size < 1 or size % shape.downsample:
        raise ConfigError(f"got --size {size}, expected a multiple of the model's downsample, {shape.downsample}")
    device = prepare_torch(config)

    # Data: whole pictures, and larger copies that windows are cut from, for detail at several scales.
    cache = args.out.parent / "cache"
    train = open_pictures(args.data, "train")
    photos = [x for x in train if "wallpapers" in x.source]

    def load(pictures: list[Picture], side: int) -> np.ndarray:
        return load_images(pictures, side, cache, alpha=shape.alpha)

    sources = [(load(train, round(size * scale)), part) for scale, part in SHARES.items()]
    if photos:
        sources.append((load(photos, max(size, PHOTO_SIDE)), PHOTOS))
    chances = np.array([part for _, part in sources]) / sum(part for _, part in sources)
    val = torch.from_numpy(np.array(load(open_pictures(args.data, "val"), size)))

    def example(r: np.random.Generator) -> np.ndarray:
        pictures = sources[r.choice(len(sources), p=chances)][0]
        picture = pictures[r.integers(len(pictures))]
        y, x = (r.integers(side - size + 1) for side in picture.shape[1:])
        window = picture[:, y : y + size, x : x + size]
        if r.random() < 0.5:
            window = window[:, :, ::-1]
        if r.random() < TURNED:
            window = np.rot90(window, r.integers(1, 4), (1, 2))
        if r.random() < RECOLOURED:
            window = window[[*r.permutation(3), *range(3, channels)]]
        return window

    def batch(step: int) -> Tensor:
        x = np.stack([example(rng(config, step, i)) for i in share(config.batch_size)])
        pixels = torch.from_numpy(x).to(device).float() / 127.5 - 1
        return (premultiply(pixels) if shape.alpha else pixels).contiguous(memory_format=torch.channels_last)

    # Model: the codec, and a critic where its loss has a weight. One backward pass serves both.
    codec = ImageVQVAE(shape, vectors_per_batch=config.batch_size * (size // shape.downsample) ** 2)
    critic = Critic(channels) if distance.critic else None
    usage = CodebookUsage(codec.codebook_sizes)
    model = nn.ModuleDict({"codec": codec, "usage": usage, **({"critic": critic} if critic else {})})
    model = model.to(device, memory_format=torch.channels_last)
    lpips = perceptual_distance(device) if distance.perceptual else None
    if isinstance(codec.quantizer, VectorQuantizer) and not (args.out / STATE).exists():
        found: list[Tensor] = []
        with torch.no_grad():
            while sum(map(len, found)) < VECTORS_A_CODE * shape.codebook_size:
                found.append(codec.encoder(batch(config.steps + len(found))).flatten(2).transpose(1, 2).flatten(0, 1))
        codec.quantizer.initialise(torch.cat(found))

    # Loss: the distance, the commitment of the encoder to its codes, and from some step on the critic's opinion.
    def loss(step: int) -> tuple[Tensor, Metrics]:
        x = batch(step)
        y, codes, own = codec(x)
        usage.count(codes)
        error = distance(y, x, lpips)
        total = error + own
        live = {"psnr": float(10 * torch.log10(4 / (y.detach().float() - x).square().mean()))}
        if critic and step >= distance.critic_start - distance.critic_warmup:
            judged, real, fake = critic.own_loss(x, y)
            total = total + judged
            live |= {"critic": judged.item(), "real": real.item(), "fake": fake.item()}
            if step >= distance.critic_start:
                adversarial = critic.codec_loss(y)
                total = total + distance.critic * adaptive_weight(error, adversarial, codec.last) * adversarial
        return total, {"loss": total.item(), **live}

    # Evaluation: figures over the val split, the codebook's life in training, fixed originals over reconstructions.
    def evaluate(step: int) -> tuple[Metrics, Pictures]:
        codes = codec.encode(val).cpu()
        back = codec.decode(codes).cpu()
        x, y = (match_channels(z, 3).float() / 255 for z in (val, back))
        error = (y - x).square().mean((1, 2, 3))
        across = min(16, len(val))
        rows = [torch.cat(list(z[i : i + across]), 2) for i in (0, 16) for z in (x, y) if len(val) >= i + across]
        figures = {
            "val_psnr": float((-10 * torch.log10(error.clamp(min=1e-6))).mean()),
            "val_psnr_of_mse": float(-10 * torch.log10(error.mean())),
            "val_ssim": float(ssim(y, x).mean()),
        }
        on_val = CodebookUsage(codec.codebook_sizes).eval()
        on_val.count(codes if len(codec.codebook_sizes) > 1 else codes[..., None])
        figures |= {f"val_{k}": v for k, v in on_val.figures().items()} | usage.figures()
        usage.reset()
        return figures, {"": (torch.cat(rows, 1) * 255).round().byte().numpy()}

    data = digest_of(x.name for x in train)
    settings = {"model": shape, "loss": distance, "size": size, "data": data}
    fit(model, config, args.out, loss, evaluate, "image tokenizer", settings)
    if rank() == 0:
        codec.save(args.out / "model")
        print(f"wrote {args.out / 'model'}; use it with mmtok.load")


if __name__ == "__main__":
    main()

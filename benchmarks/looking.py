"""A judge of pictures: a small convolutional network that tells the concepts of the trimodal corpus apart.

It is trained here, on the original pictures, moved, scaled, mirrored, tinted, blurred and noisy: never on what an
image tokenizer or a model has made. A picture is then taken for the concept with the nearest features. ``UNTRAINED``
are changes that it was never trained on, to see what it is worth.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

STEPS, BATCH, LR = 600, 128, 4e-3
FEATURES = 128


class Network(nn.Module):
    """Pictures float32 [B, 3, 64, 64], -1..1, to scores of ``count`` concepts [B, count]; ``body`` gives features."""

    def __init__(self, count: int, width: int = 32) -> None:
        super().__init__()
        sizes = (3, width, 2 * width, 4 * width, 4 * width)
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16 * width, FEATURES), nn.BatchNorm1d(FEATURES)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, count)

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores of the concepts."""
        return self.head(self.body(pictures).relu())

    def features(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 [B, 3, 64, 64] -> float32 [B, 128] of length 1."""
        with torch.inference_mode():
            return F.normalize(self.body(as_floats(pictures)), dim=-1).numpy()


def as_floats(pictures: np.ndarray) -> Tensor:
    """uint8 [B, 3, H, W] -> float32, -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).float() / 127.5 - 1


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures float32 [B, 3, H, W], -1..1, moved, scaled, some mirrored, tinted, blurred and with noise."""
    b = len(x)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(b, *shape, generator=generator)

    scale = between(0.75, 1.3)
    place = torch.zeros(b, 2, 3)
    place[:, 0, 0] = scale * between(0.9, 1.1) * torch.where(between(0, 1) < 0.3, -1.0, 1.0)
    place[:, 1, 1] = scale
    place[:, :, 2] = between(-0.2, 0.2, 2)
    grid = F.affine_grid(place, list(x.shape), align_corners=False)
    x = 1 - F.grid_sample(1 - x, grid, align_corners=False)  # what comes in from outside is white
    contrast, tint, shift = between(0.7, 1.25, 1, 1, 1), between(0.85, 1.15, 3, 1, 1), between(-0.15, 0.15, 3, 1, 1)
    x = x * contrast * tint + shift
    half, quarter = (
        F.interpolate(F.interpolate(x, scale_factor=1 / n, mode="area"), x.shape[-2:], mode="bilinear") for n in (2, 4)
    )
    kind, much = between(0, 1, 1, 1, 1), between(0, 1, 1, 1, 1)
    blurred = torch.where(kind < 0.75, torch.lerp(x, half, much), torch.lerp(half, quarter, much))
    x = torch.where(kind < 0.35, x, blurred)
    x = x + between(0, 0.2, 1, 1, 1) * torch.randn(x.shape, generator=generator)
    return x.clamp(-1, 1)


def trained(pictures: np.ndarray, cache: Path) -> Network:
    """The network, from its file in ``cache`` or trained anew: 2 minutes on one thread.

    Args:
        pictures: uint8 [N, 3, 64, 64], one of each concept.
        cache: directory; the file is named by the pictures and by this module's text.
    """
    key = hashlib.sha256(pictures.tobytes() + Path(__file__).read_bytes()).hexdigest()[:16]
    file = cache / f"pictures-{key}.safetensors"
    torch.manual_seed(0)
    network = Network(len(pictures))
    if file.exists():
        network.load_state_dict(load_file(file))
        return network.eval()
    generator = torch.Generator().manual_seed(0)
    x = as_floats(pictures)
    optimizer = torch.optim.AdamW(network.parameters(), LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, STEPS)
    for _ in track(range(STEPS), "training the judge of pictures"):
        index = torch.randint(len(x), (BATCH,), generator=generator)
        loss = F.cross_entropy(network(augment(x[index], generator)), index, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    cache.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), file)
    return network.eval()


def _changed(change: Callable[[PILImage.Image], PILImage.Image], pixels: np.ndarray) -> np.ndarray:
    return np.asarray(change(PILImage.fromarray(pixels.transpose(1, 2, 0))).convert("RGB")).transpose(2, 0, 1)


def _jpeg(image: PILImage.Image) -> PILImage.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=10)
    return PILImage.open(file)


def _covered(image: PILImage.Image) -> PILImage.Image:
    image.paste((255, 255, 255), (0, 0, image.width // 2, image.height // 2))
    return image


# uint8 [3, H, W] -> uint8 [3, H, W]
UNTRAINED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "JPEG of quality 10": lambda x: _changed(_jpeg, x),
    "turned by 12 degrees": lambda x: _changed(
        lambda i: i.rotate(12, PILImage.Resampling.BICUBIC, fillcolor=(255, 255, 255)), x
    ),
    "a quarter covered": lambda x: _changed(_covered, x),
    "grey": lambda x: _changed(lambda i: i.convert("L"), x),
}

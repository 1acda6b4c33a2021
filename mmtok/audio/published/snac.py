"""SNAC, the Multi-Scale Neural Audio Codec (https://arxiv.org/abs/2410.14411), with the network of package ``snac``.

Published as a directory with config.json and pytorch_model.bin (hubertsiuzdak/snac_24khz, snac_32khz, snac_44khz). The
package is installed with ``pip install 'mmtok[published]'``.

Each level has its own rate: a frame holds, say, one code of level 0, two of level 1 and four of level 2. So codes are a
tuple with one tensor a level, in a sequence the layout ``SNAC.layout``.

SNAC's decoder adds noise to its hidden layers, which the package draws anew in every call from PyTorch's own generator.
Here it is noise too, as it was in training, but always the same: each block has a generator with a fixed seed, so that
the same codes give the same samples and nobody's random numbers are touched.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.audio.published.base import PublishedCodec, build, check_positive
from mmtok.config import Config
from mmtok.errors import CheckpointError, ConfigError, VocabularyError
from mmtok.published import config_of
from mmtok.weights import read_directory, read_json

Levels = tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class SNACConfig(Config):
    """The arguments of the package's ``SNAC``, which are the entries of its config.json."""

    sampling_rate: int = 44_100
    encoder_dim: int = 64
    encoder_rates: tuple[int, ...] = (3, 3, 7, 7)
    latent_dim: int | None = None
    decoder_dim: int = 1536
    decoder_rates: tuple[int, ...] = (7, 7, 3, 3)
    attn_window_size: int | None = 32
    codebook_size: int = 4096
    codebook_dim: int = 8
    vq_strides: tuple[int, ...] = (8, 4, 2, 1)
    noise: bool = True
    depthwise: bool = True

    def __post_init__(self) -> None:
        check_positive(
            self, "sampling_rate", "encoder_dim", "encoder_rates", "decoder_dim", "decoder_rates", "codebook_size",
            "codebook_dim", "vq_strides",
        )  # fmt: skip
        down, up, strides = self.encoder_rates, self.decoder_rates, self.vq_strides
        if min(*down, *up) < 2 or math.prod(down) != math.prod(up):
            raise ConfigError(f"SNACConfig: got rates {down} and {up}, expected numbers from 2 up of one product")
        if any(a % b for a, b in itertools.pairwise(strides)):
            raise ConfigError(f"SNACConfig.vq_strides: got {strides}, expected each a multiple of the next")
        if self.attn_window_size is not None and self.attn_window_size < 1:
            raise ConfigError(f"SNACConfig.attn_window_size: got {self.attn_window_size}, expected null or from 1 up")


class SNAC(PublishedCodec):
    """SNAC: float32 [B, 1, T] at 24, 32 or 44.1 kHz <-> a tuple of int64 [B, n_q], coarse to fine.

    With F = ceil(T / hop) frames level q has ``rates[q] * F`` codes. The first levels alone decode too; SNAC was not
    trained for that.

    Args:
        config: of the package.

    Raises:
        CheckpointError: the package is not installed.
    """

    kind: ClassVar[str] = "audio-snac"
    config_class: ClassVar[type[Config]] = SNACConfig

    def __init__(self, config: SNACConfig) -> None:
        try:
            import snac
            from snac.layers import NoiseBlock
        except ImportError as error:
            raise CheckpointError(
                f"this tokenizer needs the package snac ({error}): pip install 'mmtok[published]'"
            ) from error
        super().__init__(config)
        self.model: Any = build("SNAC", lambda: snac.SNAC(**config.to_dict()))
        blocks = [(name, x) for name, x in self.model.named_modules() if isinstance(x, NoiseBlock)]
        for seed, (name, block) in enumerate(blocks):
            self.model.set_submodule(name, FixedNoise(block.linear, seed))

    @classmethod
    def from_published(cls, path: str | Path) -> Self:
        """SNAC out of the directory with config.json and pytorch_model.bin; the latter is read as data.

        Raises:
            CheckpointError: as ``PublishedCodec.from_published``, or the package is not installed.
        """
        place = Path(path)
        settings = read_json(place / "config.json")
        if "vq_strides" not in settings or "encoder_rates" not in settings:
            raise CheckpointError(f"{place / 'config.json'} is of another model, expected SNAC's with its vq_strides")
        config = config_of(SNACConfig, settings, place / "config.json")
        state = read_directory(place, "model")
        return cls.from_weights(config, {f"model.{key}": value for key, value in state.items()}, str(place))

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.config.sampling_rate

    @property
    def hop(self) -> int:
        """Samples that a frame spans: whole codes of every level, and whole windows of attention."""
        return math.prod(self.config.encoder_rates) * self._steps

    @property
    def rates(self) -> tuple[int, ...]:
        """Codes of each level in a frame."""
        return tuple(self._steps // stride for stride in self.config.vq_strides)

    @property
    def layout(self) -> str:
        """The layout of its codes in a sequence: of each frame by time, coarse before fine, as SNAC's users have it."""
        return self.layout_of(len(self.rates))

    def layout_of(self, levels: int) -> str:
        """As ``layout``, for the first so many levels.

        Raises:
            ConfigError: there are not so many.
        """
        self.check_levels(levels)
        strides = self.config.vq_strides[:levels]
        slots = [q for step in range(self._steps) for q, stride in enumerate(strides) if step % stride == 0]
        return "multi-rate:" + ",".join(map(str, slots))

    @property
    def codebooks(self) -> list[Tensor]:
        """float32 [codebook_size, codebook_dim] of each level."""
        return [quantizer.codebook.weight for quantizer in self.model.quantizer.quantizers]

    @property
    def _steps(self) -> int:
        """Steps of the finest rate in a frame."""
        return math.lcm(self.config.vq_strides[0], self.config.attn_window_size or 1)

    def bandwidth(self, levels: int | None = None) -> float:
        """As ``AudioTokenizer.bandwidth``."""
        if levels is not None:
            self.check_levels(levels)
        bits = math.log2(self.config.codebook_size) * sum(self.rates[:levels])
        return bits * self.sample_rate / self.hop / 1000

    def encode(  # type: ignore[override]  # several rates do not fit one tensor
        self, samples: Tensor | Sequence[Tensor], levels: int | None = None, *, bandwidth: float | None = None
    ) -> Levels | list[Levels]:
        """Codes of sounds.

        Args:
            samples: float32 [B, 1, T] in -1..1, or a sequence of [1, T]; as ``AudioTokenizer.encode``.
            levels, bandwidth: as there.

        Returns:
            a tuple of int64 [B, rates[q] * ceil(T / hop)]; for a sequence a list of tuples of [rates[q] * F].

        Raises:
            MediaError, ConfigError: as there.
        """
        levels = self.choose_levels(levels, bandwidth)
        if isinstance(samples, Tensor):
            return self._split(super().encode(samples, levels), levels)
        return [tuple(x[0] for x in self._split(one[None], levels)) for one in super().encode(samples, levels)]

    def decode(  # type: ignore[override]
        self, codes: Sequence[Tensor] | Sequence[Sequence[Tensor]], length: int | Sequence[int] | None = None
    ) -> Tensor | list[Tensor]:
        """Sounds of codes.

        Args:
            codes: of the first L levels int64 [B, n_q] each, where all n_q are equal also as one [B, L, n]; or a
                sequence of sounds, of each L tensors [n_q].
            length: as ``AudioTokenizer.decode``.

        Returns:
            float32 [B, 1, length] in -1..1; for a sequence of sounds a list of [1, length].

        Raises:
            VocabularyError: as there, or levels that do not fit each other.
        """
        if isinstance(codes, Tensor):
            if codes.ndim != 3:
                raise VocabularyError(f"got codes {list(codes.shape)}, expected a tuple with one tensor a level")
            codes = codes.unbind(1)
        if codes and isinstance(codes[0], Tensor):
            return super().decode(self._join(codes), length)  # type: ignore[arg-type]
        joined = []
        for i, one in enumerate(codes):
            if not all(isinstance(x, Tensor) for x in one):
                raise VocabularyError(f"codes {i} are no sequence of tensors, expected one a level")
            joined.append(self._join([x[None] for x in one], f"codes {i}: ")[0])
        return super().decode(joined, length)  # type: ignore[arg-type]

    def check_codes(self, codes: Tensor, where: str = "") -> None:
        """Raise VocabularyError unless ``codes``, int64 [B, slots, F], are in the codebooks."""
        bad = ((codes < 0) | (codes >= self.config.codebook_size)).nonzero()
        if len(bad):
            row, slot, frame = bad[0].tolist()
            level = next(q for q in range(len(self.rates)) if slot < sum(self.rates[: q + 1]))
            raise VocabularyError(
                f"{where}row {row}, level {level}, frame {frame}: got code {int(codes[row, slot, frame])}, expected "
                f"0 to {self.config.codebook_size - 1}"
            )

    def to_codes(self, samples: Tensor, levels: int) -> Tensor:
        """float32 [1, 1, T] -> int64 [1, slots, ceil(T / hop)]: the codes of a frame, level by level."""
        made = self.model.encode(F.pad(samples, (0, -samples.shape[-1] % self.hop)))[:levels]
        return self._join(made)

    def to_samples(self, codes: Tensor) -> Tensor:
        """int64 [1, slots, F] -> float32 [1, 1, F * hop]."""
        levels = next(n for n in range(1, len(self.rates) + 1) if sum(self.rates[:n]) == codes.shape[1])
        z: Any = 0.0
        for quantizer, level in zip(self.model.quantizer.quantizers, self._split(codes, levels), strict=False):
            z = z + quantizer.out_proj(quantizer.decode_code(level)).repeat_interleave(quantizer.stride, dim=-1)
        return self.model.decoder(z)

    def _join(self, codes: Sequence[Tensor], where: str = "") -> Tensor:
        """int64 [B, n_q] of each level -> [B, slots, F]."""
        if not 1 <= len(codes) <= len(self.rates):
            raise VocabularyError(f"{where}got {len(codes)} levels, expected 1 to {len(self.rates)}")
        shapes = [list(x.shape) for x in codes]
        if any(x.dtype != torch.int64 or x.ndim != 2 for x in codes):
            got = ", ".join(f"{x.dtype} {shape}" for x, shape in zip(codes, shapes, strict=True))
            raise VocabularyError(f"{where}got codes {got}, expected int64 [B, n] of each level")
        frames = shapes[0][1] // self.rates[0]
        expected = [[shapes[0][0], rate * frames] for rate in self.rates[: len(codes)]]
        if shapes != expected:
            raise VocabularyError(f"{where}got codes of shapes {shapes}, expected {expected}: a frame has {self.rates}")
        parts = [x.view(len(x), frames, rate).transpose(1, 2) for x, rate in zip(codes, self.rates, strict=False)]
        return torch.cat(parts, 1)

    def _split(self, codes: Tensor, levels: int) -> Levels:
        """int64 [B, slots, F] -> [B, n_q] of each level."""
        rates = self.rates[:levels]
        if not codes.numel():
            return tuple(codes.new_zeros(len(codes), rate * codes.shape[-1]) for rate in rates)
        return tuple(part.transpose(1, 2).flatten(1) for part in codes.split(rates, 1))


class FixedNoise(nn.Module):
    """SNAC's ``NoiseBlock`` with noise that is the same in every call and on every device.

    Args:
        linear: the weight of the noise, a convolution.
        seed: of this block.
    """

    def __init__(self, linear: nn.Module, seed: int) -> None:
        super().__init__()
        self.linear, self.seed = linear, seed

    def forward(self, x: Tensor) -> Tensor:
        """float32 [1, C, T] -> the same shape."""
        noise = torch.randn(1, 1, x.shape[-1], generator=torch.Generator().manual_seed(self.seed))
        return x + noise.to(x) * self.linear(x)

"""Our spectral audio codec: log-mel -> ConvNeXt -> residual VQ -> ConvNeXt -> inverse STFT.

The decoder predicts magnitude and phase of every frame and leaves the waveform to an inverse STFT, as Vocos does
(https://arxiv.org/abs/2306.00814); ConvNeXt blocks (https://arxiv.org/abs/2201.03545) in one dimension; the residual
quantizer of SoundStream (https://arxiv.org/abs/2107.03312) trained with a random number of levels, so that any
prefix of the levels decodes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchaudio.functional import melscale_fbanks

from mmtok.codec import CodecModel, exact
from mmtok.config import Config
from mmtok.errors import ConfigError, MediaError, VocabularyError
from mmtok.quantizers import VectorQuantizer


@dataclasses.dataclass(frozen=True)
class SpectralCodecConfig(Config):
    """Shape of the model.

    Attributes:
        sample_rate: Hz.
        hop: samples a frame; sample_rate / hop is the frame rate.
        window: samples of the analysis and synthesis windows.
        mels: mel bands that the encoder sees.
        dim: width of the ConvNeXt blocks.
        encoder_blocks, decoder_blocks: their number.
        levels: residual quantizer levels.
        codebook_size: codes a level.
        codebook_dim: channels in which codes are searched.
    """

    sample_rate: int = 16_000
    hop: int = 320
    window: int = 1024
    mels: int = 100
    dim: int = 192
    encoder_blocks: int = 4
    decoder_blocks: int = 6
    levels: int = 8
    codebook_size: int = 1024
    codebook_dim: int = 48

    def __post_init__(self) -> None:
        for name in (
            "sample_rate",
            "mels",
            "dim",
            "encoder_blocks",
            "decoder_blocks",
            "levels",
            "codebook_size",
            "codebook_dim",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"SpectralCodecConfig.{name}: got {getattr(self, name)}, expected at least 1")
        if self.hop < 1 or self.window < self.hop or (self.window - self.hop) % 2:
            raise ConfigError(
                f"SpectralCodecConfig: got window {self.window} and hop {self.hop}, expected a window of at least one "
                "hop that exceeds it by an even number"
            )


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution over 7 frames, layer norm, pointwise MLP, added to its input. [B, C, F] -> the same."""

    def __init__(self, dim: int, scale: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 3 * dim)
        self.shrink = nn.Linear(3 * dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x).transpose(1, 2))
        h = self.scale * self.shrink(F.gelu(self.expand(h)))
        return x + h.transpose(1, 2)


class ISTFTHead(nn.Module):
    """Frames [B, F, dim] -> samples [B, F * hop]: log-magnitude and phase, inverse FFT, windowed overlap-add."""

    window: Tensor

    def __init__(self, dim: int, window: int, hop: int) -> None:
        super().__init__()
        self.hop, self.bins = hop, window // 2 + 1
        self.project = nn.Linear(dim, 2 * self.bins)
        self.register_buffer("window", torch.hann_window(window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        log_magnitude, phase = self.project(x).float().split(self.bins, -1)
        magnitude = log_magnitude.clamp(max=5.0).exp()
        spectrum = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())
        frames = torch.fft.irfft(spectrum, n=len(self.window), dim=-1) * self.window
        samples = self._overlap_add(frames)
        envelope = self._overlap_add(self.window.square().expand(1, frames.shape[1], -1))
        return samples / envelope.clamp(min=1e-8)

    def _overlap_add(self, frames: Tensor) -> Tensor:
        count, width = frames.shape[1:]
        total = (count - 1) * self.hop + width
        folded = F.fold(frames.transpose(1, 2), (1, total), (1, width), stride=(1, self.hop))[:, 0, 0]
        edge = (width - self.hop) // 2
        return folded[:, edge : edge + count * self.hop]


class SpectralCodec(CodecModel):
    """Audio tokenizer: float32 [B, 1, T] at ``sample_rate`` <-> int64 [B, levels, ceil(T / hop)]."""

    kind: ClassVar[str] = "audio-spectral"
    modality: ClassVar[str] = "audio"
    filters: Tensor
    window: Tensor
    config_class: ClassVar[type[Config]] = SpectralCodecConfig

    def __init__(self, config: SpectralCodecConfig, vectors_per_batch: int = 1600) -> None:
        super().__init__(config)
        c = config
        bank = melscale_fbanks(c.window // 2 + 1, 0.0, c.sample_rate / 2, c.mels, c.sample_rate, norm="slaney")
        self.register_buffer("filters", bank, persistent=False)
        self.register_buffer("window", torch.hann_window(c.window), persistent=False)
        scale = 1 / (c.encoder_blocks + c.decoder_blocks)
        self.embed = nn.Conv1d(c.mels, c.dim, 7, padding=3)
        self.encoder = nn.Sequential(*(ConvNeXtBlock(c.dim, scale) for _ in range(c.encoder_blocks)))
        self.encoder_norm = nn.LayerNorm(c.dim)
        self.quantizer = VectorQuantizer(c.dim, c.codebook_dim, c.codebook_size, c.levels, vectors_per_batch)
        self.restore = nn.Conv1d(c.dim, c.dim, 7, padding=3)
        self.decoder = nn.Sequential(*(ConvNeXtBlock(c.dim, scale) for _ in range(c.decoder_blocks)))
        self.decoder_norm = nn.LayerNorm(c.dim)
        self.head = ISTFTHead(c.dim, c.window, c.hop)

    def forward(self, samples: Tensor, levels: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Training pass: float [B, T], T a multiple of hop -> (samples [B, T], codes [B, F, levels], own loss)."""
        q, codes, loss = self.quantizer(self._analyse(samples), levels)
        return self._synthesise(q), codes, loss

    def _analyse(self, samples: Tensor) -> Tensor:
        """[B, F * hop] -> latent [B, F, dim]."""
        edge = (self.config.window - self.config.hop) // 2
        frames = F.pad(samples, (edge, edge)).unfold(-1, self.config.window, self.config.hop)
        magnitude = torch.fft.rfft(frames * self.window, dim=-1).abs()
        mel = (magnitude @ self.filters).clamp(min=1e-5).log()
        x = self.encoder(self.embed((mel.transpose(1, 2) + 5) / 3))
        return self.encoder_norm(x.transpose(1, 2))

    def _synthesise(self, q: Tensor) -> Tensor:
        """Latent [B, F, dim] -> [B, F * hop]."""
        x = self.decoder(self.restore(q.transpose(1, 2)))
        return self.head(self.decoder_norm(x.transpose(1, 2)))

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes in each level's codebook."""
        return (self.config.codebook_size,) * self.config.levels

    @property
    def properties(self) -> dict[str, int]:
        """What the registry keeps of this tokenizer: ``sample_rate`` in Hz and ``hop`` in samples."""
        return {"sample_rate": self.config.sample_rate, "hop": self.config.hop}

    def bandwidth(self, levels: int | None = None) -> float:
        """Nominal bit rate in kb/s of the first ``levels`` levels (all by default)."""
        c = self.config
        return (levels or c.levels) * math.log2(c.codebook_size) * c.sample_rate / c.hop / 1000

    @exact
    def encode(self, samples: Tensor, levels: int | None = None) -> Tensor:
        """float32 [B, 1, T], -1..1, at ``sample_rate`` -> codes int64 [B, levels, ceil(T / hop)].

        The tail is padded with silence to a whole frame. Rows are encoded one by one, so that a row does not depend on
        the batch that it came in; fewer levels give the first rows of the codes of all levels.

        Raises:
            MediaError: wrong dtype or shape, or NaN.
        """
        if samples.dtype != torch.float32 or samples.ndim != 3 or samples.shape[1] != 1:
            raise MediaError(
                f"got {samples.dtype} {list(samples.shape)}, expected float32 [B, 1, T]: mix to mono first"
            )
        if not torch.isfinite(samples).all():
            raise MediaError("got NaN or infinity among the samples, expected float32 in -1..1")
        levels = self.config.levels if levels is None else levels
        if not 1 <= levels <= self.config.levels:
            raise MediaError(f"got {levels} levels, expected 1 to {self.config.levels}")
        b, _, length = samples.shape
        frames = -(-length // self.config.hop)
        if not b or not frames:
            return torch.zeros(b, levels, frames, dtype=torch.int64)
        padded = F.pad(samples[:, 0], (0, frames * self.config.hop - length))
        return torch.cat([self.quantizer.encode(self._analyse(row), levels) for row in padded.split(1)]).transpose(1, 2)

    @exact
    def decode(self, codes: Tensor, length: int | None = None) -> Tensor:
        """Codes int64 [B, L, F], the first L levels -> float32 [B, 1, F * hop], or cut to ``length`` samples.

        Raises:
            VocabularyError: wrong shape or dtype, too many levels, or a code outside the codebook.
        """
        if codes.dtype != torch.int64 or codes.ndim != 3:
            raise VocabularyError(f"got codes {codes.dtype} {list(codes.shape)}, expected int64 [B, levels, F]")
        b, levels, frames = codes.shape
        if not 1 <= levels <= self.config.levels:
            raise VocabularyError(f"got codes of {levels} levels, expected 1 to {self.config.levels}")
        total = frames * self.config.hop
        least = max(0, total - self.config.hop + 1)
        if length is not None and not least <= length <= total:
            raise VocabularyError(f"got length {length}, but {frames} frames hold {least} to {total} samples")
        if not b or not frames:
            return torch.zeros(b, 1, total if length is None else length)
        rows = [self._synthesise(self.quantizer.decode(row.transpose(1, 2))) for row in codes.split(1)]
        return torch.cat(rows)[:, None, :length].clamp(-1, 1)

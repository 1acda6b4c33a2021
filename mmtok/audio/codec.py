"""Our spectral audio codec: log-mel -> ConvNeXt -> residual VQ -> ConvNeXt -> inverse STFT.

The decoder predicts magnitude and phase of every frame and leaves the waveform to an inverse STFT, as Vocos does
(https://arxiv.org/abs/2306.00814); ConvNeXt blocks (https://arxiv.org/abs/2201.03545) in one dimension; the residual
quantizer of SoundStream (https://arxiv.org/abs/2107.03312) trained with a random number of levels, so that any
prefix of the levels decodes. Beside a long window for pitch the encoder sees several short ones in each frame: where in
it the pulses of a voice lie, which long windows hide and the decoder needs to put them there.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchaudio.functional import melscale_fbanks

from mmtok.audio.layers import ConvNeXtBlock, FrameConv, OverlapAdd, Stream
from mmtok.audio.tokenizer import AudioTokenizer, StreamDecoder, StreamEncoder
from mmtok.codec import CodecModel, exact
from mmtok.config import Config
from mmtok.errors import ConfigError
from mmtok.quantizers import build_quantizer

PIECE = 1024  # frames: longer sounds go through the network in pieces of so many, at a memory that does not grow
SILENCE = 1e-5  # magnitudes below it count as it


@dataclasses.dataclass(frozen=True)
class SpectralCodecConfig(Config):
    """Shape of the model.

    Attributes:
        sample_rate: Hz.
        hop: samples a frame; sample_rate / hop is the frame rate.
        window: samples of the long analysis window and of the synthesis window.
        mels: mel bands of the long window.
        short_window: samples of the short analysis windows.
        shorts: short windows a frame, 0 for none.
        short_mels: mel bands of each.
        dim: width of the ConvNeXt blocks.
        encoder_blocks, decoder_blocks: their number.
        causal: no code depends on later frames, and no sample on later codes: for streams without delay.
        quantizer: ``vq``, residual if there are several levels, or another of ``mmtok.quantizers.KINDS``.
        levels: residual quantizer levels.
        codebook_size: codes a level.
        codebook_dim: channels in which codes are searched.
        fsq_levels: values of each channel of ``fsq``.
        stored_bits: of a weight in the files that ``save`` writes: 16, or 8 with a scale for each row of a matrix.
    """

    sample_rate: int = 16_000
    hop: int = 320
    window: int = 1024
    mels: int = 100
    short_window: int = 128
    shorts: int = 8
    short_mels: int = 20
    dim: int = 192
    encoder_blocks: int = 4
    decoder_blocks: int = 6
    causal: bool = False
    quantizer: str = "vq"
    levels: int = 8
    codebook_size: int = 1024
    codebook_dim: int = 48
    fsq_levels: tuple[int, ...] = ()
    stored_bits: int = 16

    def __post_init__(self) -> None:
        least = {"shorts": 0}
        for field in dataclasses.fields(self):
            value, low = getattr(self, field.name), least.get(field.name, 1)
            if field.type == "int" and value < low:
                raise ConfigError(f"SpectralCodecConfig.{field.name}: got {value}, expected at least {low}")
        if self.stored_bits not in (8, 16):
            raise ConfigError(f"SpectralCodecConfig.stored_bits: got {self.stored_bits}, expected 8 or 16")
        if self.window < self.hop or (self.window - self.hop) % 2:
            raise ConfigError(
                f"SpectralCodecConfig: got window {self.window} and hop {self.hop}, expected a window of at least one "
                "hop that exceeds it by an even number"
            )
        if self.shorts:
            step = self.hop // self.shorts
            if self.hop % self.shorts or not step <= self.short_window <= self.window or (self.short_window - step) % 2:
                raise ConfigError(
                    f"SpectralCodecConfig: got {self.shorts} short windows of {self.short_window} in a hop of "
                    f"{self.hop}, expected a number that divides the hop, and windows of at least hop / shorts, "
                    f"at most {self.window}, that exceed it by an even number"
                )


class Analysis(nn.Module):
    """Samples to frames of log-mel magnitudes, of one long window and several short ones."""

    long: Tensor
    long_bank: Tensor
    short: Tensor
    short_bank: Tensor

    def __init__(self, config: SpectralCodecConfig) -> None:
        super().__init__()
        self.config = c = config
        self.around = c.window - c.hop
        self.after = 0 if c.causal else self.around // 2
        self.before = self.around - self.after
        self.channels = c.mels + c.shorts * c.short_mels
        self.register_buffer("long", torch.hann_window(c.window), persistent=False)
        self.register_buffer("long_bank", _bank(c, c.window, c.mels), persistent=False)
        if c.shorts:
            self.register_buffer("short", torch.hann_window(c.short_window), persistent=False)
            self.register_buffer("short_bank", _bank(c, c.short_window, c.short_mels), persistent=False)

    def forward(self, samples: Tensor) -> Tensor:
        """[B, before + n * hop + after] -> [B, channels, n]."""
        c = self.config
        count = (samples.shape[-1] - self.around) // c.hop
        if count < 1 or not len(samples):
            return samples.new_zeros(len(samples), self.channels, max(0, count))
        features = [_log_mel(samples.unfold(-1, c.window, c.hop), self.long, self.long_bank)]
        if c.shorts:
            step = c.hop // c.shorts
            around = c.short_window - step
            start = self.before - (around if c.causal else around // 2)
            pieces = samples[:, start : start + count * c.hop + around].unfold(-1, c.short_window, step)
            features.append(_log_mel(pieces, self.short, self.short_bank).reshape(len(samples), count, -1))
        return (torch.cat(features, -1).transpose(1, 2) + 5) / 3


class Synthesis(nn.Module):
    """Frames [B, F, dim] -> weighted windows of samples [B, F, window]: log-magnitude, phase, inverse FFT."""

    window: Tensor

    def __init__(self, dim: int, window: int) -> None:
        super().__init__()
        self.bins = window // 2 + 1
        self.project = nn.Linear(dim, 2 * self.bins)
        self.register_buffer("window", torch.hann_window(window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """float [B, F, dim] -> float32 [B, F, window]."""
        if not x.numel():
            return x.new_zeros(*x.shape[:2], len(self.window))
        log_magnitude, phase = self.project(x).float().split(self.bins, -1)
        magnitude = log_magnitude.clamp(max=5.0).exp()
        spectrum = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())
        return torch.fft.irfft(spectrum, n=len(self.window), dim=-1) * self.window


class SpectralCodec(AudioTokenizer, CodecModel):
    """Audio tokenizer: float32 [B, 1, T] at ``sample_rate`` <-> int64 [B, levels, ceil(T / hop)].

    Args:
        config: the model's shape.
        vectors_per_batch: frames of a training batch, for the threshold under which a code is revived.
    """

    kind: ClassVar[str] = "audio-spectral"
    config_class: ClassVar[type[Config]] = SpectralCodecConfig

    def __init__(self, config: SpectralCodecConfig, vectors_per_batch: int = 1600) -> None:
        super().__init__(config)
        c = config
        scale = 1 / (c.encoder_blocks + c.decoder_blocks)

        def blocks(count: int) -> list[ConvNeXtBlock]:
            return [ConvNeXtBlock(c.dim, scale, c.causal) for _ in range(count)]

        self.analysis = Analysis(c)
        self.encoder = nn.Sequential(FrameConv(self.analysis.channels, c.dim, 7, c.causal), *blocks(c.encoder_blocks))
        self.encoder_norm = nn.LayerNorm(c.dim)
        self.quantizer = build_quantizer(
            c.quantizer, c.dim, c.codebook_dim, c.codebook_size, c.levels, c.fsq_levels, vectors_per_batch
        )
        self.decoder = nn.Sequential(FrameConv(c.dim, c.dim, 7, c.causal), *blocks(c.decoder_blocks))
        self.decoder_norm = nn.LayerNorm(c.dim)
        self.synthesis = Synthesis(c.dim, c.window)

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return int(self.config.sample_rate)

    @property
    def hop(self) -> int:
        """Samples a frame."""
        return int(self.config.hop)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes in each level's codebook."""
        return self.quantizer.codebook_sizes

    def forward(self, samples: Tensor, levels: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Training pass: float [B, T], T a multiple of hop -> (samples [B, T], codes [B, F, levels], own loss)."""
        q, codes, loss = self.quantizer(self.latent(samples), levels)
        return self.sound(q), codes, loss

    def sound(self, q: Tensor) -> Tensor:
        """What vectors stand for: float [B, F, dim] -> [B, F * hop]."""
        windows = self.synthesis(self.decoder_norm(self.decoder(q.transpose(1, 2)).transpose(1, 2)))
        return self.overlap_add().push(windows, last=True)

    def latent(self, samples: Tensor) -> Tensor:
        """What is quantized: float [B, F * hop] -> [B, F, dim]."""
        padded = F.pad(samples, (self.analysis.before, self.analysis.after))
        return self.encoder_norm(self.encoder(self.analysis(padded)).transpose(1, 2))

    def overlap_add(self) -> OverlapAdd:
        """A new one for this model's windows."""
        c = self.config
        # A causal model's first windows begin at the first sample, where a Hann window is zero.
        trim, least = (0, 0.05) if c.causal else ((c.window - c.hop) // 2, 1e-8)
        return OverlapAdd(self.synthesis.window, c.hop, trim, least)

    def to_codes(self, samples: Tensor, levels: int) -> Tensor:
        """As ``AudioTokenizer.to_codes``; memory does not grow with the sound."""
        stream = self.stream_encoder(levels)
        *pieces, last = samples.split(PIECE * self.hop, -1)
        return torch.cat([*map(stream.push, pieces), stream.advance(last, last=True)], -1)

    def to_samples(self, codes: Tensor) -> Tensor:
        """As ``AudioTokenizer.to_samples``; memory grows with the samples alone."""
        stream = self.stream_decoder()
        *pieces, last = codes.split(PIECE, -1)
        return torch.cat([*map(stream.push, pieces), stream.advance(last, last=True)], -1)

    @exact
    def near_ties(self, samples: Tensor, within: float) -> Tensor | None:
        """As ``AudioTokenizer.near_ties``; None where codes are not the nearest of listed vectors."""
        self.check_samples(samples)
        found = self.quantizer.near_ties(self.latent(F.pad(samples[:, 0], (0, -samples.shape[-1] % self.hop))), within)
        return None if found is None else found.transpose(1, 2)

    def stream_encoder(self, levels: int | None = None, *, bandwidth: float | None = None) -> SpectralEncoder:
        """As ``AudioTokenizer.stream_encoder``; without delay only for a causal model."""
        return SpectralEncoder(self, self.choose_levels(levels, bandwidth))

    def stream_decoder(self, length: int | None = None) -> SpectralDecoder:
        """As ``AudioTokenizer.stream_decoder``; without delay only for a causal model."""
        return SpectralDecoder(self, length)

    @exact
    def _quantize(self, layers: Stream, samples: Tensor, levels: int, last: bool) -> Tensor:
        """Samples with what the analysis needs around them -> the codes that are certain now [B, levels, f]."""
        z = layers.push(self.analysis(samples[:, 0]), last)
        if not z.shape[-1]:
            return torch.zeros(len(z), levels, 0, dtype=torch.int64, device=z.device)
        return self.quantizer.encode(self.encoder_norm(z.transpose(1, 2)), levels).transpose(1, 2)

    @exact
    def _synthesize(self, layers: Stream, sound: OverlapAdd, codes: Tensor, last: bool) -> Tensor:
        """Codes [B, L, f] -> the samples that are certain now [B, 1, n]."""
        x = layers.push(self.quantizer.decode(codes.transpose(1, 2)).transpose(1, 2), last)
        windows = self.synthesis(self.decoder_norm(x.transpose(1, 2)))
        return sound.push(windows, last)[:, None].clamp(-1, 1)


class SpectralEncoder(StreamEncoder):
    """A stream through the encoder of a ``SpectralCodec``, whose ``stream_encoder`` makes it."""

    def __init__(self, codec: SpectralCodec, levels: int) -> None:
        super().__init__(codec, levels)
        self.codec = codec
        self.layers = Stream(codec.encoder)
        self.latency = codec.analysis.after + self.layers.delay * codec.hop
        self.kept: Tensor | None = None

    def advance(self, samples: Tensor, last: bool) -> Tensor:
        """As ``StreamEncoder.advance``."""
        analysis, hop = self.codec.analysis, self.codec.hop
        samples = F.pad(samples, (analysis.before, 0)) if self.kept is None else torch.cat([self.kept, samples], -1)
        if last:
            whole = -(samples.shape[-1] - analysis.before) % hop
            samples = F.pad(samples, (0, whole + analysis.after))
        count = max(0, (samples.shape[-1] - analysis.around) // hop)
        self.kept = samples[..., count * hop :]
        return self.codec._quantize(self.layers, samples[..., : analysis.around + count * hop], self.levels, last)


class SpectralDecoder(StreamDecoder):
    """A stream through the decoder of a ``SpectralCodec``, whose ``stream_decoder`` makes it."""

    def __init__(self, codec: SpectralCodec, length: int | None) -> None:
        super().__init__(codec, length)
        self.codec = codec
        self.layers, self.sound = Stream(codec.decoder), codec.overlap_add()
        self.latency = self.sound.left + self.layers.delay * codec.hop

    def advance(self, codes: Tensor, last: bool) -> Tensor:
        """As ``StreamDecoder.advance``."""
        return self.codec._synthesize(self.layers, self.sound, codes, last)


def _bank(config: SpectralCodecConfig, window: int, mels: int) -> Tensor:
    """Mel filters [window // 2 + 1, mels]."""
    return melscale_fbanks(window // 2 + 1, 0.0, config.sample_rate / 2, mels, config.sample_rate, norm="slaney")


def _log_mel(pieces: Tensor, window: Tensor, bank: Tensor) -> Tensor:
    """[..., window] -> [..., mels]."""
    return (torch.fft.rfft(pieces * window, dim=-1).abs() @ bank).clamp(min=SILENCE).log()

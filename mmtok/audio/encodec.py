"""Adapter to EnCodec, with the ``encodec`` package's own model (https://arxiv.org/abs/2210.13438).

24 kHz mono: plain codes. 48 kHz stereo: one-second windows, each divided by its loudness, so that the codes alone do
not hold the sound: :class:`EncodecCodes` carries the scales and the length too.

What is returned depends on the arguments alone: the bandwidth is no hidden state, rows of a batch are encoded one by
one (a batch rounds differently, which flips .2% of the codes), and every length comes back exactly.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from encodec.model import ROOT_URL, EncodecModel
from torch import Tensor, nn

from mmtok import checkpoints
from mmtok.config import Config
from mmtok.errors import CheckpointError, ConfigError, MediaError, VocabularyError

HOP = 320
# The names end in the first digits of the sha256, as the package publishes them.
WEIGHTS = {24_000: "encodec_24khz-d7cc33bc.th", 48_000: "encodec_48khz-7e698e3e.th"}
BANDWIDTHS = {24_000: (1.5, 3.0, 6.0, 12.0, 24.0), 48_000: (3.0, 6.0, 12.0, 24.0)}
_KBPS_PER_LEVEL = {24_000: 0.75, 48_000: 1.5}
# Buffers of the codebooks that only training needs; they are not stored.
_TRAINING_ONLY = ("cluster_size", "embed_avg", "inited")


@dataclass(frozen=True)
class EncodecConfig(Config):
    """Which of the two models, and how many levels it uses.

    Attributes:
        sample_rate: 24000 (mono) or 48000 (stereo), Hz.
        bandwidth: kb/s; .75 (24 kHz) or 1.5 (48 kHz) for each level.
    """

    sample_rate: int = 24_000
    bandwidth: float = 6.0

    def __post_init__(self) -> None:
        if self.sample_rate not in WEIGHTS:
            raise ConfigError(f"EncodecConfig.sample_rate: got {self.sample_rate!r}, expected 24000 or 48000")
        levels_of(self.sample_rate, self.bandwidth)


@dataclass(frozen=True)
class EncodecCodes:
    """All that the decoder needs.

    Attributes:
        codes: int64 [B, K, F]; at 48 kHz the frames of all windows, one after the other.
        scales: float32 [B, S], one for each window at 48 kHz; [B, 0] at 24 kHz.
        length: samples.
    """

    codes: Tensor
    scales: Tensor
    length: int


class Encodec(nn.Module):
    """A pretrained EnCodec as a tokenizer. Use :meth:`pretrained` or :meth:`load`.

    Args:
        config: model and bandwidth.
        state: a state dict of the package's model; buffers that only training needs may be absent.

    Raises:
        CheckpointError: tensors are missing, misshapen or not finite, or a codebook is empty.
    """

    kind: ClassVar[str] = "encodec"
    modality: ClassVar[str] = "audio"

    def __init__(self, config: EncodecConfig, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.sample_rate = config.sample_rate
        self.channels = 1 if config.sample_rate == 24_000 else 2
        kept = {k: v for k, v in state.items() if k.rsplit(".", 1)[-1] not in _TRAINING_ONLY}
        self.model = _build(config.sample_rate, kept)
        # The weights as published are what is stored and fingerprinted: fusing rounds, and not alike on every machine.
        self._weights = checkpoints.tensors_to_bytes(kept)
        self.fingerprint = checkpoints.fingerprint(self.kind, config.to_json(), self._files())
        self.eval()

    @classmethod
    def pretrained(
        cls, sample_rate: int = 24_000, bandwidth: float = 6.0, weights: str | Path | None = None
    ) -> Encodec:
        """The published weights, from a local file or through the package's address.

        Args:
            sample_rate: 24000 or 48000.
            bandwidth: kb/s, one of ``BANDWIDTHS[sample_rate]``.
            weights: the ``.th`` file, or the directory that holds it; None downloads it into torch's hub directory
                unless it is there.

        Raises:
            CheckpointError: neither can be had, or the file is not the published one. The message names the file
                and where to put it.
        """
        config = EncodecConfig(sample_rate, float(bandwidth))
        path = _find_weights(WEIGHTS[sample_rate], weights)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read as tensors ({' '.join(str(error).split())[:200]})") from error
        return cls(config, state)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """1024 for each level of the bandwidth."""
        return (1024,) * levels_of(self.sample_rate, self.config.bandwidth)

    @property
    def properties(self) -> dict[str, Any]:
        """Sample rate in Hz and samples a frame."""
        return {"sample_rate": self.sample_rate, "hop": HOP}

    def encode(self, x: Tensor, bandwidth: float | None = None) -> Tensor:
        """Codes of 24 kHz audio.

        Args:
            x: float32 [B, 1, T], -1..1; any T, 0 included.
            bandwidth: kb/s; None is the config's. The first levels of a higher bandwidth are the codes of a lower.

        Returns:
            int64 [B, K, ceil(T / 320)], 0..1023.

        Raises:
            MediaError: another shape or dtype, NaN, or a 48 kHz model.
        """
        if self.sample_rate == 48_000:
            raise MediaError("codes of the 48 kHz EnCodec need scales and a length: use encode_with_scale")
        return self.encode_with_scale(x, bandwidth).codes

    def decode(self, codes: Tensor, length: int | None = None) -> Tensor:
        """Audio of 24 kHz codes.

        Args:
            codes: int64 [B, K, F], 0..1023, 1 <= K <= 32.
            length: samples to keep, at most 320 F; None keeps all.

        Returns:
            float32 [B, 1, length].

        Raises:
            VocabularyError: a code or the number of levels is out of range.
            MediaError: an impossible length, or a 48 kHz model.
        """
        if self.sample_rate == 48_000:
            raise MediaError("codes of the 48 kHz EnCodec need scales and a length: use decode_with_scale")
        frames = codes.shape[-1]
        length = frames * HOP if length is None else length
        if not max(0, frames - 1) * HOP <= length <= frames * HOP:
            raise MediaError(f"got length {length}, expected what {frames} frames hold: at most {frames * HOP} samples")
        return self.decode_with_scale(EncodecCodes(codes, torch.zeros(len(codes), 0), length))

    @torch.no_grad()
    def encode_with_scale(self, x: Tensor, bandwidth: float | None = None) -> EncodecCodes:
        """Codes, scales and length of audio at either rate.

        Args:
            x: float32 [B, C, T], -1..1, C = 1 at 24 kHz and 2 at 48 kHz; any T, 0 included.
            bandwidth: kb/s; None is the config's.

        Raises:
            MediaError: another shape or dtype, or NaN.
        """
        levels = levels_of(self.sample_rate, self.config.bandwidth if bandwidth is None else bandwidth)
        if x.dim() != 3 or x.shape[1] != self.channels or x.dtype != torch.float32:
            raise MediaError(f"got audio {x.dtype} {list(x.shape)}, expected float32 [B, {self.channels}, T]")
        if not torch.isfinite(x).all():
            raise MediaError("the audio holds NaN or infinite samples, expected -1..1")
        length = x.shape[-1]
        windows = _windows(self.sample_rate, length)
        scaled = len(windows) if self.sample_rate == 48_000 else 0
        frames = [math.ceil((end - start) / HOP) for start, end in windows]
        codes = torch.zeros(len(x), levels, sum(frames), dtype=torch.int64, device=x.device)
        scales = torch.zeros(len(x), scaled, device=x.device)
        for i, row in enumerate(x):
            for n, (start, end) in enumerate(windows):
                first = sum(frames[:n])
                codes[i, :, first : first + frames[n]], scale = self._encode_window(row[None, :, start:end], levels)
                if scale is not None:
                    scales[i, n] = scale
        return EncodecCodes(codes, scales, length)

    @torch.no_grad()
    def decode_with_scale(self, coded: EncodecCodes) -> Tensor:
        """Audio float32 [B, C, length] of what :meth:`encode_with_scale` gave.

        Raises:
            VocabularyError: a code or the number of levels is out of range.
            MediaError: codes, scales and length do not fit each other.
        """
        codes, length = coded.codes, coded.length
        self._check_codes(codes)
        windows = _windows(self.sample_rate, length)
        frames = [math.ceil((end - start) / HOP) for start, end in windows]
        scaled = len(windows) if self.sample_rate == 48_000 else 0
        if codes.shape[-1] != sum(frames) or tuple(coded.scales.shape) != (len(codes), scaled):
            raise MediaError(
                f"got codes {list(codes.shape)} and scales {list(coded.scales.shape)}, expected {sum(frames)} frames "
                f"and {scaled} scales a row for {length} samples"
            )
        out = torch.zeros(len(codes), self.channels, length, device=codes.device)
        if not len(codes) or not windows:
            return out
        total = torch.zeros(length, device=codes.device)
        # Triangular cross-fade of the windows, as the package does it. Each is cut to its own length first: the
        # package's sum fails on lengths where the last window ends before the one before it.
        size = frames[0] * HOP
        fade = 0.5 - (torch.linspace(0, 1, size + 2, device=codes.device)[1:-1] - 0.5).abs()
        for n, ((start, end), part) in enumerate(zip(windows, codes.split(frames, dim=-1), strict=True)):
            sound = self.model.decoder(self.model.quantizer.decode(part.transpose(0, 1)))
            if scaled:
                sound = sound * coded.scales[:, n].to(sound).view(-1, 1, 1)
            if len(windows) == 1:
                return sound[..., :length]
            out[..., start:end] += fade[: end - start] * sound[..., : end - start]
            total[start:end] += fade[: end - start]
        return out / total

    def save(self, path: str | Path) -> None:
        """Write config.json, model.safetensors (float32) and mmtok.json to a directory, atomically."""
        checkpoints.save_checkpoint(path, self.kind, self.config.to_json(), self._files())

    @classmethod
    def load(cls, path: str | Path) -> Encodec:
        """Read a directory that ``save`` wrote.

        Raises:
            CheckpointError: missing, damaged, of another kind, or with weights that cannot be used.
        """
        config_json, _, state, _ = checkpoints.read_model(path, cls.kind)
        return cls(EncodecConfig.from_json(config_json), state)

    def _files(self) -> dict[str, bytes]:
        return {checkpoints.WEIGHTS: self._weights}

    def _encode_window(self, x: Tensor, levels: int) -> tuple[Tensor, Tensor | None]:
        """Codes [K, F] and, at 48 kHz, the scale of one row's window [1, C, T]."""
        scale = None
        if self.sample_rate == 48_000:
            scale = x.mean(dim=1).pow(2).mean().sqrt() + 1e-8
            x = x / scale
        return self.model.quantizer.vq.encode(self.model.encoder(x), n_q=levels)[:, 0], scale

    def _check_codes(self, codes: Tensor) -> None:
        most = levels_of(self.sample_rate, BANDWIDTHS[self.sample_rate][-1])
        if codes.dim() != 3 or codes.dtype != torch.int64 or not 1 <= codes.shape[1] <= most:
            raise VocabularyError(f"got codes {codes.dtype} {list(codes.shape)}, expected int64 [B, 1..{most}, F]")
        bad = ((codes < 0) | (codes > 1023)).nonzero()
        if len(bad):
            row, level, frame = bad[0].tolist()
            value = int(codes[row, level, frame])
            raise VocabularyError(f"row {row}, level {level}, frame {frame}: got code {value}, expected 0..1023")


def levels_of(sample_rate: int, bandwidth: float) -> int:
    """The number of residual levels at a bandwidth in kb/s.

    Raises:
        ConfigError: not a bandwidth of the model.
    """
    known = BANDWIDTHS[sample_rate]
    if bandwidth not in known:
        raise ConfigError(f"got bandwidth {bandwidth!r}, expected one of {', '.join(map(str, known))} kb/s")
    return int(bandwidth / _KBPS_PER_LEVEL[sample_rate])


def _windows(sample_rate: int, length: int) -> list[tuple[int, int]]:
    """First and last-plus-one sample of each window: one second every .99 s at 48 kHz, all at once at 24 kHz."""
    if length == 0:
        return []
    if sample_rate == 24_000:
        return [(0, length)]
    return [(start, min(start + 48_000, length)) for start in range(0, length, 47_520)]


def _build(sample_rate: int, state: Mapping[str, Tensor]) -> EncodecModel:
    """The package's model in eval mode with these weights, weight norm folded into the convolutions."""
    make = EncodecModel.encodec_model_24khz if sample_rate == 24_000 else EncodecModel.encodec_model_48khz
    name = f"EnCodec {sample_rate} Hz"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # weight_norm is deprecated, and gone after this function
        model = make(pretrained=False)
    rest = {k: v for k, v in model.state_dict().items() if k.rsplit(".", 1)[-1] in _TRAINING_ONLY}
    checkpoints.load_strict(model, {**rest, **state}, name)
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{name}: {key} holds NaN or infinity; fetch the weights again")
        if key.endswith(".embed") and not value.any():
            raise CheckpointError(
                f"{name}: codebook {key} is empty (all 0), so every code would be 0; load trained weights"
            )
    for module in model.modules():
        if "weight_g" in module._parameters:
            nn.utils.remove_weight_norm(module)
    return model.eval().requires_grad_(False)


def _find_weights(name: str, given: str | Path | None) -> Path:
    """The path of the published file, its checksum verified, downloaded if no place is given."""
    hub = Path(torch.hub.get_dir()) / "checkpoints" / name
    prefix = name.removesuffix(".th").rsplit("-", 1)[1]
    path = hub if given is None else Path(given)
    if path.is_dir():
        path = path / name
    if given is None and not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(ROOT_URL + name, str(path), hash_prefix=prefix, progress=False)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"the EnCodec weights {name} are not at {path} and cannot be downloaded from {ROOT_URL}{name} "
                f"({error}); put the file there, or give its path as weights="
            ) from error
    if not path.is_file():
        raise CheckpointError(
            f"no EnCodec weights at {path}; expected the published file {name} (from {ROOT_URL}{name})"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(prefix):
        raise CheckpointError(
            f"{path}: sha256 is {digest[:12]}..., the published {name} begins with {prefix}; fetch the file again"
        )
    return path

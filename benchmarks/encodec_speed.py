"""EnCodec in mmtok beside the encodec package and transformers' EncodecModel: time, memory, equality of codes, streams.

    python benchmarks/encodec_speed.py [--data data/audio.jsonl] [--weights encodec_24khz-d7cc33bc.th]

Writes benchmarks/results/encodec.json. All have the same weights and run in one thread, in turns; times are CPU times
(of the system too) as a share of the sound's duration, medians over the turns.

Without ``--weights`` these are random, so that the figures say nothing about how anything sounds: each convolution
scaled so that its output has unit variance, each codebook filled with what is left of latents of the sound at its
level. Without ``--data`` the sound is synthetic: gliding harmonics with noise and pauses; with it recordings of the
train and val splits, joined.

Codes that differ are near ties if the first of a frame to differ is one: rounding can have moved the latent far enough.
The least shift of the latent that makes the other entry the nearest is compared with how far the latents of the two
networks lie apart, and with the rounding of distances in float32. Later levels of such a frame are consequences.
Memory is that of processes of their own (Linux): the peak of what is resident above the level after 10 s of sound, and
above the level of the model and the sound alone, with what the allocator holds free given back to the system.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from encodec.model import EncodecModel
from torch import Tensor, nn

from mmtok import media
from mmtok.audio.encodec import Encodec, EncodecConfig
from mmtok.errors import MediaError
from mmtok.training.corpus import items

RESULTS = Path(__file__).resolve().parent / "results" / "encodec.json"
BANDWIDTH = 6.0
PUSH = 480  # 20 ms
LONG = 600  # seconds, for memory
EPSILON = torch.finfo(torch.float32).eps


def main() -> None:
    """Measure, print and write all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="manifest of recordings; none: a synthetic sound")
    parser.add_argument("--weights", type=Path, help="the published 24 kHz file; none: random weights")
    parser.add_argument("--seconds", type=int, default=60, help="length of the sound")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender")
    parser.add_argument("--memory", choices=sorted(MEMORY), help="print the peak memory of one contender and end")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if args.memory:
        print(json.dumps(growth(*MEMORY[args.memory])))
        return
    x = recordings(args.data, args.seconds) if args.data else synthetic(24_000, args.seconds)
    package = package_model(24_000, x, args.weights)
    codec = Encodec(EncodecConfig(24_000, BANDWIDTH), package.state_dict())
    figures = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, one thread",
        "load_before": round(os.getloadavg()[0], 1),
        "seconds": args.seconds,
        "sound": "recordings of train and val" if args.data else "synthetic",
        "weights": args.weights.name if args.weights else "random",
        "kilobits_per_second": BANDWIDTH,
        "24_khz": compare(codec, package, x, args.repeats),
        "stream_of_20_ms": stream(codec, x),
        "48_khz": compare_stereo(min(args.seconds, 20), args.repeats),
        f"peak_mb_of_{LONG}_s": {name: apart(name) for name in MEMORY},
    }
    figures["load_after"] = round(os.getloadavg()[0], 1)
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


# --- sounds and models


def synthetic(rate: int, seconds: int, channels: int = 1) -> Tensor:
    """Gliding harmonics with noise and pauses, float32 [1, channels, T]."""
    chance = torch.Generator().manual_seed(0)
    t = torch.arange(rate * seconds, dtype=torch.float64) / rate
    pitch = 140 * 2 ** (0.4 * torch.sin(2 * torch.pi * 0.31 * t) + 0.1 * torch.sin(2 * torch.pi * 1.7 * t))
    phase = 2 * torch.pi * torch.cumsum(pitch, 0) / rate
    voice = sum(torch.sin(n * phase + n) / n * (1 + torch.sin(2 * torch.pi * (0.2 * n) * t + n)) for n in range(1, 24))
    loud = (0.6 + 0.4 * torch.sin(2 * torch.pi * 3.1 * t)) * (torch.sin(2 * torch.pi * 0.23 * t) > -0.8)
    breath = torch.randn(channels, len(t), generator=chance) * (0.05 + 0.05 * torch.sin(2 * torch.pi * 0.7 * t))
    return (0.12 * loud * voice + 0.2 * breath).float().clamp(-1, 1)[None]


def recordings(manifest: Path, seconds: int) -> Tensor:
    """Recordings of the splits train and val, joined, float32 [1, 1, T] at 24 kHz."""
    parts, length = [], 0
    for split in ("val", "train"):
        for item in items(manifest, "audio", split):
            if length >= seconds * 24_000:
                break
            try:
                samples = media.read_audio(item.path, 24_000)
            except MediaError:
                continue
            parts.append(torch.from_numpy(samples.mean(0, keepdims=True)))
            length += parts[-1].shape[1]
    return torch.cat(parts, 1)[None, :, : seconds * 24_000].float().clamp(-1, 1).contiguous()


def package_model(rate: int, x: Tensor, weights: Path | None = None) -> EncodecModel:
    """The package's model with the weights of a file, or random ones that fit the sound."""
    torch.manual_seed(0)
    make = EncodecModel.encodec_model_24khz if rate == 24_000 else EncodecModel.encodec_model_48khz
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = make(pretrained=False)
    if weights:
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    else:
        randomise(model, x)
    model.set_target_bandwidth(BANDWIDTH)
    return model


def randomise(model: EncodecModel, x: Tensor) -> None:
    """Unit variance after each convolution, codebooks of what is left of the latents, and a quiet decoder."""

    def scale(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        conv = module.conv if hasattr(module, "conv") else module.convtr
        spread = output.std()
        conv.bias.zero_()
        conv.weight_g /= spread
        return output / spread

    hooked = [m for m in model.modules() if "weight_g" in getattr(getattr(m, "conv", m), "_parameters", {})]
    hooked += [m for m in model.modules() if "weight_g" in getattr(getattr(m, "convtr", m), "_parameters", {})]
    hooks = [m.register_forward_hook(scale) for m in dict.fromkeys(hooked) if not hasattr(m, "weight_g")]
    window = x[..., : min(x.shape[-1], (20 if model.segment is None else 1) * model.sample_rate)]
    latents = model.encoder(window / (window.std() if model.normalize else 1))
    model.decoder(latents[..., :150])
    for hook in hooks:
        hook.remove()
    last = model.decoder.model[-1].conv.conv
    (last.weight_g if hasattr(last, "weight_g") else last.weight).mul_(0.1)
    rest = latents[0].T
    for layer in model.quantizer.vq.layers:
        chosen = rest[torch.randint(len(rest), (1024,))]
        layer._codebook.embed.copy_(chosen + 0.5 * rest.std() * torch.randn(1024, rest.shape[1]))
        rest = rest - layer._codebook.embed[layer._codebook.quantize(rest)]


def transformers_model(codec: Encodec, package: EncodecModel) -> transformers.EncodecModel:
    """transformers' model with the same weights."""
    model = transformers.EncodecModel(transformers.EncodecConfig()).eval()
    for place, value in zip(model.parameters(), package.parameters(), strict=True):
        place.copy_(value)
    for theirs, own in zip(model.quantizer.layers, package.quantizer.vq.layers, strict=True):
        theirs.codebook.embed.copy_(own.codebook)
    return model


# --- time and equality


def turns(contenders: dict[str, Callable[[], Any]], repeats: int, seconds: float) -> dict[str, float]:
    """Median CPU time of each over the turns, after one that does not count, as a share of ``seconds``."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            started = time.process_time()
            run()
            if turn:
                times[name].append(time.process_time() - started)
    return {name: round(median(values) / seconds, 5) for name, values in times.items()}


def compare(codec: Encodec, package: EncodecModel, x: Tensor, repeats: int) -> dict:
    """Real-time factors of encode and decode of the three, and where their codes differ."""
    seconds = x.shape[-1] / 24_000
    theirs = transformers_model(codec, package)
    encoders: dict[str, Callable[[], Any]] = {
        "mmtok": lambda: codec.encode(x, bandwidth=BANDWIDTH),
        "encodec": lambda: package.encode(x)[0][0],
        "transformers": lambda: theirs.encode(x, bandwidth=BANDWIDTH).audio_codes[0],
    }
    codes = {name: run() for name, run in encoders.items()}
    own = codes["mmtok"]
    decoders: dict[str, Callable[[], Any]] = {
        "mmtok": lambda: codec.decode(own, x.shape[-1]),
        "encodec": lambda: package.decode([(own, None)]),
        "transformers": lambda: theirs.decode(own[None], [None]),
    }
    sound = package.decode([(own, None)])[..., : x.shape[-1]].clamp(-1, 1)
    encode, decode = turns(encoders, repeats, seconds), turns(decoders, repeats, seconds)
    return {
        "encode_real_time_factor": encode,
        "decode_real_time_factor": decode,
        "encode_times_quicker": {k: round(v / encode["mmtok"], 2) for k, v in encode.items() if k != "mmtok"},
        "decode_times_quicker": {k: round(v / decode["mmtok"], 2) for k, v in decode.items() if k != "mmtok"},
        "codes_used_per_level": [len(level.unique()) for level in own[0]],
        "codes_beside_encodec": differences(codec, x, own, codes["encodec"], package.encoder(x)[0].T),
        "codes_beside_transformers": differences(codec, x, own, codes["transformers"], theirs.encoder(x)[0].T),
        "largest_difference_of_samples": float((codec.decode(own, x.shape[-1]) - sound).abs().max()),
        "largest_sample": round(float(sound.abs().max()), 3),
    }


def differences(codec: Encodec, x: Tensor, own: Tensor, other: Tensor, latents: Tensor) -> dict:
    """How many codes differ, and whether each frame's first one to differ is a near tie, within rounding.

    Args:
        codec: mmtok's.
        x: the sound.
        own: its codes int64 [1, K, F].
        other: those of the other implementation.
        latents: of the other, float32 [F, 128].
    """
    memory: dict = {}
    mine = torch.cat([codec.network.latents(part.T.contiguous(), memory) for part in x[0].split(48_000, 1)]).double()
    apart = (mine - latents.double()).norm(dim=1)
    differ = own[0] != other[0]
    frames = differ.any(0).nonzero()[:, 0].tolist()
    shifts, near = [], 0
    for f in frames:
        level = int(differ[:, f].nonzero()[0])
        books = codec.network.books.double()
        rest = mine[f] - sum((books[k, own[0, k, f]] for k in range(level)), torch.zeros(books.shape[-1]).double())
        a, b = books[level, own[0, level, f]], books[level, other[0, level, f]]
        margin = float(((rest - b).square().sum() - (rest - a).square().sum()).abs())
        # Moving the latent by s changes the margin by at most 2 s |a - b|.
        shifts.append(margin / (2 * float((a - b).norm())) / float(mine[f].norm()))
        # Distances as x2 - 2 x c + c2: a sum of 128 products, its terms no longer than these, rounded at each step.
        size = float(rest.norm() + torch.maximum(a.norm(), b.norm())) ** 2
        rounding = len(rest) * EPSILON * size + 2 * float((a - b).norm()) * level * EPSILON * float(mine[f].norm())
        near += margin <= 2 * float((a - b).norm()) * float(apart[f]) + 2 * rounding
    return {
        "codes": own.numel(),
        "equal_share": round(1 - float(differ.float().mean()), 6),
        "frames_that_differ": len(frames),
        "of_these_near_ties": near,
        "consequences_at_later_levels": int(differ.sum()) - len(frames),
        "largest_shift_to_flip_relative_to_latent": max(shifts, default=0.0),
        "largest_distance_of_latents_relative": float((apart / mine.norm(dim=1)).max()),
    }


def stream(codec: Encodec, x: Tensor) -> dict:
    """Pushes of 20 ms: equality with the whole, and what a push costs."""
    encoder, decoder = codec.stream_encoder(bandwidth=BANDWIDTH), codec.stream_decoder(x.shape[-1])
    codes, sounds, encoding, decoding = [], [], [], []
    for part in x.split(PUSH, -1):
        started = time.process_time()
        codes.append(encoder.push(part))
        middle = time.process_time()
        sounds.append(decoder.push(codes[-1]))
        encoding.append(middle - started)
        decoding.append(time.process_time() - middle)
    codes.append(encoder.finish())
    sounds += [decoder.push(codes[-1]), decoder.finish()]
    got, whole = torch.cat(codes, -1), codec.encode(x, bandwidth=BANDWIDTH)
    memory: dict = {}
    steps = [x[0, :, : 7 * 320], *x[0, :, 7 * 320 :].split(320, 1)]
    latents = torch.cat([codec.network.latents(part.T.contiguous(), memory) for part in steps])
    gap = torch.cat(sounds, -1) - codec.decode(got, x.shape[-1])
    return {
        "codes_beside_the_whole": differences(codec, x, whole, got, latents),
        "largest_difference_of_samples": float(gap.abs().max()),
        "encode_ms_a_push": round(median(encoding) * 1000, 2),
        "decode_ms_a_push": round(median(decoding) * 1000, 2),
    }


def compare_stereo(seconds: int, repeats: int) -> dict:
    """48 kHz: real-time factors beside the package, with random weights."""
    x = synthetic(48_000, seconds, channels=2)
    package = package_model(48_000, x)
    codec = Encodec(EncodecConfig(48_000, BANDWIDTH), package.state_dict())
    own, theirs = codec.encode_with_scale(x), package.encode(x)
    other = torch.cat([codes for codes, _ in theirs], -1)
    encode = turns(
        {"mmtok": lambda: codec.encode_with_scale(x), "encodec": lambda: package.encode(x)}, repeats, seconds
    )
    decode = turns(
        {"mmtok": lambda: codec.decode_with_scale(own), "encodec": lambda: package.decode(theirs)}, repeats, seconds
    )
    return {
        "encode_real_time_factor": encode,
        "decode_real_time_factor": decode,
        "equal_share_of_codes": round(float((own.codes == other).float().mean()), 6),
        "scales_equal": bool(torch.equal(own.scales, torch.cat([s for _, s in theirs], -1))),
    }


# --- memory


def encode_whole(codec: Encodec, seconds: int) -> Callable[[], int]:
    x = synthetic(24_000, 10).repeat(1, 1, seconds // 10)
    return lambda: codec.encode(x).numel() * 0


def decode_whole(codec: Encodec, seconds: int) -> Callable[[], int]:
    codes = codec.encode(synthetic(24_000, 10)).repeat(1, 1, seconds // 10)
    return lambda: codec.decode(codes).nbytes


def encode_stream(codec: Encodec, seconds: int) -> Callable[[], int]:
    second = synthetic(24_000, 1)

    def run() -> int:
        encoder = codec.stream_encoder()
        return sum(encoder.push(second).shape[-1] for _ in range(seconds)) * 0

    return run


def decode_stream(codec: Encodec, seconds: int) -> Callable[[], int]:
    codes = codec.encode(synthetic(24_000, 1))

    def run() -> int:
        decoder = codec.stream_decoder()
        return sum(decoder.push(codes).shape[-1] for _ in range(seconds)) * 0

    return run


def encode_package(package: EncodecModel, seconds: int) -> Callable[[], int]:
    x = synthetic(24_000, 10).repeat(1, 1, seconds // 10)
    return lambda: package.encode(x)[0][0].numel() * 0


MEMORY: dict[str, tuple[Callable[[Any, int], Callable[[], int]], int]] = {
    "encode": (encode_whole, LONG),
    "decode, its result not counted": (decode_whole, LONG),
    "stream encoder": (encode_stream, LONG),
    "stream decoder": (decode_stream, LONG),
    "encodec package, of 60 s": (encode_package, 60),
}


def growth(prepare: Callable[[Any, int], Callable[[], int]], seconds: int) -> dict[str, float]:
    """MB of resident memory at the peak of a run, less what the run says to be its result.

    ``growth`` is above the level after a run over 10 s, ``working_set`` above that of the model and the sound alone.
    """
    package = package_model(24_000, synthetic(24_000, 2))
    if prepare is encode_package:
        model: Any = package
    else:
        model = Encodec(EncodecConfig(24_000, BANDWIDTH), package.state_dict())
        del package
    short, run, figures = prepare(model, 10), prepare(model, seconds), {}
    short()  # what libraries keep for good
    for name, warm in (("growth", True), ("working_set", False)):
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps of things that are gone would hide a growth
        if warm:
            short()
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        result = run()
        figures[name] = round((status("VmHWM") - before - result) / 1e6, 1)
    return figures


def status(name: str) -> int:
    """Bytes, from this process's status file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def apart(name: str) -> dict[str, float]:
    """``growth`` in a process of its own."""
    command = [sys.executable, __file__, "--memory", name]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()

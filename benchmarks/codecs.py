"""Figures of the bundled text and audio tokenizers on the test split, beside Opus on the same sounds in the same run.

    python benchmarks/codecs.py --data data

Writes benchmarks/results/codecs.json. The only script that reads the test split of sounds and texts; that of pictures
is read by image_quality.py. Opus at its lowest rate through libsndfile, payload without the Ogg pages' headers.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from rich.progress import track

import mmtok
from mmtok import media
from mmtok.documents import Audio
from mmtok.errors import MediaError
from mmtok.evaluation.metrics import code_histogram, codebook_usage, log_mel_distance, perplexity, stoi
from mmtok.evaluation.roundtrip import roundtrip_audio
from mmtok.training.corpus import items

RESULTS = Path(__file__).resolve().parent / "results" / "codecs.json"


def text_figures(data: Path) -> dict:
    """Bytes per token and losslessness, by source."""
    tokenizer = mmtok.load("text-4k")
    out: dict = {"fingerprint": tokenizer.fingerprint, "vocabulary": tokenizer.codebook_sizes[0]}
    test = items(data / "text.jsonl", "text", "test")
    for source in sorted({x.source for x in test}):
        texts = [str(x.segment["text"]) for x in test if x.source == source]
        ids = tokenizer.encode(texts)
        size = sum(len(x.encode()) for x in texts)
        out[source] = {
            "documents": len(texts),
            "bytes_per_token": round(size / sum(map(len, ids)), 3),
            "identical": sum(a == b for a, b in zip(tokenizer.decode(ids), texts, strict=True)),
        }
    return out


def audio_figures(data: Path, limit: int) -> dict:
    """STOI and log-mel distance by kind of sound and number of codebooks, usage of each level, real-time factor."""
    codec = mmtok.load("audio-16k")
    rate = int(codec.properties["sample_rate"])
    out: dict = {"fingerprint": codec.fingerprint}
    test = items(data / "audio.jsonl", "audio", "test")
    counts = [torch.zeros(n, dtype=torch.int64) for n in codec.codebook_sizes]
    heard = seconds = 0.0
    for source in sorted({x.source for x in test}):
        chosen = [x for x in test if x.source == source]
        chosen = [chosen[i] for i in np.random.default_rng(0).permutation(len(chosen))[:limit]]
        rows: dict[str, list] = {}
        for item in track(chosen, source):
            try:
                recording = Audio(media.read_audio(item.path, rate), rate)
            except MediaError:
                continue
            for levels in (len(codec.codebook_sizes), len(codec.codebook_sizes) // 2):
                rows.setdefault(f"{levels} codebooks", []).append(roundtrip_audio(codec, recording, levels)[1])
            x = torch.from_numpy(recording.samples)[None]
            started = time.perf_counter()
            codes = codec.encode(x)
            codec.decode(codes)
            seconds += time.perf_counter() - started
            heard += x.shape[-1] / rate
            for level, c in enumerate(codes[0]):
                counts[level] += code_histogram(c, codec.codebook_sizes[level])
            rows.setdefault("Opus, lowest rate", []).append(_opus(recording.samples[0], rate))
        out[source] = {"recordings": len(rows["Opus, lowest rate"])} | {k: _means(v) for k, v in rows.items()}
    out["codebook_usage"] = [round(float(codebook_usage(c)), 3) for c in counts]
    out["perplexity"] = [round(float(perplexity(c)), 1) for c in counts]
    out["real_time_factor"] = round(seconds / heard, 4)
    return out


def _opus(samples: np.ndarray, rate: int) -> dict:
    """Opus through libsndfile at its smallest setting."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="OGG", subtype="OPUS", compression_level=1.0)
    payload = _ogg_payload(buffer.getvalue())
    back = soundfile.read(io.BytesIO(buffer.getvalue()), dtype="float32")[0][: len(samples)]
    back = np.pad(back, (0, len(samples) - len(back)))
    x, y = (torch.from_numpy(np.ascontiguousarray(a))[None, None] for a in (samples, back))
    return {
        "kilobits_per_second": payload * 8 / (len(samples) / rate) / 1000,
        "stoi": float(stoi(x, y, rate)[0]),
        "log_mel_distance_db": float(log_mel_distance(x, y, rate)[0]),
    }


def _ogg_payload(data: bytes) -> int:
    """Bytes of audio packets in an Ogg Opus stream: page bodies after the two header pages (RFC 3533, RFC 7845)."""
    at, page, total = 0, 0, 0
    while data[at : at + 4] == b"OggS":
        segments = data[at + 26]
        body = sum(data[at + 27 : at + 27 + segments])
        total += body if page >= 2 else 0
        at, page = at + 27 + segments + body, page + 1
    return total


def _means(rows: list[dict]) -> dict:
    keys = ("kilobits_per_second", "stoi", "log_mel_distance_db")
    values = {k: [r[k] for r in rows if r.get(k) is not None and math.isfinite(r[k])] for k in keys}
    return {k: round(float(np.mean(v)), 4) for k, v in values.items() if v}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--limit", type=int, default=60, help="recordings of each kind")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = {
        "machine": f"{platform.machine()}, one thread, torch {torch.__version__}",
        "text": text_figures(args.data),
        "audio": audio_figures(args.data, args.limit),
    }
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

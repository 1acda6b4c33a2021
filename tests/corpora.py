"""A small corpus of texts, pictures and sounds, for the tests of datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from drawings import drawing
from PIL import Image as PILImage

from mmtok import media
from mmtok.documents import Audio, Document, Image, Text, Turn

WORDS = ["a cow", "une vache", "корова", "αγελάδα", "牛", "गाय", "<image> is only text", "بقرة", "🐄 moo\n\n  moo", ""]
RATE = 16_000


def write_corpus(folder: Path, count: int, seed: int = 0) -> Path:
    """Write so many documents and their manifest, ``manifest.jsonl``: texts, pictures and sounds together."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [_document(folder, i, np.random.default_rng([seed, i])) for i in range(count)]
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines), encoding="utf-8")
    return path


def _document(folder: Path, i: int, random: np.random.Generator) -> dict[str, Any]:
    segments: list[dict[str, Any]] = []
    for kind in random.choice(["text", "text", "image", "audio", "turn"], random.integers(1, 5)):
        name = f"{i}-{len(segments)}"
        if kind == "text":
            segments.append({"type": "text", "text": WORDS[random.integers(len(WORDS))], "language": "xx"})
        elif kind == "turn":
            segments.append({"type": "turn", "role": ["user", "assistant"][random.integers(2)]})
        elif kind == "image":
            height, width = random.integers(3, 40, 2).tolist()
            pixels = drawing(height, width, i).transpose(1, 2, 0)
            PILImage.fromarray(pixels).save(folder / f"{name}.png")
            segments.append({"type": "image", "path": f"{name}.png"})
        else:
            samples = random.uniform(-0.4, 0.4, (random.integers(1, 4000), random.integers(1, 3))).astype(np.float32)
            soundfile.write(folder / f"{name}.wav", samples, [8000, RATE][random.integers(2)])
            segments.append({"type": "audio", "path": f"{name}.wav", "voice": "noise"})
    return {"id": f"document {i}", "segments": segments, "source": "test"}


def document_of(line: str, folder: Path) -> Document:
    """The document of a manifest's line, read without the dataset builder."""
    segments: list[Text | Image | Audio | Turn] = []
    for segment in json.loads(line)["segments"]:
        match segment["type"]:
            case "text":
                segments.append(Text(segment["text"]))
            case "turn":
                segments.append(Turn(segment["role"]))
            case "image":
                segments.append(Image(media.read_image(folder / segment["path"])))
            case _:
                segments.append(Audio(media.read_audio(folder / segment["path"], RATE), RATE))
    return Document(tuple(segments))

"""Token datasets for the tests: small tokenizers, media files, and documents encoded one at a time, plainly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawings import drawing

from mmtok import media
from mmtok.audio import SpectralCodec, SpectralCodecConfig
from mmtok.datasets.records import Record
from mmtok.datasets.shards import write_dataset
from mmtok.documents import Audio, Document, Image, Text, Turn, load_segment
from mmtok.image import ImageVQVAE, ImageVQVAEConfig
from mmtok.loading import load
from mmtok.multimodal import MultimodalTokenizer
from mmtok.registry import VocabularyRegistry
from mmtok.text import ByteLevelBPE


def save_tokenizers(folder: Path, codes: int = 64) -> MultimodalTokenizer:
    """Untrained tokenizers in ``folder``/words, pictures (of so many codes) and sounds, and a vocabulary over them."""
    torch.manual_seed(0)
    shape = SpectralCodecConfig(dim=16, encoder_blocks=1, decoder_blocks=1, levels=2, codebook_size=32, codebook_dim=8)
    models: dict[str, Any] = {
        "words": ByteLevelBPE.train(["a cow and a calf"], 270),
        "pictures": ImageVQVAE(ImageVQVAEConfig(channels=8, encoder_blocks=1, decoder_blocks=1, codebook_size=codes)),
        "sounds": SpectralCodec(shape),
    }
    for name, model in models.items():
        model.save(folder / name)
    # As they are stored, which is in half precision.
    return MultimodalTokenizer.create({name: load(folder / name) for name in models}, max_grid=16)


def save_media(folder: Path) -> list[dict[str, Any]]:
    """Pictures and sounds in ``folder``, and documents in the form of ``mmtok.datasets.sources`` that use them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (height, width) in enumerate([(40, 56), (33, 20), (64, 64)]):
        media.write_image(folder / f"picture{i}.png", drawing(height, width, i))
    rng = np.random.default_rng(0)
    for i, seconds in enumerate([0.2, 0.05]):
        noise = rng.uniform(-0.5, 0.5, (1, round(16000 * seconds))).astype(np.float32)
        media.write_audio(folder / f"sound{i}.wav", noise, 16000)

    def picture(i: int) -> dict[str, Any]:
        return {"type": "image", "path": str(folder / f"picture{i}.png")}

    def sound(i: int, **part: float) -> dict[str, Any]:
        return {"type": "audio", "path": str(folder / f"sound{i}.wav"), **part}

    def text(words: str) -> dict[str, Any]:
        return {"type": "text", "text": words}

    return [
        {"id": "cow-fr", "segments": [text("une vache"), text(" et un veau ☃"), picture(0)], "source": "farm"},
        {"id": "answer", "segments": [{"type": "turn", "role": "user"}, text("what?"),
         {"type": "turn", "role": "assistant"}, picture(1), sound(0)]},
        {"id": "sound", "segments": [sound(1), text("moo"), sound(0, start=0.05, end=0.1)]},
        {"id": "nothing", "segments": []},
        {"id": "words", "segments": [text("a cow and a calf " * 9)]},
        {"id": "two", "segments": [picture(2), picture(1)], "language": "fr"},
    ]  # fmt: skip


def record(mm: MultimodalTokenizer, document: dict[str, Any]) -> Record:
    """A document as the builder gives it."""
    segments: list[Any] = []
    for x in document["segments"]:
        if x["type"] == "turn":
            segments.append(Turn(x["role"]))
        elif x["type"] == "text":
            segments.append(Text(x["text"]))
        else:
            segments.append(load_segment(x["path"], None, x.get("start"), x.get("end")))
    ids = mm.encode(Document(tuple(segments)).normalized())
    rows, at = [], 0
    names = [x.name for x in mm.registry.tokenizers]
    for span in mm.grammar.spans(ids):
        if span.kind == "control":
            at += span.name in ("<user>", "<assistant>")
            continue
        spec, segment = mm.registry.tokenizer(span.tokenizer), segments[at]
        match segment:
            case Image(pixels):
                sizes = pixels.shape[1:]
            case Audio(samples, rate):
                to = int(spec.properties["sample_rate"])
                sizes = (media.resample(samples, rate, to).shape[1], to)
            case _:
                last = at
                while last + 1 < len(segments) and isinstance(segments[last + 1], Text):
                    last += 1
                sizes = (sum(len(x.text.encode()) for x in segments[at : last + 1]), 0)
        rows.append((span.start, span.end, names.index(span.tokenizer), at, *sizes))
        at = last + 1 if isinstance(segment, Text) else at + 1
    meta = {**document, "segments": [{k: v for k, v in x.items() if k != "text"} for x in document["segments"]]}
    return Record(ids, np.array(rows, np.int32).reshape(-1, 6), json.loads(json.dumps(meta)), bytes(range(16)))


def noise_records(registry: VocabularyRegistry, count: int, longest: int = 40, seed: int = 0) -> list[Record]:
    """Documents of random text ids of the default text tokenizer, of which nothing else is known."""
    rng = np.random.default_rng(seed)
    name = registry.tokenizer("text").name
    block, index = registry.blocks_of(name)[0], [x.name for x in registry.tokenizers].index(name)
    out = []
    for i in range(count):
        ids = rng.integers(block.start, block.end, int(rng.integers(1, longest + 1)))
        span = np.array([[1, 1 + len(ids), index, 0, len(ids), 0]], np.int32)
        meta = {"id": f"d{i}", "segments": [{"type": "text"}]}
        out.append(Record(np.concatenate([[registry.bos], ids, [registry.eos]]), span, meta, i.to_bytes(16, "big")))
    return out


def write(path: Path, mm: MultimodalTokenizer, documents: list[dict[str, Any]], shard_tokens: int = 2**26) -> None:
    """A dataset of these documents."""
    write_dataset(path, mm.registry, (record(mm, x) for x in documents), shard_tokens)

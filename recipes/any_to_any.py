"""Train the reference transformer: any of text, image and speech from any other.

    python recipes/any_to_any.py --data data/trimodal.jsonl --out runs/any-to-any \
        --text pretrained/text-4k --image pretrained/image-64-f8 --audio pretrained/audio-16k

--data is a manifest whose documents describe one thing in several modalities, or a folder in which files of one stem
(cow.txt, cow.png, cow.wav) do. The first text of a document is its name, further texts are translations. A segment may
carry "voice": then --voice says whose recordings are answers; all others are only heard. A killed run continues where
it was when the same command is given again. --init starts from a trained model, also one of other tokenizers whose
pictures have as many codes and whose sounds as many frames.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

import mmtok
from mmtok import media
from mmtok.documents import Audio, Image, Text
from mmtok.errors import ConfigError, DataError
from mmtok.multimodal import MultimodalTokenizer
from mmtok.training import corpus
from mmtok.training.corpus import digest_of
from mmtok.training.distributed import rank, world
from mmtok.training.inherit import inherit
from mmtok.training.lm import SequenceLoss
from mmtok.training.loop import STATE, LoopConfig, fit, prepare_torch, rng
from mmtok.transformer import Request, Sampling, Transformer, TransformerConfig, generate
from mmtok.transformer.packing import pack

SIZE = 64  # pixels: pictures are fitted into a square, on white
LENGTH = 384  # ids in a row of the batch
# Share of documents whose answer is read with wrong codes only, and with some wrong codes.
BLIND, NOISY = 0.45, 0.25
LEVELS = 4  # codebooks of the audio codec: 200 ids a second of speech

# How often each kind of exchange is drawn: (what is asked with, what is answered).
EXCHANGES = {
    ("text", "image"): 16,
    ("text", "audio"): 16,
    ("text", "image audio"): 5,
    ("text", "audio image"): 2,
    ("text", "text"): 4,
    ("image", "text"): 8,
    ("image", "audio"): 8,
    ("image", "image"): 2,
    ("image", "text audio"): 2,
    ("audio", "text"): 8,
    ("audio", "image"): 22,
    ("audio", "audio"): 3,
    ("audio", "text image"): 3,
    ("text image", "audio"): 1,
}


def variants(pixels: np.ndarray) -> list[np.ndarray]:
    """The picture, and its mirror image, which is only looked at."""
    return [pixels, np.ascontiguousarray(pixels[:, :, ::-1])]


def spellings(name: str) -> list[str]:
    """The ways in which a user may write a name; the second is the one that the model answers with."""
    plain = name[:1].lower() + name[1:] if name[1:2].islower() or name[1:2] == " " else name
    words = plain.split(" ", 1)
    bare = words[1] if len(words) == 2 and words[0] in ("a", "an", "the", "some") else plain
    return [name, plain, plain, bare, name + "."]


class Concept:
    """One document as id sequences: what may be asked with, and what may be answered, for each modality."""

    def __init__(
        self, document: dict, root: Path, mm: MultimodalTokenizer, voice: str, voiced: bool, names_only: bool
    ) -> None:
        self.name = document["id"]
        self.ask: dict[str, list[np.ndarray]] = {"text": [], "image": [], "audio": []}
        self.answer: dict[str, list[np.ndarray]] = {"text": [], "image": [], "audio": []}
        self.translation: list[tuple[np.ndarray, np.ndarray]] = []

        def ids(segment: Text | Image | Audio) -> np.ndarray:
            return mm.grammar.segment_ids(type(segment).__name__.lower(), mm.codes(segment))

        texts = [s["text"] for s in document["segments"] if s["type"] == "text"]
        for i, text in enumerate(texts):
            spelt = [ids(Text(x)) for x in spellings(text)]
            self.ask["text"] += spelt if i == 0 else spelt[1:2]
            if i == 0:
                self.answer["text"].append(spelt[1])
                english = spelt
            else:
                self.translation += [(x, spelt[1]) for x in english] + [(x, english[1]) for x in spelt[:2]]
        for segment in document["segments"]:
            if segment["type"] == "image":
                seen = [
                    ids(Image(x)) for x in variants(media.fit_image(media.read_image(root / segment["path"]), SIZE))
                ]
                self.ask["image"] += seen
                self.answer["image"].append(seen[0])
            elif segment["type"] == "audio" and not names_only:
                rate = int(mm.registry.tokenizer("audio").properties["sample_rate"])
                heard = ids(Audio(media.read_audio(root / segment["path"], rate), rate))
                self.ask["audio"].append(heard)
                if not voiced or segment.get("voice") == voice:
                    self.answer["audio"].append(heard)


def load_concepts(data: Path, split: str, mm: MultimodalTokenizer, voice: str) -> list[Concept]:
    """Encode the documents of a split. Of a pair-test document the recordings are left out of training."""
    documents = list(corpus.documents(data))
    voiced = any("voice" in s for d in documents for s in d["segments"])
    wanted = [d for d in documents if d["split"] in ((split, "pair-test") if split == "train" else (split,))]
    if not wanted:
        raise DataError(f"{data}: no document in split {split!r} ({len(documents)} in all splits)")
    return [
        Concept(d, data if data.is_dir() else data.parent, mm, voice, voiced, names_only=d["split"] == "pair-test")
        for d in track(wanted, f"encoding {split}")
    ]


def exchange(
    mm: MultimodalTokenizer, concept: Concept, kind: tuple[str, str], r: np.random.Generator
) -> tuple[np.ndarray, int] | None:
    """``<bos> <user> question <assistant> answer <eos>`` and where the answer begins; None if a part is missing."""
    registry = mm.registry
    if kind == ("text", "text"):
        if not concept.translation:
            return None
        question, answer = concept.translation[r.integers(len(concept.translation))]
    else:
        parts = [concept.ask[m] for m in kind[0].split()], [concept.answer[m] for m in kind[1].split()]
        if not all(x for part in parts for x in part):
            return None
        question, answer = (np.concatenate([x[r.integers(len(x))] for x in part]) for part in parts)
    ids = np.concatenate([[registry.bos, registry.user], question, [registry.assistant], answer, [registry.eos]])
    return (ids, len(question) + 3) if len(ids) <= LENGTH else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/trimodal.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("runs/any-to-any"))
    for modality, name in (("text", "text-4k"), ("image", "image-64-f8"), ("audio", "audio-16k")):
        parser.add_argument(f"--{modality}", default=name, metavar="CHECKPOINT", help=f"default: the bundled {name}")
    parser.add_argument("--init", type=Path, metavar="MODEL", help="start from this model, with tokenizers beside it")
    parser.add_argument("--voice", default="joe", help="the voice that answers are spoken with")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="override the schedule")
    parser.add_argument("--model", nargs="*", default=[], metavar="key=value", help="override the model's shape")
    args = parser.parse_args()
    config = LoopConfig(
        steps=6500, batch_size=8, lr=2e-3, warmup=100, weight_decay=0.05, eval_every=500, save_every=250
    ).replace(args.set)
    device = prepare_torch(config)

    # The vocabulary: one registry over the three tokenizers.
    paths = [Path(p) for p in (args.text, args.image, args.audio)]
    names = [p.parent.name if p.name == "model" else p.name for p in paths]  # runs/mine/model is "mine"
    if len(set(names)) < len(names):
        raise ConfigError(f"got tokenizers named {', '.join(names)}, expected directories with three different names")
    tokenizers = {name: mmtok.load(p) for name, p in zip(names, paths, strict=True)}
    mm = MultimodalTokenizer.create(tokenizers, audio_levels=LEVELS)
    shape = TransformerConfig(
        vocab_size=mm.registry.padded_size, hidden_size=256, intermediate_size=640, num_hidden_layers=7,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
    ).replace(args.model)  # fmt: skip
    train, val = (load_concepts(args.data, split, mm, args.voice) for split in ("train", "val"))

    kinds = list(EXCHANGES)
    shares = np.array([EXCHANGES[k] for k in kinds], float)
    shares /= shares.sum()

    is_code = np.array([b.modality in ("image", "audio") for b in mm.registry.blocks])
    sizes = np.array([b.size for b in mm.registry.blocks])

    def batch(concepts: list[Concept], r: np.random.Generator) -> tuple[Tensor, ...]:
        room, documents, starts, missed = config.batch_size * LENGTH * 0.94, [], [], 0
        while True:
            drawn = exchange(mm, concepts[r.integers(len(concepts))], kinds[r.choice(len(kinds), p=shares)], r)
            if drawn is None:
                missed += 1
                if missed == 10_000:
                    raise DataError(f"{args.data}: no exchange of at most {LENGTH} ids can be made of its documents")
                continue
            missed, room = 0, room - len(drawn[0])
            if room < 0 and documents:
                break
            documents.append(drawn[0])
            starts.append(drawn[1])
        ids, document, positions = (x[: config.batch_size] for x in pack(documents, LENGTH, mm.registry.pad))
        answer = (positions >= np.array([*starts, 0])[document]) & (document >= 0)
        # Codes that can be told from the answer's own first codes teach little about the question: most are read
        # with some or all codes replaced by others of the same codebook. The targets stay the true ones.
        block = mm.registry.split(ids)[0]
        kind, some = r.random((2, len(documents) + 1))
        rate = np.where(kind < BLIND, 1.0, np.where(kind < BLIND + NOISY, some, 0.0))
        wrong = answer & is_code[block] & (r.random(ids.shape) < rate[document])
        seen = np.where(wrong, mm.registry.merge(block, r.integers(sizes[block])), ids)
        mine = np.arange(len(ids)) % world() == rank()  # under torchrun the ranks share the rows
        return tuple(torch.from_numpy(x[mine]).to(device) for x in (ids, document, positions, answer, seen))

    model = Transformer(shape)
    if args.init and not (args.out / STATE).exists():
        before = MultimodalTokenizer.load(args.init)
        old = load_concepts(args.data, "train", before, args.voice)
        twins = (
            pair
            for new, was in zip(train, old, strict=True)
            for modality in ("image", "audio")
            for pair in zip(new.ask[modality], was.ask[modality], strict=True)
        )
        print(inherit(model, mm.registry, Transformer.load(args.init, before.registry), before.registry, twins))
    model = model.to(device)
    sequence_loss = SequenceLoss(mm.grammar, text_weight=3.0)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        value, parts = sequence_loss(model, *batch(train, rng(config, step)))
        return value, {"loss": value.item(), **parts}

    # Evaluation: loss on concepts never seen, and the answers to the same few names, to look at and listen to.
    shown = [train[i] for i in np.random.default_rng(1).permutation(len(train)) if all(train[i].answer.values())][:8]
    sampling = {
        "text": Sampling(temperature=0.0),
        "image": Sampling(temperature=0.5),
        "audio": Sampling(temperature=0.5),
    }

    def evaluate(step: int) -> dict[str, float]:
        values = [sequence_loss(model, *batch(val, np.random.default_rng((7, i))))[0].item() for i in range(4)]
        head = [mm.registry.bos, mm.registry.user]
        requests = [
            Request(np.array([*head, *c.answer["text"][0], mm.registry.assistant]), ("image", "audio"), 700, sample=i)
            for i, c in enumerate(shown)
        ]
        pictures = []
        for concept, made in zip(shown, generate(model, mm.grammar, requests, sampling), strict=True):
            image, audio = (x for x in mm.decode(made.ids).segments if isinstance(x, Image | Audio))
            original = mm.decode(np.array([mm.registry.bos, *concept.answer["image"][0], mm.registry.eos])).segments[0]
            if image.pixels.shape == original.pixels.shape:
                pictures.append(np.concatenate([original.pixels, image.pixels], 1))
            sound = args.out / "samples" / f"{step:06}-{concept.name.replace('/', '-')}.wav"
            media.write_audio(sound, audio.samples, audio.sample_rate)
        if pictures:
            media.write_image(args.out / "samples" / f"{step:06}.png", np.concatenate(pictures, 2))
        return {"val_loss": float(np.mean(values))}

    data = digest_of(concept.name for concept in train)
    settings = {"model": shape, "vocabulary": mm.registry.fingerprint, "voice": args.voice, "data": data}
    fit(model, config, args.out, loss, evaluate, "any-to-any", settings)
    if rank() == 0:
        model.save(args.out / "model", mm.registry.to_json(), dtype=torch.bfloat16)
        for name, tokenizer in tokenizers.items():  # MultimodalTokenizer.load looks for them beside the model
            tokenizer.save(args.out / name)
        print(f"wrote {args.out / 'model'}")


if __name__ == "__main__":
    main()

"""Train the reference transformer: any of text, image and speech from any other, as it is asked for in words.

    mmtok vocab create text-4k image-64-f8 audio-16k --levels audio-16k=4 -o runs/vocabulary
    for name in trimodal phrases questions; do
        mmtok dataset build data/$name.jsonl -o runs/tokens/$name --model runs/vocabulary --image-size 64
    done
    python recipes/any_to_any.py --data runs/tokens/trimodal runs/tokens/phrases runs/tokens/questions \
        --vocabulary runs/vocabulary --out runs/any-to-any

--data are datasets as `mmtok dataset build` leaves them, each with how often its documents are drawn (1 where nothing
is said). A document describes one thing in several modalities; exchanges of questions and answers are made of it here.
What a segment may say of itself (language, voice, question_only) is in mmtok/training/conversations.py. Documents with
an "intent" are spoken questions. A killed run continues where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmtok import media
from mmtok.datasets.shards import TokenDataset
from mmtok.documents import Audio, Image
from mmtok.errors import DataError
from mmtok.multimodal import MultimodalTokenizer
from mmtok.training.conversations import Conversations, Exchange, Phrasings, concepts, draw
from mmtok.training.corpus import digest_of
from mmtok.training.distributed import rank, world
from mmtok.training.inherit import inherit
from mmtok.training.lm import SequenceLoss
from mmtok.training.loop import STATE, LoopConfig, fit, prepare_torch, rng
from mmtok.transformer import Request, Sampling, Transformer, TransformerConfig, generate
from mmtok.transformer.packing import pack

LENGTH = 512  # ids in a row of the batch
# Share of exchanges whose answer is read with wrong codes only, and with some wrong codes.
BLIND, NOISY = 0.25, 0.35
# Which of the data's splits are trained on, and which are looked at while training.
SPLITS = {"train": ("train", "pair-test"), "val": ("val",)}

# How often each kind of exchange is drawn: (what is asked with, what is answered).
EXCHANGES = {
    ("text", "image"): 8,
    ("text", "audio"): 20,
    ("text", "audio:fr"): 6,
    ("text", "text:fr"): 12,
    ("text", "text"): 10,
    ("text:fr", "text"): 5,
    ("text", "image audio"): 5,
    ("text", "audio image"): 4,
    ("image", "text"): 8,
    ("image", "text:fr"): 5,
    ("image", "audio"): 8,
    ("image", "audio:fr"): 4,
    ("image", "image"): 5,
    ("image", "text audio"): 3,
    ("audio", "text"): 7,
    ("audio", "text:fr"): 5,
    ("audio", "image"): 8,
    ("audio", "audio"): 5,
    ("audio", "audio:fr"): 3,
    ("audio", "text image"): 2,
    ("audio", "image audio"): 3,
    ("audio:fr", "text"): 2,
    ("audio:fr", "image"): 2,
    ("text image", "audio"): 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True, metavar="DATASET[:SHARE]", help="of mmtok dataset build")
    parser.add_argument("--out", type=Path, default=Path("runs/any-to-any"))
    parser.add_argument("--vocabulary", default="any-to-any", help="a directory with a vocab.json, or a bundled model")
    parser.add_argument("--phrasings", type=Path, default=Path(__file__).with_name("phrasings.toml"))
    parser.add_argument("--voice", nargs="*", default=["en=joe", "fr=human"], help="who answers, for each language")
    parser.add_argument("--init", metavar="MODEL", help="start from this model")
    parser.add_argument(
        "--init-data", nargs="*", default=[], help="the datasets in that model's vocabulary, if another"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="override the schedule")
    parser.add_argument("--model", nargs="*", default=[], metavar="key=value", help="override the model's shape")
    args = parser.parse_args()
    config = LoopConfig(
        steps=7600,
        batch_size=6,
        optimizer="muon",
        lr=2e-3,
        warmup=100,
        schedule="constant",
        decay=0.25,
        weight_decay=0.05,
        eval_every=500,
        save_every=250,
    ).replace(args.set)
    device = prepare_torch(config)
    mm = MultimodalTokenizer.load(args.vocabulary)
    shape = TransformerConfig(
        vocab_size=mm.registry.padded_size, hidden_size=256, intermediate_size=640, num_hidden_layers=7,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
    ).replace(args.model)  # fmt: skip

    # What is known of each thing, from the datasets. Of a `pair-test` concept the English recordings are left out.
    voices = dict(x.split("=", 1) for x in args.voice)
    sources, shares, known = [], [], []
    for name in args.data:
        path, _, share = name.partition(":")
        found = list(concepts(TokenDataset.open(path, mm.registry), mm, voices))
        known += found
        things = [c.without("audio") if c.split == "pair-test" else c for c in found if not c.intent]
        sources.append({s: [c for c in things if c.split in part] for s, part in SPLITS.items()})
        shares.append(float(share or 1) * bool(sources[-1]["train"]))
    if not any(shares):
        raise DataError(f"{', '.join(args.data)}: no document in split train")
    chats = Conversations(mm, Phrasings(args.phrasings), [c for c in known if c.intent])
    kinds = [tuple(tuple(x.split()) for x in kind) for kind in EXCHANGES]
    often = np.array(list(EXCHANGES.values()), float) / sum(EXCHANGES.values())
    often_source = np.array(shares) / sum(shares)

    def any_exchange(r: np.random.Generator) -> Exchange | None:
        """Of one of the sources; another kind or thing is tried until one is found that the source has."""
        things = sources[r.choice(len(sources), p=often_source)]["train"]
        for _ in range(100):
            one = chats.exchange(things[r.integers(len(things))], *kinds[r.choice(len(kinds), p=often)], r)
            if one is not None:
                return one
        return None

    is_code = np.array([b.modality in ("image", "audio") for b in mm.registry.blocks])
    sizes = np.array([b.size for b in mm.registry.blocks])

    def packed(exchanges: list[Exchange], r: np.random.Generator, rows: int) -> tuple[Tensor, ...]:
        """(ids, document, positions, answer, seen), each [rows, LENGTH]."""
        ids, document, positions = (x[:rows] for x in pack([x.ids for x in exchanges], LENGTH, mm.registry.pad))
        answer = (positions >= np.array([*(x.start for x in exchanges), 0])[document]) & (document >= 0)
        # Codes that can be told from the answer's own first codes teach little about the question: most are read
        # with some or all codes replaced by others of the same codebook. The targets stay the true ones.
        block = mm.registry.split(ids)[0]
        kind, some = r.random((2, len(exchanges) + 1))
        rate = np.where(kind < BLIND, 1.0, np.where(kind < BLIND + NOISY, some, 0.0))
        wrong = answer & is_code[block] & (r.random(ids.shape) < rate[document])
        seen = np.where(wrong, mm.registry.merge(block, r.integers(sizes[block])), ids)
        return tuple(torch.from_numpy(x).to(device) for x in (ids, document, positions, answer, seen))

    model = Transformer(shape)
    if args.init and not (args.out / STATE).exists():
        before = MultimodalTokenizer.load(args.init)
        olds = [TokenDataset.open(path, before.registry) for path in args.init_data]
        places = {c.id: c for old in olds for c in concepts(old, before, voices)}
        twins = (
            pair
            for new in known
            if new.split == "train" and new.id in places
            for part in new.asked
            for pair in zip(new.asked[part], places[new.id].asked[part], strict=True)
        )
        print(inherit(model, mm.registry, Transformer.load(args.init, before.registry), before.registry, twins))
    model = model.to(device)
    sequence_loss = SequenceLoss(mm.grammar, {"text": 3.0}, z_loss=1e-4)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        r = rng(config, step)
        room = int(config.batch_size * LENGTH * 0.95)
        batch = packed(draw(any_exchange, room, LENGTH, r), r, config.batch_size)
        value, parts = sequence_loss(model, *(x[rank() :: world()] for x in batch))  # the ranks share the rows
        return value, {"loss": value.item(), **parts}

    # Evaluation: the loss on things never seen, by modality and direction, and the answers to the same few names.
    val = [c for source in sources for c in source["val"]]
    shown = [c for c in sources[0]["train"] if {"text", "image", "audio"} <= c.answered.keys()]
    shown = [shown[i] for i in np.random.default_rng(1).permutation(len(shown))[:8]]
    sampling = {"text": Sampling(0.0), "image": Sampling(0.5), "audio": Sampling(0.5)}

    def evaluate(step: int) -> tuple[dict[str, float], dict, dict]:
        # Nats of every target, as it is read when nothing is wrong.
        found: dict[str, list[Tensor]] = {}
        for asks, answers in kinds:
            r = np.random.default_rng(7)
            asked = [x for c in val if (x := chats.exchange(c, asks, answers, r)) and len(x.ids) <= LENGTH]
            if asked:
                batch = packed(asked, r, len(asked))
                nats, group, _ = sequence_loss.nats(model, *batch[:4])
                found.setdefault("val_loss", []).append(nats)
                found.setdefault(f"val/{asked[0].direction}", []).append(nats)
                for i, name in enumerate(sequence_loss.modalities):
                    found.setdefault(f"val/{name}", []).append(nats[group == i])
        metrics = {name: torch.cat(values).mean().item() for name, values in found.items()}
        head = [mm.registry.bos, mm.registry.user]
        requests = [
            Request(np.array([*head, *c.answered["text"][0], mm.registry.assistant]), ("image", "audio"), 700, sample=i)
            for i, c in enumerate(shown)
        ]
        pictures, sounds = [], {}
        for concept, made in zip(shown, generate(model, mm.grammar, requests, sampling), strict=True):
            image, audio = (x for x in mm.decode(made.ids).segments if isinstance(x, Image | Audio))
            original = mm.decode([mm.registry.bos, *concept.answered["image"][0], mm.registry.eos]).segments[0].pixels
            pictures.append(np.concatenate([original, media.resize_image(image.pixels, *original.shape[1:])], 1))
            sounds[concept.id.replace("/", "-")] = (audio.samples, audio.sample_rate)
        same = [p for p in pictures if p.shape[1] == pictures[0].shape[1]]
        return metrics, {"answers": np.concatenate(same, 2)} if same else {}, sounds

    settings = {
        "model": shape, "vocabulary": mm.registry.fingerprint, "voices": voices, "shares": shares,
        "data": digest_of(c.id for c in known),
        "phrasings": digest_of(x for intent in chats.phrasings.intents.values() for x in intent.train),
    }  # fmt: skip
    fit(model, config, args.out, loss, evaluate, "any-to-any", settings)
    if rank() == 0:
        model.save(args.out / "model", mm.registry.to_json(), dtype=torch.bfloat16)
        for name, tokenizer in mm.tokenizers.items():  # MultimodalTokenizer.load looks for them beside the model
            tokenizer.save(args.out / name)
        print(f"wrote {args.out / 'model'}")


if __name__ == "__main__":
    main()

"""The parts of the evaluation of the any-to-any model, each a function of ``Bench`` that gives figures.

judged, directions, routing, decodability, bits, diversity, sheet, tune
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from answers import Answer, Answers, score
from asking import BARE, SPLITS, Corpus, Way
from concepts import MODALITIES, SAID, Concept, Question, modality, said
from judges import Features, Judges, Nearest, Recordings
from looking import UNTRAINED
from rich.progress import track
from shares import share

from mmtok import media
from mmtok.documents import Audio, Image, Text
from mmtok.training.lm import SequenceLoss
from mmtok.transformer import Sampling
from mmtok.transformer.packing import pack

ROW = 1024  # ids in a row of the batch whose bits are counted
HOT = dict.fromkeys(MODALITIES, Sampling(temperature=1.0))
TRIED = tuple(product((1.0, 1.5, 2.0, 3.0), (0.3, 0.6, 1.0)))  # guidance, temperature
PROMPTS, SAMPLES = 12, 8  # of diversity


@dataclasses.dataclass
class Bench:
    """What is judged, and how.

    Attributes:
        corpus: concepts and phrasings.
        judges: of all concepts.
        answers: the model.
        sampling: of each modality; what the command line takes.
        out: for pictures and sounds.
        generations: answers a direction whose decoding is tried.
    """

    corpus: Corpus
    judges: Judges
    answers: Answers
    sampling: Mapping[str, Sampling]
    out: Path
    generations: int


def judged(bench: Bench) -> dict:
    """Every judge on real data, of the concepts of train that are asked about: what the tokenizers leave of it, other
    voices, changed pictures.
    """
    corpus, out = bench.corpus, {}
    for part in ("image", "audio", "audio:fr"):
        there = [c for c in corpus.evaluated if c.has(part)]
        data: dict[str, list[tuple[Concept, Image | Text | Audio]]] = {
            "as the tokenizer leaves it": [(c, bench.answers.copy(c.truth(part))) for c in there]
        }
        if part == "image":
            for name, change in UNTRAINED.items():
                data[name] = [(c, Image(np.ascontiguousarray(change(c.image.pixels)))) for c in there]
        elif part == "audio":
            data["the recording itself"] = [(c, c.truth(part)) for c in there]
            for voice in ("joe2", "espeak0", "human"):
                data[f"voice {voice}"] = [(c, s) for c in there if (s := c.spoken(voice)) is not None]
        else:
            data["a tenth faster, with noise"] = [(c, faster(c.truth(part))) for c in there]
        out[part] = {
            judge.name: {"candidates": len(set(judge.labels))}
            | {
                name: share([judge.right(made, c) for c, made in pairs if judge.label(c) is not None])
                for name, pairs in data.items()
            }
            for judge in track(bench.judges.of[part], f"judges of {part}")
        }
    return out


def faster(sound: Image | Text | Audio) -> Audio:
    """A recording a tenth faster, and higher, with noise 30 dB below its power."""
    assert isinstance(sound, Audio)
    x = media.resample(sound.samples, 1100, 1000)
    noise = np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)
    x = x + noise * 10 ** (-30 / 20) * np.sqrt(np.square(x).mean())
    return Audio(np.clip(x, -1, 1).astype(np.float32), sound.sample_rate)


def directions(bench: Bench) -> dict:
    """By split and way of asking, for each part of the answer: the figures of ``score``.

    The answers are restricted to the modalities asked for. For speech of `pair-test` also by what of the name is said
    elsewhere in the training. French speech of `pair-test` is left out: those recordings are other pairs.
    """
    corpus = bench.corpus
    elsewhere = said(corpus.concepts, corpus.data)
    out: dict = {}
    for split in SPLITS:
        out[split] = {"concepts": len(corpus.members(split))}
        for way in corpus.ways:
            if split == "pair-test" and "audio:fr" in way.answers:
                continue
            questions = corpus.asked(way, corpus.members(split))
            made = bench.answers.ask(questions, bench.sampling, what=f"{split}: {way.name}")
            figures = {part: scored(bench, part, i, questions, made) for i, part in enumerate(way.answers)}
            out[split][way.name] = figures
            if split == "pair-test" and "audio" in way.answers:
                for kind in SAID:
                    chosen = [i for i, q in enumerate(questions) if elsewhere[q.concept.id] == kind]
                    parts = [questions[i] for i in chosen], [made[i] for i in chosen]
                    figures[f"audio, {kind}"] = scored(bench, "audio", way.answers.index("audio"), *parts)
    return out


def scored(bench: Bench, part: str, index: int, questions: Sequence[Question], made: Sequence[Answer]) -> dict:
    """The figures of ``score`` for the segments of answers at ``index``."""
    answers = [a.segments[index] for a in made]
    return score(bench.judges, bench.answers.copy, part, [q.concept for q in questions], answers)


def routing(bench: Bench) -> dict:
    """Whether the model answers in the modalities asked for, no target forced: phrasings that were held out, those by
    another author, and those trained on.

    Beside it, of those: whether all parts are the right thing by their first judges, and the language of what was asked
    for in French.
    """
    corpus, out = bench.corpus, {}
    limit = corpus.limit
    some = max(1, 7 * limit // 100)
    spoken = {name for name, intent in corpus.phrasings.intents.items() if intent.spoken}
    for split, per, most in (("held-out", some, 11 * limit), ("independent", some, 8 * limit), ("train", 1, 5 * limit)):
        found = corpus.requests(split, per, list(corpus.phrasings.intents), seed=1)
        found = [found[i] for i in sorted(np.random.default_rng(2).permutation(len(found))[:most])]
        questions = [q for _, q in found]
        made = bench.answers.ask(questions, bench.sampling, 1, forced=False, what=f"routing, {split}")
        routed = [a.modalities == q.modalities for q, a in zip(questions, made, strict=True)]
        right, languages = [], {"text:fr": [], "audio:fr": []}
        for q, a in [(q, a) for q, a, r in zip(questions, made, routed, strict=True) if r]:
            parts = list(zip(q.answers, a.segments, strict=True))
            right.append(all(bench.judges.right(p, q.concept, s) for p, s in parts))
            for part, segment in parts:
                if part in languages:
                    languages[part].append(bench.judges.language(segment) == "fr")
        wrong = Counter(
            f"{name}: {' '.join(a.modalities) or 'nothing'}"
            for (name, _), a, r in zip(found, made, routed, strict=True)
            if not r
        )
        names = dict.fromkeys(name for name, _ in found)
        out[split] = {
            "routed": share(routed),
            "routed, written": share([r for (n, _), r in zip(found, routed, strict=True) if n not in spoken]),
            "routed, spoken": share([r for (n, _), r in zip(found, routed, strict=True) if n in spoken]),
            "decoded": sum(not a.error for a in made),
            "right of those routed": share(right),
            "in French of those routed": {part: share(x) for part, x in languages.items()},
            "by intent": {k: share([r for (n, _), r in zip(found, routed, strict=True) if n == k]) for k in names},
            "answered instead": dict(wrong.most_common(12)),
        }
    return out


def decodability(bench: Bench) -> dict:
    """Of answers at temperature 1, no target forced: how many decode, and how many are of the modality asked for.

    Asked in all phrasings, those to train on and held-out, of the intents of each direction.
    """
    corpus, out = bench.corpus, {}
    for direction, (asks, target) in enumerate(product(MODALITIES, MODALITIES)):
        intents = [
            k
            for k, v in corpus.phrasings.intents.items()
            if v.asks == asks and len(v.answers) == 1 and modality(v.answers[0]) == target
        ]
        found = [q for split in ("train", "held-out") for _, q in corpus.requests(split, 10, intents, direction)]
        r = np.random.default_rng(direction)
        questions = [found[i] for i in r.integers(len(found), size=bench.generations)]
        name = f"{asks} -> {target}"
        made = bench.answers.ask(questions, HOT, direction, forced=False, what=f"decodability, {name}")
        out[name] = {
            "generations": len(made),
            "decoded": sum(not a.error for a in made),
            "as asked": share([a.modalities == (target,) for a in made]),
            "ids": sum(len(a.ids) for a in made),
            "errors": dict(Counter(a.error for a in made if a.error).most_common(3)),
        }
    return out


def bits(bench: Bench) -> dict:
    """Bits a token of the true answers to bare questions, by split: of all targets of a modality, and by direction.

    Counted as in training: among the ids that compete, and of targets that are a choice. The closing of a sound counts
    as audio, all other control ids as text. Float32.
    """
    corpus, answers = bench.corpus, bench.answers
    loss, registry = SequenceLoss(answers.mm.grammar), answers.mm.registry
    val = [c for c in corpus.concepts if c.split == "val"]
    out: dict = {}
    for split in ("train", "val", "pair-test", "test"):
        members = val if split == "val" else corpus.members(split)
        documents, starts, names = [], [], []
        for way in BARE:
            for q in corpus.asked(way, members):
                prompt, answer = answers.prompt(q.segments), answers.ids(q.concept.truth(way.answers[0]))
                documents.append(np.concatenate([prompt, answer, [registry.eos]]))
                starts.append(len(prompt))
                names.append(way.name)
        rows = pack(documents, ROW, registry.pad)
        of_modality: dict[str, list[float]] = {}
        of_way: dict[str, list[float]] = {}
        for i in track(range(0, len(rows[0]), 4), f"bits, {split}"):
            ids, document, positions = (torch.from_numpy(x[i : i + 4]) for x in rows)
            answer = (positions >= torch.tensor([*starts, ROW])[document]) & (document >= 0)
            nats, group, of = loss.nats(answers.model, ids, document, positions, answer)
            for value, g, d in zip((nats / math.log(2)).tolist(), group.tolist(), of.tolist(), strict=True):
                of_modality.setdefault(loss.modalities[g], []).append(value)
                if loss.modalities[g] == names[d].split()[2].partition(":")[0]:
                    of_way.setdefault(names[d], []).append(value)
        out[split] = {
            "concepts": len(members),
            "by modality": {k: round(float(np.mean(of_modality[k])), 3) for k in MODALITIES},
            "targets": {k: len(of_modality[k]) for k in MODALITIES},
            "by direction": {k: round(float(np.mean(v)), 3) for k, v in of_way.items()},
        }
    return out


def diversity(bench: Bench) -> dict:
    """How far several answers to one name are from each other, in the features of the judges, beside real data."""
    corpus, out = bench.corpus, {}
    concepts = corpus.evaluated[:PROMPTS]
    for part in ("image", "audio"):
        judge = bench.judges.main(part)
        assert isinstance(judge, Nearest)
        true = [c.truth(part) for c in concepts]
        copies = [bench.answers.copy(x) for x in true]
        figures: dict = {"distance": {Features: "1 - cosine", Recordings: "of warping"}[type(judge)]}
        figures["different concepts"] = apart(judge, true)
        figures["the tokenizer's copy"] = _mean([apart(judge, pair) for pair in zip(true, copies, strict=True)])
        if part == "audio":
            again = [(t, s) for c, t in zip(concepts, true, strict=True) if (s := c.spoken("joe2")) is not None]
            figures["another rendering"] = _mean([apart(judge, pair) for pair in again])
        for name, sampling in (("temperature 1, no guidance", HOT), ("default settings", bench.sampling)):
            questions = corpus.asked(Way("text", (part,)), [c for c in concepts for _ in range(SAMPLES)])
            made = bench.answers.ask(questions, sampling, what=f"diversity, {part}")
            several = [made[i : i + SAMPLES] for i in range(0, len(made), SAMPLES)]
            figures[name] = {
                "answers to one name": _mean([apart(judge, [a.segments[0] for a in s]) for s in several]),
                "distinct": round(float(np.mean([len({a.ids.tobytes() for a in s}) / len(s) for s in several])), 3),
                "right": share([judge.right(a.segments[0], q.concept) for q, a in zip(questions, made, strict=True)]),
            }
        out[part] = {"prompts": len(concepts), "samples": SAMPLES, **figures}
    return out


def apart(judge: Nearest, answers: Sequence[Image | Text | Audio]) -> float:
    """Mean distance of all pairs."""
    found = [judge.features(a) for a in answers]
    pairs = [judge.between(a, found[i + 1 :]) for i, a in enumerate(found[:-1])]
    return round(float(np.concatenate(pairs).mean()), 4)


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def sheet(bench: Bench) -> dict:
    """Pictures: originals over the tokenizer's copies over answers to a name, a picture, a spoken name; and speech."""
    corpus, ask, out = bench.corpus, bench.answers.ask, bench.out
    out.mkdir(parents=True, exist_ok=True)
    names = []
    for split in SPLITS:
        concepts = corpus.members(split)[:16]
        copies = [bench.answers.copy(c.image) for c in concepts]
        rows: list[Sequence[object]] = [[c.image for c in concepts], copies]
        for kind in MODALITIES:
            made = ask(corpus.asked(Way(kind, ("image",)), concepts), bench.sampling, what=f"sheet, {split}")
            rows.append([a.segments[0] for a in made])
        strips = [np.concatenate([squared(x.pixels) for x in row if isinstance(x, Image)], 2) for row in rows]
        names.append(f"{split}.png")
        media.write_image(out / names[-1], np.concatenate(strips, 1))
        french = Way("text", ("audio:fr",), "say_french")
        for way in (Way("text", ("audio",)), Way("image", ("audio",)), french):
            if split == "pair-test" and way is french:
                continue
            questions = corpus.asked(way, concepts[:8])
            for q, a in zip(questions, ask(questions, bench.sampling, what=f"speech, {split}"), strict=True):
                stem = f"{split} {q.concept.names['en']} - ".replace("/", " ")
                copy = bench.answers.copy(q.concept.truth(way.answers[0]))
                for sound, what in ((a.segments[0], way.name.replace(">", "")), (copy, f"copy {way.answers[0]}")):
                    assert isinstance(sound, Audio)
                    names.append(f"{stem}{what.replace(':', ' ')}.wav")
                    media.write_audio(out / names[-1], sound.samples, sound.sample_rate)
    return {"files": len(set(names)), "rows": ["original", "copy", *(f"{kind} -> image" for kind in MODALITIES)]}


def squared(pixels: np.ndarray) -> np.ndarray:
    """uint8 [3, H, W] -> uint8 [3, 64, 64] for the sheet."""
    return pixels if pixels.shape[1:] == (64, 64) else media.resize_image(pixels, 64, 64)


def tune(bench: Bench) -> dict:
    """Right answers by guidance and temperature of pictures and speech, asked with names and with the other of the two.

    Of concepts of train that no other part asks about, and that the model was trained on all the same: `val` it has
    never seen, and `test` and `pair-test` choose nothing.
    """
    corpus, out = bench.corpus, {}
    concepts = corpus.tuned[: max(1, 2 * corpus.limit // 5)]
    for target, other in (("image", "audio"), ("audio", "image")):
        judge = bench.judges.main(target)
        for guidance, temperature in TRIED:
            changed = dataclasses.replace(bench.sampling[target], guidance=guidance, temperature=temperature)
            figures = out.setdefault(target, {})[f"guidance {guidance}, temperature {temperature}"] = {}
            for asks in ("text", other):
                questions = corpus.asked(Way(asks, (target,)), concepts)
                made = bench.answers.ask(questions, {**bench.sampling, target: changed}, what=f"tuning {target}")
                hits = [judge.right(a.segments[0], q.concept) for q, a in zip(questions, made, strict=True)]
                figures[f"{asks} -> {target}"] = share(hits)
    return out

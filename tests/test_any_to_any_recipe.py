"""The recipe of the reference transformer, from datasets that the builder made; and what it makes conversations of."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from drawings import drawing
from safetensors.torch import load_file
from test_recipes import MODEL, RECIPES, run, same_run
from token_sets import save_tokenizers

from mmtok import media
from mmtok.datasets.build import EncodeConfig, build
from mmtok.datasets.shards import TokenDataset
from mmtok.documents import Image, Text, Turn
from mmtok.errors import ConfigError, DataError, VocabularyMismatchError
from mmtok.multimodal import MultimodalTokenizer
from mmtok.training.conversations import Concept, Conversations, Phrasings, concepts, draw, plain, spelt
from mmtok.transformer import Transformer

SCHEDULE = ["steps=3", "batch_size=2", "warmup=1", "eval_every=3", "save_every=2"]
VOICES = {"en": "joe", "fr": "marie"}
RATE = 16_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary; datasets of three things to train on, one for val, one of pair-test; and two spoken questions."""
    root = tmp_path_factory.mktemp("made")
    mm = save_tokenizers(root / "vocabulary")
    (root / "vocabulary" / "vocab.json").write_text(mm.registry.to_json())
    r = np.random.default_rng(0)

    def sound(name: str) -> str:
        noise = r.uniform(-0.5, 0.5, (1, int(r.integers(RATE // 20, RATE // 10)))).astype(np.float32)
        media.write_audio(root / f"{name}.wav", noise, RATE)
        return f"{name}.wav"

    lines = []
    for i, split in enumerate(("train", "train", "train", "val", "pair-test")):
        for j in range(2):
            media.write_image(root / f"{i}-{j}.png", drawing(32, 32, 10 * i + j))
        segments = [
            {"type": "text", "text": f"A cow {i}", "language": "en"},
            {"type": "image", "path": f"{i}-0.png"},
            {"type": "image", "path": f"{i}-1.png", "question_only": True},
            {"type": "text", "text": f"Une vache {i}", "language": "fr"},
            *(
                {"type": "audio", "path": sound(f"{i}-{v}-{x}"), "voice": v, "language": x}
                for v, x in (("joe", "en"), ("other", "en"), ("marie", "fr"))
            ),
        ]
        lines.append({"id": f"cow{i}", "split": split, "segments": segments})
    questions = [
        {
            "id": f"q{i}",
            "split": split,
            "intent": "spoken_tell",
            "segments": [{"type": "audio", "path": sound(f"q{i}")}],
        }
        for i, split in enumerate(("train", "held-out"))
    ]
    for name, documents in (("things", lines), ("questions", questions)):
        manifest = root / f"{name}.jsonl"
        manifest.write_text("".join(json.dumps(x) + "\n" for x in documents))
        build(str(manifest), root / name, str(root / "vocabulary"), EncodeConfig(image_size=32), workers=1)
    return root


@pytest.fixture(scope="module")
def mm(made: Path) -> MultimodalTokenizer:
    return MultimodalTokenizer.load(made / "vocabulary")


@pytest.fixture(scope="module")
def things(made: Path, mm: MultimodalTokenizer) -> dict[str, Concept]:
    return {c.id: c for c in concepts(TokenDataset.open(made / "things"), mm, VOICES)}


@pytest.fixture(scope="module")
def chats(made: Path, mm: MultimodalTokenizer) -> Conversations:
    questions = concepts(TokenDataset.open(made / "questions"), mm, VOICES)
    return Conversations(mm, Phrasings(RECIPES / "phrasings.toml"), questions, empty=0)


def arguments(made: Path, out: Path, *more: object) -> list[object]:
    data = [f"{made / 'things'}:2", made / "questions"]
    rest = ["--voice", "en=joe", "fr=marie", "--model", *MODEL, "--set", *SCHEDULE]
    return ["--data", *data, "--vocabulary", made / "vocabulary", "--out", out, *rest, *more]


@pytest.mark.parametrize("more", [(), ("optimizer=adamw", "accumulate=2", "ema=0.9")])
def test_a_run_that_is_interrupted_goes_on_as_if_nothing_had_been(made: Path, tmp_path: Path, more: tuple[str]) -> None:
    run("any_to_any", *arguments(made, tmp_path / "a", *more))
    run("any_to_any", *arguments(made, tmp_path / "b", *more), die_at=2)
    run("any_to_any", *arguments(made, tmp_path / "b", *more))
    same_run(tmp_path / "a", tmp_path / "b")
    model = Transformer.load(tmp_path / "a" / "model")
    vocabulary = MultimodalTokenizer.load(tmp_path / "a" / "model")
    assert model.registry is not None
    assert model.registry.fingerprint == vocabulary.registry.fingerprint
    assert list(vocabulary.tokenizers) == ["words", "pictures", "sounds"]
    assert torch.isfinite(model(torch.tensor(vocabulary.prompt([Text("a cow 0")]))[None])).all()
    log = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"val_loss", "val/text", "val/image", "val/audio", "val/text -> image audio"} <= log.keys()
    assert len(list((tmp_path / "a" / "samples").glob("*.wav"))) == 3, "an answer for each thing that it trains on"
    assert len(list((tmp_path / "a" / "samples").glob("*.png"))) == 1


@pytest.mark.slow
def test_runs_that_are_killed(made: Path, tmp_path: Path) -> None:
    """kill -9 at any moment: the same weights and the same curve in the end."""
    schedule = ["steps=12", "eval_every=2", "save_every=3"]
    command = [sys.executable, str(RECIPES / "any_to_any.py")]
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, *map(str, arguments(made, out, *schedule))], env=threads, stderr=-1)

    assert start(tmp_path / "a").wait(300) == 0
    chance = random.Random(0)
    killed = 0
    for _ in range(4):
        process = start(tmp_path / "b")
        log = tmp_path / "b" / "metrics.jsonl"
        before = log.stat().st_mtime_ns if log.exists() else 0
        while process.poll() is None and (not log.exists() or log.stat().st_mtime_ns == before):
            time.sleep(0.05)
        time.sleep(chance.random() * 1.5)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 1
    assert start(tmp_path / "b").wait(300) == 0
    one, two = (load_file(tmp_path / x / "state.safetensors") for x in "ab")
    assert not [k for k in one if not torch.equal(one[k], two[k])]
    curves = [[json.loads(x) for x in (tmp_path / x / "metrics.jsonl").read_text().splitlines()] for x in "ab"]
    for line in (*curves[0], *curves[1]):
        del line["steps_per_s"]
    assert curves[0] == curves[1]


def test_start_from_another_model(made: Path, tmp_path: Path) -> None:
    run("any_to_any", *arguments(made, tmp_path / "a"))
    # The same words with larger codebooks of pictures: another vocabulary, and the same documents in it.
    shutil.copytree(made, tmp_path / "other")
    torch.manual_seed(1)
    mm = save_tokenizers(tmp_path / "other" / "vocabulary", codes=96)
    (tmp_path / "other" / "vocabulary" / "vocab.json").write_text(mm.registry.to_json())
    for name in ("things", "questions"):
        shutil.rmtree(tmp_path / "other" / name)
        source, out = tmp_path / "other" / f"{name}.jsonl", tmp_path / "other" / name
        build(str(source), out, str(tmp_path / "other" / "vocabulary"), EncodeConfig(image_size=32), workers=1)
    with pytest.raises(VocabularyMismatchError):
        run("any_to_any", *arguments(made, tmp_path / "b"), "--vocabulary", tmp_path / "other" / "vocabulary")
    init = ("--init", tmp_path / "a" / "model", "--init-data", made / "things")
    run("any_to_any", *arguments(tmp_path / "other", tmp_path / "b", "steps=1", "lr=1e-9"), *init)
    before, after = (Transformer.load(tmp_path / x / "model").state_dict() for x in "ab")
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(before[name], after[name])
    old, new = (MultimodalTokenizer.load(tmp_path / x / "model").registry for x in "ab")
    assert new.size == old.size + 32
    rows = [x["model.embed_tokens.weight"] for x in (before, after)]
    for block in ("text", "grid"):
        one, two = old.block(block), new.block(block)
        torch.testing.assert_close(rows[0][one.start : one.end], rows[1][two.start : two.end])


def test_what_cannot_be_trained_on(made: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no document in split train"):
        run("any_to_any", *arguments(made, tmp_path), "--data", made / "questions")
    manifest = tmp_path / "names.jsonl"
    manifest.write_text(json.dumps({"id": "a", "split": "train", "segments": [{"type": "text", "text": "A cow"}]}))
    build(str(manifest), tmp_path / "names", str(made / "vocabulary"), workers=1)
    with pytest.raises(DataError, match="no exchange of at most 512 ids"):
        run("any_to_any", *arguments(made, tmp_path / "x"), "--data", tmp_path / "names")
    (tmp_path / "p.toml").write_text("openings = []\nendings = []\n[draw]\nasks = 3\n")
    with pytest.raises(ConfigError, match="expected openings, endings, and for each intent"):
        run("any_to_any", *arguments(made, tmp_path / "x"), "--phrasings", tmp_path / "p.toml")


# --- conversations


def test_concepts_of_a_dataset(things: dict[str, Concept], mm: MultimodalTokenizer) -> None:
    cow = things["cow0"]
    assert cow.names == {"en": "A cow 0", "fr": "Une vache 0"}
    assert {k: len(v) for k, v in cow.asked.items()} == {"image": 2, "audio": 2, "audio:fr": 1}
    assert {k: len(v) for k, v in cow.answered.items()} == {
        "text": 1, "text:fr": 1, "image": 1, "audio": 1, "audio:fr": 1,
    }  # fmt: skip
    ends = mm.registry.bos, mm.registry.eos
    (text,) = mm.decode([ends[0], *cow.answered["text:fr"][0], ends[1]]).segments
    assert text == Text("une vache 0")
    silent = cow.without("audio")
    assert "audio" not in silent.asked | silent.answered
    assert "audio:fr" in silent.answered
    assert "audio" in cow.answered


def every(chats: Conversations, cow: Concept, asks: str, answers: str) -> Iterator[tuple[list, list]]:
    """Question and answer of many exchanges, as segments."""
    r = np.random.default_rng(0)
    for _ in range(60):
        one = chats.exchange(cow, asks.split(), answers.split(), r)
        assert one is not None
        segments = chats.mm.decode(one.ids).segments
        at = segments.index(Turn("assistant"))
        assert one.ids[one.start - 1] == chats.mm.registry.assistant
        assert one.direction == f"{asks} -> {answers}"
        assert segments[0] == Turn("user")
        yield list(segments[1:at]), list(segments[at + 1 :])


def test_exchanges_ask_for_what_they_answer(chats: Conversations, things: dict[str, Concept]) -> None:
    phrasings = {k: x.replace("{name}", "a cow 0") for k, v in chats.phrasings.intents.items() for x in v.train}
    assert phrasings
    asked = set()
    for question, answer in every(chats, things["cow0"], "text", "image audio"):
        assert [type(x).__name__ for x in answer] == ["Image", "Audio"]
        (text,) = question
        asked.add(text.text)
        assert "cow 0" in text.text.lower()
        bare = text.text.lower().rstrip(".") in ("a cow 0", "cow 0")
        assert bare or any(x in text.text.lower() for x in ("draw", "show", "paint", "picture", "see", "sketch"))
    assert len(asked) > 30
    for question, answer in every(chats, things["cow0"], "text", "text"):
        assert "ne vache 0" in question[0].text or "vache 0" in question[0].text
        assert answer == [Text("a cow 0")]
    bare = 0
    for question, answer in every(chats, things["cow0"], "image", "audio"):
        assert sum(isinstance(x, Image) for x in question) == 1
        assert len(question) <= 2
        bare += len(question) == 1
        assert len(answer) == 1
    assert 5 < bare < 35
    for question, _ in every(chats, things["cow0"], "audio", "audio:fr"):
        assert len(question) == 2, "a sound alone does not say that French is wanted"


def test_held_out_phrasings_and_questions_are_never_asked(chats: Conversations, made: Path, mm, things) -> None:
    held = {x for v in chats.phrasings.intents.values() for x in v.held_out}
    assert len(held) > 100
    r = np.random.default_rng(0)
    for name, intent in chats.phrasings.intents.items():
        assert not set(intent.train) & set(intent.held_out)
        if intent.spoken:
            continue
        said = {chats.phrasings.phrase(name, r).lower().rstrip(".!") for _ in range(300)}
        assert not said & {x.lower().rstrip(".!") for x in intent.held_out}, name
    data = TokenDataset.open(made / "questions")
    train, held_out = data.span(0, 0), data.span(1, 0)
    assert [len(x) for x in chats.spoken.values()] == [1]
    assert np.array_equal(chats.spoken["spoken_tell"][0], train)
    assert not np.array_equal(train, held_out)


def test_what_a_thing_lacks_is_not_asked_for(chats: Conversations, things: dict[str, Concept]) -> None:
    r = np.random.default_rng(0)
    silent = things["cow4"].without("audio")
    assert chats.exchange(silent, ["text"], ["audio"], r) is None
    assert chats.exchange(silent, ["audio"], ["image"], r) is None
    assert chats.exchange(silent, ["text"], ["image"], r) is not None
    with pytest.raises(DataError, match="no exchange of at most 5 ids"):
        draw(lambda r: chats.exchange(silent, ["text"], ["image"], r), 100, 5, r)


def test_empty_questions_are_for_codes_only(mm: MultimodalTokenizer, things: dict[str, Concept]) -> None:
    chats = Conversations(mm, Phrasings(RECIPES / "phrasings.toml"), empty=0.5)
    assert {len(q) for q, _ in every(chats, things["cow0"], "text", "image")} == {0, 1}
    assert {len(q) for q, _ in every(chats, things["cow0"], "image", "text")} <= {1, 2}


def test_spellings() -> None:
    assert plain("A cow") == "a cow"
    assert plain("USA") == "USA"
    assert plain("X") == "X"
    assert plain("") == ""
    r = np.random.default_rng(0)
    assert {spelt("A cow", r) for _ in range(50)} == {"A cow", "a cow", "cow"}
    assert {spelt("Anthurium", r) for _ in range(50)} == {"Anthurium", "anthurium"}

"""Engines: used only with the ids of tokenizers, whatever else they do; the same ids in threads and processes."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import pickle
import signal
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import mmtok
from mmtok.text import ByteLevelBPE, engines, probes
from mmtok.text.bytelevel import ByteLevelTokenizer

NAMES = [engine.name for engine in engines.ENGINES]


def with_engines(*candidates: type, source: str = "text-4k") -> ByteLevelBPE:
    """A fresh model that has looked for its engine among these."""
    model = ByteLevelBPE(mmtok.load(source).tokenizer_json)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "ENGINES", candidates)
        assert model.engine
    return model


@pytest.fixture(scope="module")
def reference() -> ByteLevelBPE:
    return with_engines()


@pytest.fixture(scope="module", params=engines.ENGINES, ids=NAMES)
def fast(request: pytest.FixtureRequest) -> ByteLevelBPE:
    pytest.importorskip(request.param.name)
    return with_engines(request.param)


def assert_same(fast: ByteLevelTokenizer, reference: ByteLevelTokenizer, texts: list[str]) -> None:
    got, expected = fast.encode(texts), reference.encode(texts)
    assert len(got) == len(expected) == len(texts)
    for text, a, b in zip(texts, got, expected, strict=True):
        assert a.dtype == b.dtype == np.int64
        assert np.array_equal(a, b), text[:100]


def test_every_engine_is_proven_for_the_bundled_model(fast: ByteLevelBPE, reference: ByteLevelBPE) -> None:
    assert fast.engine in NAMES
    assert reference.engine == "tokenizers"
    assert_same(fast, reference, probes.texts_for(fast._id_to_bytes))


@given(st.lists(st.text(max_size=80), max_size=6))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_ids_are_those_of_tokenizers(fast: ByteLevelBPE, reference: ByteLevelBPE, texts: list[str]) -> None:
    assert_same(fast, reference, texts)
    assert fast.decode(fast.encode(texts)) == texts


@given(st.text(max_size=60), st.integers(1, 4))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_stream_of_its_ids_gives_the_text_and_no_half_character(fast: ByteLevelBPE, text: str, step: int) -> None:
    (ids,) = fast.encode([text])
    stream = fast.stream()
    pieces = [stream.push(ids[i : i + step]) for i in range(0, len(ids), step)]
    assert "".join(pieces) == text
    assert stream.finish() == ""


def test_long_texts_of_words_and_of_nonsense(fast: ByteLevelBPE, reference: ByteLevelBPE) -> None:
    rng = np.random.default_rng(1)
    words = [*" ".join(probes.PROSE).split(" "), "\n", "\r\n", "  ", "12345"]
    texts = [" ".join(rng.choice(words, 30_000))]
    points = rng.integers(0, 0x3000, 60_000)
    texts += ["".join(map(chr, points)), "".join(map(chr, rng.integers(97, 123, 100_000)))]
    assert_same(fast, reference, texts)


@pytest.mark.parametrize("unit", [" ", "a", "\n", "\r\n", "7", "語", "e\u0301", "🐄", "<|endoftext|>"])
def test_a_long_run_of_one_thing(fast: ByteLevelBPE, reference: ByteLevelBPE, unit: str) -> None:
    assert_same(fast, reference, [unit * 20_000, unit, "x" + unit * 3000 + "x"])


@pytest.mark.parametrize("unit", [" ", "a"])
def test_ten_million_of_one_character(fast: ByteLevelBPE, unit: str) -> None:
    """tiktoken gives up on a million spaces in a row: tokenizers, slower, takes over for that call."""
    millions = 2 if fast.engine == "tiktoken" else 10
    (ids,) = fast.encode([unit * millions * 1_000_000])
    (piece,) = fast.encode([unit * 1_000_000])
    np.testing.assert_array_equal(ids, np.tile(piece, millions))


def test_literals_are_only_text(fast: ByteLevelBPE) -> None:
    for literal in ("<|endoftext|>", "<|im_start|>", "<s>", "<image>", "<0x0A>", "[MASK]"):
        (ids,) = fast.encode([literal])
        assert len(ids) > 1
        assert fast.decode([ids]) == [literal]


# --- engines that must not be used


class Reference:
    """What the broken engines below are made from: the ids of tokenizers themselves."""

    name = "reference"
    damage = "none"

    def __init__(self, tokenizer_json: str, id_to_bytes: Sequence[bytes]) -> None:
        self.inner = engines.Tokenizers(Tokenizer.from_str(tokenizer_json))

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return self.inner.encode(texts)


class NotInstalled(Reference):
    def __init__(self, tokenizer_json: str, id_to_bytes: Sequence[bytes]) -> None:
        raise ModuleNotFoundError("no such engine")


class RaisesOnRead(Reference):
    def __init__(self, tokenizer_json: str, id_to_bytes: Sequence[bytes]) -> None:
        raise ValueError("unknown pre-tokenizer")


class RaisesOnEmoji(Reference):
    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if any("🐄" in text for text in texts):
            raise RuntimeError("emoji")
        return super().encode(texts)


class PanicException(BaseException):
    """As pyo3 gives a panic of Rust."""


class Panics(Reference):
    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        raise PanicException("called `Option::unwrap()` on a `None` value")


class OtherIds(Reference):
    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, bounds = super().encode(texts)
        return np.where(ids == ids.max(), 0, ids), bounds


class OtherBounds(Reference):
    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, bounds = super().encode(texts)
        return ids, np.sort(np.maximum(bounds - 1, 0))


class OneTooMany(Reference):
    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, bounds = super().encode(texts)
        return np.append(ids, 0), bounds


class WrongWhenWarm(Reference):
    calls = 0

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        self.calls += 1
        ids, bounds = super().encode(texts)
        return (ids if self.calls == 1 else ids + 1), bounds


class WrongAlone(Reference):
    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, bounds = super().encode(texts)
        return (ids if len(texts) > 1 else ids[::-1]), bounds


class ParsesSpecialTokens(Reference):
    def __init__(self, tokenizer_json: str, id_to_bytes: Sequence[bytes]) -> None:
        tokenizer = Tokenizer.from_str(tokenizer_json)
        tokenizer.add_special_tokens(["<|endoftext|>"])
        self.inner = engines.Tokenizers(tokenizer)


class StripsSpaces(Reference):
    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return super().encode([text.rstrip() for text in texts])


class Normalises(Reference):
    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return super().encode([text.replace("\r\n", "\n") for text in texts])


BROKEN = [
    NotInstalled, RaisesOnRead, RaisesOnEmoji, Panics, OtherIds, OtherBounds, OneTooMany, WrongWhenWarm, WrongAlone,
    ParsesSpecialTokens, StripsSpaces, Normalises,
]  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_an_engine_that_fails_is_passed_over(broken: type, reference: ByteLevelBPE) -> None:
    model = with_engines(broken)
    assert model.engine == "tokenizers"
    assert with_engines(broken, Reference).engine == "reference"
    assert_same(model, reference, ["a cow <|endoftext|> 🐄\r\n"])


class RaisesLater(Reference):
    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if any("zebra" in text for text in texts):
            raise PanicException("stack overflow")
        return super().encode(texts)


def test_tokenizers_takes_over_for_a_text_that_an_engine_cannot_do(reference: ByteLevelBPE) -> None:
    model = with_engines(RaisesLater)
    assert model.engine == "reference"
    assert_same(model, reference, ["a cow", "a zebra", ""])


class Interrupted(Reference):
    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        raise KeyboardInterrupt


def test_an_interruption_is_not_taken_for_a_fault() -> None:
    with pytest.raises(KeyboardInterrupt):
        with_engines(Interrupted)


def test_tiktoken_is_refused_where_it_would_merge_in_another_order() -> None:
    pytest.importorskip("tiktoken")
    spec = engines.json.loads(mmtok.load("text-4k").tokenizer_json)
    table = mmtok.load("text-4k")._id_to_bytes
    spec["model"]["merges"][5], spec["model"]["merges"][6] = spec["model"]["merges"][6], spec["model"]["merges"][5]
    with pytest.raises(ValueError, match="another way"):
        engines.Tiktoken(engines.json.dumps(spec), table)


def test_a_cache_that_grows_is_made_anew(reference: ByteLevelBPE, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(engines.Gigatoken, "renewal", 100)
    model = with_engines(engines.Gigatoken)
    assert model.engine == "gigatoken"
    before = model._encoder._engine._tokenizer
    assert_same(model, reference, ["the cow " * 20])
    assert model._encoder._engine._tokenizer is not before


# --- threads and processes

TEXTS = [f"{i} the cow, la vache, корова, 牛 {i * 7}\n" * (1 + i % 5) for i in range(200)]


def test_threads(fast: ByteLevelBPE, reference: ByteLevelBPE) -> None:
    expected = reference.encode(TEXTS)
    fresh = pickle.loads(pickle.dumps(fast))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for got in pool.map(fresh.encode, [TEXTS] * 16):
            assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process(fast: ByteLevelBPE, reference: ByteLevelBPE) -> None:
    """The engine's threads were started before, and are not there in the child."""
    expected = reference.encode(TEXTS)
    fast.encode(TEXTS)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        got = fast.encode(TEXTS)
        os._exit(0 if all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True)) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_spawned_process(reference: ByteLevelBPE) -> None:
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        got = pool.submit(mmtok.load("text-4k").encode, TEXTS).result(timeout=120)
    assert all(np.array_equal(a, b) for a, b in zip(got, reference.encode(TEXTS), strict=True))


# --- the proof itself


def test_the_probes_are_always_the_same_and_hold_what_breaks_engines() -> None:
    table = mmtok.load("text-4k")._id_to_bytes
    texts = probes.texts_for(table)
    probes.fuzz.cache_clear()
    assert probes.texts_for(table) == texts
    together = texts[-1]
    assert together == "".join(texts[:-1])
    for part in (
        "<|endoftext|>",
        " " * 300,
        "👨‍👩‍👧",
        "e\u0301\u0301",
        "\x00",
        "語語語",
        "कार",
        "\r\n\r\n",
        "\U0010ffff",
    ):
        assert part in together
    assert not any(0xD800 <= ord(c) < 0xE000 for c in together)


def test_splits_by_folded_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """'s with a long s is a word of its own; merges across its border show an engine that does not split there."""
    model = ByteLevelBPE.train(["\u017fa"] * 99 + ["\u017fb"] * 88 + ["\u017fx"] * 77, 300)
    reference = Tokenizer.from_str(model.tokenizer_json)
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(["'", "\u017f", "a", "b", "x", " ", "s", "'s"], 12)) for _ in range(400)]
    expected = [reference.encode(text).ids for text in texts]
    for engine in engines.ENGINES:
        monkeypatch.setattr(engines, "ENGINES", (engine,))
        fast = ByteLevelBPE(model.tokenizer_json)
        assert [ids.tolist() for ids in fast.encode(texts)] == expected
        assert [fast.encode([text])[0].tolist() for text in texts[:50]] == expected[:50]
    assert len({len(ids) for ids in expected}) > 3

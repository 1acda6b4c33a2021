"""Byte-level Unigram: as lossless and as safe as the BPE, the likeliest split, exact files."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text import ADDED, CORPUS, NASTY

import mmtok
from mmtok.errors import CheckpointError, ConfigError, MediaError, VocabularyError
from mmtok.text import ByteLevelBPE, ByteLevelUnigram
from mmtok.text.probes import PROSE


@pytest.fixture(scope="module")
def unigram() -> ByteLevelUnigram:
    return ByteLevelUnigram.train([*CORPUS, *PROSE] * 4, 500)


@given(st.lists(st.text(max_size=60), max_size=5))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_string_round_trips(unigram: ByteLevelUnigram, texts: list[str]) -> None:
    codes = unigram.encode(texts)
    assert unigram.decode(codes) == texts
    assert unigram.decode_bytes(codes) == [t.encode() for t in texts]


def test_adversarial_strings_round_trip(unigram: ByteLevelUnigram) -> None:
    texts = [*NASTY, " " * 1_100_000 + "cow"]
    codes = unigram.encode(texts)
    assert unigram.decode(codes) == texts
    for text, ids in zip(NASTY, codes[:-1], strict=True):
        np.testing.assert_array_equal(unigram.encode([text])[0], ids)


@given(st.text(max_size=40), st.lists(st.integers(1, 4), min_size=40, max_size=40))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_stream_cut_anywhere_gives_the_text_and_no_half_character(
    unigram: ByteLevelUnigram, text: str, steps: list[int]
) -> None:
    (ids,) = unigram.encode([text])
    stream, at, pieces = unigram.stream(), 0, []
    for step in itertools.cycle(steps):
        if at >= len(ids):
            break
        pieces.append(stream.push(ids[at : at + step]))
        at += step
    assert "".join(pieces) == text
    assert stream.finish() == ""


@given(st.lists(st.integers(0, 499), max_size=40), st.integers(1, 5))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_ids_decode_and_stream_alike(unigram: ByteLevelUnigram, ids: list[int], step: int) -> None:
    (text,) = unigram.decode([ids])
    stream = unigram.stream()
    assert "".join(stream.push(ids[i : i + step]) for i in range(0, len(ids), step)) + stream.finish() == text


def test_the_split_is_the_likeliest(unigram: ByteLevelUnigram) -> None:
    """Against all splits of a word, by brute force."""
    scores = dict(json.loads(unigram.tokenizer_json)["model"]["vocab"])
    table = {data: i for i, data in enumerate(unigram._id_to_bytes)}
    by_id = list(scores.values())
    for word in (" stands", "корова", " beside", "été"):
        data = word.encode()
        best = -math.inf
        for cuts in itertools.product((False, True), repeat=len(data) - 1):
            bounds = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(data)]
            pieces = [data[a:b] for a, b in itertools.pairwise(bounds)]
            if all(p in table for p in pieces):
                best = max(best, sum(by_id[table[p]] for p in pieces))
        (ids,) = unigram.encode([word])
        assert sum(by_id[i] for i in ids) == pytest.approx(best)


def test_training_gives_the_same_model_twice_and_all_bytes(unigram: ByteLevelUnigram) -> None:
    again = ByteLevelUnigram.train(iter([*CORPUS, *PROSE] * 4), 500)
    assert again.fingerprint == unigram.fingerprint
    assert unigram.codebook_sizes == (500,)
    assert {b for b in unigram._id_to_bytes if len(b) == 1} == {bytes([i]) for i in range(256)}
    assert (unigram.kind, unigram.modality, unigram.properties) == ("text-unigram", "text", {})
    assert len(unigram.encode([CORPUS[0]])[0]) < len(CORPUS[0])


def test_no_engine_that_is_not_proven(unigram: ByteLevelUnigram) -> None:
    """No faster engine knows byte-level Unigram so far; one that learns it must first give the same ids."""
    assert unigram.engine == "tokenizers"


def test_bad_input(unigram: ByteLevelUnigram) -> None:
    with pytest.raises(ConfigError, match="at least 256"):
        ByteLevelUnigram.train(CORPUS, 255)
    with pytest.raises(MediaError, match="text 1: "):
        ByteLevelUnigram.train(["fine", "\ud800"], 300)
    with pytest.raises(MediaError, match="text 1: "):
        unigram.encode(["fine", "\udfff"])
    with pytest.raises(VocabularyError, match=r"position 0: got text id 500, expected 0\.\.499"):
        unigram.decode([[500]])


def test_save_load_and_pickle(unigram: ByteLevelUnigram, tmp_path: Path) -> None:
    unigram.save(tmp_path / "text")
    for other in (mmtok.load(tmp_path / "text"), pickle.loads(pickle.dumps(unigram))):
        assert isinstance(other, ByteLevelUnigram)
        assert other.fingerprint == unigram.fingerprint
        for a, b in zip(unigram.encode(NASTY), other.encode(NASTY), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(CheckpointError, match="holds a 'text-unigram', expected a 'text-bpe'"):
        ByteLevelBPE.load(tmp_path / "text")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["added_tokens"].append(ADDED), "added tokens"),
        (lambda s: s.update(normalizer={"type": "NFC"}), "normaliser"),
        (lambda s: s["model"].update(type="BPE"), "'BPE'"),
        (lambda s: s["model"].update(unk_id=3), "unknown token"),
        (lambda s: s["model"].update(byte_fallback=True), "spells unknown characters"),
        (lambda s: s["model"]["vocab"].append(s["model"]["vocab"][0]), "twice"),
        (lambda s: s["model"]["vocab"].append(["zz", math.inf]), "finite"),
        (lambda s: s["model"]["vocab"].append(["日", -3.0]), "stands for no byte"),
        (lambda s: s["model"]["vocab"].remove(next(e for e in s["model"]["vocab"] if len(e[0]) == 1)), "1 of the 243"),
        (lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "pre-tokenizer"),
        (lambda s: s.pop("model"), "Unigram"),
    ],
)
def test_models_that_lose_text_are_refused(unigram: ByteLevelUnigram, change, message: str) -> None:
    spec = json.loads(unigram.tokenizer_json)
    change(spec)
    with pytest.raises(CheckpointError, match=message):
        ByteLevelUnigram(json.dumps(spec))

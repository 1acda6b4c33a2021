"""Byte-level BPE: lossless for every Unicode string, safe against special-token text, exact files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.errors import CheckpointError, ConfigError, MediaError, MmtokError, VocabularyError
from mmtok.text import ByteLevelBPE, StreamDecoder

CORPUS = [
    "The cow stands in the field, and the cow's calf stands beside it. It's 12345 o'clock.\n",
    "une vache dans le pré; la vache mange de l'herbe. Größe, naïveté, façade.\r\n\r\n",
    "def encode(self, text: str) -> list[int]:\n    return self.table[text]\n",
    "日本語のテキスト。日本語の牛。 корова стоит в поле, корова \U0001f404\U0001f404",
] * 3

NASTY = [
    "",
    " ",
    "\n",
    "\x00",
    "a\x00b",
    "<image>",
    "</image> <audio></audio>",
    "<|endoftext|>",
    "<|im_start|>user<|im_end|><bos><eos><pad><user><assistant>",
    "[UNK][MASK][CLS]<unk><s></s>",
    "\u2581SentencePiece\u2581",
    "Ġthe Ċ āĂ",
    "\ufeffBOM and \ufffe and \uffff and \ufffd",
    "e\u0301\u0301\u0301 n\u0303 \u1100\u1161\u11a8",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f1eb\U0001f1f7",
    "שלום עולם \u202e مرحبا \u200f",
    "\u2028\u2029\x85\x0b\x0c\x1c\xa0\u3000",
    "\U0010ffff\U00010000\ud7ff\ue000",
    "a" * 5000,
    " " * 5000,
    "\r\n" * 1000,
    "0123456789" * 50,
    "don't DON'T I'LL we'Re",
    "".join(map(chr, range(0x300))),
]


@pytest.fixture(scope="module")
def bpe() -> ByteLevelBPE:
    return ByteLevelBPE.train(CORPUS, 400)


@given(st.lists(st.text(max_size=60), max_size=5))
@settings(max_examples=200, deadline=None)
def test_every_string_round_trips(bpe: ByteLevelBPE, texts: list[str]) -> None:
    codes = bpe.encode(texts)
    assert bpe.decode(codes) == texts
    assert bpe.decode_bytes(codes) == [t.encode() for t in texts]


def test_adversarial_strings_round_trip(bpe: ByteLevelBPE) -> None:
    rng = np.random.default_rng(0)
    alphabet = [*NASTY[3:18], *"abc 'é\n\t\r\u0301\u200d\U0001f404", "the", "  "]
    fuzz = ["".join(rng.choice(alphabet, rng.integers(0, 30))) for _ in range(2000)]
    points = rng.integers(0, 0x110000, (2000, 12))
    fuzz += ["".join(chr(p) for p in row if not 0xD800 <= p < 0xE000) for row in points]
    texts = NASTY + fuzz
    assert bpe.decode(bpe.encode(texts)) == texts


def test_a_very_long_run_of_spaces_does_not_break_the_regex_engine(bpe: ByteLevelBPE) -> None:
    text = " " * 10_500_000 + "cow" + "e\u0301" * 10
    (ids,) = bpe.encode([text])
    assert bpe.decode([ids]) == [text]


def test_special_looking_text_is_only_text(bpe: ByteLevelBPE) -> None:
    (ids,) = bpe.encode(["<|endoftext|>"])
    assert len(ids) > 1
    assert ids.max() < bpe.codebook_sizes[0]


def test_ids_have_the_promised_form(bpe: ByteLevelBPE) -> None:
    codes = bpe.encode(["the cow", ""])
    assert [c.dtype for c in codes] == [np.int64, np.int64]
    assert codes[1].shape == (0,)
    assert len(codes[0]) < len("the cow")
    assert bpe.encode([]) == []
    assert bpe.decode([]) == []
    assert bpe.properties == {}
    assert (bpe.kind, bpe.modality) == ("text-bpe", "text")


def test_encoding_is_the_same_alone_and_in_a_batch(bpe: ByteLevelBPE) -> None:
    together = bpe.encode(NASTY)
    for text, ids in zip(NASTY, together, strict=True):
        np.testing.assert_array_equal(bpe.encode([text])[0], ids)


def test_training_is_deterministic_and_small_text_gives_a_small_vocabulary() -> None:
    a, b = ByteLevelBPE.train(CORPUS, 400), ByteLevelBPE.train(iter(CORPUS), 400)
    assert a.fingerprint == b.fingerprint
    assert a.codebook_sizes == (400,)
    assert ByteLevelBPE.train([], 300).codebook_sizes == (256,)
    assert ByteLevelBPE.train(CORPUS, 401).fingerprint != a.fingerprint


def test_numbers_and_words_split_as_in_gpt4(bpe: ByteLevelBPE) -> None:
    pieces = ByteLevelBPE.train(["1234567 it's  two\n\n"] * 99, 400)
    (ids,) = pieces.encode(["1234567 it's  two\n\n"])
    assert pieces.decode([[i] for i in ids]) == ["123", "456", "7", " it", "'s", " ", " two", "\n\n"]


@pytest.mark.parametrize("size", [0, 255, -1])
def test_too_small_a_vocabulary(size: int) -> None:
    with pytest.raises(ConfigError, match="at least 256"):
        ByteLevelBPE.train(CORPUS, size)


@pytest.mark.parametrize("bad", ["\ud800", "ok \udfff", 3, None, b"bytes"])
def test_what_is_not_text_is_refused(bpe: ByteLevelBPE, bad: object) -> None:
    with pytest.raises(MediaError, match="text 1: "):
        bpe.encode(["fine", bad])
    with pytest.raises(MediaError, match="text 1: "):
        ByteLevelBPE.train(["fine", bad], 300)


def test_a_single_string_is_not_a_list(bpe: ByteLevelBPE) -> None:
    with pytest.raises(MediaError, match=r"encode\(\[text\]\)"):
        bpe.encode("text")


# --- arbitrary ids


@given(st.lists(st.integers(0, 399), max_size=40), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_any_ids_decode_and_stream_alike(bpe: ByteLevelBPE, ids: list[int], step: int) -> None:
    (data,) = bpe.decode_bytes([ids])
    (text,) = bpe.decode([ids])
    assert text == data.decode("utf-8", errors="replace")
    stream = bpe.stream()
    pieces = [stream.push(ids[i : i + step]) for i in range(0, len(ids), step)]
    assert "".join(pieces) + stream.finish() == text


def test_streaming_never_gives_half_a_character(bpe: ByteLevelBPE) -> None:
    text = "cow \U0001f404 é 日本 e\u0301 \U0001f468\u200d\U0001f469"
    (ids,) = bpe.encode([text])
    stream = StreamDecoder(bpe)
    pieces = [stream.push(int(i)) for i in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "" in pieces
    assert "".join(pieces) == text
    assert stream.finish() == ""
    single = bpe.encode(["\U0001f9ff"])[0]
    assert [stream.push(i) for i in single[:-1]] == [""] * (len(single) - 1)
    assert stream.finish() == "\ufffd"
    assert stream.push(bpe.encode(["a"])[0]) == "a", "usable again"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 400], "position 1: got text id 400, expected 0..399"),
        ([-1], "position 0: got text id -1"),
        (np.array([3, 2**40]), "position 1"),
        (np.array([2**63], np.uint64), "position 0"),
        ([0.5], "expected a sequence of integers"),
        ([True], "expected a sequence of integers"),
        ([[1, 2]], "expected a sequence of integers"),
        (["a"], "expected a sequence of integers"),
        (5, "expected a sequence of integers"),
    ],
)
def test_bad_ids(bpe: ByteLevelBPE, ids: object, message: str) -> None:
    with pytest.raises(VocabularyError, match=message):
        bpe.decode([ids])


# --- files


def test_save_and_load(bpe: ByteLevelBPE, tmp_path: Path) -> None:
    bpe.save(tmp_path / "text")
    assert sorted(p.name for p in (tmp_path / "text").iterdir()) == ["config.json", "mmtok.json", "tokenizer.json"]
    other = ByteLevelBPE.load(tmp_path / "text")
    assert other.fingerprint == bpe.fingerprint
    for a, b in zip(bpe.encode(NASTY), other.encode(NASTY), strict=True):
        np.testing.assert_array_equal(a, b)
    other.save(tmp_path / "again")
    for name in ("config.json", "mmtok.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "text" / name).read_bytes()


def test_pickles(bpe: ByteLevelBPE) -> None:
    other = pickle.loads(pickle.dumps(bpe))
    assert other.fingerprint == bpe.fingerprint
    np.testing.assert_array_equal(other.encode(["cow"])[0], bpe.encode(["cow"])[0])


def test_damaged_files(bpe: ByteLevelBPE, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        ByteLevelBPE.load(tmp_path / "missing")
    bpe.save(tmp_path / "text")
    file = tmp_path / "text" / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="sha256"):
        ByteLevelBPE.load(tmp_path / "text")
    bpe.save(tmp_path / "text")
    meta = tmp_path / "text" / "mmtok.json"
    meta.write_text(meta.read_text().replace("text-bpe", "encodec"))
    with pytest.raises(CheckpointError, match="holds a 'encodec', expected a 'text-bpe'"):
        ByteLevelBPE.load(tmp_path / "text")


def edit(bpe: ByteLevelBPE, change) -> str:
    spec = json.loads(bpe._files()["tokenizer.json"])
    change(spec)
    return json.dumps(spec)


ADDED = {
    "id": 400,
    "content": "<x>",
    "special": True,
    "normalized": False,
    "lstrip": False,
    "rstrip": False,
    "single_word": False,
}


TRUNCATION = {"direction": "Right", "max_length": 1_000_000, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["added_tokens"].append(ADDED), "added tokens"),
        (lambda s: s.update(normalizer={"type": "NFC"}), "normaliser"),
        (lambda s: s.update(truncation=TRUNCATION), "cuts texts off"),
        (lambda s: s["model"].update(dropout=0.1), "dropout"),
        (lambda s: s["model"].update(unk_token="a"), "unk_token"),
        (lambda s: s["model"].update(type="WordLevel"), "WordLevel"),
        (lambda s: s["model"]["vocab"].update({"日": 400}), "stands for no byte"),
        (lambda s: s["model"]["vocab"].update({"zzz": 900}), "without gaps"),
        (lambda s: s["model"]["merges"].append(["zz", "zz"]), "merge"),
        (lambda s: s.pop("model"), "model"),
        (lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "pre-tokenizer"),
        (lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "pre-tokenizer"),
    ],
)
def test_tokenizers_that_lose_text_are_refused(bpe: ByteLevelBPE, change, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ByteLevelBPE(edit(bpe, change))


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"model": 3}', "\x00"])
def test_what_is_no_tokenizer_json(text: str) -> None:
    with pytest.raises(MmtokError, match="BPE"):
        ByteLevelBPE(text)


def test_a_byte_without_an_id(bpe: ByteLevelBPE) -> None:
    spec = {"added_tokens": [], "normalizer": None, "pre_tokenizer": None, "decoder": None, "post_processor": None}
    spec |= {"version": "1.0", "truncation": None, "padding": None}
    model = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    spec["model"] = {**model, "type": "BPE", "vocab": {"a": 0}, "merges": []}
    with pytest.raises(CheckpointError, match="242 of the 243 bytes of UTF-8"):
        ByteLevelBPE(json.dumps(spec))

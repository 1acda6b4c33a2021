"""SentencePiece models: ids as in SentencePiece where it gives the text back, and every other string given back too."""

from __future__ import annotations

import functools
import io
import json
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from commands import refused, run
from hypothesis import given, settings
from hypothesis import strategies as st
from text_files import corpus

import mmtok
from mmtok.errors import CheckpointError, MediaError, VocabularyError
from mmtok.multimodal import MultimodalTokenizer
from mmtok.text import probes
from mmtok.text.published import SentencePieceText, import_sentencepiece
from mmtok.text.published import sentencepiece as module

SYMBOLS = {"control_symbols": ["<ctl>", "§"], "user_defined_symbols": ["<user>", "[INST]", "¤"]}
LLAMA = {
    "byte_fallback": True,
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}
GEMMA = {
    **LLAMA, "add_dummy_prefix": False, "control_symbols": ["<ctl>", "§"],
    "user_defined_symbols": ["<user>", "[INST]", "¤", "\n", "\n\n", "\t", *("\u2581" * n for n in range(2, 9))],
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, **SYMBOLS},
    "gemma": GEMMA,
    "unigram": {"byte_fallback": True, "model_type": "unigram", **SYMBOLS},  # nmt_nfkc, and superfluous spaces removed
    "plain unigram": {**LLAMA, "model_type": "unigram"},
}
LITERALS = [
    *probes.LITERALS[:50],
    "<user>",
    "<ctl>",
    "§",
    "¤",
    "[INST]",
    "<unk>",
    "<s>",
    "<0xE2>",
    "\u2581",
    " \u2581 ",
]
STRINGS = st.text(max_size=60) | st.lists(st.sampled_from(LITERALS)).map("".join)


def train(**settings: Any) -> bytes:
    """A model of 900 pieces."""
    return _train(json.dumps(settings))


@functools.cache
def _train(settings: str) -> bytes:
    lines = [line for text in corpus() for line in text.splitlines() if line.strip()]
    out = io.BytesIO()
    given = {"vocab_size": 900, "character_coverage": 0.997, "num_threads": 1, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, **given, **json.loads(settings)
    )
    return out.getvalue()


@pytest.fixture(scope="module", params=KINDS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[sentencepiece.SentencePieceProcessor, SentencePieceText]:
    """An original of each sort, and what was imported."""
    file = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    file.write_bytes(train(**KINDS[request.param]))
    imported = import_sentencepiece(file)
    assert imported.library == "sentencepiece"
    assert imported.compared is not None
    assert imported.compared > 80
    assert ("normalises text first" in " ".join(imported.notes)) == (request.param == "unigram")
    return sentencepiece.SentencePieceProcessor(model_file=str(file)), imported.tokenizer


def test_ids_are_those_of_sentencepiece(pair: tuple[Any, SentencePieceText]) -> None:
    original, tokenizer = pair
    rng = random.Random(0)
    letters = [*" \n\t'sAÀé日語.,-0\u0301\xa0\U0001f404", "the", "  ", "12345", "return"]
    fuzz = ["".join(rng.choices(letters, k=rng.randrange(40))) for _ in range(300)]
    lines = [line for text in corpus()[:3] for line in text.split("\n")]
    texts = [*corpus(), *lines, *(line.strip() for line in lines), *fuzz]
    originals = original.encode(texts)
    compared = 0
    for text, ids, expected in zip(texts, tokenizer.encode(texts), originals, strict=True):
        if original.decode(expected) == text and not any(x in text for x in SYMBOLS["user_defined_symbols"]):
            assert ids.tolist() == expected
            compared += 1
    assert compared > 2000
    assert tokenizer.decode(tokenizer.encode(texts)) == texts
    assert tokenizer.codebook_sizes == (original.get_piece_size(),)


@given(st.lists(STRINGS, min_size=1, max_size=4))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_every_string_comes_back_and_none_gives_a_symbol(pair: tuple[Any, SentencePieceText], texts: list[str]) -> None:
    original, tokenizer = pair
    ids = tokenizer.encode(texts)
    assert tokenizer.decode(ids) == texts
    stream = tokenizer.stream()
    for text, row in zip(texts, ids, strict=True):
        parts = [stream.push(id) for id in row]
        assert "\ufffd" in text or "\ufffd" not in "".join(parts)
        assert "".join(parts) + stream.finish() == text
    symbols = [i for i in range(original.get_piece_size()) if original.is_control(i) or original.is_unknown(i)]
    symbols += [original.piece_to_id(x) for x in SYMBOLS["user_defined_symbols"] if x in tokenizer.symbols]
    assert not np.isin(np.concatenate(ids), symbols).any()


def test_symbols_keep_their_ids(pair: tuple[Any, SentencePieceText]) -> None:
    original, tokenizer = pair
    assert {"<unk>", "<s>", "</s>"} <= set(tokenizer.symbols)
    for name in tokenizer.symbols:
        id = original.piece_to_id(name)
        assert tokenizer.decode([[id]]) == ["\ufffd" + name]
        assert tokenizer.decode(tokenizer.encode([name, f"a {name} b", name * 2])) == [name, f"a {name} b", name * 2]
    assert not any(name.replace("\u2581", " ").isspace() for name in tokenizer.symbols)


def test_a_user_defined_symbol_is_what_sentencepiece_itself_takes_from_text() -> None:
    model = train(**KINDS["llama"])
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    id = original.piece_to_id("<user>")
    assert id in original.encode("a <user> b")
    assert id not in SentencePieceText(model).encode(["a <user> b"])[0]


def test_runs_of_white_space_are_text_as_in_gemma() -> None:
    model = train(**GEMMA)
    original, tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model), SentencePieceText(model)
    text = "def f():\n\n    return\t1\n"
    assert tokenizer.encode([text])[0].tolist() == original.encode(text)
    assert original.piece_to_id("\n\n") in original.encode(text)


def test_one_space_in_front_is_the_models(pair: tuple[Any, SentencePieceText]) -> None:
    tokenizer = pair[1]
    for text in ("a", " a", "  a", " ", "", "\u2581", "\u2581a", " \u2581"):
        (ids,) = tokenizer.encode([text])
        assert tokenizer.decode([ids]) == [text]
        assert tokenizer.decode_bytes([ids]) == [text.encode()]
        assert (len(ids) == 0) == (text == "")
        assert ids.dtype == np.int64


def test_decoding_any_ids(pair: tuple[Any, SentencePieceText]) -> None:
    tokenizer = pair[1]
    ids = np.random.default_rng(0).integers(0, tokenizer.codebook_sizes[0], (50, 30))
    for row in ids:
        stream = tokenizer.stream()
        cut = int(row[0]) % 30
        assert stream.push(row[:cut]) + stream.push(row[cut:]) + stream.finish() == tokenizer.decode([row])[0]
    with pytest.raises(VocabularyError, match=r"position 1: got text id 900, expected 0\.\.899"):
        tokenizer.decode([[5, 900]])
    with pytest.raises(MediaError, match="lone surrogate"):
        tokenizer.encode(["a", "\ud800"])
    with pytest.raises(MediaError, match="expected a list of str"):
        tokenizer.encode("a")


def test_checkpoints_copies_and_vocabularies(tmp_path: Path) -> None:
    model = train(**KINDS["llama"])
    tokenizer = SentencePieceText(model)
    tokenizer.save(tmp_path / "text")
    assert (tmp_path / "text" / "tokenizer.model").read_bytes() == model
    loaded = mmtok.load(tmp_path / "text")
    assert isinstance(loaded, SentencePieceText)
    for other in (loaded, pickle.loads(pickle.dumps(tokenizer))):
        assert other.fingerprint == tokenizer.fingerprint
        np.testing.assert_array_equal(other.encode(["a cow"])[0], tokenizer.encode(["a cow"])[0])
    assert SentencePieceText(train(**KINDS["gemma"])).fingerprint != tokenizer.fingerprint
    multimodal = MultimodalTokenizer.create({"text": tokenizer})
    document = mmtok.Document([mmtok.Text(" <s> a\u2581cow </s>\n")])
    assert multimodal.decode(multimodal.encode(document)) == document
    (tmp_path / "text" / "tokenizer.model").write_bytes(model[:-1])
    with pytest.raises(CheckpointError, match="sha256"):
        mmtok.load(tmp_path / "text")


# --- what is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"byte_fallback": False}, "has no byte fallback, .* train it again with --byte_fallback=true"),
        ({"model_type": "char"}, "is a character model of SentencePiece, mmtok reads BPE and Unigram"),
        ({"model_type": "word"}, "is a word model"),
        ({"treat_whitespace_as_suffix": True}, "marks spaces in a way"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    (tmp_path / "a.model").write_bytes(train(**{**LLAMA, "hard_vocab_limit": False, **given}))
    with pytest.raises(CheckpointError, match=rf"a\.model: {message}") as stop:
        import_sentencepiece(tmp_path / "a.model")
    assert "\n" not in str(stop.value)


def edited(change: Any) -> bytes:
    proto = module._message_class()()
    proto.ParseFromString(train(**KINDS["llama"]))
    change(proto)
    return proto.SerializeToString()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: setattr(p.pieces[600], "score", float("nan")), "a score is no finite number"),
        (lambda p: setattr(p.pieces[600], "piece", b"\xff"), "a piece is not UTF-8"),
        (lambda p: setattr(p.pieces[600], "piece", p.pieces[601].piece), "already defined"),
        (lambda p: setattr(p.pieces[600], "piece", b"a\0b"), "sentencepiece cannot use the model"),
        (lambda p: setattr(p.pieces[600], "piece", b""), "sentencepiece cannot use the model"),
        (lambda p: setattr(p.pieces[100], "piece", b"<0xZZ>"), "has no byte fallback"),
        (lambda p: p.ClearField("pieces"), "has no byte fallback"),
    ],
)
def test_impossible_models(change: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as stop:
        SentencePieceText(edited(change))
    assert "\n" not in str(stop.value)


def test_damage_is_one_line_or_harmless() -> None:
    model, rng = train(**KINDS["llama"]), random.Random(0)
    found = 0
    for n in range(120):
        data = bytearray(model)
        if n % 3 == 0:
            del data[rng.randrange(len(data)) :]
        elif n % 3 == 1:
            data[rng.randrange(len(data))] = rng.randrange(256)
        else:
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(50)] = rng.randbytes(rng.randrange(50))
        try:
            tokenizer = SentencePieceText(bytes(data))
        except CheckpointError as error:
            found += "\n" not in str(error)
        else:
            texts = ["The cow\u2581 <s> 日本", corpus()[0][:300]]
            assert tokenizer.decode(tokenizer.encode(texts)) == texts
    assert found > 60


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"<!doctype html>", b"{}", bytes(range(256)) * 9, b"\x0a\xff\xff\xff\xff\x0f"]
)
def test_files_that_are_no_models(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model") as stop:
        import_sentencepiece(tmp_path)
    assert "\n" not in str(stop.value)
    with (tmp_path / "tokenizer.model").open("r+b") as f:
        f.truncate(1_000_000_000)
    with pytest.raises(CheckpointError, match="more than any tokenizer"):
        import_sentencepiece(tmp_path)
    with pytest.raises(CheckpointError, match="no file at"):
        import_sentencepiece(tmp_path / "none")


@pytest.mark.parametrize(
    ("code", "reason"), [("import os; os.abort()", "ended with -6"), ("raise ValueError('no\\nt')", "t")]
)
def test_a_model_that_breaks_sentencepiece_does_not_break_mmtok(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    monkeypatch.setattr(module, "_ORIGINAL", code)
    (tmp_path / "a.model").write_bytes(train(**KINDS["llama"]))
    with pytest.raises(CheckpointError, match=rf"sentencepiece itself cannot use the model \(.*{reason}\)") as stop:
        import_sentencepiece(tmp_path / "a.model")
    assert "\n" not in str(stop.value)


def test_without_sentencepiece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    SentencePieceText(train(**KINDS["llama"])).save(tmp_path / "text")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(CheckpointError, match=r"pip install 'mmtok\[sentencepiece\]'"):
        mmtok.load(tmp_path / "text")
    file = tmp_path / "text" / "tokenizer.model"
    assert "needs the packages" in refused("import", "sentencepiece", file, "-o", tmp_path / "b", capsys=capsys)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.model").write_bytes(train(**KINDS["unigram"]))
    arguments = ("import", "sentencepiece", tmp_path / "a.model", "-o", tmp_path / "a")
    code, stdout, stderr = run(*arguments, "--json", capsys=capsys)
    assert (code, stderr) == (0, "")
    report = json.loads(stdout)
    assert (report["kind"], report["codes"], report["library"]) == ("text-sentencepiece", 900, "sentencepiece")
    assert report["fingerprint"] == mmtok.load(tmp_path / "a").fingerprint
    code, stdout, _ = run(*arguments, capsys=capsys)
    assert code == 0
    assert f"900 ids, those of sentencepiece on all {report['compared']} texts compared" in stdout
    assert [line.startswith("note: ") for line in stdout.splitlines()] == [False, True, True]

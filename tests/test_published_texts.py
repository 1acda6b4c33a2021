"""tokenizer.json and .tiktoken files: ids as in the original library, every string back, no id of a special token."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import random
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from commands import refused, run
from hypothesis import given, settings
from hypothesis import strategies as st
from text_files import added, corpus, shifted, token_bytes, trained, write, write_tiktoken
from tokenizers import Tokenizer

import mmtok
from mmtok.errors import CheckpointError
from mmtok.export import export_hf
from mmtok.multimodal import MultimodalTokenizer
from mmtok.text import ByteLevelBPE, probes
from mmtok.text.published import ENCODINGS, import_tiktoken, import_tokenizers

STRINGS = st.text(max_size=60) | st.lists(st.sampled_from([*probes.LITERALS[:40], "<tool_call>", "<s>"])).map("".join)


def gpt2() -> dict[str, Any]:
    """GPT-2's: its own words, no type, the special token at the end and in the vocabulary."""
    spec = copy.deepcopy(trained())
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    spec["model"]["vocab"]["<|endoftext|>"] = 1000
    spec["added_tokens"] = [added(1000, "<|endoftext|>", normalized=True)]
    del spec["model"]["type"]
    return spec


def llama3() -> dict[str, Any]:
    """Llama 3's: words that are tokens without merges, special tokens behind the vocabulary with a gap, a template."""
    spec = copy.deepcopy(trained())
    spec["model"]["ignore_merges"] = True
    spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if "".join(pair) not in ("Ġthe", "self")]
    assert len(spec["model"]["merges"]) < len(trained()["model"]["merges"])
    spec["added_tokens"] = [added(1000, "<|begin_of_text|>"), added(1001, "<|end|>")]
    single = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
    both = [single, {"Sequence": {"id": "A", "type_id": 0}}]
    begin = {"<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [1000], "tokens": ["<|begin_of_text|>"]}}
    spec["post_processor"] = {"type": "TemplateProcessing", "single": both, "pair": both, "special_tokens": begin}
    spec["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    return spec


def qwen() -> dict[str, Any]:
    """Qwen's: text is normalised first; tokens for calls of tools, which are not special."""
    spec = copy.deepcopy(trained())
    spec["normalizer"] = {"type": "NFC"}
    spec["added_tokens"] = [added(1000, "<|im_start|>"), added(1001, "<tool_call>", special=False)]
    return spec


def neox() -> dict[str, Any]:
    """GPT-NeoX: special tokens in front, no ids for bytes that UTF-8 lacks, runs of spaces as added tokens."""
    spec = copy.deepcopy(trained(alphabet=False))
    spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    spec["model"]["vocab"] = {"<|endoftext|>": 0, "<|padding|>": 1, **shifted(spec, 2)}
    size = len(spec["model"]["vocab"])
    runs = [n for n in range(24, 1, -1) if "Ġ" * n in spec["model"]["vocab"]]
    assert len(runs) > 4
    spaces = [added(size + i, " " * n, special=False, normalized=True) for i, n in enumerate(runs)]
    spec["added_tokens"] = [added(0, "<|endoftext|>"), added(1, "<|padding|>"), *spaces]
    return spec


MAKERS: tuple[Callable[[], dict[str, Any]], ...] = (gpt2, llama3, qwen, neox)


@pytest.fixture(scope="module", params=MAKERS, ids=lambda make: make.__name__)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, ByteLevelBPE]:
    """An original of each sort, and what was imported."""
    file = write(tmp_path_factory.mktemp("hf") / "tokenizer.json", request.param())
    original = Tokenizer.from_file(str(file))
    original.no_truncation()
    imported = import_tokenizers(file)
    assert imported.library == "tokenizers"
    assert imported.compared is not None
    assert imported.compared > 200
    return original, imported.tokenizer


def silent(original: Tokenizer) -> dict[int, str]:
    return {i: t.content for i, t in original.get_added_tokens_decoder().items() if not t.content.isspace()}


def test_ids_are_those_of_tokenizers(pair: tuple[Tokenizer, ByteLevelBPE]) -> None:
    original, tokenizer = pair
    texts = [unicodedata.normalize("NFC", text) for text in corpus()]
    assert tokenizer.codebook_sizes == (original.get_vocab_size(),)
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        assert ids.tolist() == original.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode(texts)) == texts


@given(st.lists(STRINGS, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_string_comes_back_and_none_gives_a_special_token(
    pair: tuple[Tokenizer, ByteLevelBPE], texts: list[str]
) -> None:
    original, tokenizer = pair
    texts = [*texts, *silent(original).values(), "".join(silent(original).values())]
    ids = tokenizer.encode(texts)
    assert tokenizer.decode(ids) == texts
    assert not set(np.concatenate(ids).tolist()) & silent(original).keys()


def test_ids_of_special_tokens_keep_their_numbers(pair: tuple[Tokenizer, ByteLevelBPE]) -> None:
    original, tokenizer = pair
    for id, name in silent(original).items():
        assert tokenizer.decode([[id]]) == ["\ufffd" + name]
        assert original.encode(name, add_special_tokens=False).ids == [id], "the original reads it in text"
    plain = [i for i in range(tokenizer.codebook_sizes[0]) if i not in silent(original)]
    for id in plain:
        assert tokenizer.decode([[id]])[0].lstrip("\ufffd") == original.decode([id]).lstrip("\ufffd")


def test_a_checkpoint_of_it(pair: tuple[Tokenizer, ByteLevelBPE], tmp_path: Path) -> None:
    tokenizer = pair[1]
    tokenizer.save(tmp_path / "text")
    loaded = mmtok.load(tmp_path / "text")
    assert loaded.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(loaded.encode([corpus()[0]])[0], tokenizer.encode([corpus()[0]])[0])


def test_it_can_be_in_a_vocabulary_and_exported(tmp_path: Path) -> None:
    tokenizer = import_tokenizers(write(tmp_path / "tokenizer.json", neox())).tokenizer
    model = MultimodalTokenizer.create({"text": tokenizer})
    document = mmtok.Document([mmtok.Text("    <|endoftext|> x\n  y")])
    assert model.decode(model.encode(document)) == document
    export_hf(model.registry, model.tokenizers, tmp_path / "hf")
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_a_special_token_that_merges_would_make(tmp_path: Path) -> None:
    spec = copy.deepcopy(trained())
    id = spec["model"]["vocab"]["self"]
    spec["added_tokens"] = [added(id, "self")]
    imported = import_tokenizers(write(tmp_path / "tokenizer.json", spec))
    texts = ["self", " self.x", "itself", "selfless"]
    ids = imported.tokenizer.encode(texts)
    assert imported.tokenizer.decode(ids) == texts
    assert id not in np.concatenate(ids)


def test_a_byte_level_unigram_model(tmp_path: Path) -> None:
    spec = copy.deepcopy(trained())
    tokens = spec["model"]["vocab"]
    pieces = [("<unk>", 0.0), *((token, -8.0 - len(tokens) / 1e4 + i / 1e5) for i, token in enumerate(tokens))]
    spec["model"] = {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False}
    spec["added_tokens"] = [added(0, "<unk>")]
    original = Tokenizer.from_str(json.dumps(spec))
    tokenizer = import_tokenizers(write(tmp_path / "tokenizer.json", spec)).tokenizer
    assert (tokenizer.kind, tokenizer.codebook_sizes) == ("text-unigram", (len(pieces),))
    for text, ids in zip(corpus(), tokenizer.encode(corpus()), strict=True):
        assert ids.tolist() == original.encode(text).ids
    texts = ["<unk>", "\x00", "日本<unk>"]
    assert tokenizer.decode(tokenizer.encode(texts)) == texts
    assert 0 not in np.concatenate(tokenizer.encode(texts))


def test_a_space_before_each_text_is_left_out(tmp_path: Path) -> None:
    spec = copy.deepcopy(trained())
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    imported = import_tokenizers(write(tmp_path / "tokenizer.json", spec))
    original = Tokenizer.from_str(json.dumps(spec))
    assert any("space before each text" in note for note in imported.notes)
    assert imported.tokenizer.decode(imported.tokenizer.encode(["cow", " cow"])) == ["cow", " cow"]
    assert imported.tokenizer.encode([" cow and"])[0].tolist() == original.encode("cow and").ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["model"].update(type="WordPiece"), "holds a WordPiece model, which loses"),
        (lambda s: s["model"]["vocab"].pop("a"), r"not byte-level; .* mmtok import sentencepiece"),
        (lambda s: s["model"]["vocab"].update(zzz=10**9), "id 1000000000, expected fewer"),
        (lambda s: s["model"].pop("vocab"), "is no tokenizer.json"),
        (lambda s: s["model"].update(vocab=3), "is no tokenizer.json"),
        (lambda s: s.pop("model"), "is no tokenizer.json"),
        (lambda s: s["model"]["merges"].append(["zz", "qqq"]), "is damaged or no tokenizer.json"),
        (lambda s: s["model"].update(end_of_word_suffix="</w>"), "sets end_of_word_suffix"),
        (lambda s: s["pre_tokenizer"].update(type="Nothing"), "is damaged or no tokenizer.json"),
        (lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "pre-tokenizer changes or drops"),
        (lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "pre-tokenizer changes"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, change: Callable[[dict], Any], message: str) -> None:
    spec = copy.deepcopy(trained())
    change(spec)
    with pytest.raises(CheckpointError, match=message) as stop:
        import_tokenizers(write(tmp_path / "tokenizer.json", spec))
    assert "\n" not in str(stop.value)
    assert str(tmp_path) in str(stop.value)


# --- tiktoken


def reference(ranks: dict[bytes, int], name: str) -> tiktoken.Encoding:
    pattern = ENCODINGS[name].pattern if name in ENCODINGS else name
    return tiktoken.Encoding("reference", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def nonsense(seed: int, size: int) -> dict[bytes, int]:
    """Ranks that no training gives: parts that rank behind their whole, tokens that no merge makes, a gap."""
    rng = random.Random(seed)
    tokens = {bytes([byte]): None for byte in range(256)}
    words = [word for text in corpus()[:2] for word in text.split(" ")]
    while len(tokens) < size:
        data = (rng.choice(("", " ")) + rng.choice(words)).encode()
        start = rng.randrange(max(1, len(data)))
        tokens.setdefault(data[start : start + rng.randrange(1, 12)] or b" ", None)
    order = list(tokens)
    rng.shuffle(order)
    return {token: rank + (rank > 999) for rank, token in enumerate(order)}


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base", ENCODINGS["cl100k_base"].pattern])
@pytest.mark.parametrize("sort", ["trained", "nonsense"])
def test_ids_are_those_of_tiktoken(tmp_path: Path, name: str, sort: str) -> None:
    ranks = token_bytes(trained()) if sort == "trained" else nonsense(0, 3000)
    imported = import_tiktoken(write_tiktoken(tmp_path / "a.tiktoken", ranks), name)
    original = reference(ranks, name)
    rng = random.Random(1)
    letters = [*" \n\t\r's1aÀẞſ日é\u0301.,-\U0001f404", "the", "  ", "12345", "'LL", "\xa0"]
    fuzz = ["".join(rng.choices(letters, k=rng.randrange(40))) for _ in range(500)]
    points = [rng.choices(range(0x110000), k=20) for _ in range(200)]
    fuzz += ["".join(chr(p) for p in row if not 0xD800 <= p < 0xE000) for row in points]
    texts = [*corpus(), *probes.LITERALS, *fuzz]
    found = imported.tokenizer.encode(texts)
    assert [ids.tolist() for ids in found] == original.encode_ordinary_batch(texts)
    assert imported.tokenizer.decode(found) == texts
    assert imported.compared is not None
    assert imported.compared > 300
    whole = [note for note in imported.notes if "no result of merges" in note]
    assert len(whole) == (sort == "nonsense")


def test_a_file_of_real_size_with_the_special_tokens_of_its_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = nonsense(2, 12_000)
    ranks = dict(zip(ranks, [rank for rank in range(12_001) if rank != 11_000], strict=True))
    special = {"<|endoftext|>": 11_000, "<|endofprompt|>": 12_019}
    fake = dataclasses.replace(ENCODINGS["cl100k_base"], size=12_000, special=special)
    monkeypatch.setitem(ENCODINGS, "cl100k_base", fake)
    imported = import_tiktoken(write_tiktoken(tmp_path / "cl100k_base.tiktoken", ranks))
    tokenizer = imported.tokenizer
    assert tokenizer.codebook_sizes == (12_020,)
    names = ["\ufffd<|endoftext|>", "\ufffd<|endofprompt|>", "\ufffd<|unused_12010|>"]
    assert tokenizer.decode([[11_000], [12_019], [12_010]]) == names
    texts = [*corpus(), *special, "<|unused_12010|>", *names]
    found = tokenizer.encode(texts)
    assert [ids.tolist() for ids in found] == reference(ranks, "cl100k_base").encode_ordinary_batch(texts)
    assert tokenizer.decode(found) == texts


def test_published_encodings_are_tiktokens_own() -> None:
    public = pytest.importorskip("tiktoken_ext.openai_public")
    for name, encoding in ENCODINGS.items():
        public.load_tiktoken_bpe = public.data_gym_to_mergeable_bpe_ranks = lambda *_, **__: {}
        value = getattr(public, name)()
        assert (value["pat_str"], value["special_tokens"]) == (encoding.pattern, encoding.special)
        if "explicit_n_vocab" in value:
            assert value["explicit_n_vocab"] == encoding.size + 1


LINES = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\n", "256 of the 256 bytes have no rank"),
        (b"\n".join(LINES[:-1]), "cut short .*: 1 of the 256 bytes"),
        (b"\n".join(LINES)[:-9], "damaged or no .tiktoken file: line 255|cut short"),
        (b"\n".join([*LINES, LINES[7]]), r"line 257 has a token or a rank \(7\) that stands there already"),
        (b"\n".join([*LINES, b"YWI= 7"]), r"line 257 has a token or a rank \(7\)"),
        (b"\n".join([*LINES, b"YW*= 300"]), r"line 257 is b'YW\*= 300'"),
        (b"\n".join([*LINES, b"YWI= -3"]), "line 257"),
        (b"\n".join([*LINES, b"YWI= 12345678901234567890"]), "line 257"),
        (b"\n".join([*LINES, b"YWI= 1_000"]), "line 257"),
        (b"\n".join([*LINES, b"YWI= 000000000300"]), "line 257"),
        (b"\n".join([*LINES, b"YWI= 300 4"]), "line 257"),
        (b"\n".join([*LINES, base64.b64encode(b"a" * 5000) + b" 300"]), "line 257 has a token of 5000 bytes"),
        (b"<!doctype html>", "damaged or no .tiktoken file: line 1 is b'<!doctype html>'"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (bytes(range(256)), "line 1"),
    ],
)
def test_damaged_tiktoken_files(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.tiktoken").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as stop:
        import_tiktoken(tmp_path / "a.tiktoken", "gpt2")
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (None, "give --pattern, one of gpt2"),
        ("cl100k", "'cl100k' names no way"),
        ("(a", "cannot use the pattern '\\(a'"),
        (r"(ab){1,2}+|\S", "repeats a group"),
    ],
)
def test_patterns(tmp_path: Path, pattern: str | None, message: str) -> None:
    file = write_tiktoken(tmp_path / "mine.tiktoken", token_bytes(trained()))
    with pytest.raises(CheckpointError, match=message):
        import_tiktoken(file, pattern)


def test_without_tiktoken_nothing_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    imported = import_tiktoken(write_tiktoken(tmp_path / "a.tiktoken", token_bytes(trained())), "gpt2")
    assert imported.compared is None
    assert imported.tokenizer.engine != "tiktoken"


# --- files and the command


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": {"vocab": []}}'])
def test_what_is_no_tokenizer_json(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json") as stop:
        import_tokenizers(tmp_path)
    assert "\n" not in str(stop.value)


def test_files_cut_short_or_too_large(tmp_path: Path) -> None:
    file = write(tmp_path / "tokenizer.json", gpt2())
    whole = file.read_bytes()
    for length in (1, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"is no tokenizer\.json"):
            import_tokenizers(file)
    with file.open("r+b") as f:
        f.truncate(1_000_000_000)
    for importer in (import_tokenizers, lambda path: import_tiktoken(path, "gpt2")):
        with pytest.raises(CheckpointError, match="1,000,000,000 bytes, more than any tokenizer"):
            importer(file)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = write(tmp_path / "tokenizer.json", qwen())
    code, stdout, stderr = run("import", "tokenizers", tmp_path, "-o", tmp_path / "a", "--json", capsys=capsys)
    assert (code, stderr) == (0, "")
    report = json.loads(stdout)
    assert report.pop("compared") > 200
    notes = report.pop("notes")
    assert [n.split(" ")[0] for n in notes] == ["2", "the"]
    assert report == {
        "system": "tokenizers", "source": str(tmp_path), "out": str(tmp_path / "a"), "kind": "text-bpe", "codes": 1002,
        "library": "tokenizers", "fingerprint": mmtok.load(tmp_path / "a").fingerprint,
    }  # fmt: skip
    code, stdout, _ = run("import", "tokenizers", file, "-o", tmp_path / "a", capsys=capsys)
    assert code == 0
    assert "1002 ids, those of tokenizers on all " in stdout
    assert stdout.count("\nnote: ") == 2
    ranks = write_tiktoken(tmp_path / "mine.tiktoken", token_bytes(trained()))
    code, stdout, _ = run("import", "tiktoken", ranks, "-o", tmp_path / "b", "--pattern", "gpt2", capsys=capsys)
    assert code == 0
    assert "1000 ids, those of tiktoken on all " in stdout
    assert "--pattern" in refused("import", "tiktoken", ranks, "-o", tmp_path / "c", capsys=capsys)
    given = ("import", "tokenizers", file, "-o", tmp_path / "c", "--pattern", "gpt2")
    assert "leave it out" in refused(*given, capsys=capsys)
    assert not (tmp_path / "c").exists()

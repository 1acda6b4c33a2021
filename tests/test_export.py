"""Exported vocabularies: the same ids under transformers as here, and no text that becomes anything but text."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mmtok import export
from mmtok.errors import CheckpointError, VocabularyError, VocabularyMismatchError
from mmtok.export import export_hf, exported, names_of_ids
from mmtok.multimodal import MultimodalTokenizer, spec_of
from mmtok.registry import TokenizerSpec, VocabularyRegistry
from mmtok.text import ByteLevelBPE
from mmtok.transformer import Transformer
from mmtok.transformer.model import TransformerConfig

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
from transformers import AutoModelForCausalLM, AutoTokenizer

SAMPLES = ["a cow and a calf <image> </image>", "une vache <|image:5|> <|image:12|>", "image image 5 audio <bos>"] * 3


@pytest.fixture(scope="module")
def text() -> ByteLevelBPE:
    return ByteLevelBPE.train(SAMPLES, 300)


@pytest.fixture(scope="module")
def registry(text: ByteLevelBPE) -> VocabularyRegistry:
    """Everything that a vocabulary can hold: head-room, several tokenizers of a modality, a delayed layout."""
    specs = [
        spec_of("words", text, headroom=3),
        TokenizerSpec("letters", "text", (7,), "sha-letters"),
        TokenizerSpec("vq", "image", (20,), "sha-vq", headroom=5),
        TokenizerSpec("rvq", "audio", (6, 4), "sha-rvq", layout="delayed:0,1"),
    ]
    return VocabularyRegistry.create(specs, max_grid=9).extend([TokenizerSpec("vq2", "image", (8,), "sha-vq2")])


@pytest.fixture(scope="module")
def directory(registry: VocabularyRegistry, text: ByteLevelBPE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "hf"
    export_hf(registry, {"words": text}, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path):
    return AutoTokenizer.from_pretrained(directory)


def crafted(tokens: list[str], merges: list[tuple[str, str]], **settings: object) -> ByteLevelBPE:
    """A text tokenizer of the 256 bytes, further tokens and these merges, that does not cut text into words."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {token: 256 + i for i, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, **settings))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return ByteLevelBPE(made.to_str())


def merged(word: str) -> ByteLevelBPE:
    """A text tokenizer in which this word is one token."""
    tokens = [word[:n] for n in range(2, len(word) + 1)]
    return crafted(tokens, [(word[: n - 1], word[n - 1]) for n in range(2, len(word) + 1)])


def test_the_names_of_ids(registry: VocabularyRegistry, tokenizer) -> None:
    assert len(tokenizer) == tokenizer.vocab_size == registry.padded_size
    tokens = tokenizer.convert_ids_to_tokens(list(range(registry.padded_size)))
    assert len(set(tokens)) == registry.padded_size
    assert tokenizer.convert_tokens_to_ids(tokens) == list(range(registry.padded_size))
    named = {
        "<image>": registry.opening("vq"),
        "</image:vq2>": registry.closing("vq2"),
        "<fill:audio>": registry.fill("rvq"),
        "<|grid:7|>": registry.block("grid").start + 6,
        "<|image:5|>": registry.block("image").start + 5,
        "<|image:vq2:7|>": registry.block("image:vq2").start + 7,
        "<|audio.1:3|>": registry.block("audio.1").start + 3,
        "<|text:letters:6|>": registry.block("text:letters").start + 6,
    }
    assert tokenizer.convert_tokens_to_ids(list(named)) == list(named.values())
    free = [i for i in range(registry.padded_size) if registry.describe(i) == f"unused id {i}"]
    assert free  # head-room and padding
    assert [tokens[i] for i in free] == [f"<|unused:{i}|>" for i in free]
    roles = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert roles == (registry.pad, registry.bos, registry.eos)
    control = [registry.control(name) for b in registry.blocks for name in b.names]
    assert sorted(tokenizer.all_special_ids) == control
    cow = tokenizer("a cow")["input_ids"]
    assert tokenizer.decode([registry.bos, *cow, registry.eos], skip_special_tokens=True) == "a cow"


LITERALS = [
    "<image>",
    "</image:vq2>",
    "<fill:audio>",
    "<bos>",
    "<pad>",
    "<|image:5|>",
    "<|grid:7|>",
    "<|unused:0|>",
    "<",
]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.sampled_from(LITERALS), st.text(st.characters(exclude_categories=["Cs"])))).map("".join))
def test_text_has_the_ids_of_the_text_tokenizer(
    registry: VocabularyRegistry, text: ByteLevelBPE, tokenizer, sample: str
) -> None:
    ids = text.encode([sample])[0] + registry.block("text").start
    assert tokenizer(sample)["input_ids"] == tokenizer.encode(sample) == tokenizer([sample])["input_ids"][0]
    assert tokenizer(sample)["input_ids"] == ids.tolist()
    assert tokenizer.decode(ids.tolist()) == sample


def test_control_tokens_of_text_only_on_demand(registry: VocabularyRegistry, tokenizer) -> None:
    opening = registry.opening("vq")
    assert tokenizer("<image>", split_special_tokens=False)["input_ids"] == [opening]
    assert opening not in tokenizer("<image>")["input_ids"]  # the setting does not stay
    assert "<image>" not in tokenizer.tokenize("<image>")


def test_the_vocabulary_travels_along(registry: VocabularyRegistry, directory: Path, tokenizer, tmp_path: Path) -> None:
    assert exported(directory) == registry
    assert sorted(p.name for p in directory.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    tokenizer.save_pretrained(tmp_path / "again")
    assert exported(tmp_path / "again") == registry
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.get_vocab() == tokenizer.get_vocab()
    for sample in (*SAMPLES, *LITERALS):
        assert again(sample)["input_ids"] == tokenizer(sample)["input_ids"]


def test_beside_the_weights_of_a_transformer(text: ByteLevelBPE, tmp_path: Path) -> None:
    text.save(tmp_path / "words")
    mm = MultimodalTokenizer.create({"words": text})
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = TransformerConfig(mm.registry.padded_size, **sizes, num_key_value_heads=1, head_dim=16)
    torch.manual_seed(0)
    model = Transformer(config).eval()
    home = tmp_path / "model"
    model.save(home, mm.registry.to_json())
    before = {p.name: p.read_bytes() for p in home.iterdir()}
    for _ in range(2):  # a second export takes the place of the first
        export_hf(mm.registry, mm.tokenizers, home)
    after = {p.name: p.read_bytes() for p in home.iterdir()}
    assert {name: after[name] for name in before} == before
    assert sorted(set(after) - set(before)) == ["tokenizer.json", "tokenizer_config.json"]

    theirs = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32).eval()
    batch = AutoTokenizer.from_pretrained(home)(["a cow <image>", "a"], padding=True, return_tensors="pt")
    start = mm.registry.block("text").start
    assert batch["input_ids"][0].tolist() == (text.encode(["a cow <image>"])[0] + start).tolist()
    assert set(batch["input_ids"][1, 1:].tolist()) == {mm.registry.pad}
    with torch.no_grad():
        assert torch.allclose(theirs(**batch).logits[0], model(batch["input_ids"])[0], atol=1e-5)
    assert Transformer.load(home).registry == mm.registry
    assert MultimodalTokenizer.load(home).registry == mm.registry

    other = VocabularyRegistry.create([*mm.registry.tokenizers], max_grid=5)
    with pytest.raises(VocabularyMismatchError, match=r"vocab\.json"):
        export_hf(other, {"words": text}, home)
    assert {p.name: p.read_bytes() for p in home.iterdir()} == after


def test_other_files_are_left_alone(registry: VocabularyRegistry, text: ByteLevelBPE, tmp_path: Path) -> None:
    text.save(tmp_path / "words")
    before = (tmp_path / "words" / "tokenizer.json").read_bytes()
    with pytest.raises(CheckpointError, match="no export of mmtok"):
        export_hf(registry, {"words": text}, tmp_path / "words")
    assert (tmp_path / "words" / "tokenizer.json").read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        export_hf(registry, {"words": text}, tmp_path / "file")


@pytest.mark.parametrize("word", ["<image>", "<|audio.0:2|>", "<|unused:999|>", "<|image:5|>"])
def test_a_text_token_that_reads_like_an_id(word: str, tmp_path: Path) -> None:
    text = merged(word)
    specs = [spec_of("words", text, headroom=800), TokenizerSpec("vq", "image", (8,), "v")]
    registry = VocabularyRegistry.create([*specs, TokenizerSpec("rvq", "audio", (4,), "a")])
    with pytest.raises(VocabularyError, match="would both be the token"):
        export_hf(registry, {"words": text}, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_whole_words_of_the_vocabulary(tmp_path: Path) -> None:
    """``ignore_merges`` would turn the text <image>, if it is one word, into the control token."""
    merges = [("c", "o"), ("co", "w")]
    text = crafted(["co", "cow"], merges, ignore_merges=True)
    registry = VocabularyRegistry.create([spec_of("words", text), TokenizerSpec("vq", "image", (8,), "v")])
    export_hf(registry, {"words": text}, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for sample in ("<image>", "<|image:5|>", "cow", "cows", "co"):
        assert tokenizer(sample)["input_ids"] == (text.encode([sample])[0] + registry.block("text").start).tolist()

    text = crafted(["co", "cow", "calf"], merges, ignore_merges=True)
    registry = VocabularyRegistry.create([spec_of("words", text), TokenizerSpec("vq", "image", (8,), "v")])
    with pytest.raises(VocabularyError, match=r"ignore_merges .*1 of its tokens \('calf'\)"):
        export_hf(registry, {"words": text}, tmp_path / "none")


def test_the_text_tokenizer_must_be_the_vocabularys(
    registry: VocabularyRegistry, text: ByteLevelBPE, tmp_path: Path
) -> None:
    for tokenizers in ({}, {"letters": text}, {"words": ByteLevelBPE.train(["other"], 260)}):
        with pytest.raises(VocabularyMismatchError, match="'words': got"):
            export_hf(registry, tokenizers, tmp_path / "hf")
    with pytest.raises(VocabularyError, match="no text tokenizer"):
        export_hf(VocabularyRegistry.create([TokenizerSpec("vq", "image", (8,), "v")]), {}, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def swap(value: dict) -> None:
    vocab = value["model"]["vocab"]
    vocab["<|image:0|>"], vocab["<|image:1|>"] = vocab["<|image:1|>"], vocab["<|image:0|>"]


def unmerge(value: dict) -> None:
    value["model"]["merges"].pop()


def expose(value: dict) -> None:
    value["added_tokens"].append({**value["added_tokens"][0], "id": 9, "content": "<|image:0|>", "special": False})


@pytest.mark.parametrize("damage", [swap, unmerge, expose])
def test_a_wrong_export_is_never_put_in_place(
    damage, registry: VocabularyRegistry, text: ByteLevelBPE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_hf(registry, {"words": text}, tmp_path / "old")
    before = {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()}
    right = export._tokenizer_json

    def wrong(*arguments: object) -> str:
        value = json.loads(right(*arguments))
        damage(value)
        return json.dumps(value)

    monkeypatch.setattr(export, "_tokenizer_json", wrong)
    for name in ("old", "new"):
        with pytest.raises(VocabularyError, match="nothing was written"):
            export_hf(registry, {"words": text}, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()} == before


def test_a_damaged_export_is_refused(registry: VocabularyRegistry, text: ByteLevelBPE, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        exported(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    for junk in ("", "[]", "{}", '{"mmtok": 3}', '{"mmtok": {}}'):
        config.write_text(junk)
        with pytest.raises(CheckpointError, match="carries no vocabulary"):
            exported(tmp_path)
    config.unlink()
    export_hf(registry, {"words": text}, tmp_path)
    good = json.loads(config.read_text())
    good["mmtok"]["registry"]["revision"] = 7
    config.write_text(json.dumps(good))
    with pytest.raises(VocabularyMismatchError):
        exported(tmp_path)
    good["mmtok"]["registry"]["blocks"].pop()
    config.write_text(json.dumps(good))
    with pytest.raises(VocabularyError, match=r"tokenizer_config\.json"):
        exported(tmp_path)


def test_a_large_vocabulary_loads_quickly(text: ByteLevelBPE, tmp_path: Path) -> None:
    codes = [TokenizerSpec("vq", "image", (2**16,), "v"), TokenizerSpec("rvq", "audio", (9375,) * 8, "a")]
    registry = VocabularyRegistry.create([spec_of("words", text), *codes])
    export_hf(registry, {"words": text}, tmp_path / "hf")
    start = time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert time.process_time() - start < 2  # 0.2 s of one core; with every code an added token it is more than 4
    assert len(tokenizer) == registry.padded_size > 140_000


def test_a_text_token_spells_its_bytes(registry: VocabularyRegistry, text: ByteLevelBPE) -> None:
    names = names_of_ids(registry, text)
    block = registry.block("text")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2: the others are from U+0100 on
    others = [b for b in range(256) if b not in printable]
    byte_of = {**{chr(b): b for b in printable}, **{chr(256 + n): b for n, b in enumerate(others)}}
    spelled = [bytes(byte_of[c] for c in name) for name in names[block.start : block.end]]
    assert spelled == text.decode_bytes(list(np.arange(block.size)[:, None]))


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "hf_export.py"
    spec = importlib.util.spec_from_file_location("hf_export", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_check_without_mmtok(benchmark: ModuleType, tmp_path: Path) -> None:
    out, results = tmp_path / "hf", tmp_path / "results.json"
    benchmark.make("any-to-any", 100, out)
    benchmark.check(out, results)
    (figures,) = json.loads(results.read_text()).values()
    assert figures["ids_compared"] == exported(out).padded_size
    assert figures["texts_compared"] > 3000
    good = json.loads((out / "expected.json").read_text())
    for key, change in (
        ("padded_size", 1),
        ("fingerprint", "0"),
        ("roles", {"pad": 1}),
        ("meaning", [*good["meaning"][:-1], "image code 5"]),
        ("texts", [{"text": "a", "ids": [5]}]),
    ):
        (out / "expected.json").write_text(json.dumps({**good, key: change}))
        with pytest.raises(SystemExit, match="expected"):
            benchmark.check(out, results)

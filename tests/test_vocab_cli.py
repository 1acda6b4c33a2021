"""``mmtok vocab``: what a person types to make, see, extend, compare and export a vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import commands
import pytest
import torch
from commands import contents

from mmtok.audio import SpectralCodec, SpectralCodecConfig
from mmtok.export import exported
from mmtok.image import ImageVQVAE, ImageVQVAEConfig
from mmtok.loading import load
from mmtok.multimodal import MultimodalTokenizer
from mmtok.registry import VocabularyRegistry
from mmtok.text import ByteLevelBPE


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small tokenizers, each in a directory that is not its name: words/model, ..."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    shape = SpectralCodecConfig(dim=16, encoder_blocks=1, decoder_blocks=1, levels=4, codebook_size=32, codebook_dim=8)
    ByteLevelBPE.train(["a cow and a calf"], 270).save(folder / "words" / "model")
    SpectralCodec(shape).save(folder / "sounds" / "model")
    for name in ("pictures", "drawings"):
        ImageVQVAE(ImageVQVAEConfig(channels=8, encoder_blocks=1, decoder_blocks=1, codebook_size=64)).save(
            folder / name / "model"
        )
    return folder


def run(*arguments: object, capsys: pytest.CaptureFixture) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one ``mmtok vocab``."""
    return commands.run("vocab", *arguments, capsys=capsys)


def report(*arguments: object, capsys: pytest.CaptureFixture) -> dict:
    """The JSON report of one that must succeed."""
    code, stdout, stderr = run(*arguments, "--json", capsys=capsys)
    assert code == 0, stderr
    return json.loads(stdout)


def test_create_from_trained_tokenizers(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "vocabulary"
    arguments = (
        "create", "text-4k", *(f"{n}={trained / n / 'model'}" for n in ("words", "pictures", "sounds")), "-o", out,
        "--levels", "sounds=2", "--layout", "sounds=delayed:0,1", "--headroom", "pictures=100", "--headroom=words=4",
        "--max-grid", 8, "--pad-multiple", 128,
    )  # fmt: skip
    monkeypatch.chdir(trained)  # nothing may depend on where it was typed
    made = report(*arguments, capsys=capsys)
    assert made["copied"] == [str(out / n) for n in ("words", "pictures", "sounds")]
    monkeypatch.chdir(tmp_path)
    mm = MultimodalTokenizer.load(out)
    assert mm.registry.fingerprint == made["fingerprint"]
    assert made["padded_size"] == mm.registry.padded_size
    assert made["padded_size"] % 128 == 0
    assert [(b["name"], b["size"], b["headroom"], b["tokenizer"], b["level"], b["layout"]) for b in made["blocks"]] == [
        ("control", 10, 0, "", None, ""),
        ("text", 4096, 0, "text-4k", None, ""),
        ("text:words", mm.registry.block("text:words").size, 4, "words", None, ""),
        ("grid", 8, 0, "", None, ""),
        ("image", 64, 100, "pictures", None, ""),
        ("audio.0", 32, 0, "sounds", 0, "delayed:0,1"),
        ("audio.1", 32, 0, "sounds", 1, "delayed:0,1"),
    ]
    for block, row in zip(mm.registry.blocks, made["blocks"], strict=True):
        assert (row["first"], row["last"]) == (block.start, block.start + block.size - 1)
    before = contents(out)
    assert report(*arguments, capsys=capsys)["copied"] == []  # the same again is fine
    code, _, stderr = run(*arguments[:-2], capsys=capsys)
    assert code == 2
    assert "another vocabulary" in stderr
    assert contents(out) == before


def test_neighbours_and_bundled_ones_are_not_copied(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    load(trained / "pictures" / "model").save(tmp_path / "pictures")
    made = report("create", tmp_path / "pictures", "text-4k", "-o", tmp_path / "vocabulary", capsys=capsys)
    assert made["copied"] == []
    assert sorted(contents(tmp_path / "vocabulary")) == ["vocab.json"]
    MultimodalTokenizer.load(tmp_path / "vocabulary")


def test_a_checkpoint_found_by_the_current_directory_alone_is_copied(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(trained / "pictures" / "model").save(tmp_path / "here" / "pictures")
    monkeypatch.chdir(tmp_path / "here")
    out = tmp_path / "far" / "away"
    assert report("create", "pictures", "-o", out, capsys=capsys)["copied"] == [str(out / "pictures")]
    monkeypatch.chdir(tmp_path)
    MultimodalTokenizer.load(out)


def test_a_directory_in_the_way_is_left_alone(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    load(trained / "drawings" / "model").save(tmp_path / "v" / "pictures")
    before = contents(tmp_path)
    code, _, stderr = run("create", f"pictures={trained / 'pictures' / 'model'}", "-o", tmp_path / "v", capsys=capsys)
    assert code == 2
    assert "is not the tokenizer 'pictures'" in stderr
    assert contents(tmp_path) == before


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    registry = MultimodalTokenizer.load("any-to-any").registry
    shown = report("show", "any-to-any", capsys=capsys)
    assert shown["fingerprint"] == registry.fingerprint
    assert (shown["size"], shown["padded_size"], shown["revision"]) == (registry.size, registry.padded_size, 0)
    assert [b["name"] for b in shown["blocks"]] == [b.name for b in registry.blocks]
    (tmp_path / "any.json").write_text(registry.to_json())  # alone: neither tokenizers nor weights are needed
    assert report("show", tmp_path / "any.json", capsys=capsys) == shown
    code, stdout, _ = run("show", tmp_path / "any.json", capsys=capsys)
    assert code == 0
    assert registry.fingerprint in stdout
    for block in registry.blocks:
        (line,) = (x for x in stdout.splitlines() if x.startswith(f"{block.name} "))
        assert f" {block.start}..{block.end - 1} " in line
    explained = report("show", "any-to-any", "--ids", "5, 42,10330,-1", capsys=capsys)["ids"]
    assert explained == [{"id": i, "meaning": registry.describe(i)} for i in (5, 42, 10330, -1)]
    code, stdout, _ = run("show", "any-to-any", "--ids", "5,10330", capsys=capsys)
    assert stdout == "5: <image>\n10330: unused id 10330\n"


def test_extend_and_diff(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "extended"
    added = report("extend", "any-to-any", f"drawings={trained / 'drawings' / 'model'}", "-o", out, capsys=capsys)
    old, mm = MultimodalTokenizer.load("any-to-any").registry, MultimodalTokenizer.load(out)
    assert added["fingerprint"] == mm.registry.fingerprint
    assert mm.registry.blocks[: len(old.blocks)] == old.blocks
    assert mm.registry.tokenizers[-1].name == "drawings"
    assert (added["kept"], added["moved"]) == (sum(b.size for b in old.blocks), 0)
    assert added["copied"] == [str(out / "drawings")]

    compared = report("diff", "any-to-any", out, capsys=capsys)
    assert (compared["equal"], compared["moved"]) == (False, 0)
    assert compared["differences"] == added["differences"]
    first = mm.registry.block("image:drawings").start
    assert f"tokenizer drawings (image, 64 codes, ids {first}..{first + 63}) added" in compared["differences"]
    back = report("diff", out, "any-to-any", capsys=capsys)
    assert back["moved"] == 64 + 2  # its codes and brackets are gone
    code, stdout, _ = run("diff", "any-to-any", out, capsys=capsys)
    assert code == 0
    assert stdout.splitlines() == compared["differences"]
    same = report("diff", out, out / "vocab.json", capsys=capsys)
    assert (same["equal"], same["differences"], same["moved"]) == (True, [], 0)
    code, stdout, _ = run("diff", out, out, capsys=capsys)
    assert (code, stdout) == (0, f"equal: both have fingerprint {mm.registry.fingerprint}\n")


def test_an_extension_brings_the_old_tokenizers_along(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    old, new = tmp_path / "a" / "old", tmp_path / "b" / "new"
    report("create", f"pictures={trained / 'pictures' / 'model'}", "--headroom", "pictures=64", "-o", old,
           capsys=capsys)  # fmt: skip
    before = contents(old)
    words = f"words={trained / 'words' / 'model'}"
    code, stdout, stderr = run("extend", old, words, "-o", new, capsys=capsys)
    assert code == 0, stderr
    assert f"copied {new / 'pictures'}" in stdout
    assert "no id moved: 135 of 135 checked" in stdout  # 7 control, 64 grid, 64 codes
    assert MultimodalTokenizer.load(new).registry.revision == 1
    code, _, stderr = run("extend", old, words, "-o", old, capsys=capsys)
    assert code == 2
    assert "another vocabulary" in stderr
    assert contents(old) == before

    torch.manual_seed(1)
    ImageVQVAE(ImageVQVAEConfig(channels=8, encoder_blocks=1, decoder_blocks=1, codebook_size=96)).save(
        tmp_path / "grown"
    )
    grown = report("extend", old, f"pictures={tmp_path / 'grown'}", "-o", tmp_path / "c", capsys=capsys)
    assert "tokenizer pictures: 64 codes -> 96 codes" in grown["differences"]
    assert MultimodalTokenizer.load(tmp_path / "c").tokenizers["pictures"].codebook_sizes == (96,)


def test_a_directory_of_another_vocabulary_is_left_alone(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    report("create", "text-4k", "-o", tmp_path / "one", capsys=capsys)
    report("create", "text-4k", "image-64-f8", "-o", tmp_path / "two", capsys=capsys)
    report("export", tmp_path / "one", "-o", tmp_path / "hf", capsys=capsys)
    before = contents(tmp_path)
    for arguments in (
        ["create", "text-4k", "-o", tmp_path / "two"],
        ["create", "text-4k", "image-64-f8", "-o", tmp_path / "hf"],
        ["extend", tmp_path / "two", f"drawings={trained / 'drawings' / 'model'}", "-o", tmp_path / "two"],
        ["export", tmp_path / "two", "-o", tmp_path / "hf"],
        ["export", tmp_path / "two", "-o", tmp_path / "one"],
        ["migrate", "any-to-any", "--to", "any-to-any", "-o", tmp_path / "two"],
        ["migrate", "any-to-any", "--to", "any-to-any", "-o", tmp_path / "hf"],
    ):
        assert "holds another vocabulary" in commands.refused("vocab", *arguments, capsys=capsys)
        assert contents(tmp_path) == before


def test_export(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    home = tmp_path / "vocabulary"
    made = report("create", *(f"{n}={trained / n / 'model'}" for n in ("words", "sounds")), "-o", home, capsys=capsys)
    (home / "sounds" / "model.safetensors").write_bytes(b"")  # an export needs the text tokenizer alone
    done = report("export", home, "--format", "hf", "-o", tmp_path / "hf", capsys=capsys)
    assert done["fingerprint"] == made["fingerprint"] == exported(tmp_path / "hf").fingerprint
    assert report("show", tmp_path / "hf", capsys=capsys)["fingerprint"] == made["fingerprint"]
    code, stdout, _ = run("export", home, "-o", tmp_path / "hf", capsys=capsys)
    assert code == 0
    assert str(made["padded_size"]) in stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "nowhere"], "no vocabulary at 'nowhere'"),
        (["show", "text-4k"], "no vocabulary at 'text-4k'"),
        (["show", "bad.json"], "bad.json: not a vocabulary"),
        (["show", "bytes.json"], "bytes.json cannot be read"),
        (["show", "any-to-any", "--ids", "5,x"], "got 'x'"),
        (["diff", "any-to-any", "nowhere"], "nowhere"),
        (["create", "nowhere", "-o", "out"], "nowhere"),
        (["create", "any-to-any", "-o", "out"], "tokenizers are"),
        (["create", "text-4k", "text-4k", "-o", "out"], "two tokenizers are named 'text-4k'"),
        (["create", "a b=text-4k", "-o", "out"], "'a b'"),
        (["create", "text-4k", "-o", "out", "--levels", "x=1"], "known: text-4k"),
        (["create", "text-4k", "-o", "out", "--levels", "text-4k=two"], "got 'two'"),
        (["create", "text-4k", "-o", "out", "--levels", "text-4k"], "got ''"),
        (["create", "text-4k", "-o", "out", "--headroom", "text-4k=1", "--headroom", "text-4k=2"], "given twice"),
        (["create", "text-4k", "-o", "out", "--headroom", "text-4k=-1"], "headroom -1"),
        (["create", "audio-16k", "-o", "out", "--levels", "audio-16k=99"], "99 levels"),
        (["create", "audio-16k", "-o", "out", "--levels", "audio-16k=0"], "0 levels, expected 1 to 12"),
        (["create", "audio-16k", "-o", "out", "--layout", "audio-16k=sideways"], "sideways"),
        (["create", "audio-16k", "-o", "out", "--layout", "audio-16k=delayed:0,x"], "delayed:0,x"),
        (["create", "audio-16k", "-o", "out", "--layout", "audio-16k=delayed:0,1"], "for 2 codebooks, expected 12"),
        (["create", "audio-16k", "-o", "out", "--layout", "audio-16k"], "got nothing"),
        (["create", "text-4k", "-o", "out", "--max-grid", "x"], "'--max-grid'"),
        (["create", "text-4k", "-o", "bad.json"], "is a file"),
        (["show", "cut.json"], "cut.json: not a vocabulary"),
        (["show", "format.json"], "format 1; this mmtok reads format 2"),
        (["show", "."], "no vocabulary at '.'"),
        (["create", "text-4k", "-o", "out", "--max-grid", "0"], "max-grid"),
        (["create", "text-4k"], "--out"),
        (["extend", "any-to-any", "text-4k", "-o", "out", "--headroom", "x=1"], "known: text-4k"),
        (["export", "any-to-any", "-o", "out", "--format", "gguf"], "gguf"),
        (["export", "mute.json", "-o", "out"], "no text tokenizer"),
        (["export", "lost.json", "-o", "out"], "needs the tokenizer 'words'"),
        (["fold"], "fold"),
    ],
)
def test_bad_input(
    arguments: list, says: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mute = VocabularyRegistry.create([])
    words = MultimodalTokenizer.load("any-to-any").registry.to_json().replace('"text-4k"', '"words"')
    files = {
        "bad.json": b"{}",
        "bytes.json": b"\xff\xfe{",
        "mute.json": mute.to_json().encode(),
        "lost.json": words.encode(),
        "cut.json": mute.to_json()[:300].encode(),
        "format.json": mute.to_json().replace('"format": 2', '"format": 1').encode(),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert says in commands.refused("vocab", *arguments, capsys=capsys)
    assert {p.name for p in tmp_path.iterdir()} == set(files)


def test_help_carries_an_example(capsys: pytest.CaptureFixture) -> None:
    for command in ("create", "show", "extend", "diff", "export"):
        code, stdout, _ = run(command, "--help", capsys=capsys)
        assert code == 0
        assert f"Example: mmtok vocab {command} " in " ".join(stdout.split())

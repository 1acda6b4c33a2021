"""What users type: generate in all nine directions, roundtrip, and one clear line for every bad input."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import contents, refused, run

from mmtok import media
from mmtok.cli.generate import _ids_of_listing
from mmtok.cli.tables import print_table
from mmtok.listing import listing
from mmtok.multimodal import MultimodalTokenizer
from mmtok.sequences import read_ids

MODALITIES = ("text", "image", "audio")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("media")
    y, x = np.mgrid[0:70, 0:90]
    disc = ((y - 35) ** 2 + (x - 45) ** 2 < 700)[None]
    media.write_image(folder / "disc.png", np.where(disc, [[[200]], [[40]], [[30]]], 255).astype(np.uint8))
    t = np.arange(14_400) / 24_000
    tone = (0.4 * np.sin(2 * np.pi * (200 + 150 * t) * t) * np.hanning(len(t))).astype(np.float32)
    media.write_audio(folder / "word.wav", np.stack([tone, tone]), 24_000)
    (folder / "note.txt").write_text("a cow <image> \u00e9 \U0001f404\n", encoding="utf-8")
    return {"image": folder / "disc.png", "audio": folder / "word.wav", "text": folder / "note.txt"}


@pytest.mark.parametrize(("source", "target"), list(itertools.product(MODALITIES, MODALITIES)))
def test_nine_directions(source: str, target: str, files: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    question = "a cow" if source == "text" else files[source]
    out = tmp_path / "samples"
    code, stdout, stderr = run(
        "generate", f"--{source}", question, "--to", target, "--out", out, "--temperature", 1.0, "--json", capsys=capsys
    )
    assert code == 0, stderr
    report = json.loads(stdout)
    assert json.loads((out / "report.json").read_text()) == report
    answer = [s for s in report["segments"] if s["role"] == "assistant"]
    assert [s["modality"] for s in answer] == [target]
    for segment in report["segments"]:
        assert (out / segment["file"]).is_file()
        assert all(v for v in segment["check"].values() if isinstance(v, bool)), segment
    registry, ((_, ids, _),) = read_ids(out / "ids.json")
    listing = [json.loads(line) for line in (out / "listing.jsonl").read_text().splitlines()]
    assert [row["id"] for row in listing] == ids.tolist()
    assert len(ids) == report["prompt_tokens"] + report["new_tokens"]
    assert registry == MultimodalTokenizer.load("any-to-any").registry
    assert report["vocabulary"] == registry.fingerprint


def test_interleaved_in_the_order_given(files: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, stdout, stderr = run(
        "generate", "--image", files["image"], "--text=what is this", "--audio", files["audio"], "--text", "--audio",
        "--to", "audio", "--to", "text", "--out", tmp_path, "--json", capsys=capsys,
    )  # fmt: skip
    assert code == 0, stderr
    order = [(s["role"], s["modality"]) for s in json.loads(stdout)["segments"]]
    question = [("user", m) for m in ("image", "text", "audio", "text")]
    assert order == [*question, ("assistant", "audio"), ("assistant", "text")]


def test_the_model_chooses_and_the_seed_decides(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ids = []
    for number, seed in enumerate((3, 3, 4)):
        out = tmp_path / str(number)
        code, _, stderr = run(
            "generate", "--text", "a cat", "--seed", seed, "--out", out, "--temperature", 1, capsys=capsys
        )
        assert code == 0, stderr
        ids.append(read_ids(out / "ids.json")[1][0][1].tolist())
    assert ids[0] == ids[1]
    assert ids[0] != ids[2]


def test_roundtrip(files: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    order = ("image", "audio", "text")
    code, stdout, stderr = run(
        "roundtrip", *(files[m] for m in order), "--out", tmp_path / "rt", "--json", capsys=capsys
    )
    assert code == 0, stderr
    image, audio, text = json.loads(stdout)["files"]
    assert (image["tokens"], image["bits"]) == (9 * 12, 9 * 12 * 11.0)
    assert (image["height"], image["width"]) == (70, 90)
    assert image["psnr_db"] > 15
    assert 0.3 < image["ssim"] <= 1
    assert (audio["tokens"], audio["seconds"]) == (30 * 12, 0.6)
    assert audio["bits"] == 3600.0
    assert -1 <= audio["stoi"] <= 1
    assert audio["log_mel_distance_db"] >= 0
    assert text["identity"] is True
    assert Path(text["reconstruction"]).read_bytes() == files["text"].read_bytes()
    assert media.read_image(image["reconstruction"]).shape == (3, 70, 90)
    assert media.read_audio(audio["reconstruction"], 16_000).shape == (1, 9600)


def bad_files(folder: Path) -> dict[str, Path]:
    """Files that cannot be used, by what is wrong with them."""
    folder.mkdir()
    out = {name: folder / name for name in ("text.png", "empty.wav", "huge.png", "cut.png", "nothing.txt.png")}
    out["text.png"].write_text("this is no picture")
    media.write_audio(out["empty.wav"], np.zeros((1, 0), np.float32), 16_000)
    media.write_image(out["cut.png"], np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8))
    out["cut.png"].write_bytes(out["cut.png"].read_bytes()[:3000])
    with out["huge.png"].open("wb") as f:
        f.write(out["cut.png"].read_bytes()[:200])
        f.truncate(2**30)
    out["nothing.txt.png"].touch()
    return {**out, "missing": folder / "missing.png", "directory": folder}


@pytest.mark.parametrize(
    "case", ["text.png", "empty.wav", "huge.png", "cut.png", "nothing.txt.png", "missing", "directory"]
)
@pytest.mark.parametrize("command", ["roundtrip", "generate"])
def test_bad_input(case: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = bad_files(tmp_path / "in")[case]
    out = tmp_path / "out"
    option = ["--audio" if path.suffix == ".wav" else "--image"] if command == "generate" else []
    assert str(path) in refused(command, *option, path, "--out", out, capsys=capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "--out", "x"], "at least one of --text"),
        (["generate", "--text", "a", "--to", "smell"], "smell"),
        (["generate", "--text", "a", "--model", "nowhere"], "any-to-any"),
        (["generate", "--text", "a", "--to", "image", "--max-tokens", "3"], "3"),
        (["roundtrip", __file__, "--text", "image-64-f8"], "expected text"),
        (["roundtrip", __file__, "--levels", "0"], "'--levels'"),
        (["roundtrip", "--loud"], "; see mmtok roundtrip --help"),
        (["juggle"], "No such command 'juggle'; see mmtok --help"),
    ],
)
def test_bad_usage(arguments: list, says: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in refused(*arguments, capsys=capsys)
    assert not list(tmp_path.iterdir())


def test_a_target_that_cannot_be_written(files: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    before = contents(tmp_path)
    for command in (["roundtrip", files["text"], "--out"], ["encode", files["text"], "--out"]):
        says = refused(*command, tmp_path / "file" / "rt", capsys=capsys, code=1)
        assert "file/rt" in says
        assert says.endswith(": a part of the path is a file, not a directory\n")
    for command in ("roundtrip", "generate"):
        question = [files["text"]] if command == "roundtrip" else ["--text", "a"]
        assert "is a file; see" in refused(command, *question, "--out", tmp_path / "file", capsys=capsys)
    assert contents(tmp_path) == before


def test_a_full_disk(files: dict, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    run("encode", files["text"], "-o", tmp_path / "ids.json", capsys=capsys)
    before = contents(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for command, wrote in (
        (["encode", files["text"], files["image"], "-o", tmp_path / "ids.json"], "ids.json"),
        (["decode", tmp_path / "ids.json", "-o", tmp_path / "out"], "out/text_0.txt"),
        (["roundtrip", files["image"], "--out", tmp_path / "out"], "out/0_disc.png"),
        (["vocab", "create", "text-4k", "-o", tmp_path / "out"], "out/vocab.json"),
    ):
        says = refused(*command, capsys=capsys, code=1)
        assert says == f"mmtok: {tmp_path / wrote}: No space left on device\n"
        assert contents(tmp_path) == before


def test_names_that_are_no_text(files: dict, tmp_path: Path) -> None:
    """In a process of its own, whose stdout is strict about what is UTF-8."""
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n.txt")
    try:
        Path(name).write_text("a cow")
    except OSError:
        pytest.skip("this file system takes only names that are text")
    program = [sys.executable, "-c", "from mmtok.cli import main; main()"]
    for command in (["roundtrip", name, "--out", "rt"], ["encode", name, "--separate", "-o", "ids.json"]):
        for option in ([], ["--json"]):
            done = subprocess.run(
                [*program, *command, *option], capture_output=True, text=True, cwd=tmp_path, check=False,
                env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert "caf\\udce9\\n.txt" in done.stdout
    assert read_ids(tmp_path / "ids.json")[1][0][0] == "caf\ufffd\n"


def test_a_table_is_the_same_in_a_pipe(capsys: pytest.CaptureFixture) -> None:
    print_table(("file", "n"), [("a\nb " * 30, 1), ("\x1b[31mred", None)])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["file".ljust(152) + "n", "a\\nb " * 30 + "  1", "\\x1b[31mred".ljust(152) + "None"]


def test_without_arguments_there_is_help(capsys: pytest.CaptureFixture) -> None:
    for command in ([], ["encode"], ["vocab"]):
        code, stdout, stderr = run(*command, capsys=capsys)
        assert code == 2
        assert "Usage:" in stdout + stderr
        assert "mmtok: " not in stdout + stderr


def test_help_carries_an_example(capsys: pytest.CaptureFixture) -> None:
    for command in ("generate", "roundtrip"):
        code, stdout, _ = run(command, "--help", capsys=capsys)
        assert code == 0
        assert f"mmtok {command} " in " ".join(stdout.split())


def test_the_installed_command(tmp_path: Path) -> None:
    program = Path(sys.executable).parent / "mmtok"
    done = subprocess.run([program, "--help"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert "generate" in done.stdout


def test_the_listing_check_can_fail() -> None:
    tokenizer = MultimodalTokenizer.load("any-to-any")
    codes = {"text": np.array([64, 416]), "image": np.arange(6).reshape(2, 3), "audio": np.arange(12).reshape(4, 3)}
    for modality, values in {**codes, "empty": np.zeros((4, 0), np.int64)}.items():
        modality = "audio" if modality == "empty" else modality
        ids = tokenizer.grammar.segment_ids(modality, values)
        whole = np.concatenate([[tokenizer.registry.bos], ids, [tokenizer.registry.eos]])
        rows = listing(tokenizer.grammar, whole)[1:-1]
        assert np.array_equal(_ids_of_listing(tokenizer, modality, rows), ids)
        coded = [row for row in rows if "code" in row]
        if coded:
            coded[-1]["code"] += 1
            assert not np.array_equal(_ids_of_listing(tokenizer, modality, rows), ids)

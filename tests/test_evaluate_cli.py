"""``mmtok evaluate`` from the command line: a folder of generated pictures through tiny random tokenizers."""

from __future__ import annotations

import builtins
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import contents, refused, run
from PIL import Image as PILImage

from mmtok import media
from mmtok.evaluation.baselines import available
from mmtok.evaluation.images import RATES
from mmtok.image import ImageVQVAE, ImageVQVAEConfig

SIZES = ((37, 50), (64, 41), (30, 30), (23, 70), (50, 64))
CONFIG = ImageVQVAEConfig(
    downsample=8, patch=4, channels=8, encoder_blocks=1, decoder_blocks=1, codebook_size=32, codebook_dim=4
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pictures/: five, in two folders; first/ and second/: tokenizers of random weights, of one level and of two."""
    home = tmp_path_factory.mktemp("evaluate")
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES):
        coarse = rng.integers(0, 256, (3, -(-height // 8), -(-width // 8)), np.uint8)
        x = coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width]
        place = home / "pictures" / ("a" if number % 2 else "b")
        place.mkdir(parents=True, exist_ok=True)
        media.write_image(place / f"{number}.png", x)
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        model = ImageVQVAE(dataclasses.replace(CONFIG, levels=1 + seed))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
        model.eval().save(home / name)
    return home


def test_pictures_of_true_sizes(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "report"
    code, stdout, stderr = run(
        "evaluate", home / "first", home / "second", "--data", home / "pictures", "--out", out, "--peers", "jpeg,webp",
        "--json", capsys=capsys,
    )  # fmt: skip
    assert (code, stderr) == (0, "")
    report = json.loads(stdout)
    assert json.loads((out / "report.json").read_text()) == report
    assert (report["pictures"], report["split"], report["size"], report["unreadable"]) == (5, "all", None, [])
    assert list(report["tokenizers"]) == ["first", "second"]
    assert report["tokenizers"]["first"]["fingerprint"] == ImageVQVAE.load(home / "first").fingerprint
    pixels = sum(h * w for h, w in SIZES)
    tokens = sum(-(-h // 8) * -(-w // 8) for h, w in SIZES)
    for levels, figures in enumerate(report["tokenizers"].values(), 1):
        assert figures["tokens"] == levels * tokens
        assert figures["bits_per_pixel"] == pytest.approx(5 * levels * tokens / pixels, abs=1e-6)
        assert len(figures["levels"]) == levels
        assert [p["levels"] for p in figures["prefixes"]] == ([1, 2] if levels == 2 else [])
        assert 0 < figures["levels"][0]["usage"] <= 1
        assert 3 < figures["psnr_of_mean_error_db"] < 30
        assert 0 <= figures["codes_kept"] <= 1
        assert figures["speed"]["threads"] == 1
        assert any("161 pixels" in note for note in figures["notes"])
        for rate in RATES:
            assert list(figures["at_equal_bits"][rate]) == ["JPEG", "WEBP"]
    assert sorted(contents(out)) == ["contact_sheet.png", "rate_distortion.png", "report.json"]
    assert set(report["files"].values()) == {str(out / name) for name in contents(out)}
    with PILImage.open(out / "contact_sheet.png") as sheet:
        assert sheet.width > 3 * 160
        assert sheet.height > 3 * 160  # originals and two reconstructions


def test_fitted_pictures_and_the_tables(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ("--data", home / "pictures", "--size", 32, "--limit", 3, "--out", tmp_path)
    code, stdout, stderr = run("evaluate", home / "first", *arguments, capsys=capsys)
    assert (code, stderr) == (0, "")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["pictures"], report["pixels"]) == (3, 3 * 1024)
    assert list(report["peers"]) == available()
    assert list(report["peers"]["JPEG"]) == ["file", "minus_blank", "mosaic"]
    lines = stdout.splitlines()
    assert lines[0].startswith("3 pictures")
    assert next(line for line in lines if line.startswith("first")).split()[1] == "0.0781"
    for form in available():
        (row,) = [line for line in lines if line.split()[2:3] == [form]]
        assert "dB" in row or "cannot go" in row
    assert lines[-1].count("\n") == 0
    assert str(tmp_path / "contact_sheet.png") in lines[-1]


def test_a_manifest_is_never_tested_unasked(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = sorted((home / "pictures").rglob("*.png"))
    manifest = tmp_path / "images.jsonl"
    splits = ("train", "val", "test", "test", "test")
    manifest.write_text(
        "".join(
            json.dumps({"id": str(i), "split": split, "segments": [{"type": "image", "path": str(file)}]}) + "\n"
            for i, (split, file) in enumerate(zip(splits, files, strict=True))
        )
    )
    for option, split, n in (([], "val", 1), (["--split", "test"], "test", 3)):
        code, stdout, _ = run(
            "evaluate", home / "first", "--data", manifest, *option, "--peers", "none", "--json",
            "--out", tmp_path / "out", capsys=capsys,
        )  # fmt: skip
        report = json.loads(stdout)
        assert (code, report["split"], report["pictures"], report["peers"]) == (0, split, n, {})


def test_pictures_that_cannot_be_read(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = tmp_path / "data"
    data.mkdir()
    whole = (home / "pictures" / "b" / "0.png").read_bytes()
    (data / "bad.png").write_bytes(whole[:40])
    arguments = ("--data", data, "--peers", "none", "--out", tmp_path / "out")
    says = refused("evaluate", home / "first", *arguments, capsys=capsys)
    assert "none of 1 pictures can be read" in says
    assert str(data / "bad.png") in says
    assert not (tmp_path / "out").exists()
    (data / "good.png").write_bytes(whole)
    code, stdout, stderr = run("evaluate", home / "first", *arguments, capsys=capsys)
    assert code == 0
    assert stdout.startswith("1 pictures, 0.00185 megapixels, 1 unreadable")
    assert stderr.startswith(f"left out: {data / 'bad.png'}")


def test_without_matplotlib(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: object) -> object:
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    code, stdout, stderr = run(
        "evaluate", home / "first", "--data", home / "pictures", "--peers", "none", "--out", tmp_path, capsys=capsys
    )
    assert code == 0
    assert stderr == "no rate_distortion.png: that needs matplotlib; pip install 'mmtok[evaluation]'\n"
    assert sorted(contents(tmp_path)) == ["contact_sheet.png", "report.json"]
    assert "rate_distortion" not in stdout


@pytest.mark.parametrize(
    ("tokenizers", "options", "says"),
    [
        (["first", "text-4k"], [], "first for image, text-4k for text; expected all for images, all for audio, or all"),
        (["nowhere"], [], "nowhere"),
        (["first", "first"], [], "twice"),
        (["first"], ["--peers", "gif"], "'GIF', expected some of JPEG, WEBP, AVIF"),
        (["first"], ["--split", "holdout"], "no image in split 'holdout'"),
        (["first"], ["--size", "0"], "--size"),
        (["first"], ["--data", "nothing.jsonl"], "nothing.jsonl: cannot read the manifest"),
    ],
)
def test_bad_usage(
    tokenizers: list[str], options: list[str], says: str, home: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    monkeypatch.chdir(home)
    before = contents(home)
    assert says in refused("evaluate", *tokenizers, "--data", "pictures", *options, capsys=capsys)
    assert contents(home) == before


def test_help_carries_an_example(capsys: pytest.CaptureFixture) -> None:
    code, stdout, _ = run("evaluate", "--help", capsys=capsys)
    assert code == 0
    assert "mmtok evaluate image-64-f8 --data" in " ".join(stdout.split())

"""``mmtok evaluate`` of audio tokenizers from the command line: generated sounds through tiny random codecs."""

from __future__ import annotations

import builtins
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from commands import contents, refused, run
from PIL import Image as PILImage

from mmtok import media
from mmtok.audio.codec import SpectralCodec, SpectralCodecConfig
from mmtok.evaluation import opus
from mmtok.evaluation.opus import Setting
from mmtok.evaluation.plots import SPECTROGRAM

RATE = 16_000
SECONDS = (0.5, 0.61, 0.3, 0.7, 0.45)
CONFIG = SpectralCodecConfig(
    mels=16, dim=8, encoder_blocks=1, decoder_blocks=1, codebook_size=32, codebook_dim=4, levels=1
)


@pytest.fixture(autouse=True)
def _few_settings_of_opus(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = [Setting("voip", 20, "off", 1_000), Setting("audio", 60, "on", 8_000)]
    monkeypatch.setattr(opus, "settings", lambda highest: tried)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sounds/: five, in two folders; first/ and second/: codecs of random weights, of one level and of two."""
    home = tmp_path_factory.mktemp("evaluate")
    rng = np.random.default_rng(0)
    for number, seconds in enumerate(SECONDS):
        t = np.arange(round(seconds * RATE)) / RATE
        tone = np.sin(2 * np.pi * (200 + 60 * number) * t) * (0.2 + np.abs(np.sin(15 * t))) + rng.normal(0, 0.1, len(t))
        place = home / "sounds" / ("a" if number % 2 else "b")
        place.mkdir(parents=True, exist_ok=True)
        media.write_audio(place / f"{number}.wav", (0.2 * tone)[None].astype(np.float32), RATE)
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        codec = SpectralCodec(dataclasses.replace(CONFIG, levels=1 + seed))
        with torch.no_grad():
            for p in codec.parameters():
                p.add_(0.2 * torch.randn_like(p))
            codec.quantizer.initialise(torch.randn(200, CONFIG.dim))
        codec.eval().save(home / name)
    return home


def test_a_folder_of_sounds(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "report"
    code, stdout, stderr = run(
        "evaluate", home / "first", home / "second", "--data", home / "sounds", "--out", out, "--json", capsys=capsys
    )
    assert (code, stderr) == (0, "")
    report = json.loads(stdout)
    assert json.loads((out / "report.json").read_text()) == report
    assert (report["sounds"], report["split"], report["unreadable"]) == (5, "all", [])
    assert report["seconds"] == pytest.approx(sum(SECONDS), abs=0.01)
    assert list(report["tokenizers"]) == ["first", "second"]
    frames = sum(-(-round(s * RATE) // 320) for s in SECONDS)
    for levels, figures in enumerate(report["tokenizers"].values(), 1):
        assert figures["tokens"] == levels * frames
        assert [p["levels"] for p in figures["prefixes"]] == list(range(1, levels + 1))
        last = figures["prefixes"][-1]
        assert last["kilobits_per_second"] == pytest.approx(5 * levels * frames / sum(SECONDS) / 1000, abs=1e-3)
        assert set(last["opus"]["at_equal_bits"]) == {"kilobits_per_second", "adaptive_kilobits_per_second"}
        assert len(figures["levels"]) == levels
        assert -1 <= last["stoi"] < 0.9
        assert figures["speed"]["threads"] == 1
    assert list(report["peers"]["opus"]) == ["16000 Hz, mono"]
    stems = [
        f"{group}-1-{what}.wav" for group in ("best", "median", "worst") for what in ("original", "first", "second")
    ]
    files = sorted(["rate_distortion.png", "report.json", "spectrograms.png", *(f"samples/{s}" for s in stems)])
    assert sorted(contents(out)) == files
    assert set(report["files"].values()) == {
        str(out / name) for name in ("report.json", "spectrograms.png", "samples", "rate_distortion.png")
    }
    with PILImage.open(out / "spectrograms.png") as sheet:
        assert sheet.width > 3 * SPECTROGRAM[0]
        assert sheet.height > 3 * SPECTROGRAM[1]  # originals and two reconstructions
    lengths = {soundfile.info(out / "samples" / f"best-1-{x}.wav").frames for x in ("original", "first", "second")}
    assert len(lengths) == 1


def test_the_tables_of_a_manifest(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    manifest = tmp_path / "sounds.jsonl"
    lines = [
        {"id": str(i), "split": split, "source": kind, "segments": [{"type": "audio", "path": str(path)}]}
        for i, (split, kind, path) in enumerate(
            zip(
                ("val", "val", "test", "train", "val"),
                ("speech", "music", "music", "speech", "speech"),
                sorted((home / "sounds").rglob("*.wav")),
                strict=True,
            )
        )
    ]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    code, stdout, stderr = run("evaluate", home / "second", "--data", manifest, "--out", out, capsys=capsys)
    assert (code, stderr) == (0, "")
    report = json.loads((out / "report.json").read_text())
    assert (report["split"], report["sounds"]) == ("val", 3), "test is never read unasked"
    text = stdout.splitlines()
    assert text[0].startswith("3 sounds, ")
    rows = [line.split()[1:3] for line in text if line.startswith("second  ")]
    assert rows[:4] == [["all", "1"], ["all", "2"], ["music", "2"], ["speech", "2"]]
    assert "cannot go under" in stdout
    assert "for STOI" in stdout
    assert str(out / "spectrograms.png") in text[-1]
    code, stdout, _ = run(
        "evaluate", home / "first", "--data", manifest, "--split", "test", "--peers", "none", "--json", "--out", out,
        capsys=capsys,
    )  # fmt: skip
    report = json.loads(stdout)
    assert (code, report["split"], report["sounds"], report["peers"]) == (0, "test", 1, {})
    assert "opus" not in report["tokenizers"]["first"]["prefixes"][0]


def test_sounds_that_cannot_be_read(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = tmp_path / "data"
    data.mkdir()
    whole = (home / "sounds" / "b" / "0.wav").read_bytes()
    (data / "bad.wav").write_bytes(whole[:400])
    arguments = ("--data", data, "--peers", "none", "--out", tmp_path / "out")
    says = refused("evaluate", home / "first", *arguments, capsys=capsys)
    assert "none of 1 sounds can be read" in says
    assert str(data / "bad.wav") in says
    assert not (tmp_path / "out").exists()
    (data / "good.wav").write_bytes(whole)
    code, stdout, stderr = run("evaluate", home / "first", *arguments, capsys=capsys)
    assert code == 0
    assert stdout.startswith("1 sounds, 0.5 seconds, 1 unreadable")
    assert stderr.startswith(f"left out: {data / 'bad.wav'}")
    assert sorted(contents(tmp_path / "out" / "samples")) == ["best-1-first.wav", "best-1-original.wav"]


def test_without_the_packages_of_evaluation(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: object) -> object:
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr(opus, "find_spec", lambda name: None)
    monkeypatch.setattr("mmtok.evaluation.metrics.find_spec", lambda name: None)
    arguments = ("evaluate", home / "first", "--data", home / "sounds", "--limit", 1, "--out", tmp_path)
    code, stdout, stderr = run(*arguments, capsys=capsys)
    assert code == 0
    assert "no PESQ: that needs the package pesq, which a C compiler builds" in stdout
    assert stderr.splitlines() == [
        "no Opus: that needs PyAV with libopus; pip install 'mmtok[evaluation]'",
        "no rate_distortion.png: that needs matplotlib; pip install 'mmtok[evaluation]'",
    ]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["peers"] == {}
    assert report["tokenizers"]["first"]["prefixes"][0]["pesq_wb"] is None
    says = refused(*arguments, "--peers", "opus", capsys=capsys)
    assert "PyAV with libopus" in says


@pytest.mark.parametrize(
    ("tokenizers", "options", "says"),
    [
        (["first", "image-64-f8"], [], "first for audio, image-64-f8 for image; expected all for images"),
        (["first", "text-4k"], [], "first for audio, text-4k for text; expected all for images, all for audio, or all"),
        (["first"], ["--peers", "jpeg"], "'jpeg', expected opus or none"),
        (["first"], ["--size", "64"], "--size 64 for audio tokenizers"),
        (["first"], ["--split", "holdout"], "no audio in split 'holdout'"),
        (["first"], ["--data", "first"], "no audio in it"),
    ],
)
def test_bad_usage(
    tokenizers: list[str], options: list[str], says: str, home: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    monkeypatch.chdir(home)
    before = contents(home)
    assert says in refused("evaluate", *tokenizers, "--data", "sounds", *options, capsys=capsys)
    assert contents(home) == before


def test_a_place_that_cannot_be_written_is_told_before_measuring(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setattr("mmtok.cli.evaluate_sounds.sound_report", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file" / "out", "/proc/out"):
        assert str(place) in refused("evaluate", "first", "--data", "sounds", "--out", place, capsys=capsys, code=1)

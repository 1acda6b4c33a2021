"""Odd corpora, odd places and interruptions, through the whole builder."""

from __future__ import annotations

import functools
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from commands import contents, refused
from corpora import write_corpus
from PIL import Image as PILImage

from mmtok.datasets import plan as planning
from mmtok.datasets.build import BuildReport, Progress, build, units
from mmtok.datasets.build.config import EncodeConfig
from mmtok.datasets.plan import plan
from mmtok.datasets.shards import TokenDataset
from mmtok.datasets.sources import open_source
from mmtok.datasets.sources.content import local_copy
from mmtok.datasets.verify import faults
from mmtok.errors import ConfigError, DataError
from mmtok.multimodal import MultimodalTokenizer

load = MultimodalTokenizer.load


@functools.cache
def mm() -> MultimodalTokenizer:
    return load("any-to-any")


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MultimodalTokenizer, "load", lambda path: mm())


def make(source: Path | str, out: Path, config: EncodeConfig | None = None, **how: Any) -> BuildReport:
    return build(str(source), out, "any-to-any", config, **{"workers": 1, "shard_tokens": 300} | how)


def same_as_fresh(source: Path | str, out: Path) -> bool:
    """Whether a dataset has the bytes of one that is built from nothing."""
    make(source, out.parent / "fresh")
    return contents(out) == contents(out.parent / "fresh")


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 20, 3), np.uint8)).save(path)
    return path


def sound(path: Path, seconds: float = 0.3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * np.sin(np.arange(round(16_000 * seconds)) / 20), 16_000)
    return path


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(path: Path | str, **more: Any) -> dict[str, Any]:
    return {"type": "image", "path": str(path), **more}


def write(path: Path, *documents: list[dict[str, Any]]) -> Path:
    """A manifest of documents, each a list of segments."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": f"document {i}", "segments": x}) + "\n" for i, x in enumerate(documents)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


# --- names and places


@pytest.mark.parametrize("given", ["m.jsonl", "./m.jsonl", "../{0}/m.jsonl", "../link/m.jsonl", ".", "*.jsonl"])
def test_a_source_is_the_same_however_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    folder = tmp_path / "corpus"
    picture(folder / "a.png")
    (folder / "a.txt").write_text("a cow")
    if given != ".":
        write(folder / "m.jsonl", [text("a cow"), image("a.png")], [image("missing.png")])
        make(folder / "m.jsonl", tmp_path / "d")
    else:
        make(folder, tmp_path / "d")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    make(given.format("corpus"), tmp_path / "other")
    one, other = (TokenDataset.open(tmp_path / x) for x in ("d", "other"))
    assert [x.file.name for x in one.shards] == [x.file.name for x in other.shards]
    assert one.settings["root"] == other.settings["root"] == str(folder)
    assert other.meta(0)["segments"][1]["path"] == "a.png"
    assert list(one.quarantined()) == list(other.quarantined())


def test_media_lie_beside_a_link_to_a_manifest(tmp_path: Path) -> None:
    write(tmp_path / "cache/x", [image("a.png")])
    picture(tmp_path / "corpus/a.png")
    (tmp_path / "corpus/m.jsonl").symlink_to(tmp_path / "cache/x")
    assert make(tmp_path / "corpus/m.jsonl", tmp_path / "d").left_out == 0
    assert TokenDataset.open(tmp_path / "d").meta(0)["segments"][0]["path"] == "a.png"


def test_paths_of_media_come_back(tmp_path: Path) -> None:
    """Below the root, which their path may have twice, above it, and outside; messages name them as seen from it."""
    root = tmp_path / "corpus"
    twice = root / "x" / str(root).lstrip("/") / "a.png"
    places = [twice, root / "b.png", tmp_path / "outside/c.png", root / "s3:/d.png", tmp_path / "corpus2/e.png"]
    given = [picture(x) for x in places] + [f"{root}//b.png", "../outside/c.png", f"{root}/missing {root}/b.png"]
    write(root / "m.jsonl", *([image(x)] for x in given))
    make(root / "m.jsonl", tmp_path / "d")
    dataset = TokenDataset.open(tmp_path / "d")
    found = [dataset.segments(i)[0]["path"] for i in range(len(dataset))]
    assert [os.path.realpath(x) for x in found] == [
        os.path.realpath(x) for x in map(str, [*places, places[1], places[2]])
    ]
    kept = [dataset.meta(i)["segments"][0]["path"] for i in range(2)]
    assert kept == [str(twice.relative_to(root)), "b.png"]
    assert [x["reason"] for x in dataset.quarantined()] == ["missing b.png: no such file"]


def test_the_root_of_the_file_system_can_be_the_root(tmp_path: Path) -> None:
    """A manifest that lies in / itself, as in a container."""
    encoder = units.Encoder(mm(), EncodeConfig(), "/")
    where = picture(tmp_path / "a.png")
    record, missing = encoder.encode(
        [{"id": "a", "segments": [image(where)]}, {"id": "b", "segments": [image("/no/such.png")]}]
    )
    assert isinstance(record, units.Record)
    assert record.meta["segments"][0]["path"] == str(where).lstrip("/")
    assert not isinstance(missing, units.Record)
    assert missing.reason == "/no/such.png: no such file"


@pytest.mark.parametrize("name", ["a#b", "a?b", "50%20", "a b\n", "ü", os.fsdecode(b"x\xff")])
def test_any_name_of_a_dataset(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "m.jsonl", [text("a cow")])
    for _ in range(2):  # the second over the first
        assert make(source, tmp_path / name).documents == 1
    assert not list(faults(tmp_path / name))


def test_keys_of_the_manifests_own(tmp_path: Path) -> None:
    """Keys that references of other sources have mean nothing in a manifest."""
    picture(tmp_path / "a.png")
    sound(tmp_path / "a.wav")
    segments = [
        image("a.png", table="users", row=3),
        {"type": "audio", "path": "a.wav", "offset": 0.1, "duration": 2},
        {**text("x"), "table": 7, "column": None},
        {"type": "turn", "role": "user", "path": 5, "table": ["x"]},
    ]
    source = write(tmp_path / "m.jsonl", segments)
    assert make(source, tmp_path / "d").left_out == plan(open_source(source), mm()).left_out == 0
    meta = TokenDataset.open(tmp_path / "d").meta(0)["segments"]
    assert meta == [{k: v for k, v in x.items() if k != "text"} for x in segments]


# --- what is in the way


def test_a_folder_of_another_program_is_left_alone(tmp_path: Path) -> None:
    """Other programs have a folder .build too."""
    files = [".build/debug.o", "shard-mine.safetensors", "quarantine.mine.jsonl", "Package.swift"]
    for name in files:
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text("mine")
    source = write(tmp_path / "m.jsonl", [text("a cow")])
    with pytest.raises(DataError, match="no token dataset"):
        make(source, tmp_path / "d")
    assert sorted(contents(tmp_path / "d")) == sorted(files)
    make(source, tmp_path / "tokens")
    (tmp_path / "tokens/shard-mine.safetensors").write_text("mine")
    make(source, tmp_path / "tokens")
    assert (tmp_path / "tokens/shard-mine.safetensors").exists()


def test_nothing_is_left_of_a_build_that_did_not_begin(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "m.jsonl").touch()
    for out in (tmp_path / "empty", tmp_path / "a/b/c"):
        with pytest.raises(DataError, match="no documents"):
            make(tmp_path / "m.jsonl", out)
        with pytest.raises(ConfigError, match="engine"):
            make(write(tmp_path / "full.jsonl", [text("x")]), out, engine="nobody")
    assert sorted(x.name for x in tmp_path.rglob("*")) == ["empty", "full.jsonl", "m.jsonl"]


def spoil_shard(folder: Path) -> None:
    file = next(folder.glob("shard-*"))
    data = bytearray(file.read_bytes())
    data[-200] ^= 1
    file.write_bytes(data)


def cut_shard(folder: Path) -> None:
    file = next(folder.glob("shard-*"))
    file.write_bytes(file.read_bytes()[:100])


def lose_vocabulary(folder: Path) -> None:
    (folder / "vocab.json").unlink()


@pytest.mark.parametrize("damage", [spoil_shard, cut_shard, lose_vocabulary])
def test_a_damaged_dataset_is_built_anew(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """It is what its own messages say to do."""
    source = write_corpus(tmp_path / "corpus", 6)
    make(source, tmp_path / "d")
    damage(tmp_path / "d")
    make(source, tmp_path / "d")
    assert same_as_fresh(source, tmp_path / "d")


def test_what_cannot_be_told_is_not_built_over(tmp_path: Path) -> None:
    source = write(tmp_path / "m.jsonl", [text("a cow")])
    (tmp_path / "d").mkdir()
    (tmp_path / "d/dataset.json").write_text('{"name": "of another program"}')
    with pytest.raises(DataError, match=r"cannot be built over .* remove it or give another name"):
        make(source, tmp_path / "d")
    assert sorted(contents(tmp_path / "d")) == ["dataset.json"]


@pytest.mark.parametrize("suffix", [".txt", ".png"])
def test_a_folder_that_holds_its_own_dataset(tmp_path: Path, suffix: str) -> None:
    for i in range(3):
        file = tmp_path / "corpus" / f"{i}{suffix}"
        picture(file.with_suffix(".png"), i)
        if suffix == ".txt":
            file.with_suffix(".png").unlink()
            file.write_text(f"cow {i}")
    make(tmp_path / "corpus", tmp_path / "corpus/tokens")
    assert make(tmp_path / "corpus", tmp_path / "corpus/tokens").documents == 3


def test_more_shards_than_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "DOCUMENTS", 1)
    source = write(tmp_path / "m.jsonl", *([text(str(i))] for i in range(40)))
    make(source, tmp_path / "d", shard_tokens=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, hard))
        dataset = TokenDataset.open(tmp_path / "d")
        assert len(dataset.shards) == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- what a vocabulary has not


def test_pictures_larger_than_the_grid(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write(tmp_path / "m.jsonl", [image(picture(tmp_path / "a.png"))])
    for command in (("plan", source), ("build", source, "-o", tmp_path / "d")):
        line = refused("dataset", *command, "--image-size", 1024, capsys=capsys)
        assert "image size of 1024 pixels, expected a multiple of 8 up to 512" in line
    assert not (tmp_path / "d").exists()


# --- growth


def test_a_file_that_is_called_otherwise(tmp_path: Path) -> None:
    """Of the same bytes, but by its name no picture any more: left out, as it would be in a fresh build."""
    source = write(tmp_path / "m.jsonl", [image(picture(tmp_path / "a.png"))], [text("a cow")])
    make(source, tmp_path / "d")
    (tmp_path / "a.png").rename(tmp_path / "a.wav")
    write(source, [image("a.wav")], [text("a cow")])
    assert make(source, tmp_path / "d").left_out == 1
    assert same_as_fresh(source, tmp_path / "d")


# --- interruptions

STOPPED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell in the background has turned off
from mmtok.datasets.build import units
units.DOCUMENTS = 4
from mmtok.cli import main
main()
"""


def children(pid: int) -> list[int]:
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(file.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "early"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_build_that_is_told_to_stop(tmp_path: Path, sent: signal.Signals, early: bool) -> None:
    """The whole group of processes gets the signal, as from a terminal: one line, and nobody is left."""
    source = write_corpus(tmp_path / "corpus", 400)
    command = ["dataset", "build", str(source), "-o", str(tmp_path / "d"), "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, *command], stderr=subprocess.PIPE, start_new_session=True
    )
    workers: list[int] = []
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        workers = children(process.pid)
        if len(workers) >= 3 and (early or any((tmp_path / "d/.build").glob("unit-*.json"))):
            break
        time.sleep(0.02)
    os.killpg(process.pid, sent)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, b"mmtok: stopped\n")
    until = time.monotonic() + 20
    while time.monotonic() < until and any(map(alive, workers)):
        time.sleep(0.05)
    assert not any(map(alive, workers))


def test_temporary_copies_go_with_their_process(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        data = picture(tmp_path / "a.png").read_bytes()
        entry = tarfile.TarInfo("a.png")
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
    document = next(open_source(tmp_path / "x.tar"))
    from mmtok.datasets.sources.content import discard_copies

    with local_copy(document["segments"][0]) as content:
        assert Path(content.path).exists()
        discard_copies()
        assert not Path(content.path).exists()


def test_a_file_that_changes_while_a_build_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what was done already only the unit of that file is done again."""
    monkeypatch.setattr(units, "DOCUMENTS", 2)
    places = [picture(tmp_path / f"{i}.png", i) for i in range(6)]
    source = write(tmp_path / "m.jsonl", *([image(x)] for x in places))

    def stop(p: Progress) -> None:
        if p.stage == "joining":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(source, tmp_path / "d", progress=stop)
    picture(places[2], 9)
    os.utime(places[2], ns=(1, 1))
    assert make(source, tmp_path / "d").encoded == 2
    assert same_as_fresh(source, tmp_path / "d")


# --- what is foreseen


def test_the_plan_foresees_impossible_parts_of_sounds(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav", 1.0)
    parts = [(0, 1), (-1, 1), (0, 5), (0.5, 0.5), (None, 0.5), (0, 1.005), (0, 1.1), (2, 3), (0.2, None), (0, 1e-5)]
    segments = [{"type": "audio", "path": "a.wav", "start": x, "end": y} for x, y in parts]
    source = write(tmp_path / "m.jsonl", *([x] for x in segments))
    foreseen = plan(open_source(source), mm())
    report = make(source, tmp_path / "d")
    assert (foreseen.documents - foreseen.left_out, foreseen.tokens) == (report.documents, report.tokens)
    assert report.left_out == 6


def test_the_plan_holds_few_long_texts_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "m.jsonl", *([text("cow " * 100)] for _ in range(50)))
    whole = plan(open_source(source), mm())
    held: list[int] = []
    add = planning._Counter.add

    def counted(self: planning._Counter, batch: Any, pool: Any) -> None:
        held.append(len(batch))
        add(self, batch, pool)

    monkeypatch.setattr(planning, "CHARACTERS", 1000)
    monkeypatch.setattr(planning._Counter, "add", counted)
    assert plan(open_source(source), mm()).tokens == whole.tokens
    assert max(held) == 3

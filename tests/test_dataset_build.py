"""Building a dataset: what is in it, exactly once, the same bytes after any interruption, by any number of workers."""

from __future__ import annotations

import errno
import functools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from commands import contents, refused, run
from corpora import document_of, write_corpus

from mmtok.datasets import build as building
from mmtok.datasets.build import BuildReport, Progress, build, reading, units
from mmtok.datasets.build import encode as encoding
from mmtok.datasets.build.config import EncodeConfig
from mmtok.datasets.plan import plan
from mmtok.datasets.records import find_spans
from mmtok.datasets.shards import TokenDataset
from mmtok.datasets.sources import open_source
from mmtok.errors import ConfigError, DataError, VocabularyMismatchError
from mmtok.multimodal import MultimodalTokenizer

MODEL = "any-to-any"
load = MultimodalTokenizer.load


@functools.cache
def mm() -> MultimodalTokenizer:
    return load(MODEL)


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary is loaded once, and a small corpus has several units."""
    monkeypatch.setattr(MultimodalTokenizer, "load", lambda path: mm())
    monkeypatch.setattr(units, "DOCUMENTS", 7)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), 40)


@pytest.fixture(scope="module")
def built(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus, built without interruption by one worker."""
    out = tmp_path_factory.mktemp("built") / "d"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "DOCUMENTS", 7)
        assert make(corpus, out).documents == 40
    return out


def make(corpus: Path | str, out: Path, config: EncodeConfig | None = None, **how: Any) -> BuildReport:
    return build(str(corpus), out, MODEL, config, **{"workers": 1, "shard_tokens": 300} | how)


# --- what is in it


def test_every_document_is_there_once_in_order(corpus: Path, built: Path) -> None:
    dataset = TokenDataset.open(built, mm().registry)
    dataset.verify()
    lines = corpus.read_text(encoding="utf-8").splitlines()
    assert len(dataset) == len(lines) == 40
    assert len(dataset.shards) > 2
    assert dataset.settings["config"] == EncodeConfig().to_dict()
    for i, line in enumerate(lines):
        document = document_of(line, corpus.parent)
        assert np.array_equal(dataset[i], mm().encode(document))
        assert dataset.image_sizes(i) == mm().sizes(document)
        given = json.loads(line)
        meta = dataset.meta(i)
        assert (meta["id"], meta["source"]) == (given["id"], "test")
        without_text = [{k: v for k, v in x.items() if k != "text"} for x in given["segments"]]
        assert meta["segments"] == without_text  # paths as in the manifest, wherever it lies
        spans = dataset.spans(i)
        assert np.array_equal(spans[:, :3], find_spans(mm().grammar, dataset[i])[:, :3])
        for j, (start, end, tokenizer, segment, *sizes) in enumerate(spans.tolist()):
            spec = mm().registry.tokenizers[tokenizer]
            assert given["segments"][segment]["type"] == spec.modality
            assert np.array_equal(dataset.span(i, j), dataset[i][start:end])
            if spec.modality == "audio":
                samples, rate = sizes
                assert rate == 16_000
                frames = mm().grammar.spans(dataset[i])
                held = next(x.shape[1] for x in frames if x.start == start)
                assert 0 <= held * int(spec.properties["hop"]) - samples < int(spec.properties["hop"])


def test_joined_texts_are_one_span(tmp_path: Path) -> None:
    texts = ["", "a cow", "", " and a calf", ""]
    segments = [{"type": "text", "text": x} for x in texts]
    line = {"id": "x", "segments": [*segments, {"type": "turn", "role": "user"}, {"type": "text", "text": "é"}]}
    (tmp_path / "m.jsonl").write_text(json.dumps(line))
    make(tmp_path / "m.jsonl", tmp_path / "d")
    dataset = TokenDataset.open(tmp_path / "d")
    assert dataset.spans(0)[:, 2:].tolist() == [[0, 1, 16, 0], [0, 6, 2, 0]]
    assert np.array_equal(dataset.spans(0)[:, :3], find_spans(mm().grammar, dataset[0])[:, :3])


def test_the_plan_foresees_it(corpus: Path, built: Path) -> None:
    foreseen = plan(open_source(corpus), mm(), context=100)
    dataset = TokenDataset.open(built)
    lengths = [len(x) for x in dataset]
    assert (foreseen.documents, foreseen.left_out, foreseen.tokens) == (40, 0, dataset.tokens)
    assert (foreseen.longest, foreseen.over) == (max(lengths), sum(x > 100 for x in lengths))
    assert foreseen.dtype == dataset.dtype.name
    kinds = [x.modality for x in mm().registry.tokenizers]
    for modality, seen in foreseen.modalities.items():
        own = kinds.index(modality)
        spans = [x for i in range(40) for x in dataset.spans(i).tolist() if x[2] == own]
        assert seen.tokens == sum(end - start for start, end, *_ in spans)
        assert seen.seconds > 0
    size = sum(x.stat().st_size for x in built.glob("shard-*"))
    assert 0.5 * size < foreseen.bytes < 1.5 * size + 40 * 200
    part = plan(open_source(corpus), mm(), share=0.5)
    assert 0.2 < part.share < 0.8
    assert 0.3 < part.tokens / foreseen.tokens < 3
    with pytest.raises(ConfigError, match="share 0"):
        plan(open_source(corpus), mm(), share=0)


def test_a_long_sound_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    soundfile.write(tmp_path / "x.flac", 0.3 * np.sin(np.cumsum(random.uniform(0, 0.3, 40_000))), 16_000)
    line = {"id": "x", "segments": [{"type": "audio", "path": "x.flac"}, {"type": "text", "text": "é"}]}
    (tmp_path / "m.jsonl").write_text(json.dumps(line))
    make(tmp_path / "m.jsonl", tmp_path / "whole")
    monkeypatch.setattr(reading, "STREAM_SECONDS", 1.0)
    monkeypatch.setattr(encoding.Encoder, "_encode_some", unused := Counted(encoding.Encoder._encode_some))
    monkeypatch.setattr(encoding.Encoder, "_encode_stream", streamed := Counted(encoding.Encoder._encode_stream))
    make(tmp_path / "m.jsonl", tmp_path / "stream")
    assert (unused.calls, streamed.calls) == (1, 1)
    whole, stream = (TokenDataset.open(tmp_path / x) for x in ("whole", "stream"))
    assert np.array_equal(whole.spans(0), stream.spans(0))
    assert (whole[0] != stream[0]).sum() <= 2  # but for near ties


class Counted:
    """A method that counts its calls."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method, self.calls = method, 0

    def __get__(self, instance: object, owner: type) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls += 1
            return self.method(instance, *arguments)

        return call


# --- interruptions


@pytest.mark.parametrize("after", range(12))
def test_a_stopped_build_goes_on(corpus: Path, built: Path, tmp_path: Path, after: int) -> None:
    """Stopped at any of its steps: listing, each unit, each shard."""
    steps: list[Progress] = []

    def stop(p: Progress) -> None:
        steps.append(p)
        if len(steps) == after + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(corpus, tmp_path / "d", progress=stop)
    with pytest.raises(DataError, match=r"dataset\.json"):
        TokenDataset.open(tmp_path / "d")
    left = max([p.documents for p in steps if p.stage == "encoding"], default=0)
    report = make(corpus, tmp_path / "d")
    assert report.encoded <= 40 - left + 7  # the unit that was stopped, at most, is done again
    assert contents(tmp_path / "d") == contents(built)


KILLED = """
import os, signal, sys
from mmtok.datasets.build import units
from mmtok.datasets.build import build
from mmtok.datasets import shardfile
units.DOCUMENTS = 7
count = 0
def kill(p):
    global count
    count += 1
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
build(sys.argv[1], sys.argv[2], "any-to-any", workers=1, shard_tokens=300, progress=kill)
"""


def test_a_killed_build_goes_on(corpus: Path, built: Path, tmp_path: Path) -> None:
    for moment in ("3", "5"):
        command = [sys.executable, "-c", KILLED, str(corpus), str(tmp_path / "d"), moment]
        done = subprocess.run(command, check=False, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    (tmp_path / "d/.shard-00000.1.tmp").write_bytes(b"half")
    (tmp_path / "d/.build/.unit-x.1.tmp").write_bytes(b"half")
    make(corpus, tmp_path / "d")
    assert contents(tmp_path / "d") == contents(built)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_the_bytes_do_not_depend_on_the_workers(corpus: Path, built: Path, tmp_path: Path, workers: int) -> None:
    make(corpus, tmp_path / "d", workers=workers)
    assert contents(tmp_path / "d") == contents(built)


def actors() -> list[int]:
    """The processes of Ray's actors that encode."""
    names = {x: x.read_bytes() for x in Path("/proc").glob("[0-9]*/cmdline") if x.exists()}
    return [int(x.parent.name) for x, name in names.items() if b"_RayWorker" in name]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_worker_that_is_killed_is_replaced(corpus: Path, built: Path, tmp_path: Path, engine: str) -> None:
    killed: list[int] = []

    def kill(p: Progress) -> None:
        if p.stage == "encoding" and p.documents and not killed:
            killed.extend(actors() if engine == "ray" else [x.pid for x in multiprocessing.active_children() if x.pid])
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    make(corpus, tmp_path / "d", workers=2, engine=engine, progress=kill)
    assert killed
    assert contents(tmp_path / "d") == contents(built)


def test_a_damaged_result_is_made_again(corpus: Path, built: Path, tmp_path: Path) -> None:
    def stop(p: Progress) -> None:
        if p.stage == "joining":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(corpus, tmp_path / "d", progress=stop)
    files = sorted((tmp_path / "d/.build").glob("unit-*.safetensors"))
    assert len(files) == 6
    data = bytearray(files[0].read_bytes())
    data[len(data) // 2] ^= 1
    files[0].write_bytes(data)
    files[1].unlink()
    next((tmp_path / "d/.build").glob("unit-*.json")).write_text("{")
    make(corpus, tmp_path / "d")
    assert contents(tmp_path / "d") == contents(built)


def test_two_builds_do_not_meet(corpus: Path, tmp_path: Path) -> None:
    def again(p: Progress) -> None:
        with pytest.raises(DataError, match="another build is at work"):
            make(corpus, tmp_path / "d")

    make(corpus, tmp_path / "d", progress=again)


# --- growth


def test_only_what_is_new_is_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write_corpus(tmp_path / "corpus", 30)
    lines = manifest.read_text(encoding="utf-8").splitlines(keepends=True)
    manifest.write_text("".join(lines[:20]), encoding="utf-8")
    make(manifest, tmp_path / "d")
    counted: list[int] = []
    codes_of = MultimodalTokenizer.codes_of

    def count(self: MultimodalTokenizer, segments: list, tokenizer: str | None = None) -> list:
        counted.append(len(segments))
        return codes_of(self, segments, tokenizer)

    monkeypatch.setattr(MultimodalTokenizer, "codes_of", count)
    grown = [*lines[20:25], *lines[:20][::-1], *lines[25:]]  # in front, behind, and the old ones in another order
    manifest.write_text("".join(grown), encoding="utf-8")
    reader = TokenDataset.open(tmp_path / "d")
    make(manifest, tmp_path / "d")
    new = [x for line in lines[20:] for x in json.loads(line)["segments"] if x["type"] != "turn"]
    assert sum(counted) == len(new)
    assert len(reader) == 20  # one that was open goes on with the old dataset
    assert reader[19].size
    monkeypatch.undo()
    monkeypatch.setattr(units, "DOCUMENTS", 7)
    make(manifest, tmp_path / "fresh")
    assert contents(tmp_path / "d") == contents(tmp_path / "fresh")


def test_a_changed_file_is_encoded_again(tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path / "corpus", 12)
    make(manifest, tmp_path / "d")
    picture = next(iter(sorted((tmp_path / "corpus").glob("*.png"))))
    shutil.copy(sorted((tmp_path / "corpus").glob("*.png"))[1], picture)
    sorted((tmp_path / "corpus").glob("*.png"))[-1].unlink()
    assert make(manifest, tmp_path / "d").left_out == 1
    make(manifest, tmp_path / "fresh")
    assert contents(tmp_path / "d") == contents(tmp_path / "fresh")


def test_another_config_is_another_dataset(corpus: Path, tmp_path: Path) -> None:
    make(corpus, tmp_path / "d")
    make(corpus, tmp_path / "d", EncodeConfig(image_size=16))
    make(corpus, tmp_path / "fresh", EncodeConfig(image_size=16))
    assert contents(tmp_path / "d") == contents(tmp_path / "fresh")
    sizes = [x for i in range(40) for x in TokenDataset.open(tmp_path / "d").image_sizes(i)]
    assert set(sizes) == {(16, 16)}


def test_another_vocabulary_is_not_mixed_in(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = MultimodalTokenizer.create(mm().tokenizers, audio_levels=1)
    make(corpus, tmp_path / "d")
    before = contents(tmp_path / "d")
    monkeypatch.setattr(MultimodalTokenizer, "load", lambda path: other)
    with pytest.raises(VocabularyMismatchError):
        make(corpus, tmp_path / "d")
    assert contents(tmp_path / "d") == before


# --- places that cannot be written


def test_a_full_disk_loses_nothing(
    corpus: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Full at any of the files that are written: one line, and the next run completes."""
    fsync, left = os.fsync, 0

    def full(number: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(number)

    monkeypatch.setattr(building.os, "fsync", full)
    command = ("dataset", "build", corpus, "-o", tmp_path / "d", "--workers", 1, "--shard-tokens", 300)
    for attempt in range(100):  # there is room for more and more files
        left = attempt // 2
        code, _, line = run(*command, capsys=capsys)
        if not code:
            break
        assert (code, line.count("\n")) == (1, 1), line
        assert f"{tmp_path / 'd'}: No space left on device; what is done is kept" in line
        assert not (tmp_path / "d/dataset.json").exists()
        assert not list((tmp_path / "d").glob(".shard*"))
    assert attempt > 10
    assert contents(tmp_path / "d") == contents(built)


def test_a_place_that_cannot_be_written(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "d"):
        line = refused("dataset", "build", corpus, "-o", out, capsys=capsys, code=2 if out.exists() else 1)
        assert "file" in line
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cow.png").touch()
    assert "no token dataset" in refused("dataset", "build", corpus, "-o", tmp_path / "photos", capsys=capsys)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["file", "photos"]


def test_a_read_only_place(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def refuse(self: Path, **_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    line = refused("dataset", "build", corpus, "-o", tmp_path / "d", capsys=capsys, code=1)
    assert "Read-only file system" in line
    assert str(tmp_path / "d") in line


def test_bad_requests(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty.jsonl").touch()
    cases = {
        ("empty.jsonl",): "no documents",
        ("missing.jsonl",): "missing.jsonl",
        (corpus, "--image-size", 20): "multiple of 8",
        (corpus, "--image-size", 16, "--max-side", 8): "one of them 0",
        (corpus, "--use", "image=nobody"): "nobody",
        (corpus, "--columns", "text=x"): "columns",
    }
    for arguments, says in cases.items():
        source = tmp_path / str(arguments[0])  # an absolute path stays what it is
        line = refused("dataset", "build", source, "-o", tmp_path / "d", *arguments[1:], capsys=capsys)
        assert says in line
        assert not (tmp_path / "d").exists()


def test_the_reports(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = run("dataset", "plan", corpus, "--json", capsys=capsys)
    planned = json.loads(out)
    assert (code, planned["documents"]) == (0, 40)
    code, out, _ = run("dataset", "build", corpus, "-o", tmp_path / "d", "--workers", 1, "--json", capsys=capsys)
    report = json.loads(out)
    assert (code, report["documents"], report["tokens"], report["left_out"]) == (0, 40, planned["tokens"], 0)
    assert "40 documents" in run("dataset", "plan", corpus, capsys=capsys)[1]


@pytest.mark.slow
def test_a_document_that_kills_its_worker_stops_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tries, then one error that names the documents; what is done is kept."""
    manifest = write_corpus(tmp_path / "corpus", 20)
    monkeypatch.setenv("MMTOK_TEST_KILLS", "document 9")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    with pytest.raises(DataError, match=r"died 3 times while documents 7 to 13 were encoded"):
        make(manifest, tmp_path / "d", workers=2)
    monkeypatch.delenv("MMTOK_TEST_KILLS")
    assert make(manifest, tmp_path / "d").encoded < 20
    make(manifest, tmp_path / "fresh")
    assert contents(tmp_path / "d") == contents(tmp_path / "fresh")


KILLER = """
import json, os, sys
loads = json.loads
def kill(text, *rest, **more):
    if os.environ.get("MMTOK_TEST_KILLS", "?").encode() in (text if isinstance(text, bytes) else b""):
        os.kill(os.getpid(), 9)
    return loads(text, *rest, **more)
if os.environ.get("MMTOK_TEST_KILLS") and "multiprocessing" in str(sys.orig_argv):
    json.loads = kill
"""

"""Checkpoint directories: atomic, checked on load, and nobody else's files are lost."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from torch import nn

from mmtok import checkpoints
from mmtok.checkpoints import (
    atomic_directory,
    atomic_write,
    fingerprint,
    load_strict,
    load_tensors,
    read_checkpoint,
    read_meta,
    resolve,
    save_checkpoint,
    sha256_file,
    tensors_to_bytes,
)
from mmtok.errors import CheckpointError

FILES = {"model.safetensors": bytes(range(256)), "vocab.json": b"{}"}


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(tmp_path / "c", "test-kind", '{"a": 1}\n', FILES, {"steps": 7})
    return tmp_path / "c"


def names(directory):
    return sorted(p.name for p in directory.iterdir())


def edit_meta(directory, **changes):
    meta = json.loads((directory / "mmtok.json").read_text())
    (directory / "mmtok.json").write_text(json.dumps({**meta, **changes}))


def test_round_trip(saved):
    meta, config, files, directory = read_checkpoint(saved)
    assert (meta["kind"], meta["steps"], meta["format"]) == ("test-kind", 7, 1)
    assert config == '{"a": 1}\n'
    assert files == FILES
    assert directory == saved
    assert names(saved) == ["config.json", "mmtok.json", "model.safetensors", "vocab.json"]
    assert names(saved.parent) == ["c"]
    assert all(sha256_file(saved / n) == d for n, d in meta["sha256"].items())


def test_flipped_byte(saved):
    for name in (*FILES, "config.json"):
        data = bytearray((saved / name).read_bytes())
        data[len(data) // 2] ^= 1
        (saved / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"{name}: sha256 is .*damaged or was edited"):
            read_checkpoint(saved)
        data[len(data) // 2] ^= 1
        (saved / name).write_bytes(data)
    read_checkpoint(saved)


def test_truncated_and_missing_files(saved):
    (saved / "model.safetensors").write_bytes(FILES["model.safetensors"][:100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: sha256"):
        read_checkpoint(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        read_checkpoint(saved)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b"{}", b'{"format": 1, "kind": "k"}',
        b'{"format": 1, "kind": "k", "sha256": 3}', b'{"format": 1, "kind": ["k"], "sha256": {}}',
        b'{"format": 1, "kind": "k", "sha256": {"config.json": 3}}', b'{"format": 1, "kind": "k", "sha256": {}}',
    ],
)  # fmt: skip
def test_damaged_meta(saved, text):
    (saved / "mmtok.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"mmtok\.json"):
        read_checkpoint(saved)


def test_other_format_and_paths_that_leave_the_directory(saved):
    edit_meta(saved, format=2)
    with pytest.raises(CheckpointError, match=r"has format 2; this mmtok reads format 1"):
        read_meta(saved)
    (saved / "mmtok.json").write_text('{"format": 3}')
    with pytest.raises(CheckpointError, match="has format 3"):
        read_meta(saved)
    (saved.parent / "secret").write_text("s")
    digests = {n: sha256_file(saved / n) for n in ("config.json", "../secret")}
    edit_meta(saved, format=1, kind="k", sha256=digests)
    with pytest.raises(CheckpointError, match="secret is missing"):
        read_checkpoint(saved)


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at 'nothing-of-this-name': expected a directory with"):
        read_checkpoint("nothing-of-this-name")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        resolve(tmp_path)


def test_bundled_names(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "bundled_directory", lambda: tmp_path / "pretrained")
    save_checkpoint(tmp_path / "pretrained" / "one", "k", "{}", {})
    assert resolve("one") == resolve("pretrained/one") == tmp_path / "pretrained" / "one"
    with pytest.raises(CheckpointError, match="bundled: one"):
        resolve("two")
    with pytest.raises(CheckpointError):
        resolve("elsewhere/one")


def test_saving_again_replaces_its_files_and_keeps_the_others(saved):
    (saved / "README.md").write_text("a model card")
    (saved / "samples").mkdir()
    (saved / "samples" / "a.txt").write_text("a")
    os.symlink("README.md", saved / "card")
    save_checkpoint(saved, "test-kind", '{"a": 2}\n', {"model.safetensors": b"new"})
    _, config, files, _ = read_checkpoint(saved)
    assert (config, files) == ('{"a": 2}\n', {"model.safetensors": b"new"})
    assert (saved / "README.md").read_text() == "a model card"
    assert (saved / "samples" / "a.txt").read_text() == "a"
    assert (saved / "card").is_symlink()
    assert names(saved.parent) == ["c"]


def test_saving_onto_a_file_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes.txt is a file"):
        save_checkpoint(tmp_path / "notes.txt", "k", "{}", {})
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert names(tmp_path) == ["notes.txt"]


def test_saving_through_a_link_writes_where_it_points(tmp_path, saved):
    os.symlink(saved, tmp_path / "link")
    save_checkpoint(tmp_path / "link", "k2", "{}", {})
    assert (tmp_path / "link").is_symlink()
    assert read_meta(saved)["kind"] == "k2"


def test_atomic_directory(tmp_path):
    target = tmp_path / "a" / "d"
    with atomic_directory(target) as work:
        (work / "x").write_text("1")
        assert not target.exists()
    assert (target / "x").read_text() == "1"

    def failing():
        with atomic_directory(target) as work:
            (work / "x").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert (target / "x").read_text() == "1"
    assert names(target.parent) == ["d"]


def test_failed_rename_brings_the_old_directory_back(saved, monkeypatch):
    real = os.replace

    def replace(source, target):
        if target == saved and "old" not in str(source):
            raise OSError("disk full")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(saved, "other", "{}", {})
    monkeypatch.undo()
    assert read_meta(saved)["kind"] == "test-kind"
    assert names(saved.parent) == ["c"]


def test_atomic_write(tmp_path, monkeypatch):
    atomic_write(tmp_path / "deep" / "f", b"one")
    atomic_write(tmp_path / "deep" / "f", b"two")
    assert (tmp_path / "deep" / "f").read_bytes() == b"two"

    def full(handle):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(tmp_path / "deep" / "f", b"three")
    assert (tmp_path / "deep" / "f").read_bytes() == b"two"
    assert names(tmp_path / "deep") == ["f"]


def test_writing_through_a_link_writes_where_it_points(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "f")
    atomic_write(tmp_path / "link", b"one")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / "f").read_bytes() == b"one"


def test_errors_of_the_system_name_the_target(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full") as stop:
        atomic_write(tmp_path / "f", b"one")
    assert (stop.value.errno, stop.value.filename) == (errno.ENOSPC, str(tmp_path / "f"))
    for missing in (None, "elsewhere"):
        with pytest.raises(OSError, match="full") as stop, atomic_directory(tmp_path / "d"):
            raise OSError(errno.ENOSPC, "full", missing)
        assert stop.value.filename == (missing or str(tmp_path / "d"))
    assert names(tmp_path) == []


def test_fingerprint_depends_on_every_part():
    base = fingerprint("k", "{}", {"a": b"1", "b": b"2"})
    assert base == fingerprint("k", "{}", {"b": b"2", "a": b"1"})
    others = [
        fingerprint("l", "{}", {"a": b"1", "b": b"2"}),
        fingerprint("k", "{ }", {"a": b"1", "b": b"2"}),
        fingerprint("k", "{}", {"a": b"2", "b": b"1"}),
        fingerprint("k", "{}", {"a": b"1", "c": b"2"}),
        fingerprint("k", "{}", {"a": b"1b", "": b"2"}),
        fingerprint("k", "{}", {"a": b"1"}),
    ]
    assert len({base, *others}) == 7
    assert base == "dc05a7cda714f4dec3824c2414f0df96a1a16bd67cb7402e40fed14f273f3b51"


def test_load_strict_lists_names():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    state = module.state_dict()
    load_strict(module, state, "here")
    wrong = {"0.bias": state["0.bias"], "0.weight": torch.zeros(3, 3), "2.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError) as info:
        load_strict(module, wrong, "here")
    said = str(info.value)
    assert said.startswith("here: the weights do not fit the model")
    assert "missing: 1.bias, 1.weight" in said
    assert "unexpected: 2.weight" in said
    assert "wrong shape: 0.weight: (3, 3) for (3, 2)" in said


def test_tensors(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    state = {"a": shared, "b": shared.T, "c": torch.tensor(True), "d": torch.zeros(0, 4)}
    data = tensors_to_bytes(state, {"step": "3"})
    assert data == tensors_to_bytes(state, {"step": "3"})
    (tmp_path / "t").write_bytes(data)
    back = load_tensors(tmp_path / "t")
    assert all(torch.equal(back[k], v) for k, v in state.items())
    for cut in (data[:-1], data[:50], b"", b"not tensors at all"):
        (tmp_path / "t").write_bytes(cut)
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            load_tensors(tmp_path / "t")
    with pytest.raises(CheckpointError):
        load_tensors(tmp_path / "absent")

"""Exports of a token dataset, read back by the libraries whose formats they are."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
import token_sets
import webdataset
from commands import contents
from datasets import load_dataset
from pyarrow import parquet

from mmtok.datasets.chunks import chunks, meta_lines
from mmtok.datasets.export import flat, megatron
from mmtok.datasets.export import parquet as to_parquet
from mmtok.datasets.export import webdataset as to_webdataset
from mmtok.datasets.records import SPAN_COLUMNS
from mmtok.datasets.shards import TokenDataset, write_dataset
from mmtok.errors import ConfigError, DataError
from mmtok.registry import TokenizerSpec, VocabularyRegistry

EXPORTS: dict[str, Callable[..., dict[str, Any]]] = {
    "megatron": megatron.export_megatron,
    "flat": flat.export_flat,
    "parquet": to_parquet.export_parquet,
    "webdataset": to_webdataset.export_webdataset,
}
LARGE = VocabularyRegistry.create([TokenizerSpec("words", "text", (70_000,), "w")], max_grid=4)
every_format = pytest.mark.parametrize("form", sorted(EXPORTS))
both_widths = pytest.mark.parametrize("dataset", ["uint16", "uint32"], indirect=True)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenDataset]:
    """Of all modalities in uint16, and of text in uint32; several shards each."""
    folder = tmp_path_factory.mktemp("datasets")
    mm = token_sets.save_tokenizers(folder)
    token_sets.write(folder / "uint16", mm, token_sets.save_media(folder / "media"), 200)
    write_dataset(folder / "uint32", LARGE, token_sets.noise_records(LARGE, 300), 2000)
    return {name: TokenDataset.open(folder / name) for name in ("uint16", "uint32")}


@pytest.fixture
def dataset(datasets: dict[str, TokenDataset], request: pytest.FixtureRequest) -> TokenDataset:
    return datasets[getattr(request, "param", "uint16")]


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """A limit on the size of files, in bytes, stands for a full disk: writing fails at some byte of a file."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@both_widths
def test_megatron_reads_it(dataset: TokenDataset, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

    about = EXPORTS["megatron"](dataset, tmp_path / "out")
    prefix = str(tmp_path / "out" / about["prefix"])
    assert IndexedDataset.exists(prefix)
    for mapped in (True, False):
        back = IndexedDataset(prefix, mmap=mapped)
        assert back.index.dtype is (np.uint16 if dataset.dtype.itemsize == 2 else np.int32)
        assert about["dtype"] == DType(DType.code_from_dtype(back.index.dtype)).name
        assert len(back) == len(dataset)
        assert back.document_indices.tolist() == list(range(len(dataset) + 1))
        assert back.sequence_lengths.tolist() == [len(ids) for ids in dataset]
        assert all(np.array_equal(back[i], ids) for i, ids in enumerate(dataset))
        ids = dataset[1]
        assert np.array_equal(back.get(1, offset=1, length=len(ids) - 2), ids[1:-1])


@both_widths
def test_megatron_writes_the_same_bytes(dataset: TokenDataset, tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    EXPORTS["megatron"](dataset, tmp_path / "out")
    builder = IndexedDatasetBuilder(
        str(tmp_path / "own.bin"), dtype=np.uint16 if dataset.dtype.itemsize == 2 else np.int32
    )
    for ids in dataset:
        builder.add_item(torch.from_numpy(ids))
        builder.end_document()
    builder.finalize(str(tmp_path / "own.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / "out" / f"tokens.{suffix}").read_bytes() == (tmp_path / f"own.{suffix}").read_bytes()


@both_widths
def test_flat_is_a_plain_memmap(dataset: TokenDataset, tmp_path: Path) -> None:
    about = EXPORTS["flat"](dataset, tmp_path / "out")
    tokens = np.memmap(tmp_path / "out" / "tokens.bin", dtype=about["dtype"], mode="r")
    ends = np.load(tmp_path / "out" / "ends.npy", mmap_mode="r")
    assert about["dtype"] == dataset.dtype.name
    assert [x.tolist() for x in np.split(tokens, ends[:-1])] == [ids.tolist() for ids in dataset]
    assert ends[-1] == len(tokens) == dataset.tokens


@both_widths
def test_parquet_with_pyarrow_and_with_datasets(dataset: TokenDataset, tmp_path: Path) -> None:
    EXPORTS["parquet"](dataset, tmp_path / "out")
    table = parquet.read_table(tmp_path / "out" / "data")
    assert table.schema.metadata[b"mmtok.registry"].decode() == dataset.registry.fingerprint
    assert str(table.schema.field("input_ids").type.value_type) == dataset.dtype.name
    names = [x.name for x in dataset.registry.tokenizers]
    rows = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.features["input_ids"].feature.dtype == dataset.dtype.name
    for back in (table.to_pylist(), list(rows)):
        assert len(back) == len(dataset)
        for i, row in enumerate(back):
            assert row["input_ids"] == dataset[i].tolist()
            spans = [[names.index(x[c]) if c == "tokenizer" else x[c] for c in SPAN_COLUMNS] for x in row["spans"]]
            assert spans == dataset.spans(i).tolist()
            assert json.loads(row["meta"]) == dataset.meta(i)
            assert row["id"] == dataset.meta(i)["id"]


@both_widths
def test_webdataset_reads_it(dataset: TokenDataset, tmp_path: Path) -> None:
    EXPORTS["webdataset"](dataset, tmp_path / "out")
    shards = sorted(str(p) for p in (tmp_path / "out").glob("*.tar"))
    assert len(shards) == len(dataset.shards) > 1
    back = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode())
    assert [x["__key__"] for x in back] == [f"{i:09d}" for i in range(len(dataset))]
    for i, sample in enumerate(back):
        assert sample["ids.npy"].dtype == dataset.dtype
        assert np.array_equal(sample["ids.npy"], dataset[i])
        assert sample["spans.npy"].dtype == np.int32
        assert sample["spans.npy"].shape == dataset.spans(i).shape
        assert np.array_equal(sample["spans.npy"], dataset.spans(i))
        assert sample["json"] == dataset.meta(i)
    with tarfile.open(shards[0]) as tar:
        assert dataset.registry.fingerprint in tar.pax_headers["comment"]
        assert {(x.mtime, x.uid, x.gid, x.uname, x.gname, x.mode) for x in tar} == {(0, 0, 0, "", "", 0o644)}


@every_format
def test_the_same_bytes_again_and_the_vocabulary_beside_them(
    dataset: TokenDataset, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = EXPORTS[form](dataset, tmp_path / "a")
    monkeypatch.setattr("time.time", lambda: 4e9)
    seen: list[int] = []
    EXPORTS[form](dataset, tmp_path / "b", seen.append)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sum(seen) == len(dataset)
    assert VocabularyRegistry.from_json((tmp_path / "a/vocab.json").read_text()) == dataset.registry
    assert json.loads((tmp_path / "a/export.json").read_text()) == about
    assert about["format"] == form
    assert (about["registry"], about["dataset"]) == (dataset.registry.fingerprint, dataset.fingerprint)
    assert (about["documents"], about["tokens"]) == (len(dataset), dataset.tokens)
    EXPORTS[form](dataset, tmp_path / "b")  # takes its own place
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@every_format
def test_only_an_export_of_the_format_is_replaced(dataset: TokenDataset, tmp_path: Path, form: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/export.json").write_text("[]")
    EXPORTS["flat" if form != "flat" else "megatron"](dataset, tmp_path / "other")
    for name in ("mine", "other"):
        before = contents(tmp_path / name)
        with pytest.raises(DataError, match=f"export to {form} to replace"):
            EXPORTS[form](dataset, tmp_path / name)
        assert contents(tmp_path / name) == before
    with pytest.raises(DataError, match="no export of a dataset"):
        EXPORTS[form](dataset, dataset.path)
    (tmp_path / "empty").mkdir()
    EXPORTS[form](dataset, tmp_path / "empty")
    write_dataset(tmp_path / "none", LARGE, [])
    with pytest.raises(DataError, match="has no documents"):
        EXPORTS[form](TokenDataset.open(tmp_path / "none"), tmp_path / "out")


@every_format
def test_a_flipped_bit_is_no_export(dataset: TokenDataset, tmp_path: Path, form: str) -> None:
    shutil.copytree(dataset.path, tmp_path / "d")
    file = tmp_path / "d" / dataset.shards[1].file.name
    data = bytearray(file.read_bytes())
    at = data.index(dataset.shards[1].ids(3, 9).tobytes())
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        EXPORTS[form](TokenDataset.open(tmp_path / "d"), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


@every_format
def test_a_full_disk_leaves_nothing(datasets: dict[str, TokenDataset], tmp_path: Path, form: str) -> None:
    with small_disk(2500), pytest.raises(OSError, match="File too large"):
        EXPORTS[form](datasets["uint32"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
import torch
from mmtok.datasets.export.flat import export_flat
from mmtok.datasets.export.megatron import export_megatron
from mmtok.datasets.export.parquet import export_parquet
from mmtok.datasets.export.webdataset import export_webdataset
from mmtok.datasets.shards import TokenDataset
dataset = TokenDataset.open(sys.argv[1])
for name in ("out", "new"):
    for form in ("flat", "megatron", "parquet", "webdataset"):
        child = os.fork()
        if not child:
            globals()[f"export_{form}"](dataset, f"{sys.argv[2]}/{form}/{name}", lambda n: os.kill(os.getpid(), 9))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
"""


def test_killed_half_way(datasets: dict[str, TokenDataset], tmp_path: Path) -> None:
    dataset = datasets["uint32"]
    for form, export in EXPORTS.items():
        export(dataset, tmp_path / form / "out")
    before = {form: contents(tmp_path / form / "out") for form in EXPORTS}
    subprocess.run([sys.executable, "-c", KILLED, dataset.path, tmp_path], check=True)
    for form, export in EXPORTS.items():
        assert contents(tmp_path / form / "out") == before[form]
        assert not (tmp_path / form / "new").exists()
        export(dataset, tmp_path / form / "new")
        assert contents(tmp_path / form / "new") == before[form]


@every_format
def test_memory_does_not_grow(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtok.datasets.chunks.CHUNK_DOCUMENTS", 100)
    monkeypatch.setattr("mmtok.datasets.export.megatron._TOGETHER", 100)
    peaks = []
    together = form == "webdataset"  # where a shard's tar must not grow either
    for shards in (1, 2, 8):  # what is imported is counted in the first
        records = token_sets.noise_records(LARGE, 300 * shards, 1)
        write_dataset(tmp_path / f"{shards}", LARGE, records, 900 * (shards if together else 1))
        dataset = TokenDataset.open(tmp_path / f"{shards}")
        assert len(dataset.shards) == (1 if together else shards)
        tracemalloc.start()
        EXPORTS[form](dataset, tmp_path / "out")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.5 * peaks[1], peaks


def test_chunks_are_all_documents_once(datasets: dict[str, TokenDataset], monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = datasets["uint32"]
    monkeypatch.setattr("mmtok.datasets.chunks.CHUNK_DOCUMENTS", 7)
    for most in (1, 100, 2**20):
        monkeypatch.setattr("mmtok.datasets.chunks.CHUNK_META", 150 if most == 100 else 2**23)
        number = 0
        for shard in dataset.shards:
            for first, part in chunks(shard, most):
                lines = meta_lines(part)
                assert 1 <= len(part.documents) == len(lines) <= 7
                assert len(part.tokens) <= most or len(part.documents) == 1
                assert len(part.meta) <= 150 or most != 100 or len(part.documents) == 1
                assert shard is dataset.locate(number)[0]
                assert first == dataset.locate(number)[1]
                for ids, line in zip(np.split(part.tokens, part.documents[:-1, 0]), lines, strict=True):
                    assert np.array_equal(ids, dataset[number])
                    assert json.loads(line) == dataset.meta(number)
                    number += 1
        assert number == len(dataset)


@every_format
def test_the_command(dataset: TokenDataset, tmp_path: Path, form: str, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    arguments = ("dataset", "export", dataset.path, "--format", form, "-o", out)
    code, stdout, stderr = commands.run(*arguments, "--json", capsys=capsys)
    assert (code, stderr) == (0, "")
    report = json.loads(stdout)
    assert report == {"out": str(out), **json.loads((out / "export.json").read_text())}
    code, stdout, _ = commands.run(*arguments, capsys=capsys)
    assert code == 0
    assert stdout.splitlines()[-1] == f"written {out}"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    assert "expected a free name" in commands.refused(*arguments[:-1], tmp_path / "mine", capsys=capsys)
    assert "--format" in commands.refused(*arguments[:3], "-o", out, capsys=capsys)
    with small_disk(100):
        assert f"mmtok: {out}: File too large" in commands.refused(*arguments, capsys=capsys, code=1)
    assert commands.contents(out)["export.json"]


def test_parquet_without_pyarrow(dataset: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow; pip install 'mmtok\[export\]'"):
        EXPORTS["parquet"](dataset, tmp_path / "out")
    assert not list(tmp_path.iterdir())

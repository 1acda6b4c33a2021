"""Token shards: what is written comes back, damage is seen, and a broken write leaves nothing or the old data."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mmtok.datasets.records import Record
from mmtok.datasets.shards import TokenDataset, _render, token_dtype, write_dataset
from mmtok.errors import DataError, VocabularyError, VocabularyMismatchError
from mmtok.registry import TokenizerSpec, VocabularyRegistry


def registry(text: int = 50) -> VocabularyRegistry:
    return VocabularyRegistry.create([TokenizerSpec("words", "text", (text,), f"w{text}", 3)], max_grid=4)


SMALL, LARGE = registry(), registry(70_000)
DOCUMENTS = [[1, 5, 2], [1, 2], [1, 6, 7, 8, 2], [1, 2]]


def values(path: Path) -> list[list[int]]:
    return [ids.tolist() for ids in TokenDataset.open(path)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from([SMALL, LARGE]), st.integers(1, 12))
def test_documents_come_back(tmp_path_factory, data: st.DataObject, r: VocabularyRegistry, shard_tokens: int) -> None:
    path = tmp_path_factory.getbasetemp() / "dataset"
    used = st.sampled_from([*range(r.block("text").end - 40, r.block("text").end), r.bos, r.eos])
    documents = data.draw(st.lists(st.lists(used, min_size=1, max_size=9), max_size=8))
    write_dataset(path, r, iter(documents), shard_tokens)
    dataset = TokenDataset.open(path, r)
    dataset.verify()
    assert len(dataset) == len(documents)
    assert dataset.tokens == sum(map(len, documents))
    assert [ids.tolist() for ids in dataset] == documents
    assert [dataset[i].tolist() for i in range(len(documents))] == documents
    assert [dataset[-i - 1].tolist() for i in range(len(documents))] == documents[::-1]
    for i in (len(documents), -len(documents) - 1):
        with pytest.raises(IndexError):
            dataset[i]
    assert all(ids.dtype == np.int64 for ids in dataset)
    shards = json.loads((path / "dataset.json").read_text())["shards"]
    assert all(s["tokens"] <= shard_tokens or s["documents"] == 1 for s in shards)
    begins = itertools.accumulate((s["documents"] for s in shards), initial=0)
    for begin, before in zip(list(begins)[1:-1], shards, strict=False):  # no shard is begun before it must be
        assert before["tokens"] + len(documents[begin]) > shard_tokens


def test_the_files_are_what_the_format_says(tmp_path: Path) -> None:
    for r, dtype in ((SMALL, "<u2"), (LARGE, "<u4")):
        write_dataset(tmp_path / "d", r, DOCUMENTS, shard_tokens=7)
        assert token_dtype(r) == np.dtype(dtype)
        files = {p.name.split(".")[0]: p for p in (tmp_path / "d").iterdir()}
        assert sorted(files) == ["dataset", "quarantine", "shard-00000", "shard-00001", "vocab"]
        first, second = (load_file(files[f"shard-0000{n}"]) for n in (0, 1))  # by another library
        assert first["tokens"].dtype == np.dtype(dtype)
        assert (first["tokens"].tolist(), second["tokens"].tolist()) == ([1, 5, 2, 1, 2], [1, 6, 7, 8, 2, 1, 2])
        assert first["documents"].tolist() == [[3, 0, 11], [5, 0, 22]]
        assert second["documents"].tolist() == [[5, 0, 11], [7, 0, 22]]
        assert first["meta"].tobytes()[:22] == b'{"id":"0"}\n{"id":"1"}\n'
        data = files["shard-00000"].read_bytes()
        assert files["shard-00000"].name == f"shard-00000.{hashlib.sha256(data).hexdigest()[:8]}.safetensors"
        assert first["sums"].tolist() == [xxhash.xxh3_64_intdigest(data[:-8])]
        assert files["quarantine"].read_bytes() == b""
        assert VocabularyRegistry.from_json((tmp_path / "d/vocab.json").read_text()) == r


def test_numpy_and_torch_documents(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", SMALL, [np.array([1, 2], np.uint16), torch.tensor([1, 5, 2])])
    assert values(tmp_path / "d") == [[1, 2], [1, 5, 2]]


def test_torch_loads_it(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", SMALL, DOCUMENTS)
    loader = torch.utils.data.DataLoader(TokenDataset.open(tmp_path / "d"), batch_size=None)  # type: ignore[arg-type]
    assert [x.tolist() for x in loader] == DOCUMENTS


@pytest.mark.parametrize(
    ("document", "error", "says"),
    [
        ([1, 5, 64], VocabularyError, "document 2, position 2: id 64 outside the vocabulary of 64"),
        ([1, -1], VocabularyError, "document 2, position 1"),
        ([SMALL.block("text").end], VocabularyError, "document 2, position 0: unused id 55"),
        ([], DataError, "document 2 has shape [0]"),
        ([[1, 2]], DataError, "document 2 has shape [1, 2]"),
        ([1.5], VocabularyError, "document 2"),
    ],
)
def test_bad_documents_are_not_written(tmp_path: Path, document: list, error: type, says: str) -> None:
    for _ in range(2):  # into nothing, then in the place of older data
        with pytest.raises(error) as stop:
            write_dataset(tmp_path / "d", SMALL, [*DOCUMENTS[:2], document], shard_tokens=3)
        assert says in str(stop.value)
        if not (tmp_path / "d").exists():
            assert not list(tmp_path.iterdir())
            write_dataset(tmp_path / "d", SMALL, DOCUMENTS)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    assert values(tmp_path / "d") == DOCUMENTS


def test_an_interrupt_leaves_the_old_data(tmp_path: Path) -> None:
    def interrupted() -> Iterator[list[int]]:
        yield [1, 2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "d", SMALL, interrupted())
    assert not list(tmp_path.iterdir())
    write_dataset(tmp_path / "d", SMALL, DOCUMENTS)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "d", SMALL, interrupted())
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    assert values(tmp_path / "d") == DOCUMENTS
    write_dataset(tmp_path / "d", SMALL, [[1, 2]])
    assert values(tmp_path / "d") == [[1, 2]]


def test_a_killed_writer_leaves_the_old_data(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", SMALL, DOCUMENTS)
    lines = [
        "import os, signal",
        "from mmtok.datasets.shards import TokenDataset, write_dataset",
        "def documents():",
        "    yield from [[1, 2]] * 100",
        "    os.kill(os.getpid(), signal.SIGKILL)",
        "write_dataset('d', TokenDataset.open('d').registry, documents(), shard_tokens=7)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert values(tmp_path / "d") == DOCUMENTS
    assert all(p.name == "d" or p.name.startswith(".d.") for p in tmp_path.iterdir())


def test_other_data_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    write_dataset(tmp_path / "photos", SMALL, DOCUMENTS)  # an empty directory is free
    (tmp_path / "photos" / "dataset.json").rename(tmp_path / "photos" / "cow.png")
    (tmp_path / "file").write_text("x")
    for name in ("photos", "file"):
        with pytest.raises(DataError, match="no token dataset"):
            write_dataset(tmp_path / name, SMALL, DOCUMENTS)
    assert (tmp_path / "photos" / "cow.png").is_file()
    with pytest.raises(DataError, match="shard_tokens is 0"):
        write_dataset(tmp_path / "d", SMALL, DOCUMENTS, shard_tokens=0)


def test_another_vocabulary_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", SMALL, DOCUMENTS)
    with pytest.raises(VocabularyMismatchError) as stop:
        TokenDataset.open(tmp_path / "d", registry(51))
    assert str(tmp_path / "d") in str(stop.value)
    assert "50" in str(stop.value)
    assert "51" in str(stop.value)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "d", SMALL, DOCUMENTS, shard_tokens=7)
    return tmp_path / "d"


def edit(path: Path, change) -> None:
    """Change dataset.json, with a sum that is right again."""
    value = json.loads((path / "dataset.json").read_text())
    change(value)
    (path / "dataset.json").write_bytes(_render(value))


def shard(path: Path, number: int) -> Path:
    return next(path.glob(f"shard-0000{number}.*"))


DAMAGE = {
    "no dataset.json": (lambda d: (d / "dataset.json").unlink(), "dataset.json"),
    "no vocabulary": (lambda d: (d / "vocab.json").unlink(), "vocab.json"),
    "no shard": (lambda d: shard(d, 1).unlink(), "shard-00001"),
    "cut json": (lambda d: (d / "dataset.json").write_text((d / "dataset.json").read_text()[:-9]), "not JSON"),
    "list": (lambda d: (d / "dataset.json").write_text("[]"), "format 'list'"),
    "format": (lambda d: edit(d, lambda v: v.update(format=9)), "format 9"),
    "cut shard": (lambda d: shard(d, 0).write_bytes(b"\1\0"), "2 bytes, expected"),
    "longer shard": (lambda d: shard(d, 0).open("ab").write(b"\0"), "bytes, expected"),
    "empty shard": (lambda d: shard(d, 0).write_bytes(b""), "0 bytes, expected"),
    "another shard": (lambda d: shard(d, 0).write_bytes(shard(d, 0).read_bytes()[::-1]), "no token shard"),
    "more documents": (lambda d: edit(d, lambda v: v["shards"][0].update(documents=3)), "expected documents"),
    "more tokens": (lambda d: edit(d, lambda v: v["shards"][0].update(tokens=9)), "expected tokens"),
    "foreign dtype": (lambda d: edit(d, lambda v: v.update(dtype="uint32")), "dtype uint32, expected uint16"),
    "odd dtype": (lambda d: edit(d, lambda v: v.update(dtype="O")), "dtype O"),
    "vocabulary": (lambda d: (d / "vocab.json").write_text(LARGE.to_json()), "put back"),
    "vocabulary text": (lambda d: (d / "vocab.json").write_text("{}"), "not a vocabulary"),
    "counts": (lambda d: edit(d, lambda v: v["shards"][0].update(documents=0)), "damaged"),
    "no sum": (lambda d: edit(d, lambda v: v["shards"][0].pop("sums")), "damaged"),
    "a path": (lambda d: edit(d, lambda v: v["shards"][0].update(file="../x")), "damaged"),
    "no shards": (lambda d: edit(d, lambda v: v.pop("shards")), "damaged"),
    "entry": (lambda d: edit(d, lambda v: v["shards"].append(3)), "damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_seen_on_open(written: Path, case: str) -> None:
    change, says = DAMAGE[case]
    assert values(written) == DOCUMENTS
    change(written)
    with pytest.raises((DataError, VocabularyError)) as stop:
        TokenDataset.open(written)
    assert says in str(stop.value)


def read_everything(path: Path, verify: bool) -> None:
    dataset = TokenDataset.open(path)
    if verify:
        dataset.verify()
    for i in range(len(dataset)):
        dataset[i], dataset.spans(i), dataset.meta(i), dataset.image_sizes(i)
        where, at = dataset.locate(i)
        where.key(at)
    for x in dataset.shards:
        x.check_all()  # what no document has: the padding


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """Of every file: on opening, on reading every part, or by verify; of shards without verify."""
    write_records(tmp_path / "d", 40)
    random = np.random.default_rng(0)
    for file in sorted((tmp_path / "d").iterdir()):
        data = file.read_bytes()
        for bit in random.choice(8 * len(data), min(8 * len(data), 400), replace=False).tolist():
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            with pytest.raises((DataError, VocabularyError)):
                read_everything(tmp_path / "d", verify=not file.name.startswith("shard"))
        file.write_bytes(data)
    TokenDataset.open(tmp_path / "d").verify()


def test_without_checks_nothing_is_compared(written: Path) -> None:
    data = load_file(shard(written, 0))
    raw = bytearray(shard(written, 0).read_bytes())
    at = bytes(raw).index(data["tokens"].tobytes())
    raw[at + 2] ^= 1  # the 5
    shard(written, 0).write_bytes(raw)
    assert TokenDataset.open(written, check=False)[0].tolist() == [1, 4, 2]
    with pytest.raises(DataError, match=r"shard-00000.*the block of bytes 0 to"):
        TokenDataset.open(written)


def test_a_damaged_block_leaves_the_others_readable(tmp_path: Path) -> None:
    documents = [np.full(3000, 5 + i) for i in range(40)]  # 6,000 bytes each, blocks of 65,536
    write_dataset(tmp_path / "d", SMALL, documents)
    file = shard(tmp_path / "d", 0)
    raw = bytearray(file.read_bytes())
    at = bytes(raw).rindex(np.full(3000, 5 + 30, "<u2").tobytes())
    raw[at] ^= 8
    file.write_bytes(raw)
    dataset = TokenDataset.open(tmp_path / "d")
    assert dataset[3].tolist() == documents[3].tolist()
    for _ in range(2):  # not only the first time
        with pytest.raises(DataError, match="is damaged"):
            dataset[30]
    with pytest.raises(DataError, match="sha256"):
        dataset.verify()


WORDS = SMALL.block("text").start


def write_records(path: Path, count: int, **how) -> list[Record]:
    """Documents of two texts each, whose spans, meta and keys differ."""
    random = np.random.default_rng(count)
    out = []
    for i in range(count):
        n, m = random.integers(1, 30, 2).tolist()
        ids = np.concatenate([[SMALL.bos], WORDS + random.integers(0, 50, n + m), [SMALL.eos]])
        spans = np.array([[1, 1 + n, 0, 0, n, 0], [1 + n, 1 + n + m, 0, 1, m, 0]][: 1 + i % 2], np.int32)
        out.append(Record(ids, spans, {"id": f"é{i}\udc80", "segments": [{"voice": "x" * (i % 3)}]}, bytes([i] * 16)))
    write_dataset(path, SMALL, iter(out), **how)
    return out


def test_records_come_back(tmp_path: Path) -> None:
    records = write_records(tmp_path / "d", 30, shard_tokens=200, settings={"image_size": 64}, quarantine=[{"id": "é"}])
    dataset = TokenDataset.open(tmp_path / "d")
    assert len(dataset.shards) > 3
    assert dataset.settings == {"image_size": 64}
    assert (list(dataset.quarantined()), dataset.left_out) == ([{"id": "é"}], 1)
    for i, record in enumerate(records):
        assert np.array_equal(dataset[i], record.ids)
        assert np.array_equal(dataset.spans(i), record.spans)
        assert dataset.meta(i) == record.meta
        where, at = dataset.locate(i)
        assert where.key(at) == record.key
        for j, span in enumerate(record.spans):
            assert np.array_equal(dataset.span(i, j), record.ids[span[0] : span[1]])
        with pytest.raises(IndexError):
            dataset.span(i, len(record.spans))
    parts = [x.part(1, 3) for x in dataset.shards if x.documents > 3]
    assert all(p.documents[-1].tolist() == [len(p.tokens), len(p.spans), len(p.meta)] for p in parts)
    again = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(again[7], dataset[7])
    assert again.fingerprint == dataset.fingerprint


def test_equal_documents_give_equal_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_records(tmp_path / name, 30, shard_tokens=200)
    files = [sorted((p.name, p.read_bytes()) for p in (tmp_path / name).iterdir()) for name in "ab"]
    assert files[0] == files[1]


def test_an_open_dataset_outlives_its_replacement(tmp_path: Path) -> None:
    records = write_records(tmp_path / "d", 30, shard_tokens=200)
    dataset = TokenDataset.open(tmp_path / "d")
    write_records(tmp_path / "d", 5)
    assert all(np.array_equal(dataset[i], x.ids) for i, x in enumerate(records))
    assert len(TokenDataset.open(tmp_path / "d")) == 5

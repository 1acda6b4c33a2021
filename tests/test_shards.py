"""Token shards: what is written comes back, damage is seen, and a broken write leaves nothing or the old data."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.datasets.shards import TokenDataset, token_dtype, write_dataset
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
        files = sorted(p.name for p in (tmp_path / "d").iterdir())
        shards = [f"shard-0000{n}.{kind}" for n in (0, 1) for kind in ("offsets", "tokens")]
        assert files == ["dataset.json", *shards, "vocab.json"]
        assert np.fromfile(tmp_path / "d/shard-00000.tokens", dtype).tolist() == [1, 5, 2, 1, 2]
        assert np.fromfile(tmp_path / "d/shard-00000.offsets", "<i8").tolist() == [3, 5]
        assert np.fromfile(tmp_path / "d/shard-00001.offsets", "<i8").tolist() == [5, 7]
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
    value = json.loads((path / "dataset.json").read_text())
    change(value)
    (path / "dataset.json").write_text(json.dumps(value))


def offsets(*ends: int):
    return lambda d: np.array(ends, "<i8").tofile(d / "shard-00000.offsets")


DAMAGE = {
    "no dataset.json": (lambda d: (d / "dataset.json").unlink(), "dataset.json"),
    "no vocabulary": (lambda d: (d / "vocab.json").unlink(), "vocab.json"),
    "no tokens": (lambda d: (d / "shard-00001.tokens").unlink(), "shard-00001.tokens"),
    "no offsets": (lambda d: (d / "shard-00000.offsets").unlink(), "shard-00000.offsets"),
    "cut json": (lambda d: (d / "dataset.json").write_text((d / "dataset.json").read_text()[:-9]), "not JSON"),
    "list": (lambda d: (d / "dataset.json").write_text("[]"), "format 'list'"),
    "format": (lambda d: edit(d, lambda v: v.update(format=9)), "format 9"),
    "cut tokens": (lambda d: (d / "shard-00000.tokens").write_bytes(b"\1\0"), "2 bytes, expected 10"),
    "longer tokens": (lambda d: (d / "shard-00000.tokens").open("ab").write(b"\0\0"), "12 bytes, expected 10"),
    "cut offsets": (lambda d: (d / "shard-00000.offsets").write_bytes(b""), "0 bytes"),
    "offsets that fall": (offsets(6, 5), "does not rise"),
    "offsets that stay": (offsets(5, 5), "does not rise"),
    "offsets from 0": (offsets(0, 5), "does not rise"),
    "offsets beyond": (offsets(3, 6), "does not rise"),
    "foreign dtype": (lambda d: edit(d, lambda v: v.update(dtype="uint32")), "dtype uint32, expected uint16"),
    "odd dtype": (lambda d: edit(d, lambda v: v.update(dtype="O")), "dtype O"),
    "vocabulary": (lambda d: (d / "vocab.json").write_text(LARGE.to_json()), "put back"),
    "vocabulary text": (lambda d: (d / "vocab.json").write_text("{}"), "not a vocabulary"),
    "counts": (lambda d: edit(d, lambda v: v["shards"][0].update(documents=0)), "damaged"),
    "no sum": (lambda d: edit(d, lambda v: v["shards"][0]["sha256"].pop("tokens")), "damaged"),
    "no shards": (lambda d: edit(d, lambda v: v.pop("shards")), "damaged"),
    "shard": (lambda d: edit(d, lambda v: v["shards"].append(3)), "damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_seen_on_open(written: Path, case: str) -> None:
    change, says = DAMAGE[case]
    assert values(written) == DOCUMENTS
    change(written)
    with pytest.raises((DataError, VocabularyError)) as stop:
        TokenDataset.open(written)
    assert says in str(stop.value)


@pytest.mark.parametrize("name", [f"shard-0000{n}.{kind}" for n in (0, 1) for kind in ("tokens", "offsets")])
def test_a_flipped_bit_is_seen_by_verify(written: Path, name: str) -> None:
    TokenDataset.open(written).verify()
    data = bytearray((written / name).read_bytes())
    # An end that still rises: [3, 5] -> [2, 5] and [5, 7] -> [4, 7].
    data[0] ^= 1
    (written / name).write_bytes(data)
    with pytest.raises(DataError, match=name):
        TokenDataset.open(written).verify()

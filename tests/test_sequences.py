"""ids.json: what is written comes back, and every damage is one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.errors import DataError, MmtokError, VocabularyError
from mmtok.registry import TokenizerSpec, VocabularyRegistry
from mmtok.sequences import read_ids, write_ids

REGISTRY = VocabularyRegistry.create(
    [TokenizerSpec("words", "text", (50,), "w"), TokenizerSpec("sounds", "audio", (8, 8), "s", 2)], max_grid=4
)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
ids = st.lists(st.integers(0, REGISTRY.padded_size - 1), max_size=9)
sizes = st.lists(st.one_of(st.none(), st.tuples(st.integers(1, 10**6), st.integers(1, 10**6))), max_size=3)
documents = st.lists(st.tuples(names, ids, sizes), max_size=4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(documents)
def test_what_is_written_comes_back(tmp_path_factory: pytest.TempPathFactory, value: list) -> None:
    path = tmp_path_factory.getbasetemp() / "ids.json"
    write_ids(path, REGISTRY, value)
    registry, back = read_ids(path)
    assert registry == REGISTRY
    assert [(name, ids.tolist(), sizes or []) for name, ids, sizes in back] == value
    assert all(x.ids.dtype == np.int64 and x.ids.ndim == 1 for x in back)


def test_numpy_torch_and_lists_are_one(tmp_path: Path) -> None:
    for number, ids in enumerate(([1, 2], np.array([1, 2], np.uint16), torch.tensor([1, 2]))):
        write_ids(tmp_path / f"{number}.json", REGISTRY, [("a", ids)])
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize(
    ("entry", "error", "says"),
    [
        (("a", [0.5]), VocabularyError, "document 1 (a)"),
        (("a", [[1]]), VocabularyError, "expected [n]"),
        (("a", [1, -1]), VocabularyError, "document 1 (a), position 1: got id -1 outside the vocabulary of 128"),
        (("a", [REGISTRY.padded_size]), VocabularyError, "position 0"),
        ((3, [1]), DataError, "name 3"),
        (("a", [1], [(5, 0)]), DataError, "document 1 (a), image 0: got the size (5, 0)"),
    ],
)
def test_bad_documents_are_not_written(tmp_path: Path, entry: tuple, error: type, says: str) -> None:
    path = tmp_path / "ids.json"
    write_ids(path, REGISTRY, [("old", [1])])
    before = path.read_bytes()
    with pytest.raises(error) as stop:
        write_ids(path, REGISTRY, [("fine", [1, 2]), entry])
    assert says in str(stop.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_ids(tmp_path / "ids.json", REGISTRY, [("a", [1, 2]), ("b", [1, 60, 2])])
    return tmp_path / "ids.json"


DAMAGE = {
    "format": (lambda v: v.update(format=2), DataError, "format 2"),
    "no format": (lambda v: v.pop("format"), DataError, "no ids.json"),
    "no vocabulary": (lambda v: v.pop("vocabulary"), DataError, "lacks vocabulary"),
    "fingerprint": (lambda v: v.update(fingerprint="0" * 64), VocabularyError, "000000000000"),
    "fingerprint type": (lambda v: v.update(fingerprint=7), VocabularyError, "vocabulary is 7,"),
    "vocabulary": (lambda v: v["vocabulary"]["blocks"][1].update(size=49), VocabularyError, "words"),
    "head-room": (lambda v: v["vocabulary"]["blocks"][3].update(capacity=9), VocabularyError, "was edited"),
    "vocabulary type": (lambda v: v.update(vocabulary=[]), VocabularyError, "not a vocabulary"),
    "documents": (lambda v: v.update(documents={}), DataError, "expected a list"),
    "document": (lambda v: v["documents"].append(3), DataError, "document 2: got int"),
    "unknown key": (lambda v: v["documents"][0].update(more=1), DataError, "ids, more, name"),
    "no name": (lambda v: v["documents"][0].pop("name"), DataError, "got ids"),
    "name": (lambda v: v["documents"][0].update(name=None), DataError, "NoneType"),
    "ids": (lambda v: v["documents"][1].update(ids="12"), DataError, "document 1"),
    "fraction": (lambda v: v["documents"][1]["ids"].append(1.0), DataError, "document 1 (b), position 3: got 1.0"),
    "bool": (lambda v: v["documents"][1]["ids"].append(True), DataError, "got True"),
    "nested": (lambda v: v["documents"][1]["ids"].append([1]), DataError, "got [1]"),
    "outside": (lambda v: v["documents"][0]["ids"].append(10**30), VocabularyError, "outside the vocabulary"),
    "sizes": (lambda v: v["documents"][0].update(image_sizes=5), DataError, "image_sizes is of type int"),
    "size": (
        lambda v: v["documents"][1].update(image_sizes=[None, [1, 2.0]]),
        DataError,
        "document 1 (b), image 1: got the size [1, 2.0], expected null or [height, width] in pixels",
    ),
    "sides": (lambda v: v["documents"][1].update(image_sizes=[[1, 2, 3]]), DataError, "got the size [1, 2, 3]"),
    "bool side": (lambda v: v["documents"][1].update(image_sizes=[[True, 2]]), DataError, "got the size [True, 2]"),
    "negative": (lambda v: v["documents"][0]["ids"].append(-1), VocabularyError, "id -1"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage(written: Path, case: str) -> None:
    change, error, says = DAMAGE[case]
    value = json.loads(written.read_text())
    change(value)
    written.write_text(json.dumps(value))
    with pytest.raises(error) as stop:
        read_ids(written)
    assert says in str(stop.value)
    assert str(written) in str(stop.value)


def test_no_file_and_no_text(tmp_path: Path, written: Path) -> None:
    for content in (b"", b"\xff\xfe", b"[" * 100_000, b"[]", b"null"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(DataError):
            read_ids(tmp_path / "x.json")
    with pytest.raises(DataError, match="No such file"):
        read_ids(tmp_path / "nowhere.json")
    with pytest.raises(DataError):
        read_ids(tmp_path)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.floats(0, 1, exclude_max=True))
def test_every_truncation_is_seen(tmp_path_factory: pytest.TempPathFactory, part: float) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.json"
    write_ids(path, REGISTRY, [("a", [1, 2])])
    data = path.read_bytes().rstrip()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(MmtokError):
        read_ids(path)

"""Faults of a dataset are found and told, each where it is; what is sound has none."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
import token_sets
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.datasets import shards
from mmtok.datasets.records import Record
from mmtok.datasets.shards import write_dataset
from mmtok.datasets.verify import Fault, faults, size_of
from mmtok.errors import DataError
from mmtok.multimodal import MultimodalTokenizer

Change = Callable[[Record], Record]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MultimodalTokenizer, list[Record]]:
    """A folder with tokenizers and the dataset d of two shards, and what is in it."""
    folder = tmp_path_factory.mktemp("verify")
    mm = token_sets.save_tokenizers(folder)
    records = [token_sets.record(mm, x) for x in token_sets.save_media(folder / "media")]
    quarantine = [{"index": 9, "id": "x", "segment": 0, "reason": "x.png: no such file"}]
    write_dataset(folder / "d", mm.registry, records, 200, quarantine=quarantine)
    return folder, mm, records


@pytest.fixture
def copy(made: tuple[Path, MultimodalTokenizer, list[Record]], tmp_path: Path) -> Path:
    """The dataset, to be damaged."""
    return Path(shutil.copytree(made[0] / "d", tmp_path / "d"))


def with_change(made: Any, path: Path, number: int, change: Change) -> list[Fault]:
    """The faults of a dataset that was written, with right sums, with one document changed."""
    _, mm, records = made
    write_dataset(path, mm.registry, [change(x) if i == number else x for i, x in enumerate(records)], 200)
    return list(faults(path))


def replaced(column: int, row: int, value: int) -> Change:
    """Another number in the table of spans."""

    def change(record: Record) -> Record:
        spans = record.spans.copy()
        spans[row, column] = value
        return record._replace(spans=spans)

    return change


def test_a_sound_dataset_has_no_faults(made: Any) -> None:
    seen: list[int] = []
    assert list(faults(made[0] / "d", tokenizers=True, advance=seen.append)) == []
    assert sum(seen) == len(made[2]) == size_of(made[0] / "d")[0]
    assert size_of(made[0] / "d")[1] == sum(len(x.ids) for x in made[2])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_every_flipped_bit_is_a_fault_of_its_file(made: Any, data: st.DataObject) -> None:
    folder = made[0] / "d"
    file = folder / data.draw(st.sampled_from(sorted(p.name for p in folder.iterdir())))
    sound = file.read_bytes()
    damaged = bytearray(sound)
    at = data.draw(st.integers(0, len(sound) - 1))
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(damaged)
    try:
        if file.name == "dataset.json":  # which says what all the others should be
            with pytest.raises(DataError, match=r"dataset\.json"):
                list(faults(folder))
        else:
            found = list(faults(folder))
            assert found[0].file == file.name
            assert "sha256" in found[0].message
            assert all(f.document is None for f in found)
    finally:
        file.write_bytes(sound)


def test_all_damaged_files_are_told_at_once(copy: Path) -> None:
    first, second = sorted(copy.glob("shard-*"))
    first.write_bytes(first.read_bytes()[:-3])
    second.unlink()
    next(copy.glob("quarantine*")).unlink()
    found = {f.file.split(".")[0]: f.message for f in faults(copy)}
    assert list(found) == ["quarantine", "shard-00000", "shard-00001"]
    assert f"{first.stat().st_size} bytes, expected {first.stat().st_size + 3}" in found["shard-00000"]
    assert "No such file" in found["shard-00001"]
    assert "No such file" in found["quarantine"]


def test_a_document_that_breaks_the_grammar(made: Any, tmp_path: Path) -> None:
    mm, records = made[1], made[2]
    image = records[0].spans[1]

    def shorten(record: Record) -> Record:
        return record._replace(ids=np.delete(record.ids, image[1] - 2))

    found = with_change(made, tmp_path / "d", 0, shorten)
    assert [(f.document, f.position) for f in found] == [(0, image[1] - 2)]
    assert found[0].message.startswith("got </image>, expected image code")
    cut = with_change(made, tmp_path / "d", 4, lambda x: x._replace(ids=x.ids[:-1]))
    assert [(f.document, f.position) for f in cut] == [(4, len(records[4].ids) - 1)]
    assert "the end of the sequence" in cut[0].message
    name = next(p.name for p in (tmp_path / "d").glob("shard-00001*"))
    assert str(cut[0]).startswith(f"{name}, document 4, position {cut[0].position}: got ")
    assert mm.registry.describe(mm.registry.eos) in cut[0].message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replaced(0, 1, 26), "span 1 is {'start': 26"),
        (replaced(1, 1, 63), "'end': 63"),
        (replaced(2, 1, 0), "'tokenizer': 0"),
        (replaced(3, 1, -1), "numbers that rise"),
        (replaced(4, 1, 41), "41x56 pixels, expected a size that has 5x7 codes"),
        (replaced(5, 1, 0), "40x0 pixels"),
        (replaced(4, 0, -1), "a text of -1 bytes"),
        (lambda x: x._replace(spans=x.spans[:1]), "1 spans, expected 2"),
        (lambda x: x._replace(spans=np.concatenate([x.spans, x.spans[1:]])), "3 spans, expected 2"),
        (lambda x: x._replace(meta={"segments": []}), "an object with an id"),
    ],
)
def test_tables_that_are_not_those_of_the_document(made: Any, tmp_path: Path, change: Change, words: str) -> None:
    found = with_change(made, tmp_path / "d", 0, change)
    assert [f.document for f in found] == [0]
    assert words.replace("an object", "a JSON object") in found[0].message, found[0]


@pytest.mark.parametrize(("column", "value"), [(4, 100_000), (4, -5), (5, 8000), (4, 0)])
def test_sizes_of_a_sound(made: Any, tmp_path: Path, column: int, value: int) -> None:
    (fault,) = with_change(made, tmp_path / "d", 1, replaced(column, 2, value))
    assert fault.document == 1
    assert "expected up to 3200 at 16000 Hz" in fault.message


def test_unknown_sizes_are_no_fault(made: Any, tmp_path: Path) -> None:
    def forget(record: Record) -> Record:
        spans = record.spans.copy()
        spans[:, 4:] = 0
        return record._replace(spans=spans)

    assert with_change(made, tmp_path / "d", 1, forget) == []


def test_counts_and_quarantine_that_do_not_agree(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a faulty writer would leave them: dataset.json is consistent in itself."""
    value = json.loads((copy / "dataset.json").read_text())
    value["documents"] += 1
    value["tokens"] -= 1
    value["quarantine"]["documents"] = 2
    (copy / "dataset.json").write_bytes(shards._render(value))
    found = [(f.file.split(".")[0], f.message) for f in faults(copy)]
    assert [name for name, _ in found] == ["quarantine", "dataset", "dataset"]
    assert "1 lines, expected 2" in found[0][1]
    assert "7 documents, expected 6" in found[1][1]
    assert f"{value['tokens']} tokens, expected {value['tokens'] + 1}" in found[2][1]


def test_a_line_of_the_quarantine_that_is_no_reason(made: Any, tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", made[1].registry, made[2], quarantine=[{"reason": "r"}, {"id": "no reason"}])
    (fault,) = faults(tmp_path / "d")
    assert "line 2 is no JSON object with a reason" in fault.message


def test_another_vocabulary_and_other_tokenizers(made: Any, copy: Path, tmp_path: Path) -> None:
    missing = list(faults(copy, tokenizers=True))
    assert [f.file for f in missing] == ["vocab.json"] * 3
    assert all("needs the tokenizer" in f.message for f in missing)
    other = MultimodalTokenizer.create(made[1].tokenizers, max_grid=17)
    for name, model in made[1].tokenizers.items():
        model.save(tmp_path / name)
    assert list(faults(copy, tokenizers=True)) == []
    made[1].tokenizers["words"].train(["other words"], 270).save(tmp_path / "words")
    (fault,) = faults(copy, tokenizers=True)
    assert "'words' at hand has fingerprint" in fault.message
    (copy / "vocab.json").write_text(other.registry.to_json())
    found = list(faults(copy))
    assert ["sha256" in found[0].message, "is the vocabulary" in found[1].message] == [True, True]


def test_memory_does_not_grow(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtok.datasets.chunks.CHUNK_DOCUMENTS", 50)
    peaks = []
    for times in (20, 20, 160):
        records = (x for _ in range(times) for x in made[2])
        write_dataset(tmp_path / "d", made[1].registry, records, 4000)
        tracemalloc.start()
        assert not any(faults(tmp_path / "d"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.5 * peaks[1], peaks


def test_the_command(made: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    count, tokens = size_of(made[0] / "d")
    code, stdout, stderr = commands.run("dataset", "verify", made[0] / "d", "--tokenizers", capsys=capsys)
    assert (code, stderr) == (0, "")
    assert stdout.startswith(f"no faults in {count} documents, {tokens} tokens; ")
    with_change(made, tmp_path / "d", 0, replaced(4, 1, 41))
    code, stdout, stderr = commands.run("dataset", "verify", tmp_path / "d", capsys=capsys)
    assert (code, stderr) == (2, "")
    fault, summary = stdout.splitlines()
    assert "document 0, position 25: span 1 is an image of 41x56 pixels" in fault
    assert summary.startswith("1 fault in 6 documents")
    code, stdout, _ = commands.run("dataset", "verify", tmp_path / "d", "--json", capsys=capsys)
    report = json.loads(stdout)
    assert code == 2
    assert (report["documents"], report["faults"], report["first"]) == (count, 1, [fault])
    assert "dataset.json" in commands.refused("dataset", "verify", tmp_path, capsys=capsys)


def test_the_command_tells_the_first_faults(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmtok.cli.dataset_tools.SHOWN", 3)
    broken = [x._replace(ids=x.ids[:-1]) for x in made[2]]
    write_dataset(tmp_path / "d", made[1].registry, broken)
    code, stdout, _ = commands.run("dataset", "verify", tmp_path / "d", capsys=capsys)
    assert code == 2
    assert stdout.splitlines()[3:5] == ["and 3 more", stdout.splitlines()[-1]]
    assert stdout.splitlines()[-1].startswith("6 faults in 6 documents")

"""Every kind of source gives the same documents, from a disk or from a URL, and says what it cannot read."""

from __future__ import annotations

import datetime
import decimal
import io
import json
import os
import sys
import tarfile
import tracemalloc

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from noise import encoded, pixels, write_tar

from mmtok.datasets.sources import open_source, tables
from mmtok.datasets.sources.content import local_copy
from mmtok.errors import DataError, MediaError

PNG = [encoded(pixels(i)) for i in range(4)]


def sound(seed: int, kind: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.random.default_rng(seed).uniform(-0.5, 0.5, 800), 8000, format=kind)
    return buffer.getvalue()


WAV = [sound(i) for i in range(2)]


def content(segment):
    with local_copy(segment) as it, open(it.path, "rb") as file:
        return file.read()


def spelled(source, columns=None):
    """Each document as (id, what its segments hold, its other keys); errors as their text."""
    return [
        x.get("error")
        or (
            x["id"],
            [s["text"] if s["type"] == "text" else s.get("role") or (s["type"], content(s)) for s in x["segments"]],
            {k: v for k, v in x.items() if k not in ("id", "segments")},
        )
        for x in open_source(source, columns)
    ]


COW = ("cow", ["a cow", ("image", PNG[0]), ("audio", WAV[0])], {})
HEN = ("hen", [("image", PNG[1])], {})


def write_corpus(folder):
    """The same two documents in every form."""
    media = {"cow.png": PNG[0], "cow.wav": WAV[0], "cow.txt": b"a cow", "hen.png": PNG[1]}
    (folder / "media").mkdir()
    for name, data in media.items():
        (folder / "media" / name).write_bytes(data)
    text = {"type": "text", "text": "a cow"}
    cow = [text, {"type": "image", "path": "media/cow.png"}, {"type": "audio", "path": "media/cow.wav"}]
    lines = [{"id": "cow", "segments": cow}, {"id": "hen", "segments": [{"type": "image", "path": "media/hen.png"}]}]
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_tar(folder / "shards" / "000.tar", {k: v for k, v in media.items() if k[0] == "c"})
    write_tar(folder / "shards" / "001.tar", {"hen.png": PNG[1]})
    rows = {"id": ["cow", "hen"], "text": ["a cow", None], "image": PNG[:2], "audio": [WAV[0], None]}
    pq.write_table(pa.table(rows), folder / "t.parquet")
    (folder / "tables").mkdir()
    for i in range(2):
        pq.write_table(pa.table({k: v[i : i + 1] for k, v in rows.items()}), folder / "tables" / f"{i}.parquet")
    (folder / "tables" / "README.md").write_text("of the tables")


WAYS = [
    "m.jsonl",
    "media",
    "shards",
    "shards/*.tar",
    "shards/{000..001}.tar",
    "t.parquet",
    "tables",
    "tables/?.parquet",
]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_documents(tmp_path, monkeypatch, cloud, way):
    write_corpus(tmp_path)
    assert spelled(tmp_path / way) == [COW, HEN]
    assert spelled(f"file://{tmp_path}/{way}") == [COW, HEN]
    monkeypatch.chdir(tmp_path)
    found = list(open_source(way))
    places = [s.get("path", s.get("table")) for x in found for s in x["segments"] if s["type"] != "text"]
    assert all(os.path.isabs(x) for x in places)
    json.dumps(found)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            cloud.pipe(f"/data/{path.relative_to(tmp_path)}", path.read_bytes())
    assert spelled(f"memory://data/{way}".replace("?", "*")) == [COW, HEN]


def test_a_saved_data_set(tmp_path):
    features = datasets.Features(
        {"id": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image(),
         "audio": datasets.Audio(decode=False), "label": datasets.ClassLabel(names=["a", "b"])}
    )  # fmt: skip
    (tmp_path / "hen.png").write_bytes(PNG[1])
    rows = {
        "id": ["cow", "hen"], "text": ["a cow", None],
        "image": [{"bytes": PNG[0], "path": "x.png"}, {"bytes": None, "path": str(tmp_path / "hen.png")}],
        "audio": [{"bytes": WAV[0], "path": None}, None], "label": [1, 0],
    }  # fmt: skip
    table = datasets.Dataset(datasets.table.InMemoryTable(pa.table(rows, schema=features.arrow_schema)))
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "two")
    table.to_parquet(tmp_path / "it.parquet")
    expected = [(*COW[:2], {"label": 1}), (*HEN[:2], {"label": 0})]
    assert spelled(tmp_path / "it.parquet") == expected
    expected = [(*x[:2], x[2] | {"split": "train"}) for x in expected]
    assert spelled(tmp_path / "one") == spelled(f"hf:{tmp_path / 'one'}") == expected
    assert spelled(f"hf:{tmp_path / 'two'}:test") == [(*HEN[:2], {"label": 0, "split": "test"})]
    assert len(spelled(f"hf:{tmp_path / 'two'}")) == 3
    assert spelled(f"hf:{tmp_path / 'one'}", "audio=audio,text=text")[0][1] == [("audio", WAV[0]), "a cow"]
    first = next(open_source(tmp_path / "one"))["segments"][1]
    assert first == {
        "type": "image",
        "table": f"hf:{tmp_path / 'one'}:train",
        "row": 0,
        "column": "image",
        "name": "x.png",
    }
    with pytest.raises(DataError, match="has no split 'val', it has train, test"):
        list(open_source(f"hf:{tmp_path / 'two'}:val"))
    with pytest.raises(DataError, match="cannot be opened"):
        list(open_source(f"hf:{tmp_path / 'none'}"))


def test_load_dataset_takes_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    write_corpus(tmp_path)
    (tmp_path / "tables" / "README.md").unlink()
    found = spelled(f"hf:{tmp_path / 'tables'}")
    assert [x[0] for x in found] == ["cow", "hen"]
    assert found[0][1:] == (COW[1], {"split": "train"})


# --- WebDataset


def test_samples_of_a_shard(tmp_path):
    write_tar(
        tmp_path / "x.tar",
        {
            "a/cow.jpg": PNG[0], "a/hen.json": b'{"text": "hen", "id": 3, "w": [1]}', "a/cow.left.png": PNG[1],
            "a/cow.txt": b"cow", "a/cow.json": b'{"caption": "the cow", "error": 0}', "a/hen.cls": b"7\n",
            "a/pig.caption": b"\xff", "a/ox.npy": b"x", "a/ram.json": b"[]", "a/ewe.json": b'{"x": NaN}',
            "a/owl.mp3": WAV[1],
        },
    )  # fmt: skip
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        info = tarfile.TarInfo("a/cow.txt")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"two"))
    cow, hen, pig, ox, ram, ewe, owl, two = open_source(tmp_path / "x.tar")
    assert cow["id"] == two["id"] == "a/cow"
    assert [x.get("text") or x["name"] for x in cow["segments"]] == ["cow", "a/cow.jpg", "a/cow.left.png"]
    assert [content(x) for x in cow["segments"][1:]] == PNG[:2]
    assert cow["caption"] == "the cow"
    assert "error" not in cow
    assert hen == {"id": "a/hen", "segments": [{"type": "text", "text": "hen"}], "w": [1], "cls": "7"}
    assert owl["segments"][0]["type"] == "audio"
    assert two["segments"] == [{"type": "text", "text": "two"}]
    shard = f"{tmp_path}/x.tar"
    assert pig["error"] == f"{shard}/a/pig.caption: byte 0 is not UTF-8 (invalid start byte); save the text as UTF-8"
    assert ox["error"] == f"{shard}/a/ox.npy: its sample has no text, image or audio, but .npy"
    assert ram["error"] == f"{shard}/a/ram.json: is no JSON object"
    assert ewe["error"].startswith(f"{shard}/a/ewe.json: holds NaN")


def test_a_damaged_shard_gives_what_lies_before(tmp_path):
    shard = write_tar(tmp_path / "s" / "0.tar", {f"k{i}.{x}": PNG[i] for i in range(3) for x in ("png", "jpg")})
    write_tar(tmp_path / "s" / "1.tar", {"last.txt": b"whole"})
    data = shard.read_bytes()
    for length, whole in (
        (0, 0),
        (700, 0),
        (1024, 0),
        (2048, 0),
        (2049, 0),
        (2600, 1),
        (3600, 1),
        (6144, 2),
        (6656, 3),
    ):
        shard.write_bytes(data[:length])
        *given, bad, last = list(open_source(tmp_path / "s"))
        if whole == 3:
            given, whole = [*given, bad], 3
        else:
            assert bad["id"] == "0.tar"
            assert bad["error"].startswith(f"{shard}: damaged or cut short shard (")
            assert "\n" not in bad["error"]
        assert [x["id"] for x in given] == ["k0", "k1", "k2"][:whole], length
        assert all(len(x["segments"]) == 2 for x in given)
        assert last["id"] == "last"
    shard.unlink()
    with pytest.raises(DataError, match=r"0\.tar: cannot read the shard \(no such file\)"):
        list(open_source(shard))


# --- tables


def test_what_becomes_of_columns(tmp_path):
    day = datetime.datetime(2024, 5, 6, 7, 8, 9)
    rows = {
        "id": pa.array([4, None]), "url": ["u", "v"], "caption": ["one", "two"], "n": pa.array([1, None], pa.int16()),
        "x": [0.5, float("nan")], "flag": [True, False], "when": pa.array([day] * 2, pa.timestamp("ns", "Asia/Tokyo")),
        "day": pa.array([day.date()] * 2), "price": [decimal.Decimal("1.50")] * 2, "list": [[1], [2]],
        "kind": pa.array(["a", "b"]).dictionary_encode(), "image": PNG[:2], "other": [b"1", b"2"],
        "error": [1, 2], "segments": [1, 2],
    }  # fmt: skip
    pq.write_table(pa.table(rows), tmp_path / "t.v1.parquet")
    first, second = open_source(tmp_path / "t.v1.parquet")
    assert [x["type"] for x in first["segments"]] == ["text", "image"]
    when = {"when": "2024-05-06 07:08:09.000000000", "day": "2024-05-06", "price": "1.50"}
    keys = {"url": "u", "n": 1, "x": 0.5, "flag": True, "kind": "a", **when}
    assert {k: v for k, v in first.items() if k != "segments"} == {"id": "4", **keys}
    assert (second["id"], second["n"], second["x"]) == ("t/1", None, None)
    (first, _) = open_source(tmp_path / "t.v1.parquet", "image=image,text=url,text=caption,id=kind")
    assert [x.get("text") for x in first["segments"]] == [None, "u", "one"]
    assert first["id"] == "a"
    for columns, words in {
        "image": "got columns 'image', expected such as", "picture=image": "got columns", "id=id": "at least one of",
        "text=none": "has no column 'none', its columns are: id \\(int64\\), url \\(string\\)",
        "text=n": "column 'n' cannot be the text", "image=list": "column 'list' cannot be the image",
        "text=url,id=list": "column 'list' cannot be the id", "": "got columns ''",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=words):
            list(open_source(tmp_path / "t.v1.parquet", columns))


def test_text_is_not_guessed(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"id": ["a"], "words": ["w"]}), path)
    assert spelled(path) == [("a", ["w"], {})]
    pq.write_table(pa.table({"words": ["w"], "url": ["u"]}), path)
    with pytest.raises(DataError, match=r"say which column is what, as columns='text=NAME'; its columns are: words"):
        list(open_source(path))
    pq.write_table(pa.table({"words": ["w"], "url": ["u"], "picture": PNG[:1]}), path)
    assert spelled(path) == [("t/0", [("image", PNG[0])], {"words": "w", "url": "u"})]
    with pytest.raises(DataError, match="columns are of Parquet files and Hugging Face data sets, this is a folder"):
        open_source(tmp_path.parent, "text=a")


def test_cells_that_name_files_and_empty_cells(tmp_path):
    write_corpus(tmp_path)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [
        {"bytes": PNG[2], "path": "/x/y.png"},
        {"bytes": None, "path": "media/hen.png"},
        None,
        {"bytes": None, "path": None},
    ]
    rows = {"file": ["media/cow.png", None, None, None], "image": pa.array(cells, kind)}
    pq.write_table(pa.table(rows), tmp_path / "x.parquet")
    path = f"{tmp_path}/x.parquet"
    assert spelled(path, "image=image,image=file") == [
        ("x/0", [("image", PNG[2]), ("image", PNG[0])], {}),
        ("x/1", [("image", PNG[1])], {}),
        f"{path} row 2: nothing in image, file",
        f"{path} row 3: nothing in image, file",
    ]
    assert next(open_source(path, "image=image"))["segments"][0]["name"] == "y.png"
    with pytest.raises(MediaError, match=r"x\.parquet row 2 column 'image': is empty"):
        content({"type": "image", "table": path, "row": 2, "column": "image"})
    for row, column in ((9, "image"), (0, "none"), (-1, "image")):
        with pytest.raises(MediaError, match=rf"x\.parquet row {row} column '{column}': cannot be read \("):
            content({"type": "image", "table": path, "row": row, "column": column})


def test_text_in_a_table_that_is_not_utf8(tmp_path):
    raw = pa.array([b"good", b"ba\xffd", b"fine"])
    pq.write_table(pa.table({"text": raw.view(pa.string()), "n": [0, 1, 2]}), tmp_path / "t.parquet")
    first, bad, last = spelled(tmp_path / "t.parquet")
    assert (first[1], last[1]) == (["good"], ["fine"])
    assert bad == f"{tmp_path}/t.parquet row 1: column 'text' is not UTF-8"


@pytest.mark.parametrize("group", [7, 1000])
def test_cells_in_any_order(tmp_path, monkeypatch, group):
    monkeypatch.setattr(tables, "_CELLS", 700)
    cells = [b"\x89PNG\r\n\x1a\n" + bytes([i]) * (i % 50) for i in range(200)]
    path = str(tmp_path / "t.parquet")
    pq.write_table(pa.table({"image": cells, "text": ["x"] * 200}), path, row_group_size=group)
    order = [
        *range(200),
        *(i + j for i in range(0, 150, 3) for j in (0, 40, 20)),
        *np.random.default_rng(0).permutation(200),
    ]
    assert [tables.read_cell(path, int(i), "image", "x") for i in order] == [cells[i] for i in order]
    assert len([*open_source(path)]) == 200


def test_neither_rows_nor_cells_fill_the_memory(tmp_path):
    path = str(tmp_path / "t.parquet")
    r = np.random.default_rng(0)
    cells = [r.bytes(5_000) for _ in range(12_000)]
    pq.write_table(pa.table({"image": [b"\x89PNG\r\n\x1a\n" + x for x in cells], "text": ["x"] * 12_000}), path)
    before, most = pa.total_allocated_bytes(), 0
    for i, document in enumerate(open_source(path)):
        image = document["segments"][1]
        assert tables.read_cell(path, image["row"], image["column"], "")[8:] == cells[i]
        most = max(most, pa.total_allocated_bytes() - before)
    assert 10_000 < most < 2**25


def test_damaged_tables(tmp_path):
    write_corpus(tmp_path)
    path = tmp_path / "t.parquet"
    data = path.read_bytes()
    outcomes = set()
    r = np.random.default_rng(0)
    for i in range(60):
        if i < 20:
            path.write_bytes(data[: len(data) * i // 20])
        else:
            damaged = np.frombuffer(data, np.uint8).copy()
            damaged[r.integers(0, len(data), 8)] = r.integers(0, 256, 8)
            path.write_bytes(damaged.tobytes())
        tables._opened.cache_clear()
        try:
            spelled(path)
            outcomes.add("read")
        except (DataError, MediaError) as error:
            clear = str(path) in str(error) and "\n" not in str(error)
            outcomes.add(f"{type(error).__name__}, clear: {clear}")
    assert "DataError, clear: True" in outcomes
    assert not any("False" in x for x in outcomes)


def test_without_the_libraries(tmp_path, monkeypatch):
    write_corpus(tmp_path)
    for module, source in (("pyarrow.parquet", tmp_path / "t.parquet"), ("datasets", f"hf:{tmp_path}")):
        monkeypatch.setitem(sys.modules, module, None)
        tables._open_splits.cache_clear()
        with pytest.raises(DataError, match=r"pip install 'mmtok\[hf\]'"):
            list(open_source(source))
    assert spelled(tmp_path / "m.jsonl") == [COW, HEN]


# --- what is no source


def test_what_is_not_understood(tmp_path, monkeypatch, cloud):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    (tmp_path / "x.zip").touch()
    (tmp_path / "mixed").mkdir()
    write_tar(tmp_path / "mixed" / "a.tar", {"a.txt": b"a"})
    (tmp_path / "mixed" / "b.jsonl").touch()
    os.mkfifo("pipe.jsonl")
    for source, words in {
        "none": "none: no such file or folder, expected a manifest", "x.zip": "not recognised by its name, exp",
        "memory://none": "no such file or folder, expected a manifest",
        "*.zip": "not recognised by its name", "*.none": "no file matches", "*": "is something else, expected a man",
        "mixed": "is something else", "shards/{000..002}.tar": "no such file: .*/002.tar",
        "x.tar.gz": "is compressed", "s3://bucket/m.jsonl": "cannot be opened \\(Install s3fs",
        "what://x/m.jsonl": "Protocol not known: what", "pipe.jsonl": "is not a regular file",
        "none.jsonl": "cannot read the manifest \\(no such file", "memory://none.jsonl": "none.jsonl: cannot read",
        "none.parquet": "none.parquet: no such file", "memory://none.tar": "memory://none.tar: cannot read the shard",
        "memory://none.parquet": "none.parquet: damaged or no Parquet file", "x\0y": "x",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=words) as caught:
            list(open_source(source))
        assert "\n" not in str(caught.value)


def test_memory_does_not_grow_with_the_documents(tmp_path):
    peaks = {}
    for count in (500, 10_000):
        path = tmp_path / f"{count}.parquet"
        pq.write_table(pa.table({"text": ["some text"] * count, "n": range(count)}), path, row_group_size=500)
        tracemalloc.start()
        assert sum(1 for _ in open_source(path)) == count
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[10_000] < peaks[500] + 2**17

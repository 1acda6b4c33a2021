"""Manifests and folders: every line and every file a document, or one clear error."""

from __future__ import annotations

import gzip
import json
import os
import re
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.datasets.sources import manifest
from mmtok.datasets.sources.manifest import located, parse_json, read_folder, read_manifest
from mmtok.errors import DataError

COW = {"id": "cow", "segments": [{"type": "text", "text": "a cow"}]}


def write(path, *lines):
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
    return path


def test_a_manifest(tmp_path):
    (tmp_path / "note.txt").write_bytes(b"une vache\r\n")
    segments = [
        {"type": "turn", "role": "user"},
        {"type": "text", "text": "", "language": "fr"},
        {"type": "text", "path": "note.txt"},
        {"type": "image", "path": "a/cow.png", "caption": None},
        {"type": "audio", "path": "https://host/cow.ogg", "start": 0, "end": 1.5, "voice": "joe"},
        {"type": "audio", "path": "/abs/cow.ogg", "start": None},
        {"type": "image", "path": "s.tar", "offset": 512, "size": 7, "name": "cow.png"},
    ]
    lines = [
        {"segments": segments, "id": 7, "score": 0.5, "nested": {"a": [1, None]}},
        b"",
        b"  \r",
        {"segments": []},
        COW,
    ]
    path = write(tmp_path / "m.jsonl", *lines)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    first, empty, cow = read_manifest(path)
    assert list(first) == ["id", "segments", "score", "nested"]
    assert (first["id"], first["score"], first["nested"]) == ("7", 0.5, {"a": [1, None]})
    assert first["segments"][2] == segments[2] | {"text": "une vache\r\n"}
    assert [x for i, x in enumerate(first["segments"]) if i != 2] == [x for i, x in enumerate(segments) if i != 2]
    assert empty == {"id": "line-4", "segments": []}
    assert cow == COW
    (first,) = located([first], str(tmp_path))
    assert [x["path"] for x in first["segments"][2:]] == [
        str(tmp_path / "note.txt"), str(tmp_path / "a/cow.png"), "https://host/cow.ogg", "/abs/cow.ogg",
        str(tmp_path / "s.tar"),
    ]  # fmt: skip
    packed = tmp_path / "m.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(read_manifest(packed))[2] == COW


SEGMENTS = {
    b"3": "segment 0: is a number",
    b"null": "segment 0: is missing or null",
    b"{}": "segment 0: type is None",
    b'{"type": ["text"]}': "segment 0: type is a list, expected 'text', 'image', 'audio' or 'turn'",
    b'{"type": "video", "path": "x"}': "type is 'video'",
    b'{"type": "text"}': "text without 'text' or 'path'",
    b'{"type": "text", "text": null}': "got text of type NoneType",
    b'{"type": "text", "text": "a\\ud800b"}': "character 1 of the text is the lone surrogate U\\+D800",
    b'{"type": "text", "path": "none.txt"}': r"none\.txt: no such file",
    b'{"type": "text", "path": "latin.txt"}': r"latin\.txt: byte 2 is not UTF-8",
    b'{"type": "text", "path": "fifo.txt"}': r"fifo\.txt: is not a regular file",
    b'{"type": "text", "path": 3}': "path is 3, expected the path",
    b'{"type": "image"}': "image without 'path'",
    b'{"type": "image", "path": ""}': "path is '', expected",
    b'{"type": "audio", "path": "a\\u0000b"}': r"path is 'a\\x00b', expected",
    b'{"type": "image", "path": {}}': "path is an object",
    b'{"type": "image", "path": "a\\udcffb"}': "lone surrogate U\\+DCFF",
    b'{"type": "audio", "path": "x", "start": "0"}': "start is '0', expected seconds",
    b'{"type": "audio", "path": "x", "end": true}': "end is True, expected seconds",
    b'{"type": "audio", "path": "x", "end": NaN}': "holds NaN, which JSON has not",
    b'{"type": "audio", "path": "x", "end": 1e999}': "holds the number 1e999, which is too large",
    b'{"type": "audio", "path": "x", "end": 1' + b"0" * 400 + b"}": "end is 10{56}[.]{3}, expected seconds",
    b'{"type": "turn"}': "turn without 'role'",
    b'{"type": "turn", "role": "system"}': "role is 'system', expected 'user' or 'assistant'",
    b'{"type": "image", "path": "x", "offset": -1, "size": 3}': "offset is -1, expected a count of bytes",
    b'{"type": "image", "path": "x", "offset": 1, "size": "3"}': "size is '3', expected a count of bytes",
    b'{"type": "image", "path": "x", "offset": 1, "size": 3, "name": 4}': "name is 4, expected a string",
}
LINES = {
    b"{": "not JSON", b"nul": "not JSON", b"[]": "is a list, expected an object", b'"x"': "is a string",
    b"{} {}": "not JSON", b'{"a": 1}': "'segments' is missing or null, expected a list",
    b'{"segments": "x"}': "'segments' is a string", b'{"id": true, "segments": []}': "'id' is true or false",
    b'{"id": {}, "segments": []}': "'id' is an object", b'{"segments": [], "error": 1}': "'error' is reserved",
    b'{"segments": [], "x": "\\udcff"}': "lone surrogate U\\+DCFF", b"\xff\xfe{": "byte 0 is not UTF-8",
    b'{"segments": [], "x": "caf\xe9"}': "byte 26 is not UTF-8",
    b'{"segments": [], "x": Infinity}': "holds Infinity", b'{"segments": [], "x": -1e400}': "too large",
    b'{"segments": [], "x": ' + b"9" * 5000 + b"}": "not JSON", b"[" * 100_000: "levels deep",
    b'{"segments": [], "x": ' + b"[" * 101 + b"]" * 101 + b"}": "more than 100 levels deep",
    b'{"segments": [], "x": ' + b'{"a":' * 101 + b"3" + b"}" * 101 + b"}": "more than 100 levels deep",
    b"\0": "not JSON",
}  # fmt: skip


def test_every_fault_is_one_document_of_one_line(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9"[1:])
    os.mkfifo(tmp_path / "fifo.txt")
    faults = {b'{"id": "x", "segments": [' + k + b"]}": v for k, v in SEGMENTS.items()} | LINES
    path = write(tmp_path / "m.jsonl", *(y for x in faults for y in (COW, x)), COW)
    found = list(read_manifest(path))
    assert found[::2] == [COW] * (len(faults) + 1)
    for number, (document, (line, words)) in enumerate(zip(found[1::2], faults.items(), strict=True)):
        assert set(document) == {"id", "error"}, line[:80]
        named = line.startswith(b'{"id": "x"') and "JSON" not in words and "large" not in words
        assert document["id"] == ("x" if named else f"line-{2 * number + 2}")
        assert document["error"].startswith(f"{path}:{2 * number + 2}: ")
        assert re.search(words, document["error"]), (words, document["error"])
        assert "\n" not in document["error"]
        assert len(document["error"]) < len(str(path)) + 200
        json.dumps(document, ensure_ascii=False).encode()


def test_shallow_and_wide_is_not_deep():
    wide = [[i] for i in range(1000)]
    assert parse_json(json.dumps(wide).encode()) == wide
    deep = b"[" * 100 + b"]" * 100
    assert parse_json(deep) is not None
    with pytest.raises(DataError, match="levels deep"):
        parse_json(b"[" + deep + b"]")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text().filter(lambda x: x not in manifest.RESERVED), json_values, max_size=4), st.text())
@settings(max_examples=100, derandomize=True, deadline=None)
def test_other_keys_come_back(tmp_path_factory, keys, text):
    document = {"id": "x", "segments": [{"type": "text", "text": text}], **keys}
    path = write(tmp_path_factory.getbasetemp() / "keys.jsonl", document)
    assert list(read_manifest(path)) == [document]


@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,\\u0d8segmnt 1e9', max_size=60).map(str.encode))
@settings(max_examples=300, derandomize=True, deadline=None)
def test_no_line_is_a_crash(tmp_path_factory, line):
    path = write(tmp_path_factory.getbasetemp() / "any.jsonl", COW, line.replace(b"\n", b" "), COW)
    found = list(read_manifest(path))
    assert found[0] == found[-1] == COW
    assert len(found) <= 3


def test_long_lines_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_LINE", 2**20)
    path = tmp_path / "m.jsonl"
    with path.open("wb") as file:
        file.write(json.dumps(COW).encode() + b"\n" + b"x" * (40 * 2**20) + b"\n")
        exact = json.dumps(COW | {"x": ""}).encode()
        file.write(exact[:-2] + b"y" * (2**20 - len(exact)) + exact[-2:] + b"\n")
        file.write(json.dumps(COW).encode())
    tracemalloc.start()
    found = list(read_manifest(path))
    assert tracemalloc.get_traced_memory()[1] < 12 * 2**20
    tracemalloc.stop()
    assert found[0] == found[3] == COW
    assert found[1]["error"] == f"{path}:2: longer than 1048576 bytes, which is the limit; split it"
    assert len(found[2]["x"]) == 2**20 - len(exact)


def test_manifests_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "wide.jsonl").write_text(json.dumps(COW), encoding="utf-16")
    whole = gzip.compress(json.dumps(COW).encode() * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "no.jsonl.gz").write_bytes(b"{}")
    bad = bytearray(whole)
    bad[30] ^= 255
    (tmp_path / "bad.jsonl.gz").write_bytes(bad)
    for name, words in {
        "none.jsonl": "no such file", "a\0b.jsonl": "embedded null", "": "is a directory",
        "fifo.jsonl": "is not a regular file", "wide.jsonl": "UTF-16", "cut.jsonl.gz": "end-of-stream",
        "no.jsonl.gz": "Not a gzipped file", "bad.jsonl.gz": "cannot read the manifest",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=words) as caught:
            list(read_manifest(f"{tmp_path}/{name}"))
        assert "\n" not in str(caught.value)


def test_memory_does_not_grow_with_the_documents(tmp_path):
    line = json.dumps(COW | {"note": "x" * 100}).encode() + b"\n"
    peaks = []
    for count in (1_000, 20_000):
        path = tmp_path / f"{count}.jsonl"
        path.write_bytes(line * count)
        tracemalloc.start()
        assert sum(1 for _ in located(read_manifest(path), str(tmp_path))) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2**15


# --- folders


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_a_folder(tmp_path):
    touch(
        tmp_path, "cow.wav", "cow.jpg", "cow.PNG", "cow.txt", "cow.caption", "a/cow.png", "a/b/hen.ogg", "cow.a.png",
        "cow-2.png", "zoo.pdf", ".hidden.png", ".git/x.png", "z/deep/note.md",
    )  # fmt: skip
    found = list(read_folder(tmp_path))
    assert [x["id"] for x in found] == ["a/b/hen", "a/cow", "cow-2", "cow", "cow.a", "z/deep/note"]
    assert [(x["type"], x["path"]) for x in found[3]["segments"]] == [
        ("text", "cow.caption"), ("text", "cow.txt"), ("image", "cow.PNG"), ("image", "cow.jpg"), ("audio", "cow.wav"),
    ]  # fmt: skip
    assert found[3]["segments"][0]["text"] == "x"
    assert [x["id"] for x in read_folder(tmp_path, ("audio",))] == ["a/b/hen", "cow"]


def test_links_and_what_is_no_file(tmp_path):
    touch(tmp_path, "a/cow.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "linked.png").symlink_to(tmp_path / "a" / "cow.png")
    os.mkfifo(tmp_path / "pipe.txt")
    os.mkfifo(tmp_path / "pipe2.wav")
    found = {x["id"]: x for x in read_folder(tmp_path)}
    assert set(found) == {"a/cow", "gone", "linked", "pipe", "pipe2", "round"}
    assert found["gone"]["error"] == f"{tmp_path}/gone.txt: no such file"
    assert found["pipe"]["error"] == f"{tmp_path}/pipe.txt: is not a regular file"
    assert found["pipe2"]["segments"] == [{"type": "audio", "path": "pipe2.wav"}]


def test_bad_texts_and_names(tmp_path):
    touch(tmp_path, "cow.png", "hen.png")
    (tmp_path / "cow.txt").write_bytes(b"\xff")
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    found = {x["id"]: x for x in read_folder(tmp_path)}
    assert found["cow"] == {
        "id": "cow",
        "error": f"{tmp_path}/cow.txt: byte 0 is not UTF-8 (invalid start byte); save the text as UTF-8",
    }
    assert found["caf\\udce9"]["error"] == f"{tmp_path}/caf\\udce9.png: the name is not UTF-8; rename the file"
    assert found["hen"]["segments"] == [{"type": "image", "path": "hen.png"}]
    json.dumps(found, ensure_ascii=False).encode()


def test_folders_that_cannot_be_listed(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"none: cannot list the folder \(no such file"):
        list(read_folder(tmp_path / "none"))
    touch(tmp_path, "a/cow.png", "b/hen.png")
    scan = manifest.files.scan

    def refuse(folder):
        if folder.rstrip("/").endswith("/a"):
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    monkeypatch.setattr(manifest.files, "scan", refuse)
    refused, hen = read_folder(tmp_path)
    assert refused == {"id": "a/", "error": f"{tmp_path}/a/: cannot be listed (Permission denied)"}
    assert hen["id"] == "b/hen"

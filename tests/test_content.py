"""The content of a segment as a local file: in place or copied, gone afterwards, and every fault by its own name."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import tempfile
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from noise import encoded, pixels, write_tar

from mmtok import media
from mmtok.datasets.sources import content, files, open_source
from mmtok.datasets.sources.content import label_of, local_copy
from mmtok.errors import DataError, MediaError

PNG = encoded(pixels(0, 40, 40))


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary files are, empty before and after."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


class Flaky(MemoryFileSystem):
    """Files that fail a few times, on opening or in the middle."""

    protocol = "flaky"
    store: ClassVar[dict] = {}
    faults: ClassVar[list] = []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def _open(self, path, mode="rb", **options):
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        handle = super()._open(path, mode, **options)
        if fault:
            raise_late = io.BytesIO(handle.getvalue())
            raise_late.readinto = lambda _: (_ for _ in ()).throw(ConnectionResetError("reset by peer"))
            return raise_late
        return handle


@pytest.fixture
def flaky(monkeypatch):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    naps = []
    monkeypatch.setattr(files.time, "sleep", naps.append)
    Flaky.store.clear()
    Flaky.faults = []
    system = fsspec.filesystem("flaky")
    system.pipe("/x.png", PNG)
    return naps


def image(path, **more):
    return {"type": "image", "path": str(path), **more}


def test_a_local_file_is_used_in_place(tmp_path, temporary):
    path = tmp_path / "x.png"
    path.write_bytes(PNG)
    with local_copy(image(path)) as it:
        assert (it.path, it.label) == (str(path), str(path))
        assert it.sha256 == it.sha256 == hashlib.sha256(PNG).hexdigest()
        assert not list(temporary.iterdir())
    assert path.read_bytes() == PNG


def every_reference(folder, cloud, data, name="x.png"):
    """One content as a member, a cell and a URL."""
    shard = write_tar(folder / "s.tar", {"a.txt": b"a", name: data, "z.txt": b"z"})
    pq.write_table(pa.table({"image": [b"", data]}), folder / "t.parquet")
    cloud.pipe(f"/d/{name}", data)
    cloud.put_file(shard, "/d/s.tar")
    references = [image(shard, offset=1536, size=len(data), name=name), image("memory://d/" + name)]
    references += [image("memory://d/s.tar", offset=1536, size=len(data), name=name)]
    return [
        *references,
        {"type": "image", "table": str(folder / "t.parquet"), "row": 1, "column": "image", "name": name},
    ]


def test_everything_else_is_copied(tmp_path, temporary, cloud):
    for segment in every_reference(tmp_path, cloud, PNG):
        with local_copy(segment) as it:
            (only,) = temporary.iterdir()
            assert str(only) == it.path
            assert only.suffix == ".png"
            assert stat.S_IMODE(only.stat().st_mode) == 0o600
            assert it.sha256 == hashlib.sha256(PNG).hexdigest()
            assert it.label == label_of(segment)
            assert media.read_image(it.path).shape == (3, 40, 40)
        assert not list(temporary.iterdir())


def test_messages_say_where_the_content_is_from(tmp_path, temporary, cloud):
    labels = []
    for segment in every_reference(tmp_path, cloud, PNG[:700]):
        with pytest.raises(MediaError) as caught, local_copy(segment) as it:
            media.read_image(it.path)
        labels.append(str(caught.value).partition(": damaged or cut short image")[0])
        assert str(temporary) not in str(caught.value)
    table = f"{tmp_path}/t.parquet row 1 column 'image'"
    assert labels == [f"{tmp_path}/s.tar/x.png", "memory://d/x.png", "memory://d/s.tar/x.png", table]
    for segment in every_reference(tmp_path, cloud, PNG, "x.wav"):
        with pytest.raises(MediaError, match=r": named \.wav but holds an image"), local_copy(segment) as it:
            media.read_image(it.path)
    with pytest.raises(KeyError), local_copy(segment):  # whatever else happens meanwhile
        raise KeyError("x")
    with pytest.raises(MediaError, match=r"^something else$"), local_copy(segment):
        raise MediaError("something else")


@pytest.mark.parametrize(
    "name", ["../../etc/x.png", "/x.png", "a\0b.png", "x." + "y" * 400, "x.png/", "", "\udcff.png", "-.sh"]
)
def test_names_are_labels_only(tmp_path, temporary, name):
    shard = tmp_path / "s.bin"
    shard.write_bytes(PNG)
    with local_copy(image(shard, offset=0, size=len(PNG), name=name)) as it:
        (only,) = temporary.iterdir()
        assert str(only) == it.path
        assert only.suffix in ("", ".png")
        it.label.encode()


def test_parts_that_are_not_there(tmp_path, temporary, cloud):
    path = tmp_path / "s.tar"
    path.write_bytes(PNG)
    os.mkfifo(tmp_path / "pipe.tar")
    for place, size, where, words in (
        (path, len(PNG), 1, f"cut short: {len(PNG) - 1} bytes, expected {len(PNG)}"),
        (path, 3, 10**6, "cut short: 0 bytes, expected 3"),
        (path, 3, 10**30, "cannot be read"),
        (tmp_path / "none.tar", 3, 0, "no such file"),
        (tmp_path / "pipe.tar", 3, 0, "is not a regular file"),
        (path / "x.tar", 3, 0, "Not a directory"),
        ("memory://none.tar", 3, 0, "no such file"),
    ):
        with pytest.raises(MediaError) as caught, local_copy(image(place, offset=where, size=size, name="x.png")):
            pass
        assert str(caught.value).startswith(f"{place}/x.png: ")
        assert words in str(caught.value)


def test_images_are_of_limited_size_and_sounds_are_not(tmp_path, temporary, cloud, monkeypatch):
    monkeypatch.setattr(content, "MAX_IMAGE_BYTES", 5000)
    for segment in every_reference(tmp_path, cloud, bytes(6000), "x.bin"):
        with pytest.raises(MediaError, match="the limit for an image file is 5000"), local_copy(segment):
            pass
        with local_copy(segment | {"type": "audio"}) as it:
            assert os.path.getsize(it.path) == 6000


def test_sounds_are_copied_in_blocks(tmp_path, temporary):
    path = tmp_path / "s.bin"
    with path.open("wb") as file:
        file.truncate(100 * 2**20)
    tracemalloc.start()
    with local_copy({"type": "audio", "path": str(path), "offset": 5, "size": 99 * 2**20, "name": "x.wav"}) as it:
        assert os.path.getsize(it.path) == 99 * 2**20
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()


def test_a_network_is_tried_three_times(temporary, flaky):
    for faults, naps in (
        ([], 0), ([TimeoutError("slow")], 1), ([ConnectionError(), OSError(errno.EIO, "x")], 2), (["late", "late"], 2),
    ):  # fmt: skip
        flaky.clear()
        Flaky.faults = list(faults)
        with local_copy(image("flaky://x.png")) as it:
            assert Path(it.path).read_bytes() == PNG
            assert it.sha256 == hashlib.sha256(PNG).hexdigest()
        assert len(flaky) == naps
        assert flaky == sorted(flaky)
    Flaky.faults = ["late"] * 3
    with (
        pytest.raises(MediaError, match=r"^flaky://x\.png: cannot be read \(reset by peer\)$"),
        local_copy(image("flaky://x.png")),
    ):
        pass
    flaky.clear()
    for fault, words in (
        (FileNotFoundError("x"), "no such file"), (PermissionError(13, "Forbidden"), r"cannot be read \(Forbidden\)"),
        (ValueError("no ranges"), r"cannot be read \(no ranges\)"),
    ):  # fmt: skip
        Flaky.faults = [fault]
        with pytest.raises(MediaError, match=words), local_copy(image("flaky://x.png")):
            pass
    assert not flaky


def test_what_is_not_the_fault_of_the_content(tmp_path, temporary, cloud, monkeypatch):
    segments = every_reference(tmp_path, cloud, PNG)

    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(content, "open", lambda number, *_, **__: Full(number, "w+b"), raising=False)
    for segment in segments:
        with pytest.raises(DataError, match=r"cannot write a temporary file \(No space left"), local_copy(segment):
            pass
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(DataError, match="none: cannot write a temporary file"), local_copy(segments[0]):
        pass
    monkeypatch.undo()
    with pytest.raises(DataError, match="Install s3fs"), local_copy(image("s3://bucket/x.png")):
        pass


def test_local_files_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name, words in {
        "pipe.png": "is not a regular file", "folder.png": "is a directory", "none.png": "no such file",
        "loop.png": "cannot be read", "a\0b.png": "cannot be read", "x" * 300: "cannot be read",
    }.items():  # fmt: skip
        began = time.perf_counter()
        for read in (lambda it: it.sha256, lambda it: media.read_image(it.path)):
            with pytest.raises(MediaError) as caught, local_copy(image(tmp_path / name)) as it:
                read(it)
            assert str(caught.value).startswith(f"{tmp_path / name}: ")
            assert words in str(caught.value)
        assert time.perf_counter() - began < 1


def test_threads(tmp_path, temporary, cloud):
    pictures = [encoded(pixels(i, 9, 9)) for i in range(120)]
    pq.write_table(pa.table({"image": pictures}), tmp_path / "t.parquet", row_group_size=25)
    write_tar(tmp_path / "s.tar", {f"{i}.png": x for i, x in enumerate(pictures)})
    found = [x["segments"][0] for y in ("t.parquet", "s.tar") for x in open_source(tmp_path / y)]
    barrier = threading.Barrier(8)

    def read(start):
        barrier.wait()
        for i in range(start, 240, 4):
            with local_copy(found[i]) as it:
                assert Path(it.path).read_bytes() == pictures[i % 120]
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, [0, 1, 2, 3] * 2))

"""WebDataset shards: samples, splits and patterns as others read them, and one clear error for damage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from noise import SPLITS, encoded, keys, looks_like, names, pixels, write_tar

from mmtok import media
from mmtok.datasets.sources.files import expand_braces
from mmtok.datasets.sources.webdataset import pictures
from mmtok.errors import DataError, MediaError
from mmtok.training.data import load_images
from mmtok.training.pictures import open_pictures


def test_shards_are_read_in_place(tmp_path):
    train, val = keys("train", 3, "a/{}"), keys("val", 1, "a/{}")
    arrays = {k: pixels(i) for i, k in enumerate([*train, *val])}
    kinds = {train[0]: ("webp", {"lossless": True}), train[1]: ("PNG", {}), train[2]: ("bmp", {}), val[0]: ("png", {})}
    files = {}
    for i, (key, array) in enumerate(arrays.items()):
        kind, options = kinds[key]
        files[f"{'./' if i % 2 else ''}{key}.json"] = b"{}"
        files[f"{'./' if i % 2 else ''}{key}.{kind}"] = encoded(array, kind, **options)
    shard = write_tar(tmp_path / "x.tar", files)
    found = open_pictures(shard, "train")
    assert [x.name for x in found] == train
    assert {x.source for x in found} == {"x"}
    assert all(looks_like(x, arrays[x.name]) for x in found)
    assert names(shard, "val") == val
    assert len({json.dumps(x.stamp) for x in found}) == 3
    assert list(tmp_path.iterdir()) == [shard]
    with pytest.raises(DataError, match=r"no image in split 'test' \(4 in all"):
        open_pictures(shard, "test")
    os.utime(shard, (1, 1))
    assert {x.stamp for x in open_pictures(shard, "train")}.isdisjoint({x.stamp for x in found})


def test_a_packed_folder_keeps_its_splits(tmp_path):
    folder = tmp_path / "in" / "things"
    folder.mkdir(parents=True)
    for i in range(60):
        (folder / f"{i}.png").write_bytes(encoded(pixels(i, 2, 2)))
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "in", arcname=".")
    for split in SPLITS:
        assert sorted(names(tmp_path / "in", split)) == sorted(names(tmp_path / "x.tar", split))


def test_what_is_a_sample(tmp_path):
    image = encoded(pixels(0))
    files = {
        "cow.mask.png": encoded(pixels(1)), "cow.jpg.txt": b"no", "cow.PNG": image, "cow.webp": b"second",
        "hen.left.png": image, "hen.right.png": b"second", "dog.txt": b"woof", ".png": b"no stem", "._cow.png": b"no",
        "__MACOSX/._cow.png": b"no", "../../evil.png": image, "/abs.png": image, "dir.v1/pig.png": image, "bare": image,
    }  # fmt: skip
    shard = write_tar(tmp_path / "deep" / "x.tar", files)
    with tarfile.open(shard, "a") as tar:
        for name, kind in (
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("fifo.png", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/hostname"
            tar.addfile(info)
    found = {x.key: x for x in pictures(str(shard), shard.stat().st_size, 0)}
    assert sorted(found) == ["../../evil", "/abs", "cow", "dir.v1/pig", "hen"]
    assert {x.read() for x in found.values()} == {image}
    assert [x.name for x in tmp_path.rglob("*")] == ["deep", "x.tar"]


def test_every_way_to_name_shards(tmp_path):
    image = encoded(pixels(0))
    for i in range(12):
        write_tar(tmp_path / "s" / f"{i:03}.tar", {f"{keys('train', 12)[i]}.png": image})
    (tmp_path / "s" / "000_stats.json").write_text("{}")
    every = keys("train", 12)
    assert names(tmp_path / "s", "train") == every
    assert names(tmp_path / "s" / "*.tar", "train") == every
    assert names(tmp_path / "s" / "{000..011}.tar", "train") == every
    assert names(f"{tmp_path}/s/{{003..001}}.tar", "train") == every[3:0:-1]
    assert names(f"{tmp_path}/s/{{005,00[12],005}}.tar", "train") == [every[5], every[1], every[2]]
    assert names(f"{tmp_path}/{{s,}}/00{{1,{{3..4}}}}.tar".replace("{s,}", "s"), "train") == [every[1], *every[3:5]]
    for source, words in {
        "s/{010..012}.tar": r"no such file: .*s/012\.tar",
        "s/9*.tar": "no file matches",
        "s/*": r"000_stats\.json matches, expected only \.tar",
        "s/x.tar.gz": r"is compressed, expected plain \.tar",
        "s/none.tar": "cannot read the shard",
        "s/{0..99999999999999}.tar": r"no such file: .*/0\.tar",
    }.items():
        with pytest.raises(DataError, match=words):
            open_pictures(tmp_path / source, "train")
    shutil.copy(tmp_path / "s" / "000.tar", tmp_path / "[a]{b,c}.tar")
    assert names(tmp_path / "[a]{b,c}.tar", "train") == every[:1]  # a file's own name is no pattern
    (tmp_path / "s" / f"{every[0]}.png").write_bytes(image)
    assert open_pictures(tmp_path / "s", "train")[0].source == "s"  # with pictures in it, it is a folder of pictures


@given(st.integers(0, 120), st.integers(0, 120), st.integers(1, 4))
@settings(max_examples=50, derandomize=True, deadline=None)
def test_ranges_are_those_of_the_shell(first, last, width):
    step = 1 if first <= last else -1
    text = f"{first:0{width}}", f"{last:0{width}}"
    padded = max(map(len, text)) if any(len(x) > 1 and x[0] == "0" for x in text) else 0
    expected = [f"s{y}/{str(x).zfill(padded)}.tar" for x in range(first, last + step, step) for y in "ab"]
    assert sorted(expand_braces(f"s{{a,b}}/{{{text[0]}..{text[1]}}}.tar")) == sorted(expected)


def test_braces_are_those_of_bash():
    patterns = ["{03..1}", "{8..11}", "a{b,c{1..2},}d{e,f}", "{a}", "{}", "{1..}", "x{a,b", "{08..10}{1,0}", "{0..00}"]
    shell = subprocess.run(["bash", "-c", f"printf '%s\\n' {' '.join(patterns)}"], capture_output=True, text=True)
    ours = [list(expand_braces(x)) for x in patterns]
    assert sorted({x for found in ours for x in found}) == sorted(set(shell.stdout.split()))


@pytest.mark.parametrize("layout", ["{}-0.tar", "{}/0.tar", "cc3m_{}2017-0.tar"])
def test_shards_of_a_split_are_that_split(tmp_path, layout):
    files = {split: {f"{k}.png": encoded(pixels(0)) for s in SPLITS for k in keys(s, 2)} for split in SPLITS}
    for name, split in (("train", "train"), ("validation", "val")):
        write_tar(tmp_path / layout.format(name), files[split])
    for split in ("train", "val"):
        assert len(names(tmp_path, split)) == 6
    with pytest.raises(DataError, match="has no split 'test', it has train, val"):
        open_pictures(tmp_path, "test")
    (tmp_path / layout.format("validation")).unlink()
    assert {s: names(tmp_path, s) for s in SPLITS} == {s: keys(s, 2) for s in SPLITS}
    write_tar(tmp_path / layout.format("test"), files["test"])
    assert len(names(tmp_path, "test")) == 6
    assert names(tmp_path, "val") == keys("val", 2)
    assert sorted(names(tmp_path, "train")) == sorted([*keys("train", 2), *keys("test", 2)])
    (tmp_path / layout.format("train")).unlink()
    assert names(tmp_path, "train") == keys("train", 2)


def test_cut_short_shards(tmp_path):
    keyed = keys("train", 3)
    shard = write_tar(tmp_path / "s.tar", {f"{k}.png": encoded(pixels(i, 20, 20)) for i, k in enumerate(keyed)})
    data = shard.read_bytes()
    block = 512 + -(-len(encoded(pixels(0, 20, 20))) // 512) * 512
    for length in (
        0,
        100,
        512,
        700,
        block - 1,
        block,
        block + 100,
        2 * block,
        3 * block - 600,
        3 * block,
        3 * block + 9,
    ):
        shard.write_bytes(data[:length])
        with pytest.raises(DataError, match=r"s\.tar: damaged or cut short shard") as caught:
            open_pictures(shard, "train")
        assert "\n" not in str(caught.value)
    shard.write_bytes(data[: 3 * block + 512])
    assert names(shard, "train") == keyed
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.add(shard, "x.png")
    with pytest.raises(DataError, match=r"z\.tar: damaged"):
        open_pictures(tmp_path / "z.tar", "train")


def test_damaged_shards_never_escape(tmp_path):
    good = write_tar(tmp_path / "s.tar", {f"{k}.png": encoded(pixels(i)) for i, k in enumerate(keys("train", 4))})
    data = np.frombuffer(good.read_bytes(), np.uint8)
    r = np.random.default_rng(0)
    outcomes = set()
    for i in range(150):
        damaged = data.copy()
        header = 1024 * r.integers(0, 4)  # a header, a picture below 512 bytes, and so on
        where = header + r.integers(0, 640, 3)
        damaged[where] = r.integers(0, 256, 3)
        if i % 3:  # a header whose sum is right
            head = damaged[header : header + 512]
            if i % 3 == 2:
                head[124:136] = r.integers(0, 256, 12)
                head[124] = (0xFF, 0x80)[i % 2]
            head[148:156] = 32
            head[148:156] = np.frombuffer(f"{head.sum():06o}\0 ".encode(), np.uint8)
        path = tmp_path / f"{i}.tar"
        path.write_bytes(damaged.tobytes())
        try:
            for picture in open_pictures(path, "train"):
                picture.read()
            outcomes.add("read")
        except (DataError, MediaError) as error:
            outcomes.add(f"{type(error).__name__} names it: {str(path) in str(error)}")
        path.unlink()
    assert outcomes == {"read", "DataError names it: True", "MediaError names it: True"}


def test_a_damaged_picture_in_a_shard_is_named(tmp_path):
    good, bad = keys("train", 2)
    shard = write_tar(tmp_path / "s.tar", {f"{good}.png": encoded(pixels(0)), f"{bad}.jpg": b"not a picture"})
    pictures = open_pictures(shard, "train")
    with pytest.raises(MediaError, match=rf"s\.tar/{bad}\.jpg: not recognised"):
        pictures[1].read()
    shard.unlink()
    with pytest.raises(MediaError, match=rf"s\.tar/{good}\.png: cannot be read"):
        pictures[0].read()


def test_threads_read_one_shard(tmp_path):
    arrays = {k: pixels(i, 30, 30) for i, k in enumerate(keys("train", 40))}
    shard = write_tar(tmp_path / "s.tar", {f"{k}.png": encoded(v) for k, v in arrays.items()})
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda x: looks_like(x, arrays[x.name]), open_pictures(shard, "train") * 5))


def test_shards_are_loaded_and_cached(tmp_path, capsys):
    train = keys("train", 3)
    files = {f"{k}.png": encoded(pixels(i, 10, 20)) for i, k in enumerate(train[:2])}
    shard = write_tar(tmp_path / "s" / "x.tar", files | {f"{train[2]}.png": b"no picture"})
    pictures = open_pictures(tmp_path / "s", "train")
    images = load_images(pictures, 8, tmp_path / "cache")
    assert (images.shape, images.dtype) == ((2, 3, 8, 8), np.uint8)
    for i in range(2):
        assert np.array_equal(images[i], media.fit_image(pixels(i, 10, 20).transpose(2, 0, 1), 8))
    assert capsys.readouterr().err.count(f"left out: {shard}/{train[2]}.png: ") == 1
    shard_time = shard.stat()
    shard.write_bytes(bytes(shard_time.st_size))  # its pictures are gone, but not its size and time
    os.utime(shard, ns=(shard_time.st_atime_ns, shard_time.st_mtime_ns))
    assert np.array_equal(load_images(pictures, 8, tmp_path / "cache"), images)
    os.utime(shard, (5, 5))
    with pytest.raises(DataError, match="no image in split"):
        open_pictures(tmp_path / "s", "train")

"""Pictures from folders, manifests, WebDataset shards, torchvision and Hugging Face data sets, all read for real."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmtok import media
from mmtok.errors import DataError, MediaError
from mmtok.training.corpus import split_of
from mmtok.training.data import load_images
from mmtok.training.pictures import Picture, open_pictures
from mmtok.training.webdataset import expand_braces, members

SPLITS = ("train", "val", "test")


def pixels(seed: int, height: int = 6, width: int = 5, channels: int = 3) -> np.ndarray:
    """uint8 [H, W, C] of noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def keys(split: str, count: int, form: str = "k{}") -> list[str]:
    """The first names that the hash puts into a split."""
    return [x for x in (form.format(i) for i in range(1000)) if split_of(x) == split][:count]


def names(source: object, split: str) -> list[str]:
    return [x.name for x in open_pictures(source, split)]  # type: ignore[arg-type]


def looks_like(picture: Picture, array: np.ndarray) -> bool:
    return np.array_equal(picture.read(), array.transpose(2, 0, 1))


# --- folders and manifests


def test_folder_and_manifest(tmp_path):
    key, other = keys("train", 1)[0], keys("val", 1)[0]
    rgba = pixels(0, channels=4)
    rgba[0] = (10, 20, 30, 0)
    Image.fromarray(rgba).save(tmp_path / f"{key}.png")
    (tmp_path / f"{other}.png").write_bytes(b"no picture")
    (picture,) = open_pictures(tmp_path, "train")
    assert (picture.name, picture.source) == (key, tmp_path.name)
    assert np.array_equal(picture.read(alpha=True), rgba.transpose(2, 0, 1))
    seen = picture.read()
    assert (seen.dtype, seen.shape) == (np.uint8, (3, 6, 5))
    assert (seen[:, 0] == 255).all()
    (bad,) = open_pictures(str(tmp_path), "val")
    with pytest.raises(MediaError, match=other):
        bad.read()
    with pytest.raises(DataError, match=r"no image in split 'test' \(2 in all splits\)"):
        open_pictures(tmp_path, "test")

    line = {"id": "cow", "split": "pair-test", "source": "farm", "segments": [{"type": "image", "path": f"{key}.png"}]}
    (tmp_path / "m.jsonl").write_text(json.dumps(line))
    (picture,) = open_pictures(tmp_path / "m.jsonl", "pair-test")
    assert (picture.name, picture.source) == ("cow", "farm")
    assert np.array_equal(picture.read(), seen)
    with pytest.raises(DataError, match="cannot read the manifest"):
        open_pictures(tmp_path / "none", "train")


# --- WebDataset


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
    found = {x.key: x for x in members(str(shard), shard.stat().st_size, 0)}
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
        "s/{010..012}.tar": r"no such shard: .*s/012\.tar",
        "s/9*.tar": "no file matches",
        "s/*": r"000_stats\.json matches, expected only \.tar",
        "s/x.tar.gz": r"is compressed, expected plain \.tar",
        "s/none.tar": "cannot read the shard",
        "s/{0..99999999999999}.tar": r"no such shard: .*/0\.tar",
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


# --- torchvision


def test_fake_data_is_the_same_in_threads():
    expected = torchvision.datasets.FakeData()
    before = torch.get_rng_state()
    split = {s: open_pictures("torchvision:FakeData", s) for s in SPLITS}
    assert sorted(len(x) for x in split.values()) == sorted(
        sum(split_of(f"train/{i}") == s for i in range(1000)) for s in SPLITS
    )
    some = split["val"][:12]
    assert {x.source for x in some} == {"FakeData"}
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: x.read(), some))
    for picture, array in zip(some, found, strict=True):
        index = int(picture.name.removeprefix("train/"))
        assert np.array_equal(array, np.asarray(expected[index][0]).transpose(2, 0, 1))
    assert torch.equal(before, torch.get_rng_state())


def test_image_folder_keeps_alpha_and_names(tmp_path):
    rgba = pixels(0, channels=4)
    for i in range(60):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(rgba))
    source = f"torchvision:ImageFolder:{tmp_path / 'data'}"
    for split in SPLITS:
        assert sorted(names(source, split)) == sorted(names(tmp_path / "data", split))
    picture = open_pictures(source, "train")[0]
    assert np.array_equal(picture.read(alpha=True), rgba.transpose(2, 0, 1))
    assert np.array_equal(picture.read(), open_pictures(tmp_path / "data", "train")[0].read())
    (tmp_path / "data" / "a" / "0.png").write_bytes(b"no picture at all")
    changed = {x.name: x for s in SPLITS for x in open_pictures(source, s)}
    assert changed[picture.name].stamp != picture.stamp
    with pytest.raises(MediaError, match=r"torchvision:ImageFolder a/0: cannot be read"):
        changed["a/0"].read()


def write_cifar(root: Path) -> np.ndarray:
    """CIFAR-10 as it lies on disk, with 12 pictures a file; gives all, uint8 [72, 32, 32, 3]."""
    import pickle

    everything = np.stack([pixels(i, 32, 32) for i in range(72)])
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for i, name in enumerate([*(f"data_batch_{x}" for x in range(1, 6)), "test_batch"]):
        data = everything[12 * i : 12 * i + 12].transpose(0, 3, 1, 2).reshape(12, -1)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [0] * 12}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["x"]}))
    return everything


def test_cifar_has_its_own_test_and_no_val(tmp_path, monkeypatch):
    everything = write_cifar(tmp_path / "data")
    kind = torchvision.datasets.CIFAR10
    source = f"torchvision:CIFAR10:{tmp_path / 'data'}"
    with pytest.raises(DataError, match=r"torchvision:CIFAR10.*cannot be opened \(Dataset not found or corrupted"):
        open_pictures(source, "train")  # torchvision knows the true files by their sums
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setitem(kind.meta, "md5", None)
    monkeypatch.chdir(tmp_path)
    test = open_pictures("torchvision:CIFAR10", "test")  # the root is data/
    assert [x.name for x in test] == [f"test/{i}" for i in range(12)]
    assert all(looks_like(x, y) for x, y in zip(test, everything[60:], strict=True))
    own = {s: [x for x in (f"train/{i}" for i in range(60)) if split_of(x) == s] for s in SPLITS}
    assert own["val"]
    assert names(source, "val") == own["val"]
    assert sorted(names(source, "train")) == sorted(own["train"] + own["test"])
    picture = open_pictures(source, "val")[0]
    assert looks_like(picture, everything[int(picture.name.removeprefix("train/"))])


def test_classes_with_a_split_argument(tmp_path, monkeypatch):
    tried = []

    class Shapes(torchvision.datasets.VisionDataset):
        """As the classes of torchvision whose ``split`` has three values."""

        def __init__(self, root, split="train", download=True, loader=None):
            if split not in ("trainval", "valid", "test"):
                raise ValueError(f"Unknown value {split!r}")
            if not (Path(root) / "it").exists():
                raise RuntimeError("Dataset not found")
            assert not download
            tried.append(split)
            self.files = [tmp_path / split / "0.png"] * 3
            self.loader = loader

        def __getitem__(self, index):
            return self.loader(self.files[index]), 0, 1

        def __len__(self):
            return len(self.files)

    monkeypatch.setattr(torchvision.datasets, "Shapes", Shapes, raising=False)
    source = f"torchvision:Shapes:{tmp_path}"
    with pytest.raises(DataError, match=rf"{source}: cannot be opened \(Dataset not found\)"):
        open_pictures(source, "val")
    (tmp_path / "it").touch()
    for i, own in enumerate(("trainval", "valid", "test")):
        (tmp_path / own).mkdir()
        (tmp_path / own / "0.png").write_bytes(encoded(pixels(i)))
    for i, split in enumerate(SPLITS):
        found = open_pictures(source, split)
        assert [x.name for x in found] == [f"{split}/{j}" for j in range(3)]
        assert looks_like(found[2], pixels(i))
    assert tried == ["trainval", "valid", "test"]
    Shapes.__getitem__ = lambda self, index: (torch.zeros(3, 4, 4), 0)
    with pytest.raises(MediaError, match="torchvision:Shapes train/0: is Tensor, expected a Pillow image"):
        open_pictures(source, "train")[0].read()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("CIFR10", "has no class 'CIFR10'; did you mean CIFAR10"),
        ("wrap_dataset_for_transforms_v2", "has no class"),
        ("", "has no class ''"),
        ("FakeData:data", "FakeData has no root directory"),
        ("EMNIST:none", "EMNIST needs split"),
        ("CocoCaptions:none", "CocoCaptions needs annFile"),
        ("HMDB51:none", "HMDB51 needs annotation_path, frames_per_clip"),
        ("ImageFolder:none", "cannot be opened"),
        ("CelebA:none", "cannot be opened"),
        ("VOCDetection:none", "cannot be opened"),
    ],
)
def test_classes_that_cannot_be_opened(tmp_path, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=words):
        open_pictures(f"torchvision:{source}", "val")
    assert not list(tmp_path.iterdir())


# --- Hugging Face


def table(count: int, offset: int = 0, **more: list) -> datasets.Dataset:
    images = [{"bytes": encoded(pixels(offset + i)), "path": None} for i in range(count)]
    columns = {"label": list(range(count)), "image": images, **more}
    features = datasets.Features(
        {"label": datasets.Value("int64"), **{k: datasets.Image() for k in columns if k != "label"}}
    )
    return datasets.Dataset.from_dict(columns, features=features)


def test_saved_dataset(tmp_path):
    masks = [{"bytes": encoded(pixels(1000 + i)), "path": None} for i in range(40)]
    masks[0] = None
    masks[1] = {"bytes": None, "path": str(tmp_path / "file.png")}
    masks[2] = {"bytes": b"no picture", "path": None}
    (tmp_path / "file.png").write_bytes(encoded(pixels(7)))
    table(40, mask=masks).with_format("torch").save_to_disk(tmp_path / "it")
    source = f"hf:{tmp_path / 'it'}"
    every = {
        s: open_pictures(source, s) for s in SPLITS if keys(s, 1, "train/{}")[0] in [f"train/{i}" for i in range(40)]
    }
    assert sorted(x.name for v in every.values() for x in v) == sorted(f"train/{i}" for i in range(40))
    assert {x.source for x in every["train"]} == {"it"}
    for split, found in every.items():
        for picture in found:
            assert split_of(picture.name) == split
            assert looks_like(picture, pixels(int(picture.name.removeprefix("train/"))))
    mask = {x.name: x for s in every for x in open_pictures(f"{source}:mask", s)}
    assert looks_like(mask["train/5"], pixels(1005))
    assert looks_like(mask["train/1"], pixels(7))
    for index, words in ((0, "is empty"), (2, "not recognised")):
        with pytest.raises(MediaError, match=rf"train/{index}: .*{words}"):
            mask[f"train/{index}"].read()
    stamps = [json.dumps(x.stamp) for x in every["train"]]
    assert stamps == [json.dumps(x.stamp) for x in open_pictures(source, "train")]
    assert len(set(stamps)) == len(stamps)
    with ThreadPoolExecutor(8) as pool:
        numbers = [int(x.name.removeprefix("train/")) for x in every["train"]] * 3
        assert all(pool.map(lambda x, i: looks_like(x, pixels(i)), every["train"] * 3, numbers))


def test_splits_of_a_saved_dataset(tmp_path):
    parts = {
        "train": table(5),
        "trainval": table(8),
        "validation": table(3, 100),
        "test": table(2, 200),
        "odd": table(1),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "it")
    source = f"hf:{tmp_path / 'it'}"
    assert [len(names(source, x)) for x in ("train", "val", "test", "odd")] == [5, 3, 2, 1]
    assert looks_like(open_pictures(source, "val")[0], pixels(100))
    assert names(source, "val")[0] == "validation/0"
    with pytest.raises(DataError, match="has no split 'pair-test', it has"):
        open_pictures(source, "pair-test")


def test_other_than_the_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    for name, count in (("train", 3), ("validation", 2)):
        (tmp_path / "it").mkdir(exist_ok=True)
        table(count, count).to_parquet(tmp_path / "it" / f"{name}.parquet")
    found = open_pictures(f"hf:{tmp_path / 'it'}:image", "val")
    assert [x.name for x in found] == ["validation/0", "validation/1"]
    assert looks_like(found[1], pixels(3))


def test_hugging_face_errors(tmp_path, monkeypatch):
    datasets.Dataset.from_dict({"a": [1], "b": ["x"]}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(DataError, match=r"no column 'of pictures'.*: a \(Value\), b \(Value\)"):
        open_pictures(f"hf:{tmp_path / 'numbers'}", "train")
    table(3).save_to_disk(tmp_path / "it")
    with pytest.raises(DataError, match=r"no column 'label' of type Image.*: label \(Value\), image \(Image\)"):
        open_pictures(f"hf:{tmp_path / 'it'}:label", "train")
    with pytest.raises(DataError, match="none/at/all: cannot be opened"):
        open_pictures(f"hf:{tmp_path}/none/at/all", "train")
    (arrow,) = (tmp_path / "it").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:300])
    with pytest.raises(DataError, match="it: cannot be opened"):
        open_pictures(f"hf:{tmp_path / 'it'}", "train")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'mmtok\[hf\]'"):
        open_pictures(f"hf:{tmp_path / 'it'}", "train")


# --- all of them, in memory


def test_any_source_is_loaded_and_cached(tmp_path, capsys):
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


def test_alpha_in_memory(tmp_path):
    key = keys("train", 1)[0]
    rgba = pixels(0, 10, 20, channels=4)
    (tmp_path / f"{key}.png").write_bytes(encoded(rgba))
    pictures = open_pictures(tmp_path, "train")
    images = load_images(pictures, 20, tmp_path / "cache", alpha=True)
    assert (images.shape, images.dtype) == ((1, 4, 20, 20), np.uint8)
    assert np.array_equal(images[0, :, 5:15], rgba.transpose(2, 0, 1))
    assert (images[0, 3, :5] == 0).all()
    assert (images[0, 3, 15:] == 0).all()
    assert load_images(pictures, 20, tmp_path / "cache").shape == (1, 3, 20, 20)

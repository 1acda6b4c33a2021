"""Pictures from folders, manifests, torchvision and Hugging Face data sets, all read for real and offline."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torchvision
from noise import SPLITS, encoded, keys, looks_like, names, pixels
from PIL import Image

from mmtok.errors import DataError, MediaError
from mmtok.training.corpus import split_of
from mmtok.training.data import load_images
from mmtok.training.pictures import open_pictures

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


# --- in memory


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

"""The training loop resumes to the last bit; corpora and caches are what they say."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from mmtok import media
from mmtok.errors import CheckpointError, ConfigError, DataError
from mmtok.training import distributed
from mmtok.training.corpus import bucket, digest_of, documents, items, split_of
from mmtok.training.data import load_audio, load_images
from mmtok.training.loop import LOG, STATE, LoopConfig, fit, prepare_torch, rng
from mmtok.training.pictures import open_pictures

# --- the loop

CONFIG = LoopConfig(steps=7, batch_size=4, lr=1e-2, warmup=2, eval_every=2, save_every=3)


class Noisy(nn.Module):
    """Uses every kind of state: weights, a channels-last kernel, a moving buffer, and torch's random generator."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.head = nn.Linear(5, 1)
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.dropout(self.conv(x).tanh().mean((2, 3)), 0.3, self.training)
        if self.training:
            self.mean.lerp_(h.detach().float().mean(0), 0.1)
        return self.head(h - self.mean)


def train(run: Path, config: LoopConfig = CONFIG, die_at: int = -1, die=None, bad_at: int = -1, settings=None) -> Noisy:
    torch.manual_seed(config.seed)
    model = Noisy().to(memory_format=torch.channels_last)

    def loss(step):
        if step == die_at:
            die()
        x = torch.from_numpy(rng(config, step).standard_normal((config.batch_size, 3, 6, 6), np.float32))
        y = model(x.contiguous(memory_format=torch.channels_last))
        value = (y.float().squeeze(1) - x.mean((1, 2, 3))).square().mean()
        if step == bad_at:
            value = value / 0
        return value, {"loss": value.item()}

    def evaluate(step):
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"val": float(model(torch.ones(1, 3, 6, 6)))}

    fit(model, config, run, loss, evaluate, "test", settings or {})
    return model


def stop():
    raise KeyboardInterrupt


def log(run: Path) -> list[dict]:
    lines = [json.loads(x) for x in (run / LOG).read_text().splitlines()]
    return [{k: v for k, v in x.items() if k != "steps_per_s"} for x in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole")
    train(run)
    return run


def same_run(a: Path, b: Path) -> None:
    one, two = load_file(a / STATE), load_file(b / STATE)
    assert one.keys() == two.keys()
    assert not [k for k in one if not torch.equal(one[k], two[k])]
    assert log(a) == log(b)


def test_run_leaves_its_log_and_state(whole):
    lines = log(whole)
    assert [x["step"] for x in lines] == [2, 4, 6, 7]
    assert list(lines[0]) == ["step", "lr", "loss", "val"]
    assert [x["lr"] for x in lines] == [CONFIG.lr_at(x["step"] - 1) for x in lines]
    assert sorted(p.name for p in whole.iterdir()) in (
        [LOG, STATE],
        [LOG, STATE, "tensorboard"],
    )


@pytest.mark.parametrize("die_at", [1, 3, 4, 5, 6])
def test_interrupted_run_ends_as_the_uninterrupted(whole, tmp_path, die_at):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, die_at=die_at, die=stop)
    torch.manual_seed(99)
    torch.rand(die_at)
    model = train(tmp_path)
    assert not model.training
    same_run(whole, tmp_path)


def test_run_killed_by_the_system(whole, tmp_path):
    here = Path(__file__).resolve()
    command = [sys.executable, str(here), str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parent.parent)}
    done = subprocess.run(command, env=env, capture_output=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert [x["step"] for x in log(tmp_path)] == [2, 4]  # and the checkpoint is of step 3
    with (tmp_path / LOG).open("a") as f:
        f.write('{"step": 5, "lr')  # the line that was being written
    train(tmp_path)
    same_run(whole, tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_finished_run_is_left_alone_and_can_be_extended(whole, tmp_path):
    train(tmp_path)
    train(tmp_path)
    same_run(whole, tmp_path)
    longer = CONFIG.replace(["steps=9", "eval_every=9", "save_every=9", "threads=1"])
    train(tmp_path, longer)
    assert [x["step"] for x in log(tmp_path)] == [2, 4, 6, 7, 9]


def test_another_schedule_is_refused(whole, tmp_path):
    (tmp_path / STATE).write_bytes((whole / STATE).read_bytes())
    for change in ("lr=0.02", "batch_size=5", "seed=1", "warmup=3", "bf16=false", "clip=2", "weight_decay=0"):
        key = change.split("=")[0]
        with pytest.raises(ConfigError, match=rf"another schedule \({key}: .* there, .* here\).*another --out"):
            train(tmp_path, CONFIG.replace([change]))
    assert (tmp_path / STATE).read_bytes() == (whole / STATE).read_bytes()


def test_other_settings_are_refused(tmp_path):
    of = {"model": CONFIG, "size": 64, "data": digest_of(["a", "b"])}
    train(tmp_path, settings=of)
    before = (tmp_path / STATE).read_bytes()
    train(tmp_path, settings=dict(of))
    for change, words in (
        ({"size": 32}, r"size: 64 there, 32 here"),
        ({"model": CONFIG.replace(["clip=2"])}, r"model\.clip: 1.0 there, 2.0 here"),
        ({"data": digest_of(["a", "c"])}, r"data: 2 named \w+ there, 2 named \w+ here"),
    ):
        with pytest.raises(ConfigError, match=rf"made with other settings \({words}\).*another --out"):
            train(tmp_path, settings=of | change)
    assert (tmp_path / STATE).read_bytes() == before


def test_a_digest_tells_names_apart():
    seen = [digest_of(x) for x in ([], ["a"], ["a", "b"], ["b", "a"], ["ab"], ["\udcff"])]
    assert len(set(seen)) == len(seen)
    assert digest_of(iter(["a", "b"])) == seen[2]


def test_a_batch_that_ranks_cannot_share_evenly_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 3)
    with pytest.raises(ConfigError, match="batch_size of 4 for 3 ranks"):
        prepare_torch(CONFIG)


def test_damaged_state_is_refused(whole, tmp_path):
    from mmtok.checkpoints import tensors_to_bytes

    data = (whole / STATE).read_bytes()
    for cut in (b"", data[:4], data[:300], data[:-1], b"\0" * 100):
        (tmp_path / STATE).write_bytes(cut)
        with pytest.raises(CheckpointError, match=r"state\.safetensors is not a readable safetensors file"):
            train(tmp_path)
    good = {"step": "3", "config": CONFIG.to_json()}
    tensors = {"rng": torch.get_rng_state()}
    for meta in ({}, {"step": "3"}, {**good, "step": "three"}, {**good, "config": "{"}, {**good, "config": "3"}):
        (tmp_path / STATE).write_bytes(tensors_to_bytes(tensors, meta))
        with pytest.raises(CheckpointError, match=r"is no training state \(.*\); remove it to start anew"):
            train(tmp_path)
    (tmp_path / STATE).write_bytes(tensors_to_bytes({"model.x": torch.zeros(1)}, good))
    with pytest.raises(CheckpointError, match="is no training state"):
        train(tmp_path)
    (tmp_path / STATE).write_bytes(tensors_to_bytes(tensors, good))
    with pytest.raises(CheckpointError, match=r"missing: conv\.bias"):
        train(tmp_path)


def test_damaged_optimizer_state_is_refused(whole, tmp_path):
    from mmtok.checkpoints import tensors_to_bytes

    meta = {"step": "7", "config": CONFIG.to_json()}
    tensors = load_file(whole / STATE)
    changes = (
        {k: v for k, v in tensors.items() if k != "optimizer.conv.weight.exp_avg"},
        {**tensors, "optimizer.conv.bias.exp_avg": torch.zeros(2)},
        {**tensors, "optimizer.none.exp_avg": torch.zeros(2)},
        {**tensors, "rng": torch.zeros(3, dtype=torch.uint8)},
    )
    for changed in changes:
        (tmp_path / STATE).write_bytes(tensors_to_bytes(changed, meta))
        with pytest.raises(CheckpointError, match=r"state\.safetensors.*remove it to start anew"):
            train(tmp_path)
    data = bytearray((whole / STATE).read_bytes())
    data[-9] ^= 1
    (tmp_path / STATE).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is damaged: its sha256 is not the recorded one"):
        train(tmp_path)


def test_loss_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"step 4: the loss is (inf|nan); lower lr \(0\.01\)"):
        train(tmp_path, bad_at=4)
    assert [x["step"] for x in log(tmp_path)] == [2, 4]


def test_the_order_of_the_data_follows_from_seed_and_step():
    a = rng(LoopConfig(seed=1), 5).random(3)
    assert (a == rng(LoopConfig(seed=1), 5).random(3)).all()
    assert (a != rng(LoopConfig(seed=2), 5).random(3)).any()
    assert (a != rng(LoopConfig(seed=1), 6).random(3)).any()
    np.testing.assert_allclose(rng(LoopConfig(), 0).random(2), [0.8233, 0.0164], atol=1)


def test_what_can_be_seen_and_heard_is_written(tmp_path):
    """Pictures and sounds of an evaluation go to files and, where it is installed, to TensorBoard."""
    config = CONFIG.replace(["steps=2", "eval_every=1"])
    t = np.arange(800) / 8000
    stereo = np.stack([0.5 * np.sin(800 * t), 0.25 * np.cos(500 * t)]).astype(np.float32)
    picture = np.random.default_rng(0).integers(0, 256, (3, 8, 12), np.uint8)
    model = Noisy()

    def loss(step):
        return model(torch.ones(1, 3, 6, 6)).square().mean(), {}

    def evaluate(step):
        return {"val": step}, {"": picture, "low": picture // 2}, {"0": (step / 4 * stereo, 8000)}

    fit(model, config, tmp_path, loss, evaluate, "test", {})
    names = [f"{step:06}{rest}" for step in (1, 2) for rest in ("-0.wav", "-low.png", ".png")]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == names
    assert (media.read_image(tmp_path / "samples" / "000002-low.png") == picture // 2).all()
    samples, rate = soundfile.read(tmp_path / "samples" / "000002-0.wav")
    assert rate == 8000
    np.testing.assert_allclose(samples.T, stereo / 2, atol=1 / 32768)

    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert (sorted(tags["audio"]), sorted(tags["images"])) == (["0"], ["low", "samples"])
    assert {"val", "lr"} <= set(tags["scalars"])
    heard, rate = soundfile.read(io.BytesIO(events.Audio("0")[-1].encoded_audio_string))
    assert (rate, [x.step for x in events.Audio("0")]) == (8000, [1, 2])
    np.testing.assert_allclose(heard, stereo.mean(0) / 2, atol=1 / 16384)


def test_gradients_that_an_earlier_stage_left_do_not_count(tmp_path):
    """Parts that are frozen between two stages keep their last gradients: these must not shrink those of the others."""
    torch.manual_seed(0)
    model = Noisy()
    model.conv.requires_grad_(False)
    model.conv.weight.grad = torch.full_like(model.conv.weight, 1e9)

    def loss(step):
        return model(torch.ones(1, 3, 6, 6)).square().mean(), {}

    fit(model, CONFIG.replace(["steps=1"]), tmp_path, loss, lambda step: {}, "test", {})
    assert model.conv.weight.grad is None
    assert float(model.head.weight.grad.norm()) > 1e-3


# --- corpora


def test_split_golden_values():
    """The splits are the same on every machine and for ever: else a test picture becomes a training picture."""
    assert [bucket(x) for x in ("", "cow", "animals/cow", "ünï")] == [3820012610, 3199284341, 1541311295, 3916801321]
    keys = ("cow", "animals/cow", "animals/3", "animals/32")
    assert [split_of(x) for x in keys] == ["val", "train", "test", "val"]
    counts = {s: sum(split_of(f"picture/{i}") == s for i in range(4000)) for s in ("train", "val", "test")}
    assert counts == {"train": 3612, "val": 187, "test": 201}
    assert split_of(os.fsdecode(b"bad\xffname")) in counts  # a file name that is not UTF-8


def key_in(split: str, start: int = 0) -> str:
    return next(f"k{i}" for i in range(start, 10000) if split_of(f"k{i}") == split)


def test_folder(tmp_path):
    train_key, val_key = key_in("train"), key_in("val")
    (tmp_path / "sub.png").mkdir()
    for name in (f"{train_key}.png", f"{val_key}.JPG", f"{train_key}.txt"):
        (tmp_path / name).write_text("text")
    (tmp_path / "other.xyz").write_text("")
    found = items(tmp_path, "image", "train")
    assert [(x.document, x.split, x.source) for x in found] == [(train_key, "train", tmp_path.name)]
    assert found[0].path == tmp_path / f"{train_key}.png"
    assert [x.document for x in items(tmp_path, "image", "val")] == [val_key]
    assert items(tmp_path, "text", "train")[0].segment["text"] == "text"
    with pytest.raises(DataError, match=r"no image in split 'test' \(2 in all splits\)"):
        items(tmp_path, "image", "test")
    with pytest.raises(DataError, match=r"no audio in split 'train' \(0 in all splits\)"):
        items(tmp_path, "audio", "train")


def test_manifest(tmp_path):
    lines = [
        {"id": "cow", "split": "train", "source": "farm", "segments": [
            {"type": "text", "text": "a cow"}, {"type": "image", "path": "cow.png"}]},
        {"id": 7, "split": "val", "segments": [{"type": "image", "path": "a/7.png"}]},
        {"segments": []},
    ]  # fmt: skip
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(json.dumps(x) for x in lines) + "\n\n", encoding="utf-8")
    found = list(documents(path))
    assert [d["id"] for d in found] == ["cow", "7", "line-3"]
    assert found[2]["split"] == split_of("line-3")
    (item,) = items(path, "image", "train")
    assert (item.document, item.source, item.path) == ("cow", "farm", tmp_path / "cow.png")
    assert items(path, "image", "val")[0].document == "7"
    assert items(path, "text", "train")[0].segment["text"] == "a cow"


@pytest.mark.parametrize(
    "line",
    [
        b"{", b"[]", b"3", b'{"id": "x"}', b'{"segments": 3}', b'{"segments": [3]}',
        b'{"segments": [{"type": "image"}]}',
        b'{"segments": [{"path": "x"}]}', b'{"segments": [{"type": "text", "path": "x"}]}', b"\xff\xfe",
        b'{"segments": [{"type": "text", "text": 3}]}', b'{"segments": [{"type": "image", "path": null}]}',
        b'{"segments": {"type": "text"}}', b'{"segments": ""}',
    ],
)  # fmt: skip
def test_damaged_manifest(tmp_path, line):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"segments": []}\n' + line + b"\n")
    with pytest.raises(DataError, match=r"m\.jsonl:2: "):
        list(documents(path))


def test_no_manifest(tmp_path):
    with pytest.raises(DataError, match=r"cannot read the manifest .*prepare\.py"):
        list(documents(tmp_path / "none.jsonl"))


# --- media in memory


def test_images_are_fitted_and_cached(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    keys = [key_in("train", i * 100) for i in range(3)]
    for i, key in enumerate(keys[:2]):
        Image.new("RGB", (30, 10), (50 * i, 100, 200)).save(folder / f"{key}.png")
    (folder / f"{keys[2]}.png").write_bytes(b"no picture")
    found = open_pictures(folder, "train")
    images = load_images(found, 16, tmp_path / "cache")
    assert (images.shape, images.dtype) == ((2, 3, 16, 16), np.uint8)
    assert (images[:, :, 0] == 255).all()  # white above a wide picture
    assert sorted(images[:, 0, 8, 8]) == [0, 50]
    assert "left out" in capsys.readouterr().err
    assert (load_images(found, 16, tmp_path / "cache") == images).all()
    assert "left out" not in capsys.readouterr().err  # from the cache
    assert len(list((tmp_path / "cache").iterdir())) == 1
    Image.new("RGB", (10, 10), (9, 9, 9)).save(folder / f"{keys[2]}.png")
    assert len(load_images(open_pictures(folder, "train"), 16, tmp_path / "cache")) == 3  # a changed file is seen
    (folder / "bad.png").write_bytes(b"")
    bad = [x for x in open_pictures(folder, split_of("bad")) if x.name == "bad"]
    with pytest.raises(DataError, match="none of 1 files could be read"):
        load_images(bad, 16, tmp_path / "cache")


def test_audio_lies_end_to_end(tmp_path):
    keys = [key_in("train", i * 100) for i in range(3)]
    wave = np.linspace(-0.5, 0.5, 800, dtype=np.float32)
    for i, key in enumerate(keys):
        if i != 1:
            soundfile.write(tmp_path / f"{key}.wav", wave[: 400 * (i + 1) // 2 * 2], 8000)
    lines = [
        {"id": k, "split": "train", "segments": [{"type": "audio", "path": f"{k}.wav", "end": 0.05}]} for k in keys
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    samples, offsets, kept = load_audio(items(tmp_path / "m.jsonl", "audio", "train"), 8000, tmp_path / "cache")
    assert samples.dtype == np.int16
    assert offsets.tolist() == [0, 400, 800]
    assert kept.tolist() == [0, 2]
    np.testing.assert_allclose(samples[:400] / 32767, wave[:400], atol=1e-4)


def test_files_of_one_stem_are_one_document(tmp_path: Path) -> None:
    (tmp_path / "farm").mkdir()
    (tmp_path / "farm" / "cow.txt").write_text("a cow", encoding="utf-8")
    for name in ("farm/cow.png", "farm/cow.wav", "hen.png", "farm/readme.pdf"):
        (tmp_path / name).write_bytes(b"x")
    cow, hen = documents(tmp_path)
    assert cow["id"] == "farm/cow"
    assert cow["split"] == split_of("farm/cow")
    assert {s["type"]: s["path"] for s in cow["segments"]} == {
        m: str(Path("farm") / f"cow.{x}") for m, x in (("image", "png"), ("text", "txt"), ("audio", "wav"))
    }
    assert next(s["text"] for s in cow["segments"] if s["type"] == "text") == "a cow"
    assert [s["type"] for s in hen["segments"]] == ["image"]
    assert [d["id"] for d in documents(tmp_path, ("audio",))] == ["farm/cow"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), die_at=4, die=lambda: os.kill(os.getpid(), signal.SIGKILL))

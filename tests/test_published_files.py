"""What is wrong with published files is one clear line, code in them never runs, and ``mmtok import``."""

from __future__ import annotations

import collections
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import contents, refused, run
from safetensors.torch import save_file
from vqgan_files import llamagen, picture, taming, write

import mmtok
from mmtok import media
from mmtok.archive import module_tensors, read_archive
from mmtok.errors import CheckpointError
from mmtok.image import published
from mmtok.weights import read_state

TAMING = taming((1, 1), blocks=1, attention=())


class Callback:
    """Stands for what Lightning keeps beside the weights."""

    def __init__(self, path: Path) -> None:
        self.path = path


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


# --- state dicts that do not fit


def test_tensors_that_are_missing_unexpected_or_misshapen(tmp_path: Path) -> None:
    def broken(**changes: torch.Tensor | None) -> Path:
        state = {k: v for k, v in {**TAMING, **changes}.items() if v is not None}
        return write(tmp_path / "a.ckpt", state)

    one = torch.ones(1)
    for changes, message in (
        (
            {"decoder.mid.block_2.conv1.bias": None},
            r"do not fit the model \(missing: decoder\.mid\.block_2\.conv1\.bias\)",
        ),
        ({"decoder.extra": one}, r"unexpected: decoder\.extra"),
        ({"quant_conv.bias": one}, r"wrong shape: quant_conv\.bias: \(1,\) for \(4,\)"),
        ({"encoder.conv_in.weight": None}, r"has no encoder\.conv_in\.weight; expected the weights of a VQGAN"),
        ({"quantize.embedding.weight": None}, r"has no quantize\.embedding\.weight"),
        ({"quantize.embedding.weight": one}, r"has a 1-dimensional quantize\.embedding\.weight"),
        ({"quantize.proj.weight": one}, "is a GumbelVQ"),
        ({"quant_conv.bias": torch.full((4,), float("nan"))}, r"quant_conv\.bias holds NaN or infinity"),
        ({"encoder.down.1.block.0.conv2.weight": torch.ones(40, 32, 3, 3)}, r"levels of \[32, 40\] channels"),
        ({"encoder.conv_in.weight": torch.ones(32, 1, 3, 3)}, r"image_channels: got 1, expected 3 or 4"),
        ({"encoder.conv_in.weight": torch.ones(0, 3, 3, 3)}, r"expected"),
    ):
        with pytest.raises(CheckpointError, match=message) as stop:
            published.import_taming(broken(**changes))
        assert str(tmp_path / "a.ckpt") in str(stop.value)
        assert "\n" not in str(stop.value)
    for system in ("llamagen", "taming"):  # the files of another system
        other = write(tmp_path / "b.pt", TAMING if system == "llamagen" else llamagen((1, 1)), "model")
        if system == "taming":
            with pytest.raises(CheckpointError, match="expected"):
                published.load(system, other)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"epoch": 3, "weights": {}}, "holds epoch, weights; expected tensors by name"),
        ({"state_dict": {}}, "holds nothing; expected tensors by name"),
        ({"state_dict": {"a": torch.ones(1), "b": 3}}, "holds a, b; expected tensors by name"),
        ([1, 2], "holds list; expected tensors by name"),
    ],
)
def test_files_without_a_state_dict(tmp_path: Path, held: object, message: str) -> None:
    torch.save(held, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        read_state(tmp_path / "a.pt")


# --- damage


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_files_cut_short(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name == "a.safetensors":
        save_file(TAMING, file)
    else:
        torch.save(TAMING, file)
    whole = file.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=rf"{name} is (not a readable|damaged or)") as stop:
            published.import_taming(file)
        assert "\n" not in str(stop.value)


def test_damage_anywhere_is_found_or_harmless(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    small = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.tensor([1, 2]), "c": torch.zeros(0)}
    torch.save(small, file)
    whole, random = file.read_bytes(), np.random.default_rng(0)
    found = 0
    for at in random.integers(0, len(whole), 300):
        file.write_bytes(whole[:at] + random.bytes(1) + whole[at + 1 :])
        try:
            state = read_state(file)
        except CheckpointError as error:
            found += "\n" not in str(error)
        else:  # padding, or what is not read
            assert {k: v.tolist() for k, v in state.items()} == {k: v.tolist() for k, v in small.items()}
    assert found > 30


@pytest.mark.parametrize("text", ["", "no weights here", "PK", "\x80\x02}q\x00."])
def test_other_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.ckpt").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError) as stop:
        read_state(tmp_path / "a.ckpt")
    assert "\n" not in str(stop.value)
    with zipfile.ZipFile(tmp_path / "b.ckpt", "w") as archive:
        archive.writestr("readme.txt", text)
    with pytest.raises(CheckpointError, match=r"zip file without a data\.pkl"):
        read_state(tmp_path / "b.ckpt")
    for path in (tmp_path, tmp_path / "nothing.ckpt"):
        with pytest.raises(CheckpointError, match="no file at"):
            read_state(path)


# --- code in files


def test_lightning_checkpoints_are_read_past_their_callbacks(tmp_path: Path) -> None:
    extra = {
        "callbacks": {Callback: Callback(tmp_path)}, "hparams": collections.defaultdict(list, lr=[Callback(tmp_path)]),
        "when": tmp_path, "optimizer_states": [{"state": {0: {"step": torch.tensor(3)}}}],
    }  # fmt: skip
    torch.save({"state_dict": TAMING, **extra}, tmp_path / "last.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "last.ckpt", weights_only=True)
    plain = published.import_taming(write(tmp_path / "plain.ckpt", TAMING))
    assert published.import_taming(tmp_path / "last.ckpt").fingerprint == plain.fingerprint


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    hacked = tmp_path / "hacked"
    torch.save({"state_dict": TAMING, "x": Evil(hacked)}, tmp_path / "a.ckpt")
    published.import_taming(tmp_path / "a.ckpt")
    torch.save({"state_dict": {**TAMING, "quant_conv.bias": Evil(hacked)}}, tmp_path / "b.ckpt")
    with pytest.raises(CheckpointError, match="expected tensors by name"):
        published.import_taming(tmp_path / "b.ckpt")
    (tmp_path / "c.ckpt").write_bytes(pickle.dumps({"state_dict": Evil(hacked)}))
    with pytest.raises(CheckpointError, match="damaged or no archive"):
        published.import_taming(tmp_path / "c.ckpt")
    assert not hacked.exists()
    torch.load(tmp_path / "b.ckpt", weights_only=False)
    assert hacked.exists(), "the pickle is one that would run"


@pytest.mark.parametrize(
    "pickled",
    [
        b'cbuiltins\neval\n(S\'open("hacked","w")\'\ntR.',
        b"cos\nsystem\n(S'touch hacked'\ntR.",
        b"(S'touch hacked'\nios\nsystem\n.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(S'x'\nI0\n(I1\nt(I1\nttR.",
        b"ctorch.jit\nload\n(S'a'\ntR.",
        b"ctorch\nFloatStorage\n(tR.",
        b"(S'storage'\nctorch\nload\nS'0'\ntQ.",
        b"I1\nr\xff\xff\xff\xff.",  # a memo of four billion places
        b"\x96\xff\xff\xff\xff\xff\x00\x00\x00.",  # an array of a terabyte
        b"(S'storage'\nctorch\nFloatStorage\nS'9'\ntQ.",
    ],
)
def test_hostile_pickles(tmp_path: Path, pickled: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("a.ckpt", "w") as archive:
        archive.writestr("a/data.pkl", pickled)
    with pytest.raises(CheckpointError) as stop:
        read_state("a.ckpt")
    assert "\n" not in str(stop.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ckpt"]


def test_a_tensor_cannot_reach_beyond_its_storage(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    torch.save({"a": torch.ones(3)}, file)
    with zipfile.ZipFile(file) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w") as new:
        for name, data in parts.items():
            new.writestr(name, data[:8] if name.endswith("data/0") else data)
    with pytest.raises(CheckpointError, match="cannot be read as tensors"):
        read_state(file)


def test_a_small_file_cannot_ask_for_a_large_tensor(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(10**12)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a tensor of \[1000000000000\] out of 1 numbers"):
        read_state(tmp_path / "a.pt")
    write(tmp_path / "b.pt", TAMING)
    with (
        zipfile.ZipFile(tmp_path / "b.pt") as old,
        zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match=r"data\.pkl is compressed"):
        read_state(tmp_path / "c.pt")


def test_torchscript_is_read_as_pytorch_reads_it(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(2, 2).half())
    module.register_buffer("steps", torch.arange(6).reshape(2, 3).T)
    torch.jit.save(torch.jit.script(module.eval()), tmp_path / "a.jit")
    expected = torch.jit.load(tmp_path / "a.jit").state_dict()
    found = module_tensors(read_archive(tmp_path / "a.jit"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


# --- the command


def test_import_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = write(tmp_path / "vq.pt", llamagen((1, 1), blocks=1), "model")
    code, stdout, stderr = run("import", "llamagen", file, "-o", tmp_path / "mine", "--json", capsys=capsys)
    assert (code, stderr) == (0, "")
    report = json.loads(stdout)
    tokenizer = mmtok.load(tmp_path / "mine")
    assert report == {
        "system": "llamagen", "source": str(file), "out": str(tmp_path / "mine"), "kind": "image-vqgan", "codes": 64,
        "downsample": 2, "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "fingerprint": tokenizer.fingerprint,
    }  # fmt: skip
    before = contents(tmp_path / "mine")
    code, stdout, _ = run("import", "llamagen", file, "-o", tmp_path / "mine", capsys=capsys)
    assert code == 0
    assert f"64 codes of 2x2 pixels, {report['parameters']} parameters" in stdout
    assert contents(tmp_path / "mine") == before
    media.write_image(tmp_path / "a.png", picture(9, 14)[0].numpy())
    code, stdout, _ = run(
        "roundtrip",
        tmp_path / "a.png",
        "--image",
        tmp_path / "mine",
        "--out",
        tmp_path / "out",
        "--json",
        capsys=capsys,
    )
    assert code == 0
    (entry,) = json.loads(stdout)["files"]
    assert entry["tokens"] == 5 * 7


def test_import_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert "mmtok reads: taming" in refused("import", "dalle", tmp_path, "-o", out, capsys=capsys)
    assert "no file at" in refused("import", "taming", tmp_path / "no.ckpt", "-o", out, capsys=capsys)
    assert "encoder.jit" in refused("import", "cosmos", tmp_path, "-o", out, capsys=capsys)
    file = write(tmp_path / "a.ckpt", {**TAMING, "more": torch.ones(1)})
    assert "unexpected: more" in refused("import", "taming", file, "-o", out, capsys=capsys)
    assert "--out" in refused("import", "taming", file, capsys=capsys)
    assert not out.exists()
    code, stdout, _ = run("import", "--help", capsys=capsys)
    assert code == 0
    assert "mmtok import llamagen vq_ds16_c2i.pt -o llamagen-f16" in stdout

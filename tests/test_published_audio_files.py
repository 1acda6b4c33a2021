"""The files in which audio codecs are published: each format, what is wrong with them, and ``mmtok import``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import codec_files
import numpy as np
import pytest
import torch
from codec_files import sound
from commands import contents, refused, run
from safetensors.torch import load_file, save_file
from torch import nn

import mmtok
from mmtok import media
from mmtok.audio import published
from mmtok.audio.published.base import fuse_weight_norm
from mmtok.errors import CheckpointError

NAMES = ("dac", "mimi", "snac", "xcodec")


def write(name: str, folder: Path) -> Path:
    """A codec in the format of its system."""
    shape = codec_files.SNAC if name == "snac" else None
    return codec_files.write(getattr(codec_files, name)(), folder, shape)


def edit(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the tensors of a directory."""
    file = folder / "model.safetensors"
    if file.is_file():
        state = load_file(file)
        change(state)
        save_file(state, file)
    else:
        state = torch.load(folder / "pytorch_model.bin", weights_only=True)
        change(state)
        torch.save(state, folder / "pytorch_model.bin")


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def put_settings(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**settings_of(folder), **changes}))


# --- formats


def test_dac_of_its_package_and_of_transformers_are_one(tmp_path: Path) -> None:
    original = codec_files.dac()
    there = published.DAC.from_published(codec_files.write(original, tmp_path / "hf"))
    state = codec_files.as_package(original.state_dict())
    file = tmp_path / "weights_1khz.pth"
    # beside the settings lies what such files hold too: other metadata, objects of other packages
    metadata = {"kwargs": codec_files.DAC_PACKAGE, "logs": {"loss": np.float64(0.5)}}
    torch.save({"state_dict": state, "metadata": metadata}, file)
    package = published.DAC.from_published(file)
    assert package.config == there.config
    x = sound(333)
    codes = there.encode(x)
    assert torch.equal(package.encode(x), codes)
    torch.testing.assert_close(package.decode(codes), there.decode(codes), rtol=0, atol=1e-5)
    new = {}
    for key, value in state.items():  # weight norm under the names that PyTorch uses now
        key = key.replace("weight_g", "parametrizations.weight.original0")
        new[key.replace("weight_v", "parametrizations.weight.original1")] = value
    torch.save({"state_dict": new, "metadata": {"kwargs": codec_files.DAC_PACKAGE}}, file)
    assert published.DAC.from_published(file).fingerprint == package.fingerprint


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 40, 333])
def test_dac_against_its_package(tmp_path: Path, length: int) -> None:
    package = pytest.importorskip("dac")
    torch.manual_seed(0)
    original = codec_files.lively(package.DAC(**codec_files.DAC_PACKAGE), 0.0003)
    original.save(tmp_path / "weights.pth", package=False)
    codec = published.DAC.from_published(tmp_path / "weights.pth")
    x = sound(length)
    expected = original.encode(original.preprocess(x, 1000))[1]
    codes = codec.encode(x)
    assert torch.equal(codes, expected)
    whole = original.decode(original.quantizer.from_codes(expected)[0])
    y = codec.to_samples(codes)
    assert 0 <= y.shape[-1] - whole.shape[-1] < 10
    torch.testing.assert_close(y[..., : whole.shape[-1]], whole, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("semantic", ["hubert", "wavlm"])
def test_both_semantic_models_of_xcodec(tmp_path: Path, semantic: str) -> None:
    original = codec_files.xcodec(semantic)
    codec = published.XCodec.from_published(codec_files.write(original, tmp_path))
    x = sound(200)
    assert torch.equal(codec.encode(x), original.encode(x).audio_codes)
    old = {"original0": "weight_g", "original1": "weight_v"}

    def rename(state: dict) -> None:  # as PyTorch had it when these models were published
        for key in [k for k in state if "parametrizations" in k]:
            stem, end = key.split("parametrizations.weight.")
            state[stem + old[end]] = state.pop(key)

    edit(tmp_path, rename)
    assert published.XCodec.from_published(tmp_path).fingerprint == codec.fingerprint


def test_mimi_as_it_was_published_first(tmp_path: Path) -> None:
    """With rope_theta and frame_rate in config.json, and weights in a .bin."""
    write("mimi", tmp_path)
    codec = published.Mimi.from_published(tmp_path)
    settings = settings_of(tmp_path)
    for key in ("rope_parameters", "_frame_rate"):
        settings.pop(key, None)
    settings |= {"rope_theta": 10_000.0, "frame_rate": 25.0, "head_dim": None}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert published.Mimi.from_published(tmp_path).fingerprint == codec.fingerprint
    put_settings(tmp_path, rope_theta=500.0)
    assert published.Mimi.from_published(tmp_path).fingerprint != codec.fingerprint


@torch.no_grad()
def test_weight_norm_is_fused_as_pytorch_computes_it() -> None:
    torch.manual_seed(0)
    for dim in (0, 2):
        conv = nn.Conv1d(4, 6, 3)
        normed = nn.utils.parametrizations.weight_norm(conv, dim=dim)
        normed.parametrizations.weight.original0.mul_(1.7)
        fused = fuse_weight_norm({f"a.{k}": v for k, v in normed.state_dict().items()})
        assert sorted(fused) == ["a.bias", "a.weight"]
        assert torch.equal(fused["a.weight"], normed.weight)
    alone = {"a.weight_v": torch.ones(2, 3, 1), "a.weight_g": torch.ones(5, 1, 1)}
    assert sorted(fuse_weight_norm(alone)) == ["a.weight_g", "a.weight_v"]


def test_weights_are_parameters_where_no_gradients_are_kept_too(tmp_path: Path) -> None:
    write("snac", tmp_path)
    names = [name for name, _ in published.SNAC.from_published(tmp_path).named_parameters()]
    with torch.no_grad():
        assert [name for name, _ in published.SNAC.from_published(tmp_path).named_parameters()] == names
    assert "model.encoder.block.0.weight" in names


# --- what is wrong with them


@pytest.mark.parametrize("name", NAMES)
def test_damaged_directories(tmp_path: Path, name: str) -> None:
    codec = published.SYSTEMS[name]
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON|no file at"):
        codec.from_published(tmp_path / "nowhere")
    write(name, tmp_path)
    weights = tmp_path / ("pytorch_model.bin" if name == "snac" else "model.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=re.escape(weights.name)):
        codec.from_published(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no weights at .*model\.safetensors"):
        codec.from_published(tmp_path)
    weights.write_bytes(whole)
    settings = settings_of(tmp_path)
    rate = "sample_rate" if name == "xcodec" else "sampling_rate"
    for wrong, message in (("fast", f"{rate}: got 'fast'"), (0, f"{rate}: got 0, expected at least 1")):
        put_settings(tmp_path, **{rate: wrong})
        with pytest.raises(CheckpointError, match=rf"config\.json cannot be used: .*{message}"):
            codec.from_published(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a list, expected a JSON object"):
        codec.from_published(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "model_type": "llama", "vq_strides": "no"}))
    with pytest.raises(CheckpointError, match=r"type 'llama', expected|vq_strides: got 'no'"):
        codec.from_published(tmp_path)


BOOKS = {
    "dac": "quantizer.quantizers.1.codebook.weight",
    "mimi": "quantizer.acoustic_residual_vector_quantizer.layers.0.codebook.embed_sum",
    "snac": "quantizer.quantizers.1.codebook.weight",
    "xcodec": "quantizer.quantizers.1.codebook.embed",
}


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    codec, book = published.SYSTEMS[name], BOOKS[name]
    write(name, tmp_path)
    good: dict[str, torch.Tensor] = {}
    edit(tmp_path, lambda state: good.update({k: v.clone() for k, v in state.items()}))
    for change, message in (
        (lambda state: state.pop(book), f"do not fit the model .missing: .*{re.escape(book)}"),
        (lambda state: state.update(more=torch.ones(2)), "unexpected: .*more"),
        (lambda state: state.update({book: torch.ones(7, 2)}), r"wrong shape: .*\(7, 2\) for "),
        (lambda state: state[book].fill_(torch.nan), "holds NaN or infinity; fetch the weights again"),
        (lambda state: state[book].zero_(), "the codebook of level 1 is empty, its 32 vectors are all equal"),
    ):
        edit(tmp_path, lambda state, change=change: (state.update(good), change(state)))
        with pytest.raises(CheckpointError, match=message):
            codec.from_published(tmp_path)
        edit(tmp_path, lambda state: state.pop("more", None))


class Evil:
    """Writes a file when it is unpickled by what runs code."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.write_text, (self.target, "ran"))


def test_pickles_run_no_code(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    state = codec_files.as_package(codec_files.dac().state_dict())
    evil = {"state_dict": state, "metadata": {"kwargs": codec_files.DAC_PACKAGE, "more": Evil(mark)}}
    torch.save(evil, tmp_path / "a.pth")
    assert published.DAC.from_published(tmp_path / "a.pth").hop == 10
    torch.save({**evil, "state_dict": {**state, "more": Evil(mark)}}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="holds other things than tensors"):
        published.DAC.from_published(tmp_path / "b.pth")
    write("snac", tmp_path / "snac")
    torch.save({"a": Evil(mark)}, tmp_path / "snac" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds a; expected tensors by name"):
        published.SNAC.from_published(tmp_path / "snac")
    assert not mark.exists()


def test_files_that_are_not_of_descript_audio_codec(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    with pytest.raises(CheckpointError, match=r"no file at .*a\.pth; expected the published weights"):
        published.DAC.from_published(file)
    file.write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match="damaged or no archive"):
        published.DAC.from_published(file)
    torch.save({"state_dict": {}}, file)
    with pytest.raises(CheckpointError, match="has no state_dict and metadata"):
        published.DAC.from_published(file)
    state = codec_files.as_package(codec_files.dac().state_dict())
    for change, message in (
        ({"codebook_dim": [4, 4, 8]}, r"a\.pth cannot be used: .*codebook_dim: got \[4, 4, 8\]"),
        ({"encoder_rates": [2, 1]}, "got strides .* expected numbers from 2 up of one product"),
        ({"n_codebooks": 4}, r"do not fit the model \(missing: "),
    ):
        torch.save({"state_dict": state, "metadata": {"kwargs": {**codec_files.DAC_PACKAGE, **change}}}, file)
        with pytest.raises(CheckpointError, match=message):
            published.DAC.from_published(file)
    strange = {"encoder.block.x.weight": torch.ones(1)}
    torch.save({"state_dict": strange, "metadata": {"kwargs": codec_files.DAC_PACKAGE}}, file)
    with pytest.raises(CheckpointError, match="are not those of descript-audio-codec"):
        published.DAC.from_published(file)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mimi", {"use_causal_conv": False}, "a Mimi that looks back only"),
        ("mimi", {"num_quantizers": 1}, "expected more than the 1 of num_semantic_quantizers"),
        ("mimi", {"rope_parameters": {"rope_type": "yarn"}}, "expected the default type"),
        ("mimi", {"frame_rate": 50.0}, "has a frame_rate of 50.0, expected 25"),
        ("mimi", {"hidden_size": 15}, "cannot build Mimi: "),
        ("dac", {"codebook_size": 33}, "cannot build DAC: .*power of 2"),
        ("snac", {"vq_strides": [3, 2, 1]}, "expected each a multiple of the next"),
        ("snac", {"decoder_rates": [3, 3]}, "expected numbers from 2 up of one product"),
        ("snac", {"attn_window_size": 0}, "expected null or from 1 up"),
        (
            "xcodec",
            {"semantic_model_config": {"model_type": "bert"}},
            "got model_type 'bert', expected hubert or wavlm",
        ),
        ("xcodec", {"semantic_model_config": 3}, "semantic_model_config: got 3, expected an object"),
        ("xcodec", {"strides": [2, 1]}, r"are? \(10, 20, 10\)|is \(10, 20, 10\) samples, expected one number"),
    ],
)
def test_shapes_that_cannot_be(tmp_path: Path, name: str, changes: dict, message: str) -> None:
    write(name, tmp_path)
    put_settings(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        published.SYSTEMS[name].from_published(tmp_path)


def test_entries_that_could_name_code_are_left_out(tmp_path: Path) -> None:
    write("xcodec", tmp_path)
    fingerprint = published.XCodec.from_published(tmp_path).fingerprint
    parts = settings_of(tmp_path)["semantic_model_config"]
    more = {"auto_map": {"AutoModel": "evil.Evil"}, "_attn_implementation": "eager", "dtype": "float16"}
    put_settings(tmp_path, semantic_model_config={**parts, **more}, **more)
    codec = published.XCodec.from_published(tmp_path)
    assert codec.fingerprint == fingerprint
    assert not set(more) & set(codec.config.semantic_model_config)


def test_without_snac_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published.SNAC.from_published(write("snac", tmp_path)).save(tmp_path / "mine")
    monkeypatch.setitem(sys.modules, "snac", None)
    for load, path in ((published.SNAC.from_published, tmp_path), (mmtok.load, tmp_path / "mine")):
        with pytest.raises(CheckpointError, match=r"needs the package snac .*pip install 'mmtok\[published\]'"):
            load(path)


# --- the command


@pytest.mark.parametrize("name", NAMES)
def test_import_command(tmp_path: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    folder = write(name, tmp_path / "there")
    capsys.readouterr()
    code, stdout, _ = run("import", name, folder, "-o", tmp_path / "mine", "--json", capsys=capsys)
    assert code == 0
    codec = mmtok.load(tmp_path / "mine")
    assert json.loads(stdout) == {
        "system": name, "source": str(folder), "out": str(tmp_path / "mine"), "kind": f"audio-{name}", "codes": 32,
        "sample_rate": codec.sample_rate, "hop": codec.hop, "levels": len(codec.codebook_sizes),
        "parameters": sum(p.numel() for p in codec.parameters()), "fingerprint": codec.fingerprint,
    }  # fmt: skip
    before = contents(tmp_path / "mine")
    code, stdout, _ = run("import", name, folder, "-o", tmp_path / "mine", capsys=capsys)
    assert code == 0
    assert f"{len(codec.codebook_sizes)} levels of 32 codes" in stdout
    assert f"frames a second of {codec.sample_rate} Hz, {codec.bandwidth():.3g} kb/s" in stdout
    assert contents(tmp_path / "mine") == before


def test_an_imported_codec_in_the_other_commands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write("snac", tmp_path / "there")
    assert run("import", "snac", folder, "-o", tmp_path / "snac", capsys=capsys)[0] == 0
    layout = published.SNAC.from_published(folder).layout
    vocabulary = tmp_path / "vocabulary"
    create = ("vocab", "create", "text-4k", tmp_path / "snac", "-o", vocabulary, "--layout", f"snac={layout}")
    assert run(*create, capsys=capsys)[0] == 0
    media.write_audio(tmp_path / "a.wav", sound(1000)[0].numpy(), 1200)
    encode = ("encode", tmp_path / "a.wav", "--model", vocabulary, "-o", tmp_path / "ids.json")
    assert run(*encode, capsys=capsys)[0] == 0
    assert run("decode", tmp_path / "ids.json", "--model", vocabulary, "--out", tmp_path / "out", capsys=capsys)[0] == 0
    (made,) = (tmp_path / "out").glob("*.wav")
    assert media.read_audio(made, 1200).shape[-1] == 1008  # whole frames of 24


def test_import_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    line = refused("import", "lyra", tmp_path, "-o", out, capsys=capsys)
    assert "no published system 'lyra'; mmtok reads: taming, " in line
    assert line.rstrip().endswith("dac, mimi, snac, xcodec, tokenizers, tiktoken, sentencepiece")
    assert "config.json cannot be read" in refused("import", "mimi", tmp_path, "-o", out, capsys=capsys)
    assert not out.exists()

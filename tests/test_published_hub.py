"""Tokenizers of transformers and diffusers from directories that these wrote, against their own classes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from vqgan_files import close, image_tokens, noise, picture

import mmtok
from mmtok.errors import CheckpointError
from mmtok.image import published

TEXT = {
    "vocab_size": 200, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CHAMELEON = {
    "embed_dim": 4, "num_embeddings": 64, "latent_channels": 6, "resolution": 32, "base_channels": 32,
    "channel_multiplier": [1, 2], "num_res_blocks": 1,
}  # fmt: skip


# --- transformers


def emu3() -> transformers.Emu3VQVAE:
    torch.manual_seed(0)
    return transformers.Emu3VQVAE(
        transformers.Emu3VQVAEConfig(
            codebook_size=128,
            base_channels=32,
            channel_multiplier=[1, 1, 2],
            num_res_blocks=1,
            attn_resolutions=[2],
            hidden_size=64,
        )
    ).eval()


@torch.no_grad()
def test_emu3(tmp_path: Path) -> None:
    original = emu3()
    original.save_pretrained(tmp_path / "hf")
    got = published.load("transformers", tmp_path / "hf")
    assert isinstance(got, published.Emu3VQ)
    assert (got.downsample, got.codebook_sizes) == (4, (128,))
    x = noise(16, 24)
    expected = image_tokens(original.encode(x, torch.tensor([[16, 24]])))[0]
    codes = got.to_codes(x)
    assert torch.equal(codes[0, ..., 0], expected)
    assert len(expected.unique()) > 5
    close(got.to_pixels(codes), original.decode(expected[None]))
    got.save(tmp_path / "mine")
    again = mmtok.load(tmp_path / "mine")
    assert again.fingerprint == got.fingerprint
    y = picture(10, 7)
    assert torch.equal(again.encode(y), got.encode(y))
    assert again.decode(again.encode(y), (10, 7)).shape == y.shape


def test_emu3_inside_the_whole_model(tmp_path: Path) -> None:
    tokenizer = emu3()
    whole = transformers.Emu3ForConditionalGeneration(
        transformers.Emu3Config(
            vq_config=tokenizer.config.to_dict(),
            text_config=TEXT,
            vocabulary_map={"<image>": 1},
        )
    )
    whole.model.vqmodel.load_state_dict(tokenizer.state_dict())
    whole.save_pretrained(tmp_path / "whole", max_shard_size="300KB")
    assert (tmp_path / "whole" / "model.safetensors.index.json").is_file()
    tokenizer.save_pretrained(tmp_path / "alone")
    alone = published.import_transformers(tmp_path / "alone")
    assert published.import_transformers(tmp_path / "whole").fingerprint == alone.fingerprint
    processor = tmp_path / "whole" / "preprocessor_config.json"
    processor.write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}))
    assert published.import_transformers(tmp_path / "whole").fingerprint == alone.fingerprint
    processor.write_text(json.dumps({"image_mean": [0.48, 0.45, 0.4], "image_std": [0.5, 0.5, 0.5]}))
    with pytest.raises(CheckpointError, match=r"image_mean \[0.48, 0.45, 0.4\], expected \[0.5, 0.5, 0.5\]"):
        published.import_transformers(tmp_path / "whole")


@torch.no_grad()
def test_chameleon_of_transformers_can_only_encode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = transformers.ChameleonForConditionalGeneration(
        transformers.ChameleonConfig(vq_config=CHAMELEON, vocabulary_map={"<image>": 1, "IMGIMGAZ": 2}, **TEXT)
    )
    original = whole.model.vqmodel
    torch.nn.init.normal_(original.quantize.embedding.weight)
    for module in original.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    whole.save_pretrained(tmp_path / "whole")
    original.save_pretrained(tmp_path / "alone")
    got = published.load("transformers", tmp_path / "whole")
    assert got.fingerprint == published.load("transformers", tmp_path / "alone").fingerprint
    x = noise(16, 20)
    expected = image_tokens(original.encode(x))
    assert torch.equal(got.to_codes(x).flatten(), expected)
    assert len(expected.unique()) > 5
    got.save(tmp_path / "mine")
    again = mmtok.load(tmp_path / "mine")
    y = picture(9, 9)
    assert torch.equal(again.encode(y), got.encode(y))
    with pytest.raises(CheckpointError, match=r"can only encode.*vqgan\.ckpt"):
        again.decode(again.encode(y))


def test_directories_of_transformers_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON \(No such file"):
        published.import_transformers(tmp_path)
    config = tmp_path / "config.json"
    config.write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a list, expected a JSON object"):
        published.import_transformers(tmp_path)
    config.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="type 'llama', expected chameleon, emu3"):
        published.import_transformers(tmp_path)
    config.write_text(json.dumps({"model_type": "emu3_vqgan"}))
    with pytest.raises(CheckpointError, match=r"no weights at .*model\.safetensors"):
        published.import_transformers(tmp_path)
    emu3().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        published.import_transformers(tmp_path)
    weights.write_bytes(whole)
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "base_channels": "wide"}))
    with pytest.raises(CheckpointError, match=r"config\.json cannot be used: .*base_channels"):
        published.import_transformers(tmp_path)


# --- diffusers


def vqmodel(norm_type: str = "group") -> diffusers.VQModel:
    torch.manual_seed(0)
    model = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 64), latent_channels=4, num_vq_embeddings=64, norm_type=norm_type,
    )  # fmt: skip
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.3)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("norm_type", ["group", "spatial"])
def test_diffusers(tmp_path: Path, norm_type: str) -> None:
    original = vqmodel(norm_type)
    original.save_pretrained(tmp_path / "hf")
    got = published.load("diffusers", tmp_path / "hf")
    assert isinstance(got, published.VQModel)
    assert (got.downsample, got.codebook_sizes) == (2, (64,))
    x = noise(16, 12)
    codes = got.to_codes(x)
    z = original.encode(x).latents
    assert torch.equal(codes.flatten(), original.quantize(z)[2][2])
    assert len(codes.unique()) > 5
    close(got.to_pixels(codes), original.decode(z).sample)
    got.save(tmp_path / "mine")
    assert mmtok.load(tmp_path / "mine").fingerprint == got.fingerprint


@torch.no_grad()
def test_a_pipeline_tells_the_range_of_pixels(tmp_path: Path) -> None:
    original = vqmodel()
    original.save_pretrained(tmp_path / "vqvae", safe_serialization=False)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "LDMPipeline"}))
    plain = published.import_diffusers(tmp_path)
    index.write_text(json.dumps({"_class_name": "AmusedPipeline"}))
    unit = published.import_diffusers(tmp_path)
    assert unit.fingerprint != plain.fingerprint
    assert unit.fingerprint == published.import_diffusers(tmp_path / "vqvae").fingerprint
    assert plain.fingerprint == published.import_diffusers(tmp_path, unit_range=False).fingerprint
    x = noise(8, 8)
    z = original.encode((x + 1) / 2).latents
    codes = unit.to_codes(x)
    assert torch.equal(codes.flatten(), original.quantize(z)[2][2])
    close(unit.to_pixels(codes), original.decode(z).sample * 2 - 1)


def test_without_diffusers_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vqmodel().save_pretrained(tmp_path)
    published.import_diffusers(tmp_path).save(tmp_path / "mine")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for load, path in ((published.import_diffusers, tmp_path), (mmtok.load, tmp_path / "mine")):
        with pytest.raises(CheckpointError, match=r"pip install 'mmtok\[published\]'"):
            load(path)


def test_other_models_of_diffusers(tmp_path: Path) -> None:
    vqmodel().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "_class_name": "AutoencoderKL"}))
    with pytest.raises(CheckpointError, match="a 'AutoencoderKL' of diffusers, expected a 'VQModel'"):
        published.import_diffusers(tmp_path)
    config.write_text(json.dumps({**settings, "down_block_types": ["NoBlock", "NoBlock"]}))
    with pytest.raises(CheckpointError, match=r"cannot build the VQModel: .*NoBlock"):
        published.import_diffusers(tmp_path)
    config.write_text(json.dumps({**settings, "latent_channels": 5}))
    with pytest.raises(CheckpointError, match="do not fit"):
        published.import_diffusers(tmp_path)

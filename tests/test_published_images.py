"""Published image tokenizers: files in their own format with random weights, against independent implementations."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from vector_quantize_pytorch import FSQ
from vqgan_files import (
    CHANNELS,
    CosmosDecoder,
    CosmosEncoder,
    as_diffusers,
    close,
    cosmos,
    image_tokens,
    index_table,
    llamagen,
    noise,
    picture,
    taming,
    write,
)

import mmtok
from mmtok.errors import CheckpointError, ConfigError, MediaError, VocabularyError
from mmtok.image import published
from mmtok.image.published.quantize import Codebook, Scalars
from mmtok.image.published.vqgan import VQGANConfig, haar, unhaar

BLOCKS = 2


def twin(state: dict[str, Tensor], multipliers: tuple[int, ...], attention: tuple[int, ...]) -> diffusers.VQModel:
    """diffusers' own class with weights of taming or LlamaGen."""
    kinds = ["Attn" if i in attention else "" for i in range(len(multipliers))]
    model = diffusers.VQModel(
        down_block_types=[f"{kind}DownEncoderBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)],
        block_out_channels=[CHANNELS * m for m in multipliers],
        layers_per_block=BLOCKS,
        latent_channels=state["quant_conv.weight"].shape[1],
        num_vq_embeddings=state["quantize.embedding.weight"].shape[0],
        vq_embed_dim=state["quantize.embedding.weight"].shape[1],
    )
    model.load_state_dict(as_diffusers(state, len(multipliers)))
    return model.eval()


# --- taming and Chameleon


TAMING = taming()


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory: pytest.TempPathFactory) -> published.VQGAN:
    return published.import_taming(write(tmp_path_factory.mktemp("taming") / "last.ckpt", TAMING))


@torch.no_grad()
def test_taming_is_the_network_of_two_other_libraries(vqgan: published.VQGAN) -> None:
    other = twin(TAMING, (1, 2, 1), (2,))
    chameleon = transformers.ChameleonVQVAE(
        transformers.ChameleonVQVAEConfig(
            embed_dim=4,
            num_embeddings=64,
            latent_channels=6,
            resolution=64,
            base_channels=CHANNELS,
            channel_multiplier=[1, 2, 1],
            num_res_blocks=BLOCKS,
            attn_resolutions=[16],
        )
    )
    chameleon.load_state_dict({k: v for k, v in TAMING.items() if not k.startswith("decoder.")})
    for size in ((32, 32), (16, 40)):
        x = noise(*size)
        codes = vqgan.to_codes(x)
        assert codes.shape == (1, size[0] // 4, size[1] // 4, 1)
        assert len(codes.unique()) > 10, "the codebook is in use"
        z = other.encode(x).latents
        assert torch.equal(codes.flatten(), other.quantize(z)[2][2])
        assert torch.equal(codes.flatten(), image_tokens(chameleon.encode(x)))
        close(vqgan.to_pixels(codes), other.decode(z).sample)


def test_shape_is_read_off_the_weights(vqgan: published.VQGAN) -> None:
    assert vqgan.config == VQGANConfig(
        channels=32, multipliers=(1, 2, 1), blocks=2, attention=(2,), halvings=2, latent_channels=6,
        codebook_size=64, codebook_dim=4,
    )  # fmt: skip
    assert (vqgan.kind, vqgan.modality, vqgan.channels, vqgan.halo) == ("image-vqgan", "image", 3, None)
    assert (vqgan.downsample, vqgan.codebook_sizes, vqgan.properties) == (4, (64,), {"downsample": 4})
    assert not vqgan.training
    assert not any(p.requires_grad for p in vqgan.parameters())


def test_pictures_of_any_size(vqgan: published.VQGAN) -> None:
    for height, width in ((1, 1), (4, 4), (7, 18)):
        x = picture(height, width)
        codes = vqgan.encode(x)
        assert codes.shape == (1, -(-height // 4), -(-width // 4))
        assert vqgan.decode(codes, (height, width)).shape == x.shape
    rgba = picture(8, 8, 4)
    assert vqgan.encode([rgba[0], picture(5, 9)[0]])[1].shape == (2, 3)
    rgba[:, 3] = 255
    assert torch.equal(vqgan.encode(rgba), vqgan.encode(rgba[:, :3]))
    both = torch.cat([picture(8, 8), picture(8, 8).flip(3)])
    assert torch.equal(vqgan.encode(both)[1:], vqgan.encode(both[1:]))
    with pytest.raises(VocabularyError, match="expected 0 to 63"):
        vqgan.decode(torch.full((1, 1, 1), 64))
    with pytest.raises(MediaError, match="expected uint8"):
        vqgan.encode(noise(4, 4))


def test_every_wrapping_is_the_same_tokenizer(vqgan: published.VQGAN, tmp_path: Path) -> None:
    loss = {
        "loss.discriminator.main.0.weight": torch.ones(2),
        "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1),
    }
    torch.save(TAMING, tmp_path / "plain.pt")
    save_file(TAMING, tmp_path / "safe.safetensors")
    write(tmp_path / "loss.ckpt", {**TAMING, **loss})
    torch.save({"state_dict": {k: torch.nn.Parameter(v) for k, v in TAMING.items()}}, tmp_path / "parameters.ckpt")
    write(tmp_path / "vqgan.ckpt", TAMING)
    for file in tmp_path.iterdir():
        assert published.load("taming", file).fingerprint == vqgan.fingerprint, file
    assert published.load("chameleon", tmp_path).fingerprint == vqgan.fingerprint
    changed = {**TAMING, "quantize.embedding.weight": TAMING["quantize.embedding.weight"] + 1e-3}
    assert published.import_taming(write(tmp_path / "vqgan.ckpt", changed)).fingerprint != vqgan.fingerprint


def test_half_precision_is_widened(tmp_path: Path) -> None:
    half = {k: v.bfloat16() for k, v in TAMING.items()}
    got = published.import_taming(write(tmp_path / "h.ckpt", half))
    wide = published.import_taming(write(tmp_path / "w.ckpt", {k: v.float() for k, v in half.items()}))
    assert got.fingerprint == wide.fingerprint


def test_save_and_load(vqgan: published.VQGAN, tmp_path: Path) -> None:
    vqgan.save(tmp_path / "mine")
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["config.json", "mmtok.json", "model.safetensors"]
    again = mmtok.load(tmp_path / "mine")
    assert isinstance(again, published.VQGAN)
    assert (again.config, again.fingerprint) == (vqgan.config, vqgan.fingerprint)
    x = picture(9, 13)
    assert torch.equal(again.encode(x), vqgan.encode(x))
    assert torch.equal(again.decode(again.encode(x)), vqgan.decode(vqgan.encode(x)))
    meta = tmp_path / "mine" / "mmtok.json"
    meta.write_text(meta.read_text().replace('"image-vqgan"', '"image-emu3-vq"'))
    with pytest.raises(CheckpointError, match="holds a 'image-emu3-vq', expected a 'image-vqgan'"):
        published.VQGAN.load(tmp_path / "mine")


DDCONFIG = {
    "double_z": False, "z_channels": 6, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 2, 1], "num_res_blocks": 2, "attn_resolutions": [16], "dropout": 0.0,
}  # fmt: skip


def config_file(path: Path, params: dict, **ddconfig: object) -> Path:
    """A published model.yaml."""
    inner = {
        "embed_dim": 4,
        "n_embed": 64,
        "ddconfig": {**DDCONFIG, **ddconfig},
        "lossconfig": {"target": "x"},
        **params,
    }
    path.write_text(yaml.safe_dump({"model": {"target": "taming.models.vqgan.VQModel", "params": inner}}))
    return path


def test_a_published_yaml_is_checked(vqgan: published.VQGAN, tmp_path: Path) -> None:
    file = write(tmp_path / "vqgan.ckpt", TAMING)
    right = config_file(tmp_path / "right.yaml", {"monitor": "val/rec_loss"})
    assert published.import_taming(file, right).fingerprint == vqgan.fingerprint
    wrong = (
        ({"n_embed": 1024}, {}, "n_embed 1024, not 64"),
        ({"embed_dim": 256}, {"ch": 128}, "embed_dim 256, not 4; ch 128, not 32"),
        ({"remap": "used.npy"}, {}, "remap used.npy, not None"),
        ({}, {"ch_mult": [1, 1, 2]}, r"ch_mult \[1, 1, 2\], not \[1, 2, 1\]"),
        ({}, {"attn_resolutions": [32]}, r"attn_resolutions \[32\], not \[16\]"),
        ({}, {"tanh_out": True}, "tanh_out True, not False"),
        ({}, {"resamp_with_conv": False}, "resamp_with_conv False, not True"),
    )
    for params, ddconfig, message in wrong:
        with pytest.raises(CheckpointError, match=f"not the config of these weights.*{message}"):
            published.import_taming(file, config_file(tmp_path / "wrong.yaml", params, **ddconfig))
    config_file(tmp_path / "vqgan.yaml", {"n_embed": 8192})
    for system, path in (("taming", file), ("chameleon", tmp_path)):  # found beside the weights
        with pytest.raises(CheckpointError, match="n_embed 8192, not 64"):
            published.load(system, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "cannot be read as YAML"),
        ("a: 1", "no model.params.ddconfig"),
        ("- 1", "no model.params.ddconfig"),
        ("", "no model.params.ddconfig"),
        ("model: {params: {ddconfig: 3}}", "no model.params.ddconfig"),
        ("!!python/object/apply:os.system ['true']", "cannot be read as YAML"),
        (None, "No such file"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str | None, message: str) -> None:
    file = write(tmp_path / "a.ckpt", TAMING)
    if text is not None:
        (tmp_path / "b.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=message) as stop:
        published.import_taming(file, tmp_path / "b.yaml")
    assert "\n" not in str(stop.value)


# --- LlamaGen


@torch.no_grad()
@pytest.mark.parametrize(("multipliers", "attention"), [((1, 1, 2), (2,)), ((1, 2), (1,))])
def test_llamagen(tmp_path: Path, multipliers: tuple[int, ...], attention: tuple[int, ...]) -> None:
    state = llamagen(multipliers)
    got = published.load("llamagen", write(tmp_path / "vq.pt", state, "model"))
    assert got.config.normalized
    assert got.config.attention == attention
    assert got.downsample == 2 ** (len(multipliers) - 1)
    del state["quantize.codebook_used"]
    other = twin(state, multipliers, attention)
    x = noise(32, 24)
    z = other.encode(x).latents.permute(0, 2, 3, 1).reshape(-1, 8)
    unit = state["quantize.embedding.weight"] / state["quantize.embedding.weight"].norm(dim=1, keepdim=True)
    expected = (z / z.norm(dim=1, keepdim=True) @ unit.T).argmax(1)  # the least angle
    codes = got.to_codes(x)
    assert torch.equal(codes.flatten(), expected)
    assert len(expected.unique()) > 10
    vectors = unit[expected].reshape(*codes.shape[:3], 8).permute(0, 3, 1, 2)
    close(got.to_pixels(codes), other.decode(vectors, force_not_quantize=True).sample)


def test_lengths_do_not_count_on_the_sphere() -> None:
    book = Codebook(3, 2, True)
    book.embedding.weight.data = torch.tensor([[100.0, 0], [0, 0.01], [-1, -1]])
    assert book.encode(torch.tensor([[0.1, 0.2], [9.0, 1], [-5, -4]])).tolist() == [1, 0, 2]
    close(book.decode(torch.tensor([0, 1])), torch.eye(2))


# --- Cosmos


def write_cosmos(path: Path, halvings: int, levels: tuple[int, ...], shift: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Trace the two files; a picture, and what the files themselves make of it: indices and pixels."""
    state = cosmos(halvings, levels)
    encoder, decoder = (c(state, halvings, levels, shift).eval() for c in (CosmosEncoder, CosmosDecoder))
    x = noise(64, 48)
    with torch.no_grad():
        indices = encoder(x)[0]
        pixels = decoder(indices)
        torch.jit.save(torch.jit.trace(encoder, x, check_trace=False), path / "encoder.jit")
        torch.jit.save(torch.jit.trace(decoder, indices, check_trace=False), path / "decoder.jit")
    return x, indices, pixels


@torch.no_grad()
@pytest.mark.parametrize(("halvings", "levels"), [(1, (8, 8, 8, 5, 5, 5)), (2, (5, 3, 4))])
def test_cosmos(tmp_path: Path, halvings: int, levels: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x, indices, pixels = write_cosmos(tmp_path, halvings, levels)
    files = {p: p.read_bytes() for p in tmp_path.iterdir()}
    ran = {p.name: torch.jit.load(p) for p in files}
    assert torch.equal(ran["encoder.jit"](x)[0], indices)
    monkeypatch.setattr(torch.jit, "load", None)
    monkeypatch.setattr(torch, "load", None)
    got = published.load("cosmos", tmp_path)
    assert got.config.levels == levels
    assert (got.downsample, got.codebook_sizes) == (4 * 2**halvings, (math.prod(levels),))
    codes = got.to_codes(x)
    assert torch.equal(codes[..., 0], indices.long()), "published indices count from 0: nothing is subtracted"
    assert len(indices.unique()) > 8
    close(got.to_pixels(codes), pixels)
    monkeypatch.undo()
    got.save(tmp_path / "mine")
    again = mmtok.load(tmp_path / "mine")
    assert torch.equal(again.to_codes(x), codes)


def test_cosmos_counts_from_0() -> None:
    vectors = Scalars((8, 8, 8, 5, 5, 5)).decode(torch.arange(64_000))
    assert torch.equal(vectors, index_table((8, 8, 8, 5, 5, 5)))
    assert vectors[0].tolist() == [-1] * 6
    assert vectors[-1].tolist() == [0.75] * 3 + [1] * 3


def test_cosmos_files_that_count_otherwise_are_refused(tmp_path: Path) -> None:
    write_cosmos(tmp_path, 1, (5, 3, 4), shift=1)
    with pytest.raises(CheckpointError, match=r"implicit_codebook is not .*levels \(5, 3, 4\) counted from 0"):
        published.import_cosmos(tmp_path)


def test_cosmos_files_that_are_missing_or_swapped(tmp_path: Path) -> None:
    write_cosmos(tmp_path, 1, (5, 3, 4))
    encoder, decoder = tmp_path / "encoder.jit", tmp_path / "decoder.jit"
    whole = encoder.read_bytes()
    encoder.write_bytes(whole[:-400])
    with pytest.raises(CheckpointError, match=r"encoder\.jit is damaged or no archive"):
        published.import_cosmos(tmp_path)
    encoder.write_bytes(decoder.read_bytes())
    with pytest.raises(CheckpointError, match=r"no encoder\.conv_in\.weight"):
        published.import_cosmos(tmp_path)
    encoder.unlink()
    with pytest.raises(CheckpointError, match=r"no file at .*encoder\.jit"):
        published.import_cosmos(tmp_path)


@given(st.lists(st.integers(3, 9), min_size=1, max_size=5), st.randoms(use_true_random=False))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_scalars_are_reversible_and_the_librarys(levels: list[int], random: object) -> None:
    scalars, count = Scalars(levels), math.prod(levels)
    codes = torch.tensor(sorted({random.randrange(count) for _ in range(50)} | {0, count - 1}))  # type: ignore[attr-defined]
    vectors = scalars.decode(codes)
    assert vectors.min() >= -1
    assert vectors.max() <= 1
    z = torch.randn(40, len(levels), generator=torch.Generator().manual_seed(count)) * 2
    library = FSQ(levels)
    assert torch.equal(scalars.encode(z), library(z[None])[1][0].long())
    assert torch.equal(vectors, library.indices_to_codes(codes[None])[0])
    # Far out on every axis lies the outermost level, in the middle of a level that level.
    far = torch.tensor(list(itertools.product((-9.0, 9.0), repeat=len(levels))))
    assert torch.equal(scalars.decode(scalars.encode(far)) > 0, far > 0)
    assert scalars.encode(far).max() == count - 1


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
@settings(derandomize=True, deadline=None, max_examples=20)
def test_wavelets_are_reversible(patch: int, h: int, w: int, channels: int) -> None:
    x = torch.randn(1, channels, h * patch, w * patch, generator=torch.Generator().manual_seed(h * w))
    folded = haar(x, patch)
    assert folded.shape == (1, channels * patch**2, h, w)
    close(unhaar(folded, patch), x)
    close(folded[:, :channels], torch.nn.functional.avg_pool2d(x, patch))  # the first band is the mean


# --- config


@pytest.mark.parametrize(
    "values",
    [
        {"channels": 16}, {"multipliers": ()}, {"multipliers": (1, 0)}, {"attention": (5,)}, {"halvings": 5},
        {"patch": 3}, {"image_channels": 1}, {"blocks": 0}, {"levels": (8, 5)}, {"levels": (1,)},
        {"levels": (8, 5), "codebook_size": 40, "codebook_dim": 3},
    ],
)  # fmt: skip
def test_bad_config(values: dict) -> None:
    with pytest.raises(ConfigError, match="expected"):
        VQGANConfig(**values)


def test_unknown_system(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no published system 'vqgan'; mmtok reads: taming, chameleon"):
        published.load("vqgan", tmp_path)

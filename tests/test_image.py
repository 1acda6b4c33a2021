"""The image tokenizer: shapes, ranges, rows that do not depend on their batch, locality, save and load, errors."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmtok
from mmtok.checkpoints import tensors_to_bytes
from mmtok.errors import CheckpointError, ConfigError, MediaError, VocabularyError
from mmtok.image import ImageVQVAE, ImageVQVAEConfig, match_channels, premultiply, vqvae
from mmtok.image.vqvae import straighten
from mmtok.quantizers import KINDS

CONFIG = ImageVQVAEConfig(
    downsample=8, patch=4, channels=8, encoder_blocks=1, decoder_blocks=1, codebook_size=32, codebook_dim=4
)


def pictures(b: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Noise over smooth colours, so that codes differ within and between pictures."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (b, 3, -(-height // 8), -(-width // 8)), generator=g)
    noise = torch.randint(-20, 21, (b, 3, height, width), generator=g)
    smooth = coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, :height, :width]
    return (smooth + noise).clamp(0, 255).to(torch.uint8)


def build(config: ImageVQVAEConfig = CONFIG) -> ImageVQVAE:
    """A model with every weight away from its initial zero or one, and a codebook from a batch."""
    torch.manual_seed(0)
    model = ImageVQVAE(config, vectors_per_batch=256)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.train()
    for step in range(2):
        model(
            torch.cat([pictures(4, 64, 64, step + 2 * i) for i in range(2)], 1)[:, : model.channels].float() / 127.5 - 1
        )
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return build()


@settings(max_examples=25, deadline=None)
@given(b=st.integers(0, 3), h=st.integers(1, 6), w=st.integers(1, 6), seed=st.integers(0, 99))
def test_any_size_in_multiples_of_the_factor(model, b, h, w, seed):
    x = pictures(b, 8 * h, 8 * w, seed)
    codes = model.encode(x)
    assert (codes.shape, codes.dtype) == ((b, h, w), torch.int64)
    assert not codes.numel() or 0 <= int(codes.min()) <= int(codes.max()) < 32
    y = model.decode(codes)
    assert (y.shape, y.dtype) == (x.shape, torch.uint8)
    for i in range(b):
        assert torch.equal(model.encode(x[i : i + 1])[0], codes[i])
        assert torch.equal(model.decode(codes[i : i + 1])[0], y[i])


def test_the_codes_say_something(model):
    codes = model.encode(pictures(4, 64, 64, 9))
    assert codes.unique().numel() > 8
    assert len({tuple(x.tolist()) for x in codes.flatten(1)}) == 4


def test_encode_and_decode_are_those_of_the_training_pass(model):
    x = pictures(2, 32, 40, 3)
    with torch.no_grad():
        y, codes, _ = model(x.float() / 127.5 - 1)
    assert torch.equal(model.encode(x), codes[..., 0])
    expected = ((y + 1) * 127.5).clamp(0, 255)
    assert float((model.decode(codes[..., 0]).float() - expected).abs().max()) < 0.51


def test_encoding_does_not_depend_on_mode_or_memory_layout(model):
    x = pictures(2, 32, 32, 4)
    codes = model.encode(x)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert torch.equal(model.encode(x.contiguous(memory_format=torch.channels_last)), codes)
    model.train()
    assert torch.equal(model.encode(x), codes)
    model.eval()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_code_depends_on_its_neighbourhood_alone(model):
    x = pictures(1, 8, 240, 5).repeat(1, 1, 5, 1)
    far = x.clone()
    far[:, :, 16:24, 116:124] = 255 - far[:, :, 16:24, 116:124]
    a, b = model.encode(x), model.encode(far)
    changed = (a != b)[0].any(0).nonzero().flatten()
    assert len(changed)
    # 3x3 at stride 4, a block of two 3x3 at stride 4, and one at stride 8: 12 + 16 pixels to each side.
    assert int(changed.min()) >= (116 - 28) // 8
    assert int(changed.max()) <= (124 + 28) // 8
    y, z = model.decode(a), model.decode(b)
    left, right = (int(changed.min()) - model.decode_halo) * 8, (int(changed.max()) + 1 + model.decode_halo) * 8
    assert 16 <= left < right <= 224
    assert torch.equal(y[..., :left], z[..., :left])
    assert torch.equal(y[..., right:], z[..., right:])


@pytest.mark.parametrize(
    "shape", [{"downsample": 4, "patch": 4}, {"downsample": 16, "patch": 2}, {"downsample": 1, "patch": 1}]
)
def test_other_factors(shape):
    model = ImageVQVAE(ImageVQVAEConfig(**{**CONFIG.to_dict(), **shape})).eval()
    x = pictures(1, 32, 48)
    codes = model.encode(x)
    assert codes.shape == (1, 32 // shape["downsample"], 48 // shape["downsample"])
    assert model.decode(codes).shape == x.shape
    assert model.properties == {"downsample": shape["downsample"]}


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 3, 16, 16),
        torch.zeros(3, 16, 16, dtype=torch.uint8),
        torch.zeros(1, 1, 16, 16, dtype=torch.uint8),
        torch.zeros(1, 16, 16, 3, dtype=torch.uint8),
        torch.zeros(1, 3, 16, 16, dtype=torch.int64),
        torch.full((1, 3, 16, 16), torch.nan),
    ],
)
def test_wrong_pixels(model, x):
    with pytest.raises(MediaError, match=r"expected uint8 \[B, 3 or 4, H, W\]"):
        model.encode(x)


@pytest.mark.parametrize(("h", "w"), [(0, 8), (8, 0)])
def test_no_pixels(model, h, w):
    with pytest.raises(MediaError, match=rf"got a picture of {h}x{w} pixels, expected at least 1 a side"):
        model.encode(torch.zeros(1, 3, h, w, dtype=torch.uint8))


@settings(max_examples=40, deadline=None)
@given(h=st.integers(1, 40), w=st.integers(1, 40), seed=st.integers(0, 99))
def test_any_size_is_padded_by_its_edge_and_cropped_back(model, h, w, seed):
    x = pictures(1, h, w, seed)
    codes = model.encode(x)
    assert codes.shape == (1, *model.grid((h, w))) == (1, -(-h // 8), -(-w // 8))
    padded = x[..., [min(i, h - 1) for i in range(codes.shape[1] * 8)], :]
    padded = padded[..., [min(i, w - 1) for i in range(codes.shape[2] * 8)]]
    assert torch.equal(codes, model.encode(padded))
    whole, cropped = model.decode(codes), model.decode(codes, (h, w))
    assert whole.shape == padded.shape
    assert torch.equal(cropped, whole[..., :h, :w])
    assert cropped.is_contiguous()


@pytest.mark.parametrize("noise", [0.0, 5e-6, 0.02, 1.0])
def test_pictures_that_share_a_pass_have_the_codes_they_have_alone(model, monkeypatch, noise):
    """However many of them are in doubt and go through the network again."""
    monkeypatch.setattr(vqvae, "NOISE", noise)
    x = pictures(37, 40, 33, 12)
    alone = torch.cat([model.encode(row[None]) for row in x])
    again: list[int] = []
    inner = ImageVQVAE.to_codes
    monkeypatch.setattr(ImageVQVAE, "to_codes", lambda self, pixels: again.append(len(pixels)) or inner(self, pixels))
    assert torch.equal(model.encode(x), alone)
    assert torch.equal(torch.stack(model.encode(list(x))), alone)
    assert len(again) <= 2 if noise < 1e-4 else len(again) > 2, len(again)


def test_a_list_of_unequal_pictures_is_the_single_ones(model):
    sizes = [(64, 64), (9, 31), (1, 1), (40, 8)]
    several = [pictures(1, *size, i)[0] for i, size in enumerate(sizes)]
    codes = model.encode(several)
    for one, code in zip(several, codes, strict=True):
        assert torch.equal(model.encode(one[None])[0], code)
    back = model.decode(codes, sizes)
    assert [tuple(y.shape) for y in back] == [(3, *size) for size in sizes]
    for code, size, y in zip(codes, sizes, back, strict=True):
        assert torch.equal(model.decode(code[None], size)[0], y)
    assert [y.shape[1] % 8 for y in model.decode(codes)] == [0] * 4
    assert model.encode([]) == model.decode([]) == []


def test_wrong_lists_and_sizes(model):
    good = pictures(1, 9, 31)[0]
    with pytest.raises(MediaError, match=r"picture 1 is torch.uint8 \[9, 31\], expected uint8 \[3 or 4, H, W\]"):
        model.encode([good, good[0]])
    with pytest.raises(MediaError, match="picture 0 is ndarray, expected uint8"):
        model.encode([good.numpy()])
    codes = model.encode([good])
    with pytest.raises(MediaError, match="got 2 sizes for 1 pictures"):
        model.decode(codes, [(9, 31), (9, 31)])
    for size, got in (((17, 31), "17x31"), ((9, 24), "9x24"), ((9, 31, 1), "9x31x1")):
        with pytest.raises(MediaError, match=rf"got a size of {got} pixels for 2x4 codes, expected 9..16 by 25..32"):
            model.decode(codes[0][None], size)
    with pytest.raises(MediaError, match="got a tile of 0 pixels"):
        model.encode(good[None], tile=0)
    with pytest.raises(MediaError, match="got a tile of -8 pixels"):
        model.decode(codes, tile=-8)


def test_transparent_pictures_are_composited_on_the_stated_colour(model):
    r = torch.Generator().manual_seed(0)
    rgba = torch.randint(0, 256, (2, 4, 24, 40), generator=r, dtype=torch.uint8)
    for background in ((255, 255, 255), (0, 0, 0), (10, 200, 90)):
        share = rgba[:, 3:].double() / 255
        exact = rgba[:, :3] * share + torch.tensor(background)[:, None, None] * (1 - share)
        flat = match_channels(rgba, 3, background)
        assert float((flat - exact).abs().max()) <= 0.5 + 1e-9
        assert torch.equal(model.encode(rgba, background=background), model.encode(flat))
    assert not torch.equal(model.encode(rgba), model.encode(rgba, background=(0, 0, 0)))
    for bad in ((300, 0, 0), (0, -1, 0), (0, 0), (0.5, 0, 0), "red"):
        with pytest.raises(MediaError, match=r"got the background .*, expected three whole numbers in 0..255"):
            model.encode(rgba, background=bad)


def test_a_shape_that_cannot_be_is_refused():
    for name, value in (("encoder_blocks", -1), ("decoder_blocks", -1), ("channels", 0), ("patch", 3), ("patch", 16)):
        with pytest.raises(ConfigError, match=rf"ImageVQVAEConfig.{name}: got {value}, expected"):
            ImageVQVAEConfig(**{name: value})


def test_alpha_can_be_kept():
    model = build(ImageVQVAEConfig(**{**CONFIG.to_dict(), "alpha": True}))
    rgba = torch.cat([pictures(2, 20, 33), pictures(2, 20, 33, 1)[:, :1]], 1)
    codes = model.encode(rgba)
    assert model.decode(codes, (20, 33)).shape == rgba.shape
    opaque = rgba.clone()
    opaque[:, 3] = 255
    assert torch.equal(model.encode(rgba[:, :3]), model.encode(opaque)), "without alpha means opaque"
    hidden = rgba.clone()
    hidden[:, 3] = 0
    other = hidden.clone()
    other[:, :3] = 255 - other[:, :3]
    assert torch.equal(model.encode(hidden), model.encode(other)), "the colour of what cannot be seen says nothing"
    x = rgba.float() / 127.5 - 1
    seen = rgba[:, 3:].expand_as(rgba) > 0
    torch.testing.assert_close(straighten(premultiply(x))[seen], x[seen], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "shape", [{}, {"downsample": 4}, {"downsample": 16, "patch": 2}, {"encoder_blocks": 2, "decoder_blocks": 2}]
)
def test_tiles_are_the_whole(shape):
    model = build(ImageVQVAEConfig(**{**CONFIG.to_dict(), **shape}))
    x = pictures(1, 203, 310, 8)
    whole = model.encode(x, tile=None)
    assert whole.unique().numel() > 8
    for tile in (1, 50, 64, 250, 310):
        assert torch.equal(model.encode(x, tile=tile), whole)
    y = model.decode(whole, (203, 310), tile=None).int()
    for tile in (64, 90):
        assert int((model.decode(whole, (203, 310), tile=tile).int() - y).abs().max()) <= 1  # of two roundings


def test_the_halo_is_as_wide_as_the_network_sees_and_no_wider():
    """Constant weights make every kernel reach as far as it can: one code less on a side and the codes differ."""
    model = build(ImageVQVAEConfig(**{**CONFIG.to_dict(), "downsample": 4}))
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.copy_(0.05 + 0.02 * torch.rand_like(p))
    x = pictures(1, 256, 256, 2)
    with torch.no_grad():
        z = model.encoder(x.float() / 127.5 - 1)
        far = x.clone()
        far[:, :, :4, :4] = 255 - far[:, :, :4, :4]
        reach = (model.encoder(far.float() / 127.5 - 1) != z).any(1)[0].nonzero().max()
    assert int(reach) * 4 == model.halo


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantizer_in_the_model(kind, tmp_path):
    fsq = (4, 4, 4) if kind == "fsq" else ()
    model = build(ImageVQVAEConfig(**{**CONFIG.to_dict(), "quantizer": kind, "codebook_size": 64, "fsq_levels": fsq}))
    x = pictures(32, 24, 16, 1)
    codes = model.encode(x)
    assert codes.unique().numel() > 4
    assert all(torch.equal(model.encode(x[i : i + 1])[0], codes[i]) for i in range(32))
    model.save(tmp_path / kind)
    loaded = mmtok.load(tmp_path / kind)
    again = loaded.encode(x)
    assert torch.equal(loaded.decode(again), ImageVQVAE.load(tmp_path / kind).decode(again))
    assert loaded.fingerprint == model.fingerprint


def test_residual_levels():
    model = build(ImageVQVAEConfig(**{**CONFIG.to_dict(), "levels": 3}))
    x = pictures(2, 30, 50)
    codes = model.encode(x)
    assert codes.shape == (2, 4, 7, 3)
    assert model.codebook_sizes == (32, 32, 32)
    assert torch.equal(model.encode([x[0]])[0], codes[0])
    for k in (1, 2, 3):
        assert model.decode(codes[..., :k], (30, 50)).shape == x.shape
    with pytest.raises(VocabularyError, match="codes of 4 levels, expected 1 to 3"):
        model.decode(torch.zeros(1, 2, 2, 4, dtype=torch.int64))
    with pytest.raises(VocabularyError, match=r"expected int64 \[B, h, w, levels\]"):
        model.decode(codes[..., 0])


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        (torch.zeros(1, 2, 2), "expected int64"),
        (torch.zeros(2, 2, dtype=torch.int64), "expected int64"),
        (torch.full((1, 2, 2), 32), "expected 0 to 31"),
        (torch.full((1, 2, 2), -1), "expected 0 to 31"),
        (torch.zeros(1, 0, 2, dtype=torch.int64), "at least one code"),
        (torch.zeros(1, 2, 0, dtype=torch.int64), "at least one code"),
    ],
)
def test_wrong_codes(model, codes, said):
    with pytest.raises(VocabularyError, match=said):
        model.decode(codes)


# --- save and load


def test_saved_and_loaded_twice_is_one_tokenizer(model, tmp_path):
    model.save(tmp_path / "a")
    first, second = ImageVQVAE.load(tmp_path / "a"), mmtok.load(tmp_path / "a")
    assert isinstance(second, ImageVQVAE)
    assert not first.training
    assert first.config == model.config
    assert model.fingerprint == first.fingerprint == second.fingerprint
    x = pictures(2, 32, 32, 6)
    codes = first.encode(x)
    assert torch.equal(codes, second.encode(x))
    assert torch.equal(first.decode(codes), second.decode(codes))
    assert float((codes == model.encode(x)).float().mean()) > 0.9  # stored in float16
    first.save(tmp_path / "b")
    third = ImageVQVAE.load(tmp_path / "b")
    assert third.fingerprint == first.fingerprint
    assert torch.equal(third.encode(x), codes)
    names = ("config.json", "mmtok.json", "model.safetensors")
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    assert second.codebook_sizes == (32,)
    assert (second.kind, second.modality) == ("image-vqvae", "image")


def test_fingerprint_changes_with_any_weight_and_with_the_config(model, tmp_path):
    model.save(tmp_path / "a")
    base = model.fingerprint
    loaded = ImageVQVAE.load(tmp_path / "a")
    state = {k: v.clone() for k, v in loaded.state_dict().items()}
    seen = {base}
    for name, tensor in state.items():
        if name.endswith(("counts", "sums", "started")):
            continue
        changed = tensor.clone()
        changed.flatten()[0] += 0.5
        loaded.load_state_dict({**state, name: changed})
        assert loaded.fingerprint not in seen, name
        seen.add(loaded.fingerprint)
    loaded.load_state_dict(state)
    assert loaded.fingerprint == base
    loaded.quantizer.books[0].counts += 1  # only training reads it
    assert loaded.fingerprint == base
    plain = ImageVQVAEConfig(**{**CONFIG.to_dict(), "downsample": 4})
    torch.manual_seed(0)
    a = ImageVQVAE(plain).fingerprint
    torch.manual_seed(0)
    assert ImageVQVAE(plain).fingerprint == a


def test_training_forgets_the_fingerprint(model, tmp_path):
    model.save(tmp_path / "a")
    loaded = ImageVQVAE.load(tmp_path / "a").train()
    loaded(pictures(2, 32, 32).float() / 127.5 - 1)
    assert loaded.fingerprint != model.fingerprint
    assert loaded.eval().fingerprint != model.fingerprint


def test_a_loaded_codebook_can_be_trained_on(model, tmp_path):
    """The averages behind the codebook are not stored: they must start from the codebook, not from zero."""
    model.save(tmp_path / "a")
    loaded = ImageVQVAE.load(tmp_path / "a").train()
    before = loaded.quantizer.books[0].entries.clone()
    x = pictures(1, 32, 32, 11)
    loaded(x.float() / 127.5 - 1)
    after = loaded.quantizer.books[0].entries
    assert float((after - before).norm(dim=1).median()) < 0.1 * float(before.norm(dim=1).median())


def test_damaged_checkpoints(model, tmp_path):
    path = tmp_path / "a"
    model.save(path)
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-3] ^= 4
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged or was edited"):
        ImageVQVAE.load(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        mmtok.load(path)
    model.save(path)
    meta = json.loads((path / "mmtok.json").read_text())
    (path / "mmtok.json").write_text(json.dumps({**meta, "kind": "audio-spectral"}))
    with pytest.raises(CheckpointError, match="holds a 'audio-spectral', expected a 'image-vqvae'"):
        ImageVQVAE.load(path)
    (path / "mmtok.json").write_text(json.dumps({**meta, "kind": "transformer"}))
    with pytest.raises(CheckpointError, match=r"tokenizers are: text-bpe, .*image-vqvae"):
        mmtok.load(path)


def test_weights_that_do_not_fit_or_are_not_finite(model, tmp_path):
    from mmtok.checkpoints import save_checkpoint

    good = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    good = {k: v for k, v in good.items() if not k.endswith(("counts", "sums", "started"))}

    def save(state):
        save_checkpoint(tmp_path / "a", model.kind, CONFIG.to_json(), {"model.safetensors": state})

    save(tensors_to_bytes({k: v for k, v in good.items() if k != "quantizer.project_in.bias"}))
    with pytest.raises(CheckpointError, match=r"missing: quantizer\.project_in\.bias"):
        ImageVQVAE.load(tmp_path / "a")
    save(tensors_to_bytes({**good, "quantizer.project_in.bias": torch.full((4,), torch.inf)}))
    with pytest.raises(CheckpointError, match=r"project_in\.bias holds NaN or infinity"):
        ImageVQVAE.load(tmp_path / "a")
    save(b"no tensors")
    with pytest.raises(CheckpointError, match=r"no readable model\.safetensors"):
        ImageVQVAE.load(tmp_path / "a")
    save_checkpoint(tmp_path / "a", model.kind, CONFIG.to_json(), {"other": b""})
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no readable model\.safetensors"):
        ImageVQVAE.load(tmp_path / "a")

"""The image tokenizer: shapes, ranges, rows that do not depend on their batch, locality, save and load, errors."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmtok
from mmtok.checkpoints import tensors_to_bytes
from mmtok.errors import CheckpointError, MediaError, VocabularyError
from mmtok.image import ImageVQVAE, ImageVQVAEConfig

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
        model(pictures(4, 64, 64, step).float() / 127.5 - 1)
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
    assert torch.equal(model.encode(x), codes)
    expected = ((y + 1) * 127.5).clamp(0, 255)
    assert float((model.decode(codes).float() - expected).abs().max()) < 0.51


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
    x = pictures(1, 8, 160, 5).expand(1, 3, 8, 160).repeat(1, 1, 5, 1)
    far = x.clone()
    far[:, :, 16:24, 76:84] = 255 - far[:, :, 16:24, 76:84]
    a, b = model.encode(x), model.encode(far)
    changed = (a != b)[0].any(0).nonzero().flatten()
    assert len(changed)
    # 3x3 at stride 4, a block of two 3x3 at stride 4, and one at stride 8: 12 + 16 pixels to each side.
    assert int(changed.min()) >= (76 - 28) // 8
    assert int(changed.max()) <= (84 + 28) // 8
    y, z = model.decode(a), model.decode(b)
    assert torch.equal(y[..., :16], z[..., :16])
    assert torch.equal(y[..., -16:], z[..., -16:])


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
    with pytest.raises(MediaError, match=r"expected uint8 \[B, 3, H, W\]"):
        model.encode(x)


@pytest.mark.parametrize(("h", "w"), [(0, 8), (8, 0), (12, 16), (16, 12), (7, 8)])
def test_sizes_that_are_no_multiple(model, h, w):
    with pytest.raises(MediaError, match=rf"got an image of {h}x{w}, expected multiples of 8 pixels"):
        model.encode(torch.zeros(1, 3, h, w, dtype=torch.uint8))


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
        if name.endswith(("cluster_size", "embed_avg", "initted")):
            continue
        changed = tensor.clone()
        changed.flatten()[0] += 0.5
        loaded.load_state_dict({**state, name: changed})
        assert loaded.fingerprint not in seen, name
        seen.add(loaded.fingerprint)
    loaded.load_state_dict(state)
    assert loaded.fingerprint == base
    book = loaded.quantizer.levels[0]._codebook
    book.cluster_size += 1  # only training reads it
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
    before = loaded.quantizer.codebooks()[0].clone()
    x = pictures(1, 32, 32, 11)
    loaded(x.float() / 127.5 - 1)
    after = loaded.quantizer.codebooks()[0]
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
    with pytest.raises(CheckpointError, match="tokenizers are: text-bpe, image-vqvae"):
        mmtok.load(path)


def test_weights_that_do_not_fit_or_are_not_finite(model, tmp_path):
    from mmtok.checkpoints import save_checkpoint

    good = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    good = {k: v for k, v in good.items() if not k.endswith(("cluster_size", "embed_avg"))}

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

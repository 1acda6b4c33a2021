"""The spectral codec: any length, rows alone and in batches and lists, levels, what it refuses, save and load."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectral_models import CONFIG, HOP, LEVELS, SHAPES, SIZE, assert_same_codes, build, sounds, tiny
from torch.nn import functional as F

import mmtok
from mmtok.audio import SpectralCodec, SpectralCodecConfig
from mmtok.errors import CheckpointError, ConfigError, MediaError, VocabularyError

BOTH = ("plain", "causal")


# --- lengths


@pytest.mark.parametrize("name", BOTH)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(b=st.integers(0, 5), length=st.integers(0, 4000), seed=st.integers(0, 99))
def test_any_length(name, b, length, seed):
    model, x = tiny(name), sounds(b, length, seed)
    codes = model.encode(x)
    frames = -(-length // HOP)
    assert (codes.shape, codes.dtype) == ((b, LEVELS, frames), torch.int64)
    assert not codes.numel() or 0 <= int(codes.min()) <= int(codes.max()) < SIZE
    y = model.decode(codes)
    assert (y.shape, y.dtype) == ((b, 1, frames * HOP), torch.float32)
    assert not y.numel() or float(y.abs().max()) <= 1
    cut = model.decode(codes, length)
    assert cut.shape == x.shape
    assert torch.equal(cut, y[..., :length])
    for i in range(b):
        assert torch.equal(model.encode(x[i : i + 1])[0], codes[i])
        assert torch.equal(model.decode(codes[i : i + 1])[0], y[i])


@pytest.mark.parametrize("name", BOTH)
def test_lengths_around_all_that_has_a_width(name):
    model = tiny(name)
    edges = {n + k for n in (0, HOP, 2 * HOP, 128 - HOP, 128, 128 + HOP, 4000) for k in (-1, 0, 1)}
    longer = np.random.default_rng(0).integers(4000, 60_000, 8).tolist()
    for length in (*sorted(edges - {-1, 4001}), *longer):
        x = sounds(1, length, length)
        assert model.decode(model.encode(x), length).shape == x.shape


@pytest.mark.parametrize("name", BOTH)
def test_a_list_of_sounds_is_each_alone(name):
    model = tiny(name)
    listed = [sounds(1, n, n)[0] for n in (700, 0, 41, 2000, 40)]
    codes = model.encode(listed, 2)
    assert [c.shape for c in codes] == [(2, 18), (2, 0), (2, 2), (2, 50), (2, 1)]
    assert all(torch.equal(c, model.encode(x[None], 2)[0]) for c, x in zip(codes, listed, strict=True))
    back = model.decode(codes, [x.shape[-1] for x in listed])
    assert [y.shape for y in back] == [x.shape for x in listed]
    for y, c, x in zip(back, codes, listed, strict=True):
        assert torch.equal(y, model.decode(c[None], x.shape[-1])[0])
    assert [y.shape[-1] for y in model.decode(codes)] == [720, 0, 80, 2000, 40]
    assert model.encode([]) == []
    assert model.decode([]) == []


@pytest.mark.parametrize("rate", [16_000, 24_000])
@pytest.mark.parametrize("hop", [320, 480, 640, 960])
@pytest.mark.parametrize("causal", [False, True])
def test_rates_of_sounds_and_frames(rate, hop, causal):
    """The default windows serve 25 to 75 frames a second."""
    model = SpectralCodec(SpectralCodecConfig(rate, hop, dim=8, encoder_blocks=1, decoder_blocks=1, causal=causal))
    x = sounds(1, 5000)
    codes = model.eval().encode(x)
    assert codes.shape == (1, 8, -(-5000 // hop))
    assert model.decode(codes, 5000).shape == x.shape
    assert model.properties == {"sample_rate": rate, "hop": hop}
    assert model.bandwidth() == pytest.approx(8 * 10 * rate / hop / 1000)


# --- codes


@pytest.mark.parametrize("name", SHAPES)
def test_the_codes_say_something(name):
    model = tiny(name)
    codes = model.encode(sounds(3, 2000, 5))
    assert codes.shape == (3, len(model.codebook_sizes), 50)
    assert all(codes[:, level].unique().numel() > 2 for level in range(codes.shape[1]))
    assert len({tuple(x.tolist()) for x in codes.flatten(1)}) == 3
    y = model.decode(codes)
    assert float((y[0] - y[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", SHAPES)
def test_encode_and_decode_are_those_of_the_training_pass(name):
    model, x = tiny(name), sounds(2, 30 * HOP, 3)
    with torch.no_grad():
        y, codes, _ = model(x[:, 0])
    assert_same_codes(model, model.encode(x), codes.transpose(1, 2), x)
    torch.testing.assert_close(model.decode(codes.transpose(1, 2))[:, 0], y.clamp(-1, 1), rtol=1e-4, atol=1e-5)


def test_any_number_of_levels_is_a_prefix():
    model, x = tiny("plain"), sounds(2, 1000, 4)
    codes = model.encode(x)
    for levels in range(1, LEVELS + 1):
        assert torch.equal(model.encode(x, levels), codes[:, :levels])
        assert torch.equal(model.encode(x, bandwidth=levels * 0.8), codes[:, :levels])
        assert model.decode(codes[:, :levels]).shape == (2, 1, 1000)
        assert model.bandwidth(levels) == pytest.approx(levels * 4 * 200 / 1000)
    assert not torch.equal(model.decode(codes), model.decode(codes[:, :1]))
    assert model.bandwidth() == model.bandwidth(LEVELS)
    assert model.properties == {"sample_rate": 8000, "hop": HOP}
    assert model.codebook_sizes == (SIZE,) * LEVELS
    with pytest.raises(ConfigError, match=r"got bandwidth 1\.0, expected one of 0\.8, 1\.6, 2\.4 kb/s"):
        model.encode(x, bandwidth=1.0)
    with pytest.raises(ConfigError, match="expected one of the two"):
        model.encode(x, 1, bandwidth=0.8)


@pytest.mark.parametrize("name", BOTH)
def test_the_tail_is_silence(name):
    model, x = tiny(name), sounds(1, 10 * HOP - 7, 6)
    assert torch.equal(model.encode(x), model.encode(F.pad(x, (0, 7))))


def test_neither_mode_nor_autocast_changes_codes():
    model, x = build(CONFIG), sounds(2, 700, 7)
    codes = model.encode(x)
    y = model.decode(codes)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    assert torch.equal(model.encode(x), codes)
    model.eval()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.encode(x), codes)
        assert torch.equal(model.decode(codes), y)


def test_near_ties_are_those_of_the_quantized_vectors():
    model, x = tiny("plain"), sounds(2, 1990, 1)
    none, some, every = (model.near_ties(x, within) for within in (0.0, 0.1, 1e9))
    assert some.shape == (2, LEVELS, 50)
    assert not none.any()
    assert 0 < int(some.sum()) < some.numel()
    assert every.all()
    # The twin, at the first level: distances to all entries.
    with torch.no_grad():
        z = model.quantizer.project_in(model.latent(F.pad(x, (0, 10))[:, 0]))
        two = torch.cdist(z.double(), model.quantizer.books[0].entries.double()).square().sort(-1)[0][..., :2]
    assert torch.equal(some[:, 0], two[..., 1] <= 1.1 * two[..., 0])
    assert model.near_ties(x[..., :0], 0.1).shape == (2, LEVELS, 0)
    assert tiny("cosine").near_ties(x, 0.1).shape == (2, 1, 50)
    assert tiny("fsq").near_ties(x, 0.1) is None


# --- what is refused


@pytest.mark.parametrize("length", [360, 361, 400])
def test_length_of_decode(length):
    model = tiny("plain")
    codes = model.encode(sounds(1, 400))
    if length > 360:
        assert model.decode(codes, length).shape == (1, 1, length)
    else:
        with pytest.raises(VocabularyError, match=r"got length 360, but 10 frames hold 361 to 400"):
            model.decode(codes, length)


@pytest.mark.parametrize("length", [-1, 1, 401, 400.0])
def test_impossible_lengths(length):
    frames = 0 if length in (-1, 1) else 10
    with pytest.raises(VocabularyError, match=rf"got length {length!r}, but {frames} frames hold"):
        tiny("plain").decode(torch.zeros(1, LEVELS, frames, dtype=torch.int64), length)


@pytest.mark.parametrize("length", [-1, 400.0, "400", True])
def test_impossible_lengths_of_streams(length):
    with pytest.raises(VocabularyError, match=rf"got length {length!r}, expected a number of samples"):
        tiny("plain").stream_decoder(length)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.zeros(1, 1, 100, dtype=torch.float64), "expected float32"),
        (torch.zeros(1, 1, 100, dtype=torch.int16), "expected float32"),
        (torch.zeros(1, 100), r"expected float32 \[B, 1, T\]"),
        (torch.zeros(1, 2, 100), "mix to mono first"),
        (torch.full((1, 1, 100), torch.nan), "NaN or infinity"),
        (torch.full((1, 1, 100), -torch.inf), "NaN or infinity"),
    ],
)
def test_wrong_samples(x, said):
    for call in (tiny("plain").encode, lambda x: tiny("plain").near_ties(x, 0.1), tiny("plain").stream_encoder().push):
        with pytest.raises(MediaError, match=said):
            call(x)


@pytest.mark.parametrize("levels", [0, -1, LEVELS + 1, True, 2.0, "2"])
def test_impossible_levels(levels):
    for call in (
        lambda n: tiny("plain").encode(sounds(1, 100), n),
        tiny("plain").stream_encoder,
        tiny("plain").bandwidth,
    ):
        with pytest.raises(ConfigError, match=rf"got {levels!r} levels, expected 1 to {LEVELS}, an int"):
            call(levels)


@pytest.mark.parametrize("bandwidth", [True, "1.6", 0, float("nan"), 1.61])
def test_impossible_bandwidths(bandwidth):
    with pytest.raises(ConfigError, match=rf"got bandwidth {bandwidth!r}, expected one of"):
        tiny("plain").encode(sounds(1, 100), bandwidth=bandwidth)


def test_what_is_no_tensor_and_no_list():
    model, x = tiny("plain"), sounds(1, 100)[0]
    codes = model.encode([x])
    for wrong in (None, 5, (part for part in [x])):
        with pytest.raises(MediaError, match=r"expected float32 \[B, 1, T\] or a list of \[1, T\]"):
            model.encode(wrong)
    for wrong in (None, 5, (part for part in codes)):
        with pytest.raises(VocabularyError, match=r"expected int64 \[B, levels, F\] or a list of \[levels, F\]"):
            model.decode(wrong)


def test_a_model_can_be_trained_on_codes_and_sounds():
    model, x = tiny("plain"), sounds(1, 1000).requires_grad_()
    stream = model.stream_encoder()
    codes = [model.encode(x), torch.cat([stream.push(x), stream.finish()], -1)]
    table = torch.nn.Embedding(SIZE, 2)
    for made in codes:
        table(made).sum().backward()
        made.zero_()  # in place
    layer = torch.nn.Conv1d(1, 2, 3)
    layer(model.decode(codes[0])).sum().backward()
    assert all(p.grad is not None for p in (*table.parameters(), *layer.parameters()))
    assert x.grad is None


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        (torch.zeros(1, LEVELS, 5), "expected int64"),
        (torch.zeros(LEVELS, 5, dtype=torch.int64), "expected int64"),
        (torch.full((1, LEVELS, 5), SIZE), f"expected 0 to {SIZE - 1}"),
        (torch.full((1, LEVELS, 5), -1), f"expected 0 to {SIZE - 1}"),
        (torch.zeros(1, LEVELS + 1, 5, dtype=torch.int64), f"expected 1 to {LEVELS}"),
        (torch.zeros(1, LEVELS + 1, 0, dtype=torch.int64), f"expected 1 to {LEVELS}"),
        (torch.zeros(1, 0, 5, dtype=torch.int64), f"expected 1 to {LEVELS}"),
    ],
)
def test_wrong_codes(codes, said):
    for call in (tiny("plain").decode, tiny("plain").stream_decoder().push):
        with pytest.raises(VocabularyError, match=said):
            call(codes)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("window=39", "got window 39 and hop 40"),
        ("window=41", "exceeds it by an even number"),
        ("window=0", r"SpectralCodecConfig\.window: got 0, expected at least 1"),
        ("shorts=3", "a number that divides the hop"),
        ("shorts=-1", r"SpectralCodecConfig\.shorts: got -1, expected at least 0"),
        ("short_window=8", r"windows of at least hop / shorts"),
        ("short_window=33", "by an even number"),
        ("short_window=130", "at most 128"),
        ("dim=0", r"SpectralCodecConfig\.dim: got 0, expected at least 1"),
        ("stored_bits=4", "expected 8 or 16"),
        ("hops=4", "did you mean 'hop'"),
        ("causal=1", r"SpectralCodecConfig\.causal: got 1 of type int, expected bool"),
    ],
)
def test_impossible_shapes(wrong, said):
    with pytest.raises(ConfigError, match=said):
        CONFIG.replace([wrong])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["quantizer=none"], "got quantizer 'none', expected one of"),
        (["quantizer=fsq", "fsq_levels=[4,4]"], "got 3 residual levels of 'fsq'"),
        (["quantizer=fsq", "levels=1"], "fsq_levels"),
        (["quantizer=lfq", "levels=1", "codebook_size=12"], "power of two"),
    ],
)
def test_impossible_quantizers(wrong, said):
    with pytest.raises(ConfigError, match=said):
        SpectralCodec(CONFIG.replace(wrong))


# --- save and load


@pytest.mark.parametrize("name", SHAPES)
def test_saved_and_loaded_twice_is_one_tokenizer(name, tmp_path):
    model = tiny(name)
    model.save(tmp_path / "a")
    first, second = SpectralCodec.load(tmp_path / "a"), mmtok.load(tmp_path / "a")
    assert isinstance(second, SpectralCodec)
    assert not first.training
    assert first.config == model.config
    assert model.fingerprint == first.fingerprint == second.fingerprint
    x = sounds(2, 1500, 6)
    codes = first.encode(x)
    assert torch.equal(codes, second.encode(x))
    assert torch.equal(first.decode(codes), second.decode(codes))
    assert float((codes == model.encode(x)).float().mean()) > 0.8  # stored in float16
    first.save(tmp_path / "b")
    names = ("config.json", "mmtok.json", "model.safetensors")
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


def test_fingerprint_changes_with_any_weight(tmp_path):
    tiny("plain").save(tmp_path / "a")
    loaded = SpectralCodec.load(tmp_path / "a")
    base = loaded.fingerprint
    state = {k: v.clone() for k, v in loaded.state_dict().items()}
    seen = {base}
    for name, tensor in state.items():
        if name.endswith(("counts", "sums", "started")):
            continue
        changed = tensor.clone()
        changed.flatten()[-1] += 0.5
        loaded.load_state_dict({**state, name: changed})
        assert loaded.fingerprint not in seen, name
        seen.add(loaded.fingerprint)
    loaded.load_state_dict(state)
    assert loaded.fingerprint == base
    assert SpectralCodec(dataclasses.replace(CONFIG, causal=True)).train(False).fingerprint not in seen


def test_golden_fingerprint():
    """What the ids of a vocabulary are tied to must not drift with versions of mmtok or its dependencies."""
    config = SpectralCodecConfig(
        sample_rate=8000, hop=2, window=4, mels=1, short_window=4, shorts=1, short_mels=1, dim=1, encoder_blocks=1,
        decoder_blocks=1, levels=1, codebook_size=2, codebook_dim=1,
    )  # fmt: skip
    model = SpectralCodec(config).eval()
    with torch.no_grad():
        for i, tensor in enumerate(model.state_dict().values()):
            tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) / 8 + i)
    assert model.fingerprint == "5b23a1dfa05c8785dad705e9cf79eecc1091e0a49c294d2aeacbb81fcf143e45"


def test_damaged_and_foreign_checkpoints(tmp_path):
    path = tmp_path / "a"
    tiny("plain").save(path)
    data = bytearray((path / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged or was edited"):
        SpectralCodec.load(path)
    tiny("plain").save(path)
    with pytest.raises(CheckpointError, match="holds a 'audio-spectral', expected a 'image-vqvae'"):
        mmtok.image.ImageVQVAE.load(path)

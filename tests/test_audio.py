"""The spectral codec: any length, rows alone and in batches, locality, and independent twins of its two transforms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import mmtok
from mmtok.audio import SpectralCodec, SpectralCodecConfig
from mmtok.audio.codec import ISTFTHead
from mmtok.errors import CheckpointError, ConfigError, MediaError, VocabularyError

HOP, LEVELS, SIZE = 40, 3, 16
CONFIG = SpectralCodecConfig(
    sample_rate=8000, hop=HOP, window=128, mels=20, dim=16, encoder_blocks=1, decoder_blocks=1, levels=LEVELS,
    codebook_size=SIZE, codebook_dim=6,
)  # fmt: skip


def sounds(b: int, length: int, seed: int = 0) -> torch.Tensor:
    """Chirps of several loudnesses with noise: float32 [B, 1, T] in -1..1."""
    g = torch.Generator().manual_seed(seed)
    t = torch.arange(length) / 8000
    pitch, loud = 100 + 2000 * torch.rand(b, 1, generator=g), 0.05 + 0.5 * torch.rand(b, 1, generator=g)
    x = loud * torch.sin(2 * torch.pi * pitch * (t + 3 * t**2)) + 0.02 * torch.randn(b, length, generator=g)
    return x.clamp(-1, 1)[:, None]


def build(config: SpectralCodecConfig = CONFIG) -> SpectralCodec:
    torch.manual_seed(0)
    model = SpectralCodec(config, vectors_per_batch=200)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.train()
    for step in range(2):
        model(sounds(4, 50 * config.hop, step)[:, 0])
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return build()


@settings(max_examples=25, deadline=None)
@given(b=st.integers(0, 3), length=st.integers(0, 2000), seed=st.integers(0, 99))
def test_any_length(model, b, length, seed):
    x = sounds(b, length, seed)
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


def test_the_codes_say_something(model):
    codes = model.encode(sounds(3, 2000, 5))
    assert all(codes[:, level].unique().numel() > 4 for level in range(LEVELS))
    assert len({tuple(x.tolist()) for x in codes.flatten(1)}) == 3


def test_encode_and_decode_are_those_of_the_training_pass(model):
    x = sounds(2, 30 * HOP, 3)
    with torch.no_grad():
        y, codes, _ = model(x[:, 0])
    assert torch.equal(model.encode(x), codes.transpose(1, 2))
    torch.testing.assert_close(model.decode(model.encode(x))[:, 0], y.clamp(-1, 1), rtol=1e-4, atol=1e-5)


def test_any_number_of_levels_is_a_prefix(model):
    x = sounds(2, 1000, 4)
    codes = model.encode(x)
    for levels in range(1, LEVELS + 1):
        assert torch.equal(model.encode(x, levels), codes[:, :levels])
        assert model.decode(codes[:, :levels]).shape == (2, 1, 1000)
        assert model.bandwidth(levels) == pytest.approx(levels * 4 * 200 / 1000)
    assert model.bandwidth() == model.bandwidth(LEVELS)
    assert model.properties == {"sample_rate": 8000, "hop": HOP}
    assert model.codebook_sizes == (SIZE,) * LEVELS
    assert SpectralCodec(SpectralCodecConfig(dim=8, encoder_blocks=1, decoder_blocks=1)).bandwidth() == 4.0


def test_the_tail_is_silence(model):
    x = sounds(1, 10 * HOP - 7, 6)
    assert torch.equal(model.encode(x), model.encode(F.pad(x, (0, 7))))


def test_encoding_does_not_depend_on_the_mode(model):
    x = sounds(2, 700, 7)
    codes = model.encode(x)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    assert torch.equal(model.encode(x), codes)
    model.eval()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_code_depends_on_its_neighbourhood_alone(model):
    x = sounds(1, 100 * HOP, 8)
    other = x.clone()
    other[..., 50 * HOP : 51 * HOP] = sounds(1, HOP, 9)[..., :HOP].flip(-1)
    a, b = model.encode(x), model.encode(other)
    changed = (a != b)[0].any(0).nonzero().flatten()
    assert len(changed)
    reach = 2 + 3 + 3  # frames: the window, the first convolution, one block
    assert 50 - reach <= int(changed.min()) <= int(changed.max()) <= 50 + reach
    y, z = model.decode(a), model.decode(b)
    reach += 3 + 3 + 2
    assert torch.equal(y[..., : (50 - reach) * HOP], z[..., : (50 - reach) * HOP])
    assert torch.equal(y[..., (51 + reach) * HOP :], z[..., (51 + reach) * HOP :])


@pytest.mark.parametrize("length", [360, 361, 400])
def test_length_of_decode(model, length):
    codes = model.encode(sounds(1, 400))
    if length > 360:
        assert model.decode(codes, length).shape == (1, 1, length)
    else:
        with pytest.raises(VocabularyError, match=r"got length 360, but 10 frames hold 361 to 400"):
            model.decode(codes, length)


@pytest.mark.parametrize("length", [-1, 1, 401])
def test_impossible_lengths(model, length):
    frames = 0 if length < 2 else 10
    with pytest.raises(VocabularyError, match=rf"got length {length}, but {frames} frames hold"):
        model.decode(torch.zeros(1, LEVELS, frames, dtype=torch.int64), length)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.zeros(1, 1, 100, dtype=torch.float64), "expected float32"),
        (torch.zeros(1, 1, 100, dtype=torch.int16), "expected float32"),
        (torch.zeros(1, 100), r"expected float32 \[B, 1, T\]"),
        (torch.zeros(1, 2, 100), "mix to mono first"),
        (torch.full((1, 1, 100), torch.nan), "NaN or infinity"),
        (torch.full((1, 1, 100), torch.inf), "NaN or infinity"),
    ],
)
def test_wrong_samples(model, x, said):
    with pytest.raises(MediaError, match=said):
        model.encode(x)


@pytest.mark.parametrize("levels", [0, -1, LEVELS + 1])
def test_impossible_levels(model, levels):
    with pytest.raises(MediaError, match=rf"got {levels} levels, expected 1 to {LEVELS}"):
        model.encode(sounds(1, 100), levels)


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
def test_wrong_codes(model, codes, said):
    with pytest.raises(VocabularyError, match=said):
        model.decode(codes)


def test_impossible_windows():
    for window in (39, 41, 0):
        with pytest.raises(ConfigError, match="window"):
            SpectralCodecConfig(**{**CONFIG.to_dict(), "window": window})


# --- independent twins


@pytest.mark.parametrize(("window", "hop"), [(128, 40), (64, 16), (1024, 320)])
def test_istft_head_against_plain_overlap_add(window, hop):
    torch.manual_seed(1)
    head = ISTFTHead(8, window, hop)
    x = torch.randn(2, 9, 8)
    got = head(x).detach().numpy()
    assert got.shape == (2, 9 * hop)
    spectra = head.project(x).detach().double().numpy()
    bins = window // 2 + 1
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    for row in range(2):
        total, weight = np.zeros(8 * hop + window), np.zeros(8 * hop + window)
        for f in range(9):
            spectrum = np.exp(spectra[row, f, :bins]) * np.exp(1j * spectra[row, f, bins:])
            total[f * hop : f * hop + window] += np.fft.irfft(spectrum, window) * hann
            weight[f * hop : f * hop + window] += hann**2
        edge = (window - hop) // 2
        inside = slice(edge, edge + 9 * hop)
        np.testing.assert_allclose(got[row], total[inside] / weight[inside], rtol=1e-4, atol=1e-6)


def test_istft_head_against_torch_istft():
    torch.manual_seed(1)
    window, hop = 128, 32
    head = ISTFTHead(8, window, hop)
    x = torch.randn(1, 12, 8)
    with torch.no_grad():
        magnitude, phase = head.project(x).split(head.bins, -1)
        spectrum = torch.polar(magnitude.exp(), phase).transpose(1, 2)
        theirs = torch.istft(spectrum, window, hop, window=torch.hann_window(window), center=True)
        ours = head(x)
    skip = window // 2 - (window - hop) // 2  # torch cuts half a window, the head half of what exceeds a hop
    torch.testing.assert_close(ours[:, skip : skip + theirs.shape[1]], theirs, rtol=1e-4, atol=1e-6)


def test_istft_head_inverts_an_stft():
    """Magnitude and phase of a real sound's frames give back the sound: the head loses nothing."""
    window, hop = 128, 40
    head = ISTFTHead(4, window, hop)
    x = sounds(1, 20 * hop, 2)[:, 0]
    edge = (window - hop) // 2
    frames = F.pad(x, (edge, edge)).unfold(-1, window, hop) * torch.hann_window(window)
    spectrum = torch.fft.rfft(frames)
    parts = torch.cat([spectrum.abs().clamp(min=1e-9).log(), spectrum.angle()], -1)

    class Fixed(torch.nn.Module):
        def forward(self, _):
            return parts

    head.project = Fixed()
    torch.testing.assert_close(head(torch.zeros(1, 20, 4)), x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("rate", "window", "hop", "mels"), [(8000, 128, 40, 20), (16000, 1024, 320, 100)])
def test_front_end_against_torchaudio(rate, window, hop, mels):
    shape = {"sample_rate": rate, "window": window, "hop": hop, "mels": mels}
    model = SpectralCodec(SpectralCodecConfig(**{**CONFIG.to_dict(), **shape}))
    seen = []
    model.embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = sounds(2, 12 * hop, 1)[:, 0]
    with torch.no_grad():
        model._analyse(x)
    reference = torchaudio.transforms.MelSpectrogram(
        rate, n_fft=window, hop_length=hop, n_mels=mels, pad=(window - hop) // 2, center=False, power=1.0, norm="slaney"
    )
    expected = (reference(x).clamp(min=1e-5).log() + 5) / 3
    assert seen[0].shape == (2, mels, 12)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)


# --- save and load


def test_saved_and_loaded_twice_is_one_tokenizer(model, tmp_path):
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
    assert torch.equal(SpectralCodec.load(tmp_path / "b").encode(x), codes)
    names = ("config.json", "mmtok.json", "model.safetensors")
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


def test_fingerprint_changes_with_any_weight(model, tmp_path):
    model.save(tmp_path / "a")
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


def test_golden_fingerprint():
    """What the ids of a vocabulary are tied to must not drift with versions of mmtok or its dependencies."""
    config = SpectralCodecConfig(
        sample_rate=8000, hop=2, window=4, mels=1, dim=1, encoder_blocks=1, decoder_blocks=1, levels=1, codebook_size=2,
        codebook_dim=1,
    )  # fmt: skip
    model = SpectralCodec(config).eval()
    with torch.no_grad():
        for i, tensor in enumerate(model.state_dict().values()):
            tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) / 8 + i)
    assert model.fingerprint == "6ee17c01ef3faf06d966171407d5447b8f37a701ca0b66febf3da2f953a6e040"


def test_damaged_and_foreign_checkpoints(model, tmp_path):
    path = tmp_path / "a"
    model.save(path)
    data = bytearray((path / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged or was edited"):
        SpectralCodec.load(path)
    model.save(path)
    with pytest.raises(CheckpointError, match="holds a 'audio-spectral', expected a 'image-vqvae'"):
        mmtok.image.ImageVQVAE.load(path)

"""The EnCodec adapter against the package's own model, with random weights and filled codebooks. No network."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import transformers
from encodec.model import EncodecModel
from encodec_models import noise, package_model, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mmtok.audio.encodec import Encodec, EncodecCodes, EncodecConfig, weights
from mmtok.errors import CheckpointError, ConfigError, MediaError, VocabularyError


def forbid(*args: object, **kwargs: object) -> None:
    raise URLError("no network in tests")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "download_url_to_file", forbid)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", forbid)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def package24() -> EncodecModel:
    return package_model(24_000)


@pytest.fixture(scope="module")
def package48() -> EncodecModel:
    return package_model(48_000)


@pytest.fixture(scope="module")
def mono() -> Encodec:
    return tokenizer(24_000)


@pytest.fixture(scope="module")
def stereo() -> Encodec:
    return tokenizer(48_000)


# --- 24 kHz


@pytest.mark.parametrize("bandwidth", [1.5, 3.0, 6.0, 24.0])
def test_mono_is_the_package(mono: Encodec, package24: EncodecModel, bandwidth: float) -> None:
    x = noise(1, 1, 6000)
    package24.set_target_bandwidth(bandwidth)
    with torch.no_grad():
        ((expected, scale),) = package24.encode(x)
        sound = package24.decode([(expected, scale)])
    got = mono.encode(x, bandwidth=bandwidth)
    assert got.dtype == torch.int64
    assert torch.equal(got, expected)
    assert expected.unique().numel() > 10, "the codebooks are alive"
    torch.testing.assert_close(mono.decode(got), sound, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [*range(1, 21), 319, 320, 321, 639, 640, 641, 1919, 1921, 2239, 2240, 2241, 4000])
def test_mono_of_every_length_is_the_package(mono: Encodec, package24: EncodecModel, length: int) -> None:
    x = noise(1, 1, length, seed=length)
    package24.set_target_bandwidth(1.5)
    with torch.no_grad():
        ((expected, scale),) = package24.encode(x)
        sound = package24.decode([(expected, scale)])[..., :length]
    assert torch.equal(mono.encode(x, levels=2), expected)
    torch.testing.assert_close(mono.decode(expected, length), sound, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(batch=st.integers(1, 5), length=st.integers(0, 4000), levels=st.integers(1, 32), seed=st.integers(0, 99))
def test_mono_any_length(batch: int, length: int, levels: int, seed: int) -> None:
    codec = tokenizer(24_000)
    codes = codec.encode(noise(batch, 1, length, seed), levels)
    assert codes.shape == (batch, levels, -(-length // 320))
    assert codec.decode(codes, length).shape == (batch, 1, length)
    assert codec.decode(codes).shape == (batch, 1, codes.shape[-1] * 320)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(batch=st.integers(1, 5), length=st.integers(0, 4000), levels=st.integers(1, 16))
def test_stereo_any_length(batch: int, length: int, levels: int) -> None:
    codec = tokenizer(48_000)
    coded = codec.encode_with_scale(noise(batch, 2, length), levels)
    assert coded.codes.shape == (batch, levels, -(-length // 320))
    assert coded.scales.shape == (batch, 1 if length else 0)
    assert codec.decode_with_scale(coded).shape == (batch, 2, length)


def test_long_sounds_go_through_in_pieces_without_a_seam(mono: Encodec, package24: EncodecModel) -> None:
    x = noise(1, 1, 2 * 48_000 + 777)
    with torch.no_grad():
        latents = package24.encoder(x)[0].T
        pieces: dict = {}
        ours = torch.cat([mono.network.latents(part.T.contiguous(), pieces) for part in x[0].split(48_000, 1)])
        torch.testing.assert_close(ours, latents, rtol=1e-4, atol=1e-6)
        package24.set_target_bandwidth(6.0)
        frames = package24.encode(x)
        sound = package24.decode(frames)
    torch.testing.assert_close(mono.decode(frames[0][0]), sound, rtol=1e-4, atol=1e-6)
    differ = (mono.encode(x) != frames[0][0]).any(1)
    assert differ.float().mean() < 0.02, "near ties alone"


def test_rows_do_not_depend_on_the_batch(mono: Encodec) -> None:
    x = noise(3, 1, 3000)
    together = mono.encode(x)
    for i in range(3):
        assert torch.equal(mono.encode(x[i : i + 1])[0], together[i])
    sounds = [x[0, :, :100], x[1], x[2, :, :0], x[2, :, :2241]]
    codes = mono.encode(sounds, bandwidth=3.0)
    for sound, row in zip(sounds, codes, strict=True):
        assert torch.equal(mono.encode(sound[None], bandwidth=3.0)[0], row)
    lengths = [sound.shape[1] for sound in sounds]
    for sound, row, y in zip(sounds, codes, mono.decode(codes, lengths), strict=True):
        assert torch.equal(mono.decode(row[None], sound.shape[1])[0], y)
    assert mono.encode(x[:0]).shape == (0, 8, 10)
    assert mono.decode(mono.encode(x[:0])).shape == (0, 1, 3200)


def test_bandwidth_is_no_state(mono: Encodec) -> None:
    x = noise(1, 1, 2000)
    before = mono.encode(x)
    wide = mono.encode(x, bandwidth=24.0)
    assert wide.shape[1] == 32
    assert torch.equal(wide[:, :8], before)
    assert torch.equal(mono.encode(x), before)
    assert torch.equal(mono.encode(x, 5), before[:, :5])
    assert torch.equal(mono.decode(wide[:, :3]), mono.decode(mono.encode(x, 3)))


def test_attributes(mono: Encodec, stereo: Encodec) -> None:
    assert (mono.kind, mono.modality) == ("encodec", "audio")
    assert mono.codebook_sizes == (1024,) * 8
    assert stereo.codebook_sizes == (1024,) * 4
    assert (mono.bandwidth(), mono.bandwidth(32), stereo.bandwidth(), stereo.bandwidth(16)) == (6.0, 24.0, 6.0, 24.0)
    assert mono.properties == {"sample_rate": 24_000, "hop": 320}
    assert mono.fingerprint != stereo.fingerprint
    assert not any("weight_g" in name for name, _ in mono.named_parameters()), "weight norm is folded in"
    assert not mono.training
    assert not any(p.requires_grad for p in mono.parameters())


# --- 48 kHz


@pytest.mark.parametrize("length", [1, 320, 40_000, 47_520, 47_521, 48_000, 60_000])
def test_stereo_is_the_package(stereo: Encodec, package48: EncodecModel, length: int) -> None:
    x = noise(1, 2, length) * torch.linspace(0.1, 2, length)
    package48.set_target_bandwidth(6.0)
    with torch.no_grad():
        frames = package48.encode(x)
    got = stereo.encode_with_scale(x)
    assert torch.equal(got.codes, torch.cat([c for c, _ in frames], dim=-1))
    assert torch.equal(got.scales, torch.cat([s for _, s in frames], dim=-1))
    assert got.length == length
    sound = stereo.decode_with_scale(got)
    assert sound.shape == x.shape
    with torch.no_grad():
        expected = package48.decode(frames)[..., :length]
    torch.testing.assert_close(sound, expected.clamp(-1, 1), rtol=1e-4, atol=1e-5)


def test_stereo_lengths_on_which_the_package_fails(stereo: Encodec, package48: EncodecModel) -> None:
    x = noise(1, 2, 47_520 + 300)
    got = stereo.encode_with_scale(x)
    assert stereo.decode_with_scale(got).shape == x.shape
    with torch.no_grad(), pytest.raises(RuntimeError):
        package48.decode(package48.encode(x))


def test_stereo_empty_and_batch(stereo: Encodec) -> None:
    empty = stereo.encode_with_scale(noise(2, 2, 0))
    assert empty.codes.shape == (2, 4, 0)
    assert empty.scales.shape == (2, 0)
    assert stereo.decode_with_scale(empty).shape == (2, 2, 0)
    x = noise(2, 2, 2000)
    x[1] *= 5
    both, second = stereo.encode_with_scale(x), stereo.encode_with_scale(x[1:])
    assert torch.equal(both.codes[1:], second.codes)
    assert torch.equal(both.scales[1:], second.scales)


def test_stereo_of_unequal_lengths(stereo: Encodec) -> None:
    x = noise(3, 2, 47_600)
    sounds = [x[0, :, :700], x[1], x[2, :, :0]]
    coded = stereo.encode_with_scale(sounds, bandwidth=3.0)
    for sound, row, y in zip(sounds, coded, stereo.decode_with_scale(coded), strict=True):
        alone = stereo.encode_with_scale(sound[None], levels=2)
        assert torch.equal(alone.codes[0], row.codes)
        assert torch.equal(alone.scales[0], row.scales)
        assert row.length == sound.shape[1]
        assert torch.equal(stereo.decode_with_scale(alone)[0], y)
        assert y.shape == sound.shape
    with pytest.raises(MediaError, match="sound 1"):
        stereo.encode_with_scale([sounds[0], x[1, :1]])


def test_mono_with_scale_carries_the_length(mono: Encodec) -> None:
    x = noise(2, 1, 1000)
    coded = mono.encode_with_scale(x)
    assert (coded.scales.shape, coded.length) == ((2, 0), 1000)
    assert torch.equal(mono.decode_with_scale(coded), mono.decode(mono.encode(x), 1000))
    with pytest.raises(MediaError, match="expected 5 frames"):
        mono.decode_with_scale(EncodecCodes(coded.codes, coded.scales, 1400))


def test_stereo_needs_its_scale(stereo: Encodec) -> None:
    with pytest.raises(MediaError, match="use encode_with_scale"):
        stereo.encode(noise(1, 2, 100))
    with pytest.raises(MediaError, match="use decode_with_scale"):
        stereo.decode(torch.zeros(1, 4, 3, dtype=torch.int64))
    coded = stereo.encode_with_scale(noise(1, 2, 1000))
    for stream in (stereo.stream_encoder, stereo.stream_decoder):
        with pytest.raises(MediaError, match=f"use {stream.__name__}_with_scale"):
            stream()
    for wrong in (
        EncodecCodes(coded.codes, coded.scales[:, :0], 1000),
        EncodecCodes(coded.codes, coded.scales, 5000),
        EncodecCodes(coded.codes[..., 1:], coded.scales, 1000),
    ):
        with pytest.raises(MediaError, match="expected"):
            stereo.decode_with_scale(wrong)


# --- bad input


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 2, 10),
        torch.zeros(1, 10),
        torch.zeros(1, 1, 10, dtype=torch.float64),
        torch.zeros(1, 1, 10, dtype=torch.int16),
        torch.full((1, 1, 10), float("nan")),
        torch.full((1, 1, 10), float("inf")),
    ],
)
def test_bad_audio(mono: Encodec, x: torch.Tensor) -> None:
    with pytest.raises(MediaError, match="expected"):
        mono.encode(x)


def test_bad_codes(mono: Encodec) -> None:
    codes = torch.zeros(1, 8, 3, dtype=torch.int64)
    codes[0, 2, 1] = 1024
    with pytest.raises(VocabularyError, match="row 0, level 2, frame 1: got code 1024"):
        mono.decode(codes)
    for wrong in (-torch.ones_like(codes), codes.int(), codes[0], codes.repeat(1, 5, 1), codes[:, :0]):
        with pytest.raises(VocabularyError, match="expected"):
            mono.decode(wrong)
    for length in (-1, 0, 640, 961):
        with pytest.raises(VocabularyError, match="got length"):
            mono.decode(codes.clamp(max=5), length if length != 640 else 639)


@pytest.mark.parametrize(("rate", "bandwidth"), [(16_000, 6.0), (24_000, 5.0), (48_000, 1.5), (24_000, 0.0)])
def test_bad_config(rate: int, bandwidth: float) -> None:
    with pytest.raises(ConfigError, match="expected"):
        EncodecConfig(rate, bandwidth)


def test_bad_bandwidth_of_a_call(mono: Encodec) -> None:
    with pytest.raises(ConfigError, match=r"got bandwidth 7\.0"):
        mono.encode(noise(1, 1, 100), bandwidth=7.0)
    with pytest.raises(ConfigError, match="got 33 levels, expected 1 to 32"):
        mono.encode(noise(1, 1, 100), 33)


# --- weights


def test_save_and_load(mono: Encodec, tmp_path: Path) -> None:
    mono.save(tmp_path / "codec")
    assert sorted(p.name for p in (tmp_path / "codec").iterdir()) == ["config.json", "mmtok.json", "model.safetensors"]
    other = Encodec.load(tmp_path / "codec")
    assert other.fingerprint == mono.fingerprint
    assert other.config == mono.config
    x = noise(1, 1, 3000)
    assert torch.equal(other.encode(x), mono.encode(x))
    assert torch.equal(other.decode(mono.encode(x)), mono.decode(mono.encode(x)))
    meta = tmp_path / "codec" / "mmtok.json"
    meta.write_text(meta.read_text().replace('"encodec"', '"text-bpe"'))
    with pytest.raises(CheckpointError, match="holds a 'text-bpe', expected a 'encodec'"):
        Encodec.load(tmp_path / "codec")


def test_weights_that_cannot_be_used(package24: EncodecModel, package48: EncodecModel) -> None:
    config = EncodecConfig()
    with pytest.raises(CheckpointError, match="do not fit"):
        Encodec(config, package48.state_dict())
    with pytest.raises(CheckpointError, match="missing"):
        Encodec(config, {})
    with pytest.raises(CheckpointError, match=r"wrong shape: encoder\.model\.0\.conv\.conv\.bias"):
        Encodec(config, {**package24.state_dict(), "encoder.model.0.conv.conv.bias": torch.zeros(3)})
    state = dict(package24.state_dict())
    key = "quantizer.vq.layers.3._codebook.embed"
    with pytest.raises(CheckpointError, match=r"layers\.3\..* is empty"):
        Encodec(config, {**state, key: torch.zeros_like(state[key])})
    with pytest.raises(CheckpointError, match=r"layers\.3\..* NaN"):
        Encodec(config, {**state, key: torch.full_like(state[key], float("nan"))})


def test_without_weights_the_error_says_which_file_goes_where(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"encodec_24khz-d7cc33bc\.th .* cannot be downloaded .* put the file there"
    ):
        Encodec.pretrained(24_000)
    with pytest.raises(CheckpointError, match=r"hub/checkpoints/encodec_48khz-7e698e3e\.th"):
        Encodec.pretrained(48_000)
    with pytest.raises(CheckpointError, match=r"no EnCodec weights at .*encodec_24khz-d7cc33bc\.th"):
        Encodec.pretrained(24_000, weights=tmp_path)
    with pytest.raises(CheckpointError, match=r"no EnCodec weights at .*nothing\.th"):
        Encodec.pretrained(24_000, weights=tmp_path / "nothing.th")
    (tmp_path / "other.th").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="begins with d7cc33bc; fetch"):
        Encodec.pretrained(24_000, weights=tmp_path / "other.th")


def test_local_file_directory_and_hub(
    package24: EncodecModel, mono: Encodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(package24.state_dict(), tmp_path / "w.th")
    digest = hashlib.sha256((tmp_path / "w.th").read_bytes()).hexdigest()
    name = f"encodec_24khz-{digest[:8]}.th"
    monkeypatch.setitem(weights.WEIGHTS, 24_000, name)
    hub = tmp_path / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (tmp_path / "w.th").rename(hub / name)
    for place in (None, hub, hub / name, str(hub)):
        assert Encodec.pretrained(24_000, 6.0, place).fingerprint == mono.fingerprint


def test_a_pickle_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "hacked").touch, ())

    torch.save({"a": Evil()}, tmp_path / "w.th")
    digest = hashlib.sha256((tmp_path / "w.th").read_bytes()).hexdigest()
    monkeypatch.setitem(weights.WEIGHTS, 24_000, f"encodec_24khz-{digest[:8]}.th")
    with pytest.raises(CheckpointError, match="cannot be read as tensors"):
        Encodec.pretrained(24_000, weights=tmp_path / "w.th")
    assert not (tmp_path / "hacked").exists()


# --- transformers


def save_transformers(codec: Encodec, path: Path, old_names: bool) -> None:
    """The same weights as transformers saves them, its model the proof that they are in the right places."""
    settings = {
        "sampling_rate": 48_000,
        "audio_channels": 2,
        "normalize": True,
        "norm_type": "time_group_norm",
        "use_causal_conv": False,
        "chunk_length_s": 1.0,
        "overlap": 0.01,
        "target_bandwidths": [3.0, 6.0, 12.0, 24.0],
    }
    stereo = codec.sample_rate == 48_000
    model = transformers.EncodecModel(transformers.EncodecConfig(**settings if stereo else {})).eval()
    ours = package_model(codec.sample_rate)
    with torch.no_grad():
        for place, value in zip(model.parameters(), ours.parameters(), strict=True):
            assert place.shape == value.shape
            place.copy_(value)
        for theirs, own in zip(model.quantizer.layers, ours.quantizer.vq.layers, strict=True):
            theirs.codebook.embed.copy_(own.codebook)
    x = noise(1, codec.channels, 3000)
    with torch.no_grad():
        found = model.encode(x, bandwidth=6.0).audio_codes[0]
    assert torch.equal(found, codec.encode_with_scale(x).codes)
    model.save_pretrained(path)
    if old_names:
        state = load_file(path / "model.safetensors")
        for place, name in enumerate(("weight_g", "weight_v")):
            state = {k.replace(f"parametrizations.weight.original{place}", name): v for k, v in state.items()}
        save_file(state, path / "model.safetensors")


@pytest.mark.parametrize(("rate", "old_names"), [(24_000, False), (24_000, True), (48_000, False)])
def test_a_directory_of_transformers(rate: int, old_names: bool, tmp_path: Path) -> None:
    codec = tokenizer(rate)
    save_transformers(codec, tmp_path, old_names)
    assert any("weight_g" in k for k in load_file(tmp_path / "model.safetensors")) == old_names
    other = Encodec.pretrained(rate, 6.0, tmp_path)
    assert other.fingerprint == codec.fingerprint
    x = noise(1, codec.channels, 2500)
    assert torch.equal(other.encode_with_scale(x).codes, codec.encode_with_scale(x).codes)
    with pytest.raises(CheckpointError, match="sampling_rate"):
        Encodec.pretrained(72_000 - rate, 6.0, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "upsampling_ratios": [8, 5, 4, 4]}))
    with pytest.raises(CheckpointError, match=r"upsampling_ratios \[8, 5, 4, 4\], expected \[8, 5, 4, 2\]"):
        Encodec.pretrained(rate, 6.0, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "model_type": "dac"}))
    with pytest.raises(CheckpointError, match="'dac', expected 'encodec'"):
        Encodec.pretrained(rate, 6.0, tmp_path)

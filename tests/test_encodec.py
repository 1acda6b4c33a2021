"""The EnCodec adapter against the package's own model, with random weights and filled codebooks. No network."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from encodec.model import EncodecModel

from mmtok.audio import encodec
from mmtok.audio.encodec import Encodec, EncodecCodes, EncodecConfig
from mmtok.errors import CheckpointError, ConfigError, MediaError, VocabularyError


def package_model(sample_rate: int) -> EncodecModel:
    """The package's model with random weights and codebooks that have something in them."""
    torch.manual_seed(sample_rate)
    make = EncodecModel.encodec_model_24khz if sample_rate == 24_000 else EncodecModel.encodec_model_48khz
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = make(pretrained=False)
    with torch.no_grad():
        frames = model.encoder(torch.randn(1, model.channels, 48_000) * 0.1)[0].T
        spread = frames.std(dim=0).mean()
        for n, layer in enumerate(model.quantizer.vq.layers):
            centres = frames[torch.randint(len(frames), (1024,))] if n == 0 else 0
            layer._codebook.embed.copy_(centres + torch.randn(1024, 128) * spread * 0.3 * 0.9**n)
    return model


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
def mono(package24: EncodecModel) -> Encodec:
    return Encodec(EncodecConfig(24_000, 6.0), package24.state_dict())


@pytest.fixture(scope="module")
def stereo(package48: EncodecModel) -> Encodec:
    return Encodec(EncodecConfig(48_000, 6.0), package48.state_dict())


def noise(batch: int, channels: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, channels, length, generator=torch.Generator().manual_seed(seed)) * 0.1


# --- 24 kHz


@pytest.mark.parametrize("bandwidth", [1.5, 3.0, 6.0, 24.0])
def test_mono_is_the_package(mono: Encodec, package24: EncodecModel, bandwidth: float) -> None:
    x = noise(1, 1, 6000)
    package24.set_target_bandwidth(bandwidth)
    with torch.no_grad():
        ((expected, scale),) = package24.encode(x)
        sound = package24.decode([(expected, scale)])
    got = mono.encode(x, bandwidth)
    assert got.dtype == torch.int64
    assert torch.equal(got, expected)
    assert expected.unique().numel() > 10, "the codebooks are alive"
    torch.testing.assert_close(mono.decode(got), sound, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [0, 1, 2, 319, 320, 321, 1000, 4799])
def test_mono_any_length(mono: Encodec, length: int) -> None:
    codes = mono.encode(noise(2, 1, length))
    assert codes.shape == (2, 8, -(-length // 320))
    assert mono.decode(codes, length).shape == (2, 1, length)
    assert mono.decode(codes).shape == (2, 1, codes.shape[-1] * 320)


def test_rows_do_not_depend_on_the_batch(mono: Encodec) -> None:
    x = noise(3, 1, 3000)
    together = mono.encode(x)
    for i in range(3):
        assert torch.equal(mono.encode(x[i : i + 1])[0], together[i])
    assert mono.encode(x[:0]).shape == (0, 8, 10)
    assert mono.decode(mono.encode(x[:0])).shape == (0, 1, 3200)


def test_bandwidth_is_no_state(mono: Encodec) -> None:
    x = noise(1, 1, 2000)
    before = mono.encode(x)
    wide = mono.encode(x, 24.0)
    assert wide.shape[1] == 32
    assert torch.equal(wide[:, :8], before)
    assert torch.equal(mono.encode(x), before)


def test_attributes(mono: Encodec, stereo: Encodec) -> None:
    assert (mono.kind, mono.modality) == ("encodec", "audio")
    assert mono.codebook_sizes == (1024,) * 8
    assert stereo.codebook_sizes == (1024,) * 4
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
    torch.testing.assert_close(sound, expected, rtol=1e-4, atol=1e-5)


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


def test_stereo_needs_its_scale(stereo: Encodec) -> None:
    with pytest.raises(MediaError, match="use encode_with_scale"):
        stereo.encode(noise(1, 2, 100))
    with pytest.raises(MediaError, match="use decode_with_scale"):
        stereo.decode(torch.zeros(1, 4, 3, dtype=torch.int64))
    coded = stereo.encode_with_scale(noise(1, 2, 1000))
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
        with pytest.raises(MediaError, match="got length"):
            mono.decode(codes.clamp(max=5), length if length != 640 else 639)


@pytest.mark.parametrize(("rate", "bandwidth"), [(16_000, 6.0), (24_000, 5.0), (48_000, 1.5), (24_000, 0.0)])
def test_bad_config(rate: int, bandwidth: float) -> None:
    with pytest.raises(ConfigError, match="expected"):
        EncodecConfig(rate, bandwidth)


def test_bad_bandwidth_of_a_call(mono: Encodec) -> None:
    with pytest.raises(ConfigError, match=r"got bandwidth 7\.0"):
        mono.encode(noise(1, 1, 100), 7.0)


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
    monkeypatch.setitem(encodec.WEIGHTS, 24_000, name)
    hub = tmp_path / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (tmp_path / "w.th").rename(hub / name)
    for weights in (None, hub, hub / name, str(hub)):
        assert Encodec.pretrained(24_000, 6.0, weights).fingerprint == mono.fingerprint


def test_a_pickle_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "hacked").touch, ())

    torch.save({"a": Evil()}, tmp_path / "w.th")
    digest = hashlib.sha256((tmp_path / "w.th").read_bytes()).hexdigest()
    monkeypatch.setitem(encodec.WEIGHTS, 24_000, f"encodec_24khz-{digest[:8]}.th")
    with pytest.raises(CheckpointError, match="cannot be read as tensors"):
        Encodec.pretrained(24_000, weights=tmp_path / "w.th")
    assert not (tmp_path / "hacked").exists()

"""DAC, Mimi, SNAC and X-Codec out of published files, against the classes that they were published with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import codec_files
import pytest
import torch
import transformers
from codec_files import sound
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmtok
from mmtok import Audio, Document, MultimodalTokenizer, Text, VocabularyRegistry
from mmtok.audio import published
from mmtok.audio.published.mimi import PIECE
from mmtok.errors import ConfigError, MediaError, VocabularyError
from mmtok.evaluation.roundtrip import roundtrip_audio
from mmtok.multimodal import spec_of

NAMES = ("dac", "mimi", "snac", "xcodec")
ONE_RATE = ("dac", "mimi", "xcodec")


@pytest.fixture(scope="module")
def originals() -> dict[str, Any]:
    return {name: getattr(codec_files, name)() for name in NAMES}


@pytest.fixture(scope="module")
def codecs(originals: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, published.PublishedCodec]:
    made = {}
    for name, network in originals.items():
        folder = tmp_path_factory.mktemp(name)
        codec_files.write(network, folder, codec_files.SNAC if name == "snac" else None)
        made[name] = published.SYSTEMS[name].from_published(folder)
    return made


def parts(codes: Any) -> list[Tensor]:
    """Tensors of either kind of codes."""
    return [codes] if isinstance(codes, Tensor) else list(codes)


def equal(a: Any, b: Any) -> bool:
    return len(parts(a)) == len(parts(b)) and all(torch.equal(x, y) for x, y in zip(parts(a), parts(b), strict=True))


def padded(x: Tensor, hop: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % hop))


def close(a: Tensor, b: Tensor) -> None:
    """Equal within 1e-5 of the loudest sample."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


# --- against the original classes


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 9, 10, 31, 200, 333])
@pytest.mark.parametrize("name", ONE_RATE)
def test_codes_and_samples_are_those_of_transformers(originals: dict, codecs: dict, name: str, length: int) -> None:
    original, codec = originals[name], codecs[name]
    x = sound(length)
    codes = codec.encode(x)
    expected = original.encode(padded(x, codec.hop)).audio_codes
    assert torch.equal(codes, expected)
    assert codes.shape == (1, len(codec.codebook_sizes), math.ceil(length / codec.hop))
    whole = original.decode(audio_codes=expected).audio_values.view(1, 1, -1)
    there = min(length, whole.shape[-1])  # DAC's own decoder may stop a little earlier
    assert length - there < codec.hop
    y = codec.to_samples(codes)
    close(y[..., :there], whole[..., :there])
    assert torch.equal(codec.decode(codes, length), y[..., :length].clamp(-1, 1))
    assert length < 300 or (len(codes[:, 0].unique()) > 5 and y.std() > 0.01)


@torch.no_grad()
@pytest.mark.parametrize("shape", [codec_files.SNAC, codec_files.SNAC_WINDOWS], ids=["plain", "windows"])
@pytest.mark.parametrize("length", [1, 24, 200, 333])
def test_snac_is_that_of_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: dict, length: int) -> None:
    original = codec_files.snac(shape)
    codec = published.SNAC.from_published(codec_files.write(original, tmp_path, shape))
    x = sound(length)
    codes, expected = codec.encode(x), original.encode(x)
    assert equal(codes, tuple(expected))
    draws = iter(range(9))  # one for each block

    def same(size: tuple[int, ...], **options: Any) -> Tensor:
        return random(size, generator=torch.Generator().manual_seed(next(draws)))

    random = torch.randn
    with monkeypatch.context() as patched:
        patched.setattr(torch, "randn", same)
        whole = original.decode(expected)
    assert next(draws) == 2
    close(codec.decode(codes, length), whole[..., :length])
    assert length < 300 or all(len(c.unique()) > 2 for c in codes)
    assert codec.hop * codes[0].shape[1] == whole.shape[-1] * codec.rates[0]


@torch.no_grad()
def test_dac_gives_the_samples_that_its_decoder_lacks(originals: dict, codecs: dict) -> None:
    """An odd stride makes DAC stop early (dac#37): two samples of these frames, eight of those that are published."""
    codes = codecs["dac"].encode(sound(50))
    short = originals["dac"].decode(audio_codes=codes).audio_values
    y = codecs["dac"].decode(codes)[0]
    assert (short.shape[-1], y.shape[-1]) == (48, 50)
    assert torch.equal(y[:, 48:], y[:, 47:48].expand(1, 2))


# --- any length, batch, number of levels


@settings(max_examples=12, deadline=None, derandomize=True)
@given(length=st.integers(0, 4000), seed=st.integers(0, 9))
@pytest.mark.parametrize("name", NAMES)
def test_every_length_comes_back(codecs: dict, name: str, length: int, seed: int) -> None:
    codec = codecs[name]
    x = sound(length, seed=seed)
    codes = codec.encode(x)
    y = codec.decode(codes, length)
    assert (y.dtype, y.shape) == (torch.float32, x.shape)
    assert (y.abs() <= 1).all()
    frames = math.ceil(length / codec.hop)
    assert codec.decode(codes).shape == (1, 1, frames * codec.hop)
    assert equal(codec.encode(padded(x, codec.hop)), codes)
    if length:
        wrong = frames * codec.hop + 1
        with pytest.raises(VocabularyError, match=f"got length {wrong}, but {frames} frames hold"):
            codec.decode(codes, wrong)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_row_is_what_it_is_alone(codecs: dict, name: str, rows: int) -> None:
    codec = codecs[name]
    x = sound(77, rows)
    codes = codec.encode(x)
    y = codec.decode(codes, 77)
    for row in range(rows):
        assert equal(codec.encode(x[row : row + 1]), tuple(c[row : row + 1] for c in parts(codes)))
        alone = [c[row : row + 1] for c in parts(codes)]
        assert torch.equal(codec.decode(alone if name == "snac" else alone[0], 77), y[row : row + 1])
    empty = codec.encode(x[:0])
    assert codec.decode(empty, 77).shape == (0, 1, 77)


@pytest.mark.parametrize("name", NAMES)
def test_lists_of_unequal_sounds(codecs: dict, name: str) -> None:
    codec = codecs[name]
    lengths = [50, 0, 7, 333]
    sounds = [sound(n)[0] for n in lengths]
    codes = codec.encode(sounds)
    back = codec.decode(codes, lengths)
    for x, c, y in zip(sounds, codes, back, strict=True):
        single = codec.encode(x[None])
        assert equal(c, tuple(s[0] for s in parts(single)))
        assert y.shape == x.shape
        assert torch.equal(y, codec.decode(single, x.shape[-1])[0])
    assert codec.encode([]) == []
    assert codec.decode([]) == []


@pytest.mark.parametrize("name", NAMES)
def test_levels_and_bandwidth(codecs: dict, name: str) -> None:
    codec = codecs[name]
    x = sound(100)
    every = codec.encode(x)
    for levels in range(1, len(codec.codebook_sizes) + 1):
        first = codec.encode(x, levels)
        expected = every[:levels] if name == "snac" else (every[:, :levels],)
        assert equal(first, expected)
        assert equal(first, codec.encode(x, bandwidth=codec.bandwidth(levels)))
        assert codec.decode(first, 100).shape == x.shape
    rates = [codec.bandwidth(n) for n in range(1, len(codec.codebook_sizes) + 1)]
    bits = sum(c.numel() for c in parts(codec.encode(sound(codec.sample_rate * 3)))) * 5  # of 32 codes
    assert rates[-1] == codec.bandwidth() == pytest.approx(bits / 3000, rel=0.02)
    assert rates == sorted(set(rates))
    with pytest.raises(ConfigError, match="levels, expected 1 to"):
        codec.encode(x, len(codec.codebook_sizes) + 1)
    with pytest.raises(ConfigError, match=f"expected one of {rates[0]:g}, "):
        codec.encode(x, bandwidth=99)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(codecs: dict, tmp_path: Path, name: str) -> None:
    codec = codecs[name]
    codec.save(tmp_path / "mine")
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["config.json", "mmtok.json", "model.safetensors"]
    again = mmtok.load(tmp_path / "mine")
    assert type(again) is type(codec)
    assert again.fingerprint == codec.fingerprint
    assert again.properties == codec.properties == {"sample_rate": codec.sample_rate, "hop": codec.hop}
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    x = sound(150)
    state = torch.get_rng_state()
    assert equal(again.encode(x), codec.encode(x))
    assert torch.equal(again.decode(again.encode(x)), codec.decode(codec.encode(x)))
    assert torch.equal(torch.get_rng_state(), state)
    again.double().float()  # nothing computed from the weights is left behind
    assert equal(again.encode(x), codec.encode(x))


@pytest.mark.parametrize("name", NAMES)
def test_sounds_and_codes_that_are_none(codecs: dict, name: str) -> None:
    codec = codecs[name]
    with pytest.raises(MediaError, match="NaN or infinity"):
        codec.encode(torch.full((1, 1, 9), torch.nan))
    with pytest.raises(MediaError, match="mix to mono first"):
        codec.encode(torch.zeros(1, 2, 9))
    codes = [c.clone() for c in parts(codec.encode(sound(50)))]
    codes[-1][0, ..., -1] = 32
    with pytest.raises(VocabularyError, match=r"row 0, level [02], frame \d+: got code 32, expected 0 to 31"):
        codec.decode(codes if name == "snac" else codes[0])


@pytest.mark.parametrize("name", ["dac", "snac", "xcodec"])
def test_streams_of_codecs_that_look_ahead_are_refused(codecs: dict, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot encode a stream: its codes depend on the whole sound"):
        codecs[name].stream_encoder()
    with pytest.raises(ConfigError, match="cannot decode a stream"):
        codecs[name].stream_decoder()


# --- several rates


def test_snac_in_a_sequence(codecs: dict) -> None:
    snac, words = codecs["snac"], mmtok.load("text-4k")
    assert snac.layout == "multi-rate:0,1,2,2,1,2,2"
    for levels in (1, 2, 3):
        registry = VocabularyRegistry.create([spec_of("words", words), spec_of("snac", snac, levels)])
        mm = MultimodalTokenizer(registry, {"words": words, "snac": snac})
        document = Document((Text("a cow"), Audio(sound(131)[0].numpy(), snac.sample_rate)))
        ids = mm.encode(document)
        span = next(s for s in mm.grammar.spans(ids) if s.kind == "audio")
        expected = snac.encode(sound(131), levels)
        codes = mm.grammar.segment_codes(ids, span)
        assert equal([torch.as_tensor(c) for c in codes], [c[0] for c in expected])
        assert sum(c.numel() for c in expected) == sum(snac.rates[:levels]) * math.ceil(131 / snac.hop)
        text, audio = mm.decode(ids).segments
        assert text == Text("a cow")
        assert torch.equal(torch.from_numpy(audio.samples), snac.decode(expected)[0])


def test_roundtrip_counts_codes_of_several_rates(codecs: dict) -> None:
    snac = codecs["snac"]
    back, figures = roundtrip_audio(snac, Audio(sound(5000)[0].numpy(), snac.sample_rate))
    codes = snac.encode(sound(5000))
    assert back.samples.shape == (1, 5000)
    assert figures["tokens"] == sum(c.numel() for c in codes)
    assert figures["codebooks"] == 3
    bits = sum(c.numel() * math.log2(n) for c, n in zip(codes, snac.codebook_sizes, strict=True))
    assert figures["bits"] == pytest.approx(bits, abs=0.1)


def test_codes_of_several_rates_that_do_not_fit(codecs: dict) -> None:
    snac = codecs["snac"]
    codes = snac.encode(sound(100))
    for wrong, message in (
        (codes[:2] + codes[1:2], r"got codes of shapes \[\[1, 5\], \[1, 10\], \[1, 10\]\], expected .*\[1, 20\]"),
        (codes + codes, "got 6 levels, expected 1 to 3"),
        ([c.float() for c in codes], r"torch.float32 \[1, 5\].*expected int64 \[B, n\]"),
        (codes[2], "expected a tuple with one tensor a level"),
    ):
        with pytest.raises(VocabularyError, match=message):
            snac.decode(wrong)
    with pytest.raises(VocabularyError, match="codes 1: got 4 levels"):
        snac.decode([[c[0] for c in codes], [c[0] for c in codes + codes[:1]]])
    with pytest.raises(VocabularyError, match="codes 0 are no sequence of tensors"):
        snac.decode([[1, 2, 3]])


# --- streams of Mimi


def pieces(x: Tensor, cuts: list[int]) -> tuple[Tensor, ...]:
    """[..., n] cut at places that are taken modulo n + 1, in order; some pieces may be empty."""
    return x.tensor_split(sorted(cut % (x.shape[-1] + 1) for cut in cuts), -1)


CUTS = st.lists(st.integers(0, 10**6), max_size=6)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(length=st.integers(1, 1500), rows=st.integers(1, 2), cuts=CUTS)
def test_mimi_streams_are_the_whole_sound(codecs: dict, length: int, rows: int, cuts: list[int]) -> None:
    mimi = codecs["mimi"]
    x = sound(length, rows)
    codes = mimi.encode(x, 3)
    stream = mimi.stream_encoder(3)
    made, pushed = [], 0
    for piece in pieces(x, cuts):
        made.append(stream.push(piece))
        pushed += piece.shape[-1]
        assert sum(c.shape[-1] for c in made) == pushed // mimi.hop
    got = torch.cat([*made, stream.finish()], -1)
    assert got.shape == codes.shape
    assert (got == codes).float().mean() >= 0.997
    back = mimi.stream_decoder(length)
    samples = torch.cat([*(back.push(piece) for piece in pieces(codes, cuts)), back.finish()], -1)
    torch.testing.assert_close(samples, mimi.decode(codes, length), rtol=0, atol=1e-4)


def test_mimi_in_pushes_of_20_ms(codecs: dict) -> None:
    mimi = codecs["mimi"]
    x = sound(1600)
    stream = mimi.stream_encoder()
    got = torch.cat([*(stream.push(piece) for piece in x.split(16, -1)), stream.finish()], -1)
    assert (got == mimi.encode(x)).float().mean() >= 0.997


@torch.no_grad()
@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="version 4 has no window on a CPU")
def test_long_sounds_of_mimi_go_in_pieces(tmp_path: Path) -> None:
    original = codec_files.mimi(window=10)
    mimi = published.Mimi.from_published(codec_files.write(original, tmp_path))
    x = sound(mimi.hop * (2 * PIECE + 3))
    expected = original.encode(x).audio_codes
    codes = mimi.encode(x)
    assert (codes == expected).float().mean() >= 0.997
    whole = original.decode(expected).audio_values
    close(mimi.to_samples(expected), whole)


@torch.no_grad()
def test_the_tail_of_mimi_is_padded_before_the_network_as_in_moshi(originals: dict, codecs: dict) -> None:
    changed = 0
    for tail in range(1, 32):
        x = sound(32 * 6 + tail)
        ours, theirs = codecs["mimi"].encode(x), originals["mimi"].encode(x).audio_codes
        assert torch.equal(ours[..., :6], theirs[..., :6])
        changed += not torch.equal(ours, theirs)
    assert changed > 5


def test_a_stereo_mimi(tmp_path: Path) -> None:
    original = codec_files.mimi(channels=2)
    mimi = published.Mimi.from_published(codec_files.write(original, tmp_path))
    x = sound(100, 4).view(2, 2, 100)
    assert mimi.decode(mimi.encode(x), 100).shape == x.shape
    with pytest.raises(MediaError, match=r"expected float32 \[B, 2, T\]"):
        mimi.encode(x[:, :1])


def test_streams_that_are_used_wrongly(codecs: dict) -> None:
    mimi = codecs["mimi"]
    stream = mimi.stream_encoder(bandwidth=mimi.bandwidth(2))
    assert stream.push(sound(70, 2)).shape == (2, 2, 2)
    with pytest.raises(MediaError, match="got 1 sounds, expected 2"):
        stream.push(sound(3))
    with pytest.raises(MediaError, match=r"expected float32 \[B, 1, T\]"):
        stream.push(sound(3).double())
    assert stream.finish().shape == (2, 2, 1)
    for call in (lambda: stream.push(sound(1, 2)), stream.finish):
        with pytest.raises(MediaError, match="has been finished; begin another"):
            call()
    assert mimi.stream_encoder().finish().shape == (1, 4, 0)
    back = mimi.stream_decoder(length=90)
    codes = mimi.encode(sound(70))
    assert back.push(codes[..., :2]).shape == (1, 1, 64)
    with pytest.raises(VocabularyError, match="expected 1 sounds of 4 levels as in the push before"):
        back.push(codes[:, :3, :1])
    assert back.push(codes[..., 2:]).shape == (1, 1, 26)
    assert back.finish().shape == (1, 1, 0)
    with pytest.raises(VocabularyError, match="has been finished"):
        back.push(codes)
    short = mimi.stream_decoder(length=90)
    short.push(codes[..., :2])
    with pytest.raises(VocabularyError, match="got length 90, but 2 frames hold 33 to 64 samples"):
        short.finish()
    assert short.push(codes[..., 2:]).shape == (1, 1, 26)
    assert short.finish().shape == (1, 1, 0)
    assert mimi.stream_decoder().finish().shape == (1, 1, 0)

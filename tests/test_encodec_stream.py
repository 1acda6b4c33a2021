"""EnCodec as a stream: pushes of any size give the codes and the samples of the whole sound."""

from __future__ import annotations

import pytest
import torch
from encodec_models import noise, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.audio.encodec import Encodec, EncodecCodes
from mmtok.errors import ConfigError, MediaError, VocabularyError

sizes = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 1500)), max_size=8)


def pieces(x: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
    """The last dimension cut into pieces of these sizes, and what is left."""
    kept = []
    for count in counts:
        kept.append(x[..., :count])
        x = x[..., count:]
    return [*kept, x]


def push_all(codec: Encodec, parts: list[torch.Tensor], levels: int) -> torch.Tensor:
    stream = codec.stream_encoder(levels)
    return torch.cat([*(stream.push(part) for part in parts), stream.finish()], -1)


def assert_near(codec: Encodec, got: torch.Tensor, whole: torch.Tensor) -> None:
    """Equal codes; of ties in random codebooks at most one frame differs."""
    assert got.shape == whole.shape
    assert int((got != whole).any(1).sum()) <= 1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(counts=sizes, rest=st.integers(0, 3000), batch=st.integers(1, 2), seed=st.integers(0, 9))
def test_any_pushes_give_the_codes_of_the_whole(counts: list[int], rest: int, batch: int, seed: int) -> None:
    codec = tokenizer(24_000)
    x = noise(batch, 1, sum(counts) + rest, seed)
    assert_near(codec, push_all(codec, pieces(x, counts), 2), codec.encode(x, 2))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(0, 6), max_size=8), rest=st.integers(0, 12), cut=st.integers(0, 319))
def test_any_pushes_give_the_samples_of_the_whole(counts: list[int], rest: int, cut: int) -> None:
    codec = tokenizer(24_000)
    frames = sum(counts) + rest
    codes = torch.randint(0, 1024, (2, 3, frames), generator=torch.Generator().manual_seed(frames))
    length = max(0, frames * 320 - cut)
    stream = codec.stream_decoder(length)
    got = torch.cat([*(stream.push(part) for part in pieces(codes, counts)), stream.finish()], -1)
    torch.testing.assert_close(got, codec.decode(codes, length), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 7, 319, 320, 321, 2239, 2240, 2241, 2600])
def test_single_samples(length: int) -> None:
    codec = tokenizer(24_000)
    x = noise(1, 1, length)
    parts = [*x[..., : min(length, 700)].split(1, -1), x[..., 700:]]
    assert torch.equal(push_all(codec, parts, 8), codec.encode(x))


def test_20_ms_pushes_and_when_frames_come_out() -> None:
    codec = tokenizer(24_000)
    x = noise(1, 1, 24_000)
    encoder, decoder = codec.stream_encoder(bandwidth=6.0), codec.stream_decoder(24_000)
    codes, sounds = [], []
    for n, part in enumerate(x.split(480, -1), start=1):
        codes.append(encoder.push(part))
        frames = sum(c.shape[-1] for c in codes)
        assert frames == (n * 480 // 320 if n * 480 >= 7 * 320 else 0)
        assert frames >= (n * 480 - encoder.latency) // 320
        sounds.append(decoder.push(codes[-1]))
        assert sum(s.shape[-1] for s in sounds) == frames * 320
    codes.append(encoder.finish())
    sounds += [decoder.push(codes[-1]), decoder.finish()]
    whole = codec.encode(x)
    assert_near(codec, torch.cat(codes, -1), whole)
    torch.testing.assert_close(torch.cat(sounds, -1), codec.decode(torch.cat(codes, -1), 24_000), rtol=1e-5, atol=1e-6)


def test_streams_do_not_disturb_each_other() -> None:
    codec = tokenizer(24_000)
    x, y = noise(1, 1, 4000, 1), noise(1, 1, 4000, 2)
    first, second = codec.stream_encoder(2), codec.stream_encoder(2)
    turns = [(first.push(a), second.push(b)) for a, b in zip(x.split(1300, -1), y.split(1300, -1), strict=True)]
    assert_near(codec, torch.cat([*(t[0] for t in turns), first.finish()], -1), codec.encode(x, 2))
    assert_near(codec, torch.cat([*(t[1] for t in turns), second.finish()], -1), codec.encode(y, 2))


def test_what_a_stream_refuses() -> None:
    codec = tokenizer(24_000)
    with pytest.raises(ConfigError, match="expected 1 to 32"):
        codec.stream_encoder(33)
    for stream in (codec.stream_encoder_with_scale, codec.stream_decoder_with_scale):
        with pytest.raises(ConfigError, match="no scales"):
            stream()
    encoder = codec.stream_encoder()
    assert encoder.push(noise(2, 1, 3)).shape == (2, 8, 0)
    with pytest.raises(MediaError, match="got 1 sounds, expected 2"):
        encoder.push(noise(1, 1, 3))
    with pytest.raises(MediaError, match="mix to mono"):
        encoder.push(noise(2, 2, 3))
    with pytest.raises(MediaError, match="NaN"):
        encoder.push(torch.full((2, 1, 3), float("nan")))
    assert encoder.finish().shape == (2, 8, 1)
    for late in (lambda: encoder.push(noise(2, 1, 3)), encoder.finish):
        with pytest.raises(MediaError, match="has been finished"):
            late()
    assert codec.stream_encoder().finish().shape == (1, 8, 0)

    decoder = codec.stream_decoder(641)
    codes = torch.zeros(1, 2, 1, dtype=torch.int64)
    decoder.push(codes)
    for wrong in (codes.repeat(2, 1, 1), codes.repeat(1, 2, 1), codes + 1024, codes.float()):
        with pytest.raises(VocabularyError, match="expected"):
            decoder.push(wrong)
    with pytest.raises(VocabularyError, match="got length 641, but 1 frames hold 1 to 320"):
        decoder.finish()
    decoder.push(codes.repeat(1, 1, 2))
    assert decoder.finish().shape == (1, 1, 641)
    for too_late in (lambda: decoder.push(codes), decoder.finish):
        with pytest.raises(VocabularyError, match="has been finished"):
            too_late()
    assert codec.stream_decoder().finish().shape == (1, 1, 0)


# --- 48 kHz


@pytest.mark.parametrize("length", [0, 1, 500, 47_520, 47_521, 47_681, 48_000, 95_040 + 100])
def test_windows_in_a_stream(length: int) -> None:
    codec = tokenizer(48_000)
    x = noise(1, 2, length) * torch.linspace(0.1, 2, length)
    whole = codec.encode_with_scale(x, levels=2)
    encoder, decoder = codec.stream_encoder_with_scale(bandwidth=3.0), codec.stream_decoder_with_scale()
    coded = [*(encoder.push(part) for part in pieces(x, [480, 0, 30_000, 17_519, 1, 1])), encoder.finish()]
    assert torch.equal(torch.cat([c.codes for c in coded], -1), whole.codes)
    assert torch.equal(torch.cat([c.scales for c in coded], -1), whole.scales)
    assert sum(c.length for c in coded) == length
    sound = torch.cat([*(decoder.push(c) for c in coded), decoder.finish()], -1)
    assert torch.equal(sound, codec.decode_with_scale(whole))


def test_a_stream_of_windows_that_breaks_off() -> None:
    codec = tokenizer(48_000)
    encoder, decoder = codec.stream_encoder_with_scale(1), codec.stream_decoder_with_scale()
    first = encoder.push(noise(2, 2, 48_000))
    assert (first.codes.shape, first.scales.shape, first.length) == ((2, 1, 150), (2, 1), 47_520)
    with pytest.raises(MediaError, match="got 1 sounds"):
        encoder.push(noise(1, 2, 3))
    assert decoder.push(first).shape == (2, 2, 47_520)
    assert decoder.finish().shape == (2, 2, 480)
    last = encoder.finish()
    assert last.length == 480
    with pytest.raises(MediaError, match="has been finished"):
        decoder.push(last)
    with pytest.raises(MediaError, match="has been finished"):
        encoder.finish()


def test_a_stream_of_windows_refuses_what_does_not_fit() -> None:
    codec = tokenizer(48_000)
    coded = codec.encode_with_scale(noise(1, 2, 1000), 1)
    decoder = codec.stream_decoder_with_scale()
    with pytest.raises(MediaError, match="expected 2 frames"):
        decoder.push(EncodecCodes(coded.codes, coded.scales, 500))
    with pytest.raises(MediaError, match="scales"):
        decoder.push(EncodecCodes(coded.codes, coded.scales[:, :0], 1000))
    assert decoder.push(coded).shape == (1, 2, 1000)
    with pytest.raises(MediaError, match="after the last window"):
        decoder.push(coded)
    assert decoder.finish().shape == (1, 2, 0)

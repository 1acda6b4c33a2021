"""The spectral codec as a stream: pushes of any size give the whole, and no sooner or later than stated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectral_models import HOP, LEVELS, SHAPES, SIZE, assert_same_codes, pieces, sounds, tiny

from mmtok.audio import codec
from mmtok.errors import MediaError, VocabularyError

BOTH = ("plain", "causal")


def pushed(model: codec.SpectralCodec, parts: list[torch.Tensor], levels: int | None = None) -> torch.Tensor:
    stream = model.stream_encoder(levels)
    return torch.cat([*map(stream.push, parts), stream.finish()], -1)


def played(model: codec.SpectralCodec, parts: list[torch.Tensor], length: int | None = None) -> torch.Tensor:
    stream = model.stream_decoder(length)
    return torch.cat([*map(stream.push, parts), stream.finish()], -1)


def random_codes(b: int, levels: int, frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, SIZE, (b, levels, frames), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", BOTH)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 500)), max_size=8),
    rest=st.integers(0, 1500),
    b=st.integers(0, 2),
    levels=st.integers(1, LEVELS),
)
def test_any_pushes_give_the_codes_of_the_whole(name, sizes, rest, b, levels):
    model, x = tiny(name), sounds(b, sum(sizes) + rest, rest)
    assert_same_codes(model, pushed(model, pieces(x, sizes), levels), model.encode(x, levels), x)


@pytest.mark.parametrize("name", BOTH)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 6), max_size=8),
    rest=st.integers(0, 30),
    cut=st.integers(0, HOP - 1),
    b=st.integers(0, 2),
)
def test_any_pushes_give_the_samples_of_the_whole(name, sizes, rest, cut, b):
    model, frames = tiny(name), sum(sizes) + rest
    codes = random_codes(b, 2, frames, rest)
    torch.testing.assert_close(played(model, pieces(codes, sizes)), model.decode(codes), rtol=1e-5, atol=1e-5)
    length = max(0, frames * HOP - cut)
    torch.testing.assert_close(
        played(model, pieces(codes, sizes), length), model.decode(codes, length), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", SHAPES)
def test_pushes_of_20_ms(name):
    model, x = tiny(name), sounds(1, 4000, 9)
    encoder, decoder = model.stream_encoder(), model.stream_decoder(4000)
    codes, samples = [], []
    for n, part in enumerate(x.split(160, -1), start=1):
        codes.append(encoder.push(part))
        assert sum(c.shape[-1] for c in codes) == max(0, n * 160 - encoder.latency) // HOP
        samples.append(decoder.push(codes[-1]))
    codes.append(encoder.finish())
    samples += [decoder.push(codes[-1]), decoder.finish()]
    assert_same_codes(model, torch.cat(codes, -1), model.encode(x), x)
    whole = model.decode(torch.cat(codes, -1), 4000)
    torch.testing.assert_close(torch.cat(samples, -1), whole, rtol=1e-5, atol=1e-5)


def test_a_causal_codec_answers_in_the_same_push():
    model, x = tiny("causal"), sounds(1, 2000, 3)
    encoder, decoder = model.stream_encoder(), model.stream_decoder()
    assert (encoder.latency, decoder.latency) == (0, 0)
    for part in x.split(HOP, -1):
        codes = encoder.push(part)
        assert codes.shape == (1, LEVELS, 1)
        assert decoder.push(codes).shape == (1, 1, HOP)
    assert encoder.finish().shape == (1, LEVELS, 0)
    assert decoder.finish().shape == (1, 1, 0)


@pytest.mark.parametrize("at", [1, 25 * HOP, 25 * HOP + 17, 49 * HOP])
def test_causal_codes_do_not_foresee_samples(at):
    model, x = tiny("causal"), sounds(1, 50 * HOP, 8)
    other = torch.cat([x[..., :at], sounds(1, 50 * HOP, 9)[..., at:]], -1)
    a, b = model.encode(x), model.encode(other)
    assert torch.equal(a[..., : at // HOP], b[..., : at // HOP])
    assert not torch.equal(a, b)


@pytest.mark.parametrize("frame", [1, 20, 49])
def test_causal_samples_do_not_foresee_codes(frame):
    model, a = tiny("causal"), random_codes(1, LEVELS, 50)
    b = torch.cat([a[..., :frame], random_codes(1, LEVELS, 50, 1)[..., frame:]], -1)
    y, z = model.decode(a), model.decode(b)
    assert torch.equal(y[..., : frame * HOP], z[..., : frame * HOP])
    assert not torch.equal(y[..., frame * HOP : (frame + 1) * HOP], z[..., frame * HOP : (frame + 1) * HOP])


def test_the_stated_latency_of_codes_is_enough_and_needed():
    model, x = tiny("plain"), sounds(1, 60 * HOP, 1)
    encoder = model.stream_encoder()
    # Half of what the window has beyond the hop, then three frames for each of two layers.
    assert encoder.latency == 44 + 2 * 3 * HOP
    given = 0
    for n, sample in enumerate(x[..., : 12 * HOP].split(1, -1), start=1):
        given += encoder.push(sample).shape[-1]
        assert given == max(0, n - encoder.latency) // HOP
    wanted = x[:, 0].clone().requires_grad_()
    frame = 20
    (model.latent(wanted)[0, frame] * torch.randn(16, generator=torch.Generator().manual_seed(0))).sum().backward()
    reach = wanted.grad[0].nonzero().flatten()
    assert int(reach.max()) == (frame + 1) * HOP - 1 + encoder.latency


def test_the_stated_latency_of_samples_is_enough_and_needed():
    model, a = tiny("plain"), random_codes(1, LEVELS, 60)
    decoder = model.stream_decoder()
    assert decoder.latency == 44 + 3 * 3 * HOP
    given = 0
    for n, part in enumerate(a[..., :30].split(1, -1), start=1):
        given += decoder.push(part).shape[-1]
        assert given == max(0, n * HOP - decoder.latency)
    frame = 20
    b = a.clone()
    b[..., frame] = (b[..., frame] + SIZE // 2) % SIZE
    changed = (model.decode(a) != model.decode(b))[0, 0].nonzero().flatten()
    certain = frame * HOP - decoder.latency
    assert certain <= int(changed.min()) <= certain + HOP


@pytest.mark.parametrize("name", BOTH)
def test_long_sounds_go_in_pieces(name, monkeypatch):
    model, x = tiny(name), sounds(2, 41 * HOP - 9, 2)
    codes = model.encode(x)
    y = model.decode(codes)
    for piece in (1, 2, 7, 20, 41):
        monkeypatch.setattr(codec, "PIECE", piece)
        assert_same_codes(model, model.encode(x), codes, x)
        torch.testing.assert_close(model.decode(codes), y, rtol=1e-5, atol=1e-5)


def test_what_a_stream_keeps_does_not_grow():
    model, x = tiny("plain"), sounds(1, 8000)
    encoder, decoder = model.stream_encoder(), model.stream_decoder()

    def kept() -> int:
        tensors = [encoder.kept, *encoder.layers.kept, *decoder.layers.kept, decoder.sound.tail, decoder.sound.weights]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    sizes = []
    for part in x.split(160, -1):
        decoder.push(encoder.push(part))
        sizes.append(kept())
    assert max(sizes[10:]) <= max(sizes[:10]) < 200_000


def test_streams_do_not_disturb_each_other():
    model, x, y = tiny("plain"), sounds(1, 2000, 1), sounds(1, 2000, 2)
    first, second = model.stream_encoder(), model.stream_encoder(2)
    turns = [(first.push(a), second.push(b)) for a, b in zip(x.split(330, -1), y.split(330, -1), strict=True)]
    assert_same_codes(model, torch.cat([*(t[0] for t in turns), first.finish()], -1), model.encode(x), x)
    assert_same_codes(model, torch.cat([*(t[1] for t in turns), second.finish()], -1), model.encode(y, 2), y)


def test_what_a_stream_refuses():
    model = tiny("plain")
    encoder = model.stream_encoder(bandwidth=1.6)
    assert encoder.push(sounds(2, 3)).shape == (2, 2, 0)
    with pytest.raises(MediaError, match="got 1 sounds, expected 2 as in the push before"):
        encoder.push(sounds(1, 3))
    assert encoder.finish().shape == (2, 2, 1)
    for late in (lambda: encoder.push(sounds(2, 3)), encoder.finish):
        with pytest.raises(MediaError, match="has been finished; begin another"):
            late()
    assert model.stream_encoder().finish().shape == (1, LEVELS, 0)

    decoder = model.stream_decoder(41)
    decoder.push(random_codes(1, 2, 1))
    for wrong in (random_codes(2, 2, 1), random_codes(1, 1, 1)):
        with pytest.raises(VocabularyError, match="expected 1 sounds of 2 levels as in the push before"):
            decoder.push(wrong)
    with pytest.raises(VocabularyError, match="got length 41, but 1 frames hold 1 to 40"):
        decoder.finish()
    decoder.push(random_codes(1, 2, 1))
    assert decoder.finish().shape == (1, 1, 41)
    for late in (lambda: decoder.push(random_codes(1, 2, 1)), decoder.finish):
        with pytest.raises(VocabularyError, match="has been finished; begin another"):
            late()
    assert model.stream_decoder().finish().shape == (1, 1, 0)

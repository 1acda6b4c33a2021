"""Layers over frames as a whole and over a stream, overlap-add, and independent twins of both transforms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st
from spectral_models import CONFIG, pieces, sounds
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.audio import SpectralCodecConfig
from mmtok.audio.codec import Analysis, Synthesis
from mmtok.audio.layers import ConvNeXtBlock, FrameConv, OverlapAdd, Stream

DIM = 4


def chain(kinds: list[tuple[int, bool]]) -> nn.Sequential:
    """Convolutions of a kernel, blocks for kernel 0, causal or not; random float64 weights."""
    torch.manual_seed(0)
    layers = [FrameConv(DIM, DIM, k, causal) if k else ConvNeXtBlock(DIM, 0.5, causal) for k, causal in kinds]
    return nn.Sequential(*layers).double()


def noise(b: int, n: int) -> Tensor:
    return torch.randn(b, DIM, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kinds=st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=4),
    sizes=st.lists(st.integers(0, 12), max_size=6),
    rest=st.integers(0, 20),
    b=st.integers(0, 2),
)
def test_a_stream_through_any_chain_is_the_whole(kinds, sizes, rest, b):
    layers, x = chain(kinds), noise(b, sum(sizes) + rest)
    stream = Stream(layers)
    out, given = [], 0
    with torch.no_grad():
        whole = layers(x)
        *early, last = pieces(x, sizes)
        for part in early:
            given += part.shape[-1]
            out.append(stream.push(part))
            assert sum(y.shape[-1] for y in out) == max(0, given - stream.delay)
        out.append(stream.push(last, last=True))
    assert whole.shape == x.shape
    torch.testing.assert_close(torch.cat(out, -1), whole)


@pytest.mark.parametrize(
    ("kernel", "causal", "window"),
    [
        (1, False, (0, 0)),
        (4, False, (-2, 1)),
        (5, False, (-2, 2)),
        (5, True, (-4, 0)),
        (0, False, (-3, 3)),
        (0, True, (-6, 0)),
    ],
)
def test_what_a_layer_sees(kernel, causal, window):
    x = noise(1, 30).requires_grad_()
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5])
    (chain([(kernel, causal)])(x)[0, :, 15] * weights).sum().backward()
    seen = x.grad[0].abs().sum(0).nonzero().flatten()
    assert (int(seen.min()) - 15, int(seen.max()) - 15) == window


def test_a_convolution_is_the_plain_one_between_zeros():
    layer, x = FrameConv(DIM, 3, 5, causal=False), noise(2, 9).float()
    plain = F.conv1d(x, layer.conv.weight, layer.conv.bias, padding=2)
    torch.testing.assert_close(layer(x), plain)
    late = FrameConv(DIM, 3, 5, causal=True)
    late.load_state_dict(layer.state_dict())
    torch.testing.assert_close(late(x)[..., 2:], layer(x)[..., :-2])


# --- overlap-add


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    hop=st.integers(1, 8),
    more=st.integers(0, 20),
    share=st.floats(0, 1),
    least=st.sampled_from([1e-8, 0.3]),
    sizes=st.lists(st.integers(0, 5), max_size=6),
    rest=st.integers(0, 6),
    b=st.integers(1, 2),
)
def test_overlap_add_is_the_plain_sum(hop, more, share, least, sizes, rest, b):
    width, n = hop + more, sum(sizes) + rest
    trim = round(share * more)
    g = torch.Generator().manual_seed(hop)
    weight = torch.rand(width, generator=g, dtype=torch.float64)
    windows = torch.randn(b, n, width, generator=g, dtype=torch.float64)

    total, weights = np.zeros((b, n * hop + more)), np.zeros(n * hop + more)
    for i in range(n):
        total[:, i * hop : i * hop + width] += windows[:, i].numpy()
        weights[i * hop : i * hop + width] += weight.numpy() ** 2
    expected = (total / np.maximum(weights, least))[:, trim : trim + n * hop]

    adder = OverlapAdd(weight, hop, trim, least)
    cuts = np.cumsum([0, *sizes])
    out, given = [], 0
    for a, z in itertools.pairwise(cuts):
        given += z - a
        out.append(adder.push(windows[:, a:z]))
        assert sum(y.shape[1] for y in out) == max(0, given * hop - trim), "what later windows do not reach"
    out.append(adder.push(windows[:, cuts[-1] :], last=True))
    np.testing.assert_allclose(torch.cat(out, 1).numpy(), expected, rtol=1e-9, atol=1e-9)


# --- twins of the transforms


@pytest.mark.parametrize(("window", "hop"), [(128, 40), (64, 16), (1024, 320)])
def test_synthesis_against_plain_inverse_transforms(window, hop):
    torch.manual_seed(1)
    head = Synthesis(8, window)
    x = torch.randn(2, 9, 8)
    got = head(x).detach().numpy()
    spectra = head.project(x).detach().double().numpy()
    bins = window // 2 + 1
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    spectrum = np.exp(spectra[..., :bins]) * np.exp(1j * spectra[..., bins:])
    np.testing.assert_allclose(got, np.fft.irfft(spectrum, window) * hann, rtol=1e-4, atol=1e-6)


def test_synthesis_against_torch_istft():
    torch.manual_seed(1)
    window, hop = 128, 32
    head = Synthesis(8, window)
    x = torch.randn(1, 12, 8)
    with torch.no_grad():
        magnitude, phase = head.project(x).split(head.bins, -1)
        spectrum = torch.polar(magnitude.exp(), phase).transpose(1, 2)
        theirs = torch.istft(spectrum, window, hop, window=torch.hann_window(window), center=True)
        ours = OverlapAdd(head.window, hop, (window - hop) // 2, 1e-8).push(head(x), last=True)
    skip = window // 2 - (window - hop) // 2  # torch cuts half a window, here it is half of what exceeds a hop
    torch.testing.assert_close(ours[:, skip : skip + theirs.shape[1]], theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_synthesis_inverts_a_transform(causal):
    """Magnitude and phase of a real sound's frames give back the sound: nothing is lost but where a window begins."""
    window, hop = 128, 40
    head = Synthesis(4, window)
    x = sounds(1, 20 * hop, 2)[:, 0]
    edge = 0 if causal else (window - hop) // 2
    frames = F.pad(x, (edge, window)).unfold(-1, window, hop)[:, :20] * torch.hann_window(window)
    spectrum = torch.fft.rfft(frames)
    parts = torch.cat([spectrum.abs().clamp(min=1e-9).log(), spectrum.angle()], -1)

    class Fixed(nn.Module):
        def forward(self, _):
            return parts

    head.project = Fixed()
    adder = OverlapAdd(head.window, hop, edge, 0.05 if causal else 1e-8)
    back = adder.push(head(torch.zeros(1, 20, 4)), last=True)
    begun = hop if causal else 0  # before it the first window alone, and it is nearly zero
    torch.testing.assert_close(back[:, begun:], x[:, begun:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rate", [8000, 16_000, 24_000])
def test_analysis_against_torchaudio(rate, causal):
    c = SpectralCodecConfig(causal=causal) if rate != 8000 else CONFIG.replace([f"causal={str(causal).lower()}"])
    c = c.replace([f"sample_rate={rate}"])
    analysis, x = Analysis(c), sounds(2, 12 * c.hop, 1)[:, 0]
    got = analysis(F.pad(x, (analysis.before, analysis.after)))
    assert got.shape == (2, c.mels + c.shorts * c.short_mels, 12)
    expected = []
    for window, hop, mels in ((c.window, c.hop, c.mels), (c.short_window, c.hop // c.shorts, c.short_mels)):
        around = window - hop
        mel = torchaudio.transforms.MelSpectrogram(
            rate, n_fft=window, hop_length=hop, n_mels=mels, center=False, power=1.0, norm="slaney"
        )
        logs = mel(F.pad(x, (around, 0) if causal else (around // 2, around // 2))).clamp(min=1e-5).log()
        expected.append(((logs + 5) / 3).unflatten(-1, (12, -1)).transpose(1, 2).flatten(2))
    # Of each frame all bands of the long window, then of one short window after the other.
    long, short = expected
    short = short.view(2, 12, c.short_mels, c.shorts).transpose(2, 3).flatten(2)
    torch.testing.assert_close(got, torch.cat([long, short], -1).transpose(1, 2), rtol=1e-4, atol=1e-4)

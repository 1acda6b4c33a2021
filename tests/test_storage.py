"""How weights are stored: packing and unpacking."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.torch import load_file, save_file

import mmtok
from mmtok.audio import SpectralCodec, SpectralCodecConfig
from mmtok.codec import SCALE, pack, unpack
from mmtok.errors import CheckpointError

FLOATS = st.floats(-100, 100, width=32)
MATRICES = array_shapes(min_dims=2, max_dims=3, max_side=6).flatmap(lambda s: arrays(np.float32, s, elements=FLOATS))


@given(MATRICES)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_bytes_come_back_near_and_pack_to_the_same_again(values: np.ndarray) -> None:
    weight = torch.from_numpy(values.copy())
    stored = pack({"w": weight}, 8)
    assert stored["w"].dtype == torch.int8
    back = unpack(stored)
    assert back.keys() == {"w"}
    row = weight.flatten(1).abs().amax(1)
    error = (back["w"] - weight).flatten(1).abs().amax(1)
    assert (error <= row / 127 * 0.51 + 1e-5).all()
    again = pack(back, 8)
    assert all(torch.equal(again[k], v) for k, v in stored.items())


def test_vectors_and_counts_keep_their_precision() -> None:
    state = {"bias": torch.randn(5), "count": torch.arange(3), "w": torch.randn(4, 4)}
    stored = pack(state, 8)
    assert stored["bias"].dtype == torch.float16
    assert torch.equal(stored["count"], state["count"])
    assert stored["w" + SCALE].shape == (4,)
    assert {k: v.dtype for k, v in pack(state).items()}["w"] == torch.float16


def small() -> SpectralCodec:
    torch.manual_seed(0)
    shape = SpectralCodecConfig(
        dim=16, encoder_blocks=1, decoder_blocks=1, codebook_size=16, levels=2, codebook_dim=4, stored_bits=8
    )
    return SpectralCodec(shape).eval()


def test_a_codec_in_eight_bits_saves_to_what_it_was_loaded_from(tmp_path: Path) -> None:
    model, x = small(), torch.randn(1, 1, 4000) * 0.1
    model.save(tmp_path / "a")
    loaded = mmtok.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    assert loaded.fingerprint == model.fingerprint == mmtok.load(tmp_path / "b").fingerprint
    assert torch.equal(loaded.encode(x), mmtok.load(tmp_path / "b").encode(x))
    codes = loaded.encode(x)
    difference = (loaded.decode(codes) - model.decode(codes)).abs().max()
    assert 0 < difference < 0.05 * model.decode(codes).abs().max()


def test_a_lost_or_lonely_scale_is_refused(tmp_path: Path) -> None:
    state = pack(dict(small().state_dict()), 8)
    scale = next(k for k in state if k.endswith(SCALE))
    lonely = unpack({k: v for k, v in state.items() if k != scale.removesuffix(SCALE)})
    assert scale in lonely  # the strict load then says that it is unexpected
    for wrong in (None, state[scale][:-1], state[scale].int()):
        rest = {k: v for k, v in state.items() if k != scale} | ({} if wrong is None else {scale: wrong})
        with pytest.raises(CheckpointError, match=rf"{scale}: got .*, expected float32 \[{len(state[scale])}\]"):
            unpack(rest)
    small().save(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    del tensors[next(k for k in tensors if k.endswith(SCALE))]
    save_file(tensors, file)
    with pytest.raises(CheckpointError):
        mmtok.load(tmp_path / "m")

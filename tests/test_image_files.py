"""Files are encoded as their pixels are, in order, whatever their size; a bad one stops at its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmtok import media
from mmtok.errors import MediaError
from mmtok.image import ImageVQVAE, ImageVQVAEConfig
from mmtok.image.files import encode_files


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    config = ImageVQVAEConfig(channels=8, encoder_blocks=1, decoder_blocks=1, codebook_size=32, codebook_dim=4)
    return ImageVQVAE(config).eval()


@pytest.fixture
def paths(tmp_path):
    r = np.random.default_rng(0)
    out = []
    for i, (h, w) in enumerate([(40, 33), (40, 33), (8, 8), (64, 20), (40, 33)]):
        out.append(tmp_path / f"{i}.{'png' if i % 2 else 'jpg'}")
        Image.fromarray(r.integers(0, 256, (h, w, 3), np.uint8)).save(out[-1])
    return out


@pytest.mark.parametrize(("batch_size", "readers"), [(1, 1), (2, 2), (16, 3)])
def test_files_are_encoded_as_their_pixels_are(tokenizer, paths, batch_size, readers):
    found = list(encode_files(tokenizer, paths, batch_size, readers))
    assert [x.path for x in found] == paths
    for path, codes, size in found:
        pixels = torch.from_numpy(media.read_image(path))
        assert size == tuple(pixels.shape[1:])
        assert torch.equal(codes, tokenizer.encode(pixels[None])[0])
        assert tokenizer.decode(codes[None], size).shape[2:] == size


def test_what_was_read_before_a_bad_file_is_not_lost(tokenizer, paths):
    paths[3].write_bytes(paths[3].read_bytes()[:60])
    found = []
    with pytest.raises(MediaError, match=paths[3].name):
        found.extend(x.path for x in encode_files(tokenizer, paths, 16))
    assert found == paths[:3]


def test_files_are_read_ahead_but_not_all_at_once(tokenizer, paths, monkeypatch):
    started = []
    inner = media.read_image
    monkeypatch.setattr(media, "read_image", lambda path, mode: started.append(path) or inner(path, mode))
    stream = encode_files(tokenizer, paths * 10, batch_size=2, readers=1)
    next(stream)
    assert len(started) <= 4
    stream.close()
    assert list(encode_files(tokenizer, [])) == []
    with pytest.raises(MediaError, match="at least 1 each"):
        next(encode_files(tokenizer, paths, 0))

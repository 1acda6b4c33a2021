"""JPEG, WebP and AVIF beside a tokenizer: bytes counted in three ways, and interpolation on synthetic curves."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from drawings import drawing
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from mmtok import media
from mmtok.errors import ConfigError, MediaError
from mmtok.evaluation import baselines
from mmtok.evaluation.baselines import Setting, at_bits, cut, mosaic, refine
from mmtok.evaluation.pictures import Pictures
from mmtok.evaluation.sets import choose


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        media.write_image(home / f"{number}.png", drawing(20 + 9 * number, 40, number))
    return home


@settings(max_examples=40, deadline=None, derandomize=True)
@given(n=st.integers(1, 10), h=st.integers(1, 20), w=st.integers(1, 20), block=st.sampled_from([1, 8, 16]))
def test_mosaics_come_apart_again(n: int, h: int, w: int, block: int) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (n, 3, h, w), np.uint8)
    pitch = (-(-h // block) * block, -(-w // block) * block)
    canvas = mosaic(tiles, pitch)
    assert canvas.shape[1] % pitch[0] == canvas.shape[2] % pitch[1] == 0
    assert canvas.shape[1] * canvas.shape[2] <= (n + math.ceil(math.sqrt(n))) * pitch[0] * pitch[1]
    assert np.array_equal(cut(canvas, tiles.shape, pitch), tiles)


def points(rates: list[float], slope: float = 6.0) -> list[dict]:
    """A curve that is a line over the logarithm of the rate."""
    return [
        {
            "quality": i,
            "bits_per_pixel": rate,
            "psnr_of_mean_error_db": 30 + slope * math.log2(rate),
            "psnr_mean_db": 31 + slope * math.log2(rate),
            "ssim": None,
        }
        for i, rate in enumerate(rates)
    ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(0.01, 24), min_size=2, max_size=8, unique_by=lambda r: round(r, 4)),
    st.floats(0.005, 30),
    st.randoms(),
)
def test_interpolation_on_a_line(rates: list[float], target: float, chance) -> None:
    chance.shuffle(rates)
    got = at_bits(points(rates), target)
    if target < min(rates):
        assert got == {"cannot_go_under": min(rates)}
    elif target > max(rates):
        assert got == {"cannot_go_over": max(rates)}
    else:
        assert got["psnr_of_mean_error_db"] == pytest.approx(30 + 6 * math.log2(target), abs=1e-3)
        assert got["psnr_mean_db"] == pytest.approx(31 + 6 * math.log2(target), abs=1e-3)
        assert "ssim" not in got


def test_interpolation_gives_the_peer_its_best() -> None:
    curve = points([0.1, 0.2, 0.4])
    curve.append({**curve[0], "bits_per_pixel": 0.3})  # dear and poor
    curve.append({**curve[0], "bits_per_pixel": -0.01})  # a picture smaller than a blank one
    curve.append({**curve[1], "psnr_of_mean_error_db": 1.0})  # as dear, poorer
    assert at_bits(curve, 0.3)["psnr_of_mean_error_db"] == pytest.approx(30 + 6 * math.log2(0.3), abs=1e-3)
    assert at_bits(curve, 0.2)["psnr_of_mean_error_db"] == pytest.approx(30 + 6 * math.log2(0.2), abs=1e-3)
    assert at_bits(curve, 0.4)["psnr_of_mean_error_db"] == pytest.approx(30 + 6 * math.log2(0.4), abs=1e-3)
    assert at_bits([*curve, {**curve[0], "bits_per_pixel": 0.5}], 0.5) == at_bits(curve, 0.4)
    assert at_bits(curve, 0.05) == {"cannot_go_under": 0.1}
    assert at_bits([curve[4]], 0.1) == {"cannot_go_over": 0.0}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.floats(0.1, 3), st.lists(st.floats(0.01, 30), max_size=3))
def test_settings_are_fine_around_the_targets(growth: float, targets: list[float]) -> None:
    asked = []

    def rate(quality: int) -> float:
        return 0.05 * math.exp(growth * quality / 50)

    def setting(quality: int) -> Setting:
        asked.append(quality)
        return Setting({"file": rate(quality), "mosaic": rate(quality) / 2}, {})

    found = refine(setting, targets)
    assert sorted(asked) == sorted(found)
    assert set(baselines.COARSE) <= set(found)
    for target, factor in itertools.product(targets, (1, 0.5)):
        for a, b in itertools.pairwise(sorted(found)):
            if factor * rate(a) < target < factor * rate(b):
                assert b - a == 1 or rate(b) <= baselines.NEAR * rate(a)


@pytest.mark.parametrize("form", baselines.available())
def test_files_of_peers(form: str) -> None:
    x = drawing(48, 64, 5)
    sizes = []
    for quality in (0, 50, 100):
        data = baselines.encode(form, x, quality)
        with PILImage.open(io.BytesIO(data)) as image:
            assert image.format == form
            assert not {"icc_profile", "exif", "xmp", "comment"} & set(image.info)
        y = baselines.decode(data)
        assert (y.shape, y.dtype) == (x.shape, np.uint8)
        sizes.append((len(data), -float(np.square(x.astype(float) - y).mean())))
    assert sizes == sorted(sizes)
    assert sizes[0][0] < sizes[2][0]


def test_metadata_is_refused() -> None:
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 8)).save(buffer, "JPEG", icc_profile=b"profile")
    with pytest.raises(MediaError, match="icc_profile into JPEG"):
        baselines.decode(buffer.getvalue())


def test_a_picture_that_a_peer_cannot_hold() -> None:
    with pytest.raises(MediaError, match="WEBP cannot hold a picture of 2x16384"):
        baselines.encode("WEBP", np.zeros((3, 2, 16384), np.uint8), 50)


def test_names_of_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert baselines.check_peers([" webp", "JPEG", "WEBP"]) == ["WEBP", "JPEG"]
    with pytest.raises(ConfigError, match="'GIF', expected some of JPEG, WEBP, AVIF"):
        baselines.check_peers(["GIF"])
    monkeypatch.setattr(baselines.features, "check", lambda name: name == "jpg")
    assert baselines.available() == ["JPEG"]
    with pytest.raises(ConfigError, match="cannot write AVIF"):
        baselines.check_peers(["AVIF"])


def test_bytes_are_counted_in_three_ways(folder: Path) -> None:
    pictures = Pictures(choose(folder, "image")[0], size=32)
    curves = baselines.sweeps("JPEG", pictures, [])
    assert list(curves) == ["file", "minus_blank", "mosaic"]
    for kind, curve in curves.items():
        assert [p["quality"] for p in curve] == list(baselines.COARSE)
        assert [p["bits_per_pixel"] for p in curve] == sorted(p["bits_per_pixel"] for p in curve), kind
    files = [baselines.encode("JPEG", x, 70) for x in pictures]
    blank = len(baselines.encode("JPEG", np.full((3, 32, 32), 255, np.uint8), 70))
    whole, less, shared = (next(p for p in curves[k] if p["quality"] == 70) for k in curves)
    assert whole["bits_per_pixel"] == pytest.approx(8 * sum(map(len, files)) / (4 * 1024), abs=1e-6)
    assert less["bits_per_pixel"] == pytest.approx(8 * (sum(map(len, files)) - 4 * blank) / (4 * 1024), abs=1e-6)
    assert less["psnr_of_mean_error_db"] == whole["psnr_of_mean_error_db"]
    error = np.mean([np.square(x.astype(float) - baselines.decode(f)) for x, f in zip(pictures, files, strict=True)])
    assert whole["psnr_of_mean_error_db"] == pytest.approx(10 * math.log10(255**2 / error), abs=2e-3)
    canvas = mosaic(np.stack(list(pictures)), (32, 32))
    assert shared["bits_per_pixel"] == pytest.approx(
        8 * len(baselines.encode("JPEG", canvas, 70)) / (4 * 1024), abs=1e-6
    )
    assert shared["bits_per_pixel"] < whole["bits_per_pixel"]


def test_several_mosaics(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = Pictures(choose(folder, "image")[0], size=32)
    one = baselines.sweeps("JPEG", pictures, [])["mosaic"]
    monkeypatch.setattr(baselines, "MOSAIC_SIDE", 64)
    assert baselines.sweeps("JPEG", pictures, [])["mosaic"] == one
    pictures._items, pictures.sizes, pictures._kept = (5 * x for x in (pictures._items, pictures.sizes, pictures._kept))
    many = baselines.sweeps("JPEG", pictures, [])["mosaic"]
    assert [p["bits_per_pixel"] for p in many] == pytest.approx([p["bits_per_pixel"] for p in one], abs=1e-6)
    monkeypatch.setattr(baselines, "MOSAIC_SIDE", 63)
    assert list(baselines.sweeps("JPEG", pictures, [])) == ["file", "minus_blank"]

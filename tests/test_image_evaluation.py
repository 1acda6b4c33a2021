"""Figures of image tokenizers and their peers: against plain twins, synthetic curves and exact tokenizers."""

from __future__ import annotations

import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from torch import Tensor, nn

from mmtok import media
from mmtok.errors import ConfigError, DataError, MediaError
from mmtok.evaluation import baselines
from mmtok.evaluation.baselines import Setting, at_bits, cut, mosaic, refine
from mmtok.evaluation.closeness import Closeness, compare, notes, summarize
from mmtok.evaluation.images import image_report, measure, reconstruct
from mmtok.evaluation.metrics import psnr, ssim
from mmtok.evaluation.pictures import Pictures, choose
from mmtok.evaluation.plots import best_median_worst, contact_sheet, rate_distortion
from mmtok.image.tokenizer import ImageTokenizer
from mmtok.training.corpus import split_of

SIZES = ((33, 50), (41, 27), (20, 20), (9, 64))


def drawing(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth colours with a disc: uint8 [3, H, W]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    base = rng.random((3, 1, 1)) * 120 + 100 * (rng.random((3, 1, 1)) * x + rng.random((3, 1, 1)) * y)
    disc = (y - 0.4) ** 2 + (x - 0.5) ** 2 < 0.03 * (1 + seed % 3)
    return np.where(disc, rng.random((3, 1, 1)) * 255, base).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("pictures")
    for number, (height, width) in enumerate(SIZES):
        media.write_image(home / f"{number}.png", drawing(height, width, number))
    return home


@pytest.fixture(scope="module")
def pictures(folder: Path) -> Pictures:
    return Pictures(choose(folder)[0])


class Exact(ImageTokenizer, nn.Module):
    """Loses nothing: a level of 256 codes for each channel, a code for each pixel; a level that is missing is black."""

    fingerprint = "exact"
    downsample = 1
    codebook_sizes = (256, 256, 256)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def to_codes(self, pixels: Tensor) -> Tensor:
        return ((pixels + 1) * 127.5).round().long().permute(0, 2, 3, 1)

    def to_pixels(self, codes: Tensor) -> Tensor:
        colours = codes.permute(0, 3, 1, 2) / 127.5 - 1
        rest = (1, self.channels - colours.shape[1], *colours.shape[2:])
        return torch.cat([colours, colours.new_full(rest, -1)], 1)


class Means(Exact):
    """Means of squares of four pixels in 16 steps of grey, but always a code higher than what it decodes to."""

    fingerprint = "means"
    downsample = 4
    codebook_sizes = (17,)

    def to_codes(self, pixels: Tensor) -> Tensor:
        grey = nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 4)
        return ((grey + 1) * 7.5).round().long().clamp(0, 15).permute(0, 2, 3, 1) + 1

    def to_pixels(self, codes: Tensor) -> Tensor:
        grey = (codes - 2).clamp_min(0).permute(0, 3, 1, 2) / 7.5 - 1
        return grey.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)


class Alpha(Exact):
    """Exact, with alpha."""

    channels = 4
    codebook_sizes = (256,) * 4


# --- closeness


def test_closeness_is_that_of_the_metrics() -> None:
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.integers(0, 256, (4, 3, 180, 170), np.uint8)) for _ in range(2))
    y[1] = x[1]
    y[2] = torch.from_numpy(np.clip(x[2].numpy() + rng.integers(-9, 9, x[2].shape), 0, 255).astype(np.uint8))
    scores = compare(x, y)
    a, b = x.double() / 255, y.double() / 255
    expected = psnr(a, b).clamp(max=60)
    np.testing.assert_allclose([s.psnr for s in scores], expected, rtol=1e-9)
    figures = summarize(scores)
    assert figures["psnr_mean_db"] == pytest.approx(float(expected.mean()), abs=1e-3)
    assert figures["psnr_of_mean_error_db"] == pytest.approx(-10 * math.log10(float((a - b).square().mean())), abs=1e-3)
    assert figures["ssim"] == pytest.approx(float(ssim(a, b).mean()), abs=2e-4)
    assert scores[1].ms_ssim == pytest.approx(1)
    assert 0 < figures["ms_ssim"] < figures["ms_ssim_3_scales"] + 0.5
    assert notes(scores) == []
    assert compare(x[2:3], y[2:3]) == [scores[2]]
    assert compare(x, y, multiscale=False)[0].ms_ssim is None


def test_figures_that_small_pictures_do_not_have() -> None:
    def scores(side: int) -> Closeness:
        x = torch.full((1, 3, side, side), 9, dtype=torch.uint8)
        return compare(x, x)[0]

    sides = [scores(s) for s in (10, 11, 40, 41, 160, 161)]
    assert [s.ssim is None for s in sides] == [True] + [False] * 5
    assert [s.ms_ssim_3_scales is None for s in sides] == [True] * 3 + [False] * 3
    assert [s.ms_ssim is None for s in sides] == [True] * 5 + [False]
    assert summarize(sides[:1]) == {
        "psnr_of_mean_error_db": 60.0, "psnr_mean_db": 60.0, "ssim": None, "ms_ssim": None, "ms_ssim_3_scales": None
    }  # fmt: skip
    assert notes(sides) == [
        "SSIM is of 5 of 6 pictures: it needs sides of at least 11 pixels",
        "MS-SSIM is of 1 of 6 pictures: it needs sides of at least 161 pixels",
        "MS-SSIM of 3 scales is of 3 of 6 pictures: it needs sides of at least 41 pixels",
    ]
    with pytest.raises(MediaError, match="expected two uint8"):
        compare(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


# --- tokenizers


def test_an_exact_tokenizer(pictures: Pictures) -> None:
    figures, psnrs = measure(Exact(), pictures)
    assert psnrs == [60.0] * 4
    assert (figures["psnr_of_mean_error_db"], figures["ssim"], figures["codes_kept"]) == (60.0, 1.0, 1.0)
    assert figures["bits_per_pixel"] == 24.0
    assert figures["tokens"] == 3 * sum(h * w for h, w in SIZES) == 3 * pictures.pixels
    for channel, level in enumerate(figures["levels"]):
        values = np.concatenate([x[channel].ravel() for x in pictures])
        counts = np.bincount(values, minlength=256)
        share = counts[counts > 0] / counts.sum()
        assert level["usage"] == pytest.approx((counts > 0).mean(), abs=1e-4)
        assert level["entropy_bits"] == pytest.approx(-(share * np.log2(share)).sum(), abs=1e-3)
        assert level["perplexity"] == pytest.approx(2 ** -(share * np.log2(share)).sum(), abs=0.1)
        assert level["codes_kept"] == 1.0
        assert level["entropy_bits"] < level["adaptive_bits"]
    adaptive = sum(level["adaptive_bits"] for level in figures["levels"])
    assert figures["adaptive_bits_per_pixel"] == pytest.approx(adaptive, abs=0.01)


def test_prefixes_of_levels(pictures: Pictures) -> None:
    prefixes = measure(Exact(), pictures)[0]["prefixes"]
    assert [(p["levels"], p["bits_per_pixel"]) for p in prefixes] == [(1, 8.0), (2, 16.0), (3, 24.0)]
    for n, prefix in enumerate(prefixes[:2], 1):
        error = sum(float((x[n:].astype(float) ** 2).sum()) for x in pictures) / (3 * pictures.pixels)
        assert prefix["psnr_of_mean_error_db"] == pytest.approx(10 * math.log10(255**2 / error), abs=2e-3)
    assert prefixes[2]["psnr_of_mean_error_db"] == 60.0


def test_a_tokenizer_that_does_not_keep_its_codes(pictures: Pictures) -> None:
    figures, psnrs = measure(Means(), pictures)
    assert figures["prefixes"] == []
    tokens = sum(-(-h // 4) * -(-w // 4) for h, w in SIZES)
    assert figures["tokens"] == tokens
    assert figures["bits_per_pixel"] == pytest.approx(tokens * math.log2(17) / pictures.pixels, abs=1e-6)
    assert figures["codes_kept"] < 0.2
    assert max(psnrs) < 40
    back = reconstruct(Means(), pictures, 1)
    a, b = (torch.from_numpy(pictures[1]).float()[None] / 255, back.float()[None] / 255)
    assert float(psnr(a, b)[0]) == pytest.approx(psnrs[1], abs=1e-4)
    assert figures["speed"]["threads"] == torch.get_num_threads()
    assert all(value > 0 for value in figures["speed"].values())


def test_alpha_is_seen_on_white(tmp_path: Path) -> None:
    rgba = np.concatenate([drawing(24, 30, 1), np.linspace(0, 255, 24 * 30).reshape(1, 24, 30).astype(np.uint8)])
    media.write_image(tmp_path / "see-through.png", rgba)
    pictures = Pictures(choose(tmp_path)[0])
    assert pictures[0].shape == (3, 24, 30)
    assert np.array_equal(pictures.with_alpha(0), rgba)
    alpha, opaque = measure(Alpha(), pictures)[0], measure(Exact(), pictures)[0]
    assert opaque["psnr_mean_db"] == 60.0
    assert alpha["psnr_mean_db"] > 50  # two ways of rounding "over"
    assert (alpha["codes_kept"], len(alpha["levels"])) == (1.0, 4)


# --- the set of pictures


def test_pictures_of_folders_and_manifests(folder: Path, tmp_path: Path) -> None:
    found, split = choose(folder)
    assert ([x.document for x in found], split) == (["0", "1", "2", "3"], None)
    assert {x.document for x in choose(folder, limit=2)[0]} < {"0", "1", "2", "3"}
    assert choose(folder, limit=2) == choose(folder, limit=2)
    own = {split_of(x) for x in "0123"}
    for name in ("train", "val", "test"):
        if name in own:
            assert [x.document for x in choose(folder, name)[0]] == [x for x in "0123" if split_of(x) == name]
        else:
            with pytest.raises(DataError, match=f"no image in split '{name}'"):
                choose(folder, name)
    manifest = tmp_path / "images.jsonl"
    lines = [
        {"id": f"{s}-{i}", "split": s, "segments": [{"type": "image", "path": str(folder / f"{i}.png")}]}
        for s in ("train", "val", "test")
        for i in range(2)
    ]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, split = choose(manifest)
    assert (sorted(x.document for x in found), split) == (["val-0", "val-1"], "val")
    manifest.write_text(json.dumps(lines[-1]) + "\n")
    with pytest.raises(DataError, match="no image in split 'val'"):
        choose(manifest)
    assert [x.document for x in choose(manifest, "test")[0]] == ["test-1"]
    with pytest.raises(DataError, match="no image in it"):
        choose(tmp_path)


def test_pictures_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(DataError, match=r"none of 2 pictures can be read; the first: .*a\.png"):
        Pictures(choose(tmp_path)[0])
    media.write_image(tmp_path / "c.png", drawing(20, 30, 0))
    pictures = Pictures(choose(tmp_path)[0], size=32)
    assert (pictures.names, pictures.sizes, pictures.pixels) == (["c.png"], [(32, 32)], 1024)
    assert [line.split(":")[0] for line in pictures.unreadable] == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert np.array_equal(pictures[0], media.fit_image(drawing(20, 30, 0), 32))
    assert len(list(pictures)) == len(pictures) == 1
    with pytest.raises(DataError, match="got no pictures"):
        Pictures([])


# --- peers


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
    pictures = Pictures(choose(folder)[0], size=32)
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
    pictures = Pictures(choose(folder)[0], size=32)
    one = baselines.sweeps("JPEG", pictures, [])["mosaic"]
    monkeypatch.setattr(baselines, "MOSAIC_SIDE", 64)
    assert baselines.sweeps("JPEG", pictures, [])["mosaic"] == one
    pictures._items, pictures.sizes, pictures._kept = (5 * x for x in (pictures._items, pictures.sizes, pictures._kept))
    many = baselines.sweeps("JPEG", pictures, [])["mosaic"]
    assert [p["bits_per_pixel"] for p in many] == pytest.approx([p["bits_per_pixel"] for p in one], abs=1e-6)
    monkeypatch.setattr(baselines, "MOSAIC_SIDE", 63)
    assert list(baselines.sweeps("JPEG", pictures, [])) == ["file", "minus_blank"]


# --- the report


def test_a_report_of_true_sizes(pictures: Pictures) -> None:
    report, psnrs = image_report({"means": Means(), "exact": Exact()}, pictures, ["JPEG"])
    assert list(report["peers"]["JPEG"]) == ["file", "minus_blank"]
    means, exact = report["tokenizers"]["means"], report["tokenizers"]["exact"]
    lowest = min(p["bits_per_pixel"] for p in report["peers"]["JPEG"]["file"])
    assert means["bits_per_pixel"] < lowest
    assert means["at_equal_bits"]["bits_per_pixel"]["JPEG"]["file"] == {"cannot_go_under": lowest}
    assert list(exact["at_equal_bits"]["adaptive_bits_per_pixel"]["JPEG"]) == ["file", "minus_blank"]
    equal = exact["at_equal_bits"]["adaptive_bits_per_pixel"]["JPEG"]["minus_blank"]
    assert equal.keys() == {"cannot_go_over"} or equal["psnr_of_mean_error_db"] < 60
    assert {name: len(values) for name, values in psnrs.items()} == {"means": 4, "exact": 4}
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    plot = rate_distortion(report)
    assert plot is not None
    with PILImage.open(io.BytesIO(plot)) as image:
        assert image.format == "PNG"
        assert (
            len(set(np.asarray(image.convert("RGB")).reshape(-1, 3).map(tuple) if False else image.getcolors(1 << 20)))
            > 9
        )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 60), min_size=1, max_size=40), st.integers(1, 5))
def test_best_median_and_worst(scores: list[float], each: int) -> None:
    groups = best_median_worst(scores, each)
    order = [i for _, group in groups for i in group]
    assert len(set(order)) == len(order)
    needed = {"best": 1, "median": 3, "worst": 2}
    assert [name for name, _ in groups] == [name for name, need in needed.items() if len(scores) >= need]
    shown = [scores[i] for i in order]
    assert shown == sorted(shown, reverse=True)
    assert (shown[0], shown[-1]) == (max(scores), min(scores))
    assert all(len(group) == max(1, min(each, len(scores) // 3)) for _, group in groups)
    if len(scores) % 2 and len(scores) >= 3:
        assert float(np.median(scores)) in [scores[i] for i in dict(groups)["median"]]


def test_a_contact_sheet_shows_the_pictures(pictures: Pictures) -> None:
    names = ["a", "страна/картина.png", "x" * 300, "\udce9.png"]
    shown = {}

    def back(name: str, index: int) -> np.ndarray:
        shown[name, index] = 255 - pictures[index]
        return shown[name, index]

    scores = {"one": [30.0, 20.0, 10.0, 25.0], "two": [1.0, 2.0, 3.0, 4.0]}
    sheet = contact_sheet(scores, names, pictures.__getitem__, back)
    assert sheet.dtype == np.uint8
    assert set(shown) == {(t, i) for t in scores for i in (0, 2, best_median_worst(scores["one"])[1][1][0])}

    def holds(small: np.ndarray) -> bool:
        factor = 160 // max(small.shape[1:])
        large = small.repeat(factor, 1).repeat(factor, 2)
        h, w = large.shape[1:]
        corners = np.argwhere((sheet[:, : -h + 1, : -w + 1] == large[:, :1, :1]).all(0))
        return any(np.array_equal(sheet[:, y : y + h, x : x + w], large) for y, x in corners)

    assert holds(pictures[0])
    assert all(holds(x) for x in shown.values())
    assert not holds(pictures[1] // 2 + 100)

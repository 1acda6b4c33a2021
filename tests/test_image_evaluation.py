"""Figures of image tokenizers: against plain twins, and for tokenizers known to be exact."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from drawings import drawing
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from torch import Tensor, nn

from mmtok import media
from mmtok.errors import DataError, MediaError
from mmtok.evaluation.closeness import Closeness, compare, notes, summarize
from mmtok.evaluation.images import image_report, measure, reconstruct
from mmtok.evaluation.metrics import psnr, ssim
from mmtok.evaluation.pictures import Pictures
from mmtok.evaluation.plots import best_median_worst, contact_sheet, rate_distortion
from mmtok.evaluation.sets import choose
from mmtok.image.tokenizer import ImageTokenizer
from mmtok.training.corpus import split_of

SIZES = ((33, 50), (41, 27), (20, 20), (9, 64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("pictures")
    for number, (height, width) in enumerate(SIZES):
        media.write_image(home / f"{number}.png", drawing(height, width, number))
    return home


@pytest.fixture(scope="module")
def pictures(folder: Path) -> Pictures:
    return Pictures(choose(folder, "image")[0])


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
    pictures = Pictures(choose(tmp_path, "image")[0])
    assert pictures[0].shape == (3, 24, 30)
    assert np.array_equal(pictures.with_alpha(0), rgba)
    alpha, opaque = measure(Alpha(), pictures)[0], measure(Exact(), pictures)[0]
    assert opaque["psnr_mean_db"] == 60.0
    assert alpha["psnr_mean_db"] > 50  # two ways of rounding "over"
    assert (alpha["codes_kept"], len(alpha["levels"])) == (1.0, 4)


# --- the set of pictures


def test_pictures_of_folders_and_manifests(folder: Path, tmp_path: Path) -> None:
    found, split = choose(folder, "image")
    assert ([x.document for x in found], split) == (["0", "1", "2", "3"], None)
    assert {x.document for x in choose(folder, "image", limit=2)[0]} < {"0", "1", "2", "3"}
    assert choose(folder, "image", limit=2) == choose(folder, "image", limit=2)
    own = {split_of(x) for x in "0123"}
    for name in ("train", "val", "test"):
        if name in own:
            assert [x.document for x in choose(folder, "image", name)[0]] == [x for x in "0123" if split_of(x) == name]
        else:
            with pytest.raises(DataError, match=f"no image in split '{name}'"):
                choose(folder, "image", name)
    manifest = tmp_path / "images.jsonl"
    lines = [
        {"id": f"{s}-{i}", "split": s, "segments": [{"type": "image", "path": str(folder / f"{i}.png")}]}
        for s in ("train", "val", "test")
        for i in range(2)
    ]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, split = choose(manifest, "image")
    assert (sorted(x.document for x in found), split) == (["val-0", "val-1"], "val")
    manifest.write_text(json.dumps(lines[-1]) + "\n")
    with pytest.raises(DataError, match="no image in split 'val'"):
        choose(manifest, "image")
    assert [x.document for x in choose(manifest, "image", "test")[0]] == ["test-1"]
    with pytest.raises(DataError, match="no image in it"):
        choose(tmp_path, "image")


def test_pictures_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(DataError, match=r"none of 2 pictures can be read; the first: .*a\.png"):
        Pictures(choose(tmp_path, "image")[0])
    media.write_image(tmp_path / "c.png", drawing(20, 30, 0))
    pictures = Pictures(choose(tmp_path, "image")[0], size=32)
    assert (pictures.names, pictures.sizes, pictures.pixels) == (["c.png"], [(32, 32)], 1024)
    assert [line.split(":")[0] for line in pictures.unreadable] == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert np.array_equal(pictures[0], media.fit_image(drawing(20, 30, 0), 32))
    assert len(list(pictures)) == len(pictures) == 1
    with pytest.raises(DataError, match="got no pictures"):
        Pictures([])


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

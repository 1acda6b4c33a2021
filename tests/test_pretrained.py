"""The bundled checkpoints are the ones that were measured: fingerprints, golden codes, size, and what they can do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import mmtok
from mmtok.checkpoints import bundled_directory
from mmtok.evaluation.metrics import psnr, stoi
from mmtok.multimodal import MultimodalTokenizer

NAMES = ("text-4k", "text-16k", "image-64-f8", "image-f4", "audio-16k", "any-to-any")
FINGERPRINTS = {
    "text-4k": "089043c5db97712fdfc1f566d8d561d4432e998b9cb3f50657c8085e6405d8fb",
    "text-16k": "af7cb69090ccae52427cc2557aafbb8a8c3473992f5bccbf4f1dc408c50e6909",
    "image-64-f8": "8cf5c8aebce7933d7ff5e488a58c66c145822bdf80a3320f5d7ca63ac2f4dd95",
    "image-f4": "2529c07e3a7f381dd3211e6e599085dde58f0e93a508c088eeabaf2d9fad3d8a",
    "audio-16k": "1e522146e2136e34d43c107dc160b31f6cb7d2757c70522572185fe9ea17cf39",
}


def picture() -> np.ndarray:
    """A red disc on a gradient, uint8 [3, 64, 64]."""
    y, x = np.mgrid[0:64, 0:64]
    disc = ((y - 32) ** 2 + (x - 32) ** 2 < 400)[None]
    ground = np.stack([255 - x, 255 - y // 2, x * 0 + 240])
    return np.where(disc, np.array([220, 40, 30])[:, None, None], ground).astype(np.uint8)


def chirp() -> np.ndarray:
    """A rising tone, float32 [1, 9600] at 16 kHz."""
    t = np.arange(9600) / 16_000
    return (0.5 * np.sin(2 * np.pi * (150 + 400 * t) * t) * np.hanning(9600)).astype(np.float32)[None]


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_fingerprint(name: str) -> None:
    assert mmtok.load(name).fingerprint == FINGERPRINTS[name]


def test_golden_text_ids() -> None:
    ids = mmtok.load("text-4k").encode(["a cow", "Une vache à l’école 🐄 <image>"])
    assert ids[0].tolist() == [64, 416, 86]
    assert ids[1].tolist() == [
        2077, 372, 64, 732, 220, 1031, 293, 2662, 638, 360, 275, 220, 172, 253, 238, 226, 478, 452, 686, 29
    ]  # fmt: skip


def test_golden_ids_of_text_16k() -> None:
    tokenizer = mmtok.load("text-16k")
    texts = ["a cow", "Une vache à l’école 🐄 <image>", "नमस्ते दुनिया, Привет мир, 你好世界"]
    ids = tokenizer.encode(texts)
    assert [x.tolist() for x in ids] == [
        [64, 305, 552],
        [52, 598, 317, 4823, 1168, 297, 1232, 2874, 6084, 220, 172, 253, 238, 226, 501, 13025, 29],
        [
            655, 915, 723, 1332, 509, 2244, 3377, 3315, 14485, 10091, 1463, 772, 666, 910, 11, 220, 4730, 13349, 450,
            244, 2908, 234,
        ],
    ]  # fmt: skip
    assert tokenizer.decode(ids) == texts
    assert tokenizer.codebook_sizes == (16_000,)


# Another processor may add in another order: a code or two may fall to its neighbour, not more.
def test_golden_image_codes() -> None:
    codes = mmtok.load("image-64-f8").encode(torch.from_numpy(picture())[None])[0].numpy()
    golden = [
        [433, 1818, 1818, 539, 539, 1583, 1417, 1706], [1059, 1049, 369, 1485, 271, 992, 1558, 1417],
        [2019, 369, 478, 1608, 1608, 773, 1359, 1417], [1683, 1824, 1608, 1608, 1608, 1858, 596, 714],
        [853, 1824, 1608, 1608, 1608, 1608, 1407, 714], [1766, 1079, 773, 1608, 1608, 773, 1677, 1747],
        [583, 789, 130, 1111, 1914, 846, 375, 912], [848, 848, 335, 1355, 1355, 1747, 168, 168],
    ]  # fmt: skip
    assert (codes == np.array(golden)).mean() > 0.95


def test_golden_codes_of_image_f4() -> None:
    codes = mmtok.load("image-f4").encode(torch.from_numpy(picture())[None])[0].numpy()
    assert codes.shape == (16, 16)
    golden = [
        [306, 306, 228, 20, 334, 334, 334, 334, 334, 334, 334, 334, 660, 313, 95, 926],
        [306, 924, 228, 76, 334, 334, 334, 334, 334, 334, 334, 334, 660, 949, 95, 926],
        [306, 924, 220, 592, 334, 334, 334, 334, 334, 334, 334, 334, 660, 926, 95, 926],
    ]  # fmt: skip
    assert (codes[6:9] == np.array(golden)).mean() > 0.95


def test_golden_audio_codes() -> None:
    codes = mmtok.load("audio-16k").encode(torch.from_numpy(chirp())[None])[0].numpy()
    assert codes.shape == (12, 30)
    golden = [
        [292, 292, 292, 392, 392, 292, 292, 292, 292, 292], [720, 90, 759, 759, 759, 759, 759, 377, 377, 301],
        [961, 89, 961, 773, 659, 220, 537, 495, 264, 715], [430, 430, 430, 543, 235, 430, 430, 430, 304, 430],
    ]  # fmt: skip
    assert (codes[:4, 10:20] == np.array(golden)).mean() > 0.85


def test_a_picture_stays_recognisable() -> None:
    tokenizer = mmtok.load("image-64-f8")
    x = torch.from_numpy(picture())[None]
    assert psnr(x.float() / 255, tokenizer.decode(tokenizer.encode(x)).float() / 255)[0] > 20


def test_a_sound_stays_intelligible() -> None:
    codec = mmtok.load("audio-16k")
    x = torch.from_numpy(chirp())[None]
    assert stoi(x, codec.decode(codec.encode(x), x.shape[-1]), 16_000)[0] > 0.5


def test_rows_do_not_depend_on_their_batch() -> None:
    image, audio = mmtok.load("image-64-f8"), mmtok.load("audio-16k")
    x = torch.from_numpy(np.stack([picture(), picture()[:, ::-1].copy(), 255 - picture()]))
    assert torch.equal(image.encode(x)[1], image.encode(x[1:2])[0])
    y = torch.from_numpy(np.stack([chirp(), chirp()[:, ::-1].copy()]))
    assert torch.equal(audio.encode(y)[1], audio.encode(y[1:])[0])


def test_the_model_belongs_to_the_tokenizers() -> None:
    mm = MultimodalTokenizer.load("any-to-any")  # checks every fingerprint
    assert {t.name: t.fingerprint for t in mm.registry.tokenizers} == {
        name: FINGERPRINTS[name] for name in ("text-4k", "image-64-f8", "audio-16k")
    }


def test_size_and_cards() -> None:
    home = bundled_directory()
    assert sorted(p.parent.name for p in home.glob("*/mmtok.json")) == sorted(NAMES)
    assert sum(p.stat().st_size for p in home.rglob("*") if p.is_file()) < 24 * 2**20
    for name in NAMES:
        card = (home / name / "README.md").read_text(encoding="utf-8")
        for heading in ("## Data", "## Training", "## Figures", "## Limits"):
            assert heading in card, (name, heading)


def test_cards_quote_the_benchmarks() -> None:
    """Every figure in a card's table of figures stands in benchmarks/results."""
    home = Path(__file__).resolve().parent.parent
    results = [json.loads(p.read_text()) for p in sorted((home / "benchmarks" / "results").glob("*.json"))]
    numbers = {json.dumps(x) for x in _numbers(results)}
    for name in NAMES:
        section = (
            (home / "pretrained" / name / "README.md")
            .read_text(encoding="utf-8")
            .split("## Figures")[1]
            .split("\n## ")[0]
        )
        rows = [line for line in section.splitlines() if line.startswith("|") and any(c.isdigit() for c in line)]
        assert rows, name
        for row in rows:
            for cell in row.strip("|").split("|")[1:]:
                if cell.strip() not in ("", "-"):
                    assert cell.strip() in numbers, (name, row, cell)


def _numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        return [n for v in value.values() for n in _numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in _numbers(v)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_a_callers_autocast_changes_nothing() -> None:
    image, audio = mmtok.load("image-64-f8"), mmtok.load("audio-16k")
    x, y = torch.from_numpy(picture())[None], torch.from_numpy(chirp())[None]
    outside = image.encode(x), audio.encode(y), audio.decode(audio.encode(y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = image.encode(x), audio.encode(y), audio.decode(audio.encode(y))
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))

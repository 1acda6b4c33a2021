"""The page about a dataset: its numbers are right, its pictures and sounds are those of the ids, nothing breaks it."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import tarfile
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import commands
import numpy as np
import pytest
import soundfile
import token_sets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from mmtok import media
from mmtok.datasets.records import Record
from mmtok.datasets.report import charts, write_report
from mmtok.datasets.report.markup import escaped, tag
from mmtok.datasets.report.samples import choose
from mmtok.datasets.report.statistics import CONTEXTS, STEPS, Sizes, gather, usage
from mmtok.datasets.shards import TokenDataset, write_dataset
from mmtok.evaluation.plots import spectrogram
from mmtok.multimodal import MultimodalTokenizer
from mmtok.registry import MODALITIES

EVIL = "<script>alert(1)</script></style></title>\"'><img src=x onerror=alert(2)>&amp;\x00\x1b\ud800‮"
VOID = ("img", "meta", "br")


class Page(HTMLParser):
    """A page, read strictly: its elements, and the text of each kind of them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(path.read_bytes().decode("utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, {k: v or "" for k, v in attributes}))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, name: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.tags if tag == name]

    def text(self, name: str) -> list[str]:
        return [data for tag, data in self.texts if tag == name]


def pixels(image: dict[str, str]) -> np.ndarray:
    """uint8 [3, H, W] of an img."""
    data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
    return np.asarray(PILImage.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)


def sound(audio: dict[str, str]) -> tuple[np.ndarray, int]:
    """float32 [T] and the rate of an audio element."""
    return soundfile.read(io.BytesIO(base64.b64decode(audio["src"].removeprefix("data:audio/wav;base64,"))))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MultimodalTokenizer]:
    """A folder with tokenizers, media and the dataset d."""
    folder = tmp_path_factory.mktemp("report")
    mm = token_sets.save_tokenizers(folder)
    documents = token_sets.save_media(folder / "media")
    quarantine = [
        {"index": 9, "id": EVIL, "segment": 0, "reason": f"{EVIL}.png: {EVIL}"},
        *({"index": i, "id": f"q{i}", "segment": 0, "reason": f"/a/{i}.png: no such file"} for i in range(4)),
    ]
    records = [token_sets.record(mm, x) for x in documents]
    write_dataset(folder / "d", mm.registry, records, 200, {"source": EVIL}, quarantine)
    return folder, mm


def test_the_page_stands_alone(made: Any, tmp_path: Path) -> None:
    about = write_report(TokenDataset.open(made[0] / "d"), tmp_path / "r.html", spectrogram=spectrogram)
    page = Page(tmp_path / "r.html")
    assert about["bytes"] == (tmp_path / "r.html").stat().st_size
    names = {name for name, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    for _, attributes in page.tags:
        assert not any(key.startswith("on") or key in ("href", "style", "action") for key in attributes)
        assert attributes.get("src", "data:").startswith("data:")
    assert "url(" not in "".join(page.text("style"))
    assert "@import" not in "".join(page.text("style"))
    (policy,) = [x["content"] for x in page.all("meta") if "http-equiv" in x]
    assert policy.startswith("default-src 'none'")
    assert page.tags[0] == ("html", {"lang": "en"})
    assert {"charset": "utf-8"} in page.all("meta")
    assert all(image["alt"] for image in page.all("img"))
    assert all(x["aria-label"] and "controls" in x for x in page.all("audio"))
    assert all(x["scope"] for x in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))


def test_nothing_from_the_data_is_markup(made: Any, tmp_path: Path) -> None:
    folder, mm = made
    documents = [
        {"id": EVIL, "segments": [{"type": "text", "text": EVIL.replace("\ud800", "")},
         {"type": "image", "path": str(folder / "media/picture0.png")}], EVIL: {EVIL: EVIL}},
        {"id": "gone", "segments": [{"type": "image", "path": str(folder / "media/picture1.png")}]},
    ]  # fmt: skip
    records = [token_sets.record(mm, x) for x in documents]
    records[1].meta["segments"][0]["path"] = f"/nowhere/{EVIL.replace(chr(0), '')}.png"
    plain = [token_sets.record(mm, {**documents[0], "id": "x", "y": 1}), records[1]._replace(meta={"id": "gone"})]
    for name, content in (("evil", records), ("plain", plain)):
        for spoilt in content:  # as json.loads gives it
            spoilt.meta.setdefault("segments", [])
        shutil.rmtree(folder / "e", ignore_errors=True)
        write_dataset(folder / "e", mm.registry, content)
        write_report(TokenDataset.open(folder / "e"), tmp_path / f"{name}.html")
    evil, plain_page = Page(tmp_path / "evil.html"), Page(tmp_path / "plain.html")
    assert [name for name, _ in evil.tags] == [name for name, _ in plain_page.tags]
    (title,) = [x for x in evil.text("h3") if "gone" not in x]
    assert title == EVIL.replace("\x00", "␀").replace("\x1b", "␛").replace("\ud800", "\\ud800")
    (quote,) = evil.text("blockquote")
    assert quote == EVIL.replace("\x00", "␀").replace("\x1b", "␛").replace("\ud800", "")
    assert any(EVIL[:30] in x["alt"] for x in evil.all("img"))
    assert any("/nowhere/<script>" in x for x in evil.text("p"))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(), st.text(alphabet=st.characters(codec=None)))
def test_text_comes_back_from_the_page(text: str, attribute: str) -> None:
    class Reader(HTMLParser):
        got: tuple[str, str] = ("", "")

        def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
            assert name == "p"
            self.got = (attributes[0][1] or "", "")

        def handle_data(self, data: str) -> None:
            self.got = (self.got[0], self.got[1] + data)

    reader = Reader()
    page = tag("p", text, title=attribute)
    page.encode("utf-8")
    reader.feed(page)
    reader.close()

    def visible(x: str) -> str:
        x = re.sub("[\x00-\x08\x0b-\x1f]", lambda m: chr(0x2400 + ord(m[0])), x).replace("\x7f", "\u2421")
        return "".join(f"\\u{ord(c):04x}" if "\ud800" <= c <= "\udfff" else c for c in x)

    assert reader.got == (visible(attribute), visible(text))
    assert escaped(escaped(text)) == escaped(text)


def test_pictures_and_sounds_are_those_of_the_ids(made: Any, tmp_path: Path) -> None:
    folder, mm = made
    dataset = TokenDataset.open(folder / "d")
    write_report(dataset, tmp_path / "r.html", samples=6)
    page = Page(tmp_path / "r.html")
    images, sounds, texts = page.all("img"), page.all("audio"), page.text("blockquote")
    media_of = {"image": [], "audio": []}
    for number in range(len(dataset)):
        meta = dataset.meta(number)
        for row in dataset.spans(number):
            span = next(x for x in mm.grammar.spans(dataset[number]) if x.start == row[0])
            size = (int(row[4]), int(row[5])) if span.kind == "image" else None
            decoded = mm.decode_span(dataset[number], span, size)
            if span.kind == "text":
                assert decoded.text == texts.pop(0)
                continue
            media_of[span.kind].append((meta["segments"][row[3]], decoded))
    assert not texts
    assert len(images) == 2 * len(media_of["image"]) == 8
    for i, (segment, decoded) in enumerate(media_of["image"]):
        assert np.array_equal(pixels(images[2 * i]), media.read_image(segment["path"]))
        assert np.array_equal(pixels(images[2 * i + 1]), decoded.pixels)
    assert len(sounds) == 2 * len(media_of["audio"]) == 6
    for i, (segment, decoded) in enumerate(media_of["audio"]):
        original = media.read_audio(segment["path"], None, segment.get("start"), segment.get("end"))
        for element, samples in ((sounds[2 * i], original), (sounds[2 * i + 1], decoded.samples)):
            got, rate = sound(element)
            assert rate == 16000
            assert got.shape == samples[0].shape
            assert np.abs(got - np.clip(samples[0], -1, 1)).max() < 1e-4
    notes = page.text("p")
    assert any("24 bytes, as many as recorded" in x for x in notes)


def test_a_long_sound_is_cut_and_a_large_picture_made_smaller(made: Any, tmp_path: Path) -> None:
    folder, mm = made
    samples = np.random.default_rng(1).uniform(-0.1, 0.1, (1, 8000 * 13)).astype(np.float32)
    media.write_audio(tmp_path / "long.wav", samples, 8000)
    media.write_image(tmp_path / "large.png", np.full((3, 60, 120), 9, np.uint8))
    segments = [{"type": "audio", "path": str(tmp_path / "long.wav"), "start": 1.0, "end": 12.5},
                {"type": "image", "path": str(tmp_path / "large.png")}]  # fmt: skip
    shutil.rmtree(folder / "long", ignore_errors=True)
    token_sets.write(folder / "long", mm, [{"id": "long", "segments": segments}])
    write_report(TokenDataset.open(folder / "long"), tmp_path / "r.html", spectrogram=spectrogram)
    page = Page(tmp_path / "r.html")
    original, decoded = map(sound, page.all("audio"))
    assert (len(original[0]) / original[1], original[1]) == (10.0, 8000)
    assert np.abs(original[0] - samples[0, 8000:88000]).max() < 1e-4
    assert (len(decoded[0]) / decoded[1], decoded[1]) == (10.0, 16000)
    drawn = [pixels(x) for x in page.all("img")]
    assert [x.shape for x in drawn] == [(3, 160, 320), (3, 160, 320), (3, 60, 120), (3, 60, 120)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmtok.datasets.report.samples.SIDE", 40)
        write_report(TokenDataset.open(folder / "long"), tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert [pixels(x).shape for x in page.all("img")] == [(3, 20, 40), (3, 20, 40)]
    assert any("120x60 pixels, shown at 40x20" in x for x in page.text("p"))


def test_originals_in_a_tar(made: Any, tmp_path: Path) -> None:
    folder, mm = made
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(folder / "media/picture0.png", "cow.png")
    with tarfile.open(tmp_path / "a.tar") as tar:
        member = tar.getmember("cow.png")
    record = token_sets.record(
        mm, {"id": "x", "segments": [{"type": "image", "path": str(folder / "media/picture0.png")}]}
    )
    record.meta["segments"][0] |= {
        "path": str(tmp_path / "a.tar"), "offset": member.offset_data, "size": member.size, "name": "cow.png",
    }  # fmt: skip
    write_dataset(tmp_path / "d", mm.registry, [record])
    about = write_report(TokenDataset.open(tmp_path / "d"), tmp_path / "r.html")
    assert about["missing_originals"] == 0
    (image,) = Page(tmp_path / "r.html").all("img")
    assert np.array_equal(pixels(image), media.read_image(folder / "media/picture0.png"))


def test_what_is_gone_is_said(made: Any, tmp_path: Path) -> None:
    shutil.copytree(made[0] / "d", tmp_path / "d")
    about = write_report(TokenDataset.open(tmp_path / "d"), tmp_path / "r.html")
    assert "needs the tokenizer 'words'" in about["not_decoded"]
    page = Page(tmp_path / "r.html")
    assert any(about["not_decoded"] in x for x in page.text("p"))
    assert len(page.all("img")) == 4  # the originals alone
    documents = token_sets.save_media(tmp_path / "media")
    for name in made[1].tokenizers:
        shutil.copytree(made[0] / name, tmp_path / name)
    token_sets.write(tmp_path / "e", made[1], documents)
    shutil.rmtree(tmp_path / "media")
    about = write_report(TokenDataset.open(tmp_path / "e"), tmp_path / "r.html")
    assert (about["missing_originals"], about["not_decoded"]) == (7, "")
    page = Page(tmp_path / "r.html")
    assert len(page.all("img")) == 4  # what is decoded alone
    assert sum("not at hand: " in x and str(tmp_path / "media") in x for x in page.text("p")) == 7


def test_samples_have_each_modality_and_are_drawn_alike(made: Any, tmp_path: Path) -> None:
    mm = made[1]
    records = token_sets.noise_records(mm.registry, 300)
    rare = [token_sets.record(mm, x) for x in token_sets.save_media(tmp_path / "media")]
    records[17], records[211] = rare[5], rare[2]  # the only pictures, the only sounds
    write_dataset(tmp_path / "d", mm.registry, records, 2000)
    dataset = TokenDataset.open(tmp_path / "d")
    drawn = {}
    for seed in range(8):
        statistics = gather(dataset, seed)
        drawn[seed] = choose(dataset, statistics, 10, seed)
        assert {17, 211} <= set(drawn[seed])
        assert drawn[seed] == sorted(set(drawn[seed])) == choose(dataset, gather(dataset, seed), 10, seed)
        assert len(drawn[seed]) == 10
        assert max(np.diff([0, *drawn[seed], 300])) < 100  # spread
        assert choose(dataset, statistics, 0, seed) == []
    assert len({tuple(x) for x in drawn.values()}) > 6
    assert choose(dataset, gather(dataset), 1000, 0) == list(range(300))
    for name in ("a", "b"):
        write_report(dataset, tmp_path / name, seed=3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_sample_is_any_document_alike(made: Any, tmp_path: Path) -> None:
    """The document with a tokenizer is drawn while the dataset is read; none is preferred."""
    mm = made[1]
    write_dataset(tmp_path / "d", mm.registry, token_sets.noise_records(mm.registry, 8, 5), 30)
    dataset = TokenDataset.open(tmp_path / "d")
    assert len(dataset.shards) > 1
    counts = np.bincount([gather(dataset, seed).samples[0] for seed in range(800)], minlength=8)
    assert counts.min() > 60
    assert counts.max() < 140


def test_the_page_is_bounded(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = TokenDataset.open(made[0] / "d")
    monkeypatch.setattr("mmtok.datasets.report.samples.MEDIA_BYTES", 0)
    bare = write_report(dataset, tmp_path / "r.html", spectrogram=spectrogram)["bytes"]
    assert not Page(tmp_path / "r.html").all("img")
    monkeypatch.setattr("mmtok.datasets.report.samples.MEDIA_BYTES", 20_000)
    full = write_report(dataset, tmp_path / "r.html", spectrogram=spectrogram)["bytes"]
    assert bare < full < bare + 20_000 * 4 / 3 + 2000
    page = Page(tmp_path / "r.html")
    assert 0 < len(page.all("img")) < 14
    assert any("media already" in x for x in page.text("p"))
    many = [{"type": "text", "text": "a cow"} if i % 2 else {"type": "turn", "role": "user"} for i in range(100)]
    token_sets.write(made[0] / "m", made[1], [{"id": "m", "segments": [*many, {"type": "text", "text": "x" * 5000}]}])
    write_report(TokenDataset.open(made[0] / "m"), tmp_path / "r.html")
    assert any("and 92 more segments" in x for x in Page(tmp_path / "r.html").text("p"))


def test_numbers_are_right(made: Any, tmp_path: Path) -> None:
    dataset = TokenDataset.open(made[0] / "d")
    r, statistics = dataset.registry, gather(dataset)
    ids = np.concatenate(list(dataset))
    assert np.array_equal(statistics.ids, np.bincount(ids, minlength=r.padded_size))
    words, pictures, sounds = (r.blocks_of(x) for x in ("words", "pictures", "sounds"))
    tokens = [sum(int(((ids >= b.start) & (ids < b.end)).sum()) for b in x) for x in (words, pictures, sounds)]
    assert statistics.modalities() == {
        "text": tokens[0], "image": tokens[1], "audio": tokens[2], "control": len(ids) - sum(tokens),
    }  # fmt: skip
    rows, sizes = np.concatenate([dataset.spans(i) for i in range(len(dataset))]), {}
    for i in range(3):
        mine = rows[rows[:, 2] == i]
        assert statistics.spans[i] == len(mine)
        assert statistics.span_tokens[i] == (mine[:, 1] - mine[:, 0]).sum()
        units = (mine[:, 4], mine[:, 4] * mine[:, 5], mine[:, 4] / np.maximum(1, mine[:, 5]))[i]
        sizes[i] = units
        assert statistics.units[i] == pytest.approx(units.sum())
    lengths = [len(x) for x in dataset]
    assert (statistics.lengths.number, statistics.lengths.total) == (len(dataset), dataset.tokens)
    assert (statistics.lengths.smallest, statistics.lengths.largest) == (min(lengths), max(lengths))
    has = [{MODALITIES[k] for k in dataset.spans(i)[:, 2]} for i in range(len(dataset))]
    for kind, count in statistics.kinds.items():
        names = {m for i, m in enumerate(MODALITIES) if kind >> i & 1}
        assert count == has.count(names)
    assert sum(statistics.kinds.values()) == len(dataset)
    assert statistics.reasons.most_common(1) == [("no such file", 4)]
    write_report(dataset, tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    cells = [*page.text("td"), *page.text("th")]
    for value in (f"{dataset.tokens}", "4", "no such file", f"{sizes[1].sum()} pixels", f"{sizes[0].sum()} bytes"):
        assert value in [x.replace(",", "") for x in cells]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.floats(0.001, 1e9), max_size=5), max_size=5), st.sampled_from([1.0, 2.0**-6]))
def test_sizes_count_each_number_in_its_bin(groups: list[list[float]], least: float) -> None:
    sizes = Sizes(least)
    for group in groups:
        sizes.add(np.array(group))
    values = [x for group in groups for x in group]
    assert sizes.number == sizes.counts.sum() == len(values)
    if not values:
        return
    assert sizes.mean == pytest.approx(np.mean(values))
    assert (sizes.smallest, sizes.largest) == (min(values), max(values))
    for i in np.flatnonzero(sizes.counts).tolist():
        low, high = sizes.edge(i) * (1 - 1e-8) if i else 0, sizes.edge(i + 1)
        assert sum(low <= x < high for x in values) >= sizes.counts[i]


def test_a_power_of_two_begins_its_bin() -> None:
    for power in range(40):
        sizes = Sizes()
        sizes.add(np.array([2**power]))
        assert sizes.counts.argmax() == STEPS * power
        assert sizes.edge(STEPS * power) == 2**power


def test_documents_beyond_a_context(made: Any, tmp_path: Path) -> None:
    r = made[1].registry
    text = r.block("text").start
    lengths = [1024, 1025, 3000, 2048, 5]
    write_dataset(tmp_path / "d", r, [[r.bos] + [text] * (n - 2) + [r.eos] for n in lengths])
    statistics = gather(TokenDataset.open(tmp_path / "d"))
    for context in CONTEXTS:
        over = [n - context for n in lengths if n > context]
        assert statistics.beyond[context] == (len(over), sum(over))


def test_usage_of_a_codebook() -> None:
    assert usage(np.array([5, 5, 0, 0])) == (0.5, pytest.approx(2.0))
    assert usage(np.array([3, 3, 3, 3])) == (1.0, pytest.approx(4.0))
    assert usage(np.array([0, 0])) == (0.0, 0.0)
    p = np.array([0.5, 0.25, 0.25])
    assert usage(np.array([4, 2, 2]))[1] == pytest.approx(math.exp(-(p * np.log(p)).sum()))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data())
def test_charts_are_well_formed_and_within_their_frame(data: st.DataObject) -> None:
    sizes = Sizes(data.draw(st.sampled_from([1.0, 2.0**-6])))
    sizes.add(np.array(data.draw(st.lists(st.floats(1, 1e12), min_size=1, max_size=20))))
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 10**9)), min_size=1))
    counts = np.zeros((128, 128), np.int64)
    for row, column, count in pairs:
        counts[row, column] += count
    share = st.floats(0, 1)
    rows = data.draw(st.lists(st.tuples(st.text(), st.sampled_from(MODALITIES), share, share), min_size=1, max_size=9))
    parts = dict(zip(MODALITIES, data.draw(st.lists(st.integers(0, 10**12), min_size=1, max_size=3)), strict=False))
    drawn = [
        charts.histogram("<title>", sizes, "axis", "noun", str, "#123456", [(4.0, "50%"), (1e9, "&")]),
        charts.heatmap("map", counts, str, sizes.edge),
        charts.usages("usages", rows),
        charts.shares("shares", parts),
    ]
    for number, svg in enumerate(drawn):
        root = ElementTree.fromstring(svg)
        assert root.attrib["role"] == "img"
        width, height = (float(x) for x in root.attrib["viewBox"].split()[2:])
        boxes = [{k: float(x.attrib[k]) for k in ("x", "y", "width", "height")} for x in root.iter() if "rect" in x.tag]
        for box in boxes:
            assert -0.1 <= box["x"] <= box["x"] + box["width"] <= width + 0.2
            assert -0.1 <= box["y"] <= box["y"] + box["height"] <= height + 0.2
        wanted = [np.count_nonzero(sizes.counts), np.count_nonzero(counts), 3 * len(rows), 2 * len(parts)][number]
        assert len(boxes) == wanted


def test_bars_are_as_high_as_their_counts() -> None:
    sizes = Sizes()
    sizes.add(np.array([4] * 30 + [8] * 15 + [64] * 10))
    root = ElementTree.fromstring(charts.histogram("h", sizes, "tokens", "documents", lambda x: f"{x:.3g}", "#000"))
    bars = [x for x in root.iter() if "rect" in x.tag]
    heights = [float(x.attrib["height"]) for x in bars]
    assert heights == pytest.approx([heights[0], heights[0] / 2, heights[0] / 3], abs=0.1)
    titles = [next(iter(x)).text for x in bars]
    assert titles == ["4 to 5.66: 30 documents", "8 to 11.3: 15 documents", "64 to 90.5: 10 documents"]


def test_a_dataset_without_documents_and_one_of_bare_ids(made: Any, tmp_path: Path) -> None:
    r = made[1].registry
    write_dataset(made[0] / "none", r, [])
    assert write_report(TokenDataset.open(made[0] / "none"), tmp_path / "r.html")["samples"] == []
    Page(tmp_path / "r.html")
    write_dataset(made[0] / "bare", r, [record.ids for record in token_sets.noise_records(r, 3)])
    about = write_report(TokenDataset.open(made[0] / "bare"), tmp_path / "r.html")
    assert about["samples"] == [0, 1, 2]
    assert len(Page(tmp_path / "r.html").text("blockquote")) == 3
    broken = [Record(record.ids[:-1], record.spans, record.meta) for record in token_sets.noise_records(r, 3)]
    write_dataset(made[0] / "broken", r, broken)
    write_report(TokenDataset.open(made[0] / "broken"), tmp_path / "r.html")
    assert sum("breaks the grammar" in x for x in Page(tmp_path / "r.html").text("p")) == 3


def test_memory_does_not_grow(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtok.datasets.chunks.CHUNK_DOCUMENTS", 50)
    peaks = []
    for count in (100, 200, 1600):
        write_dataset(tmp_path / "d", made[1].registry, token_sets.noise_records(made[1].registry, count, 9), 500)
        dataset = TokenDataset.open(tmp_path / "d")
        tracemalloc.start()
        write_report(dataset, tmp_path / "r.html", samples=4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.2 * peaks[1], peaks


def test_the_command(made: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "r.html"
    arguments = ("dataset", "report", made[0] / "d", "-o", out, "--samples", 2, "--seed", 5)
    code, stdout, stderr = commands.run(*arguments, "--json", capsys=capsys)
    assert (code, stderr) == (0, "")
    report = json.loads(stdout)
    assert (report["documents"], report["quarantined"], report["bytes"]) == (6, 5, out.stat().st_size)
    assert len(report["samples"]) == len(Page(out).all("article")) == 2
    before = out.read_bytes()
    code, stdout, _ = commands.run(*arguments, capsys=capsys)
    assert code == 0
    assert f"written {out}" in stdout
    assert out.read_bytes() == before
    commands.refused("dataset", "report", made[0] / "media", "-o", tmp_path / "x.html", capsys=capsys)
    assert not (tmp_path / "x.html").exists()

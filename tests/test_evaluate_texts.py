"""``mmtok evaluate`` of text tokenizers: figures that can be counted by hand, and one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import contents, refused, run
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.evaluation.texts import encode_speed, language_of, texts_report
from mmtok.text import ByteLevelBPE, ByteLevelUnigram
from mmtok.text.probes import PROSE

TEXTS = (
    ("en", "train", "the cow"),
    ("en", "val", "a cow and a cow"),
    ("fr", "val", "une vache"),
    ("", "val", "корова стоит"),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("texts")
    ByteLevelBPE.train(["a cow and a cow"] * 9, 270).save(home / "small")
    ByteLevelUnigram.train([*PROSE] * 2, 320).save(home / "unigram")
    lines = [
        {"id": str(i), "split": split, **({"language": x} if x else {}), "segments": [{"type": "text", "text": text}]}
        for i, (x, split, text) in enumerate(TEXTS)
    ]
    (home / "texts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    folder = home / "folder"
    folder.mkdir()
    for i, text in enumerate(PROSE):
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    return home


def test_a_manifest(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, stdout, stderr = run(
        "evaluate", home / "small", home / "unigram", "--data", home / "texts.jsonl", "--out", tmp_path, "--json",
        capsys=capsys,
    )  # fmt: skip
    assert (code, stderr) == (0, "")
    report = json.loads(stdout)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (report["texts"], report["split"], report["unreadable"]) == (3, "val", [])
    small = ByteLevelBPE.load(home / "small")
    figures = report["tokenizers"]["small"]
    assert figures["fingerprint"] == small.fingerprint
    assert (figures["documents"], figures["identical"], figures["vocabulary"]) == (3, 3, small.codebook_sizes[0])
    ids = {x: small.encode([text])[0] for x, split, text in TEXTS if split == "val"}
    assert figures["unused_ids"] == small.codebook_sizes[0] - len({i for own in ids.values() for i in own.tolist()})
    assert list(figures["languages"]) == ["Cyrillic script", "en", "fr"]
    english = figures["languages"]["en"]
    assert english["tokens"] == len(ids["en"])
    assert english["bytes_per_token"] == pytest.approx(15 / len(ids["en"]), abs=5e-4)
    assert english["tokens_per_word"] == pytest.approx(len(ids["en"]) / 5, abs=5e-4)
    cyrillic = figures["languages"]["Cyrillic script"]
    assert (cyrillic["tokens"], cyrillic["tokens_per_character"]) == (23, pytest.approx(23 / 12, abs=5e-4))
    each = [x["bytes_per_token"] for x in figures["languages"].values()]
    assert figures["mean_of_languages"] == pytest.approx(sum(each) / 3, abs=5e-4)
    assert figures["speed"]["ratio"] > 0
    assert figures["speed"]["engine"] == small.engine
    assert report["tokenizers"]["unigram"]["speed"]["engine"] == "tokenizers"


def test_a_folder_and_the_tables(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (home / "folder" / "no.txt").write_bytes(b"\xff\xff")
    code, stdout, stderr = run(
        "evaluate", home / "unigram", "--data", home / "folder", "--out", tmp_path, capsys=capsys
    )
    assert code == 0
    assert stderr.startswith("left out: ")
    assert "no.txt" in stderr
    lines = stdout.splitlines()
    assert lines[0].startswith(f"{len(PROSE)} texts, ")
    assert lines[0].endswith("1 unreadable")
    (row,) = [line.split() for line in lines if line.startswith("unigram")]
    assert row[1] == "320"
    assert f"{len(PROSE)}/{len(PROSE)}" in row
    assert any(line.startswith("Arabic script") for line in lines)
    assert lines[-1] == str(tmp_path / "report.json")
    assert sorted(contents(tmp_path)) == ["report.json"]


def test_limit_takes_the_same_texts_each_time(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    reports = []
    for _ in range(2):
        arguments = ("--data", home / "folder", "--limit", 5, "--out", tmp_path, "--json")
        code, stdout, _ = run("evaluate", home / "small", *arguments, capsys=capsys)
        reports.append(json.loads(stdout))
        assert (code, reports[-1]["texts"]) == (0, 5)
        del reports[-1]["tokenizers"]["small"]["speed"]
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("tokenizers", "options", "says"),
    [
        (["small"], ["--data", "none.jsonl"], "none.jsonl"),
        (["small"], ["--data", "texts.jsonl", "--split", "holdout"], "no text in split 'holdout'"),
        (["small"], ["--data", "empty"], "empty: no text in it"),
        (["small"], ["--data", "texts.jsonl", "--size", "64"], "got --size 64 for text tokenizers, expected none"),
        (
            ["small"],
            ["--data", "texts.jsonl", "--peers", "opus"],
            "got --peers opus for text tokenizers, expected none",
        ),
        (
            ["small", "image-64-f8"],
            ["--data", "texts.jsonl"],
            "small for text, image-64-f8 for image; expected all for",
        ),
    ],
)
def test_bad_usage(
    tokenizers: list[str], options: list[str], says: str, home: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    monkeypatch.chdir(home)
    (home / "empty").mkdir(exist_ok=True)
    before = contents(home)
    assert says in refused("evaluate", *tokenizers, *options, capsys=capsys)
    assert contents(home) == before


@given(st.text(max_size=80))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_every_text_has_a_script_or_no_letters(text: str) -> None:
    found = language_of({}, {"text": text})
    assert found.endswith(" script") == any(c.isalpha() for c in text)


def test_what_names_a_language_comes_first() -> None:
    assert language_of({"language": "fr"}, {"text": "корова"}) == "fr"
    assert language_of({"language": "fr"}, {"text": "корова", "language": "uk"}) == "uk"
    assert language_of({}, {"text": "корова a"}) == "Cyrillic script"
    assert language_of({}, {"text": "一 二 a 三"}) == "Cjk script"
    assert language_of({}, {"text": "123 !"}) == "no letters"


def test_nothing_at_all() -> None:
    report = texts_report(ByteLevelBPE.train([], 256), [])
    assert (report["documents"], report["unused_ids"], report["languages"]) == (0, 256, {})


def test_speed_is_beside_that_of_tokenizers() -> None:
    model = ByteLevelBPE.train(list(PROSE) * 3, 400)
    speed = encode_speed(model, list(PROSE) * 50)
    assert speed["ratio"] == pytest.approx(
        speed["megabytes_per_second"] / speed["tokenizers_megabytes_per_second"], rel=0.1
    )

"""recipes/text.py on every kind of source, its balance of languages, and the texts of recipes/prepare.py."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from test_recipes import recipe, run

import mmtok
from mmtok.evaluation.texts import read_texts
from mmtok.text import ByteLevelBPE, ByteLevelUnigram
from mmtok.text.probes import PROSE
from mmtok.training.corpus import split_of

LANGUAGES = {"en": 40, "fr": 20, "el": 5}
SENTENCES = {"en": PROSE[0], "fr": PROSE[1], "el": PROSE[8]}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [
        {"id": f"{x}{i}", "split": "val" if i == 0 else "train", "language": x,
         "segments": [{"type": "text", "text": f"{SENTENCES[x]} {i}"}]}
        for x, n in LANGUAGES.items() for i in range(n + 1)
    ]  # fmt: skip
    lines.append({"id": "held-out", "split": "test", "segments": [{"type": "text", "text": "QQQQ " * 500}]})
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return path


@pytest.mark.parametrize(("model", "kind"), [("bpe", ByteLevelBPE), ("unigram", ByteLevelUnigram)])
def test_a_manifest(manifest: Path, model: str, kind: type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("text", "--data", manifest, "--out", tmp_path, "--vocab-size", 300, "--model", model)
    trained = mmtok.load(tmp_path / "model")
    assert isinstance(trained, kind)
    assert 256 < trained.codebook_sizes[0] <= 300
    assert b"QQ" not in trained._id_to_bytes, "the test split is never read"
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert figures["val"]["documents"] == figures["val"]["identical"] == 3
    told = capsys.readouterr().out
    for language, size in LANGUAGES.items():
        (row,) = [line.split() for line in told.splitlines() if line.startswith(f"{language} ")]
        val = SENTENCES[language] + " 0"
        (ids,) = trained.encode([val])
        assert int(row[1]) == figures["languages"][language]["train_bytes"]
        assert int(row[1]) == pytest.approx(size * len(val.encode()), rel=0.02)
        assert int(row[4]) == len(val.encode())
        assert float(row[5]) == pytest.approx(len(val.encode()) / len(ids), abs=5e-4)


def test_folders_text_files_and_parquet(manifest: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "folder" / "below").mkdir(parents=True)
    for i in range(30):
        (tmp_path / "folder" / "below" / f"{i}.txt").write_text(f"the red cow {i}\n", encoding="utf-8")
    (tmp_path / "big.txt").write_text("une grande vache\n" * 50_000, encoding="utf-8")
    rows = {"content": ["η αγελάδα"] * 50, "language": ["el"] * 50, "noise": ["zzzzzz"] * 50}
    parquet.write_table(pyarrow.table(rows), tmp_path / "rows.parquet")
    texts = list(read_texts(tmp_path / "big.txt"))
    assert "".join(x.text for x in texts) == "une grande vache\n" * 50_000
    assert all(x.text.endswith("\n") and len(x.text) < 70_000 for x in texts)
    assert {x.split for x in texts} >= {"train"}
    sources = [tmp_path / x for x in ("folder", "big.txt")]
    run("text", "--data", *sources, "--out", tmp_path / "one", "--vocab-size", 290)
    assert list(json.loads((tmp_path / "one" / "metrics.json").read_text())["languages"]) == ["Latin script"]
    run("text", "--data", tmp_path / "rows.parquet", "--columns", "text=content", "--out", tmp_path / "two")
    model = mmtok.load(tmp_path / "two" / "model")
    assert len(model.encode(["η αγελάδα"])[0]) < 5
    assert b"zz" not in model._id_to_bytes
    assert list(json.loads((tmp_path / "two" / "metrics.json").read_text())["languages"]) == ["el"]


def test_the_balance_of_languages(manifest: Path) -> None:
    module = recipe("text")
    sizes = {"large": 8_000_000, "middle": 500_000, "small": 20_000}
    often = module.repeats(sizes, 0.5, 1_000_000)
    taken = {x: often[x] * n for x, n in sizes.items()}
    assert taken["large"] / taken["middle"] == pytest.approx(4)  # the square root of 16
    assert sum(taken.values()) == pytest.approx(1_000_000)
    assert module.repeats(sizes, 0.0, 10**9)["small"] == module.MAX_REPEATS
    assert module.repeats(sizes, 1.0, 10**9) == pytest.approx(dict.fromkeys(sizes, 1.0))
    texts = [x for x in read_texts(manifest) if x.split == "train" and x.language != "Latin script"]
    often = {"en": 0.5, "fr": 1.0, "el": 2.25}
    chosen = list(module.chosen(iter(texts), often))
    assert chosen == list(module.chosen(iter(texts), often))
    count = {x: sum(text.startswith(SENTENCES[x]) for text in chosen) for x in LANGUAGES}
    assert count["fr"] == 20
    assert 8 <= count["en"] <= 32
    assert 10 <= count["el"] <= 15


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "none.jsonl"], "none.jsonl"),
        (["--data", "empty"], "no text in split 'train'"),
        (["--data", "empty", "--vocab-size", "3"], "no text"),
        (["--data", "here.txt", "--vocab-size", "3"], "got vocab_size 3, expected at least 256"),
        (["--data", "bad.txt"], "bad.txt: cannot be read as text (it is not UTF-8)"),
    ],
)
def test_one_line_for_what_cannot_be_trained_on(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "here.txt").write_text("a cow\n")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SystemExit) as stop:
        run("text", *arguments, "--out", tmp_path / "out")
    assert says in str(stop.value)
    assert str(stop.value).startswith("text.py: ")
    assert "\n" not in str(stop.value)
    assert not (tmp_path / "out").exists()


# --- prepare.py


def test_the_text_of_a_manual_page() -> None:
    troff = r""".\" comment
.TH LS 1 "May 2022"
.SH ИМЯ
ls \- list \fIdirectory\/\fP contents
.SS "Large files"
.nf
Use \fB\-\-all\fP, it\(aqs \[u00E9]t\[u00E9]; a\ b \(bu c\&.
.BR open (2),
'br
C:\e\\n
"""
    lines = recipe("prepare").plain_manual(troff).splitlines()
    assert lines == [
        "ИМЯ", "ls - list directory contents", "Large files", "Use --all, it's été; a b • c.", "open (2),", r"C:\\n",
    ]  # fmt: skip


def test_texts_in_many_languages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = recipe("prepare")
    for name, locale, text in (
        ("manpages", "", "list files"), ("manpages-de", "de/", "Dateien auflisten"),
        ("manpages-zh", "zh_CN/", "列出文件"),
    ):  # fmt: skip
        page = tmp_path / name / f"usr/share/man/{locale}man1/ls.1.gz"
        page.parent.mkdir(parents=True)
        page.write_bytes(gzip.compress(f".SH NAME\n{text}\n".encode()))
    found = list(module.manuals(tmp_path))
    assert found == [
        ("manuals", "man1/ls.1", "en", "NAME\nlist files"), ("manuals", "man1/ls.1", "de", "NAME\nDateien auflisten"),
        ("manuals", "man1/ls.1", "zh_CN", "NAME\n列出文件"),
    ]  # fmt: skip

    page = '<page xmlns="http://projectmallard.org/1.0/"><info><desc>No.</desc></info><title>{}</title><p>{}</p></page>'
    for locale, title, text in (
        ("C", "Help", "Press <key>A</key>\n now."),
        ("hi", "सहायता", "Press <key>A</key> now."),
    ):
        place = tmp_path / module.HELP / locale / "gnome-help" / "keys.page"
        place.parent.mkdir(parents=True)
        place.write_text(page.format(title, text), encoding="utf-8")
    assert list(module.help_pages(tmp_path / module.HELP)) == [
        ("help", "gnome-help/keys", "en", "Help\n\nPress A now."), ("help", "gnome-help/keys", "hi", "सहायता"),
    ]  # fmt: skip

    monkeypatch.setattr(module, "LANGUAGES", ("en", "th"))
    place = tmp_path / module.MESSAGES
    place.mkdir(parents=True)
    english = {"@metadata": {"authors": []}, "save": "Save", "same": "OK", "stop": "Stop"}
    (place / "en.json").write_text(json.dumps(english))
    (place / "th.json").write_text(json.dumps({**english, "save": "บันทึก", "stop": "หยุด"}))
    dealt = {(key, locale): text for _, key, locale, text in module.messages(place)}
    assert sorted("\n".join(t for (_, x), t in dealt.items() if x == "en").split()) == ["OK", "Save", "Stop"]
    assert sorted("\n".join(t for (_, x), t in dealt.items() if x == "th").split()) == ["บันทึก", "หยุด"]
    where = {text: key for (key, _), texts in dealt.items() for text in texts.split()}
    assert where["Save"] == where["บันทึก"], "a message is in one document and split, whatever its language"

    lines = module.text_manifest(tmp_path, tmp_path)
    for line in lines:
        if line["source"] in ("manuals", "help", "messages"):
            key = line["id"].removeprefix(line["source"] + "/").rpartition("/")[0]
            assert line["split"] == split_of(key)
            assert line["language"] == line["segments"][0]["language"] in ("de", "en", "hi", "th", "zh")
        else:
            assert "language" not in line
    assert sum(line["source"] == "manuals" for line in lines) == 3

"""mmtok encode, decode and vocab migrate on small files: what comes back, and one clear line for every bad input."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import commands
import numpy as np
import pytest
import torch

from mmtok import media
from mmtok.checkpoints import bundled_directory
from mmtok.datasets.shards import TokenDataset, write_dataset
from mmtok.documents import Document, Image, load_segment
from mmtok.image import ImageVQVAE, ImageVQVAEConfig
from mmtok.multimodal import MultimodalTokenizer
from mmtok.registry import TokenizerSpec, VocabularyRegistry
from mmtok.sequences import read_ids, write_ids
from mmtok.transformer.model import Transformer

TEXT = "a cow <image> \u00e9 \U0001f404\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("media")
    y, x = np.mgrid[0:40, 0:30]
    media.write_image(folder / "disc.png", np.stack([x * 8, y * 6, x + y]).astype(np.uint8))
    t = np.arange(4000) / 16_000
    media.write_audio(folder / "tone.wav", (0.4 * np.sin(2 * np.pi * 400 * t))[None].astype(np.float32), 16_000)
    for name, text in (("note.txt", TEXT), ("more.txt", "une vache"), ("empty.txt", "")):
        (folder / name).write_text(text, encoding="utf-8")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def tokenizer() -> MultimodalTokenizer:
    return MultimodalTokenizer.load("any-to-any")


@pytest.fixture(scope="module")
def two_codecs(tmp_path_factory: pytest.TempPathFactory, tokenizer: MultimodalTokenizer) -> Path:
    """A vocabulary directory with a second audio tokenizer, the bundled one with two levels, delayed."""
    folder = tmp_path_factory.mktemp("vocabulary")
    text, image, audio = tokenizer.registry.tokenizers
    second = TokenizerSpec(
        "second", "audio", audio.codebook_sizes[:2], audio.fingerprint, 0, audio.properties, "delayed:0,1"
    )
    registry = VocabularyRegistry.create([image, audio, second, text], max_grid=32)
    (folder / "vocab.json").write_text(registry.to_json())
    shutil.copytree(bundled_directory() / "audio-16k", folder / "second")
    return folder


def run(*arguments: object, capsys: pytest.CaptureFixture, code: int = 0) -> str:
    """stdout of a command that succeeds; of one that fails its only line, which is on stderr."""
    if code:
        return commands.refused(*arguments, capsys=capsys, code=code)
    got, stdout, stderr = commands.run(*arguments, capsys=capsys)
    assert got == 0, stderr
    return stdout


def test_files_come_back(files: dict, tmp_path: Path, tokenizer: MultimodalTokenizer, capsys) -> None:
    order = [files[name] for name in ("note.txt", "disc.png", "empty.txt", "tone.wav")]
    report = json.loads(run("encode", *order, "-o", tmp_path / "ids.json", "--json", capsys=capsys))
    registry, ((name, ids, _),) = read_ids(tmp_path / "ids.json")
    assert registry == tokenizer.registry
    assert report["vocabulary"] == registry.fingerprint
    assert (name, report["tokens"]) == ("ids", len(ids))
    document = Document(tuple(tokenizer.fit(load_segment(path), 64) for path in order))
    assert ids.tolist() == tokenizer.encode(document).tolist()

    (entry,) = report["documents"]
    spans = [span for span in tokenizer.grammar.spans(ids) if span.kind != "control"]
    rows = entry["segments"]
    assert [r["files"] for r in rows] == [[str(order[i])] for i in (0, 1, 3)]
    assert [(r["modality"], r["tokenizer"], r["start"], r["end"]) for r in rows] == [
        (s.kind, s.tokenizer, s.start, s.end) for s in spans
    ]
    for row in rows:
        part = ids[row["start"] : row["end"]]
        assert (row["lowest_id"], row["highest_id"], row["tokens"]) == (part.min(), part.max(), len(part))
    assert rows[1]["shape"] == [8, 8]

    report = json.loads(run("decode", tmp_path / "ids.json", "--out", tmp_path / "out", "--json", capsys=capsys))
    written = [Path(f["file"]) for f in report["documents"][0]["files"]]
    assert [p.name for p in written] == ["text_0.txt", "image_1.png", "audio_2.wav"]
    assert sorted(written) == sorted((tmp_path / "out").iterdir())
    back = tokenizer.decode(ids).segments
    assert written[0].read_bytes() == TEXT.encode()
    assert load_segment(written[1]) == back[1]
    assert np.abs(load_segment(written[2]).samples - back[2].samples).max() < 1e-4  # type: ignore[union-attr]


def test_neighbouring_texts_and_own_sizes(files: dict, tmp_path: Path, capsys) -> None:
    order = [files[name] for name in ("note.txt", "empty.txt", "more.txt", "disc.png", "more.txt")]
    out = run("encode", *order, "-o", tmp_path / "ids.json", "--image-size", 0, capsys=capsys)
    lines = out.splitlines()
    assert len(lines) == 5
    assert f"{files['note.txt']} + {files['more.txt']}" in lines[1]
    run("decode", tmp_path / "ids.json", "-o", tmp_path / "out", capsys=capsys)
    assert (tmp_path / "out/text_0.txt").read_text() == TEXT + "une vache"
    assert (tmp_path / "out/text_2.txt").read_text() == "une vache"
    assert media.read_image(tmp_path / "out/image_1.png").shape == (3, 40, 30)


def test_a_picture_of_any_size_comes_back_with_its_size(tmp_path: Path, tokenizer: MultimodalTokenizer, capsys) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 37, 53), np.uint8)
    for name, x in zip("ab", pixels, strict=True):
        media.write_image(tmp_path / f"{name}.png", x)
    file, out = tmp_path / "ids.json", tmp_path / "out"
    run("encode", tmp_path / "a.png", tmp_path / "b.png", "--image-size", 0, "-o", file, capsys=capsys)
    (entry,) = json.loads(file.read_text())["documents"]
    assert entry["image_sizes"] == [[37, 53], [37, 53]]
    run("vocab", "migrate", file, "--to", "any-to-any", "-o", tmp_path / "moved.json", capsys=capsys)
    assert (tmp_path / "moved.json").read_bytes() == file.read_bytes()
    codec = tokenizer.tokenizers["image-64-f8"]
    expected = [codec.decode(codec.encode(torch.from_numpy(x)[None]))[0, :, :37, :53].numpy() for x in pixels]

    def decoded(*policy: str) -> list[np.ndarray]:
        run("decode", file, "--out", out, *policy, capsys=capsys)
        return [media.read_image(out / f"image_{i}.png") for i in range(2)]

    assert np.array_equal(decoded(), expected)
    assert np.array_equal(decoded("--policy", "drop"), expected)
    for sizes, says in (
        ([[37, 53], [37, 64]], "image at 40: got a size of 37x64 pixels for 5x7 codes"),
        ([None], "got 1 image sizes for 2 images"),
    ):
        value = json.loads(file.read_text())
        value["documents"][0]["image_sizes"] = sizes
        file.write_text(json.dumps(value))
        line = run("decode", file, "--out", tmp_path / "no", capsys=capsys, code=2)
        assert f"{file}, document 'ids', {says}" in line
        assert not (tmp_path / "no").exists()
    assert [x.shape for x in decoded("--policy", "repair")] == [(3, 40, 56)] * 2


def test_separate_documents(files: dict, tmp_path: Path, capsys) -> None:
    evil = tmp_path / ".. up.txt"
    evil.write_text("x")
    run("encode", "--separate", files["note.txt"], evil, files["note.txt"], "-o", tmp_path / "ids.json", capsys=capsys)
    _, documents = read_ids(tmp_path / "ids.json")
    assert [document.name for document in documents] == ["note", ".. up", "note"]
    out = run("decode", tmp_path / "ids.json", "--out", tmp_path / "a" / "b", capsys=capsys)
    assert [p.relative_to(tmp_path / "a/b").as_posix() for p in sorted((tmp_path / "a").rglob("*.txt"))] == [
        "0_note/text_0.txt",
        "1____up/text_0.txt",
        "2_note/text_0.txt",
    ]
    assert str(tmp_path / "a/b/2_note/text_0.txt") in out


def test_names_do_not_lead_out_of_the_directory(tmp_path: Path, tokenizer: MultimodalTokenizer, capsys) -> None:
    ids = [tokenizer.registry.bos, tokenizer.registry.block("text").start, tokenizer.registry.eos]
    names = ["../../up", "/etc", "", "x" * 500, "nul\0"]
    write_ids(tmp_path / "ids.json", tokenizer.registry, [(name, ids) for name in names])
    run("decode", tmp_path / "ids.json", "--out", tmp_path / "out", capsys=capsys)
    assert {p.parent.parent for p in tmp_path.rglob("*.txt")} == {tmp_path / "out"}
    assert len(list((tmp_path / "out").iterdir())) == len(names)


def test_another_tokenizer_of_a_modality(files: dict, tmp_path: Path, two_codecs: Path, capsys) -> None:
    arguments = ["encode", files["tone.wav"], "--model", two_codecs, "-o", tmp_path / "ids.json", "--json"]
    first = json.loads(run(*arguments, capsys=capsys))["documents"][0]["segments"][0]
    second = json.loads(run(*arguments, "--use", "audio=second", capsys=capsys))["documents"][0]["segments"][0]
    assert (first["tokenizer"], second["tokenizer"]) == ("audio-16k", "second")
    assert second["shape"] == [2, first["shape"][1]]
    assert second["tokens"] == 2 * (first["shape"][1] + 1) + 2
    run("decode", tmp_path / "ids.json", "--model", two_codecs, "--out", tmp_path / "out", capsys=capsys)
    assert media.read_audio(tmp_path / "out/audio_0.wav", 16_000).shape[1] == 320 * first["shape"][1] >= 4000


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--use", "smell=x"], "expected MODALITY=NAME"),
        (["--use", "audio"], "got --use 'audio'"),
        (["--use", "audio=nobody"], "nobody"),
        (["--use", "audio=text-4k"], "'text-4k' is for text, expected one for audio; the vocabulary has: audio-16k"),
        (["--use", "image=nobody"], "no tokenizer 'nobody'"),
        (["--use", "image=audio-16k"], "expected one for image; the vocabulary has: image-64-f8"),
        (["--use", "audio=audio-16k", "--use", "audio=audio-16k"], "given twice"),
        (["--image-size", "-1"], "'--image-size'"),
        (["--model", "nowhere"], "nowhere"),
        (["nothing.png"], "nothing.png"),
    ],
)
def test_bad_encode(files: dict, arguments: list, says: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "ids.json"
    assert says in run("encode", files["tone.wav"], *arguments, "-o", out, capsys=capsys, code=2)
    assert not out.exists()


def test_a_picture_is_fitted_for_the_tokenizer_that_is_used(files: dict, tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    ImageVQVAE(ImageVQVAEConfig(channels=8, encoder_blocks=1, decoder_blocks=1, codebook_size=16, downsample=4)).save(
        tmp_path / "fine"
    )
    run("vocab", "create", "image-64-f8", tmp_path / "fine", "-o", tmp_path / "v", capsys=capsys)
    arguments = ["encode", files["disc.png"], "--model", tmp_path / "v", "-o", tmp_path / "ids.json"]
    for use, shape in ((["--use", "image=fine"], [10, 8]), ([], [5, 4])):
        report = json.loads(run(*arguments, *use, "--image-size", 0, "--json", capsys=capsys))
        assert report["documents"][0]["segments"][0]["shape"] == shape
    run(*arguments, "--use", "image=fine", "--image-size", 20, capsys=capsys)
    before = commands.contents(tmp_path)
    says = run(*arguments, "--image-size", 20, capsys=capsys, code=2)
    assert "got an image size of 20 pixels, expected a multiple of 8" in says
    assert commands.contents(tmp_path) == before


@pytest.mark.parametrize(("kind", "says"), [("directory", "is a directory"), ("device", "is a device")])
def test_what_is_no_file_is_left_alone(kind: str, says: str, files: dict, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    os.mkfifo(out) if kind == "device" else out.mkdir()
    for command in (["encode", files["note.txt"]], ["vocab", "migrate", tmp_path / "ids.json", "--to", "any-to-any"]):
        run("encode", files["note.txt"], "-o", tmp_path / "ids.json", capsys=capsys)
        assert says in run(*command, "-o", out, capsys=capsys, code=2)
        assert not out.is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.json", "out"]


def test_the_vocabularies_are_compared(files: dict, tmp_path: Path, two_codecs: Path, capsys) -> None:
    run("encode", files["note.txt"], "-o", tmp_path / "ids.json", capsys=capsys)
    arguments = ["decode", tmp_path / "ids.json", "--model", two_codecs, "--out", tmp_path / "out"]
    says = run(*arguments, capsys=capsys, code=2)
    assert str(tmp_path / "ids.json") in says
    assert "second" in says  # the difference
    assert not (tmp_path / "out").exists()


def broken(tokenizer: MultimodalTokenizer) -> np.ndarray:
    """A text, an image that lacks its last row and closing, and a text."""
    grammar, r = tokenizer.grammar, tokenizer.registry
    image, text = (
        grammar.segment_ids("image", np.arange(6).reshape(3, 2)),
        grammar.segment_ids("text", np.arange(50, 54)),
    )
    return np.concatenate([[r.bos], text, image[:-3], text, [r.eos]])


def test_strict_is_the_default(tmp_path: Path, tokenizer: MultimodalTokenizer, capsys) -> None:
    ids = broken(tokenizer)
    good = np.array([tokenizer.registry.bos, tokenizer.registry.eos])
    write_ids(tmp_path / "ids.json", tokenizer.registry, [("good", good), ("bad", ids)])
    says = run("decode", tmp_path / "ids.json", "--out", tmp_path / "out", capsys=capsys, code=2)
    assert "document 'bad', position 12" in says
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("policy", ["repair", "drop"])
def test_policies(policy: str, tmp_path: Path, tokenizer: MultimodalTokenizer, capsys) -> None:
    write_ids(tmp_path / "ids.json", tokenizer.registry, [("bad", broken(tokenizer))])
    arguments = ["decode", tmp_path / "ids.json", "--out", tmp_path / "out", "--policy", policy]
    (entry,) = json.loads(run(*arguments, "--json", capsys=capsys))["documents"]
    document, recovery = tokenizer.recover(broken(tokenizer), policy)
    assert [e["text"] for e in entry["edits"]] == [str(e) for e in recovery.edits]
    assert entry["edits"]
    assert [f["modality"] for f in entry["files"]] == [type(s).__name__.lower() for s in document.segments]
    assert any(isinstance(s, Image) for s in document.segments) == (policy == "repair")
    assert entry["edits"][0]["text"] in run(*arguments, capsys=capsys)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ("\0", "not JSON"),
        ('{"format": 1}', "lacks"),
        (None, "No such file"),
        ("[]", "no ids.json"),
        ("directory", "Is a directory"),
        (1.5, "position 1: got 1.5, expected an integer"),
        (-4, "position 1: got id -4 outside the vocabulary"),
        (10**30, "position 1: got id 1000000000000000000000000000000 outside the vocabulary"),
    ],
)
def test_bad_decode(
    content: str | float | None, says: str, tmp_path: Path, tokenizer: MultimodalTokenizer, capsys
) -> None:
    if content == "directory":
        (tmp_path / "ids.json").mkdir()
    elif isinstance(content, str):
        (tmp_path / "ids.json").write_text(content)
    elif content is not None:
        write_ids(tmp_path / "ids.json", tokenizer.registry, [("a", [1, 424, 2])])
        (tmp_path / "ids.json").write_text((tmp_path / "ids.json").read_text().replace("424", str(content)))
    assert says in run("decode", tmp_path / "ids.json", "--out", tmp_path / "out", capsys=capsys, code=2)
    assert not (tmp_path / "out").exists()


# --- vocab migrate


def test_migrate_ids_and_datasets(files: dict, tmp_path: Path, two_codecs: Path, capsys) -> None:
    run("encode", files["disc.png"], files["more.txt"], files["tone.wav"], "-o", tmp_path / "a.json", capsys=capsys)
    old, ((_, ids, _),) = read_ids(tmp_path / "a.json")
    write_dataset(tmp_path / "a", old, [ids, ids])
    for source, target, kind in (("a.json", "b.json", "ids"), ("a", "b", "dataset")):
        arguments = ["vocab", "migrate", tmp_path / source, "--to", two_codecs, "-o", tmp_path / target]
        out = run(*arguments, capsys=capsys)
        assert "mapped back they are the original" in out
        assert "grid size 33 to grid size 64" in out
        report = json.loads(run(*arguments, "--json", capsys=capsys))
        count = 2 if kind == "dataset" else 1
        assert (report["kind"], report["documents"], report["tokens"]) == (kind, count, count * len(ids))
    run("decode", tmp_path / "a.json", "--out", tmp_path / "one", capsys=capsys)
    run("decode", tmp_path / "b.json", "--model", two_codecs, "--out", tmp_path / "other", capsys=capsys)
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "other" / path.name).read_bytes() == path.read_bytes()
    assert len(TokenDataset.open(tmp_path / "b", MultimodalTokenizer.load(two_codecs).registry)) == 2


def test_migrate_a_dataset_to_another_layout(files: dict, tmp_path: Path, two_codecs: Path, capsys) -> None:
    run(
        "encode",
        files["tone.wav"],
        "--use",
        "audio=second",
        "--model",
        two_codecs,
        "-o",
        tmp_path / "a.json",
        capsys=capsys,
    )
    old, documents = read_ids(tmp_path / "a.json")
    specs = [
        t if t.name != "second" else TokenizerSpec(t.name, t.modality, t.codebook_sizes, t.fingerprint)
        for t in old.tokenizers
    ]
    (tmp_path / "vocab.json").write_text(VocabularyRegistry.create(specs, max_grid=32).to_json())
    out = run(
        "vocab",
        "migrate",
        tmp_path / "a.json",
        "--to",
        tmp_path / "vocab.json",
        "-o",
        tmp_path / "b.json",
        capsys=capsys,
    )
    assert "laid out anew: second" in out
    (_, ((_, ids, _),)), tokens = read_ids(tmp_path / "b.json"), len(documents[0][1])
    assert len(ids) == tokens - 2  # the fills of one step
    assert f"{tokens} tokens before, {tokens - 2} after" in out


def test_migrate_the_bundled_transformer(tmp_path: Path, tokenizer: MultimodalTokenizer, capsys) -> None:
    new = tokenizer.registry.extend([TokenizerSpec("more", "image", (100,), "m")])
    (tmp_path / "vocab.json").write_text(new.to_json())
    arguments = ["vocab", "migrate", "any-to-any", "--to", tmp_path, "-o", tmp_path / "model", "--json"]
    report = json.loads(run(*arguments, capsys=capsys))
    assert report["largest_logit_difference"] <= 1e-5 * report["largest_logit"]
    assert report["tokens"] > 500
    assert report["without_counterpart"] == []
    old, model = Transformer.load("any-to-any"), Transformer.load(tmp_path / "model", new)
    kept = tokenizer.registry.size
    assert torch.equal(old.head_weight[:kept], model.head_weight[:kept])
    meta = json.loads((tmp_path / "model/mmtok.json").read_text())
    assert (meta["registry"], meta["migrated_from"]) == (new.fingerprint, tokenizer.registry.fingerprint)
    assert json.loads((tmp_path / "model/config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("source", "to", "says"),
    [
        ("nowhere", "good", "nothing to migrate at 'nowhere'"),
        ("image-64-f8", "good", "expected a 'transformer'"),
        ("any-to-any", "nowhere", "nowhere"),
        ("any-to-any", "bad", "not a vocabulary"),
        ("any-to-any", "relaid", "learned the first order"),
        ("ids.json", "small", "text id 4 has no counterpart"),
    ],
)
def test_bad_migrate(
    source: str, to: str, says: str, tmp_path: Path, tokenizer: MultimodalTokenizer, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    r = tokenizer.registry
    audio = r.tokenizer("audio")
    relaid = TokenizerSpec(audio.name, "audio", audio.codebook_sizes, audio.fingerprint, layout="codebook-major")
    for name, text in (
        ("good", r.to_json()),
        ("bad", "{}"),
        ("relaid", VocabularyRegistry.create([relaid]).to_json()),
        ("small", VocabularyRegistry.create([audio]).to_json()),
    ):
        (tmp_path / name).write_text(text)
    write_ids(tmp_path / "ids.json", r, [("a", [r.bos, r.block("text").start + 4, r.eos])])
    assert says in run("vocab", "migrate", source, "--to", to, "-o", "out", capsys=capsys, code=2)
    assert not (tmp_path / "out").exists()


def test_help_carries_an_example(capsys) -> None:
    for command in (["encode"], ["decode"], ["vocab", "migrate"]):
        assert f"mmtok {' '.join(command)} " in " ".join(run(*command, "--help", capsys=capsys).split())

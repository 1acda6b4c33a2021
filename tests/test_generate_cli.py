"""The options of ``mmtok generate``: precision, sampling, several answers, streams."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import contents, refused, run

from mmtok import media
from mmtok.cli.generate import SAMPLING, sampling_of
from mmtok.cli.live import Live
from mmtok.documents import Audio, Image, Text
from mmtok.errors import ConfigError
from mmtok.sequences import read_ids
from mmtok.transformer.sampling import Sampling
from mmtok.transformer.streaming import Event

ASK = ("generate", "--text", "a cow", "--temperature", 1)


def ids_in(folder: Path) -> list[int]:
    return read_ids(folder / "ids.json")[1][0][1].tolist()


def test_several_answers_are_those_of_one_and_more(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ask = (*ASK, "--to", "text", "--to", "image", "--precision", "float32", "--guidance", 2)
    code, stdout, stderr = run(*ask, "--out", tmp_path / "one", "--json", capsys=capsys)
    assert code == 0, stderr
    one = json.loads(stdout)
    assert one["precision"] == "float32"
    assert one["sampling"]["image"] == {**Sampling().to_dict(), "guidance": 2.0}
    assert one["sampling"]["text"] == Sampling().to_dict()
    code, stdout, stderr = run(*ask, "--samples", 3, "--out", tmp_path / "three", "--json", capsys=capsys)
    assert code == 0, stderr
    reports = json.loads(stdout)
    assert [json.loads((tmp_path / f"three/{i}/report.json").read_text()) for i in range(3)] == reports
    answers = [ids_in(tmp_path / f"three/{i}") for i in range(3)]
    assert answers[0] == ids_in(tmp_path / "one")
    assert len({tuple(ids) for ids in answers}) == 3
    assert [len(ids) for ids in answers] == [r["prompt_tokens"] + r["new_tokens"] for r in reports]


def test_a_stream_is_the_answer(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ask = (*ASK, "--to", "text", "--to", "image", "--to", "audio", "--seed", 7)
    for name, option in (("whole", ()), ("stream", ("--stream",)), ("json", ("--stream", "--json"))):
        code, stdout, stderr = run(*ask, *option, "--out", tmp_path / name, capsys=capsys)
        assert code == 0, stderr
        text = (tmp_path / name / "text_3.txt").read_text(encoding="utf-8")
        shown = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
        lines = [shown, str(tmp_path / name / "image_4.png"), str(tmp_path / name / "audio_5.wav")]
        if name == "json":
            assert stderr == "\n".join([*lines, ""])
            assert json.loads(stdout)["new_tokens"]
        else:
            assert stdout.startswith("\n".join(lines)) == (name == "stream")
    assert ids_in(tmp_path / "whole") == ids_in(tmp_path / "stream") == ids_in(tmp_path / "json")


def test_what_is_shown_is_whole_at_any_time(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    live = Live(tmp_path / "out", 3, quiet=False)
    for text, last in (("un", False), ("e\x1b[31m vache", False), ("", True)):
        live.take(Event(0, Text(text), last))
    assert capsys.readouterr().out == "une\ufffd[31m vache\n"
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    live.take(Event(1, Image(pixels), True))
    assert np.array_equal(media.read_image(tmp_path / "out/image_4.png"), pixels)
    for segment in (2, 3):  # two sounds do not run into each other
        pieces = [np.full((1, n), 0.25 * segment, np.float32) for n in (100, 50, 0)]
        for count, samples in enumerate(pieces, 1):
            live.take(Event(segment, Audio(samples, 8000), count == 3))
            so_far = media.read_audio(tmp_path / f"out/audio_{3 + segment}.wav", 8000)
            assert np.array_equal(so_far, np.concatenate(pieces[:count], 1))
    out = tmp_path / "out"
    assert capsys.readouterr().out.split() == [str(out / f"{n}") for n in ("image_4.png", "audio_5.wav", "audio_6.wav")]


def test_options_go_to_their_modalities() -> None:
    assert sampling_of() == SAMPLING
    got = sampling_of(0.7, top_k=5, top_p=0.9, repetition_penalty=1.2, guidance=3.0)
    assert got["image"] == got["audio"] == Sampling(0.7, 5, 0.9, 1.2, 3.0)
    assert got["text"] == Sampling(0.7, 5, 0.9, 1.2)
    with pytest.raises(ConfigError, match="top_p"):
        sampling_of(top_p=0.0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--samples", 2, "--stream"], "--samples 2"),
        (["--samples", 0], "--samples"),
        (["--precision", "int4"], "int4"),
        (["--top-p", 1.5], "top_p"),
        (["--repetition-penalty", 0], "repetition_penalty"),
        (["--guidance", -1], "guidance"),
    ],
)
def test_impossible_options(arguments: list, says: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert says in refused(*ASK, *arguments, "--out", tmp_path / "out", capsys=capsys)
    assert not contents(tmp_path)

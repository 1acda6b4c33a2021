"""Documents: validation, the normal form, and exact files."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok import media
from mmtok.documents import Audio, Document, Image, Segment, Text, Turn, load_segment, save_document
from mmtok.errors import MediaError

RED = Image(np.full((3, 2, 2), 200, np.uint8))
BEEP = Audio((np.arange(-50, 50) / 64).astype(np.float32)[None], 16000)

segments = st.one_of(
    st.builds(Text, st.text(max_size=20)),
    st.sampled_from([RED, BEEP, Turn("user"), Turn("assistant"), Text("")]),
)
documents = st.builds(Document, st.lists(segments, max_size=12).map(tuple))


@pytest.mark.parametrize("text", ["", "a", "\x00", "<image>", "\ufeff", "\ufffe", "\U0010ffff", "e\u0301"])
def test_every_scalar_value_is_text(text: str) -> None:
    assert Text(text).text == text


@pytest.mark.parametrize(("text", "position"), [("\ud800", 0), ("ok \udfff", 3), ("\udc00\ud800", 0)])
def test_lone_surrogates_are_refused(text: str, position: int) -> None:
    with pytest.raises(MediaError, match=rf"character {position} .* lone surrogate U\+D"):
        Text(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Text(b"a"),
        lambda: Text(None),
        lambda: Image(np.zeros((2, 2, 3), np.uint8)),
        lambda: Image(np.zeros((3, 2, 2), np.float32)),
        lambda: Image(np.zeros((4, 2, 2), np.uint8)),
        lambda: Image(np.zeros((3, 0, 0), np.uint8)),
        lambda: Image([[[0]]]),
        lambda: Audio(np.zeros(5, np.float32), 16000),
        lambda: Audio(np.zeros((1, 5)), 16000),
        lambda: Audio(np.zeros((1, 5), np.int16), 16000),
        lambda: Audio(np.full((1, 5), np.nan, np.float32), 16000),
        lambda: Audio(np.full((1, 5), 1.5, np.float32), 16000),
        lambda: Audio(np.zeros((1, 5), np.float32), 0),
        lambda: Audio(np.zeros((1, 5), np.float32), 16000.0),
        lambda: Turn("system"),
        lambda: Document("text"),
        lambda: Document(3),
        lambda: Document((Text("a"), "b")),
    ],
)
def test_bad_values_are_refused(make) -> None:
    with pytest.raises(MediaError, match="expected"):
        make()


def test_the_position_of_a_bad_segment_is_named() -> None:
    with pytest.raises(MediaError, match="segment 1 is a str"):
        Document((Text("a"), "b"))


def test_equality_hash_and_repr_are_by_value() -> None:
    assert Image(RED.pixels.copy()) == RED
    assert Audio(BEEP.samples.copy(), 16000) == BEEP
    assert Audio(BEEP.samples, 8000) != BEEP
    assert RED != BEEP
    zeros = np.zeros((1, 3), np.float32)
    assert hash(Audio(zeros, 16000)) == hash(Audio(-zeros, 16000))
    assert len({RED, Image(RED.pixels.copy()), BEEP, Audio(BEEP.samples.copy(), 16000)}) == 2
    assert repr(RED) == "Image(2x2)"
    assert "16000 Hz" in repr(BEEP)
    assert Document([RED]) == Document((RED,))


def test_normalized() -> None:
    a, b, u = Text("a"), Text("b"), Turn("user")
    assert Document((a, Text(""), b, RED, Text(""), BEEP, a)).normalized() == Document((Text("ab"), RED, BEEP, a))
    assert Document((a, u, b)).normalized() == Document((a, u, b))
    assert Document((a, u, Text(""), u)).normalized() == Document((a, u, u))


@given(documents)
@settings(max_examples=60, deadline=None)
def test_normalized_is_idempotent_and_keeps_everything(document: Document) -> None:
    normal = document.normalized()
    assert normal.normalized() == normal

    def text(d: Document) -> str:
        return "".join(s.text for s in d.segments if isinstance(s, Text))

    def others(d: Document) -> list[Segment]:
        return [s for s in d.segments if not isinstance(s, Text)]

    assert text(normal) == text(document)
    assert others(normal) == others(document)
    kinds = [isinstance(s, Text) for s in normal.segments]
    assert not any(x and y for x, y in itertools.pairwise(kinds))


@given(documents)
@settings(max_examples=25, deadline=None)
def test_files_round_trip(tmp_path_factory: pytest.TempPathFactory, document: Document) -> None:
    folder = tmp_path_factory.mktemp("document")
    paths = save_document(document, folder)
    kept = [s for s in document.segments if not isinstance(s, Turn)]
    assert [load_segment(p) for p in paths] == kept
    assert sorted(folder.iterdir()) == sorted(paths)


def test_names_are_stable(tmp_path: Path) -> None:
    document = Document((Text("GIF89a\r\n"), Turn("user"), RED, BEEP))
    expected = ["text_0.txt", "image_2.png", "audio_3.wav"]
    for _ in range(2):
        assert [p.name for p in save_document(document, tmp_path / "new" / "out")] == expected
    assert sorted(p.name for p in (tmp_path / "new" / "out").iterdir()) == sorted(expected)


def test_load_segment_audio_arguments(tmp_path: Path) -> None:
    media.write_audio(tmp_path / "a.wav", np.zeros((2, 8000), np.float32), 8000)
    assert load_segment(tmp_path / "a.wav").samples.shape == (1, 8000)
    assert load_segment(tmp_path / "a.wav", mono=False).samples.shape == (2, 8000)
    part = load_segment(tmp_path / "a.wav", sample_rate=16000, start=0.25, end=0.5)
    assert (part.samples.shape, part.sample_rate, part.seconds) == ((1, 4000), 16000, 0.25)


def test_load_segment_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(MediaError, match="start and end are for audio"):
        load_segment(tmp_path / "a.txt", start=1.0)
    (tmp_path / "b.png").write_text("a")
    with pytest.raises(MediaError, match=r"b\.png: named \.png but holds text"):
        load_segment(tmp_path / "b.png")


def test_empty_audio_can_be_made_and_saved(tmp_path: Path) -> None:
    silence = Audio(np.zeros((1, 0), np.float32), 16000)
    assert silence.seconds == 0
    (path,) = save_document(Document((silence,)), tmp_path)
    with pytest.raises(MediaError, match="no samples"):
        load_segment(path)

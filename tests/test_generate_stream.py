"""Streams: the pieces, joined, are the answer, and none comes later than it could."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectral_models import HOP, LEVELS, RATE, SIZE
from spectral_models import tiny as codec

from mmtok.documents import Audio, Image, Text
from mmtok.errors import ConfigError
from mmtok.image import ImageVQVAE, ImageVQVAEConfig
from mmtok.multimodal import MultimodalTokenizer, spec_of
from mmtok.registry import VocabularyRegistry
from mmtok.text import ByteLevelBPE
from mmtok.transformer.generate import Request, generate
from mmtok.transformer.model import Transformer, TransformerConfig
from mmtok.transformer.requests import Generation
from mmtok.transformer.sampling import Sampling
from mmtok.transformer.streaming import CHUNK, Event, Streamer, stream

LAYOUTS = ("interleaved", "delayed:0,1,2", "delayed:3,1,1", "codebook-major")
LEAST = round(CHUNK * RATE / HOP)  # frames of a piece


@functools.cache
def tokenizer(layout: str) -> MultimodalTokenizer:
    torch.manual_seed(0)
    image = ImageVQVAE(ImageVQVAEConfig(channels=8, encoder_blocks=1, decoder_blocks=1, codebook_size=64)).eval()
    parts = {"words": ByteLevelBPE.train(["a cow", "une vache"], 270), "pictures": image, "sounds": codec("causal")}
    specs = [spec_of(n, t, layout=layout if t.modality == "audio" else "") for n, t in parts.items()]
    return MultimodalTokenizer(VocabularyRegistry.create(specs, max_grid=4), parts)


def events_of(mm: MultimodalTokenizer, ids: np.ndarray) -> list[Event]:
    streamer = Streamer(mm)
    return [event for id in ids.tolist() for event in streamer.push(id)]


def check(mm: MultimodalTokenizer, ids: np.ndarray, events: list[Event]) -> None:
    """The events of an answer are what its ids, a whole document, decode to."""
    segments = [s for s in mm.decode(ids).segments if isinstance(s, Text | Image | Audio)]
    assert [e.segment for e in events] == sorted(e.segment for e in events)
    assert {e.segment for e in events} == set(range(len(segments)))
    for number, segment in enumerate(segments):
        pieces = [e for e in events if e.segment == number]
        assert [e.last for e in pieces] == [False] * (len(pieces) - 1) + [True]
        if isinstance(segment, Text):
            assert "".join(e.piece.text for e in pieces) == segment.text
        elif isinstance(segment, Image):
            assert [e.piece for e in pieces] == [segment]
        else:
            samples = np.concatenate([e.piece.samples for e in pieces], 1)
            assert {e.piece.sample_rate for e in pieces} == {segment.sample_rate}
            assert samples.shape == segment.samples.shape
            np.testing.assert_allclose(samples, segment.samples, rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    layout=st.sampled_from(LAYOUTS),
    parts=st.lists(
        st.tuples(st.sampled_from(["words", "pictures", "sounds"]), st.integers(0, 3 * LEAST), st.integers(0, 99)),
        max_size=4,
    ),
)
def test_pieces_joined_are_the_whole(layout, parts):
    mm, out = tokenizer(layout), []
    for kind, size, seed in parts:
        rng = np.random.default_rng(seed)
        if kind == "words":  # any bytes: text that is not UTF-8 too
            out.append(mm.grammar.segment_ids(kind, rng.integers(0, mm.registry.block("text").size, size)))
        elif kind == "pictures":
            out.append(mm.grammar.segment_ids(kind, rng.integers(0, 64, (1 + size % 3, 2))))
        else:
            out.append(mm.grammar.segment_ids(kind, rng.integers(0, SIZE, (LEVELS, size))))
    ids = np.concatenate([[mm.registry.bos, mm.registry.assistant], *out, [mm.registry.eos]]).astype(np.int64)
    check(mm, ids, events_of(mm, ids))


def test_no_character_is_cut_and_none_waits():
    mm = tokenizer("interleaved")
    text = "a cow \u00e9\U0001f404."
    ids = mm.grammar.segment_ids("words", mm.tokenizers["words"].encode([text])[0])
    codes = mm.tokenizers["words"].encode([text])[0]
    streamer, got = Streamer(mm), ""
    for count, id in enumerate(ids.tolist(), 1):
        got += "".join(e.piece.text for e in streamer.push(id))
        (known,) = mm.tokenizers["words"].decode_bytes([codes[:count]])
        assert got == known.decode(errors="ignore")
    assert got == text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sound_comes_while_it_is_made(layout):
    mm = tokenizer(layout)
    frames = 4 * LEAST
    ids = mm.grammar.segment_ids("sounds", np.random.default_rng(0).integers(0, SIZE, (LEVELS, frames)))
    streamer, came = Streamer(mm), []
    for position, id in enumerate(ids.tolist()):
        came += [(position, e.piece.samples.shape[1]) for e in streamer.push(id)]
    assert sum(n for _, n in came) == frames * HOP
    if layout == "codebook-major":  # no frame is whole before the last level
        assert [position for position, _ in came] == [len(ids) - 1]
    else:
        assert len(came) >= 4
        assert came[0][0] <= LEVELS * (LEAST + 3)  # a piece and its delays


def test_a_stream_is_the_generation():
    mm = tokenizer("delayed:0,1,2")
    torch.manual_seed(1)
    model = Transformer(TransformerConfig(mm.registry.padded_size, 32, 64, 2, 2, 1, 16, max_position_embeddings=512))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    sampling = {"image": Sampling(guidance=2.0), "audio": Sampling(guidance=1.5)}
    prompt = mm.prompt([Text("a cow")])
    for targets, seed in ((("text", "image", "audio"), 3), ((), 4), (("audio",), 5)):
        request = Request(prompt, targets, 150, max_frames=20)
        *events, whole = stream(model, mm, request, sampling, seed)
        assert isinstance(whole, Generation)
        (expected,) = generate(model, mm.grammar, [request], sampling, seed)
        assert np.array_equal(whole.ids, expected.ids)
        start = mm.registry.bos, mm.registry.assistant
        check(mm, np.concatenate([start, whole.new_ids]), events)


def test_an_impossible_request_is_refused_before_the_first_event():
    mm = tokenizer("interleaved")
    model = Transformer(TransformerConfig(mm.registry.padded_size, 32, 64, 1, 2, 1, 16))
    with pytest.raises(ConfigError, match="at least"):
        stream(model, mm, Request(mm.prompt([]), ("image",), 2))

"""Generation: whatever the weights and the settings, what was asked for comes out as a document that decodes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from generations import GRAMMAR, MODALITIES, MODEL, REGISTRY, answered, prompt, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.errors import ConfigError, SequenceError, VocabularyError, VocabularyMismatchError
from mmtok.grammar import Grammar
from mmtok.registry import TokenizerSpec, VocabularyRegistry
from mmtok.transformer.decoder import Decoder
from mmtok.transformer.generate import Request, generate
from mmtok.transformer.model import Transformer, TransformerConfig
from mmtok.transformer.sampling import Sampling


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_nine_directions_and_combinations_in_one_batch(temperature):
    requests = [Request(prompt(a), (b,), 40) for a, b in itertools.product(MODALITIES, MODALITIES)]
    requests += [
        Request(prompt("text"), ("image", "audio"), 60, grid=(2, 2), max_frames=3),
        Request(prompt("image", "text"), ("text", "image", "text", "audio", "text"), 50),
        Request(prompt("audio"), ("audio", "image", "sketch", "image"), 60),
        Request(prompt(), ("text",), 2),
        Request(prompt("text", "image", "audio"), (), 30),
        Request(np.array([REGISTRY.bos]), (), 1),
    ]
    for request, generation in zip(requests, generate(MODEL, GRAMMAR, requests, Sampling(temperature)), strict=True):
        answered(generation, request)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([0.0, 1.0, 10.0, float("nan")]),
    temperature=st.sampled_from([0.0, 0.7, 1.0, 5.0]),
    asked=st.lists(
        st.tuples(
            st.lists(st.sampled_from(MODALITIES), max_size=3),
            st.integers(0, 12),
            st.none() | st.tuples(st.integers(1, 3), st.integers(1, 6)),
            st.none() | st.integers(1, 4),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_every_answer_decodes_and_fits_even_with_no_room_to_spare(seed, scale, temperature, asked):
    requests = []
    for targets, spare, grid, frames in asked:
        targets = [t for i, t in enumerate(targets) if t != "text" or targets[i - 1 : i] != ["text"]]
        area = grid[0] * grid[1] if grid else 1
        least = 1 + sum({"text": 1, "image": 4 + area, "audio": 5}[t] for t in targets)
        requests.append(Request(prompt("text"), tuple(targets), least + spare, grid, frames))
    model = tiny(seed % 3, scale)
    for request, generation in zip(
        requests, generate(model, GRAMMAR, requests, Sampling(temperature), seed), strict=True
    ):
        answered(generation, request)


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0), Sampling(1.5, top_k=5), Sampling(1.0, top_p=0.8)])
def test_a_row_does_not_depend_on_the_batch(sampling):
    requests = [
        Request(prompt("text"), ("image",), 40, grid=(3, 4)),
        Request(prompt("image", "audio"), ("audio",), 60, sample=3),
        Request(prompt(), ("text", "image"), 50),
        Request(prompt("audio", "text"), (), 45, sample=1),
        Request(prompt("text"), ("text",), 12, sample=2),
    ]
    together = generate(MODEL, GRAMMAR, requests, sampling, seed=11)
    decoder = Decoder(MODEL)
    for request, expected in zip(requests, together, strict=True):
        (alone,) = generate(decoder, GRAMMAR, [request], sampling, seed=11)
        assert np.array_equal(alone.ids, expected.ids)


def test_seed_and_sample_number_give_the_chance():
    request = Request(prompt("text"), ("image",), 40, grid=(3, 3))
    again = [generate(MODEL, GRAMMAR, [request], seed=s)[0].ids.tolist() for s in (1, 1, 2)]
    assert again[0] == again[1] != again[2]
    several = [Request(prompt("text"), ("image",), 40, grid=(3, 3), sample=i) for i in range(4)]
    assert len({g.ids.tobytes() for g in generate(MODEL, GRAMMAR, several, seed=1)}) == 4


def test_greedy_is_the_best_allowed_id_of_the_plain_model():
    request = Request(prompt("text", "audio"), ("image",), 40, grid=(2, 3))
    (generation,) = generate(MODEL, GRAMMAR, [request], Sampling(0.0))
    with torch.no_grad():
        logits = MODEL(torch.from_numpy(generation.ids)[None])[0]
    block = REGISTRY.block("image")
    start = generation.prompt_length + 3  # after <image> and its size
    for position in range(start, start + 6):
        best = block.start + int(logits[position - 1, block.start : block.end].argmax())
        assert generation.ids[position] == best


def test_every_token_is_reported_once_and_in_order():
    requests = [Request(prompt("text"), ("image",), 30), Request(prompt(), ("text",), 5, sample=1)]
    seen: list[list[int]] = [[], []]
    results = generate(MODEL, GRAMMAR, requests, on_token=lambda row, id: seen[row].append(id))
    assert [g.new_ids.tolist() for g in results] == seen
    stats = results[0].stats
    assert stats is results[1].stats
    assert stats.new_tokens == sum(map(len, seen))
    assert stats.prompt_tokens == sum(len(r.prompt) for r in requests)
    assert stats.tokens_per_second > 0
    assert "tok/s" in str(stats)
    assert results[0].tokens["image"] == len(seen[0]) - 5  # <image>, two sizes, </image>, <eos>


def test_ids_without_a_choice_do_not_run_the_model():
    request = Request(prompt("text"), ("image",), 40, grid=(2, 3))
    stats = generate(MODEL, GRAMMAR, [request])[0].stats
    assert stats.new_tokens == 6 + 5
    assert stats.steps == 6  # one a code


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_lower_precision(dtype):
    request = Request(prompt("image"), ("text", "audio"), 30)
    for generation in generate(Decoder(MODEL, dtype), GRAMMAR, [request] * 6):
        answered(generation, request)


def test_no_requests():
    assert generate(MODEL, GRAMMAR, []) == []


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (Request(prompt(), ("image",), 10, grid=(3, 3)), ConfigError, "14"),
        (Request(prompt(), (), 0), ConfigError, "at least 1"),
        (Request(prompt(), ("text", "text"), 10), ConfigError, "in a row"),
        (Request(prompt(), ("video",), 10), VocabularyError, "video"),
        (Request(prompt(), ("image",), 99, grid=(7, 1)), VocabularyError, "7"),
        (Request(prompt(), ("text",), 1000), ConfigError, "256"),
        (Request(prompt()[1:], ("text",), 10), SequenceError, "<bos>"),
        (Request(prompt("image")[:6], ("text",), 10), SequenceError, "between segments"),
        (Request(np.array([], np.int64), ("text",), 10), SequenceError, "position 0"),
        (Request(np.array([REGISTRY.bos, REGISTRY.eos]), (), 10), SequenceError, "position 2"),
        (Request(np.array([REGISTRY.bos, 10**6]), ("text",), 10), (VocabularyError, SequenceError), "1000000"),
        (Request(np.array([1.5]), ("text",), 10), (VocabularyError, SequenceError), "float"),
    ],
)
def test_impossible_requests_are_refused_with_the_reason(request_, error, words):
    with pytest.raises(error, match=words):
        generate(MODEL, GRAMMAR, [request_])


def test_a_transformer_of_another_vocabulary_is_refused(tmp_path):
    other = VocabularyRegistry.create([TokenizerSpec("words", "text", (60,), "t")], max_grid=6)
    with pytest.raises(VocabularyMismatchError, match="vocab_size"):
        generate(
            Transformer(TransformerConfig(REGISTRY.padded_size + 64, 32, 64, 1, 2, 1, 16)), GRAMMAR, [Request(prompt())]
        )
    MODEL.save(tmp_path / "m", REGISTRY.to_json())
    with pytest.raises(VocabularyMismatchError, match="pixels"):
        generate(Transformer.load(tmp_path / "m"), Grammar(other), [Request(np.array([other.bos]))])


def test_requests_are_checked_before_anything_is_computed():
    for arguments in ({"max_new_tokens": 20.0}, {"sample": -1}, {"targets": "text"}):
        with pytest.raises(ConfigError, match="expected"):
            Request(prompt("text"), **arguments)
    with pytest.raises(ConfigError, match="positions"):
        generate(MODEL, GRAMMAR, [Request(prompt("text"), max_new_tokens=10**12)])
    with pytest.raises(ConfigError, match="grid"):
        generate(MODEL, GRAMMAR, [Request(prompt("text"), ("image",), 40, grid=(1.5, 2))])

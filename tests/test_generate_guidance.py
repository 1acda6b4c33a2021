"""Guidance and repetition penalty in generation, against a reference that runs the plain transformer twice a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from generations import GRAMMAR, MODALITIES, MODEL, REGISTRY, answered, prompt, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.grammar import Restriction
from mmtok.transformer.decoder import Decoder
from mmtok.transformer.generate import Request, generate, without_question
from mmtok.transformer.sampling import Sampling, uniforms

GUIDED = {"image": Sampling(0.9, guidance=2.5), "audio": Sampling(1.2, guidance=1.7)}
PENALISED = {
    "text": Sampling(1.0, repetition_penalty=2.0),
    "image": Sampling(0.8, repetition_penalty=1.5, guidance=2.0),
    "audio": Sampling(1.0, repetition_penalty=0.7),
}


def plain(model, request: Request, sampling: dict, seed: int) -> list[int]:
    """The answer by the definitions: no cache, no batch, a row at a time, numpy."""
    bos, user, assistant = REGISTRY.bos, REGISTRY.user, REGISTRY.assistant
    ids = request.prompt.tolist()
    turns = [i for i, id in enumerate(ids) if id == user]
    unasked = [*ids[: turns[-1] + 1], assistant] if turns else [bos]
    restriction = Restriction(next=request.targets, stop=bool(request.targets), grid=request.grid,
                              min_frames=int("audio" in request.targets), max_frames=request.max_frames)  # fmt: skip
    limits, state = GRAMMAR.restrict([restriction]), GRAMMAR.resume([request.prompt])
    chance = uniforms(seed, [request.sample], request.max_new_tokens)[0].tolist()
    answer: list[int] = []
    segment: list[int] = []
    for step in range(request.max_new_tokens):
        mask = GRAMMAR.mask(state, torch.tensor([request.max_new_tokens - step]), limits)[0].numpy()
        allowed = np.flatnonzero(mask)
        modality = MODALITIES[int(GRAMMAR.modality(state))]
        settings = sampling.get(modality, Sampling())
        with torch.no_grad():
            given_, without = (
                model(torch.tensor([[*start, *answer]]))[0, -1].double().numpy() for start in (ids, unasked)
            )
        blocks = [REGISTRY.blocks[i].modality for i in REGISTRY.split(allowed)[0]]
        codes = np.isin(blocks, ["image", "audio"])
        scores = given_[allowed]
        if settings.guidance != 1 and codes.any():
            guided = without[allowed][codes] + settings.guidance * (scores - without[allowed])[codes]
            # all codes together are as likely as without guidance
            scores[codes] = guided - np.log(np.exp(guided).sum()) + np.log(np.exp(scores[codes]).sum())
        held = np.isin(allowed, segment) & np.isin(blocks, MODALITIES)
        penalty = settings.repetition_penalty
        scores = np.where(held, np.where(scores > 0, scores / penalty, scores * penalty), scores)
        probs = np.exp((scores - scores.max()) / settings.temperature)
        sums = probs.cumsum()
        id = int(allowed[np.searchsorted(sums, chance[step] * sums[-1], side="right")])
        before = int(state.stage)
        state = GRAMMAR.advance(state, torch.tensor([id]))
        segment = [*(segment if int(state.stage) == before else []), id]
        answer.append(id)
        if bool(state.done):
            return answer
    raise AssertionError("no end")


REQUESTS = [
    Request(prompt("text"), ("image",), 40, grid=(3, 4)),
    Request(prompt("audio", "text"), ("audio",), 60, sample=3),
    Request(prompt("image"), ("image", "audio"), 60),
    Request(prompt("text"), (), 45, sample=1),
    Request(prompt(), (), 30, sample=2),
    Request(np.concatenate([prompt("text")[:-1], prompt("image")[1:]]), ("sketch",), 30),  # two turns of the user
    Request(np.array([REGISTRY.bos]), ("image",), 20),
]


@pytest.mark.parametrize("sampling", [GUIDED, PENALISED], ids=["guided", "penalised"])
def test_it_is_the_reference_that_runs_everything_twice(sampling):
    bare = {m: Sampling(s.temperature) for m, s in sampling.items()}
    different = 0
    for seed in (5, 6):
        together, plainly = (generate(MODEL, GRAMMAR, REQUESTS, s, seed) for s in (sampling, bare))
        different += sum(a.ids.tolist() != b.ids.tolist() for a, b in zip(together, plainly, strict=True))
        for request, generation in zip(REQUESTS, together, strict=True):
            assert generation.new_ids.tolist() == plain(MODEL, request, sampling, seed)
    assert different > len(REQUESTS) / 2


@pytest.mark.parametrize("sampling", [GUIDED, PENALISED], ids=["guided", "penalised"])
def test_a_row_does_not_depend_on_the_batch(sampling):
    together = generate(MODEL, GRAMMAR, REQUESTS, sampling, seed=8)
    decoder = Decoder(MODEL)
    for request, expected in zip(REQUESTS, together, strict=True):
        (alone,) = generate(decoder, GRAMMAR, [request], sampling, seed=8)
        assert np.array_equal(alone.ids, expected.ids)
    backwards = generate(decoder, GRAMMAR, REQUESTS[::-1], sampling, seed=8)
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(together, backwards[::-1], strict=True))


def test_one_is_no_guidance_and_no_penalty():
    sampling = Sampling(1.0, top_k=20)
    same = {m: Sampling(1.0, top_k=20, repetition_penalty=1.0, guidance=1.0) for m in MODALITIES}
    plainly, neutral = (generate(MODEL, GRAMMAR, REQUESTS, s, seed=2) for s in (sampling, same))
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(plainly, neutral, strict=True))
    assert plainly[0].stats.flops == neutral[0].stats.flops


def test_what_needs_no_guidance_pays_for_none():
    requests = [Request(prompt("image"), ("text",), 20, sample=i) for i in range(3)]
    free, guided = (generate(MODEL, GRAMMAR, requests, s)[0].stats for s in (Sampling(), GUIDED))
    assert free.flops == guided.flops > 0
    picture = [Request(prompt("text"), ("image",), 40, grid=(3, 3))]
    free, guided = (generate(MODEL, GRAMMAR, picture, s)[0].stats for s in (Sampling(), GUIDED))
    assert guided.steps == free.steps == 9
    assert guided.flops == 2 * free.flops


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (prompt("text"), prompt()),
        (prompt("image", "text"), prompt()),
        (prompt(), prompt()),
        (prompt("text")[:-1], prompt()),
        (np.array([REGISTRY.bos]), np.array([REGISTRY.bos])),
        (np.array([REGISTRY.bos, REGISTRY.block("text").start]), np.array([REGISTRY.bos])),
        (np.concatenate([prompt("image"), prompt("text")[1:]]), np.concatenate([prompt("image"), prompt()[1:]])),
    ],
)
def test_without_its_question(ids, expected):
    assert without_question(REGISTRY, ids) == expected.tolist()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([0.0, 1.0, 10.0, float("nan")]),
    temperature=st.sampled_from([0.0, 1.0, 5.0]),
    guidance=st.sampled_from([0.0, 1.0, 3.0, 100.0]),
    penalty=st.sampled_from([0.3, 1.0, 2.0]),
    targets=st.lists(st.sampled_from([(), *((m,) for m in MODALITIES), ("image", "text", "audio")]), max_size=4),
)
def test_every_answer_decodes(seed, scale, temperature, guidance, penalty, targets):
    requests = [Request(prompt("text"), t, 40, max_frames=5, sample=i) for i, t in enumerate(targets)]
    sampling = {m: Sampling(temperature, 0, 0.9, penalty, guidance if m != "text" else 1.0) for m in MODALITIES}
    model = tiny(seed % 3, scale)
    for request, generation in zip(requests, generate(model, GRAMMAR, requests, sampling, seed), strict=True):
        answered(generation, request)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_lower_precision(dtype):
    for generation, request in zip(generate(Decoder(MODEL, dtype), GRAMMAR, REQUESTS, GUIDED), REQUESTS, strict=True):
        answered(generation, request)

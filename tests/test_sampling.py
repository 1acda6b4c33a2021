"""Sampling: the distribution is that of the settings, and nothing that is not allowed is ever chosen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.errors import ConfigError
from mmtok.transformer.sampling import Sampler, Sampling, uniforms


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"guidance": -0.5}, "guidance"),
    ],
)
def test_impossible_settings_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        Sampling(**values)
    with pytest.raises(ConfigError, match="video"):
        Sampler({"video": Sampling()})
    for everything in (Sampling(guidance=2.0), {"text": Sampling(guidance=0.0)}):
        with pytest.raises(ConfigError, match="for text"):
            Sampler(everything)


def draw(logits: torch.Tensor, sampler: Sampler, n: int = 40000) -> np.ndarray:
    """Frequencies of n draws from one row of logits in which everything but id 0 is allowed."""
    rows = logits.expand(n, -1)
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask[:, 0] = False
    ids = sampler(rows, mask, torch.zeros(n, dtype=torch.int64), uniforms(5, [0], n)[0])
    return np.bincount(ids.numpy(), minlength=logits.shape[-1]) / n


def test_sampling_follows_the_distribution():
    logits = torch.tensor([9.0, 1.0, 0.0, -1.0, 0.5, -30.0])
    for temperature in (0.5, 1.0, 3.0):
        expected = torch.softmax(logits[1:] / temperature, -1).numpy()
        got = draw(logits, Sampler(Sampling(temperature)))
        assert got[0] == 0
        assert np.abs(got[1:] - expected).max() < 0.01
    # of 0.486, 0.295, 0.179, 0.041 top-p 0.7 needs two and top-k 3 three
    for sampling, kept in ((Sampling(top_k=3), [1, 2, 4]), (Sampling(top_p=0.7), [1, 4]), (Sampling(0.0), [1])):
        got = draw(logits, Sampler(sampling))
        expected = torch.softmax(logits[kept], -1).numpy()
        assert np.flatnonzero(got).tolist() == kept
        assert np.abs(got[kept] - expected).max() < 0.01


def test_settings_are_of_the_modality_of_the_row():
    sampler = Sampler({"text": Sampling(0.0), "image": Sampling(100.0), "audio": Sampling(1.0, top_k=1)})
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).expand(300, -1)
    modality = torch.arange(300) % 3
    ids = sampler(logits, torch.ones_like(logits, dtype=torch.bool), modality, uniforms(1, [0], 300)[0])
    best = int(logits[0].argmax())
    assert set(ids[modality == 0].tolist()) == set(ids[modality == 2].tolist()) == {best}
    assert len(set(ids[modality == 1].tolist())) > 30


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(width=32) | st.just(0.0), min_size=2, max_size=12),
    data=st.data(),
    temperature=st.sampled_from([0.0, 1e-9, 1.0, 1e9]),
    u=st.sampled_from([0.0, 0.5, float(np.float32(1 - 2**-24))]),
)
def test_only_allowed_ids_are_chosen_whatever_the_scores(values, data, temperature, u):
    mask = torch.tensor([data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))])
    mask[0, data.draw(st.integers(0, len(values) - 1))] = True
    sampling = Sampling(
        temperature, top_k=data.draw(st.integers(0, 3)), top_p=data.draw(st.sampled_from([1e-9, 0.5, 1]))
    )
    row = torch.zeros(1, dtype=torch.int64)
    (chosen,) = Sampler(sampling)(torch.tensor([values]), mask, row, torch.tensor([u])).tolist()
    assert mask[0, chosen]


@pytest.mark.parametrize("sampling", [Sampling(top_p=0.9), Sampling(0.3, top_p=0.99), Sampling(top_k=300, top_p=0.999)])
def test_ranking_in_steps_keeps_what_ranking_all_keeps(sampling):
    scores = 3 * torch.randn(6, 2000, generator=torch.Generator().manual_seed(0)) * torch.arange(6)[:, None]
    kinds = torch.tensor([0, 1, 2, 0, 1, 2])  # rows of image have no limit
    sampler = Sampler({"text": sampling, "audio": sampling})
    probs = torch.softmax(scores.double() / sampling.temperature, -1)
    kept = sampler._filter(probs, kinds) > 0
    for row, kind in enumerate(kinds.tolist()):
        if kind == 1:
            assert kept[row].all()
            continue
        ranked = probs[row].sort(descending=True).values
        count = int(((ranked.cumsum(-1) - ranked) < sampling.top_p).sum())
        threshold = ranked[min(count, sampling.top_k or 2000) - 1]
        assert torch.equal(kept[row], probs[row] >= threshold)


def test_the_repetition_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    held = torch.randint(0, 30, (5, 8), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(5, 30, dtype=torch.bool).scatter_(1, held, True)
    everything = torch.ones(5, 30, dtype=torch.bool)
    for penalty in (1.3, 4.0, 0.5):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(held, logits.double())
        for kind in range(3):
            modality = torch.full((5,), kind)
            sampler = Sampler({"image": Sampling(0.0, repetition_penalty=penalty)})
            ids = sampler(logits, everything, modality, torch.zeros(5), seen)
            best = expected.argmax(-1) if kind == 1 else logits.argmax(-1)
            chosen = ids if kind == 1 else ids * 0 + best  # text and audio are sampled, at chance 0: the first id
            assert torch.equal(chosen, best)
            assert kind == 1 or not ids.any()


def test_guidance_is_the_formula_and_leaves_the_rest_alone():
    generator = torch.Generator().manual_seed(0)
    logits, without = torch.randn(2, 3, 12, generator=generator)
    codes = torch.arange(12) >= 2  # the first two are no codes: the end of a sound
    mask = torch.rand(3, 12, generator=generator) < 0.7
    mask[:, :4] = True
    modality = torch.tensor([1, 2, 0])
    settings = {"image": Sampling(guidance=3.0), "audio": Sampling(guidance=0.5)}
    for shift in (0.0, 50.0):  # scores mean the same whatever is added to all of a row
        got = Sampler(settings).guide(logits, without + shift, mask, codes, modality)
        for row, scale in ((0, 3.0), (1, 0.5)):
            allowed = mask[row] & codes
            wanted = torch.softmax((without + scale * (logits - without))[row, allowed].double(), -1)
            probs = torch.softmax(got[row].double().masked_fill(~mask[row], -torch.inf), -1)
            plain = torch.softmax(logits[row].double().masked_fill(~mask[row], -torch.inf), -1)
            assert torch.allclose(probs[allowed] / probs[allowed].sum(), wanted, rtol=1e-4)
            assert torch.allclose(probs[~codes], plain[~codes], rtol=1e-4)
        assert torch.equal(got[2], logits[2])
    only = Sampler(settings).guide(logits[:, 2:], without[:, 2:], mask[:, 2:], codes[2:], modality)
    assert torch.allclose(only[0], (without + 3 * (logits - without))[0, 2:], atol=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    values=st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), min_size=2, max_size=8),
    scale=st.sampled_from([0.0, 1.0, 4.0, 1e6]),
    penalty=st.sampled_from([0.1, 1.0, 3.0]),
    data=st.data(),
)
def test_whatever_the_scores_guidance_and_penalty_choose_what_is_allowed(values, scale, penalty, data):
    size = len(values)
    mask, codes, seen = (
        torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))) for _ in range(3)
    )
    mask[data.draw(st.integers(0, size - 1))] = True
    sampler = Sampler({"audio": Sampling(1.0, repetition_penalty=penalty, guidance=scale)})
    given_, without = torch.tensor(values).T[:, None]
    modality = torch.tensor([2])
    scores = sampler.guide(given_, without, mask[None], codes, modality)
    (chosen,) = sampler(
        scores, mask[None], modality, torch.tensor([data.draw(st.sampled_from([0.0, 0.99]))]), seen[None]
    )
    assert mask[chosen]

"""The registry's and the grammar's promises, proven on many cases. Slow; ``pytest -m slow``, some minutes.

Their quick counterparts are in test_registry, test_layouts, test_grammar and test_recovery.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from grammars import Document, Plain, State, documents, layouts, registries, restrictions, sample, to_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmtok.errors import SequenceError
from mmtok.grammar import Grammar
from mmtok.layouts import parse
from mmtok.recovery import recover
from mmtok.registry import VocabularyRegistry

pytestmark = pytest.mark.slow
many = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@st.composite
def cases(draw: st.DrawFn) -> tuple[VocabularyRegistry, Document, list[str]]:
    registry = draw(registries())
    # For each sound with one code a frame and level, another layout to go through.
    through = [draw(layouts(len(t.codebook_sizes))) for t in registry.tokenizers if t.modality == "audio"]
    return registry, draw(documents(registry)), through


@settings(many, max_examples=10_000)
@given(cases())
def test_registries_documents_and_layouts_round_trip(case: tuple[VocabularyRegistry, Document, list[str]]) -> None:
    registry, document, through = case
    again = VocabularyRegistry.from_json(registry.to_json())
    assert again == registry
    assert again.to_json() == registry.to_json()
    grammar = Grammar(again)
    ids = to_ids(grammar, document)
    assert np.array_equal(again.merge(*again.split(ids)), ids)
    inner = [s for s in grammar.spans(ids) if s.name not in ("<bos>", "<eos>")]
    assert [s.tokenizer or s.name for s in inner] == [name for name, _ in document]
    for span, (name, codes) in zip(inner, document, strict=True):
        if span.kind == "control":
            continue
        back = grammar.segment_codes(ids, span)
        for a, b in zip(back, codes, strict=True) if isinstance(codes, tuple) else [(back, codes)]:
            assert np.array_equal(a, b)
        assert np.array_equal(grammar.segment_ids(name, back), ids[span.start : span.end])
    sounds = [t for t in registry.tokenizers if t.modality == "audio"]
    for spec, name in zip(sounds, through, strict=True):
        mine, other = spec.codebook_layout, parse(name, len(spec.codebook_sizes))
        for owner, codes in document:
            if owner == spec.name and mine.rates == other.rates:
                there = other.flatten(mine.unflatten(mine.flatten(codes)))
                known = np.broadcast_to(other.levels(other.frames(there.shape[-1])), there.shape)
                for a, b in zip(other.unflatten(there, known), codes, strict=True):
                    assert np.array_equal(a, b)


def test_a_hundred_thousand_samples_of_random_logits_decode_within_their_budgets() -> None:
    """Mixed batches of 500 rows: every row has its own budget, from 1 up, and its own restriction."""
    count, batch, longest = 0, 500, 0
    make = st.tuples(registries(levels=4), st.integers(0, 2**31))
    drawn: list[tuple[VocabularyRegistry, int, list]] = []

    @settings(many, max_examples=200)
    @given(make.flatmap(lambda x: st.tuples(st.just(x[0]), st.just(x[1]), st.lists(restrictions(x[0]), min_size=4))))
    def draw(case: tuple[VocabularyRegistry, int, list]) -> None:
        drawn.append(case)

    draw()
    for registry, seed, limits in drawn:
        grammar = Grammar(registry)
        generator = torch.Generator().manual_seed(seed)
        rows = [limits[i % len(limits)] for i in range(batch)]
        compiled, budget = grammar.restrict(rows), torch.randint(1, 80, (batch,), generator=generator)
        least = grammar.needed(grammar.initial(batch), compiled)
        sampled, state = sample(grammar, compiled, budget, generator)
        assert not state.failed.any()
        most = torch.maximum(budget, least).tolist()
        for row, limit in zip(sampled.numpy(), most, strict=True):
            used = [s for s in grammar.spans(row) if s.name != "<pad>"]
            assert used[-1].end <= limit
            for span in used:
                if span.kind != "control":
                    grammar.segment_codes(row, span)
            longest = max(longest, used[-1].end)
            count += 1
    print(f"{count} sequences of up to {longest} ids")
    assert count >= 100_000


def test_every_single_token_corruption_of_two_thousand_sequences() -> None:
    """Each is still valid, or a SequenceError at the position that the plain twin finds."""
    totals = {"sequences": 0, "corruptions": 0, "still valid": 0}

    @settings(many, max_examples=2_000)
    @given(registries(most=3), st.data())
    def corrupt(registry: VocabularyRegistry, data: st.DataObject) -> None:
        grammar, plain = Grammar(registry), Plain(registry)
        ids = to_ids(grammar, data.draw(documents(registry)))
        ids = recover(grammar, ids[:40], "drop").ids  # what fits 40 ids, as all the ways to break it are tried
        totals["sequences"] += 1
        follow = functools.cache(lambda state: dict(plain.successors(state)))
        before = plain.run(ids)
        vocabulary = [-1, registry.padded_size, *range(registry.padded_size)]
        for at in range(len(ids)):
            variants = [np.delete(ids, at)]
            variants += [np.insert(ids, at, new) for new in vocabulary]
            for new in vocabulary:
                if new != ids[at]:
                    replaced = ids.copy()
                    replaced[at] = new
                    variants.append(replaced)
            if at + 1 < len(ids) and ids[at] != ids[at + 1]:
                swapped = ids.copy()
                swapped[[at, at + 1]] = ids[[at + 1, at]]
                variants.append(swapped)
            for variant in variants:
                check(grammar, follow, before[at], at, variant)

    def check(grammar: Grammar, follow, state: State, at: int, variant: np.ndarray) -> None:
        totals["corruptions"] += 1
        position = at  # up to here nothing has changed
        for id in variant[at:].tolist():
            after = follow(state).get(id)
            if after is None:
                break
            state, position = after, position + 1
        if position == len(variant) and state == ("done", 0):
            grammar.spans(variant)
            totals["still valid"] += 1
            return
        with pytest.raises(SequenceError) as caught:
            grammar.spans(variant)
        assert caught.value.position == position

    corrupt()
    print(totals)
    assert totals["sequences"] >= 2_000
    assert 0 < totals["still valid"] < totals["corruptions"]

"""The loss of the transformer: against a plain twin, one target after another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmtok.errors import ConfigError
from mmtok.grammar import Grammar
from mmtok.registry import TokenizerSpec, VocabularyRegistry
from mmtok.training.lm import SequenceLoss
from mmtok.transformer import Transformer, TransformerConfig
from mmtok.transformer.packing import attention_mask, pack


def vocabulary() -> VocabularyRegistry:
    registry = VocabularyRegistry.create(
        [
            TokenizerSpec("words", "text", (40,), "t"),
            TokenizerSpec("pictures", "image", (12,), "i", 4, {"downsample": 8}),
            TokenizerSpec("sounds", "audio", (10, 9, 8), "a", 0, {"sample_rate": 8000, "hop": 80}),
        ],
        max_grid=4,
    )
    return registry.extend([TokenizerSpec("more", "audio", (5, 4), "b", 0, {"sample_rate": 8000, "hop": 80})])


def packed(grammar: Grammar) -> tuple[torch.Tensor, ...]:
    """Five documents of everything in random order, in rows: ids, document, positions, answer."""
    registry, r = grammar.registry, np.random.default_rng(0)

    def document():
        parts = [
            grammar.segment_ids("words", r.integers(0, 40, r.integers(1, 5))),
            grammar.segment_ids("pictures", r.integers(0, 12, (2, r.integers(1, 4)))),
            grammar.segment_ids("sounds", np.stack([r.integers(0, s, 2) for s in (10, 9, 8)])),
            grammar.segment_ids("more", np.stack([r.integers(0, s, 3) for s in (5, 4)])),
            grammar.segment_ids("sounds", np.zeros((3, 0), np.int64)),
        ]
        order = r.permutation(len(parts))
        question, answer = parts[order[0]], np.concatenate([parts[i] for i in order[1:]])
        ids = np.concatenate([[registry.bos, registry.user], question, [registry.assistant], answer, [registry.eos]])
        grammar.spans(ids)
        return ids, len(question) + 3

    made = [document() for _ in range(5)]
    ids, documents, positions = (torch.from_numpy(x) for x in pack([d for d, _ in made], 70, registry.pad))
    starts = torch.tensor([*(s for _, s in made), 0])
    return ids, documents, positions, (positions >= starts[documents]) & (documents >= 0)


def model_for(registry: VocabularyRegistry) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(registry.padded_size, 16, 32, 1, 2, 1, 8, max_position_embeddings=128))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)
    return model


def plain(
    model: Transformer, grammar: Grammar, ids: torch.Tensor, documents: torch.Tensor, positions, answer, seen=None
) -> list[tuple[str, torch.Tensor, torch.Tensor, int]]:
    """One target after another, all logits, -inf where the id is not of the target's group.

    Returns:
        of each target its group, nats, the logarithm of the denominator and the document.
    """
    registry = grammar.registry

    def group(target):
        block = next(b for b in registry.blocks if b.start <= target < b.start + b.size)
        for name in ("sounds", "more"):
            if target == registry.closing(name):
                block = registry.blocks_of(name)[0]
        if block.modality in ("control", "text", "grid"):
            chosen = [b for b in registry.blocks if b.modality in ("control", "text", "grid")]
            return "text", {i for b in chosen for i in range(b.start, b.start + b.size)}
        members = set(range(block.start, block.start + block.size))
        if block.modality == "audio" and block.codebook == 0:
            members.add(registry.closing(block.tokenizer))
        return block.name, members

    closings = {registry.closing("pictures")}
    out = []
    logits = model(ids if seen is None else seen, positions, attention_mask(documents))
    for row in range(len(ids)):
        for t in range(1, ids.shape[1]):
            target = int(ids[row, t])
            if not answer[row, t] or documents[row, t] != documents[row, t - 1] or target in closings:
                continue
            name, members = group(target)
            keep = torch.zeros(registry.padded_size, dtype=torch.bool)
            keep[list(members)] = True
            score = logits[row, t - 1].double().masked_fill(~keep, -torch.inf)
            scale = torch.logsumexp(score, 0)
            out.append((name, scale - score[target], scale, int(documents[row, t])))
    return out


@pytest.mark.parametrize(
    ("weights", "z_loss"),
    [({}, 0.0), ({"text": 3.0}, 0.0), ({"image": 0.5, "audio": 0.0}, 0.0), ({"text": 3.0, "audio": 0.5}, 0.01)],
)
def test_sequence_loss_is_the_plain_one(weights, z_loss):
    registry = vocabulary()
    grammar = Grammar(registry)
    batch = packed(grammar)
    model = model_for(registry)
    value, parts = SequenceLoss(grammar, weights, z_loss)(model, *batch)
    found = plain(model, grammar, *batch)

    def weight(name):
        return weights.get(name.partition(":")[0].partition(".")[0], 1.0)

    total = sum(weight(name) * (nats + z_loss * scale**2) for name, nats, scale, _ in found)
    expected = total / sum(weight(name) for name, *_ in found)
    assert abs(value.item() - expected.item()) < 1e-5
    names = {name for name, *_ in found}
    assert parts.keys() == names
    assert len(parts) == 2 + 3 + 2
    for name in names:
        assert abs(parts[name] - np.mean([nats.item() for other, nats, *_ in found if other == name])) < 1e-5
    for p, mine, theirs in zip(
        model.parameters(),
        torch.autograd.grad(value, list(model.parameters())),
        torch.autograd.grad(expected, list(model.parameters())),
        strict=True,
    ):
        assert (mine - theirs).abs().max() < 1e-5 * max(1.0, theirs.abs().max().item()), p.shape


def test_nats_are_those_of_every_target():
    registry = vocabulary()
    grammar = Grammar(registry)
    ids, documents, positions, answer = packed(grammar)
    model, loss = model_for(registry), SequenceLoss(grammar, {"text": 3.0}, 0.1)
    seen = torch.where(answer & (torch.arange(ids.shape[1]) % 3 == 0), registry.blocks_of("words")[0].start, ids)
    for read in (None, seen):
        nats, group, document = loss.nats(model, ids, documents, positions, answer, read)
        assert (nats.dtype, nats.requires_grad) == (torch.float32, False)
        found = plain(model, grammar, ids, documents, positions, answer, read)
        mine = sorted(zip((loss.names[g] for g in group), document.tolist(), nats.tolist(), strict=True))
        theirs = sorted((name, number, value.item()) for name, value, _, number in found)
        assert [x[:2] for x in mine] == [x[:2] for x in theirs]
        np.testing.assert_allclose([x[2] for x in mine], [x[2] for x in theirs], atol=1e-4)
    assert [loss.modalities[g] for g in group.unique_consecutive()] == ["text", "image"] + ["audio"] * 5
    none = loss.nats(model, ids, documents, positions, torch.zeros_like(answer))
    assert [x.shape for x in none] == [(0,)] * 3


def test_weights_that_nothing_has_are_refused():
    grammar = Grammar(vocabulary())
    with pytest.raises(ConfigError, match="weight for 'video', expected one for each of text, image, audio"):
        SequenceLoss(grammar, {"text": 1.0, "video": 2.0})
    with pytest.raises(ConfigError, match="none below 0"):
        SequenceLoss(grammar, {"text": -1.0})
    with pytest.raises(ConfigError, match="none below 0"):
        SequenceLoss(grammar, z_loss=-1e-4)


@pytest.mark.parametrize("layout", ["interleaved", "codebook-major", "delayed:0,1,2", "delayed:2,1,1", "delayed:1,1,1"])
def test_all_that_may_stand_in_place_of_a_code_competes_with_it(layout):
    registry = VocabularyRegistry.create([TokenizerSpec("sounds", "audio", (4, 3, 2), "a", layout=layout)], max_grid=2)
    grammar = Grammar(registry)
    loss = SequenceLoss(grammar)
    for frames in (0, 1, 4):
        sound = grammar.segment_ids("sounds", np.stack([np.arange(frames) % size for size in (4, 3, 2)]))
        ids = np.concatenate([[registry.bos], sound, [registry.eos]])
        for t in range(2, len(ids) - 1):
            target, may_be = int(ids[t]), grammar.mask(grammar.resume([ids[:t]]))[0].nonzero()[:, 0].tolist()
            assert grammar.loss_mask(ids)[t] == (len(may_be) > 1)
            if len(may_be) > 1:
                group = int(loss.group[target])
                assert loss.names[group].startswith("audio.")
                assert set(may_be) <= set(loss.columns[group].tolist())
                assert int(loss.place[target]) >= 0


def test_loss_without_targets_is_zero_and_differentiable():
    registry = vocabulary()
    model = Transformer(TransformerConfig(registry.padded_size, 8, 8, 1, 1, 1, 8))
    ids = torch.full((1, 4), registry.pad)
    value, parts = SequenceLoss(Grammar(registry))(
        model, ids, torch.full((1, 4), -1), torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.bool)
    )
    assert value.item() == 0
    assert parts == {}
    value.backward()

"""Schedules, accumulation and the optimizers: which parameters each takes, what a step does, and what is saved."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch import nn

from mmtok.errors import ConfigError
from mmtok.training.loop import LOG, LoopConfig, fit, rng
from mmtok.training.optimizers import optimizer_for
from mmtok.transformer import Transformer, TransformerConfig

SHAPE = TransformerConfig(64, 32, 48, 2, 2, 1, 16, max_position_embeddings=32, tie_word_embeddings=False)


def test_constant_schedule():
    config = LoopConfig(steps=100, warmup=10, lr=2.0, schedule="constant", decay=0.25)
    rates = [config.lr_at(i) for i in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10:76] == [2.0] * 66
    falls = [a - b for a, b in itertools.pairwise(rates[75:])]
    assert falls == pytest.approx([2.0 * 0.99 / 25] * 24)  # linear
    assert config.lr_at(100) == pytest.approx(0.02)
    longer = config.replace(["steps=200"])
    assert [longer.lr_at(i) for i in range(76)] == rates[:76]  # what was trained before the decay can be extended
    never = config.replace(["decay=0"])
    assert {never.lr_at(i) for i in range(10, 100)} == {2.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("optimizer=sgd", "optimizer: got 'sgd', expected adamw or muon"),
        ("schedule=linear", "schedule: got 'linear', expected cosine or constant"),
        ("parallel=tensor", "parallel: got 'tensor', expected ddp or fsdp"),
        ("accumulate=0", "accumulate: got 0, expected at least 1"),
        ("decay=1.5", "decay: got 1.5, expected a share"),
    ],
)
def test_choices_that_there_are_not(change, words):
    with pytest.raises(ConfigError, match=words):
        LoopConfig().replace([change])


def test_muon_takes_the_matrices_within_the_model():
    model = Transformer(SHAPE)
    muon, adamw = optimizer_for(model, LoopConfig(optimizer="muon", weight_decay=0.1)).parts
    names = {p: name for name, p in model.named_parameters()}
    of_muon = {names[p] for group in muon.param_groups for p in group["params"]}
    of_adamw = {names[p]: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert {n.split(".")[-2] for n in of_muon} == {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}
    assert len(of_muon) == 2 * 7
    assert {n for n, decay in of_adamw.items() if decay} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert of_muon | of_adamw.keys() == set(names.values())
    assert len(of_muon) + len(of_adamw) == len(names)


def test_muon_without_matrices_is_refused():
    with pytest.raises(ConfigError, match="optimizer muon needs weights of linear layers"):
        optimizer_for(nn.Sequential(nn.Conv1d(2, 2, 3), nn.Embedding(3, 4)), LoopConfig(optimizer="muon"))


def test_a_step_of_muon_is_orthogonal_and_as_large_as_one_of_adamw():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 64, bias=False))
    weight = model[0].weight
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    optimizer_for(model, LoopConfig(optimizer="muon", weight_decay=0.0)).step(0.1)
    moved = (before - weight.detach()) / 0.1
    values = torch.linalg.svdvals(moved) / (0.2 * 64**0.5)
    assert values.min() > 0.5  # the five iterations bring singular values near 1, not to it
    assert values.max() < 1.3
    assert 0.1 < moved.square().mean().sqrt() < 0.3  # AdamW's steps have a root mean square of .2 to .4


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_of_an_optimizer_goes_by_names(name):
    torch.manual_seed(0)
    config = LoopConfig(optimizer=name)
    models = [Transformer(SHAPE), Transformer(SHAPE)]
    optimizers = [optimizer_for(m, config) for m in models]

    def step(model, optimizer, seed):
        ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(seed))
        model.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step(0.01)

    for seed in range(3):
        step(models[0], optimizers[0], seed)
    state = optimizers[0].state(models[0])
    assert {k.rpartition(".")[0] for k in state} == {n for n, _ in models[0].named_parameters()}
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load(models[1], {k: v.clone() for k, v in state.items()})
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer, 7)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)
    some = "model.norm.weight.step"
    for bad, words in (
        ({k: v for k, v in state.items() if k != some}, "does not fit the model"),
        ({**state, "none.weight.step": torch.zeros(())}, "has 'none.weight', which the model has not"),
        ({**state, "model.norm.weight.exp_avg": torch.zeros(3)}, "of model.norm.weight does not fit the model"),
    ):
        with pytest.raises(ConfigError, match=words):
            optimizers[1].load(models[1], bad)


def test_accumulated_batches_are_one_larger_batch(tmp_path):
    """Two batches of four rows give the step of one batch of eight, and are numbered on their own."""
    found = {}
    for accumulate in (1, 2):
        torch.manual_seed(0)
        model = nn.Linear(5, 1)
        config = LoopConfig(
            steps=3, batch_size=8 // accumulate, accumulate=accumulate, bf16=False, eval_every=1, save_every=9
        )
        numbers = []

        def loss(number, model=model, accumulate=accumulate, numbers=numbers, config=config):
            numbers.append(number)
            step, part = divmod(number, accumulate)
            x = torch.from_numpy(rng(config, step).standard_normal((8, 5)).astype("float32"))
            mine = x[part * config.batch_size :][: config.batch_size]
            value = (model(mine).squeeze(1) - mine.sum(1)).square().mean()
            return value, {"loss": value.item(), **({"odd": float(number)} if number % 2 else {})}

        fit(model, config, tmp_path / str(accumulate), loss, lambda step: {}, "test", {})
        lines = (tmp_path / str(accumulate) / LOG).read_text().splitlines()
        found[accumulate] = (model.state_dict(), lines, numbers)
    assert found[1][2] == [0, 1, 2]
    assert found[2][2] == [0, 1, 2, 3, 4, 5]
    for a, b in zip(found[1][0].values(), found[2][0].values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    first, second = (json.loads(found[n][1][2]) for n in (1, 2))
    assert first["loss"] == pytest.approx(second["loss"], abs=1e-6)  # the mean of both
    assert second["odd"] == 5  # where it occurs

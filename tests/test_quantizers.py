"""The quantizer: its own search against the library's, prefixes of levels, no hidden state, codebooks that live."""

from __future__ import annotations

import copy

import pytest
import torch

from mmtok.errors import VocabularyError
from mmtok.quantizers import DEAD_SHARE, Quantizer

DIM, SIZE = 12, 32


def vectors(seed: int, b: int = 4, n: int = 64) -> torch.Tensor:
    return torch.randn(b, n, DIM, generator=torch.Generator().manual_seed(seed))


def trained(levels: int, steps: int = 5) -> Quantizer:
    torch.manual_seed(0)
    quantizer = Quantizer(DIM, 6, SIZE, levels, vectors_per_batch=256).train()
    for step in range(steps):
        quantizer(vectors(step))
    return quantizer


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("levels", [1, 3])
def test_encode_is_the_search_of_the_training_pass(levels):
    quantizer, z = trained(levels), vectors(99)
    codes = quantizer.encode(z)
    assert codes.shape == (4, 64, levels)
    assert codes.dtype == torch.int64
    _, in_training, _ = copy.deepcopy(quantizer)(z)
    assert torch.equal(codes, in_training)
    quantizer.eval()
    out, in_eval, loss = quantizer(z)
    assert torch.equal(codes, in_eval)
    assert torch.equal(codes, quantizer.encode(z))
    assert float(loss.detach()) == 0
    torch.testing.assert_close(quantizer.decode(codes), out, rtol=1e-5, atol=1e-6)


def test_encode_is_the_nearest_entry_of_each_level():
    quantizer, z = trained(3).eval(), vectors(5, 1, 20)
    with torch.no_grad():
        residual = quantizer.project_in(z)[0]
        for level, book in enumerate(quantizer.codebooks()):
            distance = (residual[:, None] - book).double().square().sum(-1)
            code = quantizer.encode(z)[0, :, level]
            assert torch.equal(code, distance.argmin(-1))
            residual = residual - book[code]


def test_prefix_of_the_levels():
    quantizer, z = trained(4).eval(), vectors(6)
    codes = quantizer.encode(z)
    errors = []
    with torch.no_grad():
        for k in range(1, 5):
            assert torch.equal(quantizer.encode(z, k), codes[..., :k])
            out, fewer, _ = quantizer(z, k)
            assert torch.equal(fewer, codes[..., :k])
            torch.testing.assert_close(quantizer.decode(codes[..., :k]), out, rtol=1e-5, atol=1e-6)
            errors.append(float((out - quantizer.project_out(quantizer.project_in(z))).square().mean()))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("steps", [0, 3])
def test_encode_and_decode_change_no_state(training, steps):
    quantizer = trained(2, steps).train(training)
    before, chance = snapshot(quantizer), torch.get_rng_state()
    first = quantizer.encode(vectors(3))
    quantizer.decode(first)
    assert torch.equal(first, quantizer.encode(vectors(3)))
    assert same(before, snapshot(quantizer))
    assert torch.equal(chance, torch.get_rng_state())
    assert quantizer.training == training


def test_eval_forward_changes_no_state():
    quantizer = trained(2).eval()
    before = snapshot(quantizer)
    quantizer(vectors(3))
    assert same(before, snapshot(quantizer))


@pytest.mark.parametrize("code", [-1, SIZE, 2**40])
def test_codes_out_of_range(code):
    codes = torch.zeros(1, 5, 2, dtype=torch.int64)
    codes[0, 3, 1] = code
    with pytest.raises(VocabularyError, match=rf"got codes from .*{code}.*expected 0 to {SIZE - 1}"):
        trained(2, 1).decode(codes)


@pytest.mark.parametrize("levels", [0, 3])
def test_wrong_number_of_levels(levels):
    with pytest.raises(VocabularyError, match=rf"got codes of {levels} levels, expected 1 to 2"):
        trained(2, 1).decode(torch.zeros(1, 5, levels, dtype=torch.int64))


def test_no_vectors():
    quantizer = trained(2, 1).eval()
    codes = quantizer.encode(torch.zeros(1, 0, DIM))
    assert codes.shape == (1, 0, 2)
    assert quantizer.decode(codes).shape == (1, 0, DIM)


def test_codebook_moves_in_training_and_gradients_pass_straight_through():
    quantizer = trained(1)
    before = quantizer.codebooks()[0].clone()
    z = vectors(7).requires_grad_()
    out, _, loss = quantizer(z)
    assert not torch.equal(before, quantizer.codebooks()[0])
    assert float(loss.detach()) > 0
    out.sum().backward()
    # d sum(out) / dz through two linear maps with the identity between them
    expected = quantizer.project_out.weight.sum(0) @ quantizer.project_in.weight
    torch.testing.assert_close(z.grad, expected.expand_as(z), rtol=1e-5, atol=1e-6)


def test_dead_codes_are_revived_from_the_batch():
    quantizer = trained(1)
    book = quantizer.levels[0]._codebook
    assert book.threshold_ema_dead_code == pytest.approx(DEAD_SHARE * 256 / SIZE)
    with torch.no_grad():  # as after many steps without a hit
        book.embed[0, :5] = 1000.0
        book.embed_avg[0, :5] = 10.0
        book.cluster_size[0, :5] = 0.01
    quantizer(vectors(8))
    alive = quantizer.codebooks()[0][:5]
    with torch.no_grad():
        candidates = quantizer.project_in(vectors(8)).reshape(-1, 6)
    nearest = torch.cdist(alive, candidates).min(-1).values
    assert float(nearest.max()) < 1e-3
    assert float(book.cluster_size[0, :5].min()) >= book.threshold_ema_dead_code


def test_training_is_a_function_of_seed_and_data():
    assert same(snapshot(trained(2)), snapshot(trained(2)))

"""The quantizers: codes and vectors are inverses, the library's step and search, no hidden state, live codes."""

from __future__ import annotations

import copy

import pytest
import torch
from vector_quantize_pytorch import LFQ, VectorQuantize

from mmtok.codebook import DEAD_SHARE, Codebook, k_means
from mmtok.errors import ConfigError, VocabularyError
from mmtok.quantizers import KINDS, Quantizer, VectorQuantizer, build_quantizer, entropy

DIM, SIZE = 12, 32
CASES = [*((kind, 1) for kind in KINDS), ("vq", 3)]


def made(kind: str, levels: int = 1, steps: int = 5) -> Quantizer:
    """A quantizer of each kind with 64 codes, after a few training passes."""
    torch.manual_seed(0)
    quantizer = build_quantizer(kind, DIM, 6, 64, levels, (4, 4, 4) if kind == "fsq" else (), vectors_per_batch=256)
    quantizer.train()
    for step in range(steps):
        quantizer(vectors(step))
    return quantizer


def vectors(seed: int, b: int = 4, n: int = 64) -> torch.Tensor:
    return torch.randn(b, n, DIM, generator=torch.Generator().manual_seed(seed))


def trained(levels: int, steps: int = 5) -> VectorQuantizer:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(DIM, 6, SIZE, levels, vectors_per_batch=256).train()
    for step in range(steps):
        quantizer(vectors(step))
    return quantizer


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("kind", "levels"), CASES)
def test_codes_to_vectors_to_codes_is_the_identity(kind, levels):
    quantizer = made(kind, levels).eval()
    for level in range(levels):  # a sum of several levels may have another greedy code: each level by itself
        codes = torch.arange(64)[None, :, None]
        if levels > 1:
            single = VectorQuantizer(DIM, 6, 64).eval()
            single.books[0].entries.copy_(quantizer.books[level].entries)
        else:
            single = quantizer
        assert torch.equal(single.codes_of(single.vectors(codes)), codes)


@pytest.mark.parametrize(("kind", "levels"), CASES)
def test_rows_alone_are_the_rows_of_a_batch(kind, levels):
    quantizer, z = made(kind, levels).eval(), vectors(7, 32, 16)
    codes = quantizer.encode(z)
    assert codes.shape == (32, 16, levels)
    assert codes.unique().numel() > 8
    with torch.no_grad():
        inner = quantizer.project_in(z)
    for i in range(32):
        assert torch.equal(quantizer.search(inner[i : i + 1], None)[0], codes[i])


@pytest.mark.parametrize("kind", KINDS)
def test_sure_codes_stay_when_vectors_move(kind):
    quantizer, z = made(kind).eval(), vectors(17, 8, 100)
    with torch.no_grad():
        inner = quantizer.project_in(z)
    for noise, least in ((1e-6, 0.99), (0.01, 0.5)):
        codes, sure = quantizer.search_within(inner, noise)
        assert torch.equal(codes, quantizer.search(inner, 1))
        assert least < float(sure.float().mean()) < (1.001 if noise < 0.01 else 1)
        changed = torch.zeros_like(sure)
        for i in range(20):
            push = torch.nn.functional.normalize(
                torch.randn(inner.shape, generator=torch.Generator().manual_seed(i)), dim=-1
            )
            moved = quantizer.search(inner + 0.99 * noise * inner.norm(dim=-1, keepdim=True) * push, 1)
            changed |= (moved != codes)[..., 0]
        assert not (changed & sure).any()
        assert changed.any() == (noise == 0.01)


@pytest.mark.parametrize(("kind", "levels"), CASES)
def test_the_training_pass_gives_the_same_codes_and_vectors_and_passes_gradients(kind, levels):
    quantizer, z = made(kind, levels), vectors(8).requires_grad_()
    codes = quantizer.encode(z)
    out, in_training, loss = copy.deepcopy(quantizer)(z)
    assert torch.equal(codes, in_training)
    torch.testing.assert_close(out, quantizer.decode(codes), rtol=1e-4, atol=1e-5)
    (out.square().sum() + loss).backward()
    assert float(z.grad.abs().sum()) > 0
    assert torch.isfinite(loss)


@pytest.mark.parametrize(("kind", "levels"), CASES)
def test_autocast_changes_no_code(kind, levels):
    quantizer, z = made(kind, levels).eval(), vectors(9)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(quantizer(z)[1], quantizer.encode(z))


@pytest.mark.parametrize("kind", KINDS)
def test_state_round_trip(kind):
    quantizer = made(kind).eval()
    other = build_quantizer(kind, DIM, 6, 64, 1, (4, 4, 4) if kind == "fsq" else ()).eval()
    other.load_state_dict(quantizer.state_dict())
    z = vectors(10)
    assert torch.equal(quantizer.encode(z), other.encode(z))
    assert torch.equal(quantizer.decode(quantizer.encode(z)), other.decode(quantizer.encode(z)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pq", DIM, 6, 64), "got quantizer 'pq', expected one of: vq, cosine, simvq, fsq, lfq"),
        (("fsq", DIM, 6, 64), "which needs them"),
        (("vq", DIM, 6, 64, 1, (4, 4, 4)), "they go with 'fsq'"),
        (("fsq", DIM, 6, 64, 1, (4, 4)), "such as codebook_size=16"),
        (("fsq", DIM, 6, 64, 1, (2, 32)), "at least 3"),
        (("lfq", DIM, 6, 60), "a power of two"),
        (("simvq", DIM, 6, 64, 2), "2 residual levels of 'simvq'"),
        (("vq", DIM, 6, 64, 0), "0 residual levels"),
    ],
)
def test_numbers_that_do_not_go_together(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build_quantizer(*arguments)


def test_the_entropy_of_a_vector_is_that_of_the_library_which_sums_over_all_codes():
    quantizer, z = made("lfq"), torch.nn.functional.normalize(vectors(11, 1, 50)[..., :6], dim=-1) * 0.05
    z = torch.nn.functional.normalize(z, dim=-1)
    library = LFQ(dim=6, codebook_size=64, spherical=True).train()
    _, breakdown = library(z, return_loss_breakdown=True)
    one = torch.sigmoid(4 * quantizer.sharpness / 6**0.5 * z)
    torch.testing.assert_close(entropy(one).sum(-1).mean(), breakdown.per_sample_entropy, rtol=1e-2, atol=1e-3)


def test_k_means_finds_separate_clusters():
    torch.manual_seed(3)
    centres = torch.randn(8, 6) * 20
    points = (centres[:, None] + 0.01 * torch.randn(8, 40, 6)).flatten(0, 1)
    found = k_means(points[torch.randperm(320)], 8, 30)
    error = (points[:, None] - found).square().sum(-1).min(-1).values
    start = (points[:, None] - points[torch.randperm(320)[:8]]).square().sum(-1).min(-1).values
    assert float(error.mean()) < 0.5 * float(start.mean())
    with pytest.raises(ConfigError, match="got 7 vectors for 8 codes"):
        k_means(points[:7], 8)


@pytest.mark.parametrize(("kind", "levels"), [("vq", 1), ("cosine", 1), ("vq", 3)])
def test_initialised_codebooks_are_used_and_stay(kind, levels):
    torch.manual_seed(0)
    quantizer = build_quantizer(kind, DIM, 6, 64, levels, vectors_per_batch=256)
    quantizer.initialise(vectors(0, 16, 128).flatten(0, 1))
    before = snapshot(quantizer)
    codes = quantizer.encode(vectors(0, 16, 128))
    assert codes[..., 0].unique().numel() == 64
    quantizer.eval()(vectors(1))
    assert same(before, snapshot(quantizer))
    quantizer.train()(vectors(1))  # no second k-means: the codebook moves by a hundredth
    moved = (quantizer.books[0].entries - before["levels.0.entries"]).norm(dim=-1).median()
    assert 0 < float(moved) < 0.2


@pytest.mark.parametrize("levels", [1, 3])
def test_encode_is_the_search_of_the_training_pass(levels):
    quantizer, z = trained(levels), vectors(99)
    codes = quantizer.encode(z)
    assert codes.shape == (4, 64, levels)
    assert codes.dtype == torch.int64
    _, in_training, _ = copy.deepcopy(quantizer)(z)
    assert torch.equal(codes, in_training)
    quantizer.eval()
    out, in_eval, _ = quantizer(z)
    assert torch.equal(codes, in_eval)
    assert torch.equal(codes, quantizer.encode(z))
    torch.testing.assert_close(quantizer.decode(codes), out, rtol=1e-5, atol=1e-6)


def test_encode_is_the_nearest_entry_of_each_level():
    quantizer, z = trained(3).eval(), vectors(5, 1, 20)
    with torch.no_grad():
        residual = quantizer.project_in(z)[0]
        for level, book in enumerate(b.entries for b in quantizer.books):
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
    before = quantizer.books[0].entries.clone()
    z = vectors(7).requires_grad_()
    out, _, loss = quantizer(z)
    assert not torch.equal(before, quantizer.books[0].entries)
    assert float(loss.detach()) > 0
    out.sum().backward()
    # d sum(out) / dz through two linear maps with the identity between them
    expected = quantizer.project_out.weight.sum(0) @ quantizer.project_in.weight
    torch.testing.assert_close(z.grad, expected.expand_as(z), rtol=1e-5, atol=1e-6)


def test_dead_codes_are_revived_from_the_batch():
    quantizer = trained(1)
    book = quantizer.books[0]
    least = DEAD_SHARE * 256 / SIZE
    with torch.no_grad():  # as after many steps without a hit
        book.entries[:5] = 1000.0
        book.sums[:5] = 10.0
        book.counts[:5] = 0.01
    quantizer(vectors(8))
    with torch.no_grad():
        candidates = quantizer.project_in(vectors(8)).reshape(-1, 6)
    nearest = torch.cdist(book.entries[:5], candidates).min(-1).values
    assert float(nearest.max()) < 1e-3
    assert float(book.counts[:5].min()) >= least


@pytest.mark.parametrize("cosine", [False, True])
def test_the_step_is_that_of_the_library(cosine):
    torch.manual_seed(0)
    book = Codebook(SIZE, 6, 256, cosine).train()
    library = VectorQuantize(
        dim=6, codebook_size=SIZE, decay=0.99, threshold_ema_dead_code=0, use_cosine_sim=cosine, rotation_trick=False
    ).train()
    z = torch.randn(20, 4, 64, 6)
    book.start(book.on_sphere(z[0]).flatten(0, 1))
    book.share = 0.0  # no code is dead
    theirs = library._codebook
    theirs.embed.copy_(book.entries[None])
    theirs.embed_avg.copy_(book.sums[None])
    theirs.cluster_size.copy_(book.counts[None])
    for batch in z:
        quantized, codes = book(book.on_sphere(batch))
        _, index, _ = library(batch)
        assert torch.equal(codes, index)
    torch.testing.assert_close(book.entries, theirs.embed[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(book.counts, theirs.cluster_size[0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(quantized, book.entries[codes]), "what was returned is from before the step"


def test_training_is_a_function_of_seed_and_data():
    assert same(snapshot(trained(2)), snapshot(trained(2)))


# --- projections that start at principal components


@pytest.mark.parametrize("kind", KINDS)
def test_aligned_projections_keep_vectors_of_their_rank(kind):
    quantizer = made(kind, steps=0)
    rank = quantizer.project_in.out_features
    g = torch.Generator().manual_seed(1)
    spread = torch.linalg.qr(torch.randn(DIM, rank, generator=g))[0].T * torch.arange(rank, 0, -1)[:, None]
    mean = torch.arange(DIM) / 3
    z = torch.randn(500, rank, generator=g) @ spread + mean
    quantizer.align(z)
    inside = quantizer.project_in(z)
    torch.testing.assert_close(quantizer.project_out(inside), z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inside.mean(0), torch.zeros(rank), rtol=0, atol=1e-4)
    torch.testing.assert_close(quantizer.project_out(torch.zeros(rank)), z.mean(0), rtol=1e-4, atol=1e-4)
    covariance = inside.T @ inside / len(z)
    assert (covariance.diag().diff() < 0).all(), "the first channel varies most"
    torch.testing.assert_close(covariance, covariance.diag().diag(), rtol=0, atol=1e-3)


def test_aligned_projections_lose_what_varies_least():
    quantizer = made("vq", steps=0)
    z = vectors(0).flatten(0, 1) * torch.linspace(1, 2, DIM) + 5
    quantizer.align(z)
    lost = (quantizer.project_out(quantizer.project_in(z)) - z).square().sum(1).mean()
    variances = torch.linalg.eigvalsh((z - z.mean(0)).T @ (z - z.mean(0)) / len(z))
    torch.testing.assert_close(lost, variances[: DIM - 6].sum(), rtol=1e-3, atol=0)


def test_fewer_channels_than_the_codebook_cannot_be_aligned():
    with pytest.raises(ConfigError, match="got 6 channels in the codebook and 4 in the vectors"):
        build_quantizer("vq", 4, 6, 16).align(torch.randn(50, 4))


def test_levels_that_start_from_aligned_vectors_leave_less_and_less():
    quantizer = made("vq", 3, steps=0).eval()
    z = vectors(0, 16)
    quantizer.align(z.flatten(0, 1))
    quantizer.initialise(z.flatten(0, 1))
    left = [
        (quantizer.decode(quantizer.encode(z, n)) - quantizer.project_out(quantizer.project_in(z))).square().mean()
        for n in (1, 2, 3)
    ]
    assert left[0] > 1.5 * left[1] > 1.5**2 * left[2]
    assert all(book.started for book in quantizer.books)

"""Nearest codes against their definition, for every tile, batch, dtype and size of numbers; near ties; memory."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtok import nearest as module
from mmtok.errors import VocabularyError
from mmtok.nearest import near_ties, nearest, nearest_within

quick = settings(derandomize=True, deadline=None, max_examples=60)
# (ROWS, TILE, GROUP, PENDING, SLICE)
SIZES = (
    (512, 2**20, 32, 2**20, 2**18),
    (1, 1, 1, 0, 1),
    (3, 24, 4, 5, 7),
    (16, 256, 16, 0, 64),
    (7, 2**20, 5, 2**20, 9),
)


@contextlib.contextmanager
def sizes(rows: int, tile: int, group: int, pending: int, slices: int) -> Iterator[None]:
    """The search with other sizes of its tiles, groups and lists."""
    names = ("ROWS", "TILE", "GROUP", "PENDING", "SLICE")
    before = [getattr(module, name) for name in names]
    try:
        for name, value in zip(names, (rows, tile, group, pending, slices), strict=True):
            setattr(module, name, value)
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(module, name, value)


def plain(x: Tensor, c: Tensor) -> Tensor:
    """The definition, written down: all float64 distances, summed by folding, and the first of the least."""
    terms = (x.detach().double().numpy()[:, None] - c.detach().double().numpy()[None]) ** 2
    while terms.shape[-1] > 1:
        keep = (terms.shape[-1] + 1) // 2
        folded = terms[..., :keep].copy()
        folded[..., : terms.shape[-1] - keep] += terms[..., keep:]
        terms = folded
    return torch.from_numpy(terms[..., 0].argmin(1))


def noise(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def crowded(k: int, d: int, seed: int = 1) -> Tensor:
    """A codebook in which entries lie together in fours, equal but for the last bits of float32."""
    centres = noise(-(-k // 4), d, seed).repeat(4, 1)[:k]
    return centres * (1 + torch.randint(-2, 3, centres.shape, generator=torch.Generator().manual_seed(seed)) * 2.0**-23)


@quick
@given(st.integers(0, 20), st.integers(1, 70), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from(SIZES))
def test_small_halves_with_many_ties(n, k, d, seed, size):
    rng = np.random.default_rng(seed)
    x, c = (torch.from_numpy(rng.integers(-4, 5, (m, d)) / 2).float() for m in (n, k))
    with sizes(*size):
        found = nearest(x, c)
    assert found.dtype == torch.int64
    # exact in any order: numpy's own sum and first of the least
    assert found.tolist() == ((x.numpy()[:, None] - c.numpy()) ** 2).sum(-1).argmin(1).tolist()


@quick
@given(
    st.integers(1, 24),
    st.integers(1, 90),
    st.sampled_from((1, 2, 3, 8, 13, 64)),
    st.integers(0, 999),
    st.sampled_from(SIZES),
)
def test_float32_noise_with_near_ties(n, k, d, seed, size):
    x, c = noise(n, d, seed), crowded(k, d, seed + 1)
    x[::2] = c[torch.arange(len(x[::2])) % k] + 1e-3 * noise(len(x[::2]), d, seed + 2)
    with sizes(*size):
        assert torch.equal(nearest(x, c), plain(x, c))


@quick
@given(
    st.integers(0, 999),
    st.sampled_from((1e-30, 1e-22, 1e-12, 1.0, 1e6, 1e25)),
    st.sampled_from((1e-30, 1.0, 1e4, 1e25)),
)
def test_numbers_of_any_size(seed, scale, shift):
    x, c = noise(12, 6, seed) * scale, crowded(200, 6, seed + 1) * scale
    assert torch.equal(nearest(x, c), plain(x, c))
    assert torch.equal(nearest(x + shift, c + shift), plain(x + shift, c + shift))  # most of what differs is lost
    if scale * shift < 1e35:
        assert torch.equal(nearest(x * shift, c), plain(x * shift, c))
    x[3] = shift  # one row of another size moves no other
    assert torch.equal(nearest(x, c), plain(x, c))


def test_the_sum_is_folded():
    # Squared terms 4, 2^-52 and 1.5625 2^-52: added to 4 one by one they vanish, together they do not.
    large, small, other = 2.0, 2.0**-26, 1.25 * 2.0**-26
    x, plain_four = torch.zeros(1, 3), [large, 0.0, 0.0]
    assert nearest(x, torch.tensor([[large, small, other], plain_four])).tolist() == [0]
    assert nearest(x, torch.tensor([[other, large, small], plain_four])).tolist() == [1]


@pytest.mark.parametrize("d", [1, 8, 100, 512])
def test_the_same_in_every_tile_batch_and_order(d):
    x, c = noise(60, d), crowded(210, d)
    whole = plain(x, c)
    for size in SIZES[0], SIZES[3], SIZES[4]:
        with sizes(*size):
            assert torch.equal(nearest(x, c), whole)
    assert torch.equal(torch.cat([nearest(row[None], c) for row in x]), whole)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    assert torch.equal(nearest(x[order], c), whole[order])
    assert torch.equal(nearest(x.T.contiguous().T, c.T.contiguous().T), whole)


def test_threads_do_not_matter():
    x, c, threads = noise(600, 8), crowded(3000, 8), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(nearest(x, c))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_equal_entries():
    x, c = noise(9, 8), noise(10, 8, 1)
    for size in SIZES:
        with sizes(*size):
            assert torch.equal(nearest(x, c.repeat(4, 1)), plain(x, c))
            assert not nearest(x, torch.zeros(50, 8)).any()


def test_one_entry_and_no_vectors():
    assert nearest(noise(5, 3), noise(1, 3)).tolist() == [0] * 5
    assert nearest(torch.zeros(0, 3), noise(7, 3)).tolist() == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_widened(dtype):
    x, c = noise(100, 8).to(dtype), noise(300, 8, 1).to(dtype)
    whole = plain(x.float(), c.float())
    for a, b in ((x, c), (x.float(), c), (x, c.float()), (x.double(), c)):
        assert torch.equal(nearest(a, b), whole)


def test_float64_is_searched_in_float64():
    x = torch.zeros(1, 2, dtype=torch.float64)
    c = torch.tensor([[1.0, 1.0], [1.0, 1.0 - 1e-12], [1.0, 1.0 - 1e-12]], dtype=torch.float64)
    assert nearest(x, c).tolist() == [1]
    assert nearest(x, c.float()).tolist() == [0]
    x, c = noise(100, 8).double() / 3, noise(300, 8, 1).double() / 3
    c[150:] = c[:150] * (1 + 2.0**-50)
    assert torch.equal(nearest(x, c), plain(x, c))
    assert torch.equal(nearest(x * 1e100, c * 1e100), plain(x * 1e100, c * 1e100))


def test_settings_of_torch_do_not_matter(monkeypatch):
    x, c = noise(300, 32).requires_grad_(), torch.nn.Parameter(crowded(900, 32))
    whole, precision = plain(x, c), torch.get_float32_matmul_precision()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest(x, c), whole)
    assert not nearest(x, c).requires_grad

    def rough(a: Tensor, b: Tensor, out: Tensor, mm=torch.mm) -> Tensor:
        """What this setting may do to a float32 product on another machine."""
        return (
            mm(a, b, out=out) if a.dtype == torch.float64 else mm(a.bfloat16().float(), b.bfloat16().float(), out=out)
        )

    monkeypatch.setattr(torch, "mm", rough)
    assert not torch.equal(nearest(x, c), whole)
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(nearest(x, c), whole)
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize(
    ("x", "c", "message"),
    [
        (torch.zeros(3), torch.zeros(2, 3), r"vectors: got torch.float32 \[3\], expected a float tensor \[n, d\]"),
        (torch.zeros(3, 3), torch.zeros(2, 3).long(), r"codebook: got torch.int64 \[2, 3\], expected a float tensor"),
        (torch.zeros(3, 3), [[0.0]], "codebook: got list, expected a float tensor"),
        (torch.zeros(3, 3), torch.zeros(0, 3), r"empty codebook \[0, 3\], expected at least one"),
        (torch.zeros(3, 0), torch.zeros(2, 0), r"empty codebook \[2, 0\], expected at least one"),
        (torch.zeros(3, 3), torch.zeros(2, 4), "vectors of 3 dimensions and a codebook of 4, expected equal"),
        (torch.zeros(3, 3), torch.zeros(2, 3, device="meta"), "vectors on cpu and a codebook on meta, expected one"),
        (torch.tensor([[0.0], [1.0], [np.nan]]), torch.zeros(2, 1), "vector 2 holds NaN or infinity.*expected numbers"),
        (torch.tensor([[1e30], [-np.inf]]), torch.zeros(2, 1), "vector 1 holds NaN or infinity"),
        (torch.zeros(2, 1), torch.tensor([[0.0], [np.inf]]), "codebook entry 1 holds NaN or infinity"),
        (torch.full((2, 1), 1e160, dtype=torch.float64), torch.zeros(2, 1), r"norm up to 1e\+160, .*squares that fit"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(x, c, message):
    for search in (nearest, near_ties):
        with pytest.raises(VocabularyError, match=message) as error:
            search(x, c)
        assert "\n" not in str(error.value)


def test_near_ties_are_counted_and_named():
    c = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [0.0, 4.0]])
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0005, 0.0], [0.0, 2.0]])
    report = near_ties(x, c)
    assert len(report) == 3
    assert report.rows.tolist() == [1, 2, 4]
    assert report.codes.tolist() == [[0, 1], [2, 3], [0, 2]]
    assert report.margins.tolist() == [0, 0, 0]
    assert str(report) == (
        "3 of 5 vectors have a second code within 1e-06 of the nearest; closest: vector 1, codes 0 and 1, 0"
    )
    wider = near_ties(x, c, within=1.1e-3)
    assert wider.rows.tolist() == [1, 2, 3, 4]
    assert wider.codes[2].tolist() == [1, 0]
    near, far = (4 - float(x[3, 0])) ** 2, float(x[3, 0]) ** 2
    assert float(wider.margins[2]) == pytest.approx((far - near) / near, rel=1e-9)
    assert near_ties(x, c, within=8.0).rows.tolist() == [0, 1, 2, 3, 4]  # of (1, 0) it is exactly 8


def test_near_ties_without_any():
    assert str(near_ties(noise(9, 4), noise(20, 4, 1), within=0)) == (
        "0 of 9 vectors have a second code within 0 of the nearest"
    )
    alone = near_ties(noise(9, 4), noise(1, 4))
    assert (len(alone), alone.codes.shape) == (0, (0, 2))
    assert len(near_ties(noise(0, 4), noise(5, 4))) == 0
    for within in (-1e-9, float("nan")):
        with pytest.raises(VocabularyError, match="expected a relative margin of 0 or more"):
            near_ties(noise(9, 4), noise(5, 4), within=within)


@quick
@given(st.integers(1, 20), st.integers(2, 60), st.integers(0, 999), st.sampled_from(SIZES))
def test_near_ties_against_all_distances(n, k, seed, size):
    x, c = noise(n, 4, seed), crowded(k, 4, seed + 1)
    with sizes(*size):
        report = near_ties(x, c, within=0.01)
    distances = (x.double()[:, None] - c.double()).square().sum(-1)
    (least, second), _ = (t.T for t in distances.topk(2, 1, largest=False))
    margins = (second - least) / least
    rows = (margins <= 0.01).nonzero()[:, 0]
    assert torch.equal(report.rows, rows)
    torch.testing.assert_close(report.margins, margins[rows], rtol=1e-6, atol=1e-12)
    assert torch.equal(report.codes[:, 0], nearest(x, c)[rows])
    assert (report.codes[:, 0] != report.codes[:, 1]).all()
    # Several may be the second: what counts is how far it is.
    torch.testing.assert_close(distances[rows].gather(1, report.codes[:, 1:])[:, 0], second[rows], rtol=1e-12, atol=0)


def test_a_tile_that_holds_the_nearest_alone_gives_no_second():
    x, c = noise(2, 4), crowded(3, 4)
    with sizes(1, 1, 1, 0, 1):
        report = near_ties(x, c, within=0.01)
    assert (report.codes[:, 0] != report.codes[:, 1]).all()


def test_codes_that_rounding_changes_are_near_ties():
    x, c = noise(4000, 8), noise(1024, 8, 1)
    other = nearest(x * (1 + 2.0**-9), c)
    changed = (other != nearest(x, c)).nonzero()[:, 0]
    assert len(changed)
    assert set(changed.tolist()) <= set(near_ties(x, c, within=0.05).rows.tolist())


MEMORY = """
import torch
from mmtok.nearest import near_ties, nearest, nearest_within
torch.set_num_threads(1)
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024
x, c = torch.randn(4096, 8), torch.randn(65536, 8)
nearest(x[:4], c[:4])
before = peak()
nearest(x, c)
print(peak() - before)
near_ties(x[:512], c[:16384])
print(peak() - before)
nearest(x[:512], torch.zeros(16384, 8))
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of a process from /proc")
def test_memory_is_constant():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    search, ties, equal = (int(line) for line in done.stdout.split())
    assert 0 < search < 64  # MB, where N x K float32 would be 1024
    assert 0 < ties < 64
    assert equal < 350  # where every entry is a candidate of every row: 600 if all of them were kept


KERNEL = """
import torch
from mmtok import nearest as module
from mmtok.nearest_triton import scan
def noise(n, d, seed): return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
for n, k, d in ((1, 1, 1), (70, 300, 8), (5, 129, 100)):
    for dtype in (torch.float32, torch.bfloat16):
        x, c = noise(n, d, 0).to(dtype), noise(k, d, 1).to(dtype)
        c[k // 2 :] = c[: k - k // 2] * (1 + 2.0**-23)
        x = x.T.contiguous().T
        half, slack = module._error_bound(x, c, torch.float32)
        index, least, second = scan(x, c, half)
        scores = half.double() - x.double() @ c.double().T
        two = scores.sort(1).values[:, :2]
        assert ((scores[torch.arange(n), index] - two[:, 0]) <= slack).all()
        assert ((least - two[:, 0]).abs() <= slack / 2).all()
        assert second.isinf().all() if k == 1 else ((second - two[:, 1]).abs() <= slack / 2).all()
        assert torch.equal(module._fused(x, c, half, slack), module.nearest(x, c))
print("agree")
"""


def test_triton_kernel_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", KERNEL], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "agree\n"), done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("d", [1, 8, 64, 200])
def test_cuda_gives_the_same_codes(d):
    x, c = noise(1000, d), crowded(5000, d)
    whole = nearest(x, c)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(nearest(x.to("cuda", dtype), c.to("cuda", dtype)).cpu(), whole)
    assert torch.equal(near_ties(x.cuda(), c.cuda()).codes.cpu(), near_ties(x, c).codes)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nearest(noise(4096, d).cuda(), noise(65536, d).cuda())
    assert torch.cuda.max_memory_allocated() - before < 4096 * 65536  # a quarter of N x K float32


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 40),
    k=st.integers(1, 90),
    d=st.integers(1, 9),
    noise=st.sampled_from([0.0, 1e-6, 1e-3, 0.05, 1.0]),
    seed=st.integers(0, 99),
)
def test_a_sure_code_stays_when_its_vector_moves(n, k, d, noise, seed):
    g = torch.Generator().manual_seed(seed)
    x, c = torch.randn(n, d, generator=g), torch.randn(k, d, generator=g)
    codes, sure = nearest_within(x, c, noise)
    assert torch.equal(codes, nearest(x, c))
    for _ in range(4):
        push = torch.nn.functional.normalize(torch.randn(n, d, generator=g).double(), dim=-1)
        moved = x.double() + 0.99 * noise * x.double().norm(dim=-1, keepdim=True) * push
        assert torch.equal(nearest(moved, c)[sure], codes[sure])
    # And none is doubted for nothing: the worst push, towards the boundary with some other entry, changes the code.
    if k > 1 and noise >= 1e-3:
        distance = (x.double()[:, None] - c.double()).square().sum(-1)
        gap = distance - distance.gather(1, codes[:, None])
        apart = (c.double() - c.double()[codes][:, None]).norm(dim=-1)
        reach = noise * x.double().norm(dim=-1, keepdim=True)
        doubtful = ((gap <= 2 * reach * apart) & (torch.arange(k) != codes[:, None])).any(1)
        assert torch.equal(~sure, doubtful)


def test_codes_of_a_tie_are_not_sure():
    codes, sure = nearest_within(torch.tensor([[0.0], [1.0], [-0.9]]), torch.tensor([[-1.0], [1.0]]), 1e-6)
    assert (codes.tolist(), sure.tolist()) == ([0, 1, 0], [False, True, True])

"""What the benchmarks reckon with: intervals, chance, words in common, and distances of recordings."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shares() -> ModuleType:
    return benchmark("shares")


def test_wilson_is_where_the_score_test_rejects(shares) -> None:
    """Both ends p solve |hits / n - p| = z * sqrt(p (1 - p) / n)."""
    for hits, n in ((0, 5), (1, 20), (37, 60), (999, 1000), (5, 5)):
        for p in shares.wilson(hits, n):
            assert abs(hits / n - p) == pytest.approx(shares.Z * math.sqrt(p * (1 - p) / n), abs=1e-9)
    assert shares.wilson(0, 0) == (0.0, 1.0)
    assert shares.share([True, False, True, True]) == {"right": 0.75, "interval": [0.301, 0.954], "of": 4}
    assert shares.share([])["right"] is None


@pytest.mark.parametrize(("n", "chance"), [(1, 0.3), (4, 0.5), (6, 1 / 343)])
def test_binomial_p_counts_outcomes(shares, n, chance) -> None:
    outcomes = list(itertools.product((0, 1), repeat=n))
    for hits in range(n + 1):
        p = math.fsum(math.prod(chance if x else 1 - chance for x in o) for o in outcomes if sum(o) >= hits)
        assert shares.binomial_p(hits, n, chance) == pytest.approx(p, rel=1e-9)
    assert shares.binomial_p(5, 32, 1 / 343) == pytest.approx(3.9e-8, rel=0.03)


def test_shuffled_answers(shares) -> None:
    """Four right of four: one order in 24 is as good. All answers alike: every order is."""
    mean, p = shares.shuffled(np.eye(4))
    assert mean == 0.25
    assert p == pytest.approx(1 / 24, abs=0.01)
    same = np.zeros((5, 5))
    same[:, 2] = 1
    assert shares.shuffled(same) == (0.2, 1.0)
    assert shares.shuffled(np.eye(12))[1] == pytest.approx(1 / 10_001)
    wrong = np.roll(np.eye(6), 1, axis=1)
    assert shares.shuffled(wrong)[1] == 1.0
    assert shares.shuffled(np.zeros((0, 0))) == (0.0, 1.0)


def test_answers_shuffled_among_the_alike(shares) -> None:
    """What is only right of the group proves nothing within it; what is right within it does."""
    groups = np.arange(12) // 4
    of_group = (groups[:, None] == groups).astype(float)
    assert shares.shuffled(of_group)[1] < 0.001
    assert shares.shuffled(of_group, groups)[1] == 1.0
    assert shares.shuffled(np.eye(12), groups)[1] == pytest.approx(1 / 24**3, abs=3e-4)


def test_words_and_their_f1(shares) -> None:
    assert shares.words("“No U-Turn”.") == "no u turn"
    assert shares.words("L’étoile  DE mer_") == "l étoile de mer"
    assert shares.token_f1("A red hat", "a red handbag") == pytest.approx(2 / 3)
    assert shares.token_f1("a a a", "a") == pytest.approx(0.5)
    assert shares.token_f1("", "a cow") == 0.0
    assert shares.token_f1("A COW!", "a cow") == 1.0


@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_f1_is_symmetric_and_one_for_the_same_words(shares, a: list[str], b: list[str]) -> None:
    f1 = shares.token_f1
    x, y = " ".join(a), " ".join(b)
    assert f1(x, y) == f1(y, x)
    assert (f1(x, y) == 1.0) == (sorted(a) == sorted(b))


def warped_plainly(a: np.ndarray, b: np.ndarray) -> float:
    cost = [[float(np.linalg.norm(x - y)) for y in b] for x in a]
    best = np.full((len(a), len(b)), np.inf)
    best[0, 0] = 2 * cost[0][0]
    for i, j in itertools.product(range(len(a)), range(len(b))):
        if i:
            best[i, j] = min(best[i, j], best[i - 1, j] + cost[i][j])
        if j:
            best[i, j] = min(best[i, j], best[i, j - 1] + cost[i][j])
        if i and j:
            best[i, j] = min(best[i, j], best[i - 1, j - 1] + 2 * cost[i][j])
    return best[-1, -1] / (len(a) + len(b))


def test_features_of_silence_and_of_sound() -> None:
    """Silence around a sound changes nothing; silence alone, and nothing at all, have features."""
    mfccs = benchmark("hearing").mfccs
    sound = (0.3 * np.sin(np.arange(8000) ** 1.2 / 9)).astype(np.float32)
    around = np.concatenate([np.zeros(3000, np.float32), sound, np.zeros(500, np.float32)])
    assert np.allclose(mfccs(around), mfccs(sound), atol=1e-3)
    assert mfccs(sound).shape == (27, 24)
    for nothing in (np.zeros(0, np.float32), np.zeros(4000, np.float32)):
        assert np.isfinite(mfccs(nothing)).all()


def test_warping_against_a_plain_loop() -> None:
    hearing = benchmark("hearing")
    r = np.random.default_rng(0)
    query = r.standard_normal((9, 3)).astype(np.float32)
    others = [r.standard_normal((n, 3)).astype(np.float32) for n in (1, 4, 9, 15)] + [np.repeat(query, 2, axis=0)]
    found = hearing.warped(query, others)
    assert found == pytest.approx([warped_plainly(query, x) for x in others], abs=1e-4)
    assert found.argmin() == 4  # the same at half the speed
    assert hearing.warped(query[:1], others[:1]) == pytest.approx([warped_plainly(query[:1], others[0])], abs=1e-4)


@pytest.fixture(scope="module")
def judges() -> Iterator[ModuleType]:
    pytest.importorskip("pocketsphinx")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield benchmark("judges")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_ranks_of_the_nearest(judges) -> None:
    """Of two candidates of one name the nearer counts."""

    class Line(judges.Nearest):
        name, labels, known = "line", ["a", "b", "a", "c"], np.array([0.0, 2.0, 5.0, 9.0])

        def features(self, answer):
            return answer

        def between(self, features, others):
            return np.abs(np.asarray(others) - features)

    judge = Line()
    assert judge.ranks(4.0, ["a", "b", "c"]).tolist() == [0, 1, 3]
    assert judge.ranks(8.0, ["a", "b", "c"]).tolist() == [1, 2, 0]


def test_the_network_of_pictures_tells_two_apart(tmp_path, monkeypatch) -> None:
    looking = benchmark("looking")
    monkeypatch.setattr(looking, "STEPS", 12)
    monkeypatch.setattr(looking, "BATCH", 8)
    pictures = np.full((2, 3, 64, 64), 255, np.uint8)
    pictures[0, :2, 20:44, 20:44], pictures[1, 0, :, 28:36] = 0, 30
    network = looking.trained(pictures, tmp_path)
    near = network.features(pictures) @ network.features(pictures[:, :, :, ::-1]).T
    assert near.argmax(1).tolist() == [0, 1]
    again = looking.trained(pictures, tmp_path)  # from its file
    assert torch.equal(again.head.weight, network.head.weight)
    assert len(list(tmp_path.iterdir())) == 1
    for change in looking.UNTRAINED.values():
        changed = change(pictures[0])
        assert changed.shape == (3, 64, 64)
        assert changed.dtype == np.uint8
        assert not np.array_equal(changed, pictures[0])

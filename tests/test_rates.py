"""Reading a peer's curve: figures at a rate, and the rate for a figure, on curves that are lines over its logarithm."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.evaluation.rates import Figure, at_rate, best_points, rate_for

FIGURES = {"good": Figure(digits=6), "bad": Figure(digits=6, lower_is_closer=True), "missing": Figure()}


def points(rates: list[float]) -> list[dict]:
    return [{"kbps": r, "good": 1 + 0.2 * math.log2(r), "bad": 9 - 1.5 * math.log2(r), "missing": None} for r in rates]


some_rates = st.lists(st.floats(0.5, 100), min_size=2, max_size=8, unique_by=lambda r: round(math.log2(r), 1))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(some_rates, st.floats(0.2, 150), st.randoms())
def test_figures_and_rates_are_inverse(rates: list[float], target: float, chance) -> None:
    chance.shuffle(rates)
    curve = points(rates)
    got = at_rate(curve, "kbps", target, FIGURES)
    value = {"good": 1 + 0.2 * math.log2(target), "bad": 9 - 1.5 * math.log2(target)}
    needs = {key: rate_for(curve, "kbps", key, value[key], FIGURES[key]) for key in value}
    if target < min(rates):
        assert got == {"cannot_go_under": min(rates)}
        assert needs == {key: {"at_most": min(rates)} for key in value}
    elif target > max(rates):
        assert got == {"cannot_go_over": max(rates)}
        assert needs == {key: {"more_than": max(rates)} for key in value}
    elif target not in (min(rates), max(rates)):
        assert got == pytest.approx(value, abs=1e-5)
        assert needs["good"] == {"rate": pytest.approx(target, abs=2e-3)}
        assert needs["bad"] == {"rate": pytest.approx(target, abs=2e-3)}


def test_dear_and_poor_settings_are_not_used() -> None:
    curve = points([1, 2, 4, 8])
    worse = {"kbps": 3.0, "good": 0.1, "bad": 30.0, "missing": None}
    assert at_rate([*curve, worse], "kbps", 3, FIGURES) == at_rate(curve, "kbps", 3, FIGURES)
    # Cheaper and closer: all that is dearer falls out.
    better = {"kbps": 1.5, "good": 99.0, "bad": -9.0, "missing": None}
    assert best_points([*curve, better], "kbps", "bad", FIGURES["bad"]) == [(1, 9.0), (1.5, -9.0)]
    assert rate_for([*curve, better], "kbps", "good", 99.0, FIGURES["good"]) == {"rate": 1.5}
    assert rate_for(curve, "kbps", "missing", 1.0, FIGURES["missing"]) == {"more_than": 0.0}
    # A figure that the cheapest settings lack has no value there.
    lacking = [{**curve[0], "good": None}, *curve[1:]]
    assert "good" not in at_rate(lacking, "kbps", 1.5, FIGURES)
    assert "bad" in at_rate(lacking, "kbps", 1.5, FIGURES)


def test_the_value_of_a_setting_needs_its_rate() -> None:
    curve = points([1, 2, 4])
    for point in curve:
        assert rate_for(curve, "kbps", "good", point["good"], FIGURES["good"]) == {"rate": point["kbps"]}

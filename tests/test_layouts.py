"""Layouts are exact bijections between codes and streams, and refuse what is not in their image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.errors import LayoutError
from mmtok.layouts import CodebookMajor, Delayed, Interleaved, Layout, MultiRate, parse

FILL = 99
quick = settings(deadline=None, derandomize=True)


@st.composite
def layouts(draw: st.DrawFn, k: int) -> Layout:
    delays = tuple(draw(st.lists(st.integers(0, 4), min_size=k, max_size=k)))
    slots = MultiRate(tuple(draw(st.permutations(range(k)))))
    return draw(st.sampled_from([Interleaved(k), CodebookMajor(k), Delayed(delays, FILL), slots]))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Layout, np.ndarray]:
    k, t = draw(st.integers(1, 9)), draw(st.integers(0, 7))
    batch = draw(st.sampled_from([(), (1,), (3,), (2, 2), (0,)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return draw(layouts(k)), rng.integers(0, 50, (*batch, k, t))


@quick
@given(cases())
def test_round_trip_and_levels_in_numpy_and_torch(case: tuple[Layout, np.ndarray]) -> None:
    layout, codes = case
    stream, levels = layout.flatten(codes), layout.levels(codes.shape[-1])
    assert stream.shape == (*codes.shape[:-2], len(levels))
    assert np.array_equal(stream == FILL, np.broadcast_to(levels < 0, stream.shape))
    known = np.broadcast_to(levels, stream.shape)
    back = layout.unflatten(stream, known)
    assert back.dtype == codes.dtype
    assert back.shape == codes.shape
    assert np.array_equal(back, codes)
    tensor = layout.flatten(torch.from_numpy(codes))
    assert np.array_equal(tensor.numpy(), stream)
    assert np.array_equal(layout.unflatten(tensor, torch.from_numpy(known.copy())).numpy(), codes)


@quick
@given(cases(), st.data())
def test_conversion_between_layouts_needs_no_codec(case: tuple[Layout, np.ndarray], data: st.DataObject) -> None:
    first, codes = case
    second = data.draw(layouts(len(first.rates)))
    there = second.flatten(first.unflatten(first.flatten(codes)))
    assert np.array_equal(second.unflatten(there), codes)


@quick
@given(cases(), st.data())
def test_one_wrong_level_is_found_where_it_is(case: tuple[Layout, np.ndarray], data: st.DataObject) -> None:
    layout, codes = case
    codes = np.zeros(codes.shape[-2:], np.int64)
    if codes.size == 0:
        return
    stream, levels = layout.flatten(codes), layout.levels(codes.shape[-1])
    at = data.draw(st.integers(0, len(levels) - 1))
    levels[at] += 1
    with pytest.raises(LayoutError, match=f"position {at}: got level {levels[at]}, expected level {levels[at] - 1}"):
        layout.unflatten(stream, levels)


@quick
@given(cases(), st.integers(1, 8))
def test_a_cut_stream_is_refused_unless_whole_frames_are_left(case: tuple[Layout, np.ndarray], cut: int) -> None:
    layout, codes = case
    stream = layout.flatten(codes)
    if cut > stream.shape[-1]:
        return
    try:
        back = layout.unflatten(stream[..., :-cut])
    except LayoutError:
        return
    assert np.array_equal(layout.flatten(back), stream[..., :-cut])


def test_golden_streams() -> None:
    codes = np.array([[1, 2, 3], [11, 12, 13]])
    assert Interleaved(2).flatten(codes).tolist() == [1, 11, 2, 12, 3, 13]
    assert CodebookMajor(2).flatten(codes).tolist() == [1, 2, 3, 11, 12, 13]
    # MusicGen's pattern: steps [1 _] [2 11] [3 12] [_ 13]
    assert Delayed((0, 1), FILL).flatten(codes).tolist() == [1, 99, 2, 11, 3, 12, 99, 13]
    assert Delayed((0, 1), FILL).levels(3).tolist() == [0, -1, 0, 1, 0, 1, -1, 1]


def test_delayed_refuses_a_shifted_stream_and_a_code_that_is_the_fill() -> None:
    layout = Delayed((0, 1), FILL)
    stream = layout.flatten(np.array([[1, 2], [11, 12]]))
    assert stream.tolist() == [1, 99, 2, 11, 99, 12]
    with pytest.raises(LayoutError, match="position 1: got 5, expected the fill 99"):
        layout.unflatten(np.array([1, 5, 2, 11, 99, 12]))
    with pytest.raises(LayoutError, match="position 2: got 99, expected a code of level 0"):
        layout.unflatten(np.array([1, 99, 99, 11, 99, 12]))
    with pytest.raises(LayoutError, match=r"position \(1, 0\): got 99"):
        layout.unflatten(torch.tensor([[1, 99, 99, 11], [99, 99, 99, 11]]))
    with pytest.raises(LayoutError, match="no code"):
        layout.flatten(np.array([[1], [FILL]]))
    with pytest.raises(LayoutError, match="the stream was cut"):
        Delayed((0, 3), FILL).unflatten(np.array([99, 99]))


def test_wrong_shapes_are_refused() -> None:
    for layout in (Interleaved(3), CodebookMajor(3), Delayed((0, 1, 2), FILL)):
        for codes in (np.zeros((2, 4), int), np.zeros(3, int), torch.zeros(2, 3, dtype=torch.int64)):
            with pytest.raises(LayoutError, match="expected"):
                layout.flatten(codes)
        with pytest.raises(LayoutError, match="position 4: the stream ends, expected level 1 of 3"):
            layout.unflatten(np.zeros(4, int))
        with pytest.raises(LayoutError):
            layout.unflatten(np.array(3))
    with pytest.raises(LayoutError, match="levels have shape"):
        Interleaved(2).unflatten(np.zeros(4, int), np.zeros(2, int))
    for make in (lambda: Interleaved(0), lambda: CodebookMajor(-1), lambda: Delayed((), 0), lambda: Delayed((-1,), 0)):
        with pytest.raises(LayoutError):
            make()


@st.composite
def ragged(draw: st.DrawFn) -> tuple[Layout, tuple[np.ndarray, ...]]:
    """A layout with several codes of a level in a frame, and codes for it."""
    rates = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4).filter(lambda r: set(r) != {1}))
    slots = draw(st.permutations([q for q, rate in enumerate(rates) for _ in range(rate)]))
    layout = draw(st.sampled_from([MultiRate(tuple(slots)), CodebookMajor(len(rates), tuple(rates))]))
    frames, batch = draw(st.integers(0, 5)), draw(st.sampled_from([(), (2,), (0, 3)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return layout, tuple(rng.integers(0, 50, (*batch, rate * frames)) for rate in rates)


@quick
@given(ragged())
def test_several_rates_round_trip_and_convert(case: tuple[Layout, tuple[np.ndarray, ...]]) -> None:
    layout, codes = case
    stream = layout.flatten(codes)
    frames = codes[0].shape[-1] // layout.rates[0]
    assert stream.shape[-1] == layout.length(frames) == len(layout.levels(frames))
    assert np.bincount(layout.levels(frames), minlength=len(codes)).tolist() == [c.shape[-1] for c in codes]
    tensor = layout.flatten([torch.from_numpy(c) for c in codes])
    assert np.array_equal(tensor.numpy(), stream)
    other = CodebookMajor(len(codes), layout.rates)
    through = other.unflatten(
        other.flatten(layout.unflatten(stream, np.broadcast_to(layout.levels(frames), stream.shape)))
    )
    for got, want, also in zip(through, codes, layout.unflatten(tensor), strict=True):
        assert np.array_equal(got, want)
        assert np.array_equal(also.numpy(), want)


def test_golden_multi_rate_stream_of_snac() -> None:
    # Two frames of SNAC at 24 kHz in the order of its speech models: c0 c1 c2 c2 c1 c2 c2.
    codes = [np.array([1, 2]), np.array([11, 12, 13, 14]), np.array([21, 22, 23, 24, 25, 26, 27, 28])]
    layout = MultiRate((0, 1, 2, 2, 1, 2, 2))
    assert layout.rates == (1, 2, 4)
    assert layout.flatten(codes).tolist() == [1, 11, 21, 22, 12, 23, 24, 2, 13, 25, 26, 14, 27, 28]
    with pytest.raises(LayoutError, match="position 11: the stream ends, expected level 1 of 3"):
        layout.unflatten(np.arange(11))
    with pytest.raises(LayoutError, match=r"levels have \[2, 4, 7\] codes"):
        layout.flatten([codes[0], codes[1], codes[2][:7]])
    with pytest.raises(LayoutError, match="sequence of 3 arrays"):
        layout.flatten(np.zeros((3, 4), int))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("interleaved", Interleaved(3)),
        ("codebook-major", CodebookMajor(3)),
        ("codebook-major:1,2,4", CodebookMajor(3, (1, 2, 4))),
        ("delayed:0,1,2", Delayed((0, 1, 2))),
        ("multi-rate:0,1,2,2,1,2,2", MultiRate((0, 1, 2, 2, 1, 2, 2))),
    ],
)
def test_names_and_layouts(name: str, layout: Layout) -> None:
    assert parse(name, 3) == layout
    assert str(layout) == name
    for bad in (name + ":", name + ",x", name.upper(), "", name.replace("0", "-1") + "x"):
        with pytest.raises(LayoutError):
            parse(bad, 3)
    if name != "interleaved" and name != "codebook-major":
        with pytest.raises(LayoutError):
            parse(name, 4)


def test_impossible_layouts_are_refused() -> None:
    for make in (
        lambda: MultiRate(()),
        lambda: MultiRate((0, 2)),
        lambda: MultiRate((0, -1)),
        lambda: CodebookMajor(2, (1,)),
        lambda: CodebookMajor(2, (1, 0)),
    ):
        with pytest.raises(LayoutError):
            make()


def test_levels_that_do_not_belong_together_are_refused() -> None:
    layout = MultiRate((0, 1, 1))
    for codes in (
        [np.array([1], np.int8), np.array([300, 400])],
        [np.zeros((2, 3), int), np.zeros((1, 6), int)],
        [np.array(1), np.array([1, 2])],
        [[1], [2, 3]],
    ):
        with pytest.raises(LayoutError, match="expected"):
            layout.flatten(codes)
    with pytest.raises(LayoutError, match="fill"):
        Delayed((0, 1)).flatten(np.full((2, 3), 2**64 - 1, np.uint64))
    for name in ("multi-rate:0,1000000000", "delayed:0,1000000", "codebook-major:1,100000000000000000000000000"):
        with pytest.raises(LayoutError):
            parse(name, 2)

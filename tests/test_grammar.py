"""The grammar against a plain twin that follows one id at a time: parsing, masks, budgets, restrictions."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mmtok.errors import ConfigError, SequenceError, VocabularyError
from mmtok.grammar import Grammar, GrammarState, Restriction, Span
from mmtok.registry import MODALITIES, TokenizerSpec, VocabularyRegistry

State = tuple
Document = list[tuple[str, np.ndarray]]  # (tokenizer or turn token, codes)


class Plain:
    """The grammar once more, one row and one id at a time, with the shortest way to the end by search."""

    def __init__(self, registry: VocabularyRegistry) -> None:
        self.r = registry
        self.openings = {registry.opening(t.name): t for t in registry.tokenizers if t.modality != "text"}
        self.shortest = functools.cache(self._shortest)

    def step(self, state: State, id: int) -> State | None:
        r = self.r
        try:
            (index,), (code,) = r.split([id])
        except VocabularyError:
            return None
        block = r.blocks[index]
        kind = state[0]
        if kind == "start":
            return ("body",) if id == r.bos else None
        if kind == "body":
            if id in self.openings:
                t = self.openings[id]
                return ("height", t.name) if t.modality == "image" else ("audio", t.name, 0, 0)
            if id == r.eos:
                return ("done",)
            return ("body",) if block.modality == "text" or id in (r.user, r.assistant) else None
        if kind == "done":
            return state if id == r.pad else None
        name = state[1]
        if kind == "height":
            return ("width", name, int(code) + 1) if block.modality == "grid" else None
        if kind == "width":
            return ("codes", name, state[2] * (int(code) + 1)) if block.modality == "grid" else None
        if kind == "codes":
            if block.tokenizer != name:
                return None
            return ("codes", name, state[2] - 1) if state[2] > 1 else ("close", name)
        if kind == "close":
            return ("body",) if id == r.closing(name) else None
        frames, level = state[2:]
        if id == r.closing(name) and level == 0:
            return ("body",)
        if (block.tokenizer, block.codebook) != (name, level):
            return None
        last = level + 1 == len(r.blocks_of(name))
        return ("audio", name, frames + last, 0 if last else level + 1)

    def permitted(self, state: State, id: int, restriction: Restriction | None) -> bool:
        r = restriction
        if r is None:
            return True
        if state[0] == "body":
            if id in self.openings:
                return self.openings[id].modality in r.modalities
            return id == self.r.eos or ("text" in r.modalities and id not in (self.r.user, self.r.assistant))
        if state[0] in ("height", "width") and r.grid:
            return self.r.split([id])[1][0] + 1 == r.grid[state[0] == "width"]
        if state[0] == "audio" and state[3] == 0:
            limit = np.inf if r.max_frames is None else r.max_frames
            return state[2] >= r.min_frames if id == self.r.closing(state[1]) else state[2] < limit
        return True

    def following(self, state: State, restriction: Restriction | None) -> Iterator[tuple[int, State]]:
        for id in range(self.r.padded_size):
            after = self.step(state, id)
            if after is not None and self.permitted(state, id, restriction):
                yield id, after

    def _shortest(self, state: State, restriction: Restriction | None) -> int:
        """Ids to <eos>, by breadth-first search."""
        seen, front, length = {state}, [state], 0
        while ("done",) not in seen:
            front = list({after for s in front for _, after in self.following(s, restriction)} - seen)
            seen.update(front)
            length += 1
            assert front, "no way to <eos>"
        return length

    def mask(self, state: State, budget: int | None, restriction: Restriction | None) -> set[int]:
        left = max(np.inf if budget is None else budget, self.shortest(state, restriction)) - 1
        return {i for i, after in self.following(state, restriction) if self.shortest(after, restriction) <= left}

    def run(self, ids: np.ndarray) -> list[State]:
        """The states before each id and after the last, cut where an id is forbidden."""
        states: list[State] = [("start",)]
        for id in ids:
            after = self.step(states[-1], int(id))
            if after is None:
                break
            states.append(after)
        return states


@functools.cache
def cached(registry: VocabularyRegistry) -> tuple[Grammar, Plain]:
    return Grammar(registry), Plain(registry)


@st.composite
def registries(draw: st.DrawFn, most: int = 5, levels: int = 3) -> VocabularyRegistry:
    def specs(prefix: str, most: int) -> list[TokenizerSpec]:
        out = []
        modalities = draw(st.lists(st.sampled_from([*MODALITIES, "image", "audio"]), max_size=most))
        modalities += draw(st.sampled_from([[], ["audio"], ["image"], ["image", "text", "audio"]]))
        for i, modality in enumerate(modalities):
            k = draw(st.integers(1, levels)) if modality == "audio" else 1
            sizes = tuple(draw(st.integers(1, 3)) for _ in range(k))
            out.append(TokenizerSpec(f"{prefix}{i}", modality, sizes, f"{prefix}{i}", draw(st.integers(0, 1))))
        return out

    grid, pad = draw(st.integers(1, 3)), draw(st.sampled_from([1, 4]))
    registry = VocabularyRegistry.create(specs("a", most), max_grid=grid, pad_multiple=pad)
    return registry.extend(specs("b", 2)) if draw(st.booleans()) else registry


@st.composite
def documents(draw: st.DrawFn, registry: VocabularyRegistry) -> Document:
    names = [*(t.name for t in registry.tokenizers), "<user>", "<assistant>"]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    out: Document = []
    for name in draw(st.lists(st.sampled_from(names), min_size=draw(st.integers(0, 4)), max_size=6)):
        if name.startswith("<"):
            out.append((name, np.zeros(0, np.int64)))
            continue
        spec = registry.tokenizer(name)
        if spec.modality == "audio":
            frames = draw(st.integers(0, 4))
            codes = np.stack([rng.integers(0, size, frames) for size in spec.codebook_sizes])
        else:
            side = st.integers(1, registry.max_grid)
            shape = (draw(st.integers(1, 4)),) if spec.modality == "text" else (draw(side), draw(side))
            codes = rng.integers(0, spec.codebook_sizes[0], shape)
        if not (spec.modality == "text" and out and out[-1][0] == name):  # neighbours of one tokenizer are one text
            out.append((name, codes))
    return out


def to_ids(grammar: Grammar, document: Document, padding: int = 0) -> np.ndarray:
    r = grammar.registry
    parts = [[r.control(name)] if name.startswith("<") else grammar.segment_ids(name, c) for name, c in document]
    return np.concatenate([[r.bos], *parts, [r.eos], [r.pad] * padding]).astype(np.int64)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[Grammar, Plain, Document, np.ndarray]:
    grammar, plain = cached(draw(registries()))
    document = draw(documents(grammar.registry))
    return grammar, plain, document, to_ids(grammar, document, draw(st.integers(0, 2)))


@st.composite
def restrictions(draw: st.DrawFn, registry: VocabularyRegistry) -> Restriction | None:
    side = st.integers(1, registry.max_grid)
    least = draw(st.integers(0, 3))
    return draw(
        st.one_of(
            st.none(),
            st.builds(
                Restriction,
                modalities=st.lists(st.sampled_from(MODALITIES), unique=True).map(tuple),
                grid=st.one_of(st.none(), st.tuples(side, side)),
                min_frames=st.just(least),
                max_frames=st.one_of(st.none(), st.integers(least, 4)),
            ),
        )
    )


def walk(grammar: Grammar, ids: np.ndarray) -> list[GrammarState]:
    """The states before each id, and after the last."""
    states = [grammar.initial(1)]
    for id in ids:
        states.append(grammar.advance(states[-1], torch.tensor([int(id)])))
    return states


def allowed(mask: torch.Tensor) -> set[int]:
    return set(torch.nonzero(mask)[:, 0].tolist())


def sequence_error(call: Callable[[], object]) -> SequenceError | None:
    try:
        call()
    except SequenceError as error:
        return error
    return None


quick = settings(deadline=None, derandomize=True, max_examples=150)


@quick
@given(sequences())
def test_documents_parse_back_to_their_segments(case: tuple[Grammar, Plain, Document, np.ndarray]) -> None:
    grammar, _, document, ids = case
    spans = grammar.spans(ids)
    assert [s.start for s in spans] == [0, *(s.end for s in spans[:-1])]
    assert spans[-1].end == len(ids)
    assert [s.name for s in spans if s.name in ("<bos>", "<eos>")] == ["<bos>", "<eos>"]
    inner = [s for s in spans if s.name not in ("<bos>", "<eos>", "<pad>")]
    assert [s.tokenizer or s.name for s in inner] == [name for name, _ in document]
    for span, (name, codes) in zip(inner, document, strict=True):
        if span.kind == "control":
            assert span.shape == ()
            continue
        assert span.kind == grammar.registry.tokenizer(name).modality
        assert span.shape == codes.shape
        back = grammar.segment_codes(ids, span)
        assert back.dtype == np.int64
        assert np.array_equal(back, codes)
        assert np.array_equal(grammar.segment_ids(name, back), ids[span.start : span.end])
    assert grammar.spans(torch.from_numpy(ids)) == grammar.spans(ids.tolist()) == spans


@quick
@given(sequences(), st.data())
def test_parser_and_automaton_and_twin_agree_on_damaged_documents(
    case: tuple[Grammar, Plain, Document, np.ndarray], data: st.DataObject
) -> None:
    grammar, plain, _, ids = case
    ids = ids.copy()
    size = grammar.registry.padded_size
    at = data.draw(st.integers(0, len(ids) - 1))
    how = data.draw(st.sampled_from(["replace", "insert", "delete", "cut", "swap"]))
    new = data.draw(st.one_of(st.integers(0, size - 1), st.integers(-(2**40), 2**40)))
    if how == "replace":
        ids[at] = new
    elif how == "insert":
        ids = np.insert(ids, at, new)
    elif how == "delete":
        ids = np.delete(ids, at)
    elif how == "cut":
        ids = ids[:at]
    elif at + 1 < len(ids):
        ids[[at, at + 1]] = ids[[at + 1, at]]
    states = plain.run(ids)
    reached = len(states) - 1
    ended = states[-1] == ("done",)
    error = sequence_error(lambda: grammar.spans(ids))
    if reached == len(ids) and ended:
        assert error is None
    else:
        assert error is not None
        assert error.position == reached >= at
        assert error.expected
        assert error.got
    automaton = walk(grammar, ids)
    assert [bool(s.failed) for s in automaton] == [i > reached for i in range(len(automaton))]
    resumed = grammar.resume([ids[:i] for i in range(reached + 1)])
    assert list(zip(*(x.tolist() for x in resumed), strict=True)) == [
        tuple(x.item() for x in s) for s in automaton[: reached + 1]
    ]
    if reached < len(ids):
        with pytest.raises(SequenceError) as caught:
            grammar.resume([ids])
        assert caught.value.position == reached


@quick
@given(sequences(), st.data())
def test_masks_are_exactly_those_of_the_twin(
    case: tuple[Grammar, Plain, Document, np.ndarray], data: st.DataObject
) -> None:
    grammar, plain, _, ids = case
    chosen = data.draw(st.lists(st.integers(0, len(ids)), min_size=1, max_size=4))
    limits = [data.draw(restrictions(grammar.registry)) for _ in chosen]
    states = plain.run(ids)
    batch = grammar.resume([ids[:i] for i in chosen])
    needed = [
        0 if states[i] == ("done",) else plain.shortest(states[i], x) for i, x in zip(chosen, limits, strict=True)
    ]
    assert grammar.needed(batch, limits).tolist() == needed
    for spare in (None, [data.draw(st.integers(-2, 12)) for _ in chosen]):
        budget = None if spare is None else [a + b for a, b in zip(needed, spare, strict=True)]
        mask = grammar.mask(batch, None if budget is None else torch.tensor(budget), limits)
        assert mask.shape == (len(chosen), grammar.registry.padded_size)
        for row, (i, limit) in enumerate(zip(chosen, limits, strict=True)):
            if states[i] == ("done",):
                assert allowed(mask[row]) == {grammar.registry.pad}
            else:
                assert allowed(mask[row]) == plain.mask(states[i], budget and budget[row], limit)


@quick
@given(sequences())
def test_a_document_is_allowed_with_exactly_the_budget_that_it_needs(
    case: tuple[Grammar, Plain, Document, np.ndarray],
) -> None:
    grammar, _, _, ids = case
    n = int(np.flatnonzero(ids == grammar.registry.eos)[0]) + 1
    states = walk(grammar, ids)[:-1]
    batch = GrammarState(*(torch.cat(x) for x in zip(*states, strict=True)))
    mask = grammar.mask(batch, torch.arange(n, n - len(ids), -1))
    assert mask[torch.arange(len(ids)), torch.from_numpy(ids)].all()
    assert mask.any(1).all()


@settings(quick, max_examples=60)
@given(registries(levels=4), st.data())
def test_any_logits_give_a_document_within_the_budget(registry: VocabularyRegistry, data: st.DataObject) -> None:
    grammar, _ = cached(registry)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    limits = data.draw(st.lists(restrictions(registry), min_size=1, max_size=8))
    batch = len(limits)
    compiled = grammar.restrict(limits)
    state = grammar.initial(batch)
    assert grammar.needed(state).tolist() == [2] * batch
    budget = torch.randint(0, 40, (batch,), generator=generator)
    sharpness = 10 ** torch.empty(batch, 1).uniform_(-1, 2, generator=generator)
    bias = torch.randn(batch, registry.padded_size, generator=generator) * sharpness
    left, out = budget.clone(), []
    while not bool(state.done.all()):
        mask = grammar.mask(state, left, compiled)
        logits = bias + torch.randn(mask.shape, generator=generator)
        ids = logits.masked_fill(~mask, -torch.inf).argmax(-1)
        state = grammar.advance(state, ids)
        out.append(ids)
        left = left - 1
    assert not state.failed.any()
    for row, limit, most in zip(torch.stack(out, 1), limits, budget.tolist(), strict=True):
        spans = grammar.spans(row)
        used = [s for s in spans if s.name != "<pad>"]
        assert used[-1].end <= max(2, most)
        if limit is None:
            continue
        for span in used[1:-1]:
            assert span.kind in limit.modalities
            if span.kind == "image" and limit.grid:
                assert span.shape == limit.grid
            if span.kind == "audio":
                assert span.shape[1] >= limit.min_frames
                assert limit.max_frames is None or span.shape[1] <= limit.max_frames


@quick
@given(sequences())
def test_loss_mask_leaves_out_what_is_forced(case: tuple[Grammar, Plain, Document, np.ndarray]) -> None:
    grammar, plain, _, ids = case
    forced = [s[0] in ("start", "close", "done") for s in plain.run(ids)[:-1]]
    assert grammar.loss_mask(ids).tolist() == [not x for x in forced]
    assert grammar.loss_mask(ids[None]).shape == (1, len(ids))


@quick
@given(sequences())
def test_listing_tells_where_each_code_is(case: tuple[Grammar, Plain, Document, np.ndarray]) -> None:
    grammar, _, _, ids = case
    rows = grammar.listing(ids)
    assert [(x["position"], x["id"]) for x in rows] == list(enumerate(ids.tolist()))
    for span in grammar.spans(ids):
        part = [x for x in rows[span.start : span.end] if "code" in x]
        assert all(x["kind"] == span.kind for x in rows[span.start : span.end])
        if span.kind == "control":
            assert not part
            continue
        codes = grammar.segment_codes(ids, span)
        assert len(part) == codes.size
        keys = {"text": (), "image": ("row", "column"), "audio": ("level", "frame")}[span.kind]
        for i, x in enumerate(part):
            assert x["code"] == (codes[tuple(x[k] for k in keys)] if keys else codes[i])


junk = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6).map(lambda x: np.array(x, np.int64)),
    st.lists(st.integers(0, 2**64 - 1), max_size=6).map(lambda x: np.array(x, np.uint64)),
    st.lists(st.integers(-128, 127), max_size=12).map(lambda x: np.array(x, np.int8)),
    st.lists(st.integers(0, 20), max_size=30).map(lambda x: [1, *x, 2]),
    st.sampled_from([[], [[1, 2]], 1, [1.0, 2.0], "ab", None, ["<bos>"], [True], [1, [2]]]),
)


@quick
@given(registries(), junk)
def test_nothing_but_our_errors_comes_out_of_junk(registry: VocabularyRegistry, ids: object) -> None:
    grammar, plain = cached(registry)
    for call in (grammar.spans, grammar.listing, grammar.loss_mask, lambda x: grammar.resume([x])):
        with contextlib.suppress(SequenceError, VocabularyError):
            call(ids)
    if isinstance(ids, np.ndarray):
        reached = len(plain.run(ids)) - 1
        assert bool(walk(grammar, ids.astype(np.int64))[-1].failed) == (reached < len(ids))


@pytest.fixture
def small() -> Grammar:
    audio = {"sample_rate": 16000, "hop": 320}
    specs = [
        TokenizerSpec("bytes", "text", (256,), "t"),
        TokenizerSpec("vq", "image", (16,), "i"),
        TokenizerSpec("rvq", "audio", (8, 8), "a", properties=audio),
    ]
    return Grammar(VocabularyRegistry.create(specs, max_grid=4))


GOLDEN = [1, 3, 9 + 104, 9 + 105, 5, 266, 267, 269, 270, 271, 272, 273, 274, 6, 4, 7, 285, 293, 286, 294, 8, 7, 8, 2, 0]


def test_golden_document(small: Grammar) -> None:
    ids = np.array(GOLDEN, np.uint16)
    assert grammar_tuple(small.spans(ids)) == [
        ("<bos>", 0, 1, ()),
        ("<user>", 1, 2, ()),
        ("bytes", 2, 4, (2,)),
        ("vq", 4, 14, (2, 3)),
        ("<assistant>", 14, 15, ()),
        ("rvq", 15, 21, (2, 2)),
        ("rvq", 21, 23, (2, 0)),
        ("<eos>", 23, 24, ()),
        ("<pad>", 24, 25, ()),
    ]
    assert small.listing(ids)[18] == {
        "position": 18,
        "id": 286,
        "kind": "audio",
        "description": "audio level 0 code 1",
        "tokenizer": "rvq",
        "code": 1,
        "frame": 1,
        "level": 0,
        "time_s": 0.02,
    }
    assert small.loss_mask(ids).nonzero()[0].tolist() == [*range(1, 13), *range(14, 24)]


def grammar_tuple(spans: list[Span]) -> list[tuple]:
    return [(s.tokenizer or s.name, s.start, s.end, s.shape) for s in spans]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "position 0: got the end of the sequence, expected <bos>"),
        ([2], "position 0: got <eos>, expected <bos>"),
        ([1], "position 1: got the end of the sequence, expected text, <user>, <assistant>, <image>, <audio> or <eos>"),
        ([1, 269, 2], "position 1: got image code 0, expected text, "),
        ([1, 5, 269], "position 2: got image code 0, expected grid size (height of image)"),
        ([1, 5, 265, 6], "position 3: got </image>, expected grid size (width of image)"),
        ([1, 5, 265, 265, 6], "position 4: got </image>, expected image code"),
        ([1, 5, 265, 265, 269, 269], "position 5: got image code 0, expected </image>"),
        ([1, 7, 285, 285], "position 3: got audio level 0 code 0, expected audio level 1 code"),
        ([1, 7, 285, 8], "position 3: got </audio>, expected audio level 1 code"),
        ([1, 7, 293], "position 2: got audio level 1 code 0, expected audio level 0 code or </audio>"),
        ([1, 7, 285, 293], "position 4: got the end of the sequence, expected audio level 0 code or </audio>"),
        ([1, 2, 1], "position 2: got <bos>, expected <pad>"),
        ([1, 302], "position 1: got unused id 302, expected text"),
        ([1, -5], "position 1: got id -5 outside the vocabulary of 320, expected text"),
    ],
)
def test_errors_say_what_was_got_and_expected(small: Grammar, ids: list[int], message: str) -> None:
    with pytest.raises(SequenceError) as caught:
        small.spans(ids)
    assert str(caught.value).startswith(message)


def test_segments_are_checked_both_ways(small: Grammar) -> None:
    for name, codes, message in (
        ("image", np.zeros((0, 3), int), "sides of 1..4"),
        ("image", np.zeros((2, 5), int), "sides of 1..4"),
        ("image", np.zeros(3, int), r"expected \[h, w\]"),
        ("image", np.full((2, 2), 16), "code 16"),
        ("audio", np.zeros((3, 2), int), r"expected \[2, T\]"),
        ("audio", np.array([[0, 0], [0, 8]]), r"position \(1, 1\): code 8"),
        ("text", np.zeros((1, 1), int), r"expected \[n\]"),
        ("text", [-1], "code -1"),
        ("text", ["a"], "expected integers"),
        ("video", [0], "known: "),
    ):
        with pytest.raises(VocabularyError, match=message):
            small.segment_ids(name, codes)
    span = small.spans(GOLDEN)[3]
    with pytest.raises(SequenceError, match="parse these ids anew"):
        small.segment_codes(GOLDEN[:8], span)
    with pytest.raises(SequenceError, match="position 7: got <bos>"):
        small.segment_codes([1] * 30, span)
    with pytest.raises(VocabularyError, match="control"):
        small.segment_codes(GOLDEN, small.spans(GOLDEN)[0])


def test_states_say_where_a_row_is(small: Grammar) -> None:
    state = small.resume([[], [1], [1, 5, 265], [1, 7, 285], GOLDEN])
    assert state.between.tolist() == [False, True, False, False, False]
    assert state.done.tolist() == [False, False, False, False, True]
    assert [MODALITIES[i] for i in small.modality(state)] == ["text", "text", "image", "audio", "text"]
    lost = small.advance(state, torch.tensor([2, 269, 269, 2, 1]))
    assert lost.failed.all()
    assert lost.done.all()
    assert small.advance(lost, torch.tensor([1, 0, 2, 3, 4])).failed.all()
    assert [allowed(row) for row in small.mask(lost)] == [{0}] * 5


def test_a_budget_decides_how_large_an_image_may_be(small: Grammar) -> None:
    height, width = small.resume([[1, 5]]), small.resume([[1, 5, 266]])
    sizes = {b: len(allowed(small.mask(height, torch.tensor([b]))[0])) for b in (0, 5, 6, 7, 8, 100)}
    assert sizes == {0: 1, 5: 1, 6: 2, 7: 3, 8: 4, 100: 4}
    sizes = {b: len(allowed(small.mask(width, torch.tensor([b]))[0])) for b in (0, 5, 6, 7, 8, 9, 100)}
    assert sizes == {0: 1, 5: 1, 6: 1, 7: 2, 8: 2, 9: 3, 100: 4}


def test_restrictions_are_checked(small: Grammar) -> None:
    for arguments in (
        {"modalities": ("video",)},
        {"modalities": "text"},
        {"grid": (0, 1)},
        {"grid": (1, 2, 3)},
        {"min_frames": -1},
        {"min_frames": 3, "max_frames": 2},
        {"max_frames": 2**40},
    ):
        with pytest.raises(ConfigError, match="expected"):
            Restriction(**arguments)
    with pytest.raises(VocabularyError, match="grid 5x1, expected at most 4"):
        small.restrict(Restriction(grid=(5, 1)))
    with pytest.raises(ConfigError, match="2 restrictions for 3 rows"):
        small.mask(small.initial(3), None, [None, None])
    with pytest.raises(ConfigError, match="no restrictions"):
        small.restrict([])


class NoSync(TorchDispatchMode):
    """Fails on what would make the host wait for a GPU: reading a tensor, or copying host values to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "lift_fresh")
        assert func.overloadpacket.__name__ not in waits, func
        return func(*args, **(kwargs or {}))


def test_steps_never_wait_for_the_device(small: Grammar) -> None:
    compiled = small.restrict([Restriction(grid=(2, 2), min_frames=1), None])
    start, budget = small.initial(2), torch.tensor([30, 9])
    small.mask(start)  # compiles the free restriction
    for limits in (compiled, None):
        state = start
        with NoSync():
            for i in range(12):
                mask = small.mask(state, budget - i, limits)
                state = small.advance(state, mask.long().argmax(-1))
                small.modality(state)
                small.needed(state, limits)
        assert not state.failed.any()
    with NoSync(), pytest.raises(AssertionError):
        small.restrict([None])


@pytest.mark.gpu
def test_a_gpu_gives_the_same_masks_without_a_sync(small: Grammar) -> None:
    limits = [Restriction(grid=(2, 2), min_frames=1), None, Restriction(modalities=("audio",), max_frames=2)]
    host, state = small.initial(3), small.initial(3, "cuda")
    budget, compiled = torch.tensor([30, 9, 17]), small.restrict(limits, "cuda")
    generator, ids = torch.Generator().manual_seed(0), []
    masks, device_budget = [], budget.cuda()
    for i in range(30):
        masks.append(small.mask(host, budget - i, limits))
        noise = torch.rand(masks[-1].shape, generator=generator)
        ids.append(noise.masked_fill(~masks[-1], -1).argmax(-1))
        host = small.advance(host, ids[-1])
    small.mask(state)  # copies the tables
    there, on_device = [], [x.cuda() for x in ids]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(30):
            there.append(small.mask(state, device_budget - i, compiled))
            small.mask(state)
            state = small.advance(state, on_device[i])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b.cpu()) for a, b in zip(masks, there, strict=True))
    assert host.done.all()

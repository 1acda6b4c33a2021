"""The grammar against a plain twin that follows one id at a time: parsing, masks, budgets, restrictions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from grammars import Document, Plain, cached, registries, restrictions, sample, sequences
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mmtok.automaton import Automaton
from mmtok.errors import ConfigError, SequenceError, VocabularyError
from mmtok.grammar import Grammar, GrammarState, Restriction, Span
from mmtok.listing import listing
from mmtok.registry import MODALITIES, TokenizerSpec, VocabularyRegistry


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
        spec = grammar.registry.tokenizer(name)
        assert span.kind == spec.modality
        back = grammar.segment_codes(ids, span)
        if isinstance(codes, tuple):
            rates = spec.codebook_layout.rates
            assert span.shape == (len(codes), len(codes[0]) // rates[0])
            assert isinstance(back, tuple)
        else:
            assert span.shape == codes.shape
        for a, b in zip(back, codes, strict=True) if isinstance(codes, tuple) else [(back, codes)]:
            assert a.dtype == np.int64
            assert np.array_equal(a, b)
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
    ended = states[-1] == ("done", 0)
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
    for i, one in enumerate(automaton[: reached + 1]):
        if not grammar.in_text(one):  # text begins anew after a prompt
            assert [x[i].item() for x in resumed[:3]] == [x.item() for x in one[:3]]
        assert bool(grammar.between(resumed)[i]) == bool(grammar.between(one))
    if reached < len(ids):
        with pytest.raises(SequenceError) as caught:
            grammar.resume([ids])
        assert caught.value.position == reached


@settings(quick, max_examples=100)
@given(sequences(), st.data())
def test_masks_are_exactly_those_of_the_twin(
    case: tuple[Grammar, Plain, Document, np.ndarray], data: st.DataObject
) -> None:
    grammar, plain, _, ids = case
    pad = grammar.registry.pad
    chosen = data.draw(st.lists(st.integers(0, len(ids)), min_size=1, max_size=4))
    limits = [data.draw(restrictions(grammar.registry)) for _ in chosen]
    states = [plain.fresh(plain.run(ids)[i]) for i in chosen]
    batch = grammar.resume([ids[:i] for i in chosen])
    for _ in range(3):
        ended = [s[0] == "done" for s in states]
        needed = [0 if e else plain.shortest(s, x) for e, s, x in zip(ended, states, limits, strict=True)]
        known = [not e and n < np.inf for e, n in zip(ended, needed, strict=True)]
        got = grammar.needed(batch, limits).tolist()
        assert [n for n, k in zip(got, known, strict=True) if k] == [n for n, k in zip(needed, known, strict=True) if k]
        for spare in (None, [data.draw(st.integers(-2, 12)) for _ in chosen]):
            budget = (
                None if spare is None else [int(a) + b if a < np.inf else 0 for a, b in zip(needed, spare, strict=True)]
            )
            mask = grammar.mask(batch, None if budget is None else torch.tensor(budget), limits)
            assert mask.shape == (len(chosen), grammar.registry.padded_size)
            assert mask.any(1).all()
            for row, (state, limit) in enumerate(zip(states, limits, strict=True)):
                if ended[row]:
                    assert allowed(mask[row]) == {pad}
                elif known[row]:
                    assert allowed(mask[row]) == plain.mask(state, budget and budget[row], limit)
        picked = [data.draw(st.sampled_from(sorted(allowed(row)))) for row in mask]
        batch = grammar.advance(batch, torch.tensor(picked))
        states = [s if e else plain.step(s, id) for s, e, id in zip(states, ended, picked, strict=True)]


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
    compiled, start = grammar.restrict(limits), grammar.initial(batch)
    assert grammar.needed(start).tolist() == [2] * batch
    needed = grammar.needed(start, compiled).tolist()
    budget = torch.randint(0, 40, (batch,), generator=generator)
    sampled, state = sample(grammar, compiled, budget, generator)
    assert not state.failed.any()
    for row, limit, most, least in zip(sampled, limits, budget.tolist(), needed, strict=True):
        spans = grammar.spans(row)
        used = [s for s in spans if s.name != "<pad>"]
        assert used[-1].end <= max(least, most)
        if limit is None:
            continue
        named = [registry.tokenizer(name).name for name in limit.next]
        assert [s.tokenizer for s in used[1:-1]][: len(named)] == named
        assert not limit.stop or len(used) == len(named) + 2
        for span in used[1 + len(named) : -1]:
            assert span.kind in limit.modalities
        for span in used[1:-1]:
            if span.kind == "image" and limit.grid:
                assert span.shape[:2] == limit.grid
            if span.kind == "audio":
                assert span.shape[1] >= limit.min_frames
                assert limit.max_frames is None or span.shape[1] <= limit.max_frames


@quick
@given(sequences())
def test_loss_mask_leaves_out_what_is_forced(case: tuple[Grammar, Plain, Document, np.ndarray]) -> None:
    grammar, plain, _, ids = case
    codes = {b.start + i for b in grammar.registry.blocks if b.modality not in ("control",) for i in range(b.size)}
    states = plain.run(ids)[:-1]
    # A code of a codebook of one, or the only image size, counts as a choice: such vocabularies are of no use.
    choices = [
        s[0] != "done" and (id in codes or len(list(plain.following(s, None))) > 1)
        for s, id in zip(states, ids.tolist(), strict=True)
    ]
    assert grammar.loss_mask(ids).tolist() == choices
    assert grammar.loss_mask(ids[None]).shape == (1, len(ids))


@quick
@given(sequences())
def test_listing_tells_where_each_code_is(case: tuple[Grammar, Plain, Document, np.ndarray]) -> None:
    grammar, _, _, ids = case
    rows = listing(grammar, ids)
    assert [(x["position"], x["id"]) for x in rows] == list(enumerate(ids.tolist()))
    for span in grammar.spans(ids):
        part = [x for x in rows[span.start : span.end] if "code" in x]
        assert all(x["kind"] == span.kind for x in rows[span.start : span.end])
        if span.kind == "control":
            assert not part
            continue
        codes = grammar.segment_codes(ids, span)
        if isinstance(codes, tuple):
            rates = grammar.registry.tokenizer(span.tokenizer).codebook_layout.rates
            places = {(x["level"], x["frame"] * rates[x["level"]] + x.get("index", 0)): x["code"] for x in part}
            assert places == {(q, i): c for q, level in enumerate(codes) for i, c in enumerate(level.tolist())}
            continue
        assert len(part) == codes.size
        image = ("row", "column", "level")[: codes.ndim]
        keys = {"text": (), "image": image, "audio": ("level", "frame")}[span.kind]
        places = {tuple(x[k] for k in keys) if keys else (i,): x["code"] for i, x in enumerate(part)}
        assert places == {place: int(code) for place, code in np.ndenumerate(codes)}


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
    for call in (grammar.spans, lambda x: listing(grammar, x), grammar.loss_mask, lambda x: grammar.resume([x])):
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
    assert listing(small, ids)[18] == {
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
        ([1], "position 1: got the end of the sequence, expected text, <image>, <audio>, <user>, <assistant> or <eos>"),
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
    assert small.between(state).tolist() == [False, True, False, False, False]
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
        {"min_seconds": -1.0},
        {"min_seconds": 2.0, "max_seconds": 1.0},
        {"next": "image"},
    ):
        with pytest.raises(ConfigError, match="expected"):
            Restriction(**arguments)
    with pytest.raises(VocabularyError, match="grid 5x1, expected at most 4"):
        small.restrict(Restriction(grid=(5, 1)))
    with pytest.raises(ConfigError, match="2 restrictions for 3 rows"):
        small.mask(small.initial(3), None, [None, None])
    with pytest.raises(ConfigError, match="no restrictions"):
        small.restrict([])


def test_what_must_come_next_and_for_how_long(small: Grammar) -> None:
    r = small.registry
    both = Restriction(next=("audio", "image"), stop=True, grid=(2, 2), min_seconds=0.03, max_seconds=0.05)
    state = small.resume([[r.bos, r.user, 9, r.assistant]])
    assert both.frames(r.tokenizer("audio")) == (2, 2)  # of 20 ms
    assert small.needed(state, [both]).tolist() == [2 + 2 * 2 + 4 + 4 + 1]
    ids = []
    while not state.done:
        mask = small.mask(state, None, [both])
        assert int(mask.sum()) in (1, 8, 16)
        ids.append(int(mask.long().argmax()))
        state = small.advance(state, torch.tensor(ids[-1:]))
    assert grammar_tuple(small.spans([r.bos, r.user, 9, r.assistant, *ids]))[4:-1] == [
        ("rvq", 4, 10, (2, 2)),
        ("vq", 10, 18, (2, 2)),
    ]
    text_first = small.restrict([Restriction(next=("text", "image"), modalities=())])
    state = small.resume([[r.bos]])
    assert allowed(small.mask(state, None, text_first)[0]) == set(range(9, 265))
    state = small.advance(state, torch.tensor([9]))
    assert allowed(small.mask(state, None, text_first)[0]) == {*range(9, 265), r.opening("image")}
    for bad, message in (
        (Restriction(next=("text", "text")), "in a row are one"),
        (Restriction(min_seconds=0.021, max_seconds=0.039), "no sound is like that"),
    ):
        with pytest.raises(ConfigError, match=message):
            small.restrict(bad)
    with pytest.raises(VocabularyError, match="known"):
        small.restrict(Restriction(next=("video",)))
    silent = Grammar(VocabularyRegistry.create([TokenizerSpec("a", "audio", (4,), "a")]))
    with pytest.raises(ConfigError, match="does not record sample_rate and hop"):
        silent.restrict(Restriction(max_seconds=1.0))


DELAYED = VocabularyRegistry.create(
    [
        TokenizerSpec("words", "text", (3,), "t"),
        TokenizerSpec(
            "music", "audio", (2, 2, 2), "a", layout="delayed:0,1,2", properties={"sample_rate": 100, "hop": 10}
        ),
        TokenizerSpec(
            "snac", "audio", (2, 2), "b", layout="multi-rate:0,1,1", properties={"sample_rate": 100, "hop": 10}
        ),
    ],
    max_grid=2,
)


def test_golden_documents_of_other_layouts() -> None:
    grammar, r = Grammar(DELAYED), DELAYED
    assert [r.describe(i) for i in range(5, 10)] == [
        "<audio>", "</audio>", "<fill:audio>", "<audio:snac>", "</audio:snac>"
    ]  # fmt: skip
    ids = grammar.segment_ids("music", np.array([[0, 1], [1, 1], [0, 0]]))
    a, b, c = (block.start for block in r.blocks_of("music"))
    assert ids.tolist() == [5, a, 7, 7, a + 1, b + 1, 7, 7, b + 1, c, 7, 7, c, 6]
    rows = listing(grammar, np.array([r.bos, *ids, r.eos]))
    assert [(x["level"], x["frame"], x["time_s"]) for x in rows if "code" in x] == [
        (0, 0, 0.0), (0, 1, 0.1), (1, 0, 0.0), (1, 1, 0.1), (2, 0, 0.0), (2, 1, 0.1)
    ]  # fmt: skip
    # The first fill of level 0 ends the sound and is a choice; the other fills and the closing are not.
    mask = grammar.loss_mask(ids)
    assert np.flatnonzero(~mask).tolist() == [2, 3, 6, 10, 11, 13]
    snac = grammar.segment_ids("snac", [np.array([1]), np.array([0, 1])])
    rows = listing(grammar, np.array([r.bos, *snac, r.eos]))
    assert [(x["level"], x["frame"], x.get("index"), x["time_s"]) for x in rows if "code" in x] == [
        (0, 0, None, 0.0), (1, 0, 0, 0.0), (1, 0, 1, 0.05)
    ]  # fmt: skip
    with pytest.raises(SequenceError, match="position 3: got audio level 1 code 0, expected <fill:audio>"):
        grammar.spans([r.bos, 5, a, b])
    with pytest.raises(SequenceError, match="position 6: got <fill:audio>, expected audio level 1 code"):
        grammar.spans([r.bos, 5, a, 7, 7, a, 7])
    with pytest.raises(VocabularyError, match=r"expected \[3, T\]"):
        grammar.segment_ids("music", np.zeros((2, 3), int))
    with pytest.raises(VocabularyError, match="levels have"):
        grammar.segment_ids("snac", [np.array([1]), np.array([0])])


class NoSync(TorchDispatchMode):
    """Fails on what would make the host wait for a GPU: reading a tensor, or copying host values to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "lift_fresh")
        assert func.overloadpacket.__name__ not in waits, func
        return func(*args, **(kwargs or {}))


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations of a GPU and of compiled code, on the CPU."""
    monkeypatch.setattr(Automaton, "_on", lambda self, device: self._tables[device])


@pytest.mark.usefixtures("in_torch")
def test_steps_never_wait_for_the_device(small: Grammar) -> None:
    compiled = small.restrict([Restriction(grid=(2, 2), min_frames=1, next=("image",)), None])
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


@quick
@given(sequences(), st.data())
def test_numpy_and_torch_operations_give_the_same(
    case: tuple[Grammar, Plain, Document, np.ndarray], data: st.DataObject
) -> None:
    grammar, _, _, ids = case
    ends = data.draw(st.lists(st.integers(0, len(ids)), min_size=1, max_size=3))
    limits = grammar.restrict([data.draw(restrictions(grammar.registry)) for _ in ends])
    state, budget = grammar.resume([ids[:i] for i in ends]), torch.tensor([data.draw(st.integers(0, 30)) for _ in ends])
    wanted = torch.tensor([data.draw(st.integers(-2, grammar.registry.padded_size + 1)) for _ in ends])

    def everything() -> list[torch.Tensor]:
        masks = [grammar.mask(state, b, r) for b in (None, budget) for r in (None, limits)]
        more = [grammar.needed(state, limits), grammar.modality(state), grammar.between(state), grammar.in_text(state)]
        return [*masks, *more, *grammar.advance(state, wanted)]

    in_numpy = everything()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Automaton, "_on", lambda self, device: self._tables[device])
        assert all(torch.equal(a, b) for a, b in zip(in_numpy, everything(), strict=True))


def test_a_whole_decode_step_compiles_as_one_graph() -> None:
    grammar = Grammar(DELAYED)
    limits = grammar.restrict([Restriction(next=("audio",), min_frames=1), None])

    def step(state: GrammarState, left: torch.Tensor, logits: torch.Tensor) -> tuple[GrammarState, torch.Tensor]:
        ids = logits.masked_fill(~grammar.mask(state, left, limits), -torch.inf).argmax(-1)
        return grammar.advance(state, ids), ids

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    here = there = grammar.resume([[1], [1]])
    left, out = torch.tensor([40, 25]), []
    while not here.done.all():
        logits = torch.randn(2, DELAYED.padded_size, generator=generator)
        here, ids = step(here, left, logits)
        there, same = compiled(there, left, logits)
        assert torch.equal(ids, same)
        out.append(ids)
        left = left - 1
    for row in torch.stack(out, 1):
        grammar.spans(torch.cat([torch.tensor([1]), row]))


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


def test_rows_of_restrictions_may_be_repeated(small: Grammar) -> None:
    both = small.restrict([Restriction(modalities=("text",)), Restriction(modalities=("image",))])
    state = small.resume([[1]] * 3)
    expected = small.mask(state, None, [Restriction(modalities=(m,)) for m in ("text", "image", "image")])
    assert torch.equal(small.mask(state, None, both.select(torch.tensor([0, 1, 1]))), expected)
    with pytest.raises(ConfigError, match="grid"):
        Restriction(grid=(1.5, 2))
    with pytest.raises(VocabularyError, match="single number"):
        small.loss_mask(5)

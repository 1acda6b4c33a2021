"""Repair and drop: whatever comes in, a valid sequence goes out, nothing is invented, and every change is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from grammars import Document, Plain, cached, registries, sequences
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.errors import ConfigError, SequenceError, VocabularyError
from mmtok.grammar import Grammar
from mmtok.recovery import Edit, Recovery, recover
from mmtok.registry import TokenizerSpec, VocabularyRegistry

POLICIES = ("repair", "drop")
ACTIONS = ("removed", "inserted", "replaced", "moved")
quick = settings(deadline=None, derandomize=True, max_examples=150)


def damage(ids: np.ndarray, size: int, data: st.DataObject, most: int) -> np.ndarray:
    """Some deletions, insertions, replacements and swaps."""
    for _ in range(data.draw(st.integers(1, most))):
        if not len(ids):
            break
        at, new = data.draw(st.integers(0, len(ids) - 1)), data.draw(st.integers(-1, size + 1))
        match data.draw(st.sampled_from(["replace", "insert", "delete", "cut", "swap"])):
            case "replace":
                ids = np.concatenate([ids[:at], [new], ids[at + 1 :]])
            case "insert":
                ids = np.insert(ids, at, new)
            case "delete":
                ids = np.delete(ids, at)
            case "cut":
                ids = ids[:at]
            case "swap":
                ids = np.concatenate([ids[:at], ids[at : at + 2][::-1], ids[at + 2 :]])
    return ids


def is_subsequence(part: np.ndarray, whole: np.ndarray) -> bool:
    rest = iter(whole.tolist())
    return all(x in rest for x in part.tolist())


def replayed(ids: np.ndarray, edits: tuple[Edit, ...], result: np.ndarray) -> bool:
    """Whether the edits, made where they say, give the result; what they insert or replace may be anything."""
    made: list[int | None] = []
    at = {a: {i for e in edits if e.action == a for i in range(e.position, e.position + e.count)} for a in ACTIONS}
    for i in range(len(ids) + 1):
        made += [None] * sum(e.count for e in edits if e.action == "inserted" and e.position == i)
        if i < len(ids) and i not in at["removed"] | at["moved"]:
            made.append(None if i in at["replaced"] else int(ids[i]))
    if len(made) + len(at["moved"]) != len(result):
        return False
    if at["moved"]:  # the edit does not say where to
        return is_subsequence(np.array([x for x in made if x is not None]), result)
    return all(a in (None, b) for a, b in zip(made, result.tolist(), strict=True))


def check(grammar: Grammar, ids: np.ndarray, policy: str) -> Recovery:
    """What holds of every recovery."""
    out = recover(grammar, ids, policy)
    spans = grammar.spans(out.ids)
    assert out.ids.dtype == np.int64
    counts = {a: sum(e.count for e in out.edits if e.action == a) for a in ACTIONS}
    assert len(out.ids) == len(ids) + counts["inserted"] - counts["removed"]
    assert sum(counts.values()) == sum(e.count for e in out.edits)
    assert [e.position for e in out.edits] == sorted(e.position for e in out.edits)
    assert all(e.count > 0 and 0 <= e.position <= len(ids) and e.what for e in out.edits)
    assert replayed(ids, out.edits, out.ids)
    for block in grammar.registry.blocks:  # no code is invented, and the order stays
        if block.modality not in ("control", "grid"):
            mine, theirs = (x[(x >= block.start) & (x < block.end)] for x in (out.ids, ids))
            assert is_subsequence(mine, theirs)
    if policy == "drop":
        assert not counts["replaced"] + counts["moved"]
        text = ids.tolist()
        for span in spans:
            if span.kind in ("image", "audio"):
                part = out.ids[span.start : span.end].tolist()
                assert any(text[i : i + len(part)] == part for i in range(len(text)))
    again = recover(grammar, out.ids, policy)
    assert not again.edits
    assert np.array_equal(again.ids, out.ids)
    return out


@quick
@given(sequences(), st.sampled_from(POLICIES), st.data())
def test_damaged_documents_become_valid_ones(
    case: tuple[Grammar, Plain, Document, np.ndarray], policy: str, data: st.DataObject
) -> None:
    grammar, _, _, ids = case
    assert recover(grammar, ids, policy).edits == ()
    assert np.array_equal(recover(grammar, ids.tolist(), policy).ids, ids)
    broken = damage(ids, grammar.registry.padded_size, data, 4)
    out = check(grammar, broken, policy)
    if out.edits:
        with pytest.raises(SequenceError) as caught:
            grammar.spans(broken)
        assert out.edits[0].position <= caught.value.position
    else:
        assert np.array_equal(out.ids, broken)


@quick
@given(registries(), st.lists(st.integers(-1, 40), max_size=40), st.sampled_from(POLICIES))
def test_junk_becomes_a_document(registry: VocabularyRegistry, ids: list[int], policy: str) -> None:
    check(cached(registry)[0], np.array(ids, np.int64), policy)


@quick
@given(sequences(), st.sampled_from(POLICIES), st.data())
def test_one_damaged_segment_leaves_the_others_alone(
    case: tuple[Grammar, Plain, Document, np.ndarray], policy: str, data: st.DataObject
) -> None:
    grammar, _, _, ids = case
    spans = [s for s in grammar.spans(ids) if s.kind in ("image", "audio") and s.end - s.start > 3]
    if not spans:
        return
    hit = data.draw(st.sampled_from(spans))
    at = data.draw(
        st.integers(hit.start + 1, hit.end - 2)
    )  # within: openings and closings belong to the neighbours too
    lost = np.delete(ids, at)
    out = recover(grammar, lost, policy)
    assert all(hit.start <= e.position < hit.end for e in out.edits)
    before, after = ids[: hit.start], ids[hit.end :]
    assert np.array_equal(out.ids[: len(before)], before)
    rest = len(out.ids) - len(after)
    assert np.array_equal(out.ids[rest:], after)
    if rest > len(before):
        (left,) = (s for s in grammar.spans(out.ids) if s.start == hit.start)
        assert (left.tokenizer, left.end) == (hit.tokenizer, rest)


AUDIO = {"sample_rate": 16000, "hop": 320}


def registry(layout: str) -> VocabularyRegistry:
    return VocabularyRegistry.create(
        [
            TokenizerSpec("bytes", "text", (256,), "t"),
            TokenizerSpec("vq", "image", (16,), "i"),
            TokenizerSpec("rvq", "audio", (8, 8, 8), "a", 0, AUDIO, layout),
        ],
        max_grid=8,
    )


@pytest.mark.parametrize("layout", ["interleaved", "delayed:0,1,2"])
@pytest.mark.parametrize("how", ["delete", "replace", "insert"])
def test_one_stray_token_costs_the_frames_around_it_and_no_phase_slip(layout: str, how: str) -> None:
    grammar = Grammar(registry(layout))
    codes = np.stack([np.arange(40) % 8, np.arange(40) // 8, (np.arange(40) + 3) % 8])
    sound = grammar.segment_ids("audio", codes)
    r = grammar.registry
    for at in range(1, len(sound) - 1):
        body = np.delete(sound, at) if how == "delete" else sound.copy()
        if how == "replace":
            body[at] = r.opening("image")
        if how == "insert":
            body = np.insert(sound, at, r.user)
        ids = np.concatenate([[r.bos, 20], body, [21, r.eos]])
        out = recover(grammar, ids, "repair")
        (span,) = (s for s in grammar.spans(out.ids) if s.kind == "audio")
        back = grammar.segment_codes(out.ids, span)
        around = 3 if layout.startswith("delayed") else 1  # frames that share the damaged step
        assert back.shape[1] >= (40 if how == "insert" else 40 - around)
        assert is_subsequence(back[0] + 8 * back[1], codes[0] + 8 * codes[1])
        assert {tuple(f) for f in back.T.tolist()} <= {tuple(f) for f in codes.T.tolist()}
        assert out.ids[1] == 20
        assert out.ids[-2] == 21


def test_pictures_lose_rows_and_never_gain_codes() -> None:
    grammar = Grammar(registry("interleaved"))
    r = grammar.registry
    codes = np.arange(12).reshape(3, 4)
    picture = grammar.segment_ids("image", codes)

    def mended(body: np.ndarray) -> tuple[np.ndarray, list[str]]:
        out = recover(grammar, np.concatenate([[r.bos], body, [r.eos]]), "repair")
        (span,) = (s for s in grammar.spans(out.ids) if s.kind == "image")
        return grammar.segment_codes(out.ids, span), [str(e) for e in out.edits]

    stray = picture.copy()
    stray[3 + 5] = 20  # a text id in the second row
    rows, edits = mended(stray)
    assert np.array_equal(rows, codes[[0, 2]])
    assert edits[0] == "position 2: replaced 1 id: height 3 by 2, the rows that are whole"
    assert any("text id 11, where vq codes belong" in e for e in edits)
    rows, edits = mended(np.delete(picture, 3 + 5))
    assert np.array_equal(rows[0], codes[0])
    assert rows.shape == (2, 4)
    rows, edits = mended(np.insert(picture, 3 + 5, picture[4]))
    assert rows.shape == (3, 4)
    assert edits == [edits[0]]
    assert "not in a whole row of 4 codes of the 3x4 image" in edits[0]
    rows, edits = mended(picture[:-1])
    assert np.array_equal(rows, codes)
    assert edits == ["position 16: inserted 1 id: </image>, which was missing"]
    for hopeless in (picture[[0, 1, -1]], np.delete(picture, 1), picture[[0, 1, 2, 3, 4, -1]]):
        out = recover(grammar, np.concatenate([[r.bos], hopeless, [r.eos]]), "repair")
        assert out.ids.tolist() == [r.bos, r.eos]
        assert out.edits[0].what.startswith("a damaged image: position ")


def test_the_ends_of_a_document_and_what_the_messages_say() -> None:
    grammar = Grammar(registry("interleaved"))
    r = grammar.registry
    out = recover(grammar, [30, r.eos, 31, r.pad, r.bos], "repair")
    assert out.ids.tolist() == [r.bos, 30, r.eos, r.pad]
    assert list(map(str, out.edits)) == [
        "position 0: inserted 1 id: <bos>, with which every document begins",
        "position 2: removed 1 id: text id 22, after <eos>, which only <pad> may follow",
        "position 4: removed 1 id: <bos>, after <eos>, which only <pad> may follow",
    ]
    assert recover(grammar, [], "drop").ids.tolist() == [r.bos, r.eos]
    out = recover(grammar, torch.tensor([r.bos, 10**6, -3, r.closing("audio"), 30]), "drop")
    assert out.ids.tolist() == [r.bos, 30, r.eos]
    assert out.edits[0] == Edit(
        "removed",
        1,
        3,
        "id 1000000 outside the vocabulary of 320 and 2 more, "
        "where text, <image>, <audio>, <user>, <assistant> or <eos> may follow",
    )
    with pytest.raises(ConfigError, match="'repair' or 'drop'"):
        recover(grammar, [r.bos, r.eos], "strict")  # type: ignore[arg-type]
    for junk in ([[1, 2]], ["a"], 3.0, None):
        with pytest.raises(VocabularyError):
            recover(grammar, junk, "repair")


def test_a_sound_is_never_put_in_another_order_unsaid() -> None:
    specs = [
        TokenizerSpec("major", "audio", (9, 9), "m", layout="codebook-major"),
        TokenizerSpec("late", "audio", (9, 9), "l", layout="delayed:1,1"),
        TokenizerSpec("delayed", "audio", (9, 9), "d", layout="delayed:0,1"),
    ]
    r = VocabularyRegistry.create(specs)
    grammar = Grammar(r)
    a, b = (block.start for block in r.blocks_of("major"))
    two = [a + 1, a + 2, b + 1, b + 2, a + 3, a + 4, b + 3, b + 4]  # two sounds, between which the brackets are lost
    ids = np.array([r.bos, r.opening("major"), *two, r.closing("major"), r.eos])
    out = check(grammar, ids, "repair")
    assert out.ids.tolist() == [r.bos, r.opening("major"), *two[:4], r.closing("major"), r.eos]
    assert [(e.position, e.count) for e in out.edits] == [(6, 4)]
    for name in ("late", "delayed"):
        c, d = (block.start for block in r.blocks_of(name))
        f = r.fill(name)
        for body in (
            [c, d, f, f],
            [c, f, f, d, f, f],
            [c, f, c + 1, d, f, d + 1, c + 1, f, c + 2, d, f, d],
            [f, f, c, d],
        ):
            ids = np.array([r.bos, r.opening(name), *body, r.closing(name), r.eos])
            assert check(grammar, ids, "repair").edits or len(grammar.spans(ids)) == 3

"""The registry: exact maps between ids and codes, ids that never move, JSON that refuses what does not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok import idmap
from mmtok.errors import VocabularyError, VocabularyMismatchError
from mmtok.registry import CONTROL, TokenizerSpec, VocabularyRegistry

quick = settings(deadline=None, derandomize=True)


def spec(name: str, modality: str, *sizes: int, headroom: int = 0, mark: str = "") -> TokenizerSpec:
    return TokenizerSpec(name, modality, sizes, mark or f"sha-{name}", headroom)


def example() -> VocabularyRegistry:
    specs = [spec("bytes", "text", 256), spec("vq", "image", 512, headroom=8), spec("rvq", "audio", 16, 16, 8)]
    return VocabularyRegistry.create(specs, max_grid=32)


@st.composite
def tokenizers(draw: st.DrawFn, prefix: str = "t") -> list[TokenizerSpec]:
    modalities = draw(st.lists(st.sampled_from(["text", "image", "audio"]), max_size=5))
    out = []
    for i, modality in enumerate(modalities):
        levels = draw(st.integers(1, 4)) if modality == "audio" else 1
        sizes = [draw(st.integers(1, 40)) for _ in range(levels)]
        out.append(spec(f"{prefix}{i}", modality, *sizes, headroom=draw(st.integers(0, 5))))
    return out


@st.composite
def registries(draw: st.DrawFn) -> VocabularyRegistry:
    return VocabularyRegistry.create(
        draw(tokenizers()), max_grid=draw(st.integers(1, 9)), pad_multiple=draw(st.sampled_from([1, 8, 64]))
    )


def used(registry: VocabularyRegistry) -> np.ndarray:
    return np.concatenate([np.arange(b.start, b.start + b.size) for b in registry.blocks])


def test_golden_layout() -> None:
    r = example()
    assert [(b.name, b.start, b.size, b.capacity) for b in r.blocks] == [
        ("control", 0, 9, 9),
        ("text", 9, 256, 256),
        ("grid", 265, 32, 32),
        ("image", 297, 512, 520),
        ("audio.0", 817, 16, 16),
        ("audio.1", 833, 16, 16),
        ("audio.2", 849, 8, 8),
    ]
    assert (r.size, r.padded_size) == (857, 896)
    assert (r.pad, r.bos, r.eos, r.user, r.assistant) == (0, 1, 2, 3, 4)
    assert (r.opening("vq"), r.closing("image"), r.control("<audio>"), r.closing("rvq")) == (5, 6, 7, 8)
    assert r.fingerprint == "2558ae8227ef3c86a734ee075f4397ce145e4728b3ee6bbf2cb5306a163e165c"


def test_descriptions() -> None:
    r = example()
    ids = [1, 6, 9 + 42, 265, 297 + 17, 297 + 513, 849 + 5, 870, 900, -1]
    assert [r.describe(i) for i in ids] == [
        "<bos>",
        "</image>",
        "text id 42",
        "grid size 1",
        "image code 17",
        "unused id 810",
        "audio level 2 code 5",
        "unused id 870",
        "id 900 outside the vocabulary of 896",
        "id -1 outside the vocabulary of 896",
    ]


@quick
@given(registries())
def test_blocks_are_ordered_and_do_not_overlap(r: VocabularyRegistry) -> None:
    assert np.array_equal(np.unique(used(r)), np.sort(used(r)))
    assert [b.start for b in r.blocks] == sorted(b.start for b in r.blocks)
    assert r.padded_size % r.pad_multiple == 0
    assert 0 <= r.padded_size - r.size < r.pad_multiple
    for t in r.tokenizers:
        assert tuple(b.size for b in r.blocks_of(t.name)) == t.codebook_sizes
        assert all(b.capacity == b.size + t.headroom for b in r.blocks_of(t.name))


@quick
@given(registries(), st.data())
def test_split_and_merge_are_inverse(r: VocabularyRegistry, data: st.DataObject) -> None:
    ids = np.array(data.draw(st.lists(st.sampled_from(used(r).tolist()), max_size=40)), np.int64)
    block, code = r.split(ids)
    assert block.dtype == code.dtype == np.int64
    plain = [(i, x - b.start) for x in ids for i, b in enumerate(r.blocks) if b.start <= x < b.start + b.size]
    assert list(zip(block.tolist(), code.tolist(), strict=True)) == plain
    assert np.array_equal(r.merge(block, code), ids)
    tensors = r.split(torch.from_numpy(ids))
    assert all(torch.equal(t, torch.from_numpy(a)) for t, a in zip(tensors, (block, code), strict=True))
    assert torch.equal(r.merge(*tensors), torch.from_numpy(ids))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32, np.uint64])
def test_split_takes_any_integer_dtype_and_shape(dtype: type) -> None:
    r = example()
    ids = np.array([[0, 300], [856, 9]], dtype)
    block, code = r.split(ids)
    assert block.tolist() == [[0, 3], [6, 1]]
    assert code.tolist() == [[0, 3], [7, 0]]
    assert r.merge(block, code).tolist() == ids.tolist()
    assert [x.shape for x in r.split([])] == [(0,), (0,)]


@quick
@given(registries(), st.data(), st.integers(0, 5))
def test_a_bad_id_is_an_error_that_names_its_position(r: VocabularyRegistry, data: st.DataObject, before: int) -> None:
    unused = sorted(set(range(-1, r.padded_size + 2)) - set(used(r).tolist()))  # head-room and padding among them
    bad = data.draw(st.one_of(st.sampled_from(unused), st.sampled_from([-(2**63), 2**63 - 1, 2**64 - 1])))
    dtype = np.uint64 if bad >= 2**63 else np.int64
    with pytest.raises(VocabularyError, match=f"position {before}: "):
        r.split(np.array([r.bos] * before + [bad, bad], dtype))


@pytest.mark.parametrize("ids", [[0.5], ["<bos>"], [True], [[1], [1, 2]], [2**70], None, [None]])
def test_what_is_no_integer_array_is_refused(ids: object) -> None:
    with pytest.raises(VocabularyError):
        example().split(ids)


def test_merge_checks_blocks_and_codes() -> None:
    r = example()
    with pytest.raises(VocabularyError, match=r"position 1: code 512, expected 0..511 in block 'image'"):
        r.merge(3, [0, 512])
    with pytest.raises(VocabularyError, match="position 0: block index 7"):
        r.merge([7], [0])
    with pytest.raises(VocabularyError, match="position 0: block index -1"):
        r.merge([-1], [0])
    with pytest.raises(VocabularyError, match=r"position \(1, 0\): code -1"):
        r.merge(1, [[0], [-1]])
    with pytest.raises(VocabularyError, match="broadcast"):
        r.merge([1, 1], [0, 0, 0])


@quick
@given(registries(), tokenizers(prefix="n"))
def test_extension_moves_no_id(r: VocabularyRegistry, more: list[TokenizerSpec]) -> None:
    new = r.extend(more)
    assert new.blocks[: len(r.blocks)] == r.blocks
    assert new.revision == r.revision + 1
    ids = used(r)
    assert [new.describe(i) for i in ids] == [r.describe(i) for i in ids]
    table = new.remap(r)
    assert np.array_equal(table[ids], ids)
    assert (np.delete(table, ids) == -1).all()
    assert {new.tokenizer(t.name).name for t in more} == {t.name for t in more}
    for t in new.tokenizers:
        if t.modality != "text":
            assert new.describe(new.opening(t.name))[1:] == new.describe(new.closing(t.name))[2:]
    back = r.remap(new)
    assert np.array_equal(np.flatnonzero(back >= 0), np.sort(ids))
    assert VocabularyRegistry.from_json(new.to_json()) == new


def test_more_tokenizers_of_one_modality_carry_their_name() -> None:
    r = example().extend([spec("vq2", "image", 7), spec("words", "text", 3), spec("rvq2", "audio", 4, 4)])
    assert [b.name for b in r.blocks[7:]] == ["control.1", "text:words", "image:vq2", "audio:rvq2.0", "audio:rvq2.1"]
    assert r.blocks[7].names == ("<image:vq2>", "</image:vq2>", "<audio:rvq2>", "</audio:rvq2>")
    assert r.describe(r.block("audio:rvq2.1").start + 3) == "audio:rvq2 level 1 code 3"
    assert r.tokenizer("image").name == "vq"
    assert r.opening("vq2") == r.control("<image:vq2>")


def test_growth_into_headroom_keeps_every_id_and_its_remap() -> None:
    old = example()
    new = old.extend([spec("vq", "image", 515, mark="sha-vq-grown")])
    assert new.block("image").size == 515
    assert [b.start for b in new.blocks] == [b.start for b in old.blocks]
    table = new.remap(old)
    assert np.array_equal(table[used(old)], used(old))
    assert new.tokenizer("vq").headroom == 5
    again = new.extend([spec("vq", "image", 520, mark="third")])
    assert again.tokenizer("vq").properties["extends"] == ["sha-vq-grown", "sha-vq"]
    assert np.array_equal(again.remap(old)[used(old)], used(old))
    with pytest.raises(VocabularyError, match="can grow to 520, got 521"):
        again.extend([spec("vq", "image", 521)])
    with pytest.raises(VocabularyError, match="another name"):
        again.extend([spec("vq", "audio", 520)])


def test_remap_follows_the_fingerprint_not_the_position() -> None:
    old = example()
    moved = VocabularyRegistry.create([spec("voice", "audio", 16, 16, 8, mark="sha-rvq"), spec("vq", "image", 512)])
    table = moved.remap(old)
    for q in range(3):
        a, b = old.block(f"audio.{q}"), moved.block(f"audio.{q}")
        assert table[a.start : a.end].tolist() == list(range(b.start, b.end))
    text = old.block("text")
    assert (table[text.start : text.end] == -1).all()
    assert moved.remap(VocabularyRegistry.create([spec("vq", "image", 512, mark="retrained")])).max() < 9 + 64


def test_control_tokens_follow_their_tokenizer() -> None:
    a, b = spec("a", "image", 4), spec("b", "image", 6)
    sound = TokenizerSpec("s", "audio", (8, 8), "sha-s", layout="delayed:0,1")
    old, new = VocabularyRegistry.create([a, sound, b]), VocabularyRegistry.create([b, a, sound])
    table = new.remap(old)
    for place in (VocabularyRegistry.opening, VocabularyRegistry.closing):
        assert [table[place(old, name)] for name in "abs"] == [place(new, name) for name in "abs"]
    assert table[old.fill("s")] == new.fill("s")
    assert table[: len(CONTROL)].tolist() == list(range(len(CONTROL)))
    assert "control tokens moved: <image> 5 -> <image:a> 7, </image> 6 -> </image:a> 8, <image:b> 7 -> <image> 5, " in (
        old.diff(new)
    )
    assert old.diff(new).splitlines()[-1].endswith("the first is 5, <image> -> the same of another tokenizer")
    plain = VocabularyRegistry.create([TokenizerSpec("s", "audio", (8, 8), "sha-s"), spec("a", "image", 4, mark="new")])
    table = plain.remap(old)
    for lost in (old.opening("a"), old.closing("b"), old.fill("s")):
        assert table[lost] == -1
    assert table[old.opening("s")] == plain.opening("s")


def test_a_codec_is_never_split_over_two() -> None:
    def codec(name: str, levels: int) -> TokenizerSpec:
        return spec(name, "audio", *[8] * levels, mark="same")

    def home(source: TokenizerSpec, *targets: TokenizerSpec) -> str:
        old, new = VocabularyRegistry.create([source]), VocabularyRegistry.create(targets)
        ids = [old.opening(source.name), *(b.start for b in old.blocks_of(source.name)), old.closing(source.name)]
        owners = set()
        for place in new.remap(old)[ids]:
            owners |= {t.name for t in targets if place in (new.opening(t.name), new.closing(t.name))}
            owners |= {b.tokenizer for b in new.blocks if b.tokenizer and b.start == place}
        return " ".join(owners)

    assert home(codec("c", 2), codec("x", 2), codec("c", 2)) == "c"
    assert home(codec("c", 4), codec("x", 2), codec("y", 4)) == "y"  # level by level, x would take the first two
    assert home(codec("c", 4), codec("c", 2), codec("x", 8)) == "x"  # enough codebooks
    assert home(codec("c", 4), codec("c", 8), codec("x", 4)) == "x"  # the same number: a sequence stays one
    assert home(codec("c", 4), codec("x", 2)) == "x"


@quick
@given(registries())
def test_json_round_trip_is_canonical(r: VocabularyRegistry) -> None:
    again = VocabularyRegistry.from_json(r.to_json())
    assert again == r
    assert hash(again) == hash(r)
    assert again.to_json() == r.to_json()
    assert again.diff(r) == ""
    assert VocabularyRegistry.from_json(json.dumps(json.loads(r.to_json()))).fingerprint == r.fingerprint


@settings(quick, max_examples=200)
@given(st.data())
def test_damaged_json_is_a_vocabulary_error_or_a_valid_vocabulary(data: st.DataObject) -> None:
    value = json.loads(example().to_json())
    parent: object = value
    key: object = data.draw(st.sampled_from(sorted(value)))
    while isinstance(parent[key], dict | list) and parent[key] and data.draw(st.booleans()):  # type: ignore[index]
        parent = parent[key]  # type: ignore[index]
        keys = sorted(parent) if isinstance(parent, dict) else range(len(parent))  # type: ignore[arg-type]
        key = data.draw(st.sampled_from(keys))
    junk = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just([]), st.just({})
    )
    if data.draw(st.booleans()):
        parent[key] = data.draw(junk)  # type: ignore[index]
    else:
        del parent[key]  # type: ignore[attr-defined]
    try:
        r = VocabularyRegistry.from_json(json.dumps(value))
    except VocabularyError:
        return
    assert VocabularyRegistry.from_json(r.to_json()) == r
    r.split(used(r))


def test_json_errors_say_what_is_wrong() -> None:
    text = example().to_json()
    for old, new, message in (
        ('"start": 9,', '"start": 8,', "'text' starts at 8, but ids below 9 are taken"),
        ('"capacity": 520', '"capacity": 511', "got size 512, expected 1 to its capacity 511"),
        ('"format": 2', '"format": 9', "reads format 2"),
        ('"<bos>"', '"<pad>"', "same name"),
        ('"<bos>"', '"<BOS>"', "no control token '<bos>'"),
        ('"sha-vq"', '"sha-other"', "tokenizer 'vq'"),
        ('"capacity": 8,', '"capacity": 99999999,', "at most"),
    ):
        assert old in text
        with pytest.raises(VocabularyError, match=message):
            VocabularyRegistry.from_json(text.replace(old, new, 1))
    for junk in ("", "[]", "{}", "null", "{" * 10_000):
        with pytest.raises(VocabularyError):
            VocabularyRegistry.from_json(junk)


def test_a_mismatch_prints_the_difference() -> None:
    r, other = example(), example().extend([spec("vq2", "image", 7)])
    r.check_same(r.fingerprint, "shard 0")
    r.check_same(example(), "shard 0")
    with pytest.raises(
        VocabularyMismatchError,
        match=r"shard 0 has .*mmtok vocab migrate SOURCE --to VOCAB -o OUT\)\. To this one: revision: 1 -> 0; .*; "
        r"tokenizer vq2 \(image, 7 codes, ids 859..865\) removed; .*; the first is 857, <image:vq2> -> unused id 857$",
    ):
        r.check_same(other, "shard 0")
    with pytest.raises(VocabularyMismatchError, match="abc"):
        r.check_same("abc", "shard 0")
    assert r.diff(example()) == ""
    retrained = VocabularyRegistry.create([*r.tokenizers[:2], spec("rvq", "audio", 16, 16, 8, mark="new")], max_grid=32)
    assert r.diff(retrained).splitlines() == [
        "tokenizer rvq: other weights, fingerprint sha-rvq -> new",
        "ids: 42 of 849 mean something else or nothing; the first is 7, <audio> -> the same of another tokenizer",
    ]


def test_a_difference_reads_from_old_to_new() -> None:
    old = example()
    grown = spec("vq", "image", 515, mark="sha-vq-grown")
    new = old.extend([grown, spec("words", "text", 3), spec("voice", "audio", 4, 4)])
    assert old.diff(new).splitlines() == [
        "revision: 0 -> 1",
        "size: 857 -> 870",
        "tokenizer words (text, 3 codes, ids 859..861) added",
        "tokenizer voice (audio, 2 codebooks of 4 codes, layout interleaved, ids 862..869) added",
        "tokenizer vq: 512 codes -> 515 codes",
        "tokenizer vq: other weights, fingerprint sha-vq -> sha-vq-grown",
        "tokenizer vq: extends none -> [sha-vq]",
        "control tokens added: <audio:voice> 857, </audio:voice> 858",
        "block image: head-room 8 -> 5",
        "ids: all 849 keep their meaning",
    ]
    back = new.diff(old).splitlines()
    assert "tokenizer words (text, 3 codes, ids 859..861) removed" in back
    assert back[-1].startswith("ids: 530 of 865 mean something else")  # only the later knows what it extends


def test_moved_blocks_and_control_tokens_are_named() -> None:
    old = example()
    delayed = TokenizerSpec("rvq", "audio", (16, 16, 8), "sha-rvq", layout="delayed:0,1,2")
    lines = old.diff(VocabularyRegistry.create([delayed, *old.tokenizers[:2]], max_grid=32)).splitlines()
    assert lines == [
        "size: 857 -> 858",
        "tokenizer rvq: layout interleaved -> delayed:0,1,2",
        "order of the tokenizers: bytes, vq, rvq -> rvq, bytes, vq",
        "control tokens added: <fill:audio> 9",
        "block text moved: ids 9..264 -> 10..265",
        "block grid moved: ids 265..296 -> 266..297",
        "block image moved: ids 297..808 -> 298..809",
        "block audio.0 moved: ids 817..832 -> 818..833",
        "block audio.1 moved: ids 833..848 -> 834..849",
        "block audio.2 moved: ids 849..856 -> 850..857",
        "ids: 840 of 849 mean something else or nothing; the first is 9, text id 0 -> <fill:audio>",
    ]


@quick
@given(registries(), registries())
def test_moved_ids_are_those_that_mean_something_else(a: VocabularyRegistry, b: VocabularyRegistry) -> None:
    def meaning(r: VocabularyRegistry, id: int) -> tuple:
        if id >= r.size or "unused" in r.describe(id):
            return ()
        block = next(x for x in r.blocks if x.start <= id < x.end)
        for t in (t for t in r.tokenizers if block.names and t.modality != "text"):
            if id in (r.opening(t.name), r.closing(t.name)):
                return t.modality, t.fingerprint, "opening" if id == r.opening(t.name) else "closing"
        code = block.names[id - block.start] if block.names else id - block.start
        return block.modality, block.fingerprint, block.codebook, code

    plain = [int(i) for i in used(a) if meaning(a, i) != meaning(b, i)]
    assert b.moved(a).tolist() == plain
    assert a.moved(a).tolist() == []
    assert (a.diff(b) == "") == (a == b)


def test_unknown_names_list_the_known_ones() -> None:
    r = example()
    for call in (r.control, r.block, r.tokenizer, r.blocks_of, r.opening):
        with pytest.raises(VocabularyError, match="known: "):
            call("nothing")
    with pytest.raises(VocabularyError, match="text tokenizer"):
        r.opening("bytes")


@pytest.mark.parametrize(
    "change",
    [
        {"name": "a b"},
        {"name": ""},
        {"name": "audio"},
        {"modality": "video"},
        {"codebook_sizes": ()},
        {"modality": "text", "codebook_sizes": (4, 4)},
        {"codebook_sizes": (0,)},
        {"codebook_sizes": (2.5,)},
        {"fingerprint": ""},
        {"headroom": -1},
        {"properties": {"x": object()}},
        {"properties": {"x": float("nan")}},
        {"properties": {"extends": "abc"}},
    ],
)
def test_impossible_tokenizers_are_refused(change: dict) -> None:
    good = {"name": "vq", "modality": "image", "codebook_sizes": (4,), "fingerprint": "f"}
    TokenizerSpec(**good)
    with pytest.raises(VocabularyError):
        TokenizerSpec(**{**good, **change})


def test_impossible_registries_are_refused() -> None:
    with pytest.raises(VocabularyError, match="names must differ"):
        VocabularyRegistry.create([spec("a", "text", 3), spec("a", "image", 3)])
    for arguments in ({"max_grid": 0}, {"max_grid": 1.5}, {"pad_multiple": 0}, {"pad_multiple": "64"}):
        with pytest.raises(VocabularyError):
            VocabularyRegistry.create([], **arguments)
    with pytest.raises(VocabularyError, match="at most"):
        VocabularyRegistry.create([spec("a", "text", 2**24)])
    assert VocabularyRegistry.create([]).blocks[0].names == CONTROL


@pytest.mark.parametrize("threads", [1, 3])
def test_long_arrays_are_split_and_merged_as_short_ones(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(idmap, "PIECE", 50)
    monkeypatch.setattr(idmap, "LONG", 100)
    monkeypatch.setattr(idmap, "THREADS", threads)
    r = example()
    rng = np.random.default_rng(0)
    for n in (0, 1, 49, 50, 51, 99, 100, 101, 834):
        ids = rng.choice(used(r), n)
        index, codes = r.split(ids)
        assert [r.blocks[i].start + c for i, c in zip(index, codes, strict=True)] == ids.tolist()
        assert np.array_equal(r.merge(index, codes), ids)
        for at in {0, n // 3, n - 1} & set(range(n)):
            for wrong in (-1, r.size, 810, -(2**60)):  # 810 is head-room
                bad = ids.copy()
                bad[[at, -1]] = wrong
                with pytest.raises(VocabularyError, match=f"position {at}: "):
                    r.split(bad)
            for index_wrong, code_wrong in ((-1, 0), (len(r.blocks), 0), (-len(r.blocks) - 1, 0), (3, 512), (3, -1)):
                i, c = index.copy(), codes.copy()
                i[[at, -1]], c[[at, -1]] = index_wrong, code_wrong
                with pytest.raises(VocabularyError, match=f"position {at}: "):
                    r.merge(i, c)


def test_what_would_break_elsewhere_is_refused_at_once() -> None:
    for properties in ({"hop": 0}, {"sample_rate": "x"}, {"hop": None}, {"sample_rate": 10**400}, {"downsample": True}):
        with pytest.raises(VocabularyError, match="expected a number above 0"):
            TokenizerSpec("a", "audio", (4,), "a", properties=properties)
    with pytest.raises(VocabularyError, match="rename"):
        VocabularyRegistry.create([spec("vq", "image", 4), spec("image", "image", 4)])
    assert VocabularyRegistry.create([spec("image", "image", 4)]).tokenizer("image").name == "image"

"""Layouts of published systems: vectors worked out by hand from their sources, round trips, what is refused where."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.adapters import (
    ADAPTERS,
    Adapter,
    AnyGPT,
    Chameleon,
    Emu3,
    LuminaMGPT,
    Moshi,
    MusicGen,
    Segment,
    ShowO,
)
from mmtok.errors import LayoutError, SequenceError, VocabularyError
from mmtok.grammar import Grammar

NAMES = list(ADAPTERS)
FLAT = [name for name in NAMES if name not in ("musicgen", "moshi")]
PUBLISHED_SIZE = {"chameleon": 65536, "lumina-mgpt": 65536, "emu3": 184622, "anygpt": 49420, "show-o": 58498}
quick = settings(deadline=None, derandomize=True, max_examples=40)


@functools.cache
def adapter(name: str) -> Any:
    return ADAPTERS[name]()


@functools.cache
def grammar(name: str) -> Grammar:
    return Grammar(adapter(name).registry())


def text(*ids: int) -> Segment:
    return Segment("text", ids)


# --- vectors worked out by hand

ZEROS = np.zeros((32, 32), int)
ZEROS[0, 0], ZEROS[31, 31] = 2, 8191
SHOW = np.zeros((16, 16), int)
SHOW[0, :2], SHOW[15, 15] = (5, 6), 8191
SEED = np.arange(32).reshape(1, 32)

GOLDEN: list[tuple[str, list, Any]] = [
    # Chameleon. Images of 1024 codes between <racm3:break> and <eoss>: chameleon/inference/chameleon.py, tokenize_image
    # and `gen_count == 1024`. Image ids 4..8195: lumina_mgpt/inference_solver.py, `range(4, 8195 + 1)`. Start 8197 and
    # end 8196: GAIR-NLP/anole inference.py, "8197(boi), 8196(eoi)". <reserved08706>, the end of a turn, is 8710:
    # lumina_mgpt/model/chameleon/convert_chameleon_weights_to_hf.py.
    (
        "chameleon",
        [text(0, 16397), Segment("image", ZEROS), text(8710)],
        [0, 16397, 8197, 6, *[4] * 1022, 8195, 8196, 8710],
    ),
    # Lumina-mGPT. lumina_mgpt/data/item_processor.py, process_image: start, height, width, rows each with
    # <reserved08799>, end; `tokens[0] - 8804` grids of 2 x 2 codes, so 8805 is one grid and <reserved08799> 8803.
    (
        "lumina-mgpt",
        [text(0), Segment("image", [[0, 1, 2, 3], [4, 5, 6, 8191]]), text(8710)],
        [0, 8197, 8805, 8806, 4, 5, 6, 7, 8803, 8, 9, 10, 8195, 8803, 8196, 8710],
    ),
    # Emu3. emu3/mllm/processing_emu3.py, __call__: boi {H}*{W} img rows joined by eol, eol, eof, eoi; the ids from
    # emu3/mllm/configuration_emu3.py (151849 bos, 151851 img, 151852 boi, 151853 eoi, 151846 eol, 151847 eof), visual
    # code 0 at 184622 - 32768 = 151854. "*" 9, "0" 15, "1" 16, "2" 17, "3" 18: lines `Kg== 9`, `MA== 15`, `MQ== 16`,
    # `Mg== 17`, `Mw== 18` of emu3.tiktoken.
    (
        "emu3",
        [text(151849, 64), Segment("image", [[0, 1, 2], [3, 4, 32767]]), text(13, 151850)],
        [
            *[151849, 64, 151852, 17, 9, 18, 151851],
            *[151854, 151855, 151856, 151846, 151857, 151858, 184621, 151846, 151847, 151853, 13, 151850],
        ],
    ),
    (
        "emu3",
        [Segment("image", [[7]] * 10)],
        [151852, 16, 15, 9, 16, 151851, *[151861, 151846] * 10, 151847, 151853],
    ),
    # AnyGPT. anygpt/src/train/stage1_pretrain.py: 32000 + 4 roles, then 8192 image codes, <soim>, <eoim> (32004..40195,
    # 40196, 40197), 1024 speech codes, <sosp>, <eosp> (40198..41221, 41222, 41223), 8192 music codes, <somu>, <eomu>
    # (41224..49415, 49416, 49417). anygpt/src/m_utils/anything2token.py: code + 2048 * level, frame after frame.
    (
        "anygpt",
        [text(32000, 29901), Segment("image", SEED), text(32002), Segment("speech", [[0, 1023]]), text(49418)],
        [32000, 29901, 40196, *range(32004, 32036), 40197, 32002, 41222, 40198, 41221, 41223, 49418],
    ),
    (
        "anygpt",  # the example at the end of anything2token.py: 1, 0, 0, 0, then 32, 32 + 2048, ..., then 23, ...
        [Segment("music", [[1, 32, 23], [0, 32, 23], [0, 32, 23], [0, 32, 2047]])],
        [49416, 41225, 43272, 45320, 47368, 41256, 43304, 45352, 47400, 41247, 43295, 45343, 49415, 49417],
    ),
    # Show-o. training/prompting_utils.py, t2i_prompt: [PAD] (50295, `llm_vocab_size` of configs/showo_demo.yaml) ...
    # <|t2i|> (50300) text <|soi|> (50296) image <|eoi|> (50297); codes + len(text_tokenizer) = 50305: inference_t2i.py.
    (
        "show-o",
        [text(50295, 50300, 50256, 64, 50256), Segment("image", SHOW)],
        [50295, 50300, 50256, 64, 50256, 50296, 50310, 50311, *[50305] * 253, 58496, 50297],
    ),
    # MusicGen. audiocraft/modules/codebooks_patterns.py, DelayedPatternProvider: a first step of special tokens, then
    # codebook q shifted by q; config/model/lm/musicgen_lm.yaml: delays 0..3, card 2048, special token = card (lm.py).
    (
        "musicgen",
        [Segment("audio", [[1, 2], [3, 4], [5, 6], [7, 2047]])],
        [
            [2048, 1, 2, 2048, 2048, 2048],
            [2048, 2048, 3, 4, 2048, 2048],
            [2048, 2048, 2048, 5, 6, 2048],
            [2048, 2048, 2048, 2048, 7, 2047],
        ],
    ),
    # Moshi. moshi/moshi/models/loaders.py: n_q 16, delays 0, 0, 1 x 7, 0, 1 x 7, card 2048, text_card 32000;
    # models/lm.py, forward: a first step of initial tokens (card, text_card), which also fill the delays.
    (
        "moshi",
        [
            text(3, 31999),
            Segment("audio", [[0, 10], [1, 11], [2, 12], [3, 13], [4, 14], [5, 15], [6, 16], [7, 17]]),
            Segment("audio", [[20, 30], [21, 31], [22, 32], [23, 33], [24, 34], [25, 35], [26, 36], [27, 37]]),
        ],
        [
            [32000, 3, 31999, 32000],
            [2048, 0, 10, 2048],
            *[[2048, 2048, q, 10 + q] for q in range(1, 8)],
            [2048, 20, 30, 2048],
            *[[2048, 2048, 20 + q, 30 + q] for q in range(1, 8)],
        ],
    ),
]


@pytest.mark.parametrize(("name", "segments", "ids"), GOLDEN, ids=[f"{g[0]}-{i}" for i, g in enumerate(GOLDEN)])
def test_golden(name: str, segments: list[Segment], ids: Any) -> None:
    made = adapter(name).ids(segments)
    assert made.dtype == np.int64
    assert made.tolist() == ids
    assert adapter(name).segments(ids) == segments
    assert adapter(name).segments(torch.tensor(ids)) == segments


def test_other_published_configurations() -> None:
    # docs/MUSICGEN.md of audiocraft, stereo: n_q 8, delays [0, 0, 1, 1, 2, 2, 3, 3]
    stereo = MusicGen((0, 0, 1, 1, 2, 2, 3, 3)).ids([Segment("audio", np.arange(8)[:, None])])
    assert [row.index(q) for q, row in enumerate(stereo.tolist())] == [1, 1, 2, 2, 3, 3, 4, 4]
    # configs/moshi_dev_2b.json: n_q 32, delays 0, 0, 2 x 15, 0, 2 x 15, text_card 48000
    zeros = Segment("audio", np.zeros((16, 1), int))
    dev = Moshi(codebooks=16, delay=2, text_size=48000).ids([text(47999), zeros, zeros])
    assert dev[0].tolist() == [48000, 47999, 48000, 48000]
    assert np.argwhere(dev[1:] == 0)[:, 1].tolist() == [1, *[3] * 15, 1, *[3] * 15]
    # configs/showo_demo_512x512.yaml: num_vq_tokens 1024
    assert len(ShowO(side=32).ids([Segment("image", ZEROS)])) == 1026


def test_ids_by_name() -> None:
    """chameleon/inference/vocab.py, `remap`: IMGIMG, digits as A..J, one letter; any order of ids."""
    names = {"<s>": 0, "IMGIMGAZ": 3, "IMGIMGBZ": 1, "IMGIMGCZ": 2, "<racm3:break>": 6, "<eoss>": 5, "of": 4}
    chameleon = Chameleon(names)
    assert chameleon.specs[0].codebook_sizes == (7,)
    assert chameleon.specs[1].codebook_sizes == (3,)
    codes = np.resize([0, 1, 2], (32, 32))
    ids = [0, 6, *np.resize([3, 1, 2], 1024).tolist(), 5, 4]
    assert chameleon.ids([text(0), Segment("image", codes), text(4)]).tolist() == ids
    assert chameleon.segments(ids) == [text(0), Segment("image", codes), text(4)]

    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    full = {f"IMGIMG{str(code).translate(letters)}Z": 4 + code for code in range(8192)} | {"last": 65535}
    full |= {"<racm3:break>": 8197, "<eoss>": 8196} | {f"<reserved{n:05d}>": n + 4 for n in range(8700, 8900)}
    for kind in (Chameleon, LuminaMGPT):
        assert np.array_equal(kind(full).table.kind, kind().table.kind)
        assert np.array_equal(kind(full).table.code, kind().table.code)

    wrong: list[tuple[dict, str]] = [
        ({k: v for k, v in names.items() if k != "<eoss>"}, "<eoss>"),
        ({k: v for k, v in names.items() if k != "IMGIMGAZ"}, "codes 0, 1, 2"),
        ({**names, "IMGIMGxZ": 9}, "IMGIMGxZ"),
        ({**names, "<eoss>": 3}, "two meanings"),
        ({**names, "of": -1}, "'of' with id -1"),
        ({**names, "of": 2**60}, "'of' with id"),
        ({}, "no names"),
    ]
    for vocabulary, message in wrong:
        with pytest.raises(VocabularyError, match=re.escape(message)):
            Chameleon(vocabulary)


def test_anygpt_by_name() -> None:
    """The base model: no <-Res-> and <-Ins->; and ids in another order, for they depend on who appended first."""
    names = [f"<\U0001f3b6{code}>" for code in range(8192)] + ["<somu>", "<eomu>"]
    names += [f"<\U0001f440{code}>" for code in range(8192)] + ["<soim>", "<eoim>"]
    names += [f"<\U0001f5e3\ufe0f{code}>" for code in range(1024)] + ["<sosp>", "<eosp>"]
    anygpt = AnyGPT({name: 100 + i for i, name in enumerate(names)})
    assert anygpt.specs[0].codebook_sizes == (100 + 8194 + 8194 + 1026,)
    segments = [text(99), Segment("music", [[1], [0], [0], [0]]), Segment("speech", [[5]])]
    ids = [99, 8292, 101, 2148, 4196, 6244, 8293, 17512, 16493, 17513]
    assert anygpt.ids(segments).tolist() == ids
    assert anygpt.segments(ids) == segments
    with pytest.raises(VocabularyError, match="<eomu>"):
        AnyGPT({name: i for i, name in enumerate(names) if name != "<eomu>"})
    with pytest.raises(VocabularyError, match="expected a mapping"):
        AnyGPT(names)  # type: ignore[arg-type]


# --- random segments

TEXT_IDS = {  # of each system, what its layout leaves to the text model
    "chameleon": [range(4), range(8198, 65536)],
    "lumina-mgpt": [range(4), range(8198, 8803), [8804], range(8869, 65536)],
    "emu3": [range(151846), range(151848, 151851)],
    "anygpt": [range(32004), range(49418, 49420)],
    "show-o": [range(50296), range(50298, 50305)],
}


def sample(name: str, seed: int) -> list[Segment]:
    """Random segments of a system: texts not empty and not adjacent."""
    rng = np.random.default_rng(seed)

    def codes(tokenizer: str, *shape: int) -> Segment:
        size = next(s.codebook_sizes[0] for s in adapter(name).specs if s.name == tokenizer)
        return Segment(tokenizer, rng.integers(0, size, shape))

    t = int(rng.integers(1, 6))
    if name == "musicgen":
        return [codes("audio", 4, t)]
    if name == "moshi":
        return [codes("text", t), codes("audio", 8, t), codes("audio", 8, t)]
    sides = {"chameleon": (32, 32), "show-o": (16, 16), "anygpt": (1, 32), "emu3": rng.integers(1, 13, 2)}
    allowed = TEXT_IDS[name]
    out: list[Segment] = []
    for _ in range(rng.integers(0, 5)):
        media = rng.choice([s.name for s in adapter(name).specs])
        if media == "text" and not (out and out[-1].tokenizer == "text"):
            parts = [allowed[i] for i in rng.integers(0, len(allowed), t)]
            out.append(text(*(int(p[rng.integers(0, len(p))]) for p in parts)))
        elif media == "image":
            h, w = sides[name] if name in sides else 2 * rng.integers(1, 6, 2)
            out.append(codes("image", int(h), int(w)))
        elif media in ("speech", "music"):
            out.append(codes(media, 1 if media == "speech" else 4, t - 1))
    return out


@quick
@given(st.sampled_from(NAMES), st.integers(0, 2**32))
def test_round_trip(name: str, seed: int) -> None:
    segments = sample(name, seed)
    ids = adapter(name).ids(segments)
    assert adapter(name).segments(ids) == segments
    assert np.array_equal(adapter(name).ids(adapter(name).segments(ids.astype(np.int32))), ids)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_through_a_vocabulary_of_ours(name: str) -> None:
    g = grammar(name)
    registry = g.registry
    for seed in range(4):
        theirs = adapter(name).ids(sample(name, seed))
        parts = [g.segment_ids(s.tokenizer, s.codes) for s in adapter(name).segments(theirs)]
        ours = np.concatenate([[registry.bos], *parts, [registry.eos]])
        spans = [span for span in g.spans(ours) if span.kind != "control"]
        back = [Segment(span.tokenizer, g.segment_codes(ours, span)) for span in spans]
        assert np.array_equal(adapter(name).ids(back), theirs)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32", "uint64"])
@pytest.mark.parametrize("name", NAMES)
def test_any_integer_type(name: str, dtype: str) -> None:
    ids = adapter(name).ids(sample(name, 5))
    if ids.max() <= np.iinfo(dtype).max:
        assert np.array_equal(adapter(name).ids(adapter(name).segments(ids.astype(dtype))), ids)
    low = np.full(4 if name in FLAT else (len(ids), 4), 100, dtype)
    assert error_at(name, low) == (None if name not in ("chameleon", "lumina-mgpt", "musicgen", "moshi") else 0)


def test_sizes_and_counts_of_sequences() -> None:
    for name in FLAT:
        for seed in range(20):
            ids = adapter(name).ids(sample(name, seed))
            assert len(ids) == 0 or 0 <= ids.min() <= ids.max() < PUBLISHED_SIZE[name]
    # README of Lumina-mGPT's figures: 1060, 2356 and 4164 tokens for square images of 512, 768 and 1024 pixels
    for pixels, tokens in ((512, 1060), (768, 2356), (1024, 4164)):
        assert len(LuminaMGPT().ids([Segment("image", np.zeros((pixels // 16,) * 2, int))])) == tokens


def test_texts_merge_and_empty_ones_vanish() -> None:
    a = adapter("show-o")
    assert a.segments(a.ids([text(1), text(), text(2)])) == [text(1, 2)]
    assert a.segments([]) == []


# --- what is refused, and where

CHAMELEON = [0, 8197, *[4] * 1024, 8196, 1]
LUMINA = [0, 8197, 8805, 8806, 4, 5, 6, 7, 8803, 8, 9, 10, 11, 8803, 8196, 1]
EMU = [64, 151852, 17, 9, 18, 151851, *[151854] * 3, 151846, *[151855] * 3, 151846, 151847, 151853, 1]
ANY = [1, 49416, 41225, 43272, 45320, 47368, 41256, 43304, 45352, 47400, 49417, 2]
SPEECH = [1, 41222, 40198, 40199, 41223, 2]
SEED_IDS = [1, 40196, *range(32004, 32036), 40197, 2]
SHOWO = [7, 50296, *[50305] * 256, 50297, 7]


def put(ids: list[int], at: int, *new: int) -> list[int]:
    """``ids`` with the one at ``at`` replaced by ``new``, none or more."""
    return [*ids[:at], *new, *ids[at + 1 :]]


MALFORMED: list[tuple[str, list[int], int, str]] = [
    ("chameleon", put(CHAMELEON, 500), 1025, "image code"),  # a short image: its end comes too early
    ("chameleon", put(CHAMELEON, 500, 4, 4), 1026, "image end"),  # one code too many
    ("chameleon", put(CHAMELEON, 500, 9000), 500, "image code"),
    ("chameleon", CHAMELEON[:600], 600, "image code"),
    ("chameleon", put(CHAMELEON, 1026, 1), 1026, "image end"),
    ("chameleon", CHAMELEON[:1026], 1026, "image end"),
    ("chameleon", [0, 4], 1, "text or image start"),  # an image code outside an image
    ("chameleon", [0, 8196], 1, "text or image start"),  # an end without a start
    ("chameleon", put(CHAMELEON, 0, 65536), 0, "text or image start"),
    ("chameleon", put(CHAMELEON, 700, -1), 700, "image code"),
    ("chameleon", [0, -2], 1, "text or image start"),
    ("lumina-mgpt", put(LUMINA, 8), 8, "row end"),
    ("lumina-mgpt", put(LUMINA, 8, 4), 8, "row end"),
    ("lumina-mgpt", put(LUMINA, 6), 7, "image code"),  # a short row
    ("lumina-mgpt", put(LUMINA, 2, 8804), 2, "size token"),  # no grids
    ("lumina-mgpt", put(LUMINA, 3, 8869), 3, "size token"),  # 65 grids
    ("lumina-mgpt", put(LUMINA, 2, 8806), 14, "image code"),  # two rows short
    ("lumina-mgpt", put(LUMINA, 3, 8805), 6, "row end"),  # narrower than said
    ("lumina-mgpt", put(LUMINA, 14), 14, "image end"),
    ("lumina-mgpt", LUMINA[:3], 3, "size token"),
    ("lumina-mgpt", [8803], 0, "text or image start"),
    ("emu3", put(EMU, 9), 9, "row end"),
    ("emu3", put(EMU, 8), 8, "image code"),
    ("emu3", put(EMU, 2, 15), 2, "a digit from 1 to 9"),
    ("emu3", put(EMU, 2, 15, 17), 2, "a digit from 1 to 9"),  # 02*3
    ("emu3", put(EMU, 2), 2, "a digit from 1 to 9"),
    ("emu3", put(EMU, 3), 4, "a digit or '*'"),
    ("emu3", put(EMU, 5), 5, "a digit or image token"),
    ("emu3", put(EMU, 4, *[24] * 10), 13, "image token"),
    ("emu3", put(EMU, 2, *[24] * 9), 14 + 8, "image code"),  # 999999999 rows: no memory is taken for them
    ("emu3", put(EMU, 4, *[24] * 9), 9 + 8, "image code"),
    ("emu3", put(EMU, 14), 14, "frame end"),
    ("emu3", put(EMU, 15), 15, "image end"),
    ("emu3", EMU[:6], 6, "image code"),
    ("emu3", put(EMU, 0, 151846), 0, "text or image start"),
    ("emu3", put(EMU, 7, 184622), 7, "image code"),
    ("anygpt", put(ANY, 5, 45320), 5, "music level 3 code"),  # a wrong level
    ("anygpt", put(ANY, 4), 4, "music level 2 code"),  # phase slip after a lost token
    ("anygpt", put(ANY, 9), 9, "music level 3 code"),  # incomplete last frame
    ("anygpt", put(ANY, 6, 43272), 6, "music level 0 code or music end"),
    ("anygpt", put(ANY, 10), 10, "music level 0 code or music end"),
    ("anygpt", ANY[:9], 9, "music level 3 code"),
    ("anygpt", ANY[:10], 10, "music level 0 code or music end"),
    ("anygpt", put(SPEECH, 3, 41225), 3, "speech code or speech end"),
    ("anygpt", put(SPEECH, 4, 49417), 4, "speech code or speech end"),
    ("anygpt", put(SPEECH, 1), 1, "text or image start or speech start or music start"),
    ("anygpt", put(SEED_IDS, 10), 33, "image code"),
    ("anygpt", put(SEED_IDS, 10, 32004, 32004), 34, "image end"),
    ("anygpt", put(SPEECH, 5, 49420), 5, "text or image start or speech start or music start"),
    ("show-o", put(SHOWO, 9), 257, "image code"),
    ("show-o", put(SHOWO, 9, 50305, 50305), 258, "image end"),
    ("show-o", put(SHOWO, 9, 58497), 9, "image code"),  # a mask that was left
    ("show-o", [7, 58497], 1, "text or image start"),
    ("show-o", put(SHOWO, 258), 258, "image end"),
    ("show-o", [50298, 50305], 1, "text or image start"),  # a video
]


@pytest.mark.parametrize(("name", "ids", "position", "expected"), MALFORMED)
def test_malformed(name: str, ids: list[int], position: int, expected: str) -> None:
    with pytest.raises(SequenceError) as caught:
        adapter(name).segments(ids)
    assert (caught.value.position, caught.value.expected) == (position, expected)


def test_the_sequences_before_the_damage_are_valid() -> None:
    for name, ids in (("chameleon", CHAMELEON), ("lumina-mgpt", LUMINA), ("emu3", EMU), ("show-o", SHOWO)):
        assert adapter(name).ids(adapter(name).segments(ids)).tolist() == ids
    for ids in (ANY, SPEECH, SEED_IDS):
        assert adapter("anygpt").ids(adapter("anygpt").segments(ids)).tolist() == ids


def test_errors_say_what_was_got() -> None:
    for name, ids, got in (
        ("chameleon", [0, 21], "image code 17 (id 21)"),
        ("chameleon", [8197, 9000], "text id 9000"),
        ("lumina-mgpt", [8197, 8196], "image end (id 8196)"),
        ("emu3", [151852, 17], "the end of the sequence"),
        ("anygpt", [43273], "music level 1 code 1 (id 43273)"),
        ("show-o", [2**63], f"id {2**63} outside the vocabulary of 58498"),
    ):
        with pytest.raises(SequenceError) as caught:
            adapter(name).segments(np.array(ids))
        assert caught.value.got == got


MUSIC = next(np.array(ids) for name, _, ids in GOLDEN if name == "musicgen")
MOSHI = next(np.array(ids) for name, _, ids in GOLDEN if name == "moshi")


@pytest.mark.parametrize(
    ("name", "q", "step", "new", "got", "expected"),
    [
        ("musicgen", 0, 0, 5, "code 5", "fill 2048"),  # the first step
        ("musicgen", 2, 2, 5, "code 5", "fill 2048"),  # a code in a gap
        ("musicgen", 0, 3, 0, "code 0", "fill 2048"),  # and in one at the end
        ("musicgen", 3, 4, 2048, "fill 2048", "code 0..2047"),  # a gap where a code belongs
        ("musicgen", 1, 2, 2049, "id 2049", "code 0..2047"),
        ("musicgen", 1, 2, -1, "id -1", "code 0..2047"),  # MusicGen's mark of codes yet unknown
        ("moshi", 0, 0, 0, "code 0", "fill 32000"),
        ("moshi", 0, 1, 32000, "fill 32000", "code 0..31999"),
        ("moshi", 16, 1, 3, "code 3", "fill 2048"),
        ("moshi", 9, 3, 3, "code 3", "fill 2048"),
        ("moshi", 8, 2, 32000, "id 32000", "code 0..2047"),
    ],
)
def test_malformed_streams(name: str, q: int, step: int, new: int, got: str, expected: str) -> None:
    ids = {"musicgen": MUSIC, "moshi": MOSHI}[name].copy()
    ids[q, step] = new
    with pytest.raises(SequenceError) as caught:
        adapter(name).segments(ids)
    assert caught.value.position == step * len(ids) + q
    assert caught.value.got == f"{got} of stream {q}"
    assert caught.value.expected == f"{expected} of stream {q} at step {step}"


@pytest.mark.parametrize(
    ("name", "ids", "position"),
    [
        ("musicgen", MUSIC[:, :0], 0),
        ("musicgen", MUSIC[:, :4], 16),  # valid so far, but no frame is complete
        ("musicgen", MUSIC[:, :5], 8),  # five steps hold one frame: the second code of stream 0 is too many
        ("musicgen", MUSIC[:, 1:], 0),
        ("musicgen", np.full((4, 4), 2048), 4),  # the first code of stream 0 is missing
        ("moshi", MOSHI[:, :2], 34),
        ("moshi", MOSHI[:, :3], 34),  # Moshi's own roll: it loses the last codes of the delayed streams
    ],
)
def test_cut_streams(name: str, ids: np.ndarray, position: int) -> None:
    with pytest.raises(SequenceError) as caught:
        adapter(name).segments(ids)
    assert caught.value.position == position


def error_at(name: str, ids: Any) -> int | None:
    """Where a sequence is refused; None if it is valid, and then it must come back. Other exceptions pass."""
    a = adapter(name)
    try:
        segments = a.segments(ids)
    except SequenceError as error:
        return error.position
    assert np.array_equal(a.ids(segments), ids)
    return None


@settings(quick, max_examples=400)
@given(st.sampled_from(FLAT), st.integers(0, 2**32), st.data())
def test_one_damaged_id_is_valid_or_a_sequence_error_at_the_first_that_cannot_follow(
    name: str, seed: int, data: st.DataObject
) -> None:
    ids = adapter(name).ids(sample(name, seed)).tolist()
    at = data.draw(st.integers(0, len(ids)))
    some = st.sampled_from([*{*ids}, 9, 15, 16, 8197, 8805, 50296, 151852, 41222, 49416])
    new = data.draw(some | st.integers(-2, PUBLISHED_SIZE[name] + 2))
    damaged = [*ids[:at], *data.draw(st.sampled_from([[], [new], [new, *ids[at : at + 1]]])), *ids[at + 1 :]]
    position = error_at(name, damaged)
    if position is not None:  # what stands before is the beginning of something valid, and the id there cannot follow
        assert at <= position <= len(damaged)
        assert error_at(name, damaged[:position]) in (None, position)
        assert error_at(name, damaged[: position + 1]) == position


@settings(quick, max_examples=200)
@given(st.sampled_from(["musicgen", "moshi"]), st.integers(0, 2**32), st.data())
def test_one_damaged_entry_of_streams_is_valid_or_a_sequence_error_there(
    name: str, seed: int, data: st.DataObject
) -> None:
    ids = adapter(name).ids(sample(name, seed))
    q, step = data.draw(st.integers(0, len(ids) - 1)), data.draw(st.integers(0, ids.shape[1] - 1))
    damaged = ids.copy()
    damaged[q, step] = data.draw(st.sampled_from([-2, -1, 0, 2047, 2048, 2049, 31999, 32000, 32001, 2**40]))
    assert error_at(name, damaged) in (None, step * len(ids) + q)
    for short in (damaged[:, :step], np.delete(ids, step, axis=1)):
        position = error_at(name, short)
        assert position is None or position <= short.size


# --- bad arguments


@pytest.mark.parametrize("name", NAMES)
def test_bad_arguments(name: str) -> None:
    a = adapter(name)
    valid = np.asarray(a.ids(sample(name, 1)))
    for bad in (valid.astype(float), valid > 0, "ids", None, [["a"]], [[1], [1, 2]]):
        with pytest.raises(VocabularyError):
            a.segments(bad)
    for bad in (valid[None], np.int64(3), np.zeros((3, 5), int)):
        with pytest.raises((VocabularyError, LayoutError)):
            a.segments(bad)
    for spec in a.specs:
        for shape in ((), (2, 2, 2), (3,) if spec.modality != "text" else (2, 2), (0, 4)):
            with pytest.raises(VocabularyError):
                a.ids([Segment(spec.name, np.zeros(shape, int))])
    some = next(found for seed in range(99) if len(found := sample(name, seed)) > 1 or name == "musicgen")
    for i, segment in enumerate(some):
        limit = next(spec.codebook_sizes[-1] for spec in a.specs if spec.name == segment.tokenizer)
        for code in (-1, limit):
            codes = segment.codes.copy()
            codes[(-1,) * codes.ndim] = code
            with pytest.raises(VocabularyError, match=f"segment {i}: {segment.tokenizer} code {code} at"):
                a.ids([*some[:i], Segment(segment.tokenizer, codes), *some[i + 1 :]])
    with pytest.raises(VocabularyError, match="known: "):
        a.ids([Segment("video", [[1]])])
    with pytest.raises(VocabularyError, match="expected Segment"):
        a.ids([np.zeros(3)])


REFUSED: list[tuple[str, list[Segment], str]] = [
    ("chameleon", [Segment("image", np.zeros((16, 64), int))], "16x64 codes; chameleon can only hold 32x32"),
    (
        "lumina-mgpt",
        [Segment("image", np.zeros((3, 4), int))],
        "3x4 codes; lumina-mgpt can only hold even sides of 2..128",
    ),
    ("lumina-mgpt", [Segment("image", np.zeros((130, 2), int))], "130x2 codes"),
    ("anygpt", [Segment("image", np.zeros((1, 31), int))], "1x31 codes; anygpt can only hold 1x32"),
    ("show-o", [Segment("image", np.zeros((32, 32), int))], "32x32 codes; this show-o can only hold 16x16"),
    ("emu3", [Segment("image", np.zeros((0, 3), int))], "shape [0, 3], expected [h, w] with sides from 1 up"),
    ("anygpt", [Segment("music", np.zeros((3, 2), int))], "shape [3, 2], expected [4, T]"),
    ("anygpt", [text(1), Segment("music", [[0], [0], [2048], [0]])], "segment 1: music code 2048 at (2, 0)"),
    ("chameleon", [text(1, 8197)], "image start (id 8197) at 1, expected text ids"),
    ("chameleon", [text(65536)], "text code 65536 at 0, expected 0..65535"),
    ("musicgen", [], "0 segments; musicgen can only hold one of audio"),
    ("musicgen", [Segment("audio", np.zeros((4, 0), int))], "no frames"),
    ("moshi", [text(1)], "got text [1]; moshi can only hold text [T], audio [K, T] and audio [K, T]"),
    ("moshi", [text(1), *[Segment("audio", np.zeros((8, 2), int))] * 2], "of one length"),
]


@pytest.mark.parametrize(("name", "segments", "message"), REFUSED)
def test_what_a_layout_cannot_hold_is_refused(name: str, segments: list[Segment], message: str) -> None:
    with pytest.raises(VocabularyError, match=re.escape(message)):
        adapter(name).ids(segments)


def test_bad_constructor_arguments() -> None:
    for make in (
        lambda: ShowO(side=0),
        lambda: ShowO(side=1.5),  # type: ignore[arg-type]
        lambda: Emu3(digits=range(9)),
        lambda: Emu3(times=15),
        lambda: Emu3(times=151846),
        lambda: Emu3(times=-2),
        lambda: Moshi(codebooks=0),
        lambda: Moshi(text_size=0),
        lambda: adapter("emu3").registry(max_grid=0),
    ):
        with pytest.raises(VocabularyError):
            make()
    for make in (lambda: MusicGen(()), lambda: MusicGen((0, -1)), lambda: Moshi(delay=-1)):
        with pytest.raises(LayoutError):
            make()
    with pytest.raises(VocabularyError):
        Segment("text", [0.5])


def test_segments_are_values() -> None:
    codes = np.array([[1, 2]])
    segment = Segment("image", codes)
    codes[0, 0] = 9
    assert segment == Segment("image", torch.tensor([[1, 2]]))
    assert segment != Segment("image", [[1, 3]])
    assert segment != Segment("image", [1, 2])
    assert segment != Segment("speech", [[1, 2]])
    assert segment != "image"
    assert segment.codes.dtype == np.int64


def test_adapters_say_where_their_facts_come_from() -> None:
    assert NAMES == ["chameleon", "lumina-mgpt", "emu3", "anygpt", "show-o", "musicgen", "moshi"]
    for name in NAMES:
        a: Adapter = adapter(name)
        assert a.name == name
        assert re.match(r"github\.com/\S+/\S+: \S+\.py", a.source)
        assert all(spec.fingerprint.startswith("published:") for spec in a.specs)

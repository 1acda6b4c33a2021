"""Images of several codes a position, coarse to fine: ids, words, masks, recovery, loss, generation, tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import commands
import numpy as np
import pytest
import torch

import mmtok
from mmtok import media
from mmtok.documents import Document, Image, Text
from mmtok.errors import SequenceError, VocabularyError
from mmtok.evaluation.roundtrip import roundtrip_image
from mmtok.export import names_of_ids
from mmtok.grammar import Grammar, Restriction
from mmtok.image import ImageVQVAE, ImageVQVAEConfig
from mmtok.image.tokenizer import match_channels
from mmtok.listing import listing
from mmtok.migration import Translation
from mmtok.multimodal import MultimodalTokenizer, spec_of
from mmtok.recovery import recover
from mmtok.registry import TokenizerSpec, VocabularyRegistry
from mmtok.text import ByteLevelBPE
from mmtok.training.lm import SequenceLoss
from mmtok.transformer import Request, Transformer, TransformerConfig, generate

SIZES = (5, 4, 3)
REGISTRY = VocabularyRegistry.create(
    [
        TokenizerSpec("words", "text", (10,), "t"),
        TokenizerSpec("rvq", "image", SIZES, "i"),
        TokenizerSpec("vq", "image", (6,), "j"),
    ],
    max_grid=4,
)
GRAMMAR = Grammar(REGISTRY)
CODES = np.array([[[0, 1, 2], [4, 3, 0]]])  # [1, 2, 3]
START = [b.start for b in REGISTRY.blocks_of("rvq")]
WORD = REGISTRY.block("text").start
IDS = [REGISTRY.bos, 5, 19, 20, *(a + s for position in CODES[0] for a, s in zip(position, START, strict=True)), 6, 2]


def test_blocks_and_words() -> None:
    assert [b.name for b in REGISTRY.blocks] == ["control", "text", "grid", "image.0", "image.1", "image.2", "image:vq"]
    words = [REGISTRY.describe(i) for i in (*START, REGISTRY.block("image:vq").start + 2, 20)]
    zero = [f"image level {q} code 0" for q in range(3)]
    assert words == [*zero, "image:vq code 2", "grid size 2"]
    assert REGISTRY.describe(IDS[4]) == "image level 0 code 0"
    again = VocabularyRegistry.from_json(REGISTRY.to_json())
    assert again == REGISTRY
    assert not REGISTRY.tokenizer("rvq").layout
    with pytest.raises(VocabularyError, match=r"two blocks are named 'image:a\.0'; give one"):
        VocabularyRegistry.create(
            [TokenizerSpec(n, "image", s, n) for n, s in (("x", (1,)), ("a", (1, 1)), ("a.0", (1,)))]
        )
    text = ByteLevelBPE.train(["a"], 256)
    export = VocabularyRegistry.create([spec_of("words", text), REGISTRY.tokenizer("rvq")])
    assert "<|image.2:1|>" in names_of_ids(export, text)


def test_a_golden_sequence() -> None:
    (span,) = (s for s in GRAMMAR.spans(IDS) if s.kind == "image")
    assert span.shape == (1, 2, 3)
    assert np.array_equal(GRAMMAR.segment_codes(IDS, span), CODES)
    assert GRAMMAR.segment_ids("rvq", CODES).tolist() == IDS[1:-1]
    rows = [(x["row"], x["column"], x["level"], x["code"]) for x in listing(GRAMMAR, IDS) if "code" in x]
    assert rows == [(0, 0, 0, 0), (0, 0, 1, 1), (0, 0, 2, 2), (0, 1, 0, 4), (0, 1, 1, 3), (0, 1, 2, 0)]
    assert GRAMMAR.loss_mask(IDS).nonzero()[0].tolist() == [*range(1, 10), 11]
    flat = [REGISTRY.bos, *GRAMMAR.segment_ids("vq", CODES[..., 0]), REGISTRY.eos]
    assert "level" not in listing(GRAMMAR, flat)[4]
    for ids, message in (
        (IDS[:5] + IDS[6:], "position 5: got image level 2 code 2, expected image level 1 code"),
        (IDS[:7] + IDS[6:], "position 7: got image level 2 code 2, expected image level 0 code"),
        (IDS[:-3], "position 9: got the end of the sequence, expected image level 2 code"),
        (IDS[:-2] + IDS[4:], "position 10: got image level 0 code 0, expected </image>"),
        (IDS[:2], "position 2: got the end of the sequence, expected grid size (height of image)"),
    ):
        with pytest.raises(SequenceError) as caught:
            GRAMMAR.spans(ids)
        assert str(caught.value).startswith(message)
    for codes, message in (
        (CODES[..., 0], r"shape \[1, 2\], expected \[h, w, 3\]"),
        (CODES[..., :2], r"shape \[1, 2, 2\], expected \[h, w, 3\]"),
        (CODES[:0], r"0x2 codes, expected sides of 1\.\.4"),
        (CODES + np.array([0, 1, 0]), r"position \(0, 1, 1\): code 4, expected 0\.\.3 in block 'image\.1'"),
    ):
        with pytest.raises(VocabularyError, match=message):
            GRAMMAR.segment_ids("rvq", codes)


def test_each_step_allows_the_codes_of_its_level_within_the_budget() -> None:
    exact = GRAMMAR.restrict(Restriction(next=("rvq",), stop=True, grid=(2, 3)))
    state = GRAMMAR.resume([[REGISTRY.bos]])
    assert GRAMMAR.needed(state, exact).item() == 3 + 2 * 3 * 3 + 1 + 1  # opening, sizes, codes, closing, <eos>
    counts = []
    while not state.done:
        assert GRAMMAR.needed(state, exact).item() == 23 - len(counts)
        mask = GRAMMAR.mask(state, None, exact)
        counts.append(int(mask.sum()))
        state = GRAMMAR.advance(state, mask.long().argmax(-1))
    assert counts == [1, 1, 1, *SIZES * 6, 1, 1]
    height = GRAMMAR.resume([[REGISTRY.bos, 5]])
    allowed = {b: int(GRAMMAR.mask(height, torch.tensor([b])).sum()) for b in (6, 7, 9, 10, 12, 13, 16, 99)}
    assert allowed == {6: 1, 7: 1, 9: 1, 10: 2, 12: 2, 13: 3, 16: 4, 99: 4}  # three ids more for each row


def test_a_lost_code_costs_its_row_and_shifts_no_other() -> None:
    codes = np.stack([np.arange(12).reshape(4, 3) % size for size in SIZES], -1)
    picture = GRAMMAR.segment_ids("rvq", codes)

    def mended(body: np.ndarray) -> tuple[np.ndarray, list[str]]:
        out = recover(GRAMMAR, np.concatenate([[REGISTRY.bos], body, [REGISTRY.eos]]), "repair")
        (span,) = (s for s in GRAMMAR.spans(out.ids) if s.kind == "image")
        return GRAMMAR.segment_codes(out.ids, span), [str(e) for e in out.edits]

    for at in range(3, len(picture) - 1):
        row = (at - 3) // 9
        rest = np.delete(codes, row, 0)
        stray, doubled = picture.copy(), np.insert(picture, at, picture[at])
        stray[at] = WORD
        for body in (np.delete(picture, at), stray):
            rows, edits = mended(body)
            assert np.array_equal(rows, rest)
            assert edits[0] == "position 2: replaced 1 id: height 4 by 3, the rows that are whole"
            assert any("not in a whole row of 9 codes of the 4x3 image" in e for e in edits)
        inside = (at - 3) % 3 == 1  # between the others of its position
        assert np.array_equal(mended(doubled)[0], rest if inside else codes)
    swapped = picture.copy()
    swapped[[4, 5]] = swapped[[5, 4]]
    assert np.array_equal(mended(swapped)[0], codes[1:])


def test_only_codes_of_the_due_level_compete() -> None:
    loss = SequenceLoss(GRAMMAR)
    assert loss.names == ["text", "image.0", "image.1", "image.2", "image:vq"]
    for t in range(2, len(IDS) - 1):
        may_be = GRAMMAR.mask(GRAMMAR.resume([IDS[:t]]))[0].nonzero()[:, 0].tolist()
        if GRAMMAR.loss_mask(IDS)[t] and t > 3:
            assert loss.columns[int(loss.group[IDS[t]])].tolist() == may_be
            assert len(may_be) == SIZES[(t - 4) % 3]


def test_a_transformer_draws_pictures_of_several_levels() -> None:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(REGISTRY.padded_size, 16, 32, 1, 2, 1, 8, max_position_embeddings=64)).eval()
    request = Request(np.array([REGISTRY.bos, REGISTRY.user, WORD, REGISTRY.assistant]), ("rvq",), 40, grid=(2, 3))
    (answer,) = generate(model, GRAMMAR, [request])
    assert [s.shape for s in GRAMMAR.spans(answer.ids) if s.kind == "image"] == [(2, 3, 3)]
    assert answer.tokens["image"] == 18


# --- with a tokenizer


@pytest.fixture(scope="module")
def parts() -> dict:
    torch.manual_seed(0)
    config = ImageVQVAEConfig(
        downsample=4, channels=8, encoder_blocks=1, decoder_blocks=1, codebook_size=16, codebook_dim=4, levels=3
    )
    return {"words": ByteLevelBPE.train(["a cow"], 256), "rvq": ImageVQVAE(config).eval()}


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_first_levels_of_a_tokenizer(parts: dict, levels: int) -> None:
    registry = VocabularyRegistry.create([spec_of(n, t, levels if n == "rvq" else None) for n, t in parts.items()])
    mm = MultimodalTokenizer(registry, parts)
    picture = Image(np.random.default_rng(0).integers(0, 256, (3, 12, 8), np.uint8))
    ids = mm.encode(Document((Text("a cow"), picture)))
    (span,) = (s for s in mm.grammar.spans(ids) if s.kind == "image")
    whole = parts["rvq"].encode(torch.from_numpy(picture.pixels)[None])
    assert whole.shape == (1, 3, 2, 3)
    expected = whole[0, ..., 0] if levels == 1 else whole[0, ..., :levels]
    assert np.array_equal(mm.grammar.segment_codes(ids, span), expected.numpy())
    assert span.shape == tuple(expected.shape)
    back = mm.decode(ids).segments[1]
    assert np.array_equal(back.pixels, parts["rvq"].decode(whole[..., :levels])[0].numpy())  # type: ignore[union-attr]
    if levels < 3:
        more = VocabularyRegistry.create([spec_of(n, t) for n, t in parts.items()])
        with pytest.raises(VocabularyError, match=r"expected \[h, w, 3\]"):
            Translation(registry, more)(ids, "a document")


def test_the_commands(parts: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    parts["rvq"].save(tmp_path / "rvq")
    made = tmp_path / "vocabulary"

    def run(*arguments: object) -> dict:
        code, out, err = commands.run(*arguments, "--json", capsys=capsys)
        assert code == 0, err
        return json.loads(out)

    report = run("vocab", "create", "text-4k", tmp_path / "rvq", "-o", made, "--levels", "rvq=2")
    assert [(b["name"], b["level"], b["size"]) for b in report["blocks"][3:]] == [
        ("image.0", 0, 16),
        ("image.1", 1, 16),
    ]
    pixels = np.random.default_rng(1).integers(0, 256, (3, 8, 12), np.uint8)
    media.write_image(tmp_path / "a.png", pixels)
    ids, out = tmp_path / "ids.json", tmp_path / "out"
    report = run("encode", tmp_path / "a.png", "--model", made, "--image-size", 0, "-o", ids)
    assert report["documents"][0]["segments"][0]["shape"] == [2, 3, 2]
    assert report["tokens"] == 2 + 4 + 12
    run("decode", ids, "--model", made, "--out", out)
    saved = mmtok.load(tmp_path / "rvq")
    codes = saved.encode(torch.from_numpy(pixels)[None])[..., :2]
    assert np.array_equal(media.read_image(out / "image_0.png"), saved.decode(codes)[0].numpy())


def test_bits_are_those_of_all_levels_over_the_pixels_of_the_picture(parts: dict) -> None:
    picture = Image(np.random.default_rng(2).integers(0, 256, (3, 13, 10), np.uint8))
    back, figures = roundtrip_image(parts["rvq"], picture)
    assert back.pixels.shape == (3, 13, 10)
    assert (figures["tokens"], figures["bits"]) == (4 * 3 * 3, 4 * 3 * 3 * 4.0)
    assert figures["bits_per_pixel"] == round(144 / 130, 4)


def test_a_tokenizer_with_alpha_gives_pictures_without() -> None:
    torch.manual_seed(0)
    config = ImageVQVAEConfig(channels=8, encoder_blocks=1, decoder_blocks=1, codebook_size=16, alpha=True)
    codec = ImageVQVAE(config).eval()
    mm = MultimodalTokenizer.create({"rgba": codec})
    picture = Image(np.full((3, 9, 5), 70, np.uint8))
    document = Document((picture,))
    (back,) = mm.decode(mm.encode(document), mm.sizes(document)).segments
    seen = codec.decode(codec.encode(torch.from_numpy(picture.pixels)[None]), (9, 5))
    assert seen.shape == (1, 4, 9, 5)
    assert np.array_equal(back.pixels, match_channels(seen, 3)[0].numpy())  # type: ignore[union-attr]
    assert roundtrip_image(codec, picture)[0] == back

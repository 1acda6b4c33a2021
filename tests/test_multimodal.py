"""Documents of several modalities through one vocabulary, and the link between a token and the codec that made it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmtok
from mmtok.audio import SpectralCodec, SpectralCodecConfig
from mmtok.documents import Audio, Document, Image, Text, Turn
from mmtok.errors import CheckpointError, MediaError, SequenceError, VocabularyError, VocabularyMismatchError
from mmtok.image import ImageVQVAE, ImageVQVAEConfig
from mmtok.multimodal import MultimodalTokenizer, spec_of
from mmtok.registry import VocabularyRegistry
from mmtok.text import ByteLevelBPE

RATE = 16_000


@pytest.fixture(scope="module")
def parts() -> dict:
    torch.manual_seed(0)
    shape = SpectralCodecConfig(dim=16, encoder_blocks=1, decoder_blocks=1, levels=4, codebook_size=32, codebook_dim=8)
    image = ImageVQVAE(ImageVQVAEConfig(channels=8, encoder_blocks=1, decoder_blocks=1, codebook_size=64)).eval()
    return {
        "words": ByteLevelBPE.train(["a cow and a calf", "une vache"], 300),
        "pictures": image,
        "sounds": SpectralCodec(shape).eval(),
    }


@pytest.fixture(scope="module")
def mm(parts: dict) -> MultimodalTokenizer:
    return MultimodalTokenizer.create(parts, audio_levels=3)


segment = st.one_of(
    st.builds(Text, st.text(st.characters(exclude_categories=["Cs"]), max_size=12)),
    st.builds(
        lambda h, w, seed: Image(np.random.default_rng(seed).integers(0, 256, (3, h, w), np.uint8)),
        *[st.integers(1, 32)] * 2,
        st.integers(0, 9),
    ),
    st.builds(
        lambda n, seed: Audio(np.random.default_rng(seed).uniform(-1, 1, (1, n)).astype(np.float32), RATE),
        st.integers(0, 2000),
        st.integers(0, 9),
    ),
    st.builds(Turn, st.sampled_from(["user", "assistant"])),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(segment, max_size=6))
def test_documents_come_back(mm: MultimodalTokenizer, segments: list) -> None:
    document = Document(tuple(segments)).normalized()
    ids, sizes = mm.encode(document), mm.sizes(document)
    back = mm.decode(ids, sizes)
    assert [type(x) for x in back.segments] == [type(x) for x in document.segments]
    for made, given_ in zip(back.segments, document.segments, strict=True):
        match given_:
            case Text() | Turn():
                assert made == given_
            case Image(pixels):
                picture = torch.from_numpy(pixels)[None]
                codec = mm.tokenizers["pictures"]
                assert np.array_equal(made.pixels, codec.decode(codec.encode(picture), pixels.shape[1:])[0].numpy())
            case Audio(samples):
                assert made.samples.shape[1] == -(-samples.shape[1] // 320) * 320
    padded = [x.pixels.shape[1:] for x in mm.decode(ids).segments if isinstance(x, Image)]
    assert padded == [tuple(-(-side // 8) * 8 for side in size) for size in sizes]
    # Codes -> ids -> codes is the identity, whatever the codecs make of the media.
    for span in mm.grammar.spans(ids):
        if span.kind != "control":
            codes = mm.grammar.segment_codes(ids, span)
            assert np.array_equal(mm.grammar.segment_ids(span.tokenizer, codes), ids[span.start : span.end])


def test_ids_are_the_tokenizers_codes_with_offsets(mm: MultimodalTokenizer, parts: dict) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 24), np.uint8)
    samples = np.random.default_rng(1).uniform(-1, 1, (1, 1000)).astype(np.float32)
    ids = mm.encode(Document((Text("a cow"), Image(pixels), Audio(samples, RATE))))
    text, image, audio = (s for s in mm.grammar.spans(ids) if s.kind != "control")
    assert np.array_equal(mm.grammar.segment_codes(ids, text), parts["words"].encode(["a cow"])[0])
    codes = parts["pictures"].encode(torch.from_numpy(pixels)[None])[0].numpy()
    assert np.array_equal(mm.grammar.segment_codes(ids, image), codes)
    first = mm.registry.block("image").start
    assert np.array_equal(ids[image.start + 3 : image.end - 1], codes.reshape(-1) + first)
    levels = parts["sounds"].encode(torch.from_numpy(samples)[None])[0, :3].numpy()
    assert np.array_equal(mm.grammar.segment_codes(ids, audio), levels)


@pytest.mark.parametrize(
    "literal", ["<image>", "</image>", "<audio>", "<bos>", "<eos>", "<user>", "<assistant>", "<pad>"]
)
def test_text_never_becomes_a_control_token(mm: MultimodalTokenizer, literal: str) -> None:
    ids = mm.encode(Document((Text(literal),)))
    control = mm.registry.block("control")
    assert ((ids[1:-1] < control.start) | (ids[1:-1] >= control.end)).all()
    assert mm.decode(ids).segments == (Text(literal),)


def test_sound_is_resampled_and_mixed(mm: MultimodalTokenizer) -> None:
    stereo = np.zeros((2, 48_000), np.float32)
    (made,) = mm.decode(mm.encode(Document((Audio(stereo, 48_000),)))).segments
    assert made.sample_rate == RATE
    assert made.samples.shape == (1, 16_000)


def test_sizes_are_those_of_the_images(mm: MultimodalTokenizer) -> None:
    shapes = [(20, 37), (8, 8), (1, 65)]
    document = Document(tuple(Image(np.full((3, *shape), 90, np.uint8)) for shape in shapes))
    ids = mm.encode(document)
    assert mm.sizes(document) == shapes
    assert mm.sizes(Document((Text("a"),))) == []
    assert [x.pixels.shape for x in mm.decode(ids, [None, (3, 5), None]).segments] == [
        (3, 24, 40),
        (3, 3, 5),
        (3, 8, 72),
    ]
    for sizes, message in (
        (shapes[:2], "got 2 image sizes for 3 images"),
        ([], "got 0 image sizes for 3 images"),
        ([(20, 37), (8, 9), None], r"image at 20: got a size of 8x9 pixels for 1x1 codes, expected 1\.\.8 by 1\.\.8"),
        ([None, None, (0, 65)], "image at 25: got a size of 0x65"),
    ):
        with pytest.raises(MediaError, match=message):
            mm.decode(ids, sizes)


def test_fitted_pictures(mm: MultimodalTokenizer) -> None:
    odd = Image(np.zeros((3, 20, 37), np.uint8))
    assert mm.fit(odd) is odd
    assert mm.fit(odd, 64).pixels.shape == (3, 64, 64)
    with pytest.raises(MediaError, match="expected a multiple of 8"):
        mm.fit(odd, 20)
    with pytest.raises(VocabularyError, match="64"):
        mm.encode(Document((Image(np.zeros((3, 8, 8 * 65), np.uint8)),)))


def test_decode_is_strict(mm: MultimodalTokenizer) -> None:
    ids = mm.encode(Document((Image(np.zeros((3, 16, 16), np.uint8)),)))
    with pytest.raises(SequenceError) as caught:
        mm.decode(np.delete(ids, 5))
    assert caught.value.position == len(ids) - 3


def test_save_and_load_by_name(mm: MultimodalTokenizer, parts: dict, tmp_path) -> None:
    for name, tokenizer in parts.items():
        tokenizer.save(tmp_path / name)
    loaded = {n: mmtok.load(tmp_path / n) for n in parts}
    saved = MultimodalTokenizer.create(loaded, audio_levels=3)
    home = tmp_path / "model"
    home.mkdir()
    (home / "vocab.json").write_text(saved.registry.to_json())
    again = MultimodalTokenizer.load(home)
    assert again.registry == saved.registry
    document = Document((Text("a cow"), Image(np.full((3, 16, 16), 200, np.uint8))))
    assert np.array_equal(again.encode(document), saved.encode(document))

    torch.manual_seed(1)
    ImageVQVAE(ImageVQVAEConfig(channels=8, encoder_blocks=1, decoder_blocks=1, codebook_size=64)).save(
        tmp_path / "pictures"
    )
    with pytest.raises(VocabularyMismatchError, match="pictures"):
        MultimodalTokenizer.load(home)
    (home / "vocab.json").unlink()
    with pytest.raises(CheckpointError):
        MultimodalTokenizer.load(home)


def test_a_missing_tokenizer_is_named(mm: MultimodalTokenizer, parts: dict) -> None:
    with pytest.raises(VocabularyMismatchError, match="sounds"):
        MultimodalTokenizer(mm.registry, {k: v for k, v in parts.items() if k != "sounds"})


CONTROLS = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<image>", "</image>", "<audio>", "</audio>"]
FRAGMENTS = [
    *CONTROLS,
    "<image:second>",
    "</audio:b.c>",
    "<fill:audio>",
    "<|image:5|>",
    "<|audio.0:7|>",
    "<|grid:3|>",
    "<|unused:9|>",
    "<|endoftext|>",
    "<|im_start|>",
    "[INST]",
    "<s>",
    "\u200b",
    "\ufeff",
    "\x00",
    "\U0001f600",
    "e\u0301",
    "\u2581",
    "\ud7ff",
    "\uffff",
    " ",
    "\n",
    "<",
    ">",
    "|",
    "imag",
    "e>",
]


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(st.characters(exclude_categories=["Cs"]))), max_size=8))
def test_adversarial_text_comes_back_as_text(bundled: MultimodalTokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    ids = bundled.encode(Document((Text(text),)))
    block = bundled.registry.block("text")
    assert ((ids[1:-1] >= block.start) & (ids[1:-1] < block.end)).all()
    assert bundled.decode(ids) == Document((Text(text),)).normalized()


@pytest.fixture(scope="module")
def bundled() -> MultimodalTokenizer:
    return MultimodalTokenizer.load("any-to-any")


def test_every_control_token_of_several_codecs_is_only_text_in_text(parts: dict) -> None:
    specs = [spec_of(n, t, layout="delayed:0,1,2,3" if n == "sounds" else "") for n, t in parts.items()]
    specs += [dataclasses.replace(s, name=f"{s.name}-2") for s in specs]
    many = MultimodalTokenizer(VocabularyRegistry.create(specs), parts | {f"{n}-2": t for n, t in parts.items()})
    names = [name for block in many.registry.blocks for name in block.names]
    assert {"<fill:audio>", "<fill:audio:sounds-2>", "<image:pictures-2>"} <= set(names)
    for name in names:
        for text in (name, f"a {name}b", name * 3):
            for tokenizer in ("words", "words-2"):
                ids = many.encode(Document((Text(text),)), use={"text": tokenizer})
                block = many.registry.blocks_of(tokenizer)[0]
                assert ((ids[1:-1] >= block.start) & (ids[1:-1] < block.end)).all()
                assert many.decode(ids).segments == (Text(text),)


def test_any_tokenizer_of_a_modality_may_be_used(parts: dict) -> None:
    torch.manual_seed(5)
    other = ImageVQVAE(ImageVQVAEConfig(channels=8, encoder_blocks=1, decoder_blocks=1, codebook_size=32)).eval()
    mm = MultimodalTokenizer.create({**parts, "sketches": other}, audio_levels=2)
    document = Document((Text("a cow"), Image(np.full((3, 16, 8), 90, np.uint8))))
    first, second = mm.encode(document), mm.encode(document, use={"image": "sketches"})
    assert [s.tokenizer for s in mm.grammar.spans(second) if s.tokenizer] == ["words", "sketches"]
    assert not np.array_equal(first, second)
    assert np.array_equal(mm.decode(second).segments[1].pixels, other.decode(other.encode(pixels(document)))[0].numpy())
    for use, message in (
        ({"image": "nobody"}, "known: "),
        ({"image": "words"}, "is for text, expected one for image"),
        ({"video": "sketches"}, "expected one for text, image, audio"),
    ):
        with pytest.raises(VocabularyError, match=message):
            mm.encode(document, use=use)


def pixels(document: Document) -> torch.Tensor:
    return torch.from_numpy(document.segments[1].pixels)[None]


class ManyRates:
    """A codec whose frames hold one code of level 0 and two of level 1, which are the samples in three steps."""

    kind, modality, fingerprint, codebook_sizes = "many-rates", "audio", "rates", (4, 3)
    properties: ClassVar[dict] = {"sample_rate": 1000, "hop": 2}

    def encode(self, x: torch.Tensor, levels: int | None = None) -> list[torch.Tensor]:
        level = (x[:, 0] * 1.49 + 1.5).long()
        return [level[:, ::2], level][:levels]

    def decode(self, codes: list[torch.Tensor]) -> torch.Tensor:
        assert codes[0].shape[1] * 2 == codes[1].shape[1]
        return (codes[1][:, None].float() - 1) / 2


@pytest.mark.parametrize("layout", ["multi-rate:0,1,1", "multi-rate:1,0,1", "codebook-major:1,2"])
def test_codecs_with_several_rates(parts: dict, layout: str) -> None:
    codec = ManyRates()
    registry = VocabularyRegistry.create([spec_of("words", parts["words"]), spec_of("rates", codec, layout=layout)])
    mm = MultimodalTokenizer(registry, {"words": parts["words"], "rates": codec})
    sound = Audio(np.array([[0.9, -0.9, 0.1, 0.9]], np.float32), 1000)
    ids = mm.encode(Document((Text("a"), sound)))
    assert len(ids) == 2 + 1 + 2 + 2 * 3
    (back,) = mm.decode(ids).segments[1:]
    assert np.array_equal(back.samples, [[0.5, -0.5, 0.0, 0.5]])


def test_damaged_ids_decode_to_what_is_left_of_them(mm: MultimodalTokenizer) -> None:
    document = Document((Text("a cow"), Image(np.zeros((3, 32, 32), np.uint8)), Text(" and a calf")))
    ids = mm.encode(document)
    picture = next(s for s in mm.grammar.spans(ids) if s.kind == "image")
    broken = np.delete(ids, picture.start + 9)
    with pytest.raises(SequenceError):
        mm.decode(broken)
    kept, repaired = mm.recover(broken, "repair")
    assert [type(s) for s in kept.segments] == [Text, Image, Text]
    assert kept.segments[1].pixels.shape == (3, 24, 32)
    assert [e.action for e in repaired.edits] == ["replaced", "removed"]
    left, dropped = mm.recover(broken, "drop")
    assert left.normalized().segments == (Text("a cow and a calf"),)
    assert [e.action for e in dropped.edits] == ["removed"]
    whole, untouched = mm.recover(ids, "repair")
    assert whole == mm.decode(ids)
    assert untouched.edits == ()


def test_sizes_go_with_the_images_that_are_recovered(mm: MultimodalTokenizer) -> None:
    document = Document(tuple(Image(np.full((3, 20, 29 + i), 60 * i, np.uint8)) for i in range(3)))
    ids, sizes = mm.encode(document), mm.sizes(document)
    whole, untouched = mm.recover(ids, "repair", sizes)
    assert whole == mm.decode(ids, sizes)
    assert untouched.edits == ()
    middle = [s for s in mm.grammar.spans(ids) if s.kind == "image"][1]
    broken = ids.copy()
    broken[middle.start + 6] = mm.registry.block("text").start  # in the first of three rows

    def shapes(policy: str, ids: np.ndarray, sizes: list | None) -> tuple[list, list[str]]:
        kept, recovery = mm.recover(ids, policy, sizes)  # type: ignore[arg-type]
        return [x.pixels.shape[1:] for x in kept.segments], [str(e) for e in recovery.edits if e.action == "padded"]

    assert shapes("drop", broken, sizes) == ([(20, 29), (20, 31)], [])
    what = "position 17: padded 12 ids: an image of 2x4 codes keeps its padding, as "
    grid = what + "it has another grid than its size, 20x30 pixels"
    assert shapes("repair", broken, sizes) == ([(20, 29), (16, 32), (20, 31)], [grid])
    assert shapes("repair", broken, [sizes[0], None, sizes[2]]) == ([(20, 29), (16, 32), (20, 31)], [])
    padded, account = shapes("repair", broken, sizes[:2])  # whose they are is not known
    assert padded == [(24, 32), (16, 32), (24, 32)]
    assert account[1] == what + "3 images have 2 sizes"
    assert len(account) == 3
    assert shapes("repair", broken, None) == (padded, [])
    lost = np.delete(ids, middle.start)
    padded, account = shapes("drop", lost, sizes)
    assert padded == [(24, 32)] * 2
    assert account[1].endswith("an image of 3x4 codes keeps its padding, as 2 images have 3 sizes")

"""Ids and models in another vocabulary: against sequences built anew from codes, and by the models' own scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grammars import Document, cached, documents, registries, to_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok import migration
from mmtok.datasets.records import Record, find_spans
from mmtok.datasets.shards import TokenDataset, write_dataset
from mmtok.errors import CheckpointError, DataError, VocabularyError
from mmtok.grammar import Grammar
from mmtok.migration import Translation, migrate_dataset, migrate_ids, migrate_transformer, prove_same, sample_sequences
from mmtok.registry import TokenizerSpec, VocabularyRegistry
from mmtok.sequences import read_ids, write_ids
from mmtok.transformer.model import Transformer, TransformerConfig

WORDS = TokenizerSpec("words", "text", (40,), "w", headroom=20)
PICS = TokenizerSpec("pics", "image", (16,), "p")
ART = TokenizerSpec("art", "image", (12,), "a")
SOUNDS = TokenizerSpec("sounds", "audio", (8, 8), "s")
OLD = VocabularyRegistry.create([WORDS, PICS, ART, SOUNDS], max_grid=4)
CODES: Document = [
    ("<user>", np.zeros(0, np.int64)),
    ("words", np.array([3, 39])),
    ("pics", np.arange(12).reshape(3, 4)),
    ("sounds", np.array([[0, 1, 2], [7, 6, 5]])),
    ("art", np.array([[11]])),
    ("sounds", np.zeros((2, 0), np.int64)),
]
GROWN = OLD.extend(
    [dataclasses.replace(WORDS, codebook_sizes=(50,), fingerprint="w2"), TokenizerSpec("v", "text", (9,), "v")]
)
SWAPPED = VocabularyRegistry.create([SOUNDS, ART, PICS, WORDS], max_grid=6)
DELAYED = VocabularyRegistry.create([PICS, WORDS, dataclasses.replace(SOUNDS, layout="delayed:0,1"), ART], max_grid=4)
FEWER = VocabularyRegistry.create([WORDS, ART, SOUNDS], max_grid=3)


def ids_of(registry: VocabularyRegistry, document: Document = CODES) -> np.ndarray:
    return to_ids(Grammar(registry), document)


# --- ids


@st.composite
def moves(draw: st.DrawFn, relay: bool = True) -> tuple[VocabularyRegistry, VocabularyRegistry]:
    """A registry, and another with the same tokenizers: in another order, laid out in another way, with more beside."""
    old = draw(registries(most=4))
    more = [TokenizerSpec("new", "image", (3,), "new"), TokenizerSpec("newer", "audio", (2, 2), "newer")]
    more = more[: draw(st.integers(0, 2))]
    if draw(st.booleans()):
        return old, old.extend(more)
    specs = []
    for spec in old.tokenizers:
        headroom = draw(st.integers(0, 2))
        if relay and spec.modality == "audio":
            rates = spec.codebook_layout.rates
            slots = [q for q, rate in enumerate(rates) for _ in range(rate)]
            names = [f"multi-rate:{','.join(map(str, draw(st.permutations(slots))))}"]
            if set(rates) == {1}:
                delays = draw(st.lists(st.integers(0, 2), min_size=len(rates), max_size=len(rates)))
                names += ["interleaved", "codebook-major", f"delayed:{','.join(map(str, delays))}"]
            else:
                names.append(f"codebook-major:{','.join(map(str, rates))}")
            spec = dataclasses.replace(spec, layout=draw(st.sampled_from(names)))
        specs.append(dataclasses.replace(spec, headroom=headroom))
    order = draw(st.permutations(specs + more))
    return old, VocabularyRegistry.create(order, max_grid=old.max_grid + draw(st.integers(0, 2)))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(moves(), st.data(), st.integers(0, 2))
def test_a_translation_is_the_sequence_built_anew(registries: tuple, data: st.DataObject, padding: int) -> None:
    (old, _), (new, _) = map(cached, registries)
    document = data.draw(documents(old.registry))
    ids, expected = (to_ids(grammar, document, padding) for grammar in (old, new))
    got = Translation(*registries)(ids, "it")
    assert got.tolist() == expected.tolist()
    if all(t.name in {s.name for s in registries[0].tokenizers} for t in registries[1].tokenizers):
        assert Translation(*registries[::-1])(got, "it").tolist() == ids.tolist()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(moves(relay=False), st.data(), st.integers(0, 2))
def test_the_table_alone_maps_valid_sequences_to_valid_ones(registries: tuple, data: st.DataObject, pad: int) -> None:
    (old, _), (new, _) = map(cached, registries)
    ids = to_ids(old, data.draw(documents(old.registry)), pad)
    moved = new.registry.remap(old.registry)[ids]
    for a, b in zip(old.spans(ids), new.spans(moved), strict=True):  # strict: an invalid sequence is an error
        assert a == b
        if a.tokenizer:
            one, other = old.segment_codes(ids, a), new.segment_codes(moved, b)
            assert all(map(np.array_equal, *((x if isinstance(x, tuple) else (x,)) for x in (one, other))))


@pytest.mark.parametrize("new", [GROWN, SWAPPED, DELAYED])
def test_defaults_growth_and_layouts(new: VocabularyRegistry) -> None:
    assert Translation(OLD, new)(ids_of(OLD), "it").tolist() == ids_of(new).tolist()


def test_an_id_without_counterpart_is_named() -> None:
    translate = Translation(OLD, FEWER)
    assert list(translate.dropped) == [
        "<image> to </image> (2 ids from 5)",
        f"grid size 4 (1 ids from {OLD.block('grid').end - 1})",
        f"image code 0 to image code 15 (16 ids from {OLD.block('image').start})",
    ]
    with pytest.raises(VocabularyError) as stop:
        translate(ids_of(OLD), "document 7")
    assert "document 7, position 4: <image> has no counterpart" in str(stop.value)
    with pytest.raises(VocabularyError) as stop:
        translate(ids_of(OLD, [("art", np.zeros((4, 1), np.int64))]), "document 7")
    assert "document 7, position 2: grid size 4 has no counterpart" in str(stop.value)
    with pytest.raises(VocabularyError, match="document 7, position 1: unused id"):
        translate(np.array([OLD.bos, OLD.block("text").end]), "document 7")


def test_codes_of_another_number_of_levels_do_not_pass() -> None:
    eight = dataclasses.replace(SOUNDS, codebook_sizes=(8, 8, 8))
    more = VocabularyRegistry.create([WORDS, PICS, ART, eight], max_grid=4)
    with pytest.raises(VocabularyError, match=r"it, sounds at 20: codes of sounds have shape \[2, 3\]"):
        Translation(OLD, more)(ids_of(OLD), "it")
    ids = ids_of(more, [*CODES[:3], ("sounds", np.array([[0], [7], [4]]))])
    with pytest.raises(VocabularyError, match=r"it, position 23: audio level 2 code 4 has no counterpart"):
        Translation(more, OLD)(ids, "it")


def test_a_broken_document_cannot_be_laid_out_anew() -> None:
    ids = ids_of(OLD)
    for new, fine in ((SWAPPED, True), (DELAYED, False)):
        cut = np.delete(ids, len(ids) - 3)  # the opening of the last sound
        if fine:
            Translation(OLD, new)(cut, "it")
        else:
            with pytest.raises(VocabularyError, match=r"it, position .* cannot be laid out anew"):
                Translation(OLD, new)(cut, "it")


def test_two_ids_do_not_become_one() -> None:
    twins = VocabularyRegistry.create([SOUNDS, dataclasses.replace(SOUNDS, name="again")])
    with pytest.raises(VocabularyError, match="would both become"):
        Translation(twins, VocabularyRegistry.create([SOUNDS]))
    assert Translation(twins, twins).relaid == {}


# --- files


@pytest.mark.parametrize("new", [GROWN, SWAPPED, DELAYED])
def test_datasets_and_ids_files(tmp_path: Path, new: VocabularyRegistry) -> None:
    write_dataset(tmp_path / "old", OLD, [ids_of(OLD), ids_of(OLD, CODES[:2])], shard_tokens=20)
    write_ids(tmp_path / "old.json", OLD, [("a", ids_of(OLD)), ("b", ids_of(OLD, CODES[:2]), [(5, 7), None])])
    expected = [ids_of(new).tolist(), ids_of(new, CODES[:2]).tolist()]
    reports = [
        migrate_dataset(tmp_path / "old", tmp_path / "new", new),
        migrate_ids(tmp_path / "old.json", tmp_path / "new.json", new),
    ]
    migrated = TokenDataset.open(tmp_path / "new", new)
    assert [ids.tolist() for ids in migrated] == expected
    registry, back = read_ids(tmp_path / "new.json")
    assert registry == new
    assert [(name, ids.tolist(), sizes) for name, ids, sizes in back] == [
        ("a", expected[0], None),
        ("b", expected[1], [(5, 7), None]),
    ]
    assert reports[0] == reports[1]
    assert reports[0] == migration.DataReport(
        2,
        len(ids_of(OLD)) + len(ids_of(OLD, CODES[:2])),
        sum(map(len, expected)),
        ("sounds",) if new is DELAYED else (),
        (),
    )
    assert (reports[0].tokens_after > reports[0].tokens_before) == (new is DELAYED)
    migrate_dataset(tmp_path / "new", tmp_path / "new", OLD) if new is not GROWN else None
    assert len(TokenDataset.open(tmp_path / "new")) == 2


def test_what_cannot_be_migrated_leaves_everything_as_it_was(tmp_path: Path) -> None:
    write_dataset(tmp_path / "old", OLD, [ids_of(OLD, CODES[:2]), ids_of(OLD)])
    write_ids(tmp_path / "old.json", OLD, [("a", ids_of(OLD))])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for target in ("old", "new"):
        with pytest.raises(VocabularyError, match=r"old: document 1, position 4: <image> has no counterpart"):
            migrate_dataset(tmp_path / "old", tmp_path / target, FEWER)
        with pytest.raises(VocabularyError, match=r"document 0 \(a\), position 4: <image>"):
            migrate_ids(tmp_path / "old.json", tmp_path / f"{target}.json", FEWER)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cow.png").touch()
    with pytest.raises(DataError, match="no token dataset"):
        migrate_dataset(tmp_path / "old", tmp_path / "photos", SWAPPED)
    (tmp_path / "photos" / "cow.png").unlink()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    (file,) = (tmp_path / "old").glob("shard-*")
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"is damaged|sha256"):
        migrate_dataset(tmp_path / "old", tmp_path / "new", SWAPPED)
    assert not (tmp_path / "new").exists()


def test_shards_stay_as_large_as_they_were(tmp_path: Path) -> None:
    one = ids_of(OLD)
    for limit, shards in ((2 * len(one) + 3, 3), (10**6, 1)):
        write_dataset(tmp_path / "old", OLD, [one] * 5, shard_tokens=limit)
        sizes = [x.tokens for x in TokenDataset.open(tmp_path / "old").shards]
        assert len(sizes) == shards
        migrate_dataset(tmp_path / "old", tmp_path / "new", SWAPPED)
        assert [x.tokens for x in TokenDataset.open(tmp_path / "new").shards] == sizes
        migrate_dataset(tmp_path / "old", tmp_path / "new", DELAYED)
        assert shards <= len(TokenDataset.open(tmp_path / "new").shards) <= 2 * shards - 1


def test_damage_while_writing_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "old", OLD, [ids_of(OLD)])

    def damaged(path: Path, registry: VocabularyRegistry, documents: Iterable[Record], limit: int, *rest: Any) -> None:
        changed = (x._replace(ids=[*x.ids[:-2], registry.user, registry.eos]) for x in documents)
        write_dataset(path, registry, changed, limit, *rest)

    monkeypatch.setattr(migration, "write_dataset", damaged)
    with pytest.raises(VocabularyError, match="not what was migrated"):
        migrate_dataset(tmp_path / "old", tmp_path / "new", SWAPPED)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


# --- transformers


def tiny(tied: bool, registry: VocabularyRegistry = OLD) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(
        TransformerConfig(
            vocab_size=registry.padded_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
        )
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model.registry = registry
    return model.eval()


@pytest.mark.parametrize("new", [GROWN, SWAPPED, FEWER], ids=["grown", "swapped", "fewer"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_transformer_keeps_its_scores(tied: bool, new: VocabularyRegistry, tmp_path: Path) -> None:
    old = tiny(tied)
    before = {k: v.clone() for k, v in old.state_dict().items()}
    model, proof = migrate_transformer(old, new)
    assert proof.largest_difference <= 1e-5 < 0.1 < proof.largest_logit
    assert proof.tokens > 200
    assert proof.dropped == Translation(OLD, new).dropped
    assert bool(proof.dropped) == (new is FEWER)
    assert all(torch.equal(before[k], v) for k, v in old.state_dict().items())
    assert model.config == dataclasses.replace(old.config, vocab_size=new.padded_size)
    assert model.registry == new

    # By hand, on documents built from codes: of each tokenizer the same codes have the same scores.
    names = ("words", "art", "sounds")
    document = [part for part in CODES if part[0] != "pics"]
    a, b = (torch.from_numpy(ids_of(r, document))[None] for r in (OLD, new))
    with torch.no_grad():
        one, other = old(a), model(b)
    for name in names:
        for x, y in zip(OLD.blocks_of(name), new.blocks_of(name), strict=True):
            assert torch.allclose(one[..., x.start : x.end], other[..., y.start : y.start + x.size], atol=1e-5)

    model.save(tmp_path / "m", new.to_json())
    back, _ = migrate_transformer(tmp_path / "m", OLD)  # from a directory, and back
    table = Translation(new, OLD).table
    kept = table[table >= 0]
    assert len(kept) > 40
    for x, y in zip(old.state_dict().values(), back.state_dict().values(), strict=True):
        assert torch.equal(x[kept], y[kept]) if len(x) == OLD.padded_size else torch.equal(x, y)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_means_and_get_no_more_than_an_average_share(tied: bool) -> None:
    new = GROWN.extend([TokenizerSpec("more", "image", (5,), "m", headroom=3)])
    old = tiny(tied)
    model, _ = migrate_transformer(old, new)
    rows, fresh = old.model.embed_tokens.weight, model.model.embed_tokens.weight
    text, grown, more = OLD.block("text"), new.block("text"), new.block("image:more")
    mean = rows[text.start : text.end].mean(0)
    assert torch.allclose(fresh[grown.start + text.size : grown.end], mean.expand(10, -1), atol=1e-6)
    pictures = torch.cat([rows[b.start : b.end] for b in OLD.blocks if b.modality == "image"]).mean(0)
    assert torch.allclose(fresh[more.start : more.end], pictures.expand(5, -1), atol=1e-6)
    control = rows[OLD.block("control").start : OLD.block("control").end].mean(0)
    assert torch.allclose(fresh[new.control("<image:more>")], control, atol=1e-6)
    unused = torch.cat([rows[text.end : text.start + text.capacity], rows[OLD.size :]])
    assert torch.allclose(fresh[new.size :], unused.mean(0).expand(new.padded_size - new.size, -1), atol=1e-6)
    assert torch.allclose(fresh[grown.end], unused.mean(0), atol=1e-6)  # head-room
    with torch.no_grad():
        scores = model(sample_sequences(Translation(new, new), 2, 50, 1)).exp()
    old_pictures = torch.cat([scores[..., b.start : b.end] for b in OLD.blocks if b.modality == "image"], -1)
    assert (scores[..., more.start : more.end] <= old_pictures.mean(-1, keepdim=True) * 1.0001).all()


def test_a_new_modality_begins_as_the_mean_of_all() -> None:
    alone = VocabularyRegistry.create([WORDS], max_grid=4)
    model, _ = migrate_transformer(tiny(True, alone), VocabularyRegistry.create([PICS, WORDS], max_grid=4))
    assert model.registry is not None
    block, rows = model.registry.block("image"), tiny(True, alone).model.embed_tokens.weight
    everything = torch.cat([rows[b.start : b.end] for b in alone.blocks]).mean(0)
    assert torch.allclose(model.model.embed_tokens.weight[block.start : block.end], everything, atol=1e-6)


def test_what_a_transformer_refuses() -> None:
    model = tiny(True)
    with pytest.raises(VocabularyError, match=r"'sounds' has 2 codebooks interleaved, .* delayed:0,1: the transformer"):
        migrate_transformer(model, DELAYED)
    model.registry = None
    with pytest.raises(VocabularyError, match="has no registry"):
        migrate_transformer(model, SWAPPED)
    with pytest.raises(CheckpointError, match="expected a 'transformer'"):
        migrate_transformer("image-64-f8", SWAPPED)


@pytest.mark.parametrize("damage", ["row", "rows swapped", "nan", "inside"])
def test_the_proof_can_fail(damage: str) -> None:
    old = tiny(True)
    model, _ = migrate_transformer(old, SWAPPED)
    block = SWAPPED.block("image:pics")
    with torch.no_grad():
        rows = model.model.embed_tokens.weight
        if damage == "row":
            rows[block.start, 0] += 1e-3
        elif damage == "rows swapped":
            rows[block.start : block.start + 2] = rows[block.start : block.start + 2].flip(0)
        elif damage == "nan":
            rows[block.start, 0] = torch.nan
        else:
            model.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-2
    with pytest.raises(CheckpointError, match="gives other scores"):
        prove_same(old, model, Translation(OLD, SWAPPED))


def test_samples_are_valid_varied_and_seeded() -> None:
    translation = Translation(OLD, FEWER)
    a, b, c = (sample_sequences(translation, 16, 60, seed) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    grammar, seen = Grammar(OLD), set()
    for row in a:
        seen |= {span.tokenizer or span.name for span in grammar.spans(row)}
        Translation(OLD, FEWER)(row.numpy(), "it")
    assert seen >= {"words", "art", "sounds", "<user>", "<assistant>"}
    assert "pics" not in seen


def test_spans_and_what_is_known_move_along(tmp_path: Path) -> None:
    grammar = Grammar(OLD)
    ids = ids_of(OLD)
    spans = find_spans(grammar, ids)
    spans[:, 3:] = np.arange(3 * len(spans)).reshape(-1, 3) + 7
    record = Record(ids, spans, {"id": "cow"}, b"k" * 16)
    write_dataset(tmp_path / "old", OLD, [record], settings={"image_size": 8}, quarantine=[{"id": "bad"}])
    for registry in (SWAPPED, DELAYED):
        migrate_dataset(tmp_path / "old", tmp_path / "new", registry)
        new = TokenDataset.open(tmp_path / "new")
        assert (new.settings, list(new.quarantined())) == ({"image_size": 8}, [{"id": "bad"}])
        assert new.meta(0) == {"id": "cow"}
        assert new.shards[0].key(0) == b"k" * 16
        assert np.array_equal(new.spans(0)[:, 3:], spans[:, 3:])
        assert np.array_equal(new.spans(0)[:, :3], find_spans(Grammar(registry), new[0])[:, :3])
        names = [[r.tokenizers[i].name for i in table[:, 2]] for r, table in ((OLD, spans), (registry, new.spans(0)))]
        assert names[0] == names[1]

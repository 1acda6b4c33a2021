"""Rows of token datasets: best fit against its plain twin, both packings, their plan on disk, and what is refused."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.datasets.loader import gathering, packing
from mmtok.datasets.loader.gathering import Gatherer
from mmtok.datasets.loader.packing import Packs, best_fit, places
from mmtok.datasets.shards import TokenDataset, write_dataset
from mmtok.errors import ConfigError, DataError
from mmtok.registry import TokenizerSpec, VocabularyRegistry
from mmtok.transformer.model import Transformer, TransformerConfig
from mmtok.transformer.packing import attention_mask

REGISTRY = VocabularyRegistry.create([TokenizerSpec("words", "text", (500,), "t")], max_grid=4)


def documents_of(sizes: list[int], seed: int = 0) -> list[np.ndarray]:
    block = REGISTRY.blocks_of("words")[0]
    rng = np.random.default_rng(seed)
    return [rng.integers(block.start, block.end, n) for n in sizes]


def dataset_of(path: Path, sizes: list[int], shard_tokens: int = 2**26) -> TokenDataset:
    write_dataset(path, REGISTRY, documents_of(sizes), shard_tokens)
    return TokenDataset.open(path)


def plain_best_fit(sizes: list[int], length: int) -> list[int]:
    """Rooms that are left, one item at a time."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else length) - size)
    return sorted(rooms)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_best_fit_is_the_plain_one(data):
    length = data.draw(st.integers(1, 40))
    sizes = data.draw(st.lists(st.integers(1, length), max_size=60))
    rows = best_fit(np.array(sizes, np.int64), length)
    filled = np.bincount(rows, sizes) if sizes else np.zeros(0)
    assert sorted(length - filled) == plain_best_fit(sizes, length)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    length=st.integers(1, 20),
    how=st.sampled_from(["whole", "stream"]),
    shard_tokens=st.sampled_from([20, 2**26]),
    window=st.sampled_from([3, 7, 65_536]),
    together=st.sampled_from([1, 50, 65_536]),
)
def test_rows_hold_every_document(tmp_path_factory, sizes, length, how, shard_tokens, window, together):
    path = tmp_path_factory.mktemp("d") / "d"
    docs = documents_of(sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW", window)
        patch.setattr(gathering, "_TOGETHER", together)
        packs = Packs(dataset_of(path, sizes, shard_tokens), length, how)
        n = len(packs)
        batch = next(Gatherer([packs])(np.zeros(n, np.int64), np.arange(n), n))
    ids, document, positions, source, bounds = (
        batch[k].numpy() for k in ("ids", "document", "positions", "source", "bounds")
    )
    assert ids.shape == document.shape == positions.shape == (n, length)
    assert {k: batch[k].dtype for k in batch} == {
        "ids": torch.int64, "document": torch.int64, "positions": torch.int64,
        "source": torch.int64, "bounds": torch.int32,
    }  # fmt: skip
    assert (bounds[0], bounds[-1]) == (0, ids.size)
    found = [np.full(k, -1) for k in sizes]
    expected_document, expected_positions = np.full((n, length), -1), np.zeros((n, length), np.int64)
    for begin, end, (dataset, number, offset) in zip(bounds[:-1], bounds[1:], source, strict=True):
        row, at = divmod(int(begin), length)
        assert end - begin <= length - at
        piece = ids.reshape(-1)[begin:end]
        if number < 0:
            assert (piece == REGISTRY.pad).all()
            assert end % length == 0
            continue
        assert dataset == 0
        assert np.array_equal(piece, docs[number][offset : offset + len(piece)])
        assert (found[number][offset : offset + len(piece)] == -1).all()
        found[number][offset : offset + len(piece)] = row
        expected_document[row, at : at + len(piece)] = expected_document[row].max() + 1
        expected_positions[row, at : at + len(piece)] = np.arange(len(piece))
    assert all((rows >= 0).all() for rows in found)
    assert np.array_equal(document, expected_document)
    assert np.array_equal(positions, expected_positions)
    assert packs.padding == pytest.approx((document < 0).mean())
    if how == "whole":
        for rows in found:  # not cut, but for the pieces of a full row
            assert len(np.unique(rows)) == -(-len(rows) // length)
    else:
        assert n == -(-sum(sizes) // length)
        assert np.array_equal(ids.reshape(-1)[: sum(sizes)], np.concatenate(docs))
    for i in (0, n - 1):
        assert all(np.array_equal(packs[i][k], batch[k][i]) for k in ("ids", "document", "positions"))


@pytest.mark.parametrize("how", ["whole", "stream"])
def test_the_plan_depends_on_the_documents_alone(tmp_path, how):
    sizes = np.random.default_rng(0).integers(1, 90, 500).tolist()
    a, b = (Packs(dataset_of(tmp_path / str(n), sizes, n), 64, how) for n in (2000, 2**26))
    assert len(a.dataset.shards) > 10
    assert len(b.dataset.shards) == 1
    assert np.array_equal(a.pieces, b.pieces)
    assert np.array_equal(a.first, b.first)


def test_whole_documents_leave_little_padding(tmp_path):
    sizes = np.random.default_rng(0).lognormal(5, 1, 4000).astype(int).clip(1).tolist()
    dataset = dataset_of(tmp_path / "d", sizes)
    whole, stream = Packs(dataset, 512), Packs(dataset, 512, "stream")
    assert whole.padding < 0.001
    cut = [np.count_nonzero(np.bincount(p.pieces[p.pieces[:, 0] >= 0, 0]) > 1) for p in (whole, stream)]
    assert cut[0] == np.count_nonzero(np.array(sizes) > 512)
    assert cut[1] > 3 * cut[0]


def test_a_model_reads_each_document_alone(tmp_path):
    sizes = [7, 3, 5, 9, 2, 12, 20]
    packs = Packs(dataset_of(tmp_path / "d", sizes), 12)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 12}
    model = Transformer(TransformerConfig(vocab_size=REGISTRY.padded_size, **shape, **heads))
    batch = torch.utils.data.default_collate([packs[i] for i in range(len(packs))])
    whole = next(Gatherer([packs])(np.zeros(len(packs), np.int64), np.arange(len(packs)), len(packs)))
    with torch.no_grad():
        got = model(batch["ids"], batch["positions"], attention_mask(batch["document"])).flatten(0, 1)
        for begin, end, number in zip(whole["bounds"], whole["bounds"][1:], whole["source"][:, 1], strict=False):
            if number >= 0:
                alone = model(whole["ids"].reshape(1, -1)[:, begin:end])[0]
                assert (got[begin:end] - alone).abs().max() < 1e-4


def test_places_of_a_batch():
    bounds, source = np.array([0, 2, 5, 6, 12]), np.array([[0, 4, 0], [0, 7, 0], [0, -1, 0], [1, 0, 6]])
    document, positions = places(bounds, source, 6)
    assert document.tolist() == [[0, 0, 1, 1, 1, -1], [0] * 6]
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]


class Lengths:
    """A shard of which only the lengths are read."""

    def __init__(self, sizes: np.ndarray) -> None:
        self.ends, self.documents, self.tokens = np.cumsum(sizes), len(sizes), int(sizes.sum())


@pytest.mark.parametrize("how", ["whole", "stream"])
def test_memory_of_the_plan_does_not_grow(how, monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 8192)
    peaks = []
    for count in (20_000, 100_000):
        sizes = np.random.default_rng(0).lognormal(4, 1, count).astype(np.int64).clip(1)
        shards = [Lengths(x) for x in np.array_split(sizes, 7)]
        tracemalloc.start()
        pieces, first = packing._spooled(getattr(packing, f"_{how}")(shards, 256))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert pieces[pieces[:, 0] >= 0, 3].sum() == sizes.sum()
        assert (np.add.reduceat(pieces[:, 3], first[:-1]) == 256).all()
    assert max(peaks) < 5e6
    assert peaks[1] < 1.1 * peaks[0]


def test_another_process_makes_the_same_plan_or_refuses(tmp_path):
    packs = Packs(dataset_of(tmp_path / "d", [5, 9, 30, 2]), 8)
    data = pickle.dumps(packs)
    again = pickle.loads(data)
    assert np.array_equal(again.pieces, packs.pieces)
    assert (again.length, again.packing) == (8, "whole")
    dataset_of(tmp_path / "d", [5, 9])
    with pytest.raises(DataError, match="was built anew"):
        pickle.loads(data)


def test_what_cannot_be_packed_is_refused(tmp_path, monkeypatch):
    dataset = dataset_of(tmp_path / "d", [5])
    for length in (0, -3):
        with pytest.raises(ConfigError, match=f"length is {length}, expected at least 1"):
            Packs(dataset, length)
    with pytest.raises(ConfigError, match="packing is 'first', expected one of whole, stream"):
        Packs(dataset, 8, "first")
    with pytest.raises(DataError, match="has no document, expected one at least"):
        Packs(dataset_of(tmp_path / "empty", []), 8)
    with pytest.raises(IndexError, match="row 1, expected one of 1"):
        Packs(dataset, 8)[1]

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\); make room"):
        Packs(dataset, 8)

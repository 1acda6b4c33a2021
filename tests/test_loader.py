"""The order of rows, and batches of them: shared by ranks and workers, mixed, resumed, and refused when damaged."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.datasets.loader import Batches, gathering
from mmtok.datasets.loader.order import BLOCK, Order, permute, slots
from mmtok.datasets.loader.packing import Packs
from mmtok.datasets.shards import TokenDataset, write_dataset
from mmtok.errors import ConfigError, DataError, VocabularyMismatchError
from mmtok.registry import TokenizerSpec, VocabularyRegistry

REGISTRY = VocabularyRegistry.create([TokenizerSpec("words", "text", (500,), "t")], max_grid=4)


def write(path: Path, count: int, seed: int = 0, longest: int = 60, shard_tokens: int = 2**26) -> TokenDataset:
    block = REGISTRY.blocks_of("words")[0]
    rng = np.random.default_rng(seed)
    documents = (rng.integers(block.start, block.end, rng.integers(1, longest)) for _ in range(count))
    write_dataset(path, REGISTRY, documents, shard_tokens)
    return TokenDataset.open(path)


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    return Packs(write(tmp_path_factory.mktemp("a") / "d", 150, shard_tokens=1000), 32)


@pytest.fixture(scope="module")
def others(tmp_path_factory, packs):
    path = tmp_path_factory.mktemp("b")
    return [packs, *(Packs(write(path / str(n), n, n), 32, how) for n, how in ((40, "stream"), (7, "whole")))]


def take(batches, count):
    return [{k: v.numpy() for k, v in x.items()} for x in itertools.islice(batches, count)]


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for k in x:
            assert x[k].dtype == y[k].dtype
            assert np.array_equal(x[k], y[k]), k


# --- the order


def test_every_shuffle_is_a_bijection():
    for n in range(1, 301):
        assert sorted(permute(np.arange(n), n, 3, "s").tolist()) == list(range(n))
    for n in (4095, 4097, 70_001):
        assert np.array_equal(np.sort(permute(np.arange(n), n)), np.arange(n))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(size=st.integers(1, 2**62), seed=st.text(max_size=5), epoch=st.integers(0, 2**40), data=st.data())
def test_a_large_shuffle_sends_different_indices_to_different_ones(size, seed, epoch, data):
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50, unique=True)), np.int64)
    got = permute(index, size, epoch, seed)
    assert got.dtype == np.int64
    assert ((got >= 0) & (got < size)).all()
    assert len(np.unique(got)) == len(index)
    apart = [permute(index[i : i + 1], size, epoch, seed)[0] for i in range(len(index))]
    assert got.tolist() == apart


def test_each_epoch_has_its_own_shuffle_also_within_one_call():
    epochs = np.repeat([0, 5, 6], 200)
    together = permute(np.tile(np.arange(200), 3), 200, epochs, "s").reshape(3, 200)
    assert [permute(np.arange(200), 200, e, "s").tolist() for e in (0, 5, 6)] == together.tolist()
    for a, b in itertools.combinations([*together, permute(np.arange(200), 200, 0, "other"), np.arange(200)], 2):
        assert (a == b).sum() < 10


@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_shuffles_of_a_few_are_equally_frequent(n):
    keys = 240 * math.factorial(n)
    index, epochs = np.tile(np.arange(n), keys), np.repeat(np.arange(keys), n)
    count = Counter(map(tuple, permute(index, n, epochs, "x").reshape(keys, n).tolist()))
    assert len(count) == math.factorial(n)
    chi2 = sum((x - 240) ** 2 / 240 for x in count.values())
    assert chi2 < len(count) - 1 + 4 * math.sqrt(2 * len(count)) + 4


def test_shuffles_look_random():
    n, keys = 257, 2000
    p = permute(np.tile(np.arange(n), keys), n, np.repeat(np.arange(keys), n), "y").reshape(keys, n)
    counts = np.stack([np.bincount(p[:, i], minlength=n) for i in range(n)])
    chi2, freedom = ((counts - keys / n) ** 2 / (keys / n)).sum(), (n - 1) ** 2
    assert abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom)
    assert abs((p == np.arange(n)).sum(1).mean() - 1) < 0.1  # fixed points
    assert abs((np.diff(p) == 1).sum(1).mean() - 1) < 0.1  # neighbours that stay together
    assert abs((np.diff(p) > 0).mean() - 0.5) < 0.003
    big = permute(np.arange(10**5), 10**5)
    for lag in (1, 2, 512, 4096):
        assert abs(np.corrcoef(big[:-lag], big[lag:])[0, 1]) < 0.013


def test_an_epoch_holds_every_row_once():
    order = Order([90], seed=4)
    rows = order(np.arange(450))[1].reshape(5, 90)
    assert (np.sort(rows) == np.arange(90)).all()
    assert len({tuple(x) for x in rows.tolist()}) == 5
    assert order(np.array([200, 7]))[1].tolist() == [rows.ravel()[200], rows.ravel()[7]]
    assert Order([90], shuffle=False)(np.arange(85, 95))[1].tolist() == [*range(85, 90), *range(5)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-2, 1e3)), min_size=1, max_size=9).filter(any))
def test_slots_are_the_shares(weights):
    got = slots(weights, 2**20)
    assert got.sum() == 2**20
    assert (np.abs(got - np.array(weights) / math.fsum(weights) * 2**20) < 1 + 1e-6).all()


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_mixture_has_its_shares_and_keeps_the_order_of_each(shuffle):
    sizes, weights = [1000, 300, 7], [5, 2, 1]
    order = Order(sizes, weights, seed=1, shuffle=shuffle)
    index = np.arange(8 * BLOCK)
    which, rows = order(index)
    for block in which.reshape(8, BLOCK):
        assert np.bincount(block).tolist() == [2560, 1024, 512]
    assert abs(np.bincount(which[:400], minlength=3) / 400 - np.array(weights) / 8).max() < 0.08  # well mixed
    assert which[:BLOCK].tolist() != which[BLOCK : 2 * BLOCK].tolist()
    for i, size in enumerate(sizes):
        mine = rows[which == i]
        for epoch in mine[: len(mine) // size * size].reshape(-1, size):
            assert np.array_equal(np.sort(epoch), np.arange(size))
        if not shuffle:
            assert np.array_equal(mine, np.arange(len(mine)) % size)
    some = np.random.default_rng(0).permutation(index)[:500]
    again = Order(sizes, weights, seed=1, shuffle=shuffle)(some)
    assert np.array_equal(again[0], which[some])
    assert np.array_equal(again[1], rows[some])


def test_datasets_of_one_size_are_not_in_step():
    which, rows = Order([500, 500], [1, 1])(np.arange(BLOCK))
    a, b = rows[which == 0][:500], rows[which == 1][:500]
    assert (a == b).sum() < 10


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, -1], "weight 1 is -1, expected a finite number, 0 or more"),
        ([math.nan, 1], "weight 0 is nan"),
        ([1, math.inf], "weight 1 is inf"),
        ([0, 0], "all of the 2 weights are 0"),
        ([1], "got 1 weights for 2 datasets"),
        ([1, 1e-6], "would never be drawn"),
    ],
)
def test_impossible_weights_are_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        Order([10, 20], weights)


# --- batches


def test_batches_follow_the_order_and_name_their_documents(others):
    batches = take(Batches(others, 6, seed=3, weights=[1, 1, 1]), 40)
    which, rows = Order([len(p) for p in others], [1, 1, 1], 3)(np.arange(240))
    for k, batch in enumerate(batches):
        assert batch["next"] == 6 * (k + 1)
        for i in range(6):
            row = others[which[6 * k + i]][int(rows[6 * k + i])]
            for name in ("ids", "document", "positions"):
                assert np.array_equal(batch[name][i], row[name])
        flat = batch["ids"].ravel()
        for begin, end, source in zip(batch["bounds"], batch["bounds"][1:], batch["source"], strict=False):
            if source[1] >= 0:
                document = others[source[0]].dataset[source[1]]
                assert np.array_equal(flat[begin:end], document[source[2] :][: end - begin])


def test_without_shuffle_rows_come_one_after_another_and_epochs_have_no_seam(packs):
    n = len(packs)
    batches = take(Batches(packs, 8, shuffle=False), n // 4 + 1)
    rows = np.concatenate([b["ids"] for b in batches])
    assert np.array_equal(rows, [packs[i % n]["ids"].numpy() for i in range(len(rows))])
    assert len(rows) > 2 * n


@pytest.mark.parametrize("mixed", [False, True])
def test_ranks_share_each_batch(packs, others, mixed):
    def batches(**changes):
        return Batches(others if mixed else packs, 8, seed=2, **changes)

    whole = take(batches(), 30)
    for world_size in (2, 4):
        ranks = [take(batches(rank=r, world_size=world_size), 30) for r in range(world_size)]
        for k, one in enumerate(whole):
            for name in ("ids", "document", "positions"):
                assert np.array_equal(np.concatenate([r[k][name] for r in ranks]), one[name])
            assert np.array_equal(np.concatenate([r[k]["source"] for r in ranks]), one["source"])
            assert {int(r[k]["next"]) for r in ranks} == {int(one["next"])}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_change_nothing(packs, workers):
    expected = take(Batches(packs, 4, seed=1, dense=False), 25)
    assert "document" not in expected[0]
    same(take(Batches(packs, 4, seed=1, dense=False).load(num_workers=workers, prefetch_factor=3), 25), expected)
    loader = torch.utils.data.DataLoader(Batches(packs, 4, seed=1, dense=False), batch_size=None, num_workers=workers)
    same(take(loader, 25), expected)


def test_batches_in_a_process_that_shares_no_memory(others):
    batches = Batches(others, 4, seed=1, weights=[2, 1, 1])
    take(batches, 7)
    copy = pickle.loads(pickle.dumps(batches))
    same(take(copy, 20), take(batches, 20))


@pytest.mark.parametrize("rows", [4, 60, 188])
def test_a_state_resumes_exactly_also_on_other_machines(packs, others, rows):
    for source in (packs, others):
        first = Batches(source, 4, seed=1)
        everything = take(first, 80)
        assert first.row == 320
        before = Batches(source, 4, seed=1)
        used = take(before.load(num_workers=2 if rows == 60 else 0), rows // 4)
        state = json.loads(json.dumps(before.state_dict()))
        same(used, everything[: rows // 4])
        for workers, world_size, size in ((0, 1, 4), (2, 2, 4), (0, 2, 8)):
            ranks = [Batches(source, size, seed=1, rank=r, world_size=world_size) for r in range(world_size)]
            got = []
            for rank in ranks:
                rank.load_state_dict(state)
                got.append(take(rank.load(num_workers=workers), 40 // size))
            ids = np.concatenate([g[k]["ids"] for k in range(40 // size) for g in got])
            assert np.array_equal(ids, np.concatenate([b["ids"] for b in everything[rows // 4 :][:10]]))


def test_the_state_is_of_what_was_given_not_of_what_was_read_ahead(packs):
    batches = Batches(packs, 4)
    loader = batches.load(num_workers=2, prefetch_factor=8)
    for k in range(1, 6):
        batch = next(loader)
        assert batches.state_dict()["row"] == batch["next"] == 4 * k
        time.sleep(0.02)


CONSUMER = """
import hashlib, json, sys, time
from pathlib import Path
from mmtok.datasets.loader import Batches
from mmtok.datasets.loader.packing import Packs
from mmtok.datasets.shards import TokenDataset
folder = Path(sys.argv[1])
batches = Batches(Packs(TokenDataset.open(folder / "d"), 32), 4, seed=9)
for batch in batches.load(num_workers=2):
    time.sleep(0.005)  # a step
    digest = hashlib.sha256(batch["ids"].numpy().tobytes() + batch["bounds"].numpy().tobytes()).hexdigest()
    (folder / "state.tmp").write_text(json.dumps(batches.state_dict()))
    (folder / "state.tmp").replace(folder / "state")
    print(int(batch["next"]), digest, flush=True)
"""


def test_a_killed_process_resumes_exactly(tmp_path):
    write(tmp_path / "d", 400)
    packs = Packs(TokenDataset.open(tmp_path / "d"), 32)
    expected = take(Batches(packs, 4, seed=9), 300)
    command = [sys.executable, "-c", CONSUMER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        lines = list(itertools.islice(process.stdout, 40))
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    for batch, line in zip(expected, lines, strict=False):
        digest = hashlib.sha256(batch["ids"].tobytes() + batch["bounds"].tobytes()).hexdigest()
        assert line.split() == [str(batch["next"]), digest]
    state = json.loads((tmp_path / "state").read_text())
    assert 160 <= state["row"] < 1200 - 100
    assert state["row"] % len(packs)
    again = Batches(packs, 4, seed=9)
    again.load_state_dict(state)
    same(take(again, 20), expected[state["row"] // 4 :][:20])


# --- what is refused


def test_a_state_of_something_else_is_refused(packs, others):
    state = Batches(packs, 4, seed=1).state_dict()
    with pytest.raises(DataError, match="another order: seed 1, here 2; resume"):
        Batches(packs, 4, seed=2).load_state_dict(state)
    with pytest.raises(DataError, match="shuffle True, here False"):
        Batches(packs, 4, seed=1, shuffle=False).load_state_dict(state)
    with pytest.raises(DataError, match="1 datasets, here 3"):
        Batches(others, 4, seed=1).load_state_dict(state)
    with pytest.raises(DataError, match="length 32, here 16"):
        Batches(Packs(packs.dataset, 16), 4, seed=1).load_state_dict(state)
    with pytest.raises(DataError, match="packing 'whole', here 'stream'"):
        Batches(Packs(packs.dataset, 32, "stream"), 4, seed=1).load_state_dict(state)
    with pytest.raises(DataError, match=r"fingerprint '.*', here '"):
        Batches(others[2], 4, seed=1).load_state_dict(state)
    mixed = Batches(others[:2], 4, weights=[1, 1]).state_dict()
    with pytest.raises(DataError, match="slots 2048, here 3072"):
        Batches(others[:2], 4, weights=[3, 1]).load_state_dict(mixed)
    for wrong in ({}, [], None, {**state, "row": -1}, {**state, "row": "4"}, {**state, "datasets": [3]}):
        with pytest.raises(DataError, match="expected"):
            Batches(packs, 4, seed=1).load_state_dict(wrong)


def test_impossible_batches_are_refused(packs, others, tmp_path):
    for size, message in ((6, "batch_size is 6, expected a multiple of the 4 ranks"), (0, "batch_size is 0")):
        with pytest.raises(ConfigError, match=message):
            Batches(packs, size, world_size=4)
    with pytest.raises(ConfigError, match="rank is 2 of 2"):
        Batches(packs, 4, rank=2, world_size=2)
    with pytest.raises(ConfigError, match="no packs"):
        Batches([], 4)
    with pytest.raises(ConfigError, match="rows of 16, 32 ids, expected one length"):
        Batches([packs, Packs(packs.dataset, 16)], 4)
    with pytest.raises(ConfigError, match="weights"):
        Batches(others, 4, weights=[1, 2])
    with pytest.raises(ConfigError, match="more than 2\\*\\*31"):
        Batches(packs, 2**27)
    larger = VocabularyRegistry.create([TokenizerSpec("words", "text", (501,), "t")], max_grid=4)
    write_dataset(tmp_path / "d", larger, [np.array([larger.bos])])
    with pytest.raises(VocabularyMismatchError, match="words"):
        Batches([packs, Packs(TokenDataset.open(tmp_path / "d"), 32)], 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_flipped_bit_stops_training(tmp_path, workers):
    dataset = write(tmp_path / "d", 6000)
    shard = dataset.shards[0]
    data = bytearray(shard.file.read_bytes())
    data[len(data) // 2] ^= 4
    with shard.file.open("r+b") as file:  # in place: the open dataset sees it
        file.write(data)
    packs = Packs(dataset, 32)
    with pytest.raises(DataError, match=rf"{shard.file.name}: the block of bytes \d+ to \d+ is damaged"):
        take(Batches(packs, 8).load(num_workers=workers), len(packs) // 8)


def test_a_dataset_that_changes_while_it_is_open_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gathering, "_PAUSE", 0.0)
    dataset = write(tmp_path / "d", 600)
    batches = Batches(Packs(dataset, 32), 8)
    running = iter(batches)
    next(running)
    write(tmp_path / "d", 600, seed=1)
    with pytest.raises(DataError, match="was changed while it was open"):
        next(iter(batches))
    dataset = TokenDataset.open(tmp_path / "d")
    running = iter(Batches(Packs(dataset, 32), 64))
    next(running)
    os.truncate(dataset.shards[0].file, 5000)
    with pytest.raises(DataError, match="has 5000 bytes, expected"):
        take(running, 100)
    with pytest.raises(DataError, match="has 5000 bytes, expected"):
        next(iter(Batches(Packs(dataset, 32), 8)))

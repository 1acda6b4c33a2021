"""Two processes under torchrun train as one does, with the model whole on each or in parts on both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from training_runs import CONFIG, REGISTRY, log, train

from mmtok.errors import ConfigError
from mmtok.training.loop import STATE
from mmtok.training.sharding import Shards, part_as, whole
from mmtok.transformer import Transformer, TransformerConfig

HERE = Path(__file__).resolve().parent
FAST = CONFIG.replace(["lr=0.3"])


def two(run: Path, *changes: str, dies: bool = False) -> None:
    """The run of ``training_runs.py`` by two processes, of which one may be killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [*command, str(HERE / "training_runs.py"), str(run), "lr=0.3", *changes],
        env=env, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert (done.returncode != 0) == dies, done.stderr[-3000:]


def difference(a: Path, b: Path) -> float:
    """Largest of all numbers that the next step depends on."""
    one, other = load_file(a / STATE), load_file(b / STATE)
    assert one.keys() == other.keys()
    return max(float((one[k].double() - other[k].double()).abs().max()) for k in one)


def same_losses(a: Path, b: Path, within: float) -> None:
    """The figures that do not depend on the rows which rank 0 had."""
    for mine, theirs in zip(log(a), log(b), strict=True):
        assert mine["step"] == theirs["step"]
        assert abs(mine["val"] - theirs["val"]) < within
    assert log(a)[-1]["val"] < log(a)[0]["val"] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "tied"), [("ddp", True), ("fsdp", True), ("fsdp", False)])
def test_two_processes_train_as_one(tmp_path, parallel, tied):
    model = train(tmp_path / "one", FAST, tied)
    two(tmp_path / "two", f"parallel={parallel}", *([] if tied else ["untied"]))
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-5
    same_losses(tmp_path / "one", tmp_path / "two", 1e-5)
    for rank in (0, 1):  # what the recipe is left with: the averaged weights, whole on every rank
        left = torch.load(tmp_path / "two" / f"model-{rank}.pt", weights_only=True)
        assert all((left[k] - v).abs().max() < 1e-5 for k, v in model.state_dict().items())
        assert any((left[k] - v).abs().max() > 1e-3 for k, v in load_weights(tmp_path / "two").items())


def load_weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights that are trained, not their average."""
    return {k.removeprefix("model."): v for k, v in load_file(run / STATE).items() if k.startswith("model.")}


@pytest.mark.slow
def test_a_sharded_run_is_continued_by_one_process_and_the_other_way_round(tmp_path):
    train(tmp_path / "one", FAST)
    two(tmp_path / "a", "parallel=fsdp", "steps=3")
    train(tmp_path / "a", FAST)
    train(tmp_path / "b", FAST.replace(["steps=3"]))
    two(tmp_path / "b", "parallel=fsdp")
    for run in ("a", "b"):
        assert difference(tmp_path / "one", tmp_path / run) < 1e-5
        assert log(tmp_path / run)[-1]["step"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_of_which_one_is_killed_end_as_if_not(tmp_path, parallel):
    two(tmp_path / "one", f"parallel={parallel}")
    two(tmp_path / "two", f"parallel={parallel}", "die", dies=True)
    assert [x["step"] for x in log(tmp_path / "two")] == [2, 4]
    two(tmp_path / "two", f"parallel={parallel}", "die")
    assert difference(tmp_path / "one", tmp_path / "two") == 0
    assert log(tmp_path / "one") == log(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_muon_on_two_processes(tmp_path, parallel):
    """Muon multiplies in bfloat16, so the order in which ranks add shows: the runs agree, but not to the last bits."""
    train(tmp_path / "one", FAST.replace(["optimizer=muon"]))
    two(tmp_path / "two", f"parallel={parallel}", "optimizer=muon")
    same_losses(tmp_path / "one", tmp_path / "two", 2e-3)
    other = load_weights(tmp_path / "two")
    for k, v in load_weights(tmp_path / "one").items():
        assert (other[k] - v).norm() < 0.02 * v.norm(), k


# --- in one process


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def tiny() -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(REGISTRY.padded_size, 16, 32, 2, 2, 1, 8, max_position_embeddings=32))


def test_a_sharded_model_can_be_whole_for_a_while(alone):
    model, plain = tiny(), tiny()
    expected, ids = plain.state_dict(), torch.arange(12)[None]
    shards = Shards(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    names = list(expected)
    for _ in range(2):
        with shards.gathered():
            assert type(model) is Transformer
            assert list(model.state_dict()) == names
            assert all(torch.equal(model.state_dict()[k], v) for k, v in expected.items())
            assert torch.equal(model(ids), plain(ids))
        assert all(isinstance(p, DTensor) for p in model.parameters())
        model.hidden(ids).sum().backward()  # the hooks are back
        assert all(isinstance(p.grad, DTensor) for p in model.parameters())
    with torch.no_grad():
        for p in (*model.parameters(), *plain.parameters()):
            p.add_(1)
    with shards.gathered():
        assert all(torch.equal(model.state_dict()[k], v) for k, v in plain.state_dict().items())
    shards.gather()
    assert type(model) is Transformer
    assert all(type(p) is nn.Parameter and p.device.type == "cpu" for p in model.parameters())
    assert torch.equal(model(ids), plain(ids))


def test_parts_of_tensors(alone):
    model = tiny()
    Shards(model)
    weight = model.model.embed_tokens.weight.detach()
    x = torch.randn(weight.shape)
    part = part_as(x, weight)
    assert isinstance(part, DTensor)
    assert torch.equal(whole(part), x)
    assert part_as(x, x) is x
    assert whole(x) is x


def test_only_the_transformer_is_sharded():
    with pytest.raises(ConfigError, match="shards the transformer, got a Linear; use parallel=ddp"):
        Shards(nn.Linear(3, 3))

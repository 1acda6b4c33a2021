"""kill -9 at random moments of a real training of a transformer: it ends as one that nothing happened to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import CONFIG, log, train

from mmtok.training.loop import STATE

HERE = Path(__file__).resolve().parent
LONG = CONFIG.replace(["steps=40", "lr=0.1", "ema=0.9", "bf16=true", "schedule=constant", "warmup=5"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_ends_as_the_uninterrupted(tmp_path, optimizer):
    config = LONG.replace([f"optimizer={optimizer}"])
    changes = [f"{k}={json.dumps(v)}" for k, v in config.to_dict().items()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / "training_runs.py"), "kill", str(tmp_path / "killed"), "1", "5", *changes]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert len(set(seen)) > 2  # killed at different places of the run

    threads = torch.get_num_threads()
    model = train(tmp_path / "whole", config)
    torch.set_num_threads(threads)
    one, other = (load_file(tmp_path / run / STATE) for run in ("whole", "killed"))
    assert one.keys() == other.keys()
    assert not [k for k in one if not torch.equal(one[k], other[k])]
    assert log(tmp_path / "whole") == log(tmp_path / "killed")
    left = torch.load(tmp_path / "killed" / "model-0.pt", weights_only=True)
    assert all(torch.equal(left[k], v) for k, v in model.state_dict().items())

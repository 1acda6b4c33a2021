"""Real training runs of a tiny transformer, in this process, under torchrun, and killed at random moments.

python training_runs.py RUN [key=value ...] [untied] [die]    one run: CONFIG with these changes; see ``train``
python training_runs.py kill RUN SEED KILLS [key=value ...]   the same, begun anew after each kill -9
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from mmtok.grammar import Grammar
from mmtok.registry import TokenizerSpec, VocabularyRegistry
from mmtok.training.distributed import rank, world
from mmtok.training.lm import SequenceLoss
from mmtok.training.loop import LOG, LoopConfig, fit, prepare_torch, rng
from mmtok.transformer import Transformer, TransformerConfig
from mmtok.transformer.packing import pack

CONFIG = LoopConfig(
    steps=6, batch_size=4, accumulate=2, lr=1e-2, warmup=100, ema=0.9, bf16=False, threads=1, eval_every=2, save_every=3
)
REGISTRY = VocabularyRegistry.create(
    [TokenizerSpec("words", "text", (40,), "t"), TokenizerSpec("sounds", "audio", (10, 9), "a")], max_grid=2
)
GRAMMAR = Grammar(REGISTRY)


def rows(r: np.random.Generator, count: int) -> tuple[torch.Tensor, ...]:
    """Rows of two documents each, with as many targets in every row: the mean over ranks is then that over rows."""
    documents = []
    for size in [7, 5] * count:
        words = GRAMMAR.segment_ids("words", r.integers(0, 40, size))
        sound = GRAMMAR.segment_ids("sounds", np.stack([r.integers(0, s, 3) for s in (10, 9)]))
        documents.append(np.concatenate([[REGISTRY.bos], words, sound, [REGISTRY.eos]]))
    both = [np.concatenate(documents[i : i + 2]) for i in range(0, 2 * count, 2)]
    ids, document, positions = (torch.from_numpy(x) for x in pack(both, len(both[0])))
    first = torch.arange(ids.shape[1]) < len(documents[0])
    document = torch.where(first, 2 * document, 2 * document + 1)
    positions = torch.where(first, positions, positions - len(documents[0]))
    return ids, document, positions, positions >= 0


def train(run: Path, config: LoopConfig, tied: bool = True, die: bool = False) -> Transformer:
    """One run; with an output projection of its own, or one whose last rank is killed in step 5 if it began at 0."""
    prepare_torch(config)
    torch.manual_seed(0)
    model = Transformer(
        TransformerConfig(
            REGISTRY.padded_size, 32, 64, 2, 2, 1, 16, max_position_embeddings=64, tie_word_embeddings=tied
        )
    )
    sequence_loss = SequenceLoss(GRAMMAR, {"text": 2.0}, z_loss=1e-3)

    numbers: list[int] = []

    def loss(number: int) -> tuple[torch.Tensor, dict[str, float]]:
        numbers.append(number)
        if die and rank() == world() - 1 and number == 5 * config.accumulate and numbers[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        mine = [x[rank() :: world()] for x in rows(rng(config, number), config.batch_size)]
        return sequence_loss(model, *mine)

    def evaluate(step: int) -> dict[str, float]:
        assert not isinstance(model.head_weight, torch.distributed.tensor.DTensor)
        return {"val": sequence_loss(model, *rows(np.random.default_rng(7), 2))[0].item()}

    fit(model, config, run, loss, evaluate, "test", {"tied": tied})
    return model


def log(run: Path) -> list[dict[str, float]]:
    """The metrics of a run but for its speed."""
    lines = [json.loads(x) for x in (run / LOG).read_text().splitlines()]
    return [{k: v for k, v in x.items() if k != "steps_per_s"} for x in lines]


def lines(run: Path) -> int:
    """How many lines the log has, whole or not."""
    return len((run / LOG).read_bytes().splitlines()) if (run / LOG).exists() else 0


def kill(run: Path, seed: int, kills: int, config: LoopConfig) -> list[int]:
    """Train in child processes, each killed with SIGKILL a random time after it wrote a few lines; the last one ends.

    Returns:
        of each killed child the lines that it left in the log.
    """
    with suppress(ImportError):
        importlib.import_module("torch.utils.tensorboard")  # once, before the process is copied
    random = np.random.default_rng(seed)
    seen: list[int] = []
    while True:
        before = lines(run)
        child = os.fork()  # of a process with one thread
        if not child:
            model = train(run, config)
            torch.save(model.state_dict(), f"{run}/model-0.pt")
            os._exit(0)
        if len(seen) == kills:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            return seen
        wanted, delay = before + random.integers(4), random.uniform(0, 0.1)
        while lines(run) < wanted:
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "it ended before it was killed"
        seen.append(lines(run))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "kill":
        out, seed, kills, *changes = sys.argv[2:]
        print(json.dumps(kill(Path(out), int(seed), int(kills), CONFIG.replace(changes))))
    else:
        out, *changes = sys.argv[1:]
        config = CONFIG.replace([c for c in changes if "=" in c])
        model = train(Path(out), config, "untied" not in changes, "die" in changes)
        assert type(model) is Transformer
        torch.save(model.state_dict(), f"{out}/model-{rank()}.pt")

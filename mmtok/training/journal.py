"""What a run shows of itself: a progress bar, metrics.jsonl, samples as files, and all of it in TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmtok.checkpoints import atomic_write
from mmtok.media import write_audio, write_image

LOG = "metrics.jsonl"
HEARTBEAT_S = 30.0  # where the progress bar cannot be drawn, in a log file, a line this often

Metrics = dict[str, float]
Pictures = dict[str, np.ndarray]
Sounds = dict[str, tuple[np.ndarray, int]]


class Journal:
    """Of one run, kept by rank 0; a context, in which the progress bar is drawn.

    Args:
        run: the directory.
        step: from which the run continues; lines of later steps are dropped from the log.
        steps: of the whole run.
        description: shown before the progress bar.
    """

    def __init__(self, run: Path, step: int, steps: int, description: str) -> None:
        self.run, self.steps = run, steps
        # A run that was killed after logging but before saving has lines from the future.
        log = [x for x in _read_log(run / LOG) if x["step"] <= step]
        atomic_write(run / LOG, "".join(json.dumps(x) + "\n" for x in log).encode())
        self._board = _tensorboard(run)
        self._console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, TextColumn("{task.fields[live]}"), console=self._console)
        self._bar = self._progress.add_task(description, total=steps, completed=step, live="")
        self._started, self._shown, self._spoken = time.monotonic(), step, time.monotonic()

    def __enter__(self) -> Journal:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)
        if self._board is not None:
            self._board.close()

    def show(self, step: int, live: Metrics) -> None:
        """The metrics of one step, beside the bar."""
        text = " ".join(f"{k} {v:.4g}" for k, v in live.items())
        self._progress.update(self._bar, completed=step, live=text)
        if not self._console.is_terminal and time.monotonic() - self._spoken > HEARTBEAT_S:
            self._spoken = time.monotonic()
            self._console.print(f"step {step} of {self.steps}: {text}", soft_wrap=True)

    def pace(self, step: int) -> float:
        """Steps a second since the run began or was last evaluated."""
        return (step - self._shown) / max(1e-9, time.monotonic() - self._started)

    def enter(self, line: Metrics, pictures: Pictures, sounds: Sounds) -> None:
        """Write down what an evaluation gave.

        Args:
            line: figures by name, with the ``step``.
            pictures: uint8 [3, H, W] by name, for ``run/samples`` and TensorBoard.
            sounds: (float32 [C, T], Hz) by name, for the same.
        """
        step = int(line["step"])
        with (self.run / LOG).open("a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
        if self._board is not None:
            for key, figure in line.items():
                self._board.add_scalar(key, figure, step)
        for name, picture in pictures.items():
            write_image(self.run / "samples" / f"{step:06}{name and '-'}{name}.png", picture)
            if self._board is not None:
                self._board.add_image(name or "samples", picture, step)
        for name, (samples, rate) in sounds.items():
            write_audio(self.run / "samples" / f"{step:06}-{name}.wav", samples, rate)
            if self._board is not None:
                self._board.add_audio(name, samples.mean(0, keepdims=True), step, rate)
        self._console.print(f"step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in line.items() if k != "step"))
        self._started, self._shown = time.monotonic(), step


def _read_log(path: Path) -> list[dict[str, float]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    out = []
    for line in lines:
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the line that was being written when the process was killed
    return out


def _tensorboard(run: Path):  # type: ignore[no-untyped-def]
    """A TensorBoard writer where the package is installed, else None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run / "tensorboard"))

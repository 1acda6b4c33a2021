"""Who encodes the units: this process, several processes, or the actors of a Ray cluster.

Each engine is a generator: units in, results out, in any order. Units are handed out as they are asked for, a few more
than there are workers. A worker that dies is replaced, and its unit done again; a unit whose worker dies ``TRIES``
times stops the build with its documents named.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from mmtok.datasets.units import Job, Unit, Worker
from mmtok.errors import ConfigError, DataError
from mmtok.multimodal import MultimodalTokenizer

ENGINES = ("local", "ray")
TRIES = 3
Results = Iterator[dict[str, Any]]


def run(engine: str, job: Job, units: Sequence[Unit], workers: int, tokenizer: MultimodalTokenizer) -> Results:
    """The results of all units, as they are done.

    Args:
        engine: ``local`` or ``ray``.
        job: what the workers need to know.
        units: what is to be done.
        workers: how many; one local worker is this process itself.
        tokenizer: the vocabulary's, for this process.

    Raises:
        ConfigError: no such engine, fewer workers than one, or a cluster without room for them.
        DataError: a unit whose worker died too often.
    """
    if engine not in ENGINES or workers < 1:
        raise ConfigError(f"got engine {engine!r} with {workers} workers, expected local or ray with at least 1")
    workers = min(workers, max(1, len(units)))
    if engine == "ray":
        return ray_actors(job, units, workers)
    if workers == 1:
        return map(Worker(job, tokenizer), units)
    return processes(job, units, workers)


def processes(job: Job, units: Sequence[Unit], workers: int) -> Results:
    """Processes of this machine."""
    left: dict[str, Unit] = {x.name: x for x in units}
    died: dict[str, int] = {}
    # What the numerical libraries start beside the worker's own thread would fight over the cores.
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    before = {k: os.environ.get(k) for k in quiet}
    os.environ.update(quiet)
    try:
        while left:
            pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (job,))
            running: dict[Future[dict[str, Any]], Unit] = {}
            try:
                waiting = iter(list(left.values()))
                while True:
                    while len(running) < 2 * workers and (unit := next(waiting, None)) is not None:
                        running[pool.submit(_work, unit)] = unit
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        del left[running.pop(future).name]
                        yield result
            except BrokenProcessPool as error:
                # Which of the units was under way is not told: those that are done have their results on the disk.
                for unit in running.values():
                    died[unit.name] = died.get(unit.name, 0) + 1
                    if died[unit.name] >= TRIES:
                        raise DataError(_dead(unit)) from error
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _dead(unit: Unit) -> str:
    last = unit.first + unit.documents - 1
    return (
        f"a worker died {TRIES} times while documents {unit.first} to {last} were encoded; is there enough memory? "
        "Give fewer --workers, or leave out the document that does it, and run the same command again"
    )


_worker: Worker | None = None


def _start(job: Job) -> None:
    """In a new process: load the tokenizers, and end when the process that asked for them does."""
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Worker(job)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(unit: Unit) -> dict[str, Any]:
    if _worker is None:
        raise RuntimeError("the process was not started by the engine")
    return _worker(unit)


def ray_actors(job: Job, units: Sequence[Unit], workers: int) -> Results:
    """Actors on a Ray cluster, through Ray Data: that of RAY_ADDRESS, else one started here for the time of the build.

    All machines must see the build's directory, the media and the vocabulary under the same paths.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError("the engine ray needs Ray; pip install 'mmtok[ray]'") from error
    started = not ray.is_initialized()
    if started:
        here: dict[str, Any] = {"num_cpus": workers + 1, "include_dashboard": False}
        here = {} if os.environ.get("RAY_ADDRESS") else here
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **here)
    try:
        # Actors that reserve every core leave none for reading, and Ray Data then waits for ever.
        cores = ray.cluster_resources().get("CPU", 0)
        if cores < workers + 1:
            raise ConfigError(
                f"the Ray cluster has {cores:g} CPUs, {workers} workers need {workers + 1}; give --workers "
                f"{max(1, int(cores) - 1)}, or add machines"
            )
        yield from _ray_results(ray, job, units, workers)
    finally:
        if started:
            ray.shutdown()


def _ray_results(ray: Any, job: Job, units: Sequence[Unit], workers: int) -> Results:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.actor_task_retry_on_errors = False  # a full disk does not get better; a dead actor is replaced anyway
    rows = ray.data.from_items([{"unit": number} for number in range(len(units))], override_num_blocks=len(units))
    done = rows.map_batches(
        _RayWorker,
        fn_constructor_args=(job, list(units)),
        batch_size=1,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        max_restarts=TRIES,
        max_task_retries=TRIES,
    )
    try:
        for row in done.iter_rows():
            yield row["result"]
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        raise cause from error
    except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
        raise DataError(f"a Ray worker died {TRIES} times; is there enough memory? Give fewer --workers") from error


class _RayWorker:
    """An actor."""

    def __init__(self, job: Job, units: Sequence[Unit]) -> None:
        self.worker, self.units = Worker(job), units

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        results = np.empty(len(batch["unit"]), object)
        for i, number in enumerate(batch["unit"].tolist()):
            results[i] = self.worker(self.units[number])
        return {"result": results}

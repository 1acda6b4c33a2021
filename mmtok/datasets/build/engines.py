"""Who encodes the units: this process, several processes, or the actors of a Ray cluster.

Each engine is a generator: units in, results out, in any order. Units are handed out as they are asked for, a few more
than there are workers. A worker that dies is replaced, and its unit done again, up to ``TRIES`` times.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from mmtok.datasets.build.units import TRIES, Job, Unit, Worker
from mmtok.datasets.sources.content import discard_copies
from mmtok.errors import ConfigError, DataError, MmtokError
from mmtok.multimodal import MultimodalTokenizer

ENGINES = ("local", "ray")
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
    left = {x.name: x for x in units}
    suspects: set[str] = set()  # that were under way when a worker died
    broken = 0
    # What the numerical libraries start beside the worker's own thread would fight over the cores.
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    before = {k: os.environ.get(k) for k in quiet}
    os.environ.update(quiet)
    try:
        while left:
            context = multiprocessing.get_context("spawn")
            line, end = context.Pipe(duplex=False)
            pool = ProcessPoolExecutor(workers, context, _start, (job, line))
            try:
                for result in _handed_out(pool, list(left.values()), 2 * workers, suspects):
                    del left[result["unit"]]
                    suspects.discard(result["unit"])
                    broken = 0
                    yield result
            except BrokenProcessPool as error:
                broken += 1
                if broken > TRIES:
                    raise DataError(
                        f"workers died {broken} times before they did anything; is there enough memory for {workers}? "
                        "Give fewer --workers and run the same command again"
                    ) from error
            finally:
                end.close()  # workers that are still there, since this build was stopped, end at once
                pool.shutdown(wait=True, cancel_futures=True)
                line.close()
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _handed_out(pool: ProcessPoolExecutor, units: Sequence[Unit], most: int, suspects: set[str]) -> Results:
    """The results of units of which at most so many are in the pool.

    A worker that dies takes the others of its pool with it. So the units that were under way then, the suspects, come
    first, each alone, and only that one is blamed whose worker dies again.
    """
    running: dict[Future[dict[str, Any]], str] = {}
    waiting = deque(sorted(units, key=lambda x: x.name not in suspects))
    while waiting or running:
        while waiting and len(running) < (1 if suspects else most):
            unit = waiting.popleft()
            with _quiet_children():
                running[pool.submit(_work, unit)] = unit.name
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            if isinstance(future.exception(), BrokenProcessPool):
                suspects |= set(running.values())
            del running[future]
            yield future.result()


@contextlib.contextmanager
def _quiet_children() -> Iterator[None]:
    """Processes that are started here get no Ctrl-C of their own: they end when this one lets go of them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: Worker | None = None


def _start(job: Job, line: Connection) -> None:
    """In a new process: load the tokenizers, and end when the build does that asked for them."""
    global _worker
    threading.Thread(target=_end_with, args=(line,), daemon=True).start()
    _worker = Worker(job)


def _end_with(line: Connection) -> None:
    """End this process when the other end of the line is closed, be it because the process there died."""
    line.poll(None)
    discard_copies()
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
    rows = ray.data.from_items([{"unit": number} for number in range(len(units))], override_num_blocks=len(units))
    done = rows.map_batches(
        _RayWorker,
        fn_constructor_args=(job, list(units)),
        batch_size=1,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    try:
        for row in done.iter_rows():
            if isinstance(row["result"], Exception):
                raise row["result"]
            yield row["result"]
    except ray.exceptions.RayActorError as error:
        raise DataError("Ray workers died; is there enough memory? Give fewer --workers and run it again") from error


class _RayWorker:
    """An actor. One that dies is replaced by Ray, and its unit done again."""

    def __init__(self, job: Job, units: Sequence[Unit]) -> None:
        self.worker, self.units = Worker(job), units

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        results = np.empty(len(batch["unit"]), object)
        for i, number in enumerate(batch["unit"].tolist()):
            try:
                results[i] = self.worker(self.units[number])
            except (MmtokError, OSError) as error:  # as it is, without Ray's wrapping
                results[i] = error
        return {"result": results}

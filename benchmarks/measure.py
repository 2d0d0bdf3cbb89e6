"""Latency, cold start and peak memory of several contenders in one run.

Each contender lives in a process of its own, so that its peak memory is its own; the processes take turns, one
inference at a time, so that whatever else the machine does meets all of them alike.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import DcformerError, one_line
from ..runtime.machine import machine
from .contenders import Entrant, Job, open_contender

_SEED = 0
#: Thread pools of the contender that ran last spin for a moment; let them fall asleep before the next one starts.
_PAUSE_S = 0.1


@dataclass(frozen=True)
class Measurement:
    """One contender.

    Latencies are of one volume, preprocessed, in and the embedding out; from a file on where ``Report.scan`` is set.
    ``cold_start_ms``: from starting the process to the first result, imports and loading included, making the input
    left out. ``peak_rss_mb`` is the process's, the input volume included.
    ``ratio``: how many times faster than the first contender, the median over rounds of paired latencies.
    ``cosine``: with what the first contender computed, where both have the same weights: an embedding, or from a file
    the scores or the loaded voxels.
    """

    name: str
    description: str
    runs: int
    median_ms: float
    p95_ms: float
    cold_start_ms: float
    peak_rss_mb: float
    ratio: float
    cosine: float | None


@dataclass(frozen=True)
class Report:
    """A benchmark run and the machine that it ran on. ``left_out``: contenders that failed, with their reasons."""

    date: str
    machine: str
    threads: int
    encoder: str
    volume_dhw: tuple[int, int, int]
    contenders: tuple[Measurement, ...]
    scan: str | None = None
    left_out: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Worker:
    """A contender in its own process."""

    def __init__(self, entrant: Entrant, shape: tuple[int, int, int]) -> None:
        self.name = entrant.name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        start = time.perf_counter()
        self._process = context.Process(target=_serve, args=(theirs, entrant.kind, entrant.job, shape),
                                        daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.description, self.embedding, input_s = self._receive()
        except BaseException:
            self.kill()
            raise
        self.cold_start_ms = (time.perf_counter() - start - input_s) * 1e3

    def run(self) -> float:
        """Milliseconds of one inference, measured inside the worker."""
        return self._ask("run")

    def close(self) -> float:
        """Stop the worker; returns its peak resident memory in MB."""
        peak = self._ask("stop")
        self._process.join()
        return peak

    def kill(self) -> None:
        """End the process whatever it is doing."""
        self._process.kill()
        self._process.join()

    def _ask(self, order: str) -> Any:
        # A dead process shows when it is spoken to or when it is listened to; both mean the same.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send(order)
        return self._receive()

    def _receive(self) -> Any:
        try:
            kind, value = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join()
            raise DcformerError(f"benchmark of {self.name}: its process ended with exit code {self._process.exitcode} "
                                "(a negative 9 means that it ran out of memory)") from error
        if kind == "error":
            raise DcformerError(f"benchmark of {self.name}: {value}")
        return value


def _serve(connection: Connection, kind: str, job: Job, shape: tuple[int, int, int]) -> None:
    """Body of a worker process: load, run once, then obey."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends this one
    try:
        start = time.perf_counter()
        given = _random_volume(shape, job.value_range) if job.scan is None else job.scan
        input_s = time.perf_counter() - start
        contender = open_contender(kind, job)

        def work() -> NDArray[np.float32]:
            return contender.run(given) if isinstance(given, np.ndarray) else contender.run_scan(given)

        connection.send(("ready", (contender.describe(), work()[0], input_s)))
        while connection.recv() == "run":
            start = time.perf_counter()
            work()
            connection.send(("ms", (time.perf_counter() - start) * 1e3))
        connection.send(("peak", _peak_rss_mb()))
    except (DcformerError, ImportError, MemoryError, RuntimeError) as error:
        connection.send(("error", f"{type(error).__name__}: {error}"))


def _random_volume(shape: tuple[int, int, int], value_range: tuple[float, float]) -> NDArray[np.float32]:
    low, high = value_range
    volume = np.random.default_rng(_SEED).random((1, *shape), np.float32)
    volume *= high - low
    volume += low
    return volume


def _peak_rss_mb() -> float:
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss of a fresh process starts with its parent's value on Linux; VmHWM does not
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024


def measure(
    entrants: Sequence[Entrant], encoder: str, shape: tuple[int, int, int], runs: int,
    on_run: Callable[[str], None] = lambda _: None, keep_going: bool = False,
) -> Report:
    """Measure contenders by turns; the first is the one that the others are compared with.

    Args:
        shape: (D, H, W) of the volume.
        runs: measured inferences of each contender, after one warm-up beyond the cold start.
        on_run: told what runs next; for progress display.
        keep_going: leave out contenders that fail instead of raising.

    Raises:
        DcformerError: a contender cannot be loaded or its process died.
    """
    workers: list[Worker] = []
    started: list[Worker] = []
    left_out: dict[str, str] = {}

    def guarded(name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except DcformerError as error:
            if not keep_going:
                raise
            left_out[name] = one_line(str(error))
            workers[:] = [worker for worker in workers if worker.name != name]

    def start(entrant: Entrant) -> None:
        workers.append(Worker(entrant, shape))
        started.append(workers[-1])

    latencies: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
    peaks: dict[str, float] = {}

    def run(worker: Worker, is_measured: bool) -> None:
        elapsed = worker.run()
        if is_measured:
            latencies[worker.name].append(elapsed)

    try:
        for entrant in entrants:
            on_run(f"{entrant.name}: cold start")
            guarded(entrant.name, partial(start, entrant))
        for turn in range(runs + 1):
            # The order turns round every time, so that no contender always follows the same one.
            for worker in list(workers) if turn % 2 else list(reversed(workers)):
                on_run(f"{worker.name}: {turn} of {runs}" if turn else f"{worker.name}: warm-up")
                time.sleep(_PAUSE_S)
                guarded(worker.name, partial(run, worker, turn > 0))
        for worker in list(workers):
            guarded(worker.name, lambda worker=worker: peaks.update({worker.name: worker.close()}))
    finally:
        for worker in started:
            worker.kill()
    job = entrants[0].job
    first = workers[0] if workers else None
    return Report(
        date=datetime.date.today().isoformat(),
        machine=machine(),
        threads=job.threads,
        encoder=encoder,
        volume_dhw=shape,
        contenders=tuple(
            _summary(worker, latencies[worker.name], peaks[worker.name], latencies[first.name],
                     first.embedding if job.same_weights and worker is not first else None)
            for worker in workers if first is not None
        ),
        scan=None if job.scan is None else str(job.scan),
        left_out=tuple(left_out.items()),
    )


def _summary(worker: Worker, latencies: list[float], peak: float, baseline: list[float],
             reference: np.ndarray | None) -> Measurement:
    return Measurement(
        name=worker.name,
        description=worker.description,
        runs=len(latencies),
        median_ms=float(np.median(latencies)),
        p95_ms=float(np.percentile(latencies, 95)),
        cold_start_ms=worker.cold_start_ms,
        peak_rss_mb=peak,
        ratio=float(np.median(np.array(baseline) / np.array(latencies))),
        cosine=_cosine(reference, worker.embedding) if reference is not None else None,
    )


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), float(np.finfo(np.float32).tiny)))

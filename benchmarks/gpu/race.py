"""The race: contenders take turns, each run between two events, the order turning round every time."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...export.complexity import count
from ...export.registry import get_encoder
from ...runtime.backends.device import Device
from ...runtime.bundle import Bundle
from ...runtime.errors import DeviceLost, one_line
from ...runtime.gpu import current_gpu
from ...runtime.machine import machine
from ...runtime.provenance import ANY_TARGET
from . import Floors, GpuReport, Row
from .clock import Clock
from .contenders import COMPILED, Contender, Work, let_go, open_contender
from .floors import floor_ms, measure_floors
from .nvml import PeakMemory

#: Runs of one turn, so that the GPU's clock does not fall between them; turns at least and at most.
_REPEATS, _LEAST_TURNS, _MOST_TURNS = 5, 20, 120
#: What is compiled anew for each batch is left out of later ones if that took longer.
_LONGEST_LOAD_MS = 60e3
#: How long inferences follow upon each other for the throughput.
_SUSTAINED_MS = 1e3
_SEED = 0


def race(bundle: Bundle, checkpoint: Path | None, names: Sequence[str], batches: Sequence[int], threads: int,
         budget_s: float, on_stage: Callable[[str], None] = lambda _: None,
         on_batch: Callable[[GpuReport], None] = lambda _: None) -> GpuReport:
    """Measure contenders of these names at each batch; the first that runs is the one that others are compared with.

    Args:
        names: of ``contenders.names_of``.
        budget_s: measured seconds per batch, roughly; at least ``_LEAST_TURNS`` turns are run all the same.
        on_batch: gets what is known after each batch: what follows may take long, or end the process.

    Raises:
        DeviceUnavailable: no GPU.
    """
    gpu = current_gpu()
    device = Device()
    device.use()
    clock = Clock(device)
    on_stage("floors")
    floors = measure_floors(device, clock)
    manifest = bundle.manifest
    multiply_adds = count(get_encoder(manifest.encoder), manifest.input_size).multiply_accumulates
    report = GpuReport(
        datetime.date.today().isoformat(), machine(),
        f"{gpu.name}, compute capability {gpu.compute_capability}, {gpu.memory_bytes / 2**30:.0f} GiB",
        manifest.encoder, manifest.preprocessing.shape_dhw, multiply_adds, floors, ())
    least, lost = _least_multiply_adds(bundle, multiply_adds), None
    for batch in batches:
        skipped = _tuned_too_long(report.rows, names)
        rows = [Row(name, batch, problem=lost or skipped.get(name)) for name in names if lost or name in skipped]
        if lost is None:
            work = Work(bundle, checkpoint, _volumes(bundle, batch), threads)
            try:
                rows += _race_batch(work, [name for name in names if name not in skipped], clock, budget_s, on_stage)
            except DeviceLost as error:  # what was finished before is still worth having
                lost = one_line(str(error))
                rows = [Row(name, batch, problem=lost) for name in names]
        report = dataclasses.replace(
            report, rows=report.rows + tuple(_with_floor(row, floors, bundle, least) for row in rows))
        on_batch(report)
    return report


def _tuned_too_long(rows: Sequence[Row], names: Sequence[str]) -> dict[str, str]:
    """Contenders that are compiled for each batch anew and took too long already, with the reason."""
    return {row.name: f"left out: it took {row.load_ms / 1e3:.0f} s to compile for a batch of {row.batch}; --against "
                      f"{row.name} measures it alone"
            for row in rows if len(names) > 1 and row.name in COMPILED and row.load_ms is not None
            and row.load_ms > _LONGEST_LOAD_MS}


def _volumes(bundle: Bundle, batch: int) -> NDArray[np.float32]:
    spec = bundle.manifest.preprocessing
    low, high = spec.value_range
    return np.random.default_rng(_SEED).random((batch, *spec.shape_dhw), np.float32) * (high - low) + low


def _race_batch(work: Work, names: Sequence[str], clock: Clock, budget_s: float,
                on_stage: Callable[[str], None]) -> list[Row]:
    rows, running = {}, dict[str, Contender]()
    with contextlib.ExitStack() as stack:
        for name in names:
            on_stage(f"batch {len(work.volumes)}, {name}: loading")
            rows[name], contender = _load(name, work, clock, stack)
            if contender is not None:
                running[name] = contender
        if not running:
            return list(rows.values())
        problems: dict[str, str] = {}
        times, usual = _take_turns(running, problems, clock, budget_s, lambda name: on_stage(
            f"batch {len(work.volumes)}, {name}"))
        found: dict[str, tuple[NDArray[np.float32], float]] = {}
        for name, contender in list(running.items()):
            on_stage(f"batch {len(work.volumes)}, {name}: throughput")
            try:
                sustained = clock.time_ms(contender, max(3, round(_SUSTAINED_MS / usual[name])))
                embeddings = contender.embeddings()
            except DeviceLost:
                raise
            except Exception as error:
                problems[name] = _told(error)
                continue
            if np.isfinite(embeddings).all():
                found[name] = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), sustained
            else:
                problems[name] = "its embeddings hold NaN or infinite values"
        for name, problem in problems.items():
            rows[name] = dataclasses.replace(rows[name], problem=problem)
        first = next(iter(found), None)
        for name, (embeddings, sustained) in found.items():
            assert first is not None
            rows[name] = dataclasses.replace(
                rows[name], runs=len(times[name]), median_ms=float(np.median(times[name])),
                p95_ms=float(np.percentile(times[name], 95)),
                p99_ms=float(np.percentile(times[name], 99)),
                scans_per_s=len(work.volumes) / sustained * 1e3,
                ratio=float(np.median(np.array(times[first]) / np.array(times[name]))),
                cosine=float((found[first][0] * embeddings).sum(axis=1).min()))
    return list(rows.values())


def _load(name: str, work: Work, clock: Clock, stack: contextlib.ExitStack) -> tuple[Row, Contender | None]:
    let_go()
    free, start = clock.free_bytes(), time.perf_counter()
    row = Row(name, len(work.volumes))
    with PeakMemory(clock.pci_bus_id()) as peak:
        try:
            contender = stack.enter_context(open_contender(name, work))
        except DeviceLost:
            raise
        except Exception as error:  # ONNX Runtime's and PyTorch's own have no common base
            return dataclasses.replace(row, problem=_told(error)), None
    own = contender.own_bytes()
    return dataclasses.replace(
        row, precision=contender.precision, description=contender.describe(), build_s=contender.build_s,
        load_ms=(time.perf_counter() - start) * 1e3, own_mb=own / 2**20 if own else None,
        device_mb=(free - clock.free_bytes()) / 2**20,
        peak_mb=None if peak.grown_bytes is None else peak.grown_bytes / 2**20), contender


def _told(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")[:500]


def _take_turns(running: dict[str, Contender], problems: dict[str, str], clock: Clock, budget_s: float,
                on_turn: Callable[[str], None]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds by contender, and what each usually takes; one that fails goes from the running to the problems."""
    usual: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in running}

    def guarded(name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except DeviceLost:
            raise
        except Exception as error:
            problems[name] = _told(error)
            del running[name]

    def warm(name: str) -> None:
        clock.time_ms(running[name], 3)
        usual[name] = max(clock.time_ms(running[name], 2), 1e-3)

    def turn(name: str) -> None:
        clock.time_ms(running[name])  # what ran before has left other things in the caches: not counted
        times[name] += [clock.time_ms(running[name]) for _ in range(_REPEATS)]

    for name in list(running):
        guarded(name, partial(warm, name))
    total = sum(usual[name] for name in running) * (_REPEATS + 1)
    turns = int(np.clip(budget_s * 1e3 / max(total, 1e-3), _LEAST_TURNS, _MOST_TURNS))
    for index in range(turns):
        for name in list(running) if index % 2 else list(reversed(running)):
            on_turn(f"{name}: {index + 1} of {turns}")
            guarded(name, partial(turn, name))
    return times, usual


def _least_multiply_adds(bundle: Bundle, counted: int) -> int:
    """Of the rewritten graph, which computes the same with fewer; the encoder's own where nothing was rewritten."""
    rewritten = [rewrite.after.multiply_adds for rewrite in bundle.manifest.rewrites if rewrite.target == ANY_TARGET]
    return rewritten[-1] if rewritten else counted


def _with_floor(row: Row, floors: Floors, bundle: Bundle, multiply_adds: int) -> Row:
    if row.median_ms is None:
        return row
    floor = floor_ms(floors, bundle, row.precision, row.batch, multiply_adds)
    return dataclasses.replace(row, floor_ms=floor, to_floor=None if not floor else row.median_ms / floor)

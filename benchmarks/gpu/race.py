"""The race: contenders take turns, each run between two events, the order turning round every time."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...export.complexity import count
from ...export.registry import get_encoder
from ...runtime.backends.device import Device
from ...runtime.bundle import Bundle
from ...runtime.errors import DcformerError, DeviceLost, one_line
from ...runtime.gpu import current_gpu
from ...runtime.machine import machine
from . import Floors, GpuReport, Row
from .clock import Clock
from .contenders import Contender, Work, open_contender
from .floors import floor_ms, measure_floors

#: Runs of one turn, so that the GPU's clock does not fall between them; turns at least and at most.
_REPEATS, _LEAST_TURNS, _MOST_TURNS = 5, 20, 60
_SEED = 0


def race(bundle: Bundle, checkpoint: Path | None, names: Sequence[str], batches: Sequence[int], threads: int,
         budget_s: float, on_stage: Callable[[str], None] = lambda _: None) -> GpuReport:
    """Measure contenders of these names at each batch; the first that runs is the one that others are compared with.

    Args:
        names: of ``contenders.names_of``.
        budget_s: measured seconds per batch, roughly; at least ``_LEAST_TURNS`` turns are run all the same.

    Raises:
        DeviceUnavailable: no GPU.
        DeviceLost: it failed for good; nothing more can be measured in this process.
    """
    gpu = current_gpu()
    device = Device()
    device.use()
    clock = Clock(device)
    on_stage("floors")
    floors = measure_floors(device, clock)
    manifest = bundle.manifest
    multiply_adds = count(get_encoder(manifest.encoder), manifest.input_size).multiply_accumulates
    rows: list[Row] = []
    for batch in batches:
        volumes = _volumes(bundle, batch)
        rows += _race_batch(Work(bundle, checkpoint, volumes, threads), names, clock, budget_s, on_stage)
    finished = tuple(_with_floor(row, floors, bundle, multiply_adds) for row in rows)
    return GpuReport(datetime.date.today().isoformat(), machine(),
                     f"{gpu.name}, compute capability {gpu.compute_capability}, {gpu.memory_bytes / 2**30:.0f} GiB",
                     manifest.encoder, manifest.preprocessing.shape_dhw, multiply_adds, floors, finished)


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
        times, usual = _take_turns(running, clock, budget_s, lambda name: on_stage(
            f"batch {len(work.volumes)}, {name}"))
        first = next((name for name in running if np.isfinite(running[name].embeddings()).all()), next(iter(running)))
        exact = running[first].embeddings()
        for name, contender in running.items():
            on_stage(f"batch {len(work.volumes)}, {name}: throughput")
            sustained = clock.time_ms(contender, max(3, round(1e3 / usual[name])))
            found = contender.embeddings()
            if not np.isfinite(found).all():
                rows[name] = dataclasses.replace(rows[name], problem="its embeddings hold NaN or infinite values")
                continue
            rows[name] = dataclasses.replace(
                rows[name], runs=len(times[name]), median_ms=float(np.median(times[name])),
                p95_ms=float(np.percentile(times[name], 95)), p99_ms=float(np.percentile(times[name], 99)),
                scans_per_s=len(work.volumes) / sustained * 1e3,
                ratio=float(np.median(np.array(times[first]) / np.array(times[name]))),
                cosine=float((exact * found).sum(axis=1).min()))
    return list(rows.values())


def _load(name: str, work: Work, clock: Clock, stack: contextlib.ExitStack) -> tuple[Row, Contender | None]:
    free, start = clock.free_bytes(), time.perf_counter()
    row = Row(name, len(work.volumes))
    try:
        contender = stack.enter_context(open_contender(name, work))
    except DeviceLost:
        raise
    except (DcformerError, ImportError, RuntimeError) as error:  # PyTorch's and ONNX Runtime's own
        return dataclasses.replace(row, problem=one_line(f"{error}")[:500]), None
    own = contender.own_bytes()
    return dataclasses.replace(
        row, precision=contender.precision, description=contender.describe(), build_s=contender.build_s,
        load_ms=(time.perf_counter() - start) * 1e3, own_mb=own / 2**20 if own else None,
        device_mb=(free - clock.free_bytes()) / 2**20), contender


def _take_turns(running: dict[str, Contender], clock: Clock, budget_s: float,
                on_turn: Callable[[str], None]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds by contender, and what each usually takes."""
    for contender in running.values():
        clock.time_ms(contender, 3)
    usual = {name: max(clock.time_ms(contender, 2), 1e-3) for name, contender in running.items()}
    turns = int(np.clip(budget_s * 1e3 / (_REPEATS * sum(usual.values())), _LEAST_TURNS, _MOST_TURNS))
    times: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(turns):
        for name in running if turn % 2 else reversed(running):
            on_turn(f"{name}: {turn + 1} of {turns}")
            times[name] += [clock.time_ms(running[name]) for _ in range(_REPEATS)]
    return times, usual


def _with_floor(row: Row, floors: Floors, bundle: Bundle, multiply_adds: int) -> Row:
    if row.median_ms is None:
        return row
    floor = floor_ms(floors, bundle, row.precision, row.batch, multiply_adds)
    return dataclasses.replace(row, floor_ms=floor, to_floor=None if not floor else row.median_ms / floor)

"""Every encoder at one size in one run: random weights, exported by this project, in ONNX Runtime on the CPU.

The encoders do not fit in memory together, so they take turns by rounds: in each round every encoder starts a process
of its own, warms up, and is measured; the order turns round from one round to the next.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..export.complexity import count
from ..export.make_bundle import ExportOptions, export_random_weights
from ..export.registry import EncoderSpec, all_encoders, get_encoder
from ..runtime.errors import CheckFailed, DcformerError, InputError
from ..runtime.machine import machine
from ..runtime.manifest import MANIFEST_NAME
from .contenders import Entrant, Job, bundle
from .measure import Worker

ALL = "all"
_SEED = 0


@dataclass(frozen=True)
class EncoderMeasurement:
    """One encoder; figures are None where it could not run, and ``problem`` says why.

    ``volume_dhw``: of the asked size, or the nearest smaller one that the encoder's patches fill.
    ``gflops``: multiply-accumulates at that size, counted as published; ``gflop_per_s``: the same over the median
    latency. ``ratio``: how many times faster than the first encoder, the median over rounds. ``published_f1``: of
    zero-shot scores with the published weights, in percent.
    """

    encoder: str
    volume_dhw: tuple[int, int, int]
    params_m: float
    gflops: float
    published_f1: float | None
    runs: int = 0
    median_ms: float | None = None
    p95_ms: float | None = None
    cold_start_ms: float | None = None
    peak_rss_mb: float | None = None
    gflop_per_s: float | None = None
    ratio: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Survey:
    """A run over encoders and the machine that it ran on."""

    date: str
    machine: str
    threads: int
    backend: str
    size: int
    rounds: int
    encoders: tuple[EncoderMeasurement, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def choose_encoders(names: Sequence[str]) -> list[EncoderSpec]:
    """The encoders of these names; "all" stands for every one.

    Raises:
        InputError: unknown, or named twice.
    """
    chosen = [spec for name in names for spec in (all_encoders() if name == ALL else [get_encoder(name)])]
    twice = [spec.name for index, spec in enumerate(chosen) if spec in chosen[:index]]
    if twice or not chosen:
        raise InputError(f"--encoders: {twice[0]} is named twice" if twice else "--encoders: no name")
    return chosen


def fitting_size(spec: EncoderSpec, size: int) -> int:
    """The largest S up to ``size`` that the encoder takes.

    Raises:
        InputError: none.
    """
    fitting = size // spec.size_step * spec.size_step
    if fitting <= 0:
        raise InputError(f"--size {size}: {spec.name} takes multiples of {spec.size_step}")
    return fitting


def export_all(encoders: Sequence[EncoderSpec], size: int, folder: Path,
               on_stage: Callable[[str], None]) -> list[Path | CheckFailed]:
    """A bundle with random weights for each encoder in ``folder``; one that is there already is taken as it is.

    In place of a bundle whose graph differs from PyTorch there is the error.
    """
    bundles: list[Path | CheckFailed] = []
    for spec in encoders:
        fitting = fitting_size(spec, size)
        out = folder / f"{spec.name}-{fitting}"
        if not (out / MANIFEST_NAME).exists():
            on_stage(f"{spec.name}: exporting")
            try:
                export_random_weights(spec.name, _SEED, out, ExportOptions(tokenizer=None, input_size=fitting))
            except CheckFailed as error:
                bundles.append(error)
                continue
        bundles.append(out)
    return bundles


class _Turns:
    """What the rounds of one encoder gave."""

    def __init__(self, spec: EncoderSpec, size: int, made: Path | CheckFailed, threads: int) -> None:
        self.spec, self.size = spec, fitting_size(spec, size)
        self.shape = self.size // 2, self.size, self.size
        self.entrant = Entrant(spec.name, bundle.KIND, Job(str(made), None, threads))
        self.rounds: list[list[float]] = []
        self.cold_starts: list[float] = []
        self.peaks: list[float] = []
        self.backend = ""
        self.problem = str(made) if isinstance(made, CheckFailed) else ""

    def measure(self, runs: int) -> None:
        """One round: a process, a warm-up, ``runs`` measured inferences."""
        worker = Worker(self.entrant, self.shape)
        try:
            worker.run()
            latencies = [worker.run() for _ in range(runs)]
            self.peaks.append(worker.close())
        finally:
            worker.kill()
        self.rounds.append(latencies)
        self.cold_starts.append(worker.cold_start_ms)
        self.backend = worker.description

    def summary(self, first: _Turns) -> EncoderMeasurement:
        """The row of this encoder."""
        counted = count(self.spec, self.size)
        published = self.spec.published
        row = {"encoder": self.spec.name, "volume_dhw": self.shape, "params_m": counted.params / 1e6,
               "gflops": counted.multiply_accumulates / 1e9,
               "published_f1": published.zero_shot_f1 if published else None}
        if self.problem:
            return EncoderMeasurement(**row, problem=self.problem)
        latencies = np.concatenate(self.rounds)
        median = float(np.median(latencies))
        ratios = [np.median(theirs) / np.median(own) for theirs, own in zip(first.rounds, self.rounds, strict=False)]
        return EncoderMeasurement(
            **row, runs=len(latencies), median_ms=median, p95_ms=float(np.percentile(latencies, 95)),
            cold_start_ms=float(np.median(self.cold_starts)), peak_rss_mb=max(self.peaks),
            gflop_per_s=row["gflops"] / (median / 1e3), ratio=float(np.median(ratios)) if ratios else None,
        )


def survey(encoders: Sequence[EncoderSpec], size: int, bundles: Sequence[Path | CheckFailed], threads: int,
           rounds: int, runs: int, on_stage: Callable[[str], None] = lambda _: None) -> Survey:
    """Measure the encoders' bundles by rounds. An encoder that fails (most often for want of memory) gets a row too.

    Args:
        runs: measured inferences of each encoder in each round.
        on_stage: told what runs next; for progress display.
    """
    turns = [_Turns(spec, size, made, threads) for spec, made in zip(encoders, bundles, strict=True)]
    for number in range(rounds):
        for turn in turns if number % 2 == 0 else reversed(turns):
            if turn.problem:
                continue
            on_stage(f"{turn.spec.name}: round {number + 1} of {rounds}")
            try:
                turn.measure(runs)
            except DcformerError as error:
                turn.problem = str(error)
    return Survey(
        date=datetime.date.today().isoformat(), machine=machine(), threads=threads,
        backend=next((turn.backend for turn in turns if turn.backend), "nothing ran"), size=size, rounds=rounds,
        encoders=tuple(turn.summary(turns[0]) for turn in turns),
    )


def pareto_front(rows: Sequence[EncoderMeasurement]) -> list[EncoderMeasurement]:
    """Those that no other one beats in both latency and published F1, from fast to slow."""
    front: list[EncoderMeasurement] = []
    known = [row for row in rows if row.median_ms is not None and row.published_f1 is not None]
    for row in sorted(known, key=lambda row: (row.median_ms or math.inf, -(row.published_f1 or 0))):
        if not front or (row.published_f1 or 0) > (front[-1].published_f1 or 0):
            front.append(row)
    return front

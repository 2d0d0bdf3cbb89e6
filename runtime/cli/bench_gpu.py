"""``dcformer bench --device cuda``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..bundle import open_bundle
from ..errors import InputError
from ..files import require_writable_folder
from ..scan_files import ScanPath
from .output import print_json, print_table, progress

if TYPE_CHECKING:
    from ...benchmarks.gpu import GpuReport

LARGEST_BATCH = 64


def read_batches(text: str) -> list[int]:
    """Batch sizes from a list such as "1,4,8".

    Raises:
        InputError: no whole numbers, out of range, or one twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= LARGEST_BATCH for part in parts) or len(set(parts)) < len(parts):
        raise InputError(f"--batches {text!r}: expected whole numbers from 1 to {LARGEST_BATCH}, each once, such as "
                         "1,4,8")
    return [int(part) for part in parts]


def bench_gpu(bundle: Path, checkpoint: Path | None, against: str | None, batches: list[int], scan: ScanPath | None,
              runs: int, threads: int, seconds: float, out: Path | None, as_json: bool) -> None:
    """Engines beside PyTorch and ONNX Runtime on the GPU; then whole processes, for cold start and host latency."""
    from ...benchmarks.entrants import NIFTI_ALONE, Field, gpu_entrants
    from ...benchmarks.gpu.contenders import choose_names, let_go
    from ...benchmarks.gpu.race import race
    from ...benchmarks.gpu.report import (
        COLUMNS,
        PROCESS_COLUMNS,
        cells,
        problems,
        process_cells,
        title,
        to_dict,
        write_report,
    )
    from ...benchmarks.measure import measure

    opened = open_bundle(bundle)
    names = choose_names(opened, against)
    if out is not None:
        require_writable_folder(out)
    with progress() as display:
        def keep(known: GpuReport) -> None:
            if out is not None:
                write_report(known, None, out)

        report = race(opened, checkpoint, names, batches, threads, seconds, display.stage, keep)
        let_go()
        able = [row.name for row in report.rows if row.problem is None and row.batch == batches[0]]
        field = Field(bundle, checkpoint, threads, scan)
        if not field.suits_original:
            click.echo(f"warning: {NIFTI_ALONE}", err=True)
        entrants = gpu_entrants(able, field)
        processes = (measure(entrants, report.encoder, report.volume_dhw, runs, display.stage, keep_going=True)
                     if entrants else None)
    paths = write_report(report, processes, out) if out is not None else []
    if as_json:
        print_json(to_dict(report, processes))
        return
    print_table(title(report), COLUMNS, (cells(row) for row in report.rows if row.problem is None))
    if processes is not None:
        print_table("Each in a process of its own, " + ("from a preprocessed volume" if scan is None else
                                                        f"from {scan.name} to scores"),
                    PROCESS_COLUMNS, map(process_cells, processes.contenders))
    for problem in problems(report, processes):
        click.echo(f"not run: {problem}")
    for path in paths:
        click.echo(path)

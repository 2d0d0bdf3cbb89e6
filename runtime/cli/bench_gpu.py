"""``dcformer bench --device cuda``."""

from __future__ import annotations

from pathlib import Path

import click

from ..bundle import open_bundle
from ..errors import InputError
from ..files import require_writable_folder
from ..scan_files import ScanPath
from .output import print_json, print_table, progress

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


def bench_gpu(bundle: Path, checkpoint: Path | None, batches: list[int], scan: ScanPath | None, runs: int, threads: int,
              seconds: float, out: Path | None, as_json: bool) -> None:
    """Engines beside PyTorch and ONNX Runtime on the GPU; then whole processes, for cold start and host latency."""
    from ...benchmarks.entrants import NIFTI_ALONE, Field, gpu_entrants
    from ...benchmarks.gpu.contenders import let_go, names_of
    from ...benchmarks.gpu.race import race
    from ...benchmarks.gpu.report import (
        COLUMNS,
        PROCESS_COLUMNS,
        cells,
        process_cells,
        title,
        to_dict,
        write_report,
    )
    from ...benchmarks.measure import measure

    opened = open_bundle(bundle)
    if out is not None:
        require_writable_folder(out)
    with progress() as display:
        report = race(opened, checkpoint, names_of(opened), batches, threads, seconds, display.stage)
        if out is not None:
            write_report(report, None, out)  # kept, should a process fail below
        let_go()
        able = [row.name for row in report.rows if row.problem is None and row.batch == batches[0]]
        field = Field(bundle, checkpoint, threads, scan)
        if not field.suits_original:
            click.echo(f"warning: {NIFTI_ALONE}", err=True)
        entrants = gpu_entrants(able, field)
        processes = measure(entrants, report.encoder, report.volume_dhw, runs, display.stage) if entrants else None
    paths = write_report(report, processes, out) if out is not None else []
    if as_json:
        print_json(to_dict(report, processes))
        return
    print_table(title(report), COLUMNS, (cells(row) for row in report.rows if row.problem is None))
    if processes is not None:
        print_table("Each in a process of its own, " + ("from a preprocessed volume" if scan is None else
                                                        f"from {scan.name} to scores"),
                    PROCESS_COLUMNS, map(process_cells, processes.contenders))
    for row in report.rows:
        if row.problem is not None:
            click.echo(f"not run: {row.name}, batch {row.batch}: {row.problem}")
    for path in paths:
        click.echo(path)

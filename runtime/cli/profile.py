"""``dcformer profile``."""

from __future__ import annotations

from pathlib import Path

import click

from ..backends import Options
from ..backends.base import CPU_BACKENDS, MOST_THREADS
from ..manifest import PRECISIONS
from ..scan_files import ScanPath
from .options import SCAN, bundle_argument, json_option
from .output import print_json, print_table


@click.command("profile")
@bundle_argument
@click.option("--scan", type=SCAN, metavar="SCAN",
              help="Also score this scan and show the phases: reading, preprocessing, image tower, scores.")
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True, help="Measured inferences.")
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads; by default every usable core.")
@click.option("--backend", type=click.Choice(CPU_BACKENDS), default=CPU_BACKENDS[0], show_default=True,
              help="Inference library.")
@click.option("--precision", type=click.Choice(PRECISIONS), default=PRECISIONS[0], show_default=True,
              help="fp32, or what `dcformer calibrate` added; bf16: openvino computing in bfloat16.")
@click.option("--top", type=click.IntRange(min=1), default=12, show_default=True, help="Operators to show.")
@json_option
def command(bundle: Path, scan: ScanPath | None, runs: int, threads: int | None, backend: str, precision: str, top: int,
            as_json: bool) -> None:
    """Show where the time of BUNDLE's image tower goes, operator by operator, on this CPU."""
    from ...benchmarks.profile import profile

    report = profile(bundle, Options(threads=threads, backend=backend, precision=precision), runs, scan)
    if as_json:
        print_json(report.to_dict())
        return
    if report.phases_ms:
        total = report.phases_ms["total"]
        print_table(f"{scan}, file to scores; {report.machine}; {report.backend}", ("phase", "median ms", "share"),
                    ((name, f"{ms:.1f}", f"{ms / total:.0%}") for name, ms in report.phases_ms.items()))
    shown, rest = report.operators[:top], report.operators[top:]
    rows = [(row.operator, f"{row.count:g}", f"{row.ms:.1f}", f"{row.ms / report.total_ms:.0%}") for row in shown]
    if rest:
        ms = sum(row.ms for row in rest)
        rows.append((f"{len(rest)} other kinds", f"{sum(row.count for row in rest):g}", f"{ms:.1f}",
                     f"{ms / report.total_ms:.0%}"))
    print_table(f"Image tower, {report.total_ms:.0f} ms in operators; {report.machine}; {report.backend}",
                ("operator", "times", "ms", "share"), rows)

"""A GPU benchmark as people paste it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ...runtime.cli.output import markdown_table
from ...runtime.files import atomic_file
from ...runtime.report.page import Section, write_tables
from ..measure import Measurement, Report
from . import GpuReport, Row

COLUMNS = ("", "batch", "median ms", "p95 ms", "p99 ms", "times the first", "scans/s", "times its floor", "own MB",
           "device MB", "peak MB", "build s", "load ms", "cosine")
PROCESS_COLUMNS = ("", "median ms", "p95 ms", "times the first", "cold start ms", "peak RSS MB")


def process_cells(measured: Measurement) -> list[str]:
    """The texts of one row under ``PROCESS_COLUMNS``."""
    return [measured.name, f"{measured.median_ms:.1f}", f"{measured.p95_ms:.1f}", f"{measured.ratio:.2f}",
            f"{measured.cold_start_ms:.0f}", f"{measured.peak_rss_mb:.0f}"]


def cells(row: Row) -> list[str]:
    """The texts of one row under ``COLUMNS``."""

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    return [row.name, str(row.batch), number(row.median_ms, 2), number(row.p95_ms, 2), number(row.p99_ms, 2),
            number(row.ratio, 2), number(row.scans_per_s, 1), number(row.to_floor, 1), number(row.own_mb, 0),
            number(row.device_mb, 0), number(row.peak_mb, 0), number(row.build_s, 1), number(row.load_ms, 0),
            number(row.cosine, 5)]


def title(report: GpuReport) -> str:
    """What was measured, where and when."""
    size = "x".join(map(str, report.volume_dhw))
    return f"{report.encoder}, volumes {size}; {report.gpu}; {report.machine}; {report.date}"


def problems(report: GpuReport, processes: Report | None) -> list[str]:
    """What could not run, and why."""
    found = [f"{row.name}, batch {row.batch}: {row.problem}" for row in report.rows if row.problem is not None]
    apart = processes.left_out if processes is not None else ()
    return found + [f"{name}, in a process of its own: {why}" for name, why in apart]


def markdown(report: GpuReport, processes: Report | None) -> str:
    """The tables, the floors, and what could not run."""
    ran = [cells(row) for row in report.rows if row.problem is None]
    lines = [f"{title(report)}.", "", *markdown_table(COLUMNS, ran)]
    lines += ["", _floors(report), ""]
    if processes is not None:
        lines += [f"{_work(processes)}, the host's time:", "", *markdown_table(
            PROCESS_COLUMNS, [process_cells(measured) for measured in processes.contenders]), ""]
    lines += [f"- {problem}" for problem in problems(report, processes)]
    return "\n".join(lines).rstrip() + "\n"


def _floors(report: GpuReport) -> str:
    rates = ", ".join(f"{name} {rate / 1e12:.0f} T/s" for name, rate in report.floors.multiply_adds_per_s.items())
    return ("One process, by turns; times between events of the stream, inputs on the device. Floors: a copy on the "
            f"device moves {report.floors.copy_bytes_per_s / 1e9:,.0f} GB/s; multiply-adds of a matrix product: "
            f"{rates or 'not measured, as PyTorch has no CUDA here'}; one volume needs "
            f"{report.multiply_adds / 1e9:.1f} G multiply-adds.")


def _work(processes: Report) -> str:
    what = "a preprocessed volume to the embedding" if processes.scan is None else "a scan to scores"
    return f"Each in a process of its own, batch 1, from {what}"


def write_report(report: GpuReport, processes: Report | None, folder: Path) -> list[Path]:
    """Write ``GPU-ENCODER.md``, ``.json`` and ``.html``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub("[^a-z0-9]+", "-", report.gpu.split(",")[0].lower().replace("nvidia", "")).strip("-")
    paths = [folder / f"{device}-{report.encoder}.{suffix}" for suffix in ("md", "json", "html")]
    with atomic_file(paths[0]) as path:
        path.write_text(markdown(report, processes), encoding="utf-8")
    with atomic_file(paths[1]) as path:
        path.write_text(json.dumps(to_dict(report, processes), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    sections = [Section("On the device", COLUMNS, [cells(row) for row in report.rows if row.problem is None],
                        [_floors(report), *problems(report, processes)], COLUMNS.index("median ms"))]
    if processes is not None:
        sections.append(Section(f"{_work(processes)}, the host's time", PROCESS_COLUMNS,
                                [process_cells(one) for one in processes.contenders], bars=1))
    facts = [("encoder", report.encoder), ("volumes", "x".join(map(str, report.volume_dhw))), ("GPU", report.gpu),
             ("machine", report.machine), ("date", report.date)]
    write_tables(paths[2], "Engines on a GPU", facts, sections)
    return paths


def to_dict(report: GpuReport, processes: Report | None) -> dict[str, Any]:
    """For JSON."""
    return {**report.to_dict(), "processes": None if processes is None else processes.to_dict()}

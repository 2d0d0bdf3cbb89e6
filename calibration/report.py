"""Retention as people paste it: Markdown, JSON, and a plot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from ..runtime.cli.output import markdown_table
from ..runtime.files import atomic_file
from ..runtime.report.page import Section, write_tables
from .retention import Kept, Retention

COLUMNS = ("precision", "cosine, mean", "cosine, worst", "codes equal", "scores differ, mean", "scores differ, most",
           "AUROC, mean", "AUROC, worst finding")
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def cells(name: str, kept: Kept) -> list[str]:
    """The texts of one row under ``COLUMNS``."""
    mean = kept.auroc_delta_mean
    shown = "-"
    if mean is not None and mean.value is not None:
        interval = f" [{mean.low:+.4f}, {mean.high:+.4f}]" if mean.low is not None else ""
        shown = f"{mean.value:+.4f}{interval}"
    worst = kept.auroc_delta_worst
    return [name, f"{kept.cosine_mean:.6f}", f"{kept.cosine_min:.6f}",
            "-" if kept.codes_equal is None else f"{kept.codes_equal:.2%}",
            "-" if kept.score_mean is None else f"{kept.score_mean:.4f}",
            "-" if kept.score_max is None else f"{kept.score_max:.4f}", shown,
            "-" if worst is None else f"{worst:+.4f}"]


def title(found: Retention) -> str:
    """What was compared, where."""
    auroc = "" if found.auroc is None else f", mean AUROC {found.auroc:.4f} in fp32"
    return f"{found.bundle} against its own fp32 on {found.scans} scans of {found.dataset}{auroc}; {found.machine}"


def markdown(found: Retention, layers: int = 10) -> str:
    """Tables with what the columns mean, and the noisiest activations."""
    rows = [cells(name, kept) for name, kept in found.precisions.items()]
    lines = [f"{title(found)}.", "", *markdown_table(COLUMNS, rows)]
    lines += ["", "AUROC: less that of fp32, with the 95 % interval of the paired bootstrap over scans."]
    lines += [f"{name}: {kept.backend}." for name, kept in found.precisions.items()]
    classes = next((list(kept.auroc_delta) for kept in found.precisions.values() if kept.auroc_delta), [])
    if classes:
        rows = [[finding, *(_estimate(kept, finding) for kept in found.precisions.values())] for finding in classes]
        lines += ["", *markdown_table(("AUROC less fp32's", *found.precisions), rows)]
    for name, kept in found.precisions.items():
        if kept.layers:
            rows = [[entry.activation, entry.operator, f"{entry.sqnr_db:.1f}"] for entry in kept.layers[:layers]]
            lines += ["", *markdown_table((f"noisiest activations, {name}", "made by", "SQNR, dB"), rows)]
    lines += ["", *(f"Left out: {text}" for text in found.failed)]
    return "\n".join(lines).rstrip() + "\n"


def _estimate(kept: Kept, finding: str) -> str:
    estimate = kept.auroc_delta[finding]
    if estimate.value is None:
        return "not defined"
    interval = f" [{estimate.low:+.4f}, {estimate.high:+.4f}]" if estimate.low is not None else ""
    return f"{estimate.value:+.4f}{interval}"


def write_report(found: Retention, folder: Path) -> list[Path]:
    """Write ``retention.md``, ``.json``, ``.html`` and, with labels, ``.png``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"retention.{suffix}" for suffix in ("md", "json", "html")]
    with atomic_file(paths[0]) as path:
        path.write_text(markdown(found), encoding="utf-8")
    with atomic_file(paths[1]) as path:
        path.write_text(json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    picture = None
    if any(kept.auroc_delta for kept in found.precisions.values()):
        paths.append(folder / "retention.png")
        with atomic_file(paths[3]) as path:
            draw(found).savefig(path, dpi=160)
        picture = paths[3].read_bytes()
    write_tables(paths[2], "What lower precisions keep", _facts(found), list(_sections(found, picture)))
    return paths


def _facts(found: Retention) -> list[tuple[str, str]]:
    facts = [("bundle", found.bundle), ("data set", found.dataset), ("scans", str(found.scans)),
             ("machine", found.machine), ("against", "the bundle's own fp32")]
    return facts + ([] if found.auroc is None else [("mean AUROC in fp32", f"{found.auroc:.4f}")])


def _sections(found: Retention, picture: bytes | None) -> Iterator[Section]:
    notes = ["AUROC: less that of fp32, with the 95 % interval of the paired bootstrap over scans.",
             *(f"{name}: {kept.backend}." for name, kept in found.precisions.items()),
             *([f"Left out: {len(found.failed)} scans that could not be read."] if found.failed else [])]
    yield Section("Against fp32", COLUMNS, [cells(name, kept) for name, kept in found.precisions.items()], notes)
    classes = next((list(kept.auroc_delta) for kept in found.precisions.values() if kept.auroc_delta), [])
    if classes:
        rows = [[finding, *(_estimate(kept, finding) for kept in found.precisions.values())] for finding in classes]
        yield Section("AUROC less fp32's, by finding", ("finding", *found.precisions), rows, picture=picture)
    for name, kept in found.precisions.items():
        if kept.layers:
            yield Section(f"Noise of activations, {name}", ("activation", "made by", "SQNR, dB"),
                          [[entry.activation, entry.operator, f"{entry.sqnr_db:.1f}"] for entry in kept.layers], bars=2)


def draw(found: Retention) -> Figure:
    """AUROC less fp32's, by finding and precision, with intervals."""
    findings = list(next(iter(found.precisions.values())).auroc_delta)
    figure = Figure(figsize=(8.4, 0.36 * len(findings) + 1.8), layout="constrained")
    axes = figure.subplots()
    step = 0.7 / max(1, len(found.precisions))
    for index, (name, kept) in enumerate(found.precisions.items()):
        shown = [(row, e.value, e.low, e.high) for row, e in enumerate(kept.auroc_delta.values())
                 if e.value is not None and e.low is not None and e.high is not None]
        rows = [row + (index - (len(found.precisions) - 1) / 2) * step for row, *_ in shown]
        values = [value for _, value, _, _ in shown]
        # A percentile interval may leave its own point estimate outside; bars cannot have negative lengths.
        lengths = [[max(0.0, v - low) for _, v, low, _ in shown], [max(0.0, high - v) for _, v, _, high in shown]]
        axes.errorbar(values, rows, xerr=lengths, fmt="o", markersize=4, linewidth=1.2,
                      color=_COLOURS[index % len(_COLOURS)], label=name)
    axes.axvline(0, color="#222222", linewidth=0.8)
    axes.set_yticks(range(len(findings)), findings)
    axes.invert_yaxis()
    axes.set_xlabel("AUROC less that of fp32 (95 % interval, paired bootstrap)")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    axes.set_title(f"What lower precisions keep: {found.scans} scans", loc="left", fontsize=12)
    figure.supxlabel(f"{found.bundle}, {found.dataset}; {found.machine}", fontsize=8, color="#555555", x=0.01,
                     ha="left")
    return figure

"""A survey as people paste it: Markdown, CSV, JSON, and the plot of published F1 against measured latency."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from adjustText import adjust_text
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..runtime.cli.output import markdown_table
from ..runtime.files import atomic_file
from ..runtime.report.page import Section, write_tables
from .survey import EncoderMeasurement, Survey, pareto_front

COLUMNS = ("encoder", "volume", "median ms", "p95 ms", "peak MB", "params (M)", "GFLOPs", "GFLOP/s", "F1 (%)")
_COLUMNS_EXPLAINED = (
    "GFLOPs are multiply-accumulates as published, at the volume stated; parameters are the encoder's alone. F1: "
    "published, zero-shot, at 512x512x256 with the published weights.")
#: Colour-blind safe (Okabe and Ito), one for each family; the front of DCFormer is what readers look for.
_COLOURS = {"dcformer": "#D55E00", "convnext": "#0072B2", "poolformer": "#009E73", "transunet": "#CC79A7",
            "vit": "#E69F00", "ctvit": "#56B4E9"}
_OTHER = "#666666"


def cells(row: EncoderMeasurement) -> list[str]:
    """The texts of one row under ``COLUMNS``."""
    depth, height, width = row.volume_dhw

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    return [row.encoder, f"{height}x{width}x{depth}", number(row.median_ms, 0), number(row.p95_ms, 0),
            number(row.peak_rss_mb, 0), number(row.params_m, 2), number(row.gflops, 2), number(row.gflop_per_s, 1),
            number(row.published_f1, 1)]


def title(survey: Survey) -> str:
    """What was measured, where and when."""
    return (f"Image towers at {survey.size}x{survey.size}x{survey.size // 2}, batch 1, random weights, "
            f"{survey.backend}; {survey.machine}; {survey.date}")


def markdown(survey: Survey) -> str:
    """A table with its caption and what the columns mean."""
    front = {row.encoder for row in pareto_front(survey.encoders)}
    rows = [cells(row) for row in survey.encoders]
    for texts in rows:
        if texts[0] in front:
            texts[0] = f"**{texts[0]}**"
    lines = [f"{title(survey)}.", "", *markdown_table(COLUMNS, rows)]
    lines += ["", f"Medians over {survey.rounds} rounds, each encoder in a process of its own. {_COLUMNS_EXPLAINED} "
              "Bold: no other encoder is both faster and better."]
    lines += [f"{row.encoder}: {row.problem}" for row in survey.encoders if row.problem]
    return "\n".join(lines) + "\n"


def write_report(survey: Survey, folder: Path) -> list[Path]:
    """Write ``encoders-SIZE.md``, ``.csv``, ``.json``, ``.png`` and ``.html``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"encoders-{survey.size}.{suffix}" for suffix in ("md", "csv", "json", "png", "html")]
    with atomic_file(paths[0]) as path:
        path.write_text(markdown(survey), encoding="utf-8")
    with atomic_file(paths[1]) as path, path.open("w", newline="", encoding="utf-8") as file:
        rows = survey.to_dict()["encoders"]
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "volume_dhw": "x".join(map(str, row["volume_dhw"]))} for row in rows)
    with atomic_file(paths[2]) as path:
        path.write_text(json.dumps(survey.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_file(paths[3]) as path:
        draw(survey).savefig(path, dpi=160)
    front = ", ".join(row.encoder for row in pareto_front(survey.encoders))
    notes = [_COLUMNS_EXPLAINED, f"No other encoder is both faster and better: {front or 'none'}.",
             *(f"{row.encoder}: {row.problem}" for row in survey.encoders if row.problem)]
    facts = [("volumes", f"{survey.size}x{survey.size}x{survey.size // 2}, batch 1, random weights"),
             ("back end", survey.backend), ("machine", survey.machine), ("date", survey.date),
             ("rounds", str(survey.rounds))]
    section = Section("Encoders", COLUMNS, [cells(row) for row in survey.encoders], notes, COLUMNS.index("median ms"),
                      paths[3].read_bytes())
    write_tables(paths[4], "3D CT encoders", facts, [section])
    return paths


def draw(survey: Survey) -> Figure:
    """Published F1 against measured latency, the area of a point by its parameters, with the Pareto front."""
    figure = Figure(figsize=(9.6, 5.8), layout="constrained")
    axes = figure.subplots()
    shown = [(row, row.median_ms, row.published_f1) for row in survey.encoders
             if row.median_ms is not None and row.published_f1 is not None]
    front = {row.encoder for row in pareto_front(survey.encoders)}
    edge = sorted((latency, f1) for row, latency, f1 in shown if row.encoder in front)
    axes.plot(*zip(*edge, strict=True), color="#222222", linewidth=1.2, linestyle="--", zorder=1) if edge else None
    for row, latency, f1 in shown:
        colour = _COLOURS.get(row.encoder.split("-")[0], _OTHER)
        axes.scatter(latency, f1, s=30 + 9 * row.params_m, color=colour, alpha=0.85, edgecolor="white", zorder=2)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms / 1e3:g} s" if ms >= 1e3 else f"{ms:g} ms"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="median latency of one volume (faster to the left)",
             ylabel="zero-shot F1 published at 512x512x256 (%)")
    axes.margins(0.12)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    labels = [axes.text(latency, f1, row.encoder, fontsize=9, fontweight="bold" if row.encoder in front else "normal",
                        color=_COLOURS.get(row.encoder.split("-")[0], _OTHER)) for row, latency, f1 in shown]
    adjust_text(labels, [x for _, x, _ in shown], [y for _, _, y in shown], ax=axes, expand=(1.25, 1.5),
                arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6})
    size = f"{survey.size}x{survey.size}x{survey.size // 2}"
    axes.set_title(f"3D CT encoders at {size}: published F1 against measured latency", loc="left", fontsize=12)
    figure.supxlabel(f"{survey.backend}; {survey.machine}; {survey.date}. Random weights. Area: parameters. Dashed: "
                     "Pareto front (bold names).", fontsize=8, color="#555555", x=0.01, ha="left")
    return figure

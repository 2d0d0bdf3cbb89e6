"""Sensitivity as people paste it: Markdown, JSON, and the curve."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from ..runtime.cli.output import markdown_table
from ..runtime.files import atomic_file
from .sensitivity import Damage, Sensitivity, Step

COLUMNS = ("layer alone in INT8", "multiply-adds", "cosine", "features, SQNR dB")
STEP_COLUMNS = ("back to float", "multiply-adds in INT8", "kept")


def cells(damage: Damage) -> list[str]:
    """The texts of a row under ``COLUMNS``."""
    return [damage.layer, f"{damage.share:.1%}", f"{damage.cosine:.5f}", f"{damage.sqnr_db:.1f}"]


def step_cells(step: Step) -> list[str]:
    """The texts of a row under ``STEP_COLUMNS``."""
    return [step.back or "(all in INT8)", f"{step.share:.1%}", f"{step.kept:+.5f}"]


def write_report(found: Sensitivity, folder: Path) -> list[Path]:
    """Write ``sensitivity.md``, ``.json`` and ``.png`` in ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"sensitivity.{suffix}" for suffix in ("md", "json", "png")]
    lines = [f"{found.scans} scans.", "", *markdown_table(COLUMNS, [cells(damage) for damage in found.layers]), "",
             f"The most INT8 with a {found.promise}:", "",
             *markdown_table(STEP_COLUMNS, [step_cells(step) for step in found.steps])]
    with atomic_file(paths[0]) as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with atomic_file(paths[1]) as path:
        path.write_text(json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_file(paths[2]) as path:
        draw(found).savefig(path, dpi=160)
    return paths


def draw(found: Sensitivity) -> Figure:
    """Left: noise by layer alone. Right: what is kept against the share of multiply-adds in INT8."""
    figure = Figure(figsize=(10.5, 0.3 * len(found.layers) + 2.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [damage.layer.split("encoder.")[-1] for damage in found.layers]
    left.barh(range(len(names)), [damage.sqnr_db for damage in found.layers], color="#0072B2", height=0.7)
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    left.set(xlabel="signal to noise of the features, dB (less is worse)", title="Each layer alone in INT8")
    right.plot([step.share * 100 for step in found.steps], [step.kept for step in found.steps], "o-", color="#D55E00",
               markersize=4)
    right.set(xlabel="multiply-adds in INT8, %", ylabel="kept", title=f"Until a {found.promise}")
    for axes in (left, right):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure

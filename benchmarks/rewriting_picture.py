"""The picture of docs/rewriting.md: ``python -m dcformer_deploy.benchmarks.rewriting_picture docs/rewriting.png``."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from ..runtime.files import atomic_file

_STRIDE, _REACH, _SHOWN = 4, 3, 13
_READ, _CENTRE, _IDLE, _LINE, _INK = "#0072B2", "#D55E00", "#f1f3f5", "#cfe3f2", "#1b1f24"


def draw() -> Figure:
    """What layer 1 reads, and the stem's first two layers before and after ``compose_stem`` and ``merge_branches``."""
    figure = Figure(figsize=(12.5, 4.4), layout="constrained")
    voxels, before, after = figure.subplots(1, 3, width_ratios=[1.05, 1, 1])
    _draw_voxels(voxels)
    _draw_layers(before, "as published: 28.3 k multiply-adds a position", [
        ("voxels", "1 channel", _LINE), ("layer 1: 7 + 7 + 7 taps", "3 sums added: 32 channels", "#fde3d3"),
        ("layer 2: 3 + 3 + 3 taps, thrice the centre", "32 x 9 x 32, three biases", "#fde3d3")])
    _draw_layers(after, "rewritten: 18.8 k multiply-adds a position", [
        ("lines of voxels", "15.6 % of the volume", _LINE),
        ("19 voxels of the star, and a 1", "gathered: 20 channels", "#dff0e8"),
        ("layer 2 after layer 1: 7 taps, each once", "20 x 7 x 32 and the bias", "#dff0e8")])
    return figure


def _draw_voxels(axes: Axes) -> None:
    """A plane of the volume: lines that are kept, and the star of one position."""
    middle = 6
    for row in range(_SHOWN):
        for column in range(_SHOWN):
            kept = row % _STRIDE == middle % _STRIDE or column % _STRIDE == middle % _STRIDE
            star = middle in (row, column) and max(abs(row - middle), abs(column - middle)) <= _REACH
            colour = _READ if star else _LINE if kept else _IDLE
            colour = _CENTRE if (row, column) == (middle, middle) else colour
            axes.add_patch(Rectangle((column, row), 0.92, 0.92, color=colour, linewidth=0))
    axes.set(xlim=(-0.2, _SHOWN + 0.2), ylim=(_SHOWN + 0.2, -0.2), aspect="equal")
    axes.set_axis_off()
    axes.set_title("a plane of the volume", fontsize=11)
    axes.text(_SHOWN / 2, _SHOWN + 1.1, "dark: what layer 1 reads at one position (19 with the third axis)\n"
              "pale: lines that some position reads; grey: voxels that none does", ha="center", va="top", fontsize=8.5,
              color=_INK)


def _draw_layers(axes: Axes, title: str, boxes: list[tuple[str, str, str]]) -> None:
    axes.set(xlim=(0, 10), ylim=(0, 10))
    axes.set_axis_off()
    axes.set_title(title, fontsize=11)
    for index, (name, detail, colour) in enumerate(boxes):
        bottom = 7.2 - 3.2 * index
        axes.add_patch(FancyBboxPatch((0.6, bottom), 8.8, 1.9, boxstyle="round,pad=0.1", facecolor=colour,
                                      edgecolor="#8c959f", linewidth=0.8))
        axes.text(5, bottom + 1.25, name, ha="center", va="center", fontsize=9.5, color=_INK)
        axes.text(5, bottom + 0.55, detail, ha="center", va="center", fontsize=8.5, color="#57606a")
        if index:
            axes.annotate("", (5, bottom + 2.05), (5, bottom + 3.05),
                          arrowprops={"arrowstyle": "-|>", "color": "#57606a"})


@click.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
def command(out: Path) -> None:
    """Draw it into OUT."""
    with atomic_file(out) as path:
        draw().savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(command())

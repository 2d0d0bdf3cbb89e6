"""Score phantoms and show the answer beside the truth: ``python -m …demo BUNDLE DATASET --picture FILE.png``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import click
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ...runtime import Model, load
from ...runtime.cli.output import print_table
from ...runtime.errors import DcformerError
from ...runtime.files import atomic_file
from ...runtime.manifest import CT_RATE_CLASSES
from ...runtime.volume import read_nifti
from ..evaluation.dataset import Case, Tables, read_dataset
from .contact_sheet import LUNG_WINDOW, MEDIASTINAL_WINDOW

_PRESENT, _ABSENT = "#c44e52", "#8c9bb0"


def draw(case: Case, scores: dict[str, float]) -> Figure:
    """Axial and coronal slices through the middle in two windows, and the scores, coloured by the truth."""
    volume = read_nifti(case.path)
    hounsfield = volume.hounsfield(volume.stored)
    _, width, depth = hounsfield.shape
    sx, sy, sz = volume.spacing_hwd_mm
    slices: tuple[tuple[str, NDArray[np.float32], float, Literal["upper", "lower"]], ...] = (
        ("axial", hounsfield[:, :, depth // 2].T, sy / sx, "upper"),
        ("coronal", hounsfield[:, width // 2, :].T, sz / sx, "lower"))
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    axes = figure.subplot_mosaic([["a0", "b0", "bars"], ["a1", "b1", "bars"]], width_ratios=[1, 1, 1.25])
    for row, (name, plane, aspect, origin) in enumerate(slices):
        for column, (window_name, window) in enumerate((("lung", LUNG_WINDOW), ("mediastinal", MEDIASTINAL_WINDOW))):
            _show(axes["ab"[column] + str(row)], plane, aspect, origin, window, f"{name}, {window_name} window")
    ranked = sorted(scores, key=scores.__getitem__)
    truth = {name for name, present in zip(scores, case.labels, strict=True) if present}
    bars = axes["bars"]
    bars.barh(ranked, [scores[name] for name in ranked],
              color=[_PRESENT if name in truth else _ABSENT for name in ranked])
    bars.axvline(0.5, color="black", linewidth=0.8)
    bars.set(xlim=(0, 1), xlabel="zero-shot score", title="red: present in this phantom; grey: absent")
    bars.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{case.name}: a synthetic chest, not a patient")
    return figure


def _show(axes: Axes, plane: NDArray[np.float32], aspect: float, origin: Literal["upper", "lower"],
          window: tuple[int, int], title: str) -> None:
    centre, width = window
    axes.imshow(plane, cmap="gray", vmin=centre - width / 2, vmax=centre + width / 2, aspect=aspect, origin=origin)
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()


def _print(case: Case, scores: dict[str, float]) -> None:
    truth = dict(zip(scores, case.labels, strict=True))
    rows = ((name, "present" if truth[name] else "-", f"{score:.3f}",
             "" if truth[name] == (score > 0.5) else "missed" if truth[name] else "false alarm")
            for name, score in sorted(scores.items(), key=lambda item: -item[1]))
    print_table(str(case.path), ("finding", "truth", "score", "rounded at 0.5"), rows)


def show(model: Model, case: Case, picture: Path | None) -> None:
    """Print the table of one phantom and draw its picture."""
    scores = model.zero_shot(case.path).scores
    _print(case, scores)
    if picture is not None:
        with atomic_file(picture) as temporary:
            draw(case, scores).savefig(temporary, dpi=110)
        click.echo(f"picture: {picture}")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--picture", type=click.Path(path_type=Path), metavar="FILE.png", help="Of the first phantom.")
def main(bundle: Path, dataset: Path, picture: Path | None) -> None:
    """Score the phantoms of DATASET with BUNDLE and print scores beside the truth."""
    try:
        model = load(bundle)
        for index, case in enumerate(read_dataset(dataset, CT_RATE_CLASSES, Tables())):
            show(model, case, picture if index == 0 else None)
    except DcformerError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

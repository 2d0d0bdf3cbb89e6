"""A picture of every finding, lung and mediastinal window side by side: ``python -m …contact_sheet --out FILE.png``."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ...runtime.files import atomic_file
from ...runtime.manifest import CT_RATE_CLASSES
from .acquisition import Protocol, acquire
from .anatomy import Patient, build_scene
from .findings import PAINTERS, enlarge_heart

#: Centre and width in HU, as radiologists set them.
LUNG_WINDOW, MEDIASTINAL_WINDOW = (-600, 1500), (40, 400)
_TILE, _CAPTION, _GAP = 300, 24, 8


def draw_sheet(seed: int) -> Image.Image:
    """Eighteen pairs of slices, three pairs to a row, each through the middle of what was drawn."""
    columns = 3
    rows = -(-len(CT_RATE_CLASSES) // columns)
    width, height = columns * 2 * (_TILE + _GAP), rows * (_TILE + _CAPTION + _GAP)
    sheet = Image.new("L", (width, height), 0)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for index, name in enumerate(CT_RATE_CLASSES):
        row, column = divmod(index, columns)
        left, top = column * 2 * (_TILE + _GAP), row * (_TILE + _CAPTION + _GAP)
        axial, detail = _slice_with(name, np.random.default_rng([seed, index]))
        pen.text((left + 4, top + 3), f"{name}: {detail}"[:82], fill=255, font=font)
        for place, window in enumerate((LUNG_WINDOW, MEDIASTINAL_WINDOW)):
            sheet.paste(_tile(axial, window), (left + place * (_TILE + _GAP), top + _CAPTION))
    return sheet


def _slice_with(name: str, rng: np.random.Generator) -> tuple[NDArray[np.int16], str]:
    """The axial slice [X, Y] where painting one finding changed most, and the painter's words."""
    patient = Patient.draw(rng)
    if name == "Cardiomegaly":
        patient = enlarge_heart(patient, rng)
    protocol = Protocol.draw(patient, rng, 1.2)
    scene = build_scene(patient, protocol.grid, rng)
    before = np.clip(scene.canvas.hu, -1000, 400)
    drawn = PAINTERS[name](scene, rng)
    change = np.abs(np.clip(scene.canvas.hu, -1000, 400) - before).sum(axis=(0, 1))
    heart_slice = np.argmin(np.abs(scene.canvas.z.ravel() - patient.heart_centre[2]))
    index = int(change.argmax()) if change.any() else int(heart_slice)
    return acquire(scene, protocol, rng)[:, :, index], drawn.detail


def _tile(axial: NDArray[np.int16], window: tuple[int, int]) -> Image.Image:
    centre, width = window
    grey = np.clip((axial.astype(np.float32) - (centre - width / 2)) / width, 0, 1) * 255
    # x grows to the patient's left, which radiology shows on the right: the array as it is, rows along y.
    return Image.fromarray(grey.T.astype(np.uint8)).resize((_TILE, _TILE), Image.Resampling.LANCZOS)


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FILE.png")
@click.option("--seed", default=7, show_default=True)
def main(out: Path, seed: int) -> None:
    """Draw the contact sheet of docs/phantom.md."""
    with atomic_file(out) as temporary:
        draw_sheet(seed).save(temporary)
    click.echo(out)


if __name__ == "__main__":
    main()

"""Does the occlusion of `dcformer report` point at the finding? On phantoms, whose findings have known places.

``python -m dcformer_deploy.benchmarks.phantom.occlusion BUNDLE``: each phantom has one finding; of those that the model
scores above one half, the share whose strongest block touches the finding, beside the share of blocks that do, which is
what chance would give.
"""

from __future__ import annotations

import datetime
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from ...runtime import Model, load
from ...runtime.cli.output import markdown_table, progress
from ...runtime.files import atomic_file
from ...runtime.machine import machine
from ...runtime.occlusion import Occlusion, occlude
from .dataset import DatasetOptions, Phantom, make_variants, write_nifti
from .samples import PLACE_CELL, gather_places

#: Findings that lie in one place or a few; the others are spread over the lungs, or change the anatomy.
FOCAL = ("Medical material", "Pericardial effusion", "Hiatal hernia", "Lymphadenopathy", "Atelectasis", "Lung nodule",
         "Lung opacity", "Pleural effusion", "Consolidation")


@dataclass(frozen=True)
class Pointing:
    """One finding.

    ``found``: of the phantoms, those scored above one half. ``strongest``, ``among_three``: of these, how often the
    strongest block, or one of the three strongest, touches it. ``chance``: mean share of blocks that do.
    """

    finding: str
    phantoms: int
    found: int
    strongest: int
    among_three: int
    chance: float


def measure(model: Model, finding: str, count: int, seed: int) -> Pointing:
    """Paint ``count`` phantoms with the finding alone, and hide their blocks one by one."""
    found = strongest = among_three = 0
    shares = []
    options = DatasetOptions(count=count, seed=seed, findings=[finding])
    for index in range(count):
        phantom = next(make_variants(options, index, locate=True))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "phantom.nii"
            write_nifti(phantom, path)
            seen = occlude(model, model.prepare(path))
        touched = _touched(model, phantom, finding, seen)
        if seen.scores[seen.classes.index(finding)] <= 0.5 or not touched.any():
            continue
        found += 1
        blocks = [touched[place] for place, _ in seen.strongest(finding, 3)]
        strongest, among_three = strongest + bool(blocks[0]), among_three + any(blocks)
        shares.append(float(touched.mean()))
    return Pointing(finding, count, found, strongest, among_three, float(np.mean(shares)) if shares else 0.0)


def _touched(model: Model, phantom: Phantom, finding: str, seen: Occlusion) -> NDArray[np.bool_]:
    """Whether the finding changed anything in each block, ``[D', H', W']``."""
    spec = model.manifest.preprocessing
    depth, height, width = spec.shape_dhw
    places = gather_places(phantom.places[finding], phantom.grid.spacing_mm, spec, (0, 0, 0), (height, width, depth))
    cells = places.transpose(2, 0, 1)  # (H, W, D) to (D, H, W)
    parts = [side // PLACE_CELL for side in seen.block_dhw]
    split = [n for side, part in zip(cells.shape, parts, strict=True) for n in (side // part, part)]
    return np.asarray(cells.reshape(split).any(axis=(1, 3, 5)))


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--n", "count", type=click.IntRange(1), default=6, show_default=True, help="Phantoms of each finding.")
@click.option("--seed", type=int, default=7000, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Write occlusion.md and .json there.")
def command(bundle: Path, count: int, seed: int, out: Path | None) -> None:
    """Measure how often the strongest block touches the finding."""
    model = load(bundle)
    rows = []
    with progress(len(FOCAL)) as display:
        for finding in FOCAL:
            display.stage(finding)
            rows.append(measure(model, finding, count, seed))
            display.advance()
    phantoms, found, strongest, among_three = (
        sum(getattr(row, name) for row in rows) for name in ("phantoms", "found", "strongest", "among_three"))
    chance = float(np.average([row.chance for row in rows], weights=[max(row.found, 1e-9) for row in rows]))
    rows.append(Pointing("all", phantoms, found, strongest, among_three, chance))
    lines = [f"{model.manifest.encoder}, {count} phantoms of each finding, seed {seed}; {machine()}; "
             f"{datetime.date.today()}.", "", *markdown_table(
                 ("finding", "phantoms", "scored above 0.5", "strongest block touches it", "one of the three strongest",
                  "blocks that do"),
                 [(row.finding, str(row.phantoms), str(row.found), _share(row.strongest, row.found),
                   _share(row.among_three, row.found), f"{row.chance:.0%}") for row in rows])]
    click.echo("\n".join(lines))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with atomic_file(out / "occlusion.md") as path:
            path.write_text("\n".join(["# Where the encoder looked, and where the finding is", "", *lines]) + "\n")
        with atomic_file(out / "occlusion.json") as path:
            path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def _share(count: int, of: int) -> str:
    return f"{count} ({count / of:.0%})" if of else "-"


if __name__ == "__main__":
    command()

"""``dcformer phantom``."""

from __future__ import annotations

from pathlib import Path

import click

from ..backends import Options
from ..files import require_replaceable
from .options import json_option
from .output import print_json, progress


@click.command("phantom")
@click.option("--n", "count", type=int, required=True, help="Number of volumes.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder to make.")
@click.option("--split", default="valid", show_default=True,
              help="'valid' or 'train': names the files as CT-RATE does, and gives other volumes for the same seed.")
@click.option("--voxel-mm", type=float, default=2.0, show_default=True, help="Typical in-plane spacing.")
@click.option("--prevalence", type=float, default=0.22, show_default=True,
              help="Chance of each finding, in the nine of ten phantoms that are not normal.")
@click.option("--finding", "findings", multiple=True, metavar="NAME",
              help="Give every volume exactly these findings (repeat the option) instead of drawing them.")
@click.option("--workers", type=click.IntRange(1, 256), help="Processes; default: all usable cores.")
@click.option("--force", is_flag=True, help="Replace an existing folder of phantoms (nothing else is ever replaced).")
@json_option
def command(
    count: int, seed: int, out: Path, split: str, voxel_mm: float, prevalence: float, findings: tuple[str, ...],
    workers: int | None, force: bool, as_json: bool,
) -> None:
    """Make a folder of synthetic chest CTs with known findings, reports and labels, in CT-RATE's layout.

    A volume depends on the seed, its number and the options alone, not on how many are made or by how many processes.
    """
    from ...benchmarks.phantom.dataset import SPLITS, DatasetOptions, write_dataset

    options = DatasetOptions(count, seed, split, voxel_mm, findings or None, prevalence)
    require_replaceable(out, SPLITS[split].labels if force else None)
    with progress(count) as display:
        display.stage("painting")
        write_dataset(out, options, workers or Options().thread_count, force, display.advance)
    if as_json:
        print_json({"folder": str(out), "volumes": count, "seed": seed, "split": split})
    else:
        click.echo(f"{out}: {count} phantoms, seed {seed}, split {split}")

"""``dcformer index``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
import numpy as np

from ..backends.base import MOST_THREADS
from .options import json_option
from .output import print_json, progress
from .search import open_model


@click.command("index")
@click.argument("store", type=click.Path(path_type=Path))
@click.option("-k", "count", type=click.IntRange(min=1, max=1000), default=20, show_default=True,
              help="Recall is measured of so many nearest scans.")
@click.option("--recall", "target", type=click.FloatRange(0, 1), default=0.99, show_default=True,
              help="Share of the exact nearest that must be found, of scans and of texts.")
@click.option("--bundle", type=click.Path(path_type=Path), metavar="DIR",
              help="The bundle that the store was made with, if it does not lie where it lay then.")
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads; default: all usable cores.")
@json_option
def command(store: Path, count: int, target: float, bundle: Path | None, threads: int | None, as_json: bool) -> int:
    """Build an approximate index of STORE, for archives too large to compare with every scan.

    Its recall is measured against exact search, for scans and for the prompts of the bundle, as texts lie where no scan
    does. Exit code 1 if it misses --recall.
    """
    from ..search.approximate import build_index
    from ..search.gallery import open_gallery

    with progress() as display:
        gallery = open_gallery(store, display.stage)
        model = open_model(gallery, bundle, threads)
        texts = np.empty((0, gallery.identity.embedding_dim), np.float32)
        if (task := model.manifest.zero_shot) is not None:
            texts = model.embed_text([prompt for name in task.classes for prompt in task.prompts(name)])
        measured = build_index(gallery, count, target, texts,
                               lambda rows: display.stage(f"{rows} of {len(gallery.matrix)} scans"), threads or 0)
    if as_json:
        print_json(asdict(measured))
    else:
        recall = ", ".join(f"{value:.4f} for {measured.probes[kind]} {kind}" for kind, value in measured.recall.items())
        click.echo(f"{store}: index of {measured.rows} scans; recall@{measured.k} {recall}, looking at "
                   f"{measured.expansion} candidates"
                   + ("" if measured.least_recall >= target else f"; --recall {target:g} is missed"))
    return 0 if measured.least_recall >= target else 1

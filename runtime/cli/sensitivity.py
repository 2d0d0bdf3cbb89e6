"""``dcformer sensitivity``."""

from __future__ import annotations

from pathlib import Path

import click

from ..backends import Options
from ..backends.base import MOST_THREADS
from ..bundle import open_bundle, require_writable_bundle
from ..errors import InputError
from ..files import require_writable_folder
from ..model import Model
from .options import bundle_argument, json_option
from .output import print_json, print_table, progress


@click.command("sensitivity")
@bundle_argument
@click.option("--data", required=True, type=click.Path(path_type=Path), metavar="DIR",
              help="Folder of scans, with labels in CT-RATE's layout for --target-auroc-drop.")
@click.option("--split", metavar="NAME", help="'valid' or 'train', where the folder holds both.")
@click.option("--samples", type=click.IntRange(min=1), default=16, show_default=True, help="Scans to measure on.")
@click.option("--method", default="mse", show_default=True, metavar="NAME", help="As of `dcformer calibrate`.")
@click.option("--target-cosine", type=click.FloatRange(0, 1), metavar="C",
              help="Find the most INT8 whose embeddings keep this mean cosine with fp32's.  [default: 0.99]")
@click.option("--target-auroc-drop", type=click.FloatRange(0, 1), metavar="D",
              help="Instead: whose mean AUROC is at most this below fp32's; needs labels and many samples.")
@click.option("--write", is_flag=True, help="Replace the bundle's int8 graphs by the choice that was found.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Write the report there as Markdown and JSON, and the curve.")
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads; by default every usable core.")
@json_option
def command(bundle: Path, data: Path, split: str | None, samples: int, method: str, target_cosine: float | None,
            target_auroc_drop: float | None, write: bool, out: Path | None, threads: int | None, as_json: bool) -> int:
    """Rank BUNDLE's layers by what INT8 does to each alone, and find the most INT8 that keeps a target.

    Uses what `dcformer calibrate` has observed. Exit code 1 if not even one layer in INT8 keeps the target.
    """
    from ...calibration.add_precisions import Choice, add_precisions, bundle_record, thresholds_of
    from ...calibration.calibrate import image_graph
    from ...calibration.integers import compensated
    from ...calibration.observe import Observer
    from ...calibration.retention import read_all
    from ...calibration.scans import choose_scans
    from ...calibration.sensitivity import analyse, auroc_kept, cosine_kept
    from ...calibration.sensitivity_report import COLUMNS, STEP_COLUMNS, cells, step_cells, write_report

    if target_cosine is not None and target_auroc_drop is not None:
        raise InputError("--target-cosine and --target-auroc-drop: choose one")
    opened = open_bundle(bundle)
    if write:
        require_writable_bundle(opened)
    if out is not None:
        require_writable_folder(out)
    model = Model(opened, Options(threads=threads))
    graph, proto = image_graph(opened)
    record = bundle_record(opened, proto)
    scans = choose_scans(data, opened.manifest, split, samples)
    if len(scans) < samples:
        raise InputError(f"{data}: {len(scans)} scans, but {samples} were asked for; pass --samples {len(scans)}")
    thread_count = Options(threads=threads).thread_count
    with progress() as display:
        feeds = read_all(graph.inputs, opened.manifest.preprocessing, scans, thread_count,
                           display.stage)
        if target_auroc_drop is not None:
            promise, target = f"mean AUROC at most {target_auroc_drop:g} below fp32's", -target_auroc_drop
            measure = auroc_kept(model, [scan.labels for scan in scans], data)
        else:
            target = 0.99 if target_cosine is None else target_cosine
            promise, measure = f"mean cosine of at least {target:g}", cosine_kept
        limits, observer = thresholds_of(record, method), Observer(proto, (), thread_count, correlates=True)
        for scan, feed in zip(scans, feeds, strict=True):
            display.stage(f"{scan.path.name}, what layers read")
            observer.observe(feed)
        weights = compensated(proto, limits, observer.correlations, lambda layer: layer.depthwise)
        found = analyse(proto, limits, feeds, thread_count, promise, measure, target, weights, display.stage)
        kept = found.steps[-1].share > 0
        if write and kept:
            choice = Choice(("int8",), method, depthwise="never", floats=found.floats)
            add_precisions(opened, record, choice, display, observer.correlations)
    paths = write_report(found, out) if out is not None else []
    if as_json:
        print_json(found.to_dict())
    else:
        print_table(f"{bundle}: each layer alone in INT8, on {found.scans} scans", COLUMNS, map(cells, found.layers))
        print_table(f"The most INT8 with a {promise}", STEP_COLUMNS, map(step_cells, found.steps))
        for path in paths:
            click.echo(path)
        if write and kept:
            click.echo(f"{bundle}: int8 now leaves {len(found.floats)} layers in float")
    if not kept:
        click.echo(f"error: check failed: no layer can be in INT8 with a {promise}", err=True)
    return 0 if kept else 1

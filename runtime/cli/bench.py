"""``dcformer bench``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from ..backends import Options
from ..backends.base import MOST_THREADS
from ..bundle import open_bundle
from ..errors import InputError
from ..files import require_file, sha256_file
from .options import bundle_argument, json_option
from .output import print_json, print_table, progress


@click.command("bench")
@bundle_argument
@click.option("--runs", type=click.IntRange(min=3), default=10, show_default=True, help="Measured inferences of each.")
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads; by default every usable core.")
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="FILE",
              help="The checkpoint of BUNDLE: PyTorch then runs its weights, and embeddings are compared.")
@json_option
def command(bundle: Path, runs: int, threads: int | None, checkpoint: Path | None, as_json: bool) -> None:
    """Measure latency (median, p95), peak memory and cold start of BUNDLE's image tower.

    PyTorch eager runs beside it, by turns, where torch is installed.
    """
    from ...benchmarks.contenders import Job
    from ...benchmarks.measure import measure

    manifest = open_bundle(bundle).manifest
    names = ["onnxruntime"]
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        click.echo(f"warning: {' and '.join(missing)} not installed here, so PyTorch is not measured beside the bundle",
                   err=True)
    else:
        names.insert(0, "pytorch")
    if checkpoint is not None:
        require_file(checkpoint, "checkpoint")
        if (found := sha256_file(checkpoint)) != manifest.source.sha256:
            raise InputError(f"{checkpoint}: sha256 {found[:12]}…, but {bundle} was made from {manifest.source}; pass "
                             "that one, or none")
    job = Job(str(bundle), str(checkpoint) if checkpoint else None, Options(threads=threads).thread_count,
              checkpoint is not None or manifest.source.random_seed is not None)
    with progress() as display:
        report = measure(names, job, manifest.encoder, manifest.preprocessing.shape_dhw, runs, display.stage)
    if as_json:
        print_json(report.to_dict())
        return
    size = "x".join(map(str, report.volume_dhw))
    title = f"{report.encoder}, volume {size}, batch 1; {report.machine}, {report.threads} threads; {report.date}"
    columns = ("", "median ms", "p95 ms", "runs", f"times {names[0]}", "cold start ms", "peak RSS MB", "cosine")
    print_table(title, columns, (
        (c.description, f"{c.median_ms:.0f}", f"{c.p95_ms:.0f}", c.runs, f"{c.ratio:.2f}", f"{c.cold_start_ms:.0f}",
         f"{c.peak_rss_mb:.0f}", "-" if c.cosine is None else f"{c.cosine:.6f}")
        for c in report.contenders
    ))

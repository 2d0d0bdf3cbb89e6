"""``dcformer bench``."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..backends import Options
from ..backends.base import DEVICES, MOST_THREADS
from ..errors import InputError
from ..files import require_file, require_writable_file, require_writable_folder, sha256_file
from ..scan_files import ScanPath
from .bench_gpu import bench_gpu, read_batches
from .options import SCAN, json_option
from .output import print_json, print_table, progress

if TYPE_CHECKING:
    from ...benchmarks.entrants import Field

_MEASURED = ("Each in a process of its own, by turns, after a warm-up; ratios are medians of pairs. Cosine: with the "
             "first contender's embedding.")


@click.command("bench")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--runs", type=click.IntRange(min=3), default=10, show_default=True, help="Measured inferences of each.")
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads; by default every usable core.")
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="FILE",
              help="The checkpoint of BUNDLE: PyTorch then runs its weights, and embeddings are compared.")
@click.option("--against", metavar="NAME,NAME,…",
              help="Beside BUNDLE: torch (the default), onnx-naive, openvino-naive, openvino, openvino-bf16, "
                   "onnxruntime-int8, openvino-int8. With --device cuda: instead of all that could run there.")
@click.option("--scan", type=SCAN, metavar="SCAN",
              help="Measure from this scan to scores instead of from a preprocessed volume to the embedding.")
@click.option("--load-only", is_flag=True,
              help="With --scan: measure reading and preprocessing alone, beside the original's method.")
@click.option("--encoders", metavar="NAME,NAME,…",
              help="Instead of BUNDLE: encoders with random weights, or 'all', beside each other.")
@click.option("--size", type=click.IntRange(min=32), metavar="S",
              help="With --encoders: volumes of SxSxS/2, or the nearest smaller that an encoder takes.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="With --encoders or --device cuda: write the table as Markdown and JSON there, with --encoders also "
              "as CSV, and the plot.")
@click.option("--device", type=click.Choice(DEVICES), default=DEVICES[0], show_default=True,
              help="cuda: engines of BUNDLE beside PyTorch and ONNX Runtime on the GPU.")
@click.option("--batches", metavar="N,N", help="With --device cuda: batches to measure.  [default: 1,4,8]")
@click.option("--seconds", type=click.FloatRange(min=0), metavar="S",
              help="With --device cuda: about how long to measure each batch.  [default: 20]")
@click.option("--bundles", type=click.Path(path_type=Path), metavar="DIR",
              help="With --encoders: keep the exported bundles there, and use those that are there already.")
@click.option("--report", "page", type=click.Path(path_type=Path), metavar="FILE.html",
              help="With BUNDLE, on the CPU: write the table as a page, too.")
@json_option
def command(bundle: Path | None, runs: int, threads: int | None, checkpoint: Path | None, against: str | None,
            scan: ScanPath | None, load_only: bool, encoders: str | None, size: int | None, out: Path | None,
            bundles: Path | None, device: str, batches: str | None, seconds: float | None, page: Path | None,
            as_json: bool) -> None:
    """Measure latency (median, p95), peak memory and cold start of BUNDLE's image tower, or of many encoders.

    With a BUNDLE, others run beside it, by turns; ratios are to the first of them.
    """
    if (bundle is None) == (encoders is None):
        raise InputError("pass a BUNDLE, or --encoders to measure encoders without one")
    thread_count = Options(threads=threads).thread_count
    if page is not None:
        from ..report.page import require_page_name

        if device == "cuda" or encoders is not None:
            raise InputError("--report is for a BUNDLE on the CPU; elsewhere --out writes a page, too")
        require_page_name(page)
        require_writable_file(page)
    if device == "cuda":
        if bundle is None or load_only:
            raise InputError("--device cuda measures a BUNDLE, from inputs on the GPU; drop --encoders and --load-only")
        bench_gpu(bundle, checkpoint, against, read_batches(batches or "1,4,8"), scan, runs, thread_count,
                  20.0 if seconds is None else seconds, out, as_json)
        return
    for option, value in (("--batches", batches), ("--seconds", seconds)):
        if value is not None:
            raise InputError(f"{option} is for --device cuda; drop it")
    if encoders is not None:
        if size is None:
            raise InputError("--encoders needs --size S")
        for option, value in (("--checkpoint", checkpoint), ("--against", against), ("--scan", scan)):
            if value is not None:
                raise InputError(f"{option} is for a BUNDLE; drop it")
        if out is not None:
            require_writable_folder(out)
        _bench_encoders(encoders, size, runs, thread_count, out, bundles, as_json)
        return
    for option, value in (("--size", size), ("--out", out), ("--bundles", bundles)):
        if value is not None:
            raise InputError(f"{option} is for --encoders; drop it")
    if load_only and scan is None:
        raise InputError("--load-only needs --scan SCAN")
    assert bundle is not None
    from ...benchmarks.entrants import Field

    _bench_bundle(Field(bundle, checkpoint, thread_count, scan), against, load_only, runs, page, as_json)


def _require_checkpoint(field: Field) -> None:
    """Raise InputError if a checkpoint is given that is not the bundle's."""
    if field.checkpoint is None:
        return
    source = field.manifest.source
    weights = field.checkpoint / (source.file or "") if field.checkpoint.is_dir() else field.checkpoint
    require_file(weights, "checkpoint")
    if (found := sha256_file(weights)) != source.sha256:
        raise InputError(f"{weights}: sha256 {found[:12]}…, but {field.bundle} was made from {source}; pass that one, "
                         "or none")


def _bench_bundle(field: Field, against: str | None, load_only: bool, runs: int, page: Path | None, as_json: bool
                  ) -> None:
    from ...benchmarks.entrants import choose_entrants, loading_entrants
    from ...benchmarks.measure import measure

    _require_checkpoint(field)
    manifest, scan = field.manifest, field.scan
    names = [name.strip() for name in against.split(",")] if against is not None else _default_rivals(field)
    with tempfile.TemporaryDirectory() as folder, progress() as display:
        entrants = (loading_entrants(field) if load_only else
                    choose_entrants(names, field, Path(folder), display.stage))
        report = measure(entrants, manifest.encoder, manifest.preprocessing.shape_dhw, runs, display.stage)
    size = "x".join(map(str, report.volume_dhw))
    work = f"volume {size}, batch 1" if scan is None else f"{scan.name} to {'voxels' if load_only else 'scores'}"
    title = f"{report.encoder}, {work}; {report.machine}, {report.threads} threads; {report.date}"
    columns = ("", "median ms", "p95 ms", "runs", f"times {report.contenders[0].name}", "cold start ms", "peak RSS MB",
               "cosine", "")
    rows = [(c.name, f"{c.median_ms:.0f}", f"{c.p95_ms:.0f}", str(c.runs), f"{c.ratio:.2f}", f"{c.cold_start_ms:.0f}",
             f"{c.peak_rss_mb:.0f}", "-" if c.cosine is None else f"{c.cosine:.6f}", c.description)
            for c in report.contenders]
    if page is not None:
        from ..report.page import Section, write_tables

        if scan is not None:  # the name of its file may be that of a patient
            work = f"a scan to {'voxels' if load_only else 'scores'}"
        facts = [("encoder", report.encoder), ("work", work),
                 ("machine", f"{report.machine}, {report.threads} threads"), ("date", report.date)]
        write_tables(page, f"{report.encoder}: latency and memory", facts, [Section(
            "Contenders", columns, rows, [_MEASURED], columns.index("median ms"))])
    if as_json:
        print_json(report.to_dict())
        return
    print_table(title, columns, rows)
    if page is not None:
        click.echo(page)


def _default_rivals(field: Field) -> list[str]:
    """PyTorch eager where it is installed and can read the scan."""
    if not field.suits_original:
        from ...benchmarks.entrants import NIFTI_ALONE

        click.echo(f"warning: {NIFTI_ALONE}", err=True)
        return []
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        click.echo(f"warning: {' and '.join(missing)} not installed here, so PyTorch is not measured beside the bundle",
                   err=True)
    return [] if missing else ["torch"]


def _bench_encoders(names: str, size: int, runs: int, threads: int, out: Path | None, bundles: Path | None,
                    as_json: bool) -> None:
    from ...benchmarks.report import COLUMNS, cells, title, write_report
    from ...benchmarks.survey import choose_encoders, export_all, survey

    chosen = choose_encoders([name.strip() for name in names.split(",")])
    # Two inferences in each process, so that there are several rounds to even out what else the machine does.
    rounds = -(-runs // 2)
    with tempfile.TemporaryDirectory() as temporary, progress() as display:
        made = export_all(chosen, size, bundles or Path(temporary), display.stage)
        result = survey(chosen, size, made, threads, rounds, 2, display.stage)
    paths = write_report(result, out) if out is not None else []
    if as_json:
        print_json(result.to_dict())
        return
    print_table(title(result), COLUMNS, map(cells, result.encoders))
    for row in result.encoders:
        if row.problem:
            click.echo(f"{row.encoder}: {row.problem}", err=True)
    for path in paths:
        click.echo(path)

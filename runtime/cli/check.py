"""``dcformer check``."""

from __future__ import annotations

from pathlib import Path

import click

from ..backends import Options
from ..backends.base import MOST_THREADS
from ..bundle import ENGINE_SUFFIX, open_bundle
from ..errors import DeviceUnavailable, InputError, one_line
from ..gpu import gpu_or_none
from ..volume import is_prepared
from .options import bundle_argument, json_option
from .output import print_json, print_table, progress

_COLUMNS = ("file", "run by", "SQNR, dB", "at least", "cosine, worst", "largest error", "codes equal", "")


@click.command("check")
@bundle_argument
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR",
              help="Folder of scans; default: made-up volumes, which find wrong kernels as well.")
@click.option("--samples", type=click.IntRange(min=1), default=2, show_default=True, help="Volumes to run.")
@click.option("--split", metavar="NAME", help="'valid' or 'train', where the folder holds both.")
@click.option("--require-engines", is_flag=True,
              help="Fail, with exit code 3, if an engine cannot run here, or if the bundle holds none.")
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads; by default every usable core.")
@json_option
def command(bundle: Path, data: Path | None, samples: int, split: str | None, require_engines: bool,
            threads: int | None, as_json: bool) -> int:
    """Run every graph and engine of BUNDLE on the same inputs, and compare all with fp32 in ONNX Runtime.

    Exit code 1 if one computes something else than it should. What cannot run on this machine, such as an engine
    without a GPU, is listed with the reason, and is no failure. Whether a precision keeps the answers is shown by
    `dcformer retention`.
    """
    from ...calibration.check import check, check_preprocessing, random_tokens, random_volumes, require_any_run
    from ...calibration.scans import choose_samples, read_volumes

    if split is not None and data is None:
        raise InputError("--split: only with --data")
    opened = open_bundle(bundle)
    options = Options(threads=threads)
    with progress() as display:
        scans, volumes = [], random_volumes(opened, samples) if data is None else []
        if data is not None:
            found = choose_samples(data, samples, split, {})
            read = read_volumes(found, samples, opened.manifest, options.thread_count, display.stage)
            # Those that are prepared already have nothing to compare with.
            scans = [scan for scan in found if scan.path in read and not is_prepared(scan.path)]
            volumes = list(read.values())
        rows = check(opened, volumes, random_tokens(opened), options, display.stage)
        if scans and gpu_or_none() is not None:
            display.stage("preprocessing on the GPU")
            rows += check_preprocessing(opened, scans, options)
    require_any_run(rows, bundle)
    if as_json:
        print_json([row.to_dict() for row in rows])
    else:
        ran = [row for row in rows if row.not_run is None]
        print_table(f"{bundle} against its fp32 in onnxruntime, on {len(volumes)} volumes", _COLUMNS, (
            (row.file, row.back_end, _number(row.sqnr_db, 1), _number(row.least_db, 1), _number(row.cosine, 6),
             f"{row.max_error:.1e}", "-" if row.codes_equal is None else f"{row.codes_equal:.2%}",
             "ok" if row.passed else f"FAILED: {', '.join(row.failures)}") for row in ran))
        for reason in dict.fromkeys(row.not_run for row in rows if row.not_run is not None):
            files = ", ".join(row.file for row in rows if row.not_run == reason)
            click.echo(f"not run: {files}: {one_line(reason)}")
    engines = [row for row in rows if row.file.endswith(ENGINE_SUFFIX)]
    if require_engines and not engines:
        raise DeviceUnavailable(f"{bundle}: holds no engine; `dcformer build {bundle}` makes them")
    missed = [row for row in engines if row.not_run is not None]
    if require_engines and missed:
        raise DeviceUnavailable(f"{len(missed)} engines could not run here, the first: {missed[0].not_run}")
    failed = [row.file for row in rows if row.failures]
    if failed:
        click.echo(f"error: check failed: {', '.join(failed)}", err=True)
    return 1 if failed else 0


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"

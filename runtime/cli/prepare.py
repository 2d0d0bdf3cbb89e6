"""``dcformer prepare``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from ..backends.base import MOST_THREADS, Options
from ..errors import InputError
from ..files import require_writable_folder
from ..model import load
from ..volume.prepared import Values
from .options import bundle_argument, given_options, scan_options
from .output import print_json, progress, told

_VALUES: dict[str, Values] = {"int16": "int16", "fp16": "float16"}


@click.command("prepare")
@bundle_argument
@click.argument("inputs", metavar="SCAN...", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR",
              help="A data set of prepared scans; what is there and unchanged is skipped.")
@click.option("--values", type=click.Choice(list(_VALUES)), default="int16", show_default=True,
              help="int16: within 1.6e-5 of values in [-1, 1]. fp16: within 2.5e-4, a third smaller; all that FP16 "
                   "graphs read.")
@click.option("--split", metavar="NAME", help="'valid' or 'train', where a folder holds both.")
@click.option("--readers", type=click.IntRange(1, 256), metavar="N",
              help="Scans that are read at once.  [default: as many as half of the cores]")
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads; default: all usable cores.")
@click.option("--no-verify", is_flag=True, help="Do not compare the bundle's files with their sha256.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures of the run as JSON.")
@scan_options
def command(bundle: Path, inputs: tuple[str, ...], out: Path, values: str, split: str | None, readers: int | None,
            threads: int | None, no_verify: bool, as_json: bool, **read_options: Any) -> int:
    """Read and preprocess scans once: what BUNDLE's image tower reads of each, compressed.

    DIR is a data set like the one that it was made of, with its labels and reports, that evaluate, calibrate,
    retention, sensitivity, check and embed take in its place, and read many times faster; zeroshot, classify, search,
    profile and bench take its files, report and export do not. For a bundle with another preprocessing it is refused.
    Exit code 2 if scans failed.
    """
    from ..preparing import copy_tables, find_tables, find_tasks, prepare_all

    given = given_options(read_options)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: expected a folder, found a file")
    require_writable_folder(out)
    model = load(bundle, verify=not no_verify)
    tasks, tables = find_tasks(inputs, split, given, out.absolute()), find_tables(inputs, out.absolute())
    cores = Options(threads=threads).thread_count
    readers = readers or max(1, cores // 2)
    with progress(len(tasks)) as display:
        report = prepare_all(model, tasks, _VALUES[values], readers, max(1, cores // readers), told(display))
    copy_tables(tables)
    if as_json:
        print_json({**dataclasses.asdict(report), "tables": [str(path) for path in tables]})
    else:
        size = (f"; {report.bytes_after / 1e6:.1f} MB instead of {report.bytes_before / 1e6:.1f}"
                if report.prepared else "")
        click.echo(f"{out}: {report.prepared} prepared, {report.skipped} there already, {report.failed} failed, "
                   f"{len(tables)} tables copied{size}")
    return 2 if report.failed else 0

"""``dcformer zeroshot``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..model import load
from ..scan_files import ScanPath
from .options import (
    bundle_argument,
    json_option,
    keep_going_option,
    model_options,
    preprocess_option,
    read_classes,
    scan_options,
    scans_argument,
)
from .scoring import score_scans


@click.command("zeroshot")
@bundle_argument
@scans_argument
@click.option("--classes", type=click.Path(path_type=Path), metavar="FILE",
              help="Class names, one per line, instead of the bundle's 18 pathologies.")
@json_option
@keep_going_option
@scan_options
@model_options
@preprocess_option
def command(
    bundle: Path, scans: tuple[ScanPath, ...], classes: Path | None, as_json: bool, keep_going: bool, device: str,
    threads: int | None, backend: str, precision: str, preprocess: str, no_verify: bool, **read_options: Any,
) -> int:
    """Score each SCAN for every class: "X is present." against "X is not present.".

    A SCAN is a NIfTI file, a folder or zip of DICOM files, or several DICOM files: those of one folder are one scan.
    """
    names = read_classes(classes)
    model = load(bundle, device, threads, not no_verify, backend, precision, preprocess)
    return score_scans(model, scans, lambda scan: model.zero_shot(scan, names, **read_options), as_json, keep_going)

"""``dcformer classify``."""

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
    scan_options,
    scans_argument,
)
from .scoring import score_scans


@click.command("classify")
@bundle_argument
@scans_argument
@json_option
@keep_going_option
@scan_options
@model_options
@preprocess_option
def command(
    bundle: Path, scans: tuple[ScanPath, ...], as_json: bool, keep_going: bool, device: str, threads: int | None,
    backend: str, precision: str, preprocess: str, no_verify: bool, **read_options: Any,
) -> int:
    """Score each SCAN with the fine-tuned detector that BUNDLE was made from."""
    model = load(bundle, device, threads, not no_verify, backend, precision, preprocess)
    return score_scans(model, scans, lambda scan: model.classify(scan, **read_options), as_json, keep_going)

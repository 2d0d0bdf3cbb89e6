"""What ``zeroshot`` and ``classify`` share: score scans one after the other and print the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from ..errors import InputError
from ..model import Model
from ..results import Scores
from ..scan_files import ScanPath
from .output import announce, print_json, print_table
from .scans import for_each_scan


def score_scans(
    model: Model, scans: Sequence[ScanPath], score: Callable[[ScanPath], Scores], as_json: bool, keep_going: bool
) -> int:
    """Score every scan and print a table or JSON.

    Returns:
        Exit code: 2 if a scan failed and ``keep_going`` let the others through.

    Raises:
        InputError: a scan cannot be used and ``keep_going`` is false; nothing is printed on standard output then.
    """
    announce(model)
    results = for_each_scan(scans, keep_going, score, prepare=lambda scan: scan)
    if as_json:
        print_json([_row(scan, result) for scan, result in zip(scans, results, strict=True)])
    scored = [result for result in results if isinstance(result, Scores)]
    if not as_json:
        for result in scored:
            print_scores(result)
    return 2 if len(scored) < len(scans) else 0


def _row(scan: ScanPath, result: Scores | InputError) -> dict[str, Any]:
    return result.to_dict() if isinstance(result, Scores) else {"volume": str(scan), "error": str(result)}


def print_scores(result: Scores) -> None:
    """Table of one scan's scores, highest first, with the time each phase took."""
    ranked = sorted(result.scores.items(), key=lambda item: -item[1])
    print_table(result.volume, ("class", "probability"), ((name, f"{score:.4f}") for name, score in ranked))
    click.echo("  ".join(f"{phase} {ms:.0f} ms" for phase, ms in result.timings_ms.items()))

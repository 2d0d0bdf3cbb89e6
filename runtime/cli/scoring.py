"""What ``zeroshot`` and ``classify`` share: score scans one after the other and print the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ..errors import BundleError, InputError
from ..model import Model, Scores
from .output import print_json, print_table, progress, warn_if_untrained


def score_scans(
    model: Model, scans: Sequence[Path], score: Callable[[Path], Scores], as_json: bool, keep_going: bool
) -> int:
    """Score every scan and print a table or JSON.

    Returns:
        Exit code: 2 if a scan failed and ``keep_going`` let the others through.

    Raises:
        InputError: a scan cannot be used and ``keep_going`` is false; nothing is printed on standard output then.
    """
    warn_if_untrained(model)
    results: list[Scores] = []
    rows: list[dict[str, Any]] = []
    with progress(len(scans)) as display:
        for scan in scans:
            display.stage(scan.name)
            try:
                results.append(score(scan))
                rows.append(results[-1].to_dict())
            except InputError as error:
                if not keep_going or isinstance(error, BundleError):  # a bundle that fails one scan fails them all
                    raise
                rows.append({"volume": str(scan), "error": str(error)})
                click.echo(f"error: {error}", err=True)
            display.advance()
    if as_json:
        print_json(rows)
    else:
        for result in results:
            print_scores(result)
    return 2 if len(results) < len(scans) else 0


def print_scores(result: Scores) -> None:
    """Table of one scan's scores, highest first, with the time each phase took."""
    ranked = sorted(result.scores.items(), key=lambda item: -item[1])
    print_table(result.volume, ("class", "probability"), ((name, f"{score:.4f}") for name, score in ranked))
    click.echo("  ".join(f"{phase} {ms:.0f} ms" for phase, ms in result.timings_ms.items()))

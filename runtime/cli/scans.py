"""Doing one thing to several scans, with progress, and what a scan that cannot be used means for the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import click

from ..ahead import ahead
from ..errors import BundleError, InputError, one_line
from ..scan_files import ScanPath
from .output import progress

_S = TypeVar("_S")
_T = TypeVar("_T")


def for_each_scan(scans: Sequence[ScanPath], keep_going: bool, action: Callable[[_S], _T],
                  prepare: Callable[[ScanPath], _S]) -> list[_T | InputError]:
    """The action's result per scan; with ``keep_going``, the error of those that cannot be used, printed at once.

    Args:
        prepare: what the action is given of a scan; made for the next one while the action is at work.

    Raises:
        InputError: a scan cannot be used and ``keep_going`` is false.
        BundleError: in any case, as a bundle that fails one scan fails them all.
    """
    results: list[_T | InputError] = []
    with progress(len(scans)) as display:
        for scan, prepared in ahead(scans, prepare):
            display.stage(scan.name)
            try:
                results.append(action(prepared()))
            except InputError as error:
                if not keep_going or isinstance(error, BundleError):
                    raise
                results.append(error)
                click.echo(f"error: {one_line(str(error))}", err=True)
            display.advance()
    return results

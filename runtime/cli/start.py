"""The console script: what signals do before, while and after the program runs.

Until there is a program that could tell of an interruption, and once it has finished, Ctrl-C just ends the process: a
traceback of half-done imports would tell nobody anything. Who started the process with SIGINT ignored, as shells do for
jobs in the background, keeps that.
"""

from __future__ import annotations

import signal
import sys

_OURS = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _OURS:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run() -> None:
    """Run ``dcformer`` and end the process with its exit code."""
    from .app import main

    signal.signal(signal.SIGTERM, _terminate)
    if _OURS:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    if _OURS:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def _terminate(_signal: int, _frame: object) -> None:
    """End by an exception, so that temporary files are removed on the way out."""
    sys.exit(128 + signal.SIGTERM)

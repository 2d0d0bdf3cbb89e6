"""Runs one case in a process of its own and judges how it ends.

Good ends: exit code 0 with finite output, or one clear line ``error: …`` and exit code 1, 2 or 3; no traceback, nothing
else printed, no file left behind or changed, within time and memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LARGEST_S = 20.0
#: Beyond what the libraries take, which all cases share.
LARGEST_BYTES = 1536 << 20
_UNEXPECTED, _POLL_S = 70, 0.005
#: What the program may say beside results and its one error.
_LINES = re.compile(r"(error|warning|backend): .+|.*: \d+ embeddings of \d+.*")
_LONGEST_LINE = 2100


@dataclass(frozen=True)
class Case:
    """A command line, run in a folder that its files are in.

    ``outputs``: names that may appear when it succeeds; ``kept``: also when it does not, as stores with
    bad scans.
    ``reads_only``: an export ends, well, once it has read the checkpoint.
    """

    arguments: Sequence[str]
    outputs: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    reads_only: bool = False


@dataclass(frozen=True)
class Verdict:
    """How a case ended; ``problem`` is None where that is well."""

    exit_code: int
    seconds: float
    peak_bytes: int
    problem: str | None
    errors: str


def judge(case: Case, folder: Path, program: Callable[[list[str]], int]) -> Verdict:
    """Run ``program`` on the case's arguments in ``folder``, forked from this process."""
    before = _snapshot(folder)
    with tempfile.TemporaryDirectory(prefix="fuzz-run-") as place:
        outside = Path(place)
        for name in ("tmp", "cache"):
            (outside / name).mkdir()
        begin = time.monotonic()
        if (child := os.fork()) == 0:
            _run(case, folder, outside, program)
        code, peak = _wait(child, begin + LARGEST_S, outside / "start")
        seconds = time.monotonic() - begin
        output = (outside / "stdout").read_bytes() if (outside / "stdout").exists() else b""
        errors = (outside / "stderr").read_text(errors="backslashreplace") if (outside / "stderr").exists() else ""
        left = sorted(str(path.relative_to(outside / "tmp")) for path in (outside / "tmp").rglob("*"))
        after = _snapshot(folder)
        problem = (
            _end(code)
            or _said(code, errors)
            or _left(case, code, before, after, left)
            or _finite(case, code, output, folder)
        )
    return Verdict(code, seconds, peak, problem, errors)


# ------------------------------------------------------------------ running


def _run(case: Case, folder: Path, outside: Path, program: Callable[[list[str]], int]) -> None:
    """In the child; never returns."""
    code = _UNEXPECTED
    try:
        os.setsid()
        (outside / "start").write_text(str(_resident_bytes(os.getpid())))
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(outside / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (until the process ends)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        os.chdir(folder)
        os.environ.update(TMPDIR=str(outside / "tmp"), XDG_CACHE_HOME=str(outside / "cache"), HOME=str(outside))
        tempfile.tempdir = None
        if case.reads_only:
            _stop_after_reading()
        code = program(list(case.arguments))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _stop_after_reading() -> None:
    """Tracing takes a minute and sees nothing of the file that reading has not."""
    from dcformer_deploy.export import make_bundle

    def stop(*_: object) -> None:
        raise SystemExit(0)

    make_bundle.trace_image_tower = stop  # type: ignore[assignment]


def _wait(child: int, deadline: float, start: Path) -> tuple[int, int]:
    """Exit code, negative for a signal, and how much its resident bytes grew; ends what takes too long or too much.

    ``start``: where the child has written what it began with, which is the libraries' and its parent's.
    """
    grown = own = 0
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        own = own or (int(start.read_text() or 0) if start.exists() else 0)
        if done:
            return os.waitstatus_to_exitcode(status), max(grown, (usage.ru_maxrss << 10) - own if own else 0)
        with contextlib.suppress(OSError):
            grown = max(grown, _resident_bytes(child) - own if own else 0)
        if time.monotonic() > deadline or grown > LARGEST_BYTES:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
                os.kill(child, signal.SIGKILL)
            os.wait4(child, 0)
            return (-signal.SIGALRM if time.monotonic() > deadline else -signal.SIGXFSZ), grown
        time.sleep(_POLL_S)


def _resident_bytes(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()


# ------------------------------------------------------------------ judging


def _end(code: int) -> str | None:
    if code == -signal.SIGALRM:
        return f"took more than {LARGEST_S:g} s"
    if code == -signal.SIGXFSZ:
        return f"took more than {LARGEST_BYTES >> 20} MiB"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return None if code in (0, 1, 2, 3) else f"exit code {code}"


def _said(code: int, errors: str) -> str | None:
    lines = errors.splitlines()
    if "Traceback" in errors:
        return "traceback"
    if strange := next((line for line in lines if not _LINES.fullmatch(line)), None):
        return f"printed {strange[:150]!r}"
    if long := next((line for line in lines if len(line) > _LONGEST_LINE), None):
        return f"a line of {len(long)} characters"
    told = sum(line.startswith("error: ") for line in lines)
    if code and not told:
        return f"exit code {code} without an error"
    if told > 1:
        return f"{told} errors of one scan"
    if told and not code:
        return "an error and exit code 0"
    return None


def _left(
    case: Case, code: int, before: dict[str, tuple[int, ...]], after: dict[str, tuple[int, ...]], left: list[str]
) -> str | None:
    allowed = {*case.kept, *(case.outputs if code == 0 else ())}

    def mine(name: str) -> bool:
        return name.split("/")[0] in allowed or name in allowed

    if left:
        return f"left in the temporary folder: {', '.join(left[:3])}"
    if new := [name for name in after if name not in before and not mine(name)]:
        return f"left behind: {', '.join(new[:3])}"
    if changed := [name for name in before if before[name] != after.get(name) and not mine(name)]:
        return f"changed: {', '.join(changed[:3])}"
    return None


def _finite(case: Case, code: int, output: bytes, folder: Path) -> str | None:
    if code == 0 and "--json" in case.arguments:
        try:
            value = json.loads(output)
        except ValueError as error:
            return f"no JSON on standard output: {error}"
        if bad := next((number for number in _numbers(value) if not math.isfinite(number)), None):
            return f"{bad} in the output"
    for name in case.outputs if code == 0 else ():
        if name.endswith(".npz") and (folder / name).is_file():
            with np.load(folder / name) as arrays:
                if bad := [
                    key for key in arrays if arrays[key].dtype.kind == "f" and not np.isfinite(arrays[key]).all()
                ]:
                    return f"not finite: {bad[0]}"
    return None


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif isinstance(value, float):
        yield value


def _snapshot(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            status = path.lstat()
            is_folder = path.is_dir() and not path.is_symlink()
            found[str(path.relative_to(folder))] = (
                status.st_mode,
                *(() if is_folder else (status.st_size, status.st_mtime_ns)),
            )
    return found

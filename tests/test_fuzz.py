"""300 cases of the fuzzing run, and what its judge must notice. `make fuzz` runs 10,000."""

import mmap
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from fuzz import judge as module
from fuzz.judge import Case, judge

HERE = Path(__file__).parent


@pytest.mark.slow
def test_300_cases(pristine_bundle: Path, tmp_path: Path):
    words = [sys.executable, "-m", "fuzz", "--cases", "300", "--seed", "1", "--bundle", str(pristine_bundle)]
    done = subprocess.run([*words, "--table", str(tmp_path / "t.md")], env={**os.environ, "PYTHONPATH": str(HERE)},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|") for line in (tmp_path / "t.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 12
    assert all(int(row[2]) == 25 for row in rows)
    assert all(int(row[7]) == 0 for row in rows)
    # Cases that all end early would test little: some of most kinds must be accepted, some of all refused.
    assert sum(int(row[3]) > 0 for row in rows) >= 8
    assert all(int(row[4]) + int(row[5]) + int(row[6]) > 0 for row in rows)


def _refuse(arguments: list[str]) -> int:
    print("error: no", file=sys.stderr)
    return 2


def _raise(arguments: list[str]) -> int:
    raise ValueError("oops")


def _trace(arguments: list[str]) -> int:
    print("Traceback (most recent call last):\nerror: no", file=sys.stderr)
    return 2


def _say_nothing(arguments: list[str]) -> int:
    return 2


def _leave(arguments: list[str]) -> int:
    Path("left").write_text("x")
    return _refuse(arguments)


def _change(arguments: list[str]) -> int:
    Path("scan").write_text("another")
    return _refuse(arguments)


def _leave_temporary(arguments: list[str]) -> int:
    (Path(os.environ["TMPDIR"]) / "x").write_text("x")
    return 0


def _print_nan(arguments: list[str]) -> int:
    print("[NaN]")
    return 0


def _crash(arguments: list[str]) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def _sleep(arguments: list[str]) -> int:
    time.sleep(60)
    return 0


def _eat(arguments: list[str]) -> int:
    # Mapped anew: what earlier tests of this process have freed would be taken again and nothing would grow.
    eaten = mmap.mmap(-1, 200 << 20)
    eaten.write(b"x" * (1 << 20) * 200)
    time.sleep(1)
    return len(eaten) * 0


def _chatter(arguments: list[str]) -> int:
    os.write(2, b"Library: something\n")
    return 0


@pytest.mark.parametrize(("program", "problem"), [
    (_refuse, None), (lambda arguments: 0, None), (_raise, "exit code 70"), (_trace, "traceback"),
    (_say_nothing, "exit code 2 without an error"),
    (lambda arguments: _refuse(arguments) and _refuse(arguments), "2 errors of one scan"),
    (_leave, "left behind: left"), (_change, "changed: scan"), (_leave_temporary, "left in the temporary folder: x"),
    (_print_nan, "nan in the output"), (_crash, "killed by SIGKILL"), (_sleep, "took more than 3 s"),
    (_eat, "took more than 100 MiB"), (_chatter, "printed 'Library: something"), (lambda arguments: 9, "exit code 9")])
def test_the_judge(program, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LARGEST_S", 3.0)
    monkeypatch.setattr(module, "LARGEST_BYTES", 100 << 20)
    (tmp_path / "scan").write_text("x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which these programs do not use
        verdict = judge(Case(["--json"] if program is _print_nan else []), tmp_path, program)
    assert (verdict.problem or "").startswith(problem or ""), verdict
    assert (verdict.problem is None) == (problem is None), verdict

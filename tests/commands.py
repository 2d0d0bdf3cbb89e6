"""The program within this process, as its user meets it."""

import re

import pytest

from dcformer_deploy.runtime.cli.app import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refuse(capsys: pytest.CaptureFixture[str], message: str, *arguments: object, code: int = 2) -> None:
    """Exit code 2, nothing on standard output, and exactly one line of error."""
    found, out, err = run(capsys, *arguments)
    assert (found, out) == (code, "")
    lines = [line for line in err.splitlines() if line and not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert re.search(message, lines[0]), lines[0]

"""Shell completion: the shells' own words in, ours out."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dcformer_deploy.runtime.cli.app import main

PROGRAM = Path(sys.executable).parent / "dcformer"


@pytest.mark.parametrize(("words", "expected"), [
    ("dcformer zer", "zeroshot"), ("dcformer zeroshot --back", "--backend"),
    ("dcformer zeroshot --precision b", "bf16"), ("dcformer embed --r", "--readers")])
def test_words(words: str, expected: str):
    found = subprocess.run([PROGRAM], check=True, capture_output=True, text=True, env={
        **os.environ, "_DCFORMER_COMPLETE": "bash_complete", "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1)})
    assert f"plain,{expected}" in found.stdout.splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(shell: str, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "_DCFORMER_COMPLETE" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)

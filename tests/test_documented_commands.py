"""Every command of the documents is run, in the order in which it stands there, in a folder with what it names.

What differs from the document is stated here: sizes, so that it takes seconds, and how commands end that need what this
machine lacks. The quick ones run in `make test`, all of them from a checkpoint on in `make test-all`.
"""

import re
import shlex
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import test_documents as documents

import golden
from dcformer_deploy.benchmarks.phantom.dataset import DatasetOptions, write_dataset
from dcformer_deploy.export import registry
from dcformer_deploy.runtime.cli.app import main
from scans import write

#: Minutes: export and calibration trace and measure, benchmarks measure, retention and sensitivity compare many times.
SLOW = {"export", "calibrate", "retention", "sensitivity", "bench", "evaluate", "profile", "build", "check", "encoders",
        "phantom"}
#: Of the quick ones, those whose bundle only the slow ones make.
_NEEDS = re.compile(r"mine/|--precision int8")
#: Beginning of a command and what it is run with instead, or besides.
SMALLER = {
    "export --encoder vit-tiny": {"512": "128"},
    "bench --encoders all": {"all": "dcformer-nano", "512": "128"},
    "bench bundle/": {"--add": "--runs 3"},
    "calibrate": {"64": "3", "--add": "--samples 3 --method minmax --depthwise never"},
    "retention": {"--add": "--limit 2"},
    "sensitivity": {"0.995": "0.5", "--add": "--samples 2"},
    "report bundle/": {"2048": "32"},
    "phantom --n 100": {"100": "1", "--add": "--force"},
    "phantom --n 1 ": {"--add": "--force"},
    "evaluate bundle/ prepared/": {"prepared/": "prepared"},
}
#: Part of a command, a space behind it, and how it ends that needs more than this machine has; elsewhere 0. Several
#: where it depends on the machine.
ENDS: dict[str, tuple[int, ...]] = {
    "--device cuda": (2, 3), "--ray auto": (2, 3), "--engine-library tensorrt ": (3,),
    "build bundle/ --precision": (0, 2, 3), "classify bundle/": (2,), "sensitivity": (0, 1),
    # Not run here but by tests of their own (test_ctclip, test_med3dvlm, test_cluster), or written with parts left out.
    "CT-CLIP_v2.pt": (), "Med3DVLM-DCFormer-SigLIP": (), "--ray local": (), "export …": (),
    "checkpoint.pth --tokenizer": (),
}


def commands() -> Iterator[tuple[str, str]]:
    """Document and command line, as it stands there, comments left out."""
    for document in documents.DOCUMENTS:
        for block in documents._BLOCK.findall(document.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("dcformer "):
                    yield document.name, re.sub(r"\s+#.*$", "", line).removeprefix("dcformer ").strip()


def _words(line: str) -> list[str]:
    for beginning, changes in SMALLER.items():
        if line.startswith(beginning):
            words = [changes.get(word, word) for word in shlex.split(line)]
            words += shlex.split(changes.get("--add", ""))
            break
    else:
        words = shlex.split(line)
    return [str(match) for word in words for match in (sorted(Path().glob(word)) if word == "*.nii.gz" else [word])]


def _expected(line: str) -> tuple[int, ...]:
    return next((codes for part, codes in ENDS.items() if part in f"{line} "), (0,))


def _run(line: str) -> None:
    expected = _expected(line)
    if not expected:
        return
    words = _words(line)
    if words[0] in ("triton", "export"):  # documents make the same thing more than once
        shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
    assert main(words) in expected, line


@pytest.fixture(scope="module")
def example_encoder() -> Iterator[None]:
    """The encoder of docs/encoders.md, exactly as it stands there."""
    text = (documents.REPOSITORY / "docs" / "encoders.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    registry.all_encoders()
    module = types.ModuleType("patch_means")
    sys.modules["patch_means"] = module
    exec(compile(code, "docs/encoders.md", "exec"), module.__dict__)
    try:
        yield
    finally:
        del registry._REGISTRY["patch-means"], sys.modules["patch_means"]


def _furnish(folder: Path, ct: Path, hounsfield: np.ndarray) -> None:
    """What the documents name, but for what their commands make."""
    shutil.copy(ct, folder / "scan.nii.gz")
    (folder / "scans").mkdir()
    for index in range(4):
        write(folder / "scans" / f"{index}.nii.gz", np.roll(hounsfield, 5 * index, axis=0))
    write_dataset(folder / "CT-RATE", DatasetOptions(count=2, seed=3, voxel_mm=6.0), workers=1)
    (folder / "archive" / "2025-01").mkdir(parents=True)
    write(folder / "archive" / "2025-01" / "x.nii.gz", hounsfield)
    (folder / "list.csv").write_text("path\nscan.nii.gz\n")


@pytest.fixture
def place(tmp_path: Path, ct: Path, hounsfield: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Path:
    _furnish(tmp_path, ct, hounsfield)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_quick_commands(place: Path, pristine_bundle: Path):
    shutil.copytree(pristine_bundle, place / "bundle")
    ran = 0
    for _, line in commands():
        if line.split()[0] not in SLOW and not _NEEDS.search(line):
            _run(line)
            ran += 1
    assert ran >= 18


@pytest.mark.thorough
def test_all_commands(place: Path, tokenizer_folder: Path, example_encoder: None):
    golden.NANO.save(place / "checkpoint-14.pth")
    shutil.copytree(tokenizer_folder, place / "BiomedVLP-CXR-BERT-specialized")
    for document, line in commands():
        if document != "README.md" and "embed bundle/" in line and (place / "store").exists():
            shutil.rmtree(place / "store")
        print(line)
        _run(line)


def test_the_example_encoder(example_encoder: None, place: Path, capsys: pytest.CaptureFixture[str]):
    """docs/encoders.md, its commands included; the benchmark of step 4 is run by `make test-all`."""
    for _, line in commands():
        if "mine/" in line and "calibrate" not in line:
            _run(line)
    assert "patch-means" in capsys.readouterr().out


def test_what_is_stated_here_occurs():
    lines = [line for _, line in commands()]
    assert all(any(line.startswith(beginning) for line in lines) for beginning in SMALLER)
    assert all(any(part in f"{line} " for line in lines) for part in ENDS)

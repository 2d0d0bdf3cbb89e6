"""What the profile adds up, and that it names what runs."""

import json
from pathlib import Path

import pytest

from dcformer_deploy.benchmarks.profile import OperatorTime, _add_up, _label
from dcformer_deploy.runtime.cli.app import main


def test_operators_are_added_up_per_inference():
    rows = _add_up([("Conv", 2.0), ("Add", 1.0), ("Conv", 4.0), ("Add", 1.0)], runs=2)
    assert rows == [OperatorTime("Conv", 1.0, 3.0), OperatorTime("Add", 1.0, 1.0)]


@pytest.mark.parametrize(("shapes", "label"), [
    ([[1, 32, 8, 8], [64, 32, 3, 1], [64]], "Conv 3x1, 32 to 64"),
    ([[1, 32, 4, 8, 8], [32, 1, 13, 1, 1]], "Conv 13x1x1, depthwise"),
])
def test_convolutions_are_told_apart(shapes, label):
    assert _label("Conv", shapes) == label
    assert _label("Add", shapes) == "Add"


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_json(capsys: pytest.CaptureFixture[str], pristine_bundle: Path, ct: Path, backend: str):
    arguments = ["--backend", backend, "--scan", str(ct), "--runs", "2", "--json"]
    assert main(["profile", str(pristine_bundle), *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert any(row["operator"].startswith("Conv") for row in report["operators"])
    assert all(row["ms"] >= 0 for row in report["operators"])
    phases = report["phases_ms"]
    assert phases["total"] >= phases["image"] > 0
    assert backend in report["backend"]


def test_table(capsys: pytest.CaptureFixture[str], pristine_bundle: Path):
    assert main(["profile", str(pristine_bundle), "--runs", "1", "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert "other kinds" in out and "Image tower" in out

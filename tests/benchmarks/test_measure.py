"""The benchmark's bookkeeping; how fast anything is, is no test's business."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

import scans
from dcformer_deploy.benchmarks import entrants
from dcformer_deploy.benchmarks import measure as module
from dcformer_deploy.benchmarks.contenders import Entrant, Job
from dcformer_deploy.benchmarks.entrants import NAMES, Field, choose_entrants
from dcformer_deploy.benchmarks.measure import measure
from dcformer_deploy.runtime import DcformerError, InputError
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.errors import DcformerWarning

SHAPE = (64, 128, 128)


def test_both_contenders_compute_the_same(pristine_bundle: Path, checkpoint: Path, tmp_path: Path):
    entrants = choose_entrants(["torch"], Field(pristine_bundle, checkpoint, 2), tmp_path)
    seen: list[str] = []
    report = measure(entrants, "dcformer-nano", SHAPE, 3, seen.append)
    eager, bundle = report.contenders
    assert (eager.runs, bundle.runs) == (3, 3)
    assert eager.ratio == 1 and bundle.ratio > 0
    assert bundle.cosine == pytest.approx(1, abs=1e-6)
    for contender in report.contenders:
        assert 0 < contender.median_ms <= contender.p95_ms < contender.cold_start_ms
        assert contender.peak_rss_mb > 4 * 64 * 128 * 128 / (1 << 20)
    turns = [text.split(":")[0] for text in seen if " of " in text]
    assert turns == ["torch", "onnxruntime", "onnxruntime", "torch", "torch", "onnxruntime"]


def test_dying_contender_is_reported(pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_serve", _die)
    with pytest.raises(DcformerError, match="benchmark of onnxruntime: its process ended with exit code 7"):
        measure([_alone(pristine_bundle)], "dcformer-nano", SHAPE, 3)


def _alone(bundle: Path) -> Entrant:
    return Entrant("onnxruntime", "bundle", Job(str(bundle), None, 1))


def _die(*_args: object) -> None:
    os._exit(7)


def test_contender_that_dies_between_turns_is_reported(pristine_bundle: Path):
    worker = module.Worker(_alone(pristine_bundle), SHAPE)
    worker._process.kill()
    worker._process.join()
    for order in (worker.run, worker.close):
        with pytest.raises(DcformerError, match="ended with exit code -9"):
            order()


def test_failing_contender_is_reported(tmp_path: Path):
    with pytest.raises(DcformerError, match="benchmark of onnxruntime: InputError: .* no such bundle"):
        measure([_alone(tmp_path / "none")], "dcformer-nano", SHAPE, 3)


def test_those_that_fail_are_left_out(pristine_bundle: Path, tmp_path: Path):
    good, bad = _alone(pristine_bundle), dataclasses.replace(_alone(tmp_path / "none"), name="bad")
    report = measure([bad, good], "dcformer-nano", SHAPE, 3, keep_going=True)
    assert [(c.name, c.runs, c.ratio) for c in report.contenders] == [("onnxruntime", 3, 1)]
    ((name, why),) = report.left_out
    assert name == "bad"
    assert "no such bundle" in why
    assert measure([bad], "dcformer-nano", SHAPE, 3, keep_going=True).contenders == ()


def test_command(pristine_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", str(pristine_bundle), "--runs", "3", "--threads", "1", "--json",
                 "--report", str(tmp_path / "b.html")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [c["name"] for c in report["contenders"]] == ["torch", "onnxruntime"]
    assert report["threads"] == 1 and report["volume_dhw"] == list(SHAPE)
    assert {"median_ms", "p95_ms", "peak_rss_mb", "cold_start_ms", "ratio"} <= set(report["contenders"][0])
    page = (tmp_path / "b.html").read_text()
    assert f"<td class=\"number\">{report['contenders'][1]['median_ms']:.0f}</td>" in page and "<td>torch</td>" in page


@pytest.mark.thorough
def test_everyone_computes_the_same(pristine_bundle: Path, checkpoint: Path, tmp_path: Path):
    exact = [name for name in NAMES if not name.endswith(("bf16", "int8"))]
    entrants = choose_entrants(exact, Field(pristine_bundle, checkpoint, 2), tmp_path)
    report = measure(entrants, "dcformer-nano", SHAPE, 3)
    assert [c.name for c in report.contenders] == exact
    assert all(c.cosine == pytest.approx(1, abs=1e-6) for c in report.contenders[1:])
    assert {path.name for path in tmp_path.iterdir()} == {"naive", "openvino", "tokenizer"}


def test_int8_needs_its_graph(pristine_bundle: Path, calibrated: Path, tmp_path: Path):
    with pytest.raises(InputError, match="--against openvino-int8: .* has no int8 graph; `dcformer calibrate` adds it"):
        choose_entrants(["openvino-int8"], Field(pristine_bundle, None, 1), tmp_path)
    chosen = choose_entrants(["openvino-int8"], Field(calibrated, None, 1), tmp_path)
    assert [(entrant.name, entrant.job.precision) for entrant in chosen] == [
        ("openvino-int8", "int8"), ("onnxruntime", "fp32")]


def test_bfloat16_on_a_cpu_without(pristine_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The others are measured all the same."""
    monkeypatch.setattr(entrants, "has_bfloat16", lambda: False)
    with pytest.warns(DcformerWarning, match="--against openvino-bf16: left out; bf16: this CPU has no bfloat16 units"):
        chosen = choose_entrants(["torch", "openvino-bf16"], Field(pristine_bundle, None, 1), tmp_path)
    assert [entrant.name for entrant in chosen] == ["torch", "onnxruntime"]


def test_pytorch_cannot_start_from_dicom(pristine_bundle: Path, tmp_path: Path):
    names = ["torch-fp32", "tensorrt-fp16"]
    for scan, first in ((tmp_path / "a.nii.gz", "torch-fp32"), (tmp_path, "tensorrt-fp16"), (None, "torch-fp32")):
        found = entrants.gpu_entrants(names, Field(pristine_bundle, None, 1, scan))
        assert found[0].name == first


def test_from_a_file_to_scores(capsys: pytest.CaptureFixture[str], pristine_bundle: Path, checkpoint: Path, ct: Path):
    assert main(["bench", str(pristine_bundle), "--checkpoint", str(checkpoint), "--scan", str(ct), "--runs", "3",
                 "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["scan"] == str(ct)
    # The header's directions are not LPS, which the original ignores and we do not: near, not equal.
    assert report["contenders"][1]["cosine"] > 0.9


def test_loading_alone(capsys: pytest.CaptureFixture[str], pristine_bundle: Path, hounsfield: np.ndarray,
                       tmp_path: Path):
    path = scans.write(tmp_path / "a.nii.gz", hounsfield)
    assert main(["bench", str(pristine_bundle), "--scan", str(path), "--load-only", "--runs", "3", "--json"]) == 0
    original, ours = json.loads(capsys.readouterr().out)["contenders"]
    assert (original["name"], ours["name"]) == ("original", "ours")
    assert ours["cosine"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--against", "torhc"], "--against 'torhc': unknown; did you mean 'torch'"),
    (["--against", "torch,torch"], "--against: torch is named twice"),
    (["--against", "onnx-naive"], "pass --checkpoint, the file it was made from"),
    (["--load-only"], "--load-only needs --scan SCAN"),
    (["--scan", "none.nii"], "none.nii: no such scan")])
def test_bad_usage(capsys: pytest.CaptureFixture[str], pristine_bundle: Path, arguments: list[str], message: str):
    assert main(["bench", str(pristine_bundle), *arguments]) == 2
    assert message in capsys.readouterr().err

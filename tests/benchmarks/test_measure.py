"""The benchmark's bookkeeping; how fast anything is, is no test's business."""

import json
import os
from pathlib import Path

import pytest

from dcformer_deploy.benchmarks import measure as module
from dcformer_deploy.benchmarks.contenders import Job
from dcformer_deploy.benchmarks.measure import measure
from dcformer_deploy.runtime import DcformerError
from dcformer_deploy.runtime.cli.app import main

SHAPE = (64, 128, 128)


def test_both_contenders_compute_the_same(pristine_bundle: Path, checkpoint: Path):
    job = Job(str(pristine_bundle), str(checkpoint), threads=2, same_weights=True)
    seen: list[str] = []
    report = measure(["pytorch", "onnxruntime"], job, "dcformer-nano", SHAPE, 3, seen.append)
    eager, bundle = report.contenders
    assert (eager.runs, bundle.runs) == (3, 3)
    assert eager.ratio == 1 and bundle.ratio > 0
    assert bundle.cosine == pytest.approx(1, abs=1e-6)
    for contender in report.contenders:
        assert 0 < contender.median_ms <= contender.p95_ms < contender.cold_start_ms
        assert contender.peak_rss_mb > 4 * 64 * 128 * 128 / (1 << 20)
    turns = [text.split(":")[0] for text in seen if " of " in text]
    assert turns == ["pytorch", "onnxruntime", "onnxruntime", "pytorch", "pytorch", "onnxruntime"]


def test_dying_contender_is_reported(pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_serve", _die)
    with pytest.raises(DcformerError, match="benchmark of onnxruntime: its process ended with exit code 7"):
        measure(["onnxruntime"], Job(str(pristine_bundle), None, 1), "dcformer-nano", SHAPE, 3)


def _die(*_args: object) -> None:
    os._exit(7)


def test_contender_that_dies_between_turns_is_reported(pristine_bundle: Path):
    job = Job(str(pristine_bundle), None, 1)
    worker = module.Worker("onnxruntime", job, SHAPE)
    worker._process.kill()
    worker._process.join()
    for order in (worker.run, worker.close):
        with pytest.raises(DcformerError, match="ended with exit code -9"):
            order()


def test_failing_contender_is_reported(tmp_path: Path):
    with pytest.raises(DcformerError, match="benchmark of onnxruntime: InputError: .* no such bundle"):
        measure(["onnxruntime"], Job(str(tmp_path / "none"), None, 1), "dcformer-nano", SHAPE, 3)


def test_command(pristine_bundle: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", str(pristine_bundle), "--runs", "3", "--threads", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [c["name"] for c in report["contenders"]] == ["pytorch", "onnxruntime"]
    assert report["threads"] == 1 and report["volume_dhw"] == list(SHAPE)
    assert {"median_ms", "p95_ms", "peak_rss_mb", "cold_start_ms", "ratio"} <= set(report["contenders"][0])

"""The survey's bookkeeping, and what is written of it; how fast anything is, is no test's business."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path

import pytest

from dcformer_deploy.benchmarks import survey as module
from dcformer_deploy.benchmarks.report import markdown, write_report
from dcformer_deploy.benchmarks.survey import (
    EncoderMeasurement,
    Survey,
    choose_encoders,
    fitting_size,
    pareto_front,
    survey,
)
from dcformer_deploy.export.complexity import count
from dcformer_deploy.export.registry import all_encoders, get_encoder
from dcformer_deploy.runtime import InputError
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.errors import CheckFailed, DcformerError


def row(name: str, latency: float | None, f1: float | None, problem: str | None = None) -> EncoderMeasurement:
    return EncoderMeasurement(name, (32, 64, 64), 1.5, 2.0, f1, 4, latency, latency, 900.0, 100.0, 3.0, 1.0, problem)


ROWS = (row("dcformer-nano", 40, 41.9), row("vit-naive", 30, 42.5), row("vit-tiny", 60, 43.2),
        row("dcformer-tiny", 90, 46.3), row("convnext-tiny", 95, 42.1), row("ctvit-ctclip", 10, None),
        row("dcformer-large", None, None, "its process ended with exit code -9"))
SURVEY = Survey("2026-11-24", "a machine", 2, "a backend", 64, 2, ROWS)


def test_pareto_front_by_hand():
    assert [r.encoder for r in pareto_front(ROWS)] == ["vit-naive", "vit-tiny", "dcformer-tiny"]
    same = [row("a", 5, 40.0), row("b", 5, 41.0), row("c", 6, 41.0)]
    assert [r.encoder for r in pareto_front(same)] == ["b"]


def test_report_files(tmp_path: Path):
    paths = write_report(SURVEY, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == [f"encoders-64.{suffix}" for suffix in ("md", "csv", "json", "png", "html")]
    with paths[1].open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [r["encoder"] for r in rows] == [r.encoder for r in ROWS]
    assert rows[0]["median_ms"] == "40" and rows[0]["volume_dhw"] == "32x64x64" and rows[-1]["median_ms"] == ""
    assert json.loads(paths[2].read_text())["encoders"][1]["published_f1"] == 42.5
    assert paths[3].read_bytes().startswith(b"\x89PNG")
    page = paths[4].read_text()
    assert all(f"<td>{r.encoder}</td>" in page for r in ROWS)
    assert base64.b64encode(paths[3].read_bytes()).decode() in page
    assert "No other encoder is both faster and better: " in page


def test_markdown_is_one_table_with_the_front_in_bold():
    text = markdown(SURVEY)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(ROWS) and len({line.count("|") for line in table}) == 1
    assert "| **vit-naive** | 64x64x32 | 30 |" in text and "| dcformer-nano |" in text
    assert "dcformer-large: its process ended" in text and "a machine" in text and "2026-11-24" in text


def test_choosing():
    assert choose_encoders(["all"]) == all_encoders()
    assert [spec.name for spec in choose_encoders(["vit-tiny", "dcformer-nano"])] == ["vit-tiny", "dcformer-nano"]
    with pytest.raises(InputError, match="did you mean 'vit-tiny'"):
        choose_encoders(["vit-tny"])
    with pytest.raises(InputError, match="dcformer-nano is named twice"):
        choose_encoders(["all", "dcformer-nano"])
    assert fitting_size(get_encoder("dcformer-nano"), 256) == 256
    assert fitting_size(get_encoder("ctvit-ctclip"), 256) == 240
    with pytest.raises(InputError, match="--size 64: dcformer-nano takes multiples of 128"):
        fitting_size(get_encoder("dcformer-nano"), 64)


def test_command_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["bench", "--encoders", "vit-naive", "--size", "64", "--runs", "3", "--threads", "1", "--out",
                 str(tmp_path / "out"), "--bundles", str(tmp_path / "bundles")]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (measured,) = report["encoders"]
    assert report["rounds"] == 2 and measured["runs"] == 4 and measured["problem"] is None
    counted = count(get_encoder("vit-naive"), 64)
    assert measured["gflops"] == pytest.approx(counted.multiply_accumulates / 1e9)
    assert measured["gflop_per_s"] == pytest.approx(measured["gflops"] / measured["median_ms"] * 1e3)
    assert measured["ratio"] == 1 and measured["published_f1"] == 42.5
    assert measured["median_ms"] <= measured["p95_ms"] < measured["cold_start_ms"] and measured["peak_rss_mb"] > 20
    made = (tmp_path / "bundles" / "vit-naive-64" / "manifest.json").stat().st_mtime_ns
    assert main(arguments) == 0  # with the bundle that is there
    assert "vit-naive" in capsys.readouterr().out and (tmp_path / "out" / "encoders-64.png").is_file()
    assert (tmp_path / "bundles" / "vit-naive-64" / "manifest.json").stat().st_mtime_ns == made


def test_an_encoder_that_fails_gets_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(_turn: object, _runs: int) -> None:
        raise DcformerError("benchmark of onnxruntime: its process ended with exit code -9")

    monkeypatch.setattr(module._Turns, "measure", fail)
    result = survey([get_encoder("vit-naive")], 64, [tmp_path], 1, 2, 2)
    assert result.encoders[0].problem == "benchmark of onnxruntime: its process ended with exit code -9"
    assert result.encoders[0].median_ms is None and result.backend == "nothing ran"
    assert "-9" in markdown(result)
    write_report(result, tmp_path)  # a plot without points


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "pass a BUNDLE, or --encoders"),
    (["b", "--encoders", "all"], "pass a BUNDLE, or --encoders"),
    (["--encoders", "all"], "--encoders needs --size S"),
    (["--encoders", "all", "--size", "256", "--checkpoint", "c"], "--checkpoint is for a BUNDLE"),
    (["b", "--size", "256"], "--size is for --encoders"),
    (["b", "--out", "o"], "--out is for --encoders"),
    (["--encoders", "nano", "--size", "256"], "encoder 'nano': unknown"),
])
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_export_that_differs_from_pytorch_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(*_: object) -> None:
        raise CheckFailed("image.fp32.onnx: differs from PyTorch")

    monkeypatch.setattr(module, "export_random_weights", fail)
    specs = [get_encoder("dcformer-nano")]
    made = module.export_all(specs, 128, tmp_path, lambda _: None)
    (row,) = module.survey(specs, 128, made, 1, 1, 2).encoders
    assert row.problem == "image.fp32.onnx: differs from PyTorch"
    assert row.median_ms is None

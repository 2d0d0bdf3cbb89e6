"""What is checked of all graphs before the first build, and what the command prints and records of each engine."""

import dataclasses
import re
import shutil
from pathlib import Path

import onnx
import pytest

from dcformer_deploy.export.engine import add_engines
from dcformer_deploy.runtime.bundle import open_bundle, record_file, write_manifest
from dcformer_deploy.runtime.cli import build
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.engines import Gpu, Layer, engine_records
from graphs import GraphBuilder

pytest.importorskip("tensorrt_rtx")

#: A GPU that has room for nothing.
TINY = Gpu("NVIDIA L4", "8.9", 1 << 20)


@pytest.fixture
def bundle(calibrated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(calibrated, tmp_path / "bundle"))


def _put_determinant(folder: Path, name: str) -> None:
    """In a graph's place one with an operator that no TensorRT has."""
    manifest = open_bundle(folder).manifest
    graph = GraphBuilder()
    proto = graph.finish(graph.node("Det", graph.node("Relu", "x")), {"x": ["batch", 3, 3]})
    proto.graph.node[1].name = f"determinant of {name}"
    onnx.save(proto, folder / name)
    files = tuple(record_file(folder, name) if file.path == name else file for file in manifest.files)
    write_manifest(folder, dataclasses.replace(manifest, files=files))


def test_all_graphs_are_parsed_before_any_is_built(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """By NVIDIA's own parser: the first graph is good, two of the others are not, and both are named."""
    refused = ("text.fp16.onnx", "image.int8.tensorrt.onnx")
    for name in refused:
        _put_determinant(bundle, name)
    built, stages = [], []
    monkeypatch.setattr(add_engines, "build_engine", lambda *arguments: built.append(arguments))
    real = add_engines._check
    monkeypatch.setattr(add_engines, "_check", lambda *arguments: real(*arguments[:-1], _Stages(stages)))
    before = sorted(path.name for path in bundle.iterdir())
    assert main(["build", str(bundle), "--precision", "fp16,int8"]) == 2
    error = capsys.readouterr().err
    for name in refused:
        assert f"{name}: the ONNX parser refuses it: " in error
        assert f"'determinant of {name}' (Det)" in error
    assert error.count("refuses it") == 2
    assert built == []
    assert stages == [f"checking {name}" for name in ("image.fp16.onnx", "text.fp16.onnx", "image.int8.tensorrt.onnx",
                                                      "text.int8.onnx")]
    assert sorted(path.name for path in bundle.iterdir()) == before


class _Stages:
    def __init__(self, seen: list[str]) -> None:
        self.stage = seen.append


def test_memory_is_printed(bundle: Path, capsys):
    """Of activations and weights, in millions of bytes."""
    assert main(["build", str(bundle), "--precision", "fp16", "--max-batch", "4"]) == 0
    printed = capsys.readouterr()
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.out.splitlines() if "│" in line]
    rows = {cells[0]: cells for cells in lines}
    assert "memory MB" in printed.out
    for record in engine_records(open_bundle(bundle)):
        expected = record.activation_bytes + (bundle / record.weights).stat().st_size
        assert rows[record.engine][2] == f"{expected / 1e6:.1f}"
        assert record.engine_layers is None
    assert "warning" not in printed.err  # no GPU, and so no memory that it could be too much for


def test_a_gpu_that_is_too_small(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Warned of only if the engines are for the GPU that is here; they are built all the same."""
    monkeypatch.setattr(build, "gpu_or_none", lambda: TINY)
    inspected = []
    monkeypatch.setattr(add_engines, "fused_layers", lambda library, plan, engine: inspected.append(engine) or
                        (Layer("gemm", 3),))
    command = ["build", str(bundle), "--precision", "fp16", "--max-batch", "2"]
    assert main(command) == 0
    warned = capsys.readouterr().err
    assert re.search(r"warning: image.fp16.onnx: \d+\.\d GiB of activations .* for a batch of 2 if nothing is fused, "
                     r"and 2 requests at once, .* need 2 times that; the NVIDIA L4 has 0.0 GiB", warned)
    assert "warning: text.fp16.onnx: " in warned
    assert inspected == [f"{role}.fp16.tensorrt_rtx.portable.engine" for role in ("image", "text")]
    records = engine_records(open_bundle(bundle))
    assert [(record.gpu, record.engine_layers) for record in records] == [("NVIDIA L4", (Layer("gemm", 3),))] * 2
    inspected.clear()
    assert main([*command, "--gpu", "12.0"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert inspected == []

"""dcformer check: what computes the same passes, a wrong graph or engine does not, what cannot run is told."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from fake_gpu import install, with_engines
from tokenizers import Tokenizer

from dcformer_deploy.calibration import check
from dcformer_deploy.calibration.check import random_tokens
from dcformer_deploy.runtime.bundle import open_bundle, record_file, write_manifest
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.gpu import gpu_or_none


def _negated(path: Path, name: str = "s1.0.mlp.mlp.3.weight") -> None:
    """Turn the sign of one layer of an ONNX file, as a broken kernel might."""
    proto = onnx.load(path)
    tensor = next(t for t in proto.graph.initializer if name in t.name and "scale" not in t.name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(proto, path)


def test_graphs_of_a_calibrated_bundle(calibrated: Path, scans: Path, capsys):
    assert main(["check", str(calibrated), "--data", str(scans), "--samples", "2", "--json"]) == 0
    rows = {row["file"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"image.fp16.onnx", "image.bf16.tensorrt.onnx", "image.int8.onnx", "image.int8.tensorrt.onnx",
            "text.fp16.onnx", "text.bf16.tensorrt.onnx", "text.int8.onnx"} <= set(rows)
    assert all(row["passed"] for row in rows.values())
    noise = {name: row["sqnr_db"] for name, row in rows.items()}
    assert noise["image.fp16.onnx"] > noise["image.bf16.tensorrt.onnx"] + 10
    assert noise["text.fp16.onnx"] > noise["text.int8.onnx"]
    assert rows["image.fp16.onnx"]["back_end"] == "onnxruntime, emulated"
    assert rows["text.fp16.onnx"]["codes_equal"] is None
    assert 0.9 < rows["image.fp16.onnx"]["codes_equal"] <= 1
    assert main(["check", str(calibrated)]) == 0
    assert "image.int8.onnx" in capsys.readouterr().out


def test_scans_that_can_be_read_and_no_more(calibrated: Path, scans: Path, tmp_path: Path, capsys):
    folder = Path(shutil.copytree(scans, tmp_path / "scans"))
    (folder / "a.nii.gz").write_bytes(b"no gzip")
    assert main(["check", str(calibrated), "--data", str(folder), "--samples", "2"]) == 0
    captured = capsys.readouterr()
    assert "on 2 volumes" in captured.out
    assert "left out: " in captured.err
    for arguments, message in ((["--data", folder, "--samples", 4], "only 3 of the 4 scans can be read"),
                               (["--split", "valid"], "--split: only with --data")):
        assert main(["check", str(calibrated), *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err


def test_token_ids_are_those_of_the_tokenizer(pristine_bundle: Path):
    bundle = open_bundle(pristine_bundle)
    size = Tokenizer.from_file(str(pristine_bundle / "tokenizer.json")).get_vocab_size()
    (tokens,) = random_tokens(bundle)
    assert 0.8 * size < tokens["input_ids"].max() < size
    assert tokens["attention_mask"].sum(axis=1).tolist() == [2, 9, 16, 24]


@pytest.mark.parametrize(("layer", "failures"), [
    ("s1.0.mlp.mlp.3.weight", {"features"}), ("to_visual_latent.weight", {"embeddings of codes"}),
    ("vq._codebook.embed", {"codes", "embeddings of codes"})])
def test_a_graph_that_computes_something_else(calibrated: Path, tmp_path: Path, capsys, layer: str,
                                              failures: set[str]):
    bundle = Path(shutil.copytree(calibrated, tmp_path / "bundle"))
    _negated(bundle / "image.fp16.onnx", layer)
    manifest = open_bundle(calibrated).manifest
    files = tuple(record_file(bundle, record.path) for record in manifest.files)
    write_manifest(bundle, dataclasses.replace(manifest, files=files))
    assert main(["check", str(bundle), "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.err.strip() == "error: check failed: image.fp16.onnx"
    (failed,) = (row for row in json.loads(captured.out) if row["passed"] is False)
    assert failed["file"] == "image.fp16.onnx"
    assert failures <= set(failed["failures"])
    assert "features" in failures or "features" not in failed["failures"]


def test_engines(calibrated: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tensorrt_rtx")
    bundle = with_engines(calibrated, tmp_path / "bundle")
    if gpu_or_none() is None:
        assert main(["check", str(calibrated), "--require-engines"]) == 3
        assert "holds no engine; `dcformer build" in capsys.readouterr().err
        assert main(["check", str(bundle)]) == 0
        not_run = capsys.readouterr().out.split("not run: ")[1]
        assert main(["check", str(bundle), "--require-engines"]) == 3
        assert "4 engines could not run here, the first: " in capsys.readouterr().err
        assert all(name in not_run for name in ("image.fp16.tensorrt.sm90.engine", "text.fp16.tensorrt_rtx.portable"))
    name = "image.fp16.tensorrt.sm90.engine"
    plan = (bundle / name).read_bytes()
    (bundle / name).write_bytes(plan[:-1] + bytes([plan[-1] ^ 1]))  # damaged: told with a GPU and without
    assert main(["check", str(bundle)]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == f"error: check failed: {name}"
    assert "not the bytes that were built" in captured.out
    (bundle / name).write_bytes(plan)
    fake = install(bundle, monkeypatch)
    assert main(["check", str(bundle), "--json"]) == 0
    rows = {row["file"]: row for row in json.loads(capsys.readouterr().out)}
    engine = rows["image.fp16.tensorrt.sm90.engine"]
    graph_db = rows["image.fp16.onnx"]["sqnr_db"]
    # The worse of volumes alone, as the graph, and of a full batch, in which some of them are twice.
    assert graph_db - 0.5 < engine["sqnr_db"] <= graph_db + 1e-6
    assert engine["least_db"] == pytest.approx(min(60, graph_db - 6))
    assert all(row["passed"] for row in rows.values())
    fake.largest_right_batch = 1
    assert main(["check", str(bundle), "--json"]) == 1
    failed = [row for row in json.loads(capsys.readouterr().out) if row["passed"] is False]
    assert {row["file"] for row in failed} == {name for name in rows if name.endswith(".engine")}
    assert all(failure.endswith(" in a batch of 3") for row in failed if row["role"] == "image"
               for failure in row["failures"])
    fake.largest_right_batch = 1 << 20
    assert "NVIDIA H100" in engine["back_end"]
    for data, (record, proto) in fake.engines.items():
        if record.role == "image":
            path = tmp_path / "wrong.onnx"
            onnx.save(proto, path)
            _negated(path)
            fake.engines[data] = (record, onnx.load(path))
    assert main(["check", str(bundle), "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: check failed: image.fp16.tensorrt")
    assert all("image" in row["file"] for row in json.loads(captured.out) if row["passed"] is False)


def test_nothing_to_compare(pristine_bundle: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    bundle = Path(shutil.copytree(pristine_bundle, tmp_path / "bundle"))
    manifest = open_bundle(bundle).manifest
    graphs = tuple(graph for graph in manifest.graphs if graph.target == "any")
    write_manifest(bundle, dataclasses.replace(manifest, graphs=graphs))
    assert main(["check", str(bundle)]) == 0
    assert "openvino" in capsys.readouterr().out
    monkeypatch.setattr(check, "find_spec", lambda name: None)
    assert main(["check", str(bundle)]) == 2
    assert "there is nothing to compare" in capsys.readouterr().err


def test_nan_fails(calibrated: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    from dcformer_deploy.calibration import check

    real = check._Reference.run
    monkeypatch.setattr(check._Reference, "run", lambda self, backend, feeds: [
        {name: array * np.nan if self.role == "text" else array for name, array in found.items()}
        for found in real(self, backend, feeds)])
    assert main(["check", str(calibrated)]) == 1
    assert "check failed: text." in capsys.readouterr().err
    assert main(["check", str(calibrated), "--json"]) == 1
    rows = [row for row in json.loads(capsys.readouterr().out) if row["role"] == "text"]
    assert [(row["passed"], row["cosine"]) for row in rows] == [(False, None)] * len(rows)

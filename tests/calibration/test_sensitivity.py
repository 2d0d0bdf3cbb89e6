"""dcformer sensitivity: the ranking finds a layer made fragile, the choice keeps the target, and is written."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from dcformer_deploy.calibration.add_precisions import bundle_record, thresholds_of
from dcformer_deploy.calibration.calibrate import image_graph
from dcformer_deploy.calibration.layers import group_name, quantizable_layers
from dcformer_deploy.calibration.sensitivity import Outputs, analyse, auroc_kept, cosine_kept
from dcformer_deploy.runtime import InputError, load
from dcformer_deploy.runtime.bundle import open_bundle
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.volume import image_feeds


def _feeds(bundle: Path, scans: Path) -> list[dict[str, np.ndarray]]:
    model = load(bundle)
    inputs = model.manifest.graphs[0].inputs
    return [image_feeds(inputs, model.preprocess(scans / name)[None]) for name in ("a.nii.gz", "b.nii.gz")]


def test_a_fragile_layer_is_found(calibrated: Path, scans: Path):
    """A range far too small for one layer's input: it must come first, alone in front, and go back to float."""
    opened = open_bundle(calibrated)
    _, proto = image_graph(opened)
    limits = thresholds_of(bundle_record(opened, proto), "minmax")
    layers = [layer for layer in quantizable_layers(ir.from_proto(proto).graph) if not layer.depthwise]
    fragile = next(layer for layer in layers if "s2.0.mlp.mlp.3" in group_name(layer))
    limits[str(fragile.x.name)] *= 0.01
    found = analyse(proto, limits, _feeds(calibrated, scans), 2, "", cosine_kept, target=2.0)  # never
    assert found.layers[0].layer == group_name(fragile)
    assert found.layers[0].sqnr_db < found.layers[1].sqnr_db - 10
    assert len(found.layers) == 14  # 2 of the stem, 4 stages of 3
    assert sum(damage.share for damage in found.layers) == pytest.approx(1)
    assert found.steps[0].back is None
    assert found.steps[0].share == pytest.approx(1)
    assert found.steps[1].back == group_name(fragile)
    assert [step.share for step in found.steps] == sorted((step.share for step in found.steps), reverse=True)
    assert len(found.floats) == 14
    assert found.steps[-1].share == 0
    assert found.steps[-1].kept == pytest.approx(1)


def test_choice_is_written(calibrated: Path, scans: Path, tmp_path: Path, capsys):
    bundle = Path(shutil.copytree(calibrated, tmp_path / "bundle"))
    arguments = ["sensitivity", str(bundle), "--data", str(scans), "--samples", "2", "--method", "minmax"]
    assert main([*arguments, "--target-cosine", "0.9999", "--json", "--out", str(tmp_path / "r"), "--write"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert found["steps"][-1]["kept"] >= 0.9999 or found["steps"][-1]["share"] == 0
    assert {path.name for path in (tmp_path / "r").iterdir()} == {f"sensitivity.{s}" for s in ("md", "json", "png")}
    conversion = next(c for c in open_bundle(bundle).manifest.conversions if c.precision == "int8")
    if found["steps"][-1]["share"] > 0:
        assert len([note for note in conversion.notes if note.endswith("float, by choice")]) == len(found["floats"])
        proto = onnx.load(bundle / "image.int8.onnx")
        integers = {t.name.split("/")[0] for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT8}
        assert not any(name.startswith(floating) for floating in found["floats"] for name in integers)


def test_refusals(calibrated: Path, pristine_bundle: Path, scans: Path, capsys):
    for arguments, message in (
        ([pristine_bundle, "--data", scans, "--samples", 2], "nothing was observed of it yet"),
        ([calibrated, "--data", scans, "--samples", 9], "4 scans, but 9 were asked for; pass --samples 4"),
        ([calibrated, "--data", scans, "--samples", 2, "--target-auroc-drop", "0.1"], "no labels, or none that differ"),
        ([calibrated, "--data", scans, "--target-auroc-drop", "0.1", "--target-cosine", "0.9"], "choose one"),
    ):
        assert main(["sensitivity", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err


def test_auroc_is_of_the_classes_that_differ(calibrated: Path):
    model = load(calibrated)
    random = np.random.default_rng(0)
    rows = random.standard_normal((6, 512)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels = [tuple([index % 2 == 0] + [True] * 17) for index in range(6)]
    exact = Outputs(rows, rows)
    kept = auroc_kept(model, labels, Path("x"))
    assert kept(exact, exact) == 0
    assert cosine_kept(exact, exact) == pytest.approx(1)
    with pytest.raises(InputError, match="x: no labels"):
        auroc_kept(model, [(True, False)] * 3, Path("x"))

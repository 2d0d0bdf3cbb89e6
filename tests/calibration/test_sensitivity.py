"""dcformer sensitivity: the ranking finds a layer made fragile, the choice keeps the target, and is written."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from dcformer_deploy.calibration import sensitivity
from dcformer_deploy.calibration.add_precisions import bundle_record, thresholds_of
from dcformer_deploy.calibration.calibrate import image_graph
from dcformer_deploy.calibration.layers import group_name, quantizable_layers
from dcformer_deploy.calibration.sensitivity import Damage, Outputs, Sensitivity, Step, analyse, auroc_kept, cosine_kept
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


@pytest.mark.parametrize(("target", "code"), [("0.0", 0), ("1.0", 1)])
def test_all_or_nothing(calibrated: Path, scans: Path, capsys, target: str, code: int):
    """Any loss is allowed: all layers stay in INT8. None is: all go back, which is a failed check."""
    assert main(["sensitivity", str(calibrated), "--data", str(scans), "--samples", "2", "--method", "minmax", "--json",
                 "--target-cosine", target]) == code
    found = json.loads(capsys.readouterr().out)
    assert (len(found["steps"]), len(found["floats"])) == ((1, 0), (15, 14))[code]


def test_choice_is_written(calibrated: Path, scans: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """As if the promise held once two layers were float: a decomposed convolution and a product."""
    bundle = Path(shutil.copytree(calibrated, tmp_path / "bundle"))
    layers = [layer for layer in quantizable_layers(ir.from_proto(image_graph(open_bundle(bundle))[1]).graph)
              if not layer.depthwise]
    floats = tuple(sorted({group_name(layers[0]), group_name(layers[-1])}))
    damages = (Damage(floats[0], 0.5, 0.9, 20.0),)
    fixed = Sensitivity("", 2, damages, (Step(None, 1.0, 0.5), Step(floats[0], 0.5, 0.95)), floats)
    monkeypatch.setattr(sensitivity, "analyse", lambda *_: fixed)
    assert main(["sensitivity", str(bundle), "--data", str(scans), "--samples", "2", "--method", "minmax", "--json",
                 "--target-cosine", "0.9", "--out", str(tmp_path / "r"), "--write"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {path.name for path in (tmp_path / "r").iterdir()} == {f"sensitivity.{s}" for s in ("md", "json", "png")}
    conversion = next(c for c in open_bundle(bundle).manifest.conversions if c.precision == "int8")
    chosen = [note.removesuffix(": float, by choice") for note in conversion.notes if note.endswith("by choice")]
    assert tuple(chosen) == floats
    assert found["floats"] == list(floats)
    proto = onnx.load(bundle / "image.int8.onnx")
    integers = {t.name.split("/")[0] for t in proto.graph.initializer
                if t.data_type == onnx.TensorProto.INT8 and "/" in t.name}
    assert not any(name.startswith(floating) for floating in chosen for name in integers)
    assert len(integers) == 14  # 18 layers less three branches and a product


def test_refusals(calibrated: Path, pristine_bundle: Path, scans: Path, capsys):
    for arguments, message in (
        ([pristine_bundle, "--data", scans, "--samples", 2], "nothing was observed of it yet"),
        ([calibrated, "--data", scans, "--samples", 9], "4 scans, but 9 were asked for; pass --samples 4"),
        ([calibrated, "--data", scans, "--samples", 2, "--target-auroc-drop", "0.1"], "no labels, or none that differ"),
        ([calibrated, "--data", scans, "--target-auroc-drop", "0.1", "--target-cosine", "0.9"], "choose one"),
        ([calibrated, "--data", scans, "--out", scans / "a.nii.gz"], "expected a folder name, found a file"),
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

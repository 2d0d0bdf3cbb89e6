"""dcformer retention: figures against their definitions, labels, and what it refuses."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import refuse
from sklearn.metrics import roc_auc_score

from dcformer_deploy.benchmarks.evaluation.metrics import auroc_difference
from dcformer_deploy.calibration.sqnr import EXACT_DB, layer_noise
from dcformer_deploy.runtime import Model, load
from dcformer_deploy.runtime.backends.openvino import has_bfloat16
from dcformer_deploy.runtime.bundle import open_bundle
from dcformer_deploy.runtime.cli import retention
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.errors import DcformerWarning
from dcformer_deploy.runtime.manifest import CT_RATE_CLASSES
from graphs import GraphBuilder, volume


def _labelled(scans: Path, folder: Path) -> Path:
    """A copy of the scans with labels."""
    folder = Path(shutil.copytree(scans, folder / "labelled"))
    names = [path.name if path.name.endswith(".gz") else f"{path.name}.gz" for path in sorted(folder.iterdir())]
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["VolumeName", *CT_RATE_CLASSES])
        for index, name in enumerate(names):
            writer.writerow([name, *[(index + column) % 2 for column in range(17)], 0])
    return folder


@pytest.fixture(scope="module")
def labelled(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _labelled(scans, tmp_path_factory.mktemp("labels"))


def test_json_with_labels(capsys, calibrated: Path, labelled: Path, tmp_path: Path):
    assert main(["retention", str(calibrated), "--data", str(labelled), "--json", "--out", str(tmp_path / "r")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"fp16", "int8", "about"}
    assert found["about"]["scans"] == 4
    models = {name: load(calibrated, precision=name) for name in ("fp32", "int8")}
    paths = sorted(path for path in labelled.iterdir() if ".nii" in path.name)
    embeddings = {name: model.embed_images(paths) for name, model in models.items()}
    cosines = (embeddings["fp32"] * embeddings["int8"]).sum(axis=1)
    assert found["int8"]["cosine_mean"] == pytest.approx(cosines.mean(), abs=1e-6)
    assert found["int8"]["cosine_min"] == pytest.approx(cosines.min(), abs=1e-6)
    codes = {name: np.stack([model.image_outputs(model.preprocess(path)[None], ["codes"])["codes"][0]
                             for path in paths]) for name, model in models.items()}
    assert found["int8"]["codes_equal"] == pytest.approx((codes["fp32"] == codes["int8"]).mean())
    scores = {name: model.score_embeddings(embeddings[name]) for name, model in models.items()}
    assert found["int8"]["score_max"] == pytest.approx(np.abs(scores["fp32"] - scores["int8"]).max(), abs=1e-6)
    truth = np.array([[(i + c) % 2 for c in range(17)] for i in range(4)], bool)
    deltas = [roc_auc_score(truth[:, c], scores["int8"][:, c]) - roc_auc_score(truth[:, c], scores["fp32"][:, c])
              for c in range(17)]
    assert found["int8"]["auroc_delta_mean"] == pytest.approx(np.mean(deltas))
    assert found["int8"]["auroc_delta_worst"] == pytest.approx(min(deltas))
    assert found["int8"]["auroc_delta"][CT_RATE_CLASSES[17]]["value"] is None  # a finding that no scan has
    noise = {name: {row["activation"]: row["sqnr_db"] for row in found[name]["layers"]} for name in ("fp16", "int8")}
    assert noise["fp16"]["feature_map"] > noise["int8"]["feature_map"] + 10
    assert {path.name for path in (tmp_path / "r").iterdir()} == {
        "retention.md", "retention.json", "retention.png", "retention.html"}
    assert json.loads((tmp_path / "r" / "retention.json").read_text()) == found
    text = (tmp_path / "r" / "retention.md").read_text()
    assert "SQNR, dB" in text and "Cardiomegaly" in text
    page = (tmp_path / "r" / "retention.html").read_text()
    assert "<td>Cardiomegaly</td>" in page and "Noise of activations, int8" in page and "data:image/png" in page


def test_without_labels_and_with_bfloat16(capsys, calibrated: Path, scans: Path):
    arguments = ["retention", str(calibrated), "--data", str(scans), "--limit", "2", "--backend", "openvino", "--json"]
    assert main([*arguments, "--precision", "int8,bf16"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["int8"]["auroc_delta_mean"] is None
    if has_bfloat16():
        assert found["bf16"]["layers"] == []
        assert found["bf16"]["cosine_min"] > 0.9
    else:
        assert "bf16" not in found
        assert "warning: left out: bf16: this CPU has no bfloat16 units" in told.err


def test_bfloat16_on_a_cpu_without(capsys, calibrated: Path, scans: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retention, "has_bfloat16", lambda: False)
    with pytest.warns(DcformerWarning, match="left out: bf16: this CPU has no bfloat16 units"):
        assert retention._names(calibrated, open_bundle(calibrated).manifest, "int8,bf16", "openvino") == ["int8"]
    assert main(["retention", str(calibrated), "--data", str(scans), "--backend", "openvino",
                 "--precision", "bf16"]) == 3
    assert "this CPU has no bfloat16 units" in capsys.readouterr().err


def test_refusals(capsys, pristine_bundle: Path, calibrated: Path, scans: Path):
    for arguments, message in (
        ([pristine_bundle, "--data", scans], "nothing but fp32 for onnxruntime; `dcformer calibrate"),
        ([pristine_bundle, "--data", scans, "--emulate"], f"error: {pristine_bundle}: nothing but fp32 for tensorrt"),
        ([calibrated, "--data", scans, "--precision", "bf16"], "--precision 'bf16': expected some of fp16, int8, each "
         f"once; `dcformer calibrate {calibrated} --data DIR --precision NAME` adds one; the bundle's bf16 is for GPU"),
        ([calibrated, "--data", scans, "--out", scans / "a.nii.gz"], "expected a folder name, found a file"),
        ([calibrated, "--data", pristine_bundle], "no .nii, .nii.gz or DICOM volume below it"),
    ):
        assert main(["retention", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err


def test_scans_that_cannot_be_read_are_listed(capsys, calibrated: Path, scans: Path, tmp_path: Path):
    (tmp_path / "a.nii.gz").write_bytes((scans / "b.nii.gz").read_bytes())
    (tmp_path / "b.nii.gz").write_bytes(b"no gzip")
    assert main(["retention", str(calibrated), "--data", str(tmp_path), "--precision", "fp16", "--json"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["about"]["scans"] == 1
    assert "b.nii.gz" in captured.err


def test_goes_on_only_with_the_same_bundle_and_tables(
    capsys, calibrated: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
):
    folder = Path(shutil.copytree(scans, tmp_path / "scans"))
    table, state = folder / "metadata.csv", tmp_path / "state.jsonl"
    arguments = ["retention", str(calibrated), "--data", str(folder), "--precision", "fp16"]

    def write(z_mm: float) -> None:
        rows = [f'{name},"[0.9, 0.9]",{z_mm},1,0' for name in ("a.nii.gz", "b.nii.gz", "c.nii", "d.nii.gz")]
        table.write_text("\n".join(["VolumeName,XYSpacing,ZSpacing,RescaleSlope,RescaleIntercept", *rows]))

    write(9)
    original, done = Model.image_outputs, []

    def interrupted(self, volumes, outputs=None):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(1)
        return original(self, volumes, outputs)

    with monkeypatch.context() as patch:
        patch.setattr(Model, "image_outputs", interrupted)
        assert main([*arguments, "--state", str(state)]) == 130
    kept = state.read_bytes()
    capsys.readouterr()
    for more, message in (
        (["--backend", "openvino"], "its backend is 'onnxruntime .*', not 'openvino .*'; pass --fresh to begin anew"),
        (["--emulate"], "its emulate is False, not True"),
    ):
        refuse(capsys, message, *arguments, *more, "--state", state)
    refuse(capsys, "its command is 'retention', not 'evaluate'", "evaluate", calibrated, _labelled(scans, tmp_path),
           "--state", state)
    assert state.read_bytes() == kept
    write(1.5)
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert main([*arguments, "--json", "--state", str(state)]) == 0
    assert json.loads(capsys.readouterr().out) == expected
    state.write_bytes(kept)
    assert main([*arguments[:-1], "int8", "--json", "--state", str(state), "--fresh", "--limit", "1"]) == 0
    assert not state.exists()


def test_paired_intervals_are_narrower_than_either_alone():
    random = np.random.default_rng(0)
    labels = random.random((200, 1)) < 0.3
    reference = labels * 0.5 + random.random((200, 1))
    scores = reference + random.normal(0, 0.01, reference.shape)
    mean, by_class = auroc_difference(scores, reference, labels, ["a"])
    exact = roc_auc_score(labels[:, 0], scores[:, 0]) - roc_auc_score(labels[:, 0], reference[:, 0])
    assert mean.value == by_class["a"].value == pytest.approx(exact)
    assert mean.low is not None and mean.high is not None
    assert mean.high - mean.low < 0.02
    same, _ = auroc_difference(reference, reference, labels, ["a"])
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_noise_by_layer():
    """Noise of known size in one activation; the next has it, too, the one before has none."""
    graph = GraphBuilder()
    first = graph.node("Relu", "x")
    second = graph.node("Add", first, graph.constant(np.float32(0)))
    clean = graph.finish(graph.node("Neg", second), {"x": ["batch", 1000]})
    noisy = type(clean)()
    noisy.CopyFrom(clean)
    noisy.graph.initializer[0].CopyFrom(type(clean.graph.initializer[0]).FromString(
        clean.graph.initializer[0].SerializeToString()))
    noisy.graph.initializer[0].raw_data = np.float32(0.01).tobytes()
    x = np.abs(volume(3, 1000))
    found = {entry.activation: entry.sqnr_db for entry in layer_noise(clean, noisy, [{"x": x}], 1)}
    assert found[first] == EXACT_DB
    expected = 10 * np.log10((x.astype(np.float64) ** 2).sum() / (3000 * 0.01**2))
    assert found[second] == pytest.approx(expected, abs=0.01)
    assert found[clean.graph.output[0].name] == pytest.approx(expected, abs=0.01)

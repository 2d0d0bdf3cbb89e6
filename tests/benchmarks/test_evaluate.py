"""``dcformer evaluate``: reading a data set, streaming, resuming, and agreement with PyTorch."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import refuse

from dcformer_deploy.benchmarks.evaluation.dataset import Tables, read_dataset
from dcformer_deploy.benchmarks.evaluation.metrics import classification
from dcformer_deploy.benchmarks.phantom.dataset import DatasetOptions, write_dataset
from dcformer_deploy.runtime import InputError, Model
from dcformer_deploy.runtime.bundle import open_bundle, write_manifest
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.errors import DcformerWarning
from dcformer_deploy.runtime.manifest import CT_RATE_CLASSES

COUNT = 8


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "set"
    write_dataset(out, DatasetOptions(COUNT, 5, voxel_mm=4), workers=2)
    return out


@pytest.fixture
def phantoms_copy(phantoms: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(phantoms, tmp_path / "set"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _volume(folder: Path, number: int) -> Path:
    return next(folder.rglob(f"valid_{number}_a_1.nii.gz"))


def _run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, dict, str]:
    capsys.readouterr()
    code = main(["evaluate", *map(str, arguments), "--json"])
    printed = capsys.readouterr()
    return code, json.loads(printed.out) if printed.out else {}, printed.err


def test_reads_labels_reports_and_metadata(phantoms: Path):
    cases = read_dataset(phantoms, CT_RATE_CLASSES, Tables())
    assert [case.name for case in cases] == [f"valid_{i}_a_1.nii.gz" for i in range(1, COUNT + 1)]
    with (phantoms / "valid_labels.csv").open() as file:
        for case, row in zip(cases, csv.DictReader(file), strict=True):
            assert case.labels == tuple(row[name] == "1" for name in CT_RATE_CLASSES)
    with (phantoms / "radiology_text_reports" / "validation_reports.csv").open() as file:
        for case, row in zip(cases, csv.DictReader(file), strict=True):
            assert case.report is not None
            assert case.report.startswith(row["Findings_EN"])
            assert "Not given." not in case.report
    assert cases[0].metadata == phantoms / "metadata" / "validation_metadata.csv"


def test_natural_order(phantoms_copy: Path):
    """valid_2 comes before valid_10, so that --limit means the same everywhere."""
    labels = phantoms_copy / "valid_labels.csv"
    labels.write_text(labels.read_text().replace("valid_3_", "valid_10_"))
    _volume(phantoms_copy, 3).rename(phantoms_copy / "valid_10_a_1.nii.gz")
    names = [case.name for case in read_dataset(phantoms_copy, CT_RATE_CLASSES, Tables())]
    assert names[-1] == "valid_10_a_1.nii.gz"


def test_unlabelled_scans_are_told_of(phantoms_copy: Path, pristine_bundle: Path,
                                      capsys: pytest.CaptureFixture[str]):
    labels = phantoms_copy / "valid_labels.csv"
    lines = labels.read_text().splitlines()
    labels.write_text("\n".join(line for line in lines if not line.startswith(("valid_2_", "valid_4_", "valid_8_"))))
    code, found, errors = _run(capsys, pristine_bundle, phantoms_copy)
    assert (code, found["scans"]) == (0, 5)
    assert [line for line in errors.splitlines() if "left out" in line] == [
        f"warning: {phantoms_copy}: 3 of its 8 volumes left out, as they have no row in the labels; the first is "
        "valid_2_a_1.nii.gz"]
    labels.write_text(lines[0] + "\n")
    refuse(capsys, "none of its 8 volumes has a row in the labels .the first is valid_1_a_1.nii.gz", "evaluate",
           pristine_bundle, phantoms_copy)


def test_scans_are_preprocessed_on_the_cpu(phantoms: Path, pristine_bundle: Path, capsys: pytest.CaptureFixture[str]):
    """As they go to the checkpoint, too; an option that would be ignored is none."""
    refuse(capsys, "No such option.*--preprocess", "evaluate", pristine_bundle, phantoms, "--preprocess", "gpu")


def test_same_numbers_as_one_scan_at_a_time_and_as_pytorch(
    phantoms: Path, pristine_bundle: Path, checkpoint: Path, model: Model, cache: Path,
    capsys: pytest.CaptureFixture[str],
):
    code, found, _ = _run(capsys, pristine_bundle, phantoms, "--checkpoint", checkpoint)
    assert code == 0
    cases = read_dataset(phantoms, CT_RATE_CLASSES, Tables())
    scores = np.array([list(model.zero_shot(case.path).scores.values()) for case in cases])
    expected = classification(scores, np.array([case.labels for case in cases]), CT_RATE_CLASSES)
    for name in CT_RATE_CLASSES:
        assert found["auroc"][name] == expected.auroc[name].value
        assert found["pytorch"]["auroc"][name] == pytest.approx(found["auroc"][name], abs=1e-3, nan_ok=True)
    assert found["mean_auroc"] == pytest.approx(expected.mean_auroc.value)
    for name in ("f1", "accuracy", "precision", "recall"):
        assert found[name] == pytest.approx(getattr(expected, name).value)
        assert found["pytorch"][name] == pytest.approx(found[name], abs=1e-3)
    assert set(found["retrieval"]) == {"image_to_report", "report_to_image"}
    assert found["retrieval"]["image_to_report"]["R@10"] == 1  # of eight
    assert (found["scans"], found["reports"], found["failed"]) == (COUNT, COUNT, [])
    low, high = found["intervals_95"]["mean_auroc"]
    assert low <= found["mean_auroc"] <= high
    assert not list(cache.rglob("*.jsonl"))  # nothing is left of a run that came to its end


def test_table(phantoms: Path, pristine_bundle: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", str(pristine_bundle), str(phantoms), "--limit", "3"]) == 0
    printed = capsys.readouterr().out
    for expected in ("AUROC on 3 scans", "Pleural effusion", "mean", "F1, weighted", "image to report R@10"):
        assert expected in printed
    assert "Fewer than 10 scans with it or without: " in printed


def test_unreadable_volume_is_reported(phantoms_copy: Path, pristine_bundle: Path, capsys: pytest.CaptureFixture[str]):
    broken = _volume(phantoms_copy, 2)
    broken.write_bytes(broken.read_bytes()[:2000])
    _volume(phantoms_copy, 5).write_bytes(b"")
    code, found, errors = _run(capsys, pristine_bundle, phantoms_copy)
    assert code == 2
    assert found["scans"] == COUNT - 2
    assert [entry["volume"] for entry in found["failed"]] == ["valid_2_a_1.nii.gz", "valid_5_a_1.nii.gz"]
    assert str(broken) in errors
    assert main(["evaluate", str(pristine_bundle), str(phantoms_copy)]) == 2
    assert "2 of 8 scans could not be used" in capsys.readouterr().out


def test_interrupted_evaluation_goes_on(
    phantoms_copy: Path, pristine_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    _, whole, _ = _run(capsys, pristine_bundle, phantoms_copy)
    original, embedded = Model.image_outputs, []

    def interrupted(self, volumes, outputs=None):
        if len(embedded) == 5:
            raise KeyboardInterrupt
        embedded.append(1)
        return original(self, volumes, outputs)

    monkeypatch.setattr(Model, "image_outputs", interrupted)
    assert main(["evaluate", str(pristine_bundle), str(phantoms_copy)]) == 130
    (state,) = cache.rglob("*.jsonl")
    with state.open("a") as file:
        file.write('{"key": "cut o')  # what a power cut leaves
    embedded.clear()
    embedded.extend([1, 1])  # three more may run, and three is what is missing
    _volume(phantoms_copy, 1).touch()  # a file that changed meanwhile is read again: one more
    embedded.pop()
    _, resumed, _ = _run(capsys, pristine_bundle, phantoms_copy)
    assert len(embedded) == 1 + 4
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}


def _interrupt(monkeypatch: pytest.MonkeyPatch, scans: int, *arguments: str | Path) -> None:
    """Run the command until so many scans are embedded, and interrupt it."""
    original, embedded = Model.image_outputs, []

    def interrupted(self, volumes, outputs=None):
        if len(embedded) == scans:
            raise KeyboardInterrupt
        embedded.append(1)
        return original(self, volumes, outputs)

    with monkeypatch.context() as patch:
        patch.setattr(Model, "image_outputs", interrupted)
        assert main(["evaluate", *map(str, arguments)]) == 130


def test_state_is_only_for_what_it_was_begun_with(
    phantoms: Path, pristine_bundle: Path, bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Given by name, too: another bundle's embeddings would be judged as this one's."""
    manifest = open_bundle(bundle_copy).manifest
    assert manifest.zero_shot is not None
    task = dataclasses.replace(manifest.zero_shot, similarity_scale=2 * manifest.zero_shot.similarity_scale)
    write_manifest(bundle_copy, dataclasses.replace(manifest, zero_shot=task))
    state = tmp_path / "state.jsonl"
    _interrupt(monkeypatch, 3, pristine_bundle, phantoms, "--limit", "5", "--state", state)
    capsys.readouterr()
    kept = state.read_bytes()
    for arguments, message in (
        ((bundle_copy, phantoms), f"state.jsonl: the state of another evaluation: its bundle is '{manifest.digest}', "
         f"not '{open_bundle(bundle_copy).manifest.digest}'; pass --fresh to begin anew, or another --state"),
        ((pristine_bundle, phantoms.parent), "its dataset is"),
        ((pristine_bundle, phantoms, "--backend", "openvino"), "its backend is 'onnxruntime .*', not 'openvino"),
        ((pristine_bundle, phantoms, "--slope", "2"), r"its options is {}, not {'slope': '2.0'}"),
    ):
        refuse(capsys, message, "evaluate", *arguments, "--state", state)
        assert state.read_bytes() == kept
    _, expected, _ = _run(capsys, bundle_copy, phantoms, "--limit", "5")
    _, found, _ = _run(capsys, bundle_copy, phantoms, "--limit", "5", "--state", state, "--fresh")
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    assert not state.exists()


def test_scans_read_by_a_table_that_changed_are_read_again(
    phantoms_copy: Path, pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):
    table = phantoms_copy / "metadata" / "validation_metadata.csv"
    right = table.read_text()
    _, expected, _ = _run(capsys, pristine_bundle, phantoms_copy)
    rows = list(csv.DictReader(right.splitlines()))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "ZSpacing": 3 * float(row["ZSpacing"])} for row in rows)
    _, wrong, _ = _run(capsys, pristine_bundle, phantoms_copy)
    assert wrong["auroc"] != expected["auroc"]
    _interrupt(monkeypatch, 6, pristine_bundle, phantoms_copy)
    table.write_text(right)
    _, resumed, _ = _run(capsys, pristine_bundle, phantoms_copy)
    assert {**resumed, "seconds": 0} == {**expected, "seconds": 0}


def test_scan_replaced_while_it_is_embedded(
    phantoms_copy: Path, pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):
    """What was made of the old one is not taken for the new one's by a run that goes on."""
    original, embedded = Model.image_outputs, []

    def replacing(self, volumes, outputs=None):
        if len(embedded) == 3:
            raise KeyboardInterrupt
        embedded.append(1)
        if len(embedded) == 2:
            shutil.copy(_volume(phantoms_copy, 7), _volume(phantoms_copy, 2))
        return original(self, volumes, outputs)

    with monkeypatch.context() as patch:
        patch.setattr(Model, "image_outputs", replacing)
        assert main(["evaluate", str(pristine_bundle), str(phantoms_copy)]) == 130
    _, resumed, _ = _run(capsys, pristine_bundle, phantoms_copy)
    _, expected, _ = _run(capsys, pristine_bundle, phantoms_copy, "--fresh")
    assert {**resumed, "seconds": 0} == {**expected, "seconds": 0}


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(("damage", "message"), [
    (lambda d: (d / "valid_labels.csv").unlink(), "pass --labels"),
    (lambda d: _edit(d / "valid_labels.csv", "valid_1_a_1.nii.gz,", "valid_1_a_1.nii.gz,maybe"), "expected 0 or 1"),
    (lambda d: _edit(d / "valid_labels.csv", "Cardiomegaly", "Cardio"), "pass --labels"),
    (lambda d: shutil.copy(_volume(d, 1), d / "valid_1_a_1.nii.gz"), "is there twice"),
    (lambda d: shutil.copy(_volume(d, 1), d / "train_1_a_1.nii.gz"), "choose with --split"),
    (lambda d: (d / "notes.csv").write_bytes(b"\xff\xfe\x00"), "not a CSV text file"),
    (lambda d: shutil.rmtree(d / "data_volumes"), "no .nii, .nii.gz or DICOM volume"),
])
def test_unusable_data_set(damage, message: str, phantoms_copy: Path, pristine_bundle: Path,
                           capsys: pytest.CaptureFixture[str]):
    damage(phantoms_copy)
    code, found, errors = _run(capsys, pristine_bundle, phantoms_copy)
    assert (code, found) == (2, {})
    assert message in errors
    assert len(errors.strip().splitlines()) == 1


def test_contradicting_labels(phantoms_copy: Path):
    """Two releases of the labels in one folder: equal rows are fine, different ones are not."""
    labels = phantoms_copy / "valid_labels.csv"
    other = phantoms_copy / "other_labels.csv"
    shutil.copy(labels, other)
    assert len(read_dataset(phantoms_copy, CT_RATE_CLASSES, Tables())) == COUNT
    text = other.read_text()
    other.write_text(text.replace("valid_1_a_1.nii.gz,0", "valid_1_a_1.nii.gz,2")
                     .replace("valid_1_a_1.nii.gz,1", "valid_1_a_1.nii.gz,0")
                     .replace("valid_1_a_1.nii.gz,2", "valid_1_a_1.nii.gz,1"))
    with pytest.raises(InputError, match="two different rows"):
        read_dataset(phantoms_copy, CT_RATE_CLASSES, Tables())
    assert len(read_dataset(phantoms_copy, CT_RATE_CLASSES, Tables(labels=labels))) == COUNT


def test_a_table_from_elsewhere_that_names_several_scans(phantoms: Path, tmp_path: Path):
    for number in (1, 2):
        (tmp_path / "set" / f"s{number}").mkdir(parents=True)
        shutil.copy(_volume(phantoms, number), tmp_path / "set" / f"s{number}" / "ct.nii.gz")
    (tmp_path / "set" / "s1" / "other.nii.gz").symlink_to(_volume(phantoms, 3))
    header, one, two, three, *_ = (phantoms / "valid_labels.csv").read_text().splitlines(keepends=True)
    labels = tmp_path / "labels.csv"
    labels.write_text(header + one.replace("valid_1_a_1", "ct") + three.replace("valid_3_a_1", "other"))
    with pytest.raises(InputError, match=r"ct\.nii\.gz is there twice: .*labels\.csv names it"):
        read_dataset(tmp_path / "set", CT_RATE_CLASSES, Tables(labels=labels))
    labels.write_text(header + one.replace("valid_1_a_1", "s1/ct") + two.replace("valid_2_a_1", "s2/ct"))
    with pytest.warns(DcformerWarning, match="1 of its 3 volumes left out"):
        cases = read_dataset(tmp_path / "set", CT_RATE_CLASSES, Tables(labels=labels))
    assert [case.path.parent.name for case in cases] == ["s1", "s2"]


def test_other_checkpoint_is_refused(phantoms: Path, pristine_bundle: Path, checkpoint: Path, tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str]):
    import torch

    loaded = torch.load(checkpoint, weights_only=False)
    loaded["model"]["to_visual_latent.weight"] += 1
    torch.save(loaded, tmp_path / "other.pth")
    code, _, errors = _run(capsys, pristine_bundle, phantoms, "--checkpoint", tmp_path / "other.pth")
    assert code == 2
    assert "not the checkpoint of" in errors


def test_classifier_where_there_is_none(phantoms: Path, pristine_bundle: Path, capsys: pytest.CaptureFixture[str]):
    code, _, errors = _run(capsys, pristine_bundle, phantoms, "--classifier")
    assert code == 2
    assert "drop --classifier" in errors

"""``dcformer evaluate``: reading a data set, streaming, resuming, and agreement with PyTorch."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dcformer_deploy.benchmarks.evaluation.dataset import Tables, read_dataset
from dcformer_deploy.benchmarks.evaluation.metrics import classification
from dcformer_deploy.benchmarks.evaluation.state import open_state
from dcformer_deploy.benchmarks.phantom.dataset import DatasetOptions, write_dataset
from dcformer_deploy.runtime import InputError, Model
from dcformer_deploy.runtime.cli.app import main
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


def test_state_of_another_bundle_or_fresh_is_not_used(tmp_path: Path):
    path = tmp_path / "state.jsonl"
    with pytest.raises(RuntimeError), open_state(path, fresh=False) as state:
        state.put("a", "1", np.arange(3, dtype=np.float32))
        raise RuntimeError
    with pytest.raises(RuntimeError), open_state(path, fresh=False) as state:
        np.testing.assert_array_equal(state.get("a", "1"), [0, 1, 2])
        assert state.get("a", "2") is None
        assert state.get("b", "1") is None
        raise RuntimeError
    with open_state(path, fresh=True) as state:
        assert state.get("a", "1") is None
    assert not path.exists()


@pytest.mark.parametrize("content", ["precious", '{"other": 1}\n', "\n"])
def test_a_file_that_is_no_state_stays(tmp_path: Path, content: str):
    path = tmp_path / "thesis.txt"
    path.write_text(content)
    for fresh in (False, True):
        with pytest.raises(InputError, match="thesis.txt: not the state of an evaluation"), open_state(path, fresh):
            pass
    assert path.read_text() == content


@pytest.mark.parametrize("content", ["", '{"ke', '{"key": "a", "sta'])
def test_a_state_that_was_cut_off_is_begun_anew(tmp_path: Path, content: str):
    path = tmp_path / "state.jsonl"
    path.write_text(content)
    with open_state(path, fresh=False) as state:
        assert state.get("a", "1") is None
    assert not path.exists()


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

"""Phantoms: reproducible, in CT-RATE's layout, and every finding changes what it should and where it should."""

import copy
import csv
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dcformer_deploy.benchmarks.phantom.acquisition import Protocol
from dcformer_deploy.benchmarks.phantom.anatomy import Patient, Scene, build_scene
from dcformer_deploy.benchmarks.phantom.dataset import DatasetOptions, make_phantom, write_dataset
from dcformer_deploy.benchmarks.phantom.findings import PAINTERS, enlarge_heart
from dcformer_deploy.benchmarks.phantom.reports import _PHRASES, write_report
from dcformer_deploy.benchmarks.phantom.words import Drawn
from dcformer_deploy.runtime import InputError
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.manifest import CT_RATE_CLASSES
from dcformer_deploy.runtime.volume import ReadOptions, read_nifti

COARSE_MM = 3.0


def scene_of(seed: int, heart: bool = False) -> tuple[Scene, np.random.Generator]:
    """A chest to paint in, and the generator as building it left it."""
    return copy.deepcopy(_built(seed, heart))


@functools.cache
def _built(seed: int, heart: bool) -> tuple[Scene, np.random.Generator]:
    rng = np.random.default_rng(seed)
    patient = Patient.draw(rng)
    if heart:
        patient = enlarge_heart(patient, rng)
    return build_scene(patient, Protocol.draw(patient, rng, COARSE_MM).grid, rng), rng


def place(scene: Scene, change: np.ndarray) -> tuple[float, float, float]:
    """Centre (mm) of where something changed, weighted by how much."""
    weight = np.abs(change)
    axes = (scene.canvas.x, scene.canvas.y, scene.canvas.z)
    x, y, z = (float((weight * axis).sum() / weight.sum()) for axis in axes)
    return x, y, z


def in_lungs(scene: Scene, change: np.ndarray) -> float:
    """Share of the change that lies in voxels that are lung at least in part."""
    return float(np.abs(change)[scene.both_lungs > 0].sum() / np.abs(change).sum())


#: What a radiologist would check: (scene, HU before, HU after) -> as it should be.
CHECKS: dict[str, Callable[[Scene, np.ndarray, np.ndarray], bool]] = {
    "Medical material": lambda s, a, b: b.max() > 1500 and place(s, b - a)[1] < 0,
    "Arterial wall calcification": lambda s, a, b: (b - a).max() > 250 and in_lungs(s, b - a) < 0.6,
    "Pericardial effusion": lambda s, a, b: float(np.abs(b - a)[s.heart < -4].max(initial=0)) < 60
    and np.median(b[np.abs(b - a) > 60]) < 40,
    "Coronary artery wall calcification": lambda s, a, b: (b - a).max() > 150
    and abs(float(s.heart[np.unravel_index((b - a).argmax(), a.shape)])) < 8,
    "Hiatal hernia": lambda s, a, b: place(s, b - a)[1] > s.patient.heart_centre[1] + 20
    and place(s, b - a)[2] < s.patient.heart_centre[2] + 40,
    "Lymphadenopathy": lambda s, a, b: (b - a).max() > 80 and abs(place(s, b - a)[0]) < 55,
    "Emphysema": lambda s, a, b: (b - a)[s.both_lungs > 0.9].mean() < -15 and in_lungs(s, b - a) > 0.95,
    "Atelectasis": lambda s, a, b: in_lungs(s, b - a) > 0.95 and place(s, b - a)[2] < s.patient.diaphragm + 70,
    "Lung nodule": lambda s, a, b: (b - a).max() > 300 and in_lungs(s, b - a) > 0.8,
    "Lung opacity": lambda s, a, b: in_lungs(s, b - a) > 0.95 and 80 < (b - a).max() < 400,
    "Pulmonary fibrotic sequela": lambda s, a, b: in_lungs(s, b - a) > 0.9 and place(s, b - a)[2] > 30,
    "Pleural effusion": lambda s, a, b: place(s, b - a)[1] > 15 and in_lungs(s, b - a) > 0.95
    and abs(np.median(b[(b - a) > 600]) - 10) < 25,
    "Mosaic attenuation pattern": lambda s, a, b: (b - a)[s.both_lungs > 0.9].std() > 40 and in_lungs(s, b - a) > 0.95,
    "Peribronchial thickening": lambda s, a, b: (b - a).max() > 200,
    "Consolidation": lambda s, a, b: ((b > -50) & (a < -600)).sum() * np.prod(s.canvas.grid.spacing_mm) > 10_000,
    "Bronchiectasis": lambda s, a, b: (b - a).min() < -150 and (b - a).max() > 200,
    "Interlobular septal thickening": lambda s, a, b: (b - a)[s.both_lungs > 0.9].mean() > 15
    and in_lungs(s, b - a) > 0.95,
}


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("seed", [1, 2])
def test_finding_changes_what_it_should(name: str, seed: int):
    scene, rng = scene_of(seed)
    before = scene.canvas.hu.copy()
    PAINTERS[name](scene, rng)
    assert np.isfinite(scene.canvas.hu).all()
    assert CHECKS[name](scene, before, scene.canvas.hu)


def test_cardiomegaly_widens_the_heart():
    for seed in range(4):
        normal, large = scene_of(seed)[0], scene_of(seed, heart=True)[0]
        widths = [float(np.ptp(s.canvas.x[(s.heart < 0).any(axis=(1, 2))])) for s in (normal, large)]
        assert widths[1] > 1.15 * widths[0]
        thorax = 2 * large.patient.cavity_width
        assert 2 * large.patient.heart_radii[0] / thorax > 0.5 > 0.3 < 2 * normal.patient.heart_radii[0] / thorax


def test_every_finding_has_a_painter_a_phrase_and_a_check():
    assert list(PAINTERS) == list(CT_RATE_CLASSES) == list(_PHRASES)
    assert set(CHECKS) | {"Cardiomegaly"} == set(CT_RATE_CLASSES)


def test_normal_chest_has_the_attenuations_of_a_ct():
    scene, _ = scene_of(5)
    hu = scene.canvas.hu
    assert -900 < np.median(hu[scene.both_lungs > 0.99]) < -780
    assert 30 < np.median(hu[scene.heart < -5]) < 180
    assert (hu > 300).mean() > 0.002
    litres = float(scene.both_lungs.sum() * np.prod(scene.canvas.grid.spacing_mm)) / 1e6
    assert 2 < litres < 8


def test_reports_state_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    for _ in range(60):
        chosen = {name: Drawn(f"<{name}>") for name in CT_RATE_CLASSES if rng.random() < 0.3}
        text = write_report(chosen, rng).findings.lower()
        for name, (stating, denying, _) in _PHRASES.items():
            states = any(template.replace("{}", f"<{name}>").lower() in text for template in stating)
            denies = any(template.lower() in text for template in denying)
            assert states == (name in chosen), (name, text)
            assert not (denies and name in chosen), (name, text)


def test_phantom_depends_on_seed_and_number_alone():
    options = DatasetOptions(count=9, seed=7, voxel_mm=4)
    first = make_phantom(options, 3)
    again = make_phantom(DatasetOptions(count=4, seed=7, voxel_mm=4), 3)
    np.testing.assert_array_equal(first.stored, again.stored)
    assert (first.report, first.present) == (again.report, again.present)
    for other in (make_phantom(options, 4), make_phantom(DatasetOptions(9, 8, voxel_mm=4), 3),
                  make_phantom(DatasetOptions(9, 7, "train", 4), 3)):
        assert other.stored.shape != first.stored.shape or not np.array_equal(other.stored, first.stored)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_dataset_in_ct_rates_layout(tmp_path: Path):
    out = tmp_path / "phantoms"
    assert main(["phantom", "--n", "4", "--seed", "3", "--out", str(out), "--voxel-mm", "4", "--workers", "2"]) == 0
    metadata, labels = rows(out / "metadata" / "validation_metadata.csv"), rows(out / "valid_labels.csv")
    reports = rows(out / "radiology_text_reports" / "validation_reports.csv")
    names = [f"valid_{i}_a_1.nii.gz" for i in range(1, 5)]
    for table in (metadata, labels, reports):
        assert [row["VolumeName"] for row in table] == names
    assert list(labels[0])[1:] == list(CT_RATE_CLASSES)
    for index, name in enumerate(names):
        phantom = make_phantom(DatasetOptions(4, 3, voxel_mm=4), index)
        assert {c for c in CT_RATE_CLASSES if labels[index][c] == "1"} == set(phantom.present)
        assert reports[index]["Findings_EN"] == phantom.report.findings
        path = out / "data_volumes" / "dataset" / "valid" / f"valid_{index + 1}" / f"valid_{index + 1}_a" / name
        by_header = read_nifti(path)
        by_csv = read_nifti(path, options=ReadOptions(metadata=out / "metadata" / "validation_metadata.csv"))
        for volume in (by_header, by_csv):
            np.testing.assert_array_equal(volume.stored, phantom.stored)
            np.testing.assert_allclose(volume.spacing_hwd_mm, phantom.grid.spacing_mm, rtol=1e-5)
    alone = tmp_path / "alone"
    write_dataset(alone, DatasetOptions(1, 3, voxel_mm=4), workers=1)
    first = Path("data_volumes/dataset/valid/valid_1/valid_1_a/valid_1_a_1.nii.gz")
    np.testing.assert_array_equal(read_nifti(alone / first).stored, read_nifti(out / first).stored)


def test_chosen_findings(tmp_path: Path):
    options = DatasetOptions(1, 0, voxel_mm=4, findings=("Pleural effusion", "Lung nodule"))
    assert set(make_phantom(options, 0).present) == {"Pleural effusion", "Lung nodule"}


@pytest.mark.parametrize(("options", "message"), [
    ({"count": 0}, "--n 0"), ({"split": "test"}, "--split 'test'"), ({"voxel_mm": 0.1}, "--voxel-mm 0.1"),
    ({"findings": ("Pleural efusion",)}, "did you mean 'Pleural effusion'"),
])
def test_unusable_options(options: dict, message: str):
    with pytest.raises(InputError, match=message):
        DatasetOptions(**{"count": 1, "seed": 0, **options})


def test_existing_folder_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    for extra in ([], ["--force"]):
        assert main(["phantom", "--n", "1", "--out", str(tmp_path / "mine"), *extra]) == 2
    assert (tmp_path / "mine" / "file").read_text() == "x"
    assert capsys.readouterr().err.count("error:") == 2

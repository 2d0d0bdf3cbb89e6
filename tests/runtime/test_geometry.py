"""Spacings and directions that a scan cannot have, or that whoever reads its results must know of."""

import warnings
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dcformer_deploy.runtime import InputError, Model
from dcformer_deploy.runtime.errors import DcformerWarning
from dcformer_deploy.runtime.volume import ReadOptions, read_nifti, read_scan
from scans import LPS_AFFINE, SPACING, edit_header, write


@pytest.mark.parametrize("spacing", ["123", "1x2", b"123"])
def test_a_text_is_no_spacing(spacing):
    """Its characters are not three numbers."""
    with pytest.raises(InputError, match=f"spacing: {spacing!r}; expected numbers, in mm"):
        ReadOptions(spacing=spacing)


@pytest.mark.parametrize("spacing", [(1e308, 1e308, 1e308), (1, 1, 1001), (1, 1, float("nan"))])
def test_spacings_of_no_scan(spacing, hounsfield: np.ndarray, tmp_path: Path):
    write(tmp_path / "a.nii", hounsfield)
    with pytest.raises(InputError, match="expected positive numbers up to 1000"):
        read_nifti(tmp_path / "a.nii", options=ReadOptions(spacing=spacing))


def test_a_blank_header_is_noted(hounsfield: np.ndarray, tmp_path: Path):
    write(tmp_path / "a.nii", hounsfield, np.eye(4))
    (note,) = read_nifti(tmp_path / "a.nii", options=ReadOptions(spacing=(1, 1, 2))).notes
    assert note.startswith("the header is blank")
    as_stored = ReadOptions(spacing=(1, 1, 2), orientation="as-stored")
    assert read_nifti(tmp_path / "a.nii", options=as_stored).notes == ()
    write(tmp_path / "b.nii", hounsfield)
    assert read_nifti(tmp_path / "b.nii").notes == ()


@pytest.mark.parametrize(("degrees", "told"), [
    (3, None), (20, "turned by up to 20 degrees"), (45, "turned by up to 45")])
def test_a_patient_who_lies_askew(degrees: float, told: str | None, hounsfield: np.ndarray, tmp_path: Path):
    turn = np.radians(degrees)
    turned = np.eye(4)
    turned[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    path = write(tmp_path / "a.nii", hounsfield, turned @ LPS_AFFINE)
    if told is None:
        assert read_nifti(path).notes == ()
        return
    with pytest.warns(DcformerWarning, match=told):
        (note,) = read_nifti(path).notes
    assert told in note


def test_sizes_that_no_chest_has(model: Model, hounsfield: np.ndarray, tmp_path: Path):
    """40 x 36 x 30 voxels; within (60 mm, 2.2 m) nothing is said, and nowhere where spacing does not matter."""
    spec, path = model.manifest.preprocessing, write(tmp_path / "a.nii", hounsfield)
    for mm, told in ((3, None), (0.5, "20 x 18 x 15 mm"), (99, "covers 3960 x 3564 x 2970 mm (H x W x D)")):
        options = ReadOptions(spacing=(mm, mm, mm))
        if told is None:
            assert read_scan(path, spec, options).notes == ()
            continue
        with pytest.warns(DcformerWarning, match="which no scan of a chest does: is the spacing right"):
            (note,) = read_scan(path, spec, options).notes
        assert told in note
    whole = replace(spec, resampling="to_shape")
    assert read_scan(path, whole, ReadOptions(spacing=(0.5, 0.5, 0.5))).notes == ()


def test_how_the_file_stores_its_axes(hounsfield: np.ndarray, tmp_path: Path):
    for affine, codes in ((LPS_AFFINE, "LPS"), (np.diag([2.0, 2.0, 2.0, 1.0]), "RAS"),
                          (np.array([[0, 0, 2, 0], [2, 0, 0, 0], [0, -2, 0, 0], [0, 0, 0, 1.0]]), "AIR")):
        volume = read_nifti(write(tmp_path / "a.nii", hounsfield, affine), options=ReadOptions(spacing=SPACING))
        assert (volume.stored_orientation, volume.orientation) == (codes, "LPS")
    blank = write(tmp_path / "b.nii", hounsfield, np.eye(4))
    assert read_nifti(blank, options=ReadOptions(spacing=SPACING)).stored_orientation is None


def test_forms_that_contradict_each_other(hounsfield: np.ndarray, tmp_path: Path):
    """Left and right swapped: nibabel and others take the sform, some the qform; which is right nobody knows."""
    swapped = LPS_AFFINE * np.array([[-1], [1], [1], [1]])
    path = _with_forms(tmp_path / "a.nii", hounsfield, LPS_AFFINE, swapped)
    with pytest.warns(DcformerWarning, match="axes point to LPS by the sform, which is used, and to RPS by the qform"):
        volume = read_nifti(path)
    assert len(volume.notes) == 1 and "and to RPS by the qform" in volume.notes[0]
    assert volume.stored_orientation == "".join(nib.aff2axcodes(nib.load(path).affine)) == "LPS"
    np.testing.assert_array_equal(volume.stored, hounsfield)
    assert read_nifti(path, options=ReadOptions(orientation="as-stored")).notes == ()


def test_forms_that_agree_well_enough(hounsfield: np.ndarray, tmp_path: Path):
    """Turned a little by a registration, by 44 and 46 degrees, or only one of them there."""
    def turned(degrees: float) -> np.ndarray:
        turn = np.radians(degrees)
        turn = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        affine = LPS_AFFINE.copy()
        affine[:2, :2] = turn @ np.diag([-1.0, -1.0])
        return affine

    for sform, qform, count in ((turned(0), turned(4), 0), (turned(44), turned(46), 1), (turned(40), turned(50), 2)):
        path = _with_forms(tmp_path / "a.nii", hounsfield, sform, qform)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DcformerWarning)
            assert len(read_nifti(path).notes) == count
    for field in ("qform_code", "sform_code"):
        path = _with_forms(tmp_path / "a.nii", hounsfield, turned(0), turned(90))
        edit_header(path, **{field: 0})
        assert read_nifti(path).notes == ()
    path = _with_forms(tmp_path / "a.nii", hounsfield, LPS_AFFINE, LPS_AFFINE)
    edit_header(path, quatern_b=3.0)  # no rotation at all: nothing that could contradict
    assert read_nifti(path).notes == ()


def _with_forms(path: Path, array: np.ndarray, sform: np.ndarray, qform: np.ndarray) -> Path:
    image = nib.Nifti1Image(array, sform)
    image.set_sform(sform, 1)
    image.set_qform(qform, 1)
    nib.save(image, path)
    return path


def test_axes_that_are_not_at_right_angles(hounsfield: np.ndarray, tmp_path: Path):
    sheared = LPS_AFFINE.copy()
    sheared[1, 2] = 0.6
    path = write(tmp_path / "a.nii", hounsfield, sheared)
    with pytest.raises(InputError, match="degrees off a right angle .a tilted gantry"):
        read_nifti(path, options=ReadOptions(spacing=SPACING))
    as_stored = ReadOptions(orientation="as-stored", spacing=SPACING)
    assert read_nifti(path, options=as_stored).stored.shape == hounsfield.shape

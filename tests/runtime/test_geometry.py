"""Spacings and directions that a scan cannot have, or that whoever reads its results must know of."""

from pathlib import Path

import numpy as np
import pytest

from dcformer_deploy.runtime import InputError
from dcformer_deploy.runtime.errors import DcformerWarning
from dcformer_deploy.runtime.volume import ReadOptions, read_nifti
from scans import LPS_AFFINE, SPACING, write


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


def test_axes_that_are_not_at_right_angles(hounsfield: np.ndarray, tmp_path: Path):
    sheared = LPS_AFFINE.copy()
    sheared[1, 2] = 0.6
    path = write(tmp_path / "a.nii", hounsfield, sheared)
    with pytest.raises(InputError, match="degrees off a right angle .a tilted gantry"):
        read_nifti(path, options=ReadOptions(spacing=SPACING))
    as_stored = ReadOptions(orientation="as-stored", spacing=SPACING)
    assert read_nifti(path, options=as_stored).stored.shape == hounsfield.shape

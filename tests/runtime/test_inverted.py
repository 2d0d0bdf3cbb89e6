"""Scans whose air is brighter than their bone: a slope of the wrong sign gives finite, plausible, wrong scores."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dcformer_deploy.runtime import InputError, Model
from dcformer_deploy.runtime.volume import ReadOptions, read_nifti
from dcformer_deploy.runtime.volume.hounsfield import HounsfieldWarning
from scans import edit_header, write

INVERTED = "denser than bone and .* in the range of air and lung: air lies on the wrong side"


@pytest.fixture(params=["real", "drawn", "windowed", "padded"])
def chest(request, ct: Path, hounsfield: np.ndarray) -> np.ndarray:
    """HU [x, y, z] int16."""
    real = np.asarray(nib.load(ct).dataobj).astype(np.int16)
    if request.param == "padded":
        real[:20] = -2000
    return {"drawn": hounsfield, "windowed": np.clip(real, -1000, 600)}.get(request.param, real)


def test_inverted_by_the_file_or_by_the_caller(chest: np.ndarray, tmp_path: Path):
    path = write(tmp_path / "a.nii", chest)
    read_nifti(path)
    with pytest.raises(InputError, match=INVERTED):
        read_nifti(path, options=ReadOptions(slope=-1))
    with pytest.warns(HounsfieldWarning, match=f"{INVERTED}.*used all the same"):
        assert read_nifti(path, options=ReadOptions(slope=-1, intercept=0)).notes
    edit_header(path, scl_slope=-1.0, scl_inter=0.0)
    with pytest.raises(InputError, match=INVERTED):
        read_nifti(path)
    write(path, -chest)
    with pytest.raises(InputError, match=INVERTED):
        read_nifti(path)


def test_a_negative_slope_that_is_right(chest: np.ndarray, tmp_path: Path):
    """As of X-ray films: less is denser, and the intercept fits."""
    path = write(tmp_path / "a.nii", (3000 - chest).astype(np.int16), scl_slope=-1.0, scl_inter=3000.0)
    volume = read_nifti(path)
    np.testing.assert_array_equal(volume.hounsfield(volume.stored), chest)
    assert volume.notes == ()


def test_dense_scans_that_are_right(ct: Path, tmp_path: Path):
    """Metal with streaks, contrast agents at low energy, and a field of view that hardly leaves the heart."""
    real = np.asarray(nib.load(ct).dataobj).astype(np.int16)
    small = real[30:90, 20:70, 20:90]
    for scan, brighter in ((real, 60), (small, 150)):
        bright = np.where(scan > brighter, 900, scan)  # contrast agent
        bright[:, -2:] = 3071  # metal
        bright[:, :2] = -1000  # what air there is
        assert 0.07 < (bright > 700).mean() < 0.15
        assert not read_nifti(write(tmp_path / "a.nii", bright)).notes


def test_scores_of_an_inverted_scan_are_not_given(model: Model, ct: Path):
    with pytest.raises(InputError, match=INVERTED):
        model.zero_shot(ct, slope=-1)

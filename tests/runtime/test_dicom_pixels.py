"""What DICOM's pixels mean: padding, bits; and slices that lie askew."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicoms import write_series
from pydicom.uid import ImplicitVRLittleEndian

from dcformer_deploy.runtime import InputError
from dcformer_deploy.runtime.errors import DcformerWarning
from dcformer_deploy.runtime.volume import ReadOptions, Volume, read_nifti
from dcformer_deploy.runtime.volume.dicom import read_dicom
from scans import LPS_AFFINE, write


def _read(path: Path, **options: Any) -> Volume:
    return read_dicom(path, "LPS", ReadOptions(**options))


def _hu(volume: Volume) -> np.ndarray:
    return volume.hounsfield(volume.stored)


@pytest.fixture
def corners(hounsfield: np.ndarray) -> np.ndarray:
    """[x, y]: outside of a round field of view."""
    x, y = np.meshgrid(*(np.linspace(-1, 1, side) for side in hounsfield.shape[:2]), indexing="ij")
    return x**2 + y**2 > 1


def _padded(corners: np.ndarray, stored: int, value: int | None, vr: str, limit: int | None = None, bits: int = 16,
            signed: bool = False) -> Callable[[int, Any], None]:
    """Writes ``stored`` into the corners, and ``value`` into the header."""
    def change(k: int, dataset: Any) -> None:
        dtype = np.int16 if signed else np.uint16
        plane = np.frombuffer(dataset.PixelData, np.uint16).reshape(dataset.Rows, dataset.Columns)
        dataset.PixelData = np.where(corners.T, np.array(stored & 0xFFFF, np.uint16), plane).astype(dtype).tobytes()
        dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit = int(signed), bits, bits - 1
        dataset.add_new("PixelPaddingValue", vr, value)
        if limit is not None:
            dataset.add_new("PixelPaddingRangeLimit", vr, limit)

    return change


@pytest.mark.parametrize(("settings", "maps"), [
    ({"stored": 63536, "value": 63536, "vr": "US"}, None),  # -2000 without its sign
    ({"stored": 63536, "value": 63536, "vr": "US", "bits": 12}, None),  # and in fewer bits than it was written in
    ({"stored": 4095, "value": 4095, "vr": "US", "bits": 12}, None),
    ({"stored": 30000, "value": 30000, "vr": "SS", "signed": True}, None),
    ({"stored": 4050, "value": 4000, "vr": "US", "limit": 4095}, None),
    ({"stored": 4050, "value": 4095, "vr": "US", "limit": 4000}, None),
    ({"stored": 63536, "value": 63536, "vr": "US"}, lambda k: (1 + k % 2, -1024)),
], ids=["unsigned", "masked", "12 bits", "signed", "range", "range down", "slopes"])
@pytest.mark.parametrize("implicit", [False, True])
def test_bright_padding_is_air(hounsfield: np.ndarray, corners: np.ndarray, tmp_path: Path, settings: dict[str, Any],
                               maps: Any, implicit: bool):
    more = {} if maps is None else {"maps": maps}
    write_series(tmp_path / "s", hounsfield, change=_padded(corners, **settings), **more)
    for file in (tmp_path / "s").iterdir() if implicit else ():
        dataset = pydicom.dcmread(file)
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        dataset.save_as(file, implicit_vr=True, little_endian=True)
    with pytest.warns(DcformerWarning, match=r"padding that was brighter than air was set to -1024 HU: \d+\.\d% of"):
        volume = _read(tmp_path / "s")
    expected = np.where(corners[..., None], -1024, hounsfield)
    np.testing.assert_allclose(_hu(volume), expected, atol=0 if maps is None else 1)
    (note,) = volume.notes
    assert f"{corners.mean():.1%} of the voxels" in note


@pytest.mark.parametrize(("stored", "value", "vr", "signed"), [
    (-1500, -1500, "SS", True), (0, 0, "US", False),  # as scanners write it, below air or as air
    (63536, None, "US", False)])
def test_padding_that_is_left(hounsfield: np.ndarray, corners: np.ndarray, tmp_path: Path, stored: int,
                              value: int | None, vr: str, signed: bool):
    """What is dark to every window; and what no header calls padding, which nobody can know to be."""
    write_series(tmp_path / "s", hounsfield, change=_padded(corners, stored, value, vr, signed=signed))
    volume = _read(tmp_path / "s")
    expected = np.where(corners[..., None], stored - 1024, hounsfield.astype(np.int32))
    np.testing.assert_array_equal(_hu(volume), expected)
    assert volume.notes == ()


@pytest.mark.parametrize("value", [[1, 2], [3, 4, 5]])
def test_a_padding_value_that_is_none(hounsfield: np.ndarray, tmp_path: Path, value: list[int]):
    write_series(tmp_path / "s", hounsfield, change=lambda k, d: d.add_new("PixelPaddingValue", "US", value))
    with pytest.raises(InputError, match=r"/\d{4}: PixelPaddingValue is \[.*, BitsStored 16, PixelRepresentation 0;"):
        _read(tmp_path / "s")


def test_a_padding_value_that_the_scan_itself_has(hounsfield: np.ndarray, tmp_path: Path):
    """Water in the header of a careless program; its voxels are those of the patient."""
    write_series(tmp_path / "s", hounsfield, change=lambda k, d: d.add_new("PixelPaddingValue", "US", 1024 + 40))
    assert (hounsfield == 40).mean() > 0.001
    volume = _read(tmp_path / "s")
    np.testing.assert_array_equal(_hu(volume), hounsfield)
    assert volume.notes == ()


def test_a_high_bit_that_is_not_the_highest_stored(hounsfield: np.ndarray, tmp_path: Path):
    """Pixels that were shifted: read as they stand they would be 16 times too large, or lose their highest bits."""
    def shifted(k: int, dataset: Any) -> None:
        dataset.PixelData = (np.frombuffer(dataset.PixelData, np.uint16) << 4).tobytes()
        dataset.BitsStored, dataset.HighBit = 12, 15

    write_series(tmp_path / "s", hounsfield, change=shifted)
    with pytest.raises(InputError, match="HighBit is 15, BitsStored 12; expected 11"):
        _read(tmp_path / "s")


@pytest.mark.parametrize(("degrees", "told"), [
    (3, None), (20, "turned by up to 20 degrees"), (-40, "turned by up to 40 degrees")])
def test_a_patient_who_lies_askew(hounsfield: np.ndarray, tmp_path: Path, degrees: float, told: str | None):
    """Noted as of the same scan in NIfTI."""
    turn = np.radians(degrees)
    turn = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])

    def change(k: int, dataset: Any) -> None:
        dataset.ImageOrientationPatient = [f"{value:.8f}" for value in turn[:, :2].T.ravel()]

    write_series(tmp_path / "s", hounsfield, change=change)
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1, -1, 1]) @ turn @ np.diag(np.abs(np.diag(LPS_AFFINE))[:3])
    nifti = write(tmp_path / "a.nii", hounsfield, affine)
    if told is None:
        assert _read(tmp_path / "s").notes == read_nifti(nifti).notes == ()
        return
    with pytest.warns(DcformerWarning, match=told):
        volume = _read(tmp_path / "s")
    with pytest.warns(DcformerWarning, match=told):
        same = read_nifti(nifti)
    assert volume.notes == same.notes
    np.testing.assert_array_equal(_hu(volume), _hu(same))
    assert volume.stored_orientation == same.stored_orientation == "".join(nib.aff2axcodes(affine))
    assert _read(tmp_path / "s", orientation="as-stored").notes == ()

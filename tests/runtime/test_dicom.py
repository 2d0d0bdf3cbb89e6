"""DICOM: the same scan as NIfTI gives, and every series that is none refused with the file and what is wrong."""

import json
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicoms import transcode, write_series, zip_folder
from pydicom.dataset import Dataset

from dcformer_deploy.runtime import InputError, Model, load
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.errors import DcformerWarning
from dcformer_deploy.runtime.store import read_store
from dcformer_deploy.runtime.volume import ReadOptions, read_nifti, read_scan
from scans import LPS_AFFINE, write


@pytest.fixture(scope="module")
def nifti(hounsfield: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as NIfTI."""
    return write(tmp_path_factory.mktemp("nifti") / "scan.nii.gz", hounsfield, LPS_AFFINE)


def _read(path: Path, **options: Any) -> Any:
    from dcformer_deploy.runtime.volume.dicom import read_dicom

    return read_dicom(path, "LPS", ReadOptions(**options))


def _hu(volume: Any) -> np.ndarray:
    return volume.hounsfield(volume.stored)


def test_the_same_scan_in_every_form(model: Model, series: Path, nifti: Path, tmp_path: Path):
    archive = zip_folder(series, tmp_path / "series.zip")
    expected = model.embed_image(nifti)
    for form in (series, archive, model.preprocess(series), model.preprocess(nifti)):
        np.testing.assert_array_equal(model.embed_image(form), expected)
    volume, same = _read(series), read_nifti(nifti)
    np.testing.assert_array_equal(_hu(volume), _hu(same))
    assert volume.spacing_hwd_mm == pytest.approx(same.spacing_hwd_mm)
    assert volume.stored.dtype == np.uint16  # not converted


def test_as_another_library_reads_it(series: Path, tmp_path: Path):
    """dicom2nifti, by another way through orientation and order."""
    dicom2nifti = pytest.importorskip("dicom2nifti")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dicom2nifti.dicom_series_to_nifti(str(series), str(tmp_path / "x.nii.gz"), reorient_nifti=True)
    ours, theirs = _read(series), read_nifti(tmp_path / "x.nii.gz")
    np.testing.assert_array_equal(_hu(ours), _hu(theirs))
    assert ours.spacing_hwd_mm == pytest.approx(theirs.spacing_hwd_mm, rel=1e-5)


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless"])
def test_compressed(series: Path, tmp_path: Path, syntax: str):
    folder = Path(shutil.copytree(series, tmp_path / "c"))
    transcode(folder, syntax)
    np.testing.assert_array_equal(_hu(_read(folder)), _hu(_read(series)))


def test_other_directions(hounsfield: np.ndarray, nifti: Path, tmp_path: Path):
    """Taken feet first, rows to the right: turned to the manifest's orientation all the same."""

    def turn(k: int, dataset: Any) -> None:
        dataset.ImageOrientationPatient = ["-1", "0", "0", "0", "1", "0"]
        dataset.ImagePositionPatient = [f"{-30 + 0.9 * (hounsfield.shape[0] - 1):g}", "-20",
                                        dataset.ImagePositionPatient[2]]

    write_series(tmp_path / "s", hounsfield[::-1], change=turn)
    volume = _read(tmp_path / "s")
    np.testing.assert_array_equal(_hu(volume), _hu(read_nifti(nifti)))


def test_slope_and_intercept_of_each_slice(hounsfield: np.ndarray, nifti: Path, tmp_path: Path):
    write_series(tmp_path / "s", hounsfield, maps=lambda k: (1 + 0.001 * k, -1024 - k))
    np.testing.assert_allclose(_hu(_read(tmp_path / "s")), _hu(read_nifti(nifti)), atol=0.6)  # rounded when stored


def test_the_one_ct_among_others(hounsfield: np.ndarray, series: Path, tmp_path: Path):
    study = Path(shutil.copytree(series, tmp_path / "study"))
    write_series(study / "scout", hounsfield[:, :, :2],
                 change=lambda k, d: setattr(d, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    write_series(study / "mr", hounsfield, change=lambda k, d: setattr(d, "Modality", "MR"))
    (study / "DICOMDIR.txt").write_text("not DICOM")
    (study / ".hidden").write_bytes(b"x")
    np.testing.assert_array_equal(_hu(_read(study)), _hu(_read(series)))
    uid = write_series(study / "again", hounsfield + 100)
    with pytest.raises(InputError, match=rf"2 CT series; choose one with --series UID: .*{uid} \(30 CT images\)"):
        _read(study)
    np.testing.assert_array_equal(_hu(_read(study, series=uid)), _hu(_read(series)) + 100)
    with pytest.raises(InputError, match="no series 1.2.3; there are "):
        _read(study, series="1.2.3")


def _positions(count: int) -> list[float]:
    return [-400 + 1.7 * k for k in range(count)]


def _mixed(k: int, dataset: Any) -> None:
    if k == 5:
        dataset.ImageOrientationPatient = ["1", "0", "0", "0", "0", "-1"]


def _larger(k: int, dataset: Any) -> None:
    if k == 5:
        dataset.PixelSpacing = ["0.5", "0.5"]


def _no_place(k: int, dataset: Any) -> None:
    if k == 5:
        del dataset.ImagePositionPatient


def _few_bytes(k: int, dataset: Any) -> None:
    if k == 5:
        dataset.PixelData = dataset.PixelData[:100]


def _colour(k: int, dataset: Any) -> None:
    dataset.PhotometricInterpretation = "RGB"


def _modality(k: int, dataset: Any) -> None:
    dataset.Modality = "MR"


def _one_mr(k: int, dataset: Any) -> None:
    if k == 7:
        dataset.Modality = "MR"


def _patients(k: int, dataset: Any) -> None:
    dataset.PatientID = str(k // 15)


def _frames(k: int, dataset: Any) -> None:
    dataset.FrameOfReferenceUID = f"1.2.{1 + k // 20}"


def _one_without(k: int, dataset: Any) -> None:
    if k == 7:
        del dataset.RescaleIntercept


def _coronal(k: int, dataset: Any) -> None:
    dataset.ImageOrientationPatient = ["1", "0", "0", "0", "0", "-1"]
    dataset.ImagePositionPatient = ["-30", f"{1.7 * k:g}", "0"]


def _no_slope(k: int, dataset: Any) -> None:
    dataset.RescaleSlope = "0"


@pytest.mark.parametrize(("settings", "message"), [
    ({"positions": [*_positions(10), *[-400 + 1.7 * (k + 3) for k in range(10, 30)]]},
     r"1 uneven distances, the first 6.80 mm instead of 1.70 between .*\d{4} at -384.70 mm and \d{4} at -377.90 mm "
     r".slices are missing.; pass --resample-irregular"),
    ({"positions": [*_positions(29), -400 + 1.7 * 27]}, "two slices at one position, -354.10 mm; remove one"),
    ({"lean": 0.4}, r"the stack leans by 13.2 degrees .gantry tilt.: .* pass --resample-irregular to straighten it"),
    ({"change": _mixed}, "its slice lies in another direction than that of .*mixed orientations"),
    ({"change": _larger}, r"a slice of 40 x 36 pixels of \(0.5, 0.5\) mm, the others are 40 x 36 of \(0.8, 0.9\)"),
    ({"change": _no_place}, "ImagePositionPatient has 0 values; expected 3 numbers"),
    ({"change": _few_bytes}, "its pixels cannot be read"), ({"change": _colour}, "RGB pixels; expected grey"),
    ({"change": _modality}, "no CT scan in it: .*images of modality MR among 30, not CT"),
    ({"change": _one_mr}, "images of modality MR among 30"),
    ({"change": _patients}, "images of several patients under one UID"),
    ({"change": _frames}, r"positions in 2 frames of reference, which cannot be compared \(.*/\d+ and .*/\d+\); move"),
    ({"change": _one_without}, "no RescaleIntercept, which 29 other slices have"),
    ({"change": _coronal}, "the slices are not axial"), ({"change": _no_slope}, "RescaleSlope is 0; expected a usable"),
])
def test_refused(hounsfield: np.ndarray, tmp_path: Path, settings: dict, message: str):
    write_series(tmp_path / "s", hounsfield, **settings)
    with pytest.raises(InputError, match=message):
        _read(tmp_path / "s")


def test_missing_slices_are_interpolated_if_asked_for(tmp_path: Path):
    """A volume that is linear along z comes back whole; the distance of the rest is kept, and a note says so."""
    ramp = np.broadcast_to(np.arange(30) * 30 - 1000, (20, 16, 30)).astype(np.int16).copy()
    ramp[:, :8] = 40
    write_series(tmp_path / "s", np.delete(ramp, [11, 12], axis=2),
                 positions=[p for k, p in enumerate(_positions(30)) if k not in (11, 12)])
    volume = _read(tmp_path / "s", resample_irregular=True)
    expected = np.moveaxis(ramp.astype(np.float32), (0, 1, 2), (0, 1, 2))
    np.testing.assert_allclose(np.sort(_hu(volume).ravel()), np.sort(expected.ravel()), atol=0.01)
    assert volume.spacing_hwd_mm[2] == pytest.approx(1.7)
    assert "interpolated along the slices: 1 uneven distances" in volume.notes[0]


def test_a_tilted_stack_is_straightened_if_asked_for(tmp_path: Path):
    """A plane of bone that stands upright leans in the tilted slices; straightened, it stands again."""
    upright = np.full((20, 40, 20), -900, np.int16)
    upright[:, 18:24] = 60
    # Slice k begins 0.8 mm * k / 2 further back, so upright things lie half a pixel a slice further to the front.
    leaning = np.stack([np.roll(upright[:, :, k], -k // 2 * 1, axis=1) for k in range(20)], axis=2)
    write_series(tmp_path / "s", leaning[:, :, ::2], positions=_positions(10), lean=0.8)
    volume = _read(tmp_path / "s", resample_irregular=True)
    hounsfield = _hu(volume)  # [y-like, x-like, z]: find the axis that the plane varies along
    profile = [hounsfield[..., k].max(axis=1 if hounsfield.shape[0] == 40 else 0) for k in range(10)]
    inside = [np.flatnonzero(p > -400) for p in profile]
    assert all(list(found) == list(inside[0]) for found in inside)
    assert "straightened: the stack leans by" in volume.notes[0]


def test_notes_reach_the_user_and_the_store(pristine_bundle: Path, hounsfield: np.ndarray, tmp_path: Path, capsys):
    data = tmp_path / "archive"
    write_series(data / "patient" / "gap", np.delete(hounsfield, 12, axis=2),
                 positions=[p for k, p in enumerate(_positions(30)) if k != 12])
    write_series(data / "patient" / "good", hounsfield)
    zip_folder(data / "patient" / "good", data / "packed.zip")
    arguments = ["embed", str(pristine_bundle), str(data), "--out", str(tmp_path / "s")]
    assert main(arguments) == 2
    rows = {Path(row["path"]).name: row for row in read_store(tmp_path / "s").to_pylist()}
    assert set(rows) == {"gap", "good", "packed.zip"}
    assert "slices are missing" in rows["gap"]["error"]
    assert rows["good"]["embedding"] == rows["packed.zip"]["embedding"]
    assert "Doe" not in json.dumps(rows) and "12345" not in json.dumps({**rows["gap"], "path": ""})
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("always", DcformerWarning)
        assert main([*arguments[:-1], str(tmp_path / "t"), "--resample-irregular"]) == 0
    assert "warning: " in (told := capsys.readouterr().err)
    assert "interpolated along the slices" in told
    rows = {Path(row["path"]).name: row for row in read_store(tmp_path / "t").to_pylist()}
    assert "interpolated along the slices" in rows["gap"]["notes"]
    assert rows["good"]["notes"].startswith("covers 36 x 29 x 51 mm")  # and nothing else
    assert main(arguments) == 2  # again: nothing has changed
    assert "2 there already, 0 failed, 1 failed before (--retry tries them again)" in capsys.readouterr().out


@pytest.mark.parametrize(("size", "message"), [(0, "no DICOM file, though"), (200, "its header is cut off")])
def test_the_last_slices_are_damaged(series: Path, tmp_path: Path, size: int, message: str):
    """They would be missing at the end, where no gap tells."""
    folder = Path(shutil.copytree(series, tmp_path / "s"))
    last = max(folder.iterdir(), key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]))
    last.write_bytes(last.read_bytes()[:size])
    with pytest.raises(InputError, match=f"{last.name}: {message}"):
        _read(folder)


def test_zips_that_are_none(tmp_path: Path, hounsfield: np.ndarray):
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with pytest.raises(InputError, match="a.zip: not a zip file, or damaged"):
        _read(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(64 << 20))
    with pytest.raises(InputError, match="b.zip: unpacks to 67,108,864 bytes; refused"):
        _read(tmp_path / "b.zip")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(InputError, match="no DICOM image in it .1 other files"):
        _read(tmp_path / "c.zip")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "C:/x", "c:x", "..\\x", "\\\\host\\x"])
def test_zips_that_lead_out(tmp_path: Path, name: str):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, "nothing")
    with pytest.raises(InputError, match="would lie outside"):
        _read(tmp_path / "a.zip")


def test_names_of_a_zip_that_only_look_odd(series: Path, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in series.iterdir():
            archive.write(file, f"Study 12:30/..{file.name}..")
    with pytest.raises(InputError, match="no DICOM image in it .0 other files"):  # hidden: their names begin with a dot
        _read(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for file in series.iterdir():
            archive.write(file, f"Study 12:30/{file.name}")
    np.testing.assert_array_equal(_read(tmp_path / "b.zip").stored, _read(series).stored)


@pytest.mark.parametrize("text", ["1", "01", "+1"])
def test_one_frame_however_it_is_written(hounsfield: np.ndarray, tmp_path: Path, text: str):
    write_series(tmp_path / "s", hounsfield, change=lambda index, dataset: setattr(dataset, "NumberOfFrames", text))
    assert _read(tmp_path / "s").stored.shape == hounsfield.shape


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_damaged_members_of_a_zip(series: Path, tmp_path: Path, method: int):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in series.iterdir():
            archive.write(file, file.name)
    data = bytearray(path.read_bytes())
    data[100:140] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        _read(path)


@pytest.mark.parametrize("value", [None, 0, -3])
def test_slices_without_a_size(hounsfield: np.ndarray, tmp_path: Path, value: int | None):
    def change(index: int, dataset: Dataset) -> None:
        if index == 4:
            dataset.add_new("Columns", "SS" if value else "US", value)

    write_series(tmp_path / "s", hounsfield, change=change)
    with pytest.raises(InputError, match=r"Columns is .*expected a number from 1"):
        _read(tmp_path / "s")


def test_a_value_in_a_representation_that_is_none(hounsfield: np.ndarray, tmp_path: Path):
    """Bytes that name no type of value, found by fuzzing; pydicom tells when the value is asked for."""
    write_series(tmp_path / "s", hounsfield)
    file = tmp_path / "s" / "0003"
    content = file.read_bytes()
    assert content.count(b"\x08\x00\x08\x00CS") == 1
    file.write_bytes(content.replace(b"\x08\x00\x08\x00CS", b"\x08\x00\x08\x00CR"))
    with pytest.raises(InputError, match="0003: damaged DICOM file .*'CR'"):
        _read(tmp_path / "s")


@pytest.mark.parametrize("anonymised", ["one without", "one each"])
def test_frames_of_reference_that_tell_nothing(hounsfield: np.ndarray, nifti: Path, tmp_path: Path, anonymised: str):
    def change(k: int, dataset: Any) -> None:
        if anonymised == "one each":
            dataset.FrameOfReferenceUID = f"1.2.{k + 1}"
        elif k == 4:
            del dataset.FrameOfReferenceUID

    write_series(tmp_path / "s", hounsfield, change=change)
    np.testing.assert_array_equal(_hu(_read(tmp_path / "s")), _hu(read_nifti(nifti)))


def test_a_slice_far_away(hounsfield: np.ndarray, tmp_path: Path):
    positions = [-400 + 1.7 * k for k in range(hounsfield.shape[2])]
    positions[-1] = 1e8
    write_series(tmp_path / "s", hounsfield, positions=positions)
    with pytest.raises(InputError, match="more than half of the slices would be interpolated"):
        _read(tmp_path / "s", resample_irregular=True)


@pytest.mark.parametrize(("form", "message"), [("empty", "no DICOM image in it"), ("missing", "no such")])
def test_folders_that_are_none(tmp_path: Path, form: str, message: str):
    if form == "empty":
        (tmp_path / form).mkdir()
    with pytest.raises(InputError, match=message):
        _read(tmp_path / form)


def test_options_that_do_not_belong(series: Path, nifti: Path, model: Model, tmp_path: Path):
    (tmp_path / "m.csv").write_text("VolumeName,XYSpacing,ZSpacing,RescaleSlope,RescaleIntercept\n")
    with pytest.raises(InputError, match="drop --metadata"):
        _read(series, metadata=tmp_path / "m.csv")
    with pytest.raises(InputError, match="--series chooses among DICOM series; this is none"):
        read_scan(nifti, model.manifest.preprocessing, ReadOptions(series="1.2"))
    assert _read(series, spacing=(1, 1, 2)).spacing_hwd_mm == (1, 1, 2)


def test_prepared_from_dicom(pristine_bundle: Path, series: Path, nifti: Path, tmp_path: Path):
    assert main(["prepare", str(pristine_bundle), str(series), "--out", str(tmp_path / "p")]) == 0
    (path,) = (tmp_path / "p").rglob("*.prepared.zip")
    model = load(pristine_bundle)
    assert float(model.embed_image(path) @ model.embed_image(nifti)) > 0.99999

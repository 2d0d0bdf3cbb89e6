"""Which files of a DICOM source are its slices, however they are named."""

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest
from dicoms import zip_folder

from dcformer_deploy.runtime import InputError
from dcformer_deploy.runtime.scan_files import visible_files
from dcformer_deploy.runtime.volume import ReadOptions, Volume
from dcformer_deploy.runtime.volume.dicom import read_dicom

NAMES = [lambda k: f"1.2.840.113619.2.5.1762.{k:05d}", lambda k: f"IM.{k:04d}", lambda k: f"IM{k:04d}",
         lambda k: f"{k:04d}.dcm", lambda k: f"{k:04d}.DCM", lambda k: f"{k:04d}.dicom"]


def _read(path: Path) -> Volume:
    return read_dicom(path, "LPS", ReadOptions())


def _renamed(series: Path, folder: Path, name: Callable[[int], str]) -> list[Path]:
    """A copy whose names have the order of the slices."""
    folder.mkdir()
    slices = {int(pydicom.dcmread(file, stop_before_pixels=True).InstanceNumber): file for file in series.iterdir()}
    return [Path(shutil.copy(slices[k], folder / name(k))) for k in sorted(slices)]


@pytest.mark.parametrize("name", NAMES, ids=[name(7) for name in NAMES])
@pytest.mark.parametrize("size", [0, 100, 131])
@pytest.mark.parametrize("packed", [False, True])
def test_the_last_slices_are_cut_off(series: Path, tmp_path: Path, name: Callable[[int], str], size: int, packed: bool):
    """A third of the scan, at its end, where no gap tells of it."""
    files = _renamed(series, tmp_path / "s", name)
    assert _read(tmp_path / "s").stored.shape[2] == len(files) == 30
    for file in files[-10:]:
        file.write_bytes(file.read_bytes()[:size])
    source = zip_folder(tmp_path / "s", tmp_path / "s.zip") if packed else tmp_path / "s"
    with pytest.raises(InputError, match=f"{files[-10].name}: no DICOM file, though its name says nothing else"):
        _read(source)


def test_other_files_are_passed_over(series: Path, tmp_path: Path):
    """Also beside slices that are named by UIDs, and in folders that programs hide."""
    _renamed(series, tmp_path / "s", NAMES[0])
    for name in ("notes.txt", "report.pdf", ".1.2.3", "DICOMDIR.txt", ".hidden/1.2.840.5", "more/.1.2.840.5"):
        (tmp_path / "s" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "s" / name).write_bytes(b"other")
    assert _read(tmp_path / "s").stored.shape[2] == 30
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("list.csv", "nothing")
    with pytest.raises(InputError, match="no DICOM image in it .1 other files"):
        _read(tmp_path / "a.zip")


def test_visible_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / ".cache"  # hidden above what is searched
    for name in ("b/A.CSV", "b/a.csv", "b/c.txt", ".a.csv", ".b/c.csv", "b/.d.tmp/e.csv"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    assert visible_files(root) == [root / "b" / name for name in ("A.CSV", "a.csv", "c.txt")]
    monkeypatch.chdir(root)
    assert visible_files(Path(), (".csv",)) == [Path("b/A.CSV"), Path("b/a.csv")]

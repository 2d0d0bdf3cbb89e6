"""Scans below a folder, whatever they are called and wherever they lie, and what tables say of them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from dicoms import write_series

from dcformer_deploy.runtime import InputError
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.inputs import find_items
from dcformer_deploy.runtime.store import read_store
from dcformer_deploy.runtime.volume import ReadOptions, folder, read_nifti
from dcformer_deploy.runtime.volume.folder import find_scans, find_volumes, require_one_each
from scans import write

COLUMNS = "VolumeName,XYSpacing,ZSpacing,RescaleSlope,RescaleIntercept"


def _touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def _found(folder: Path, split: str | None = None) -> list[str]:
    return [str(path.relative_to(folder)) for path, _ in find_scans(folder, split)]


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("names", [
    ["s0001/ct.nii.gz", "s0002/ct.nii.gz"],  # as TotalSegmentator's
    ["p1/CT.nii.gz.prepared.zip", "p2/CT.nii.gz.prepared.zip"],  # as those of DICOM folders are prepared
    ["a.nii.gz", "more/a.nii", "other.nii.gz"], ["x/y/a.nii.gz", "x/z/a.nii.gz"]])
def test_equal_names_in_different_folders(tmp_path: Path, names: list[str]):
    assert sorted(_found(_touch(tmp_path, *names))) == names


@pytest.mark.parametrize("names", [["a.nii", "a.nii.gz"], ["x/a.nii", "x/a.nii.gz", "y/a.nii"],
                                   ["a.nii.gz", "a.nii.gz.prepared.zip"], ["A.NII.GZ", "A.nii"]])
def test_copies_of_one_file_in_one_folder(tmp_path: Path, names: list[str]):
    with pytest.raises(InputError, match="is there twice: .* and .*; move one away"):
        find_volumes(_touch(tmp_path, *names), None)


def test_a_table_names_what_several_are_called(tmp_path: Path):
    _touch(tmp_path / "data", "s1/ct.nii.gz", "s2/ct.nii.gz", "s3/mr.nii.gz")
    table = tmp_path / "data" / "labels.csv"
    table.write_text("VolumeName,Emphysema\nmr.nii.gz,1\ns1/ct.nii.gz,0\n")
    volumes = find_volumes(tmp_path / "data", None)
    assert sorted(volumes) == ["mr.nii.gz", "s1/ct.nii.gz", "s2/ct.nii.gz"]
    shutil.copy(table, tmp_path / "labels.csv")
    with (tmp_path / "labels.csv").open("a") as file:
        file.write("ct.nii,1\n")
    message = "ct.nii.gz is there twice: .*s1/ct.nii.gz and .*s2/ct.nii.gz, and .*labels.csv names it"
    with pytest.raises(InputError, match=message):
        require_one_each(tmp_path / "data", volumes, [tmp_path / "labels.csv"])
    shutil.copy(tmp_path / "labels.csv", table)
    with pytest.raises(InputError, match=message):
        find_volumes(tmp_path / "data", None)


def test_a_given_table_of_metadata_names_what_several_are_called(tmp_path: Path):
    """Its row would be used for both."""
    _touch(tmp_path / "data", "s1/ct.nii.gz", "s2/ct.nii.gz")
    table = tmp_path / "m.csv"
    table.write_text(f"{COLUMNS}\nct.nii.gz,\"[1, 1]\",1,1,0\n")
    with pytest.raises(InputError, match=r"ct\.nii\.gz is there twice: .*m\.csv names it"):
        find_items([tmp_path / "data"], None, {"metadata": str(table)})
    table.write_text(f"{COLUMNS}\ns1/ct.nii.gz,\"[1, 1]\",1,1,0\ns2/ct.nii.gz,\"[1, 1]\",1,1,0\n")
    assert len(find_items([tmp_path / "data"], None, {"metadata": str(table)})) == 2


def test_metadata_by_place(hounsfield: np.ndarray, tmp_path: Path):
    for name in ("s1", "s2"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "ct.nii.gz", hounsfield, np.eye(4))
    (tmp_path / "m.csv").write_text(f"{COLUMNS}\ns1/ct.nii.gz,\"[1, 1]\",1.5,1,0\ns2/ct.nii.gz,\"[2, 2]\",2.5,1,0\n")
    found = [read_nifti(path, options=ReadOptions(metadata=table)).spacing_hwd_mm
             for path, table in find_scans(tmp_path)]
    assert found == [(1, 1, 1.5), (2, 2, 2.5)]


def test_metadata_by_places_that_end_alike(hounsfield: np.ndarray, tmp_path: Path):
    """The longest place counts, also for a scan whose name no other has, or that lies at the top."""
    places = {"ct.nii.gz": 1, "s1/ct.nii.gz": 2, "a/s1/ct.nii.gz": 3, "s3/low.nii.gz": 4}
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / place, hounsfield, np.eye(4))
    (tmp_path / "m.csv").write_text(COLUMNS + "".join(f'\n{place},"[1, 1]",{z},1,0' for place, z in places.items()))
    found = {str(path.relative_to(tmp_path)): read_nifti(path, options=ReadOptions(metadata=table)).spacing_hwd_mm[2]
             for path, table in find_scans(tmp_path)}
    assert found == places


def test_a_given_table_is_not_read_for_each_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number in range(3):
        _touch(tmp_path, f"p{number}/scan_{number}.nii.gz")
    table = tmp_path / "m.csv"
    table.write_text(f"{COLUMNS}\n")
    monkeypatch.setattr(folder, "table_rows", lambda paths: pytest.fail("read"))
    items = find_items([tmp_path / f"p{number}" for number in range(3)], None, {"metadata": str(table)})
    assert [item.options["metadata"] for item in items] == [str(table)] * 3


def test_equal_tables_do_not_contradict_each_other(tmp_path: Path):
    for name in ("m.csv", "n.csv"):
        (tmp_path / name).write_text(f'{COLUMNS}\nct.nii.gz,"[1, 1]",1.5,nan,0\n')
    assert folder.metadata_files([tmp_path / "m.csv", tmp_path / "n.csv"]) == {"ct.nii.gz": tmp_path / "n.csv"}


def test_dicom_beside_what_it_was_converted_to(tmp_path: Path):
    """The scan as NIfTI was lost: the folder took its name."""
    for name in ("p1/CT", "p2/CT", "one"):
        write_series(tmp_path / name, np.zeros((8, 8, 9), np.int16))
    _touch(tmp_path, "p1/CT.nii.gz", "p2/CT.nii.gz", "one.nii.gz")
    assert sorted(find_volumes(tmp_path, None).values()) == [
        tmp_path / name for name in ("one", "one.nii.gz", "p1/CT", "p1/CT.nii.gz", "p2/CT", "p2/CT.nii.gz")]
    (tmp_path / "labels.csv").write_text("VolumeName,Emphysema\none.nii.gz,1\n")
    assert find_volumes(tmp_path, None)["one.nii.gz"] == tmp_path / "one.nii.gz"


def test_splits_of_equal_names(tmp_path: Path):
    """By the name, or by the folders that tell them apart."""
    _touch(tmp_path, "a/valid_1.nii.gz", "b/valid_1.nii.gz", "b/train_1.nii.gz", "valid/x/ct.nii.gz",
           "train/y/ct.nii.gz", "valid_2/mr.nii.gz", "train_2/mr.nii.gz", "a/valid_3.nii.gz")
    assert sorted(_found(tmp_path, "valid")) == ["a/valid_1.nii.gz", "a/valid_3.nii.gz", "b/valid_1.nii.gz",
                                                 "valid/x/ct.nii.gz", "valid_2/mr.nii.gz"]
    with pytest.raises(InputError, match="holds volumes of train, valid; choose with --split"):
        find_volumes(tmp_path, None)


def test_endings_in_capitals(hounsfield: np.ndarray, tmp_path: Path):
    write(tmp_path / "c.nii.gz", hounsfield, np.eye(4)).rename(tmp_path / "A.NII.GZ")
    write(tmp_path / "b.nii", hounsfield, np.eye(4)).rename(tmp_path / "B.NII")
    (tmp_path / "M.CSV").write_text(f"{COLUMNS}\nA.NII.GZ,\"[1, 1]\",1.5,1,0\nB.nii.gz,\"[2, 2]\",2.5,1,0\n")
    found = find_scans(tmp_path)
    assert [path.name for path, _ in found] == ["A.NII.GZ", "B.NII"]
    assert [read_nifti(path, options=ReadOptions(metadata=table)).spacing_hwd_mm for path, table in found] == [
        (1, 1, 1.5), (2, 2, 2.5)]


@pytest.mark.parametrize("name", ["a.Nii", "a.niI.gz"])
def test_endings_in_capitals_and_small_letters(hounsfield: np.ndarray, tmp_path: Path, name: str):
    """Found, and refused: the header that nibabel reads would be that of the file beside it."""
    other = write(tmp_path / name.lower(), hounsfield, np.eye(4))
    shutil.copy(other, tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: its ending is in capitals and small letters; rename it"):
        read_nifti(tmp_path / name, options=ReadOptions(spacing=(1, 1, 1)))


@pytest.mark.parametrize("name", ["thorax_②", "thorax_²", "thorax_٣"])
def test_digits_that_are_no_numbers(pristine_bundle: Path, hounsfield: np.ndarray, tmp_path: Path, name: str):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / f"{name}.nii.gz", hounsfield)
    write(tmp_path / "data" / "thorax_10.nii.gz", hounsfield)
    assert main(["embed", str(pristine_bundle), str(tmp_path / "data"), "--out", str(tmp_path / "s")]) == 0
    assert read_store(tmp_path / "s").num_rows == 2


def test_what_is_hidden(tmp_path: Path):
    """As a program that was killed leaves it; the folder itself may lie in a hidden one."""
    data = _touch(tmp_path / ".cache", "a.nii.gz", ".a.nii.gz.x1.tmp/a.nii.gz", "d/.a.nii.gz.prep.tmp/a.nii.gz",
                  ".b.nii.gz", ".git/c.nii")
    (data / ".m.csv.x.tmp").mkdir()
    for place, spacing in ((data, 1), (data / ".m.csv.x.tmp", 9)):
        (place / "m.csv").write_text(f"{COLUMNS}\na.nii.gz,\"[1, 1]\",{spacing},1,0\n")
    assert find_scans(data) == [(data / "a.nii.gz", data / "m.csv")]


# ---------------------------------------------------------------- tables


def _tables(folder: Path, first: str, second: str) -> Path:
    _touch(folder, "valid_1_a_1.nii.gz", "valid_2_a_1.nii.gz")
    (folder / "a.csv").write_text(f"{COLUMNS}\nvalid_1_a_1.nii.gz,\"[1, 1]\",1,1,0\nvalid_2_a_1.nii.gz,{first}\n")
    (folder / "b.csv").write_text(f"{COLUMNS},Note\nvalid_2_a_1.nii.gz,{second},x\n")
    return folder


@pytest.mark.parametrize(("first", "second", "told"), [
    ('"[1, 1]",1.5,1,0', '"[1, 1]",3.0,1,0', "ZSpacing is '1.5' and '3.0'"),
    ('"[1, 1]",1.5,1,0', '"[1, 2]",1.5,1,0', r"XYSpacing is '\[1, 1\]' and '\[1, 2\]'"),
    ('"[1, 1]",1.5,1,0', '"[1, 1]",1.5,1,-1024', "RescaleIntercept is '0' and '-1024'"),
    ('"[1, 1]",1.5,1,0', '"[1, 1]",1.5,,0', "RescaleSlope is '1' and ''")])
def test_tables_that_contradict_each_other(tmp_path: Path, first: str, second: str, told: str):
    """Whichever were used, nobody would know; in either order."""
    for one, two in ((first, second), (second, first)):
        data = _tables(tmp_path / str(one == first), one, two)
        message = r"a\.csv and .*b\.csv contradict each other: valid_2_a_1.nii.gz: "
        with pytest.raises(InputError, match=message) as error:
            find_scans(data)
        if one == first:
            error.match(told)


def test_tables_that_say_the_same_in_other_words(tmp_path: Path):
    data = _tables(tmp_path, '"[1, 1]",1.5,1,0', '"[1.0,1.00]", 1.50,1.0,0.0')
    assert [table for _, table in find_scans(data)] == [data / "a.csv", data / "b.csv"]


def test_blanks_around_names(hounsfield: np.ndarray, tmp_path: Path):
    """Found by the folder, so found by the reader."""
    write(tmp_path / "valid_1_a_1.nii.gz", hounsfield, np.eye(4))
    (tmp_path / "m.csv").write_text(f"{COLUMNS}\n valid_1_a_1.nii.gz\t,\"[1, 1]\",1.5,1,0\n")
    ((path, table),) = find_scans(tmp_path)
    assert table is not None
    assert read_nifti(path, options=ReadOptions(metadata=table)).spacing_hwd_mm == (1, 1, 1.5)

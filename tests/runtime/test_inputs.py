"""What a user names, and the scans that are meant."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dicoms import write_series

from dcformer_deploy.runtime import InputError
from dcformer_deploy.runtime.errors import DcformerWarning
from dcformer_deploy.runtime.inputs import find_items, named_scans
from dcformer_deploy.runtime.manifest import Preprocessing
from dcformer_deploy.runtime.preparing import find_tasks
from dcformer_deploy.runtime.volume import ReadOptions, read_scan


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a/valid_2_a_1.nii.gz", "a/valid_10_a_1.nii.gz", "b/train_1_a_1.nii"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "data" / "metadata.csv").write_text(
        "VolumeName,XYSpacing,ZSpacing,RescaleSlope,RescaleIntercept\nvalid_2_a_1.nii.gz,\"[1, 1]\",1,1,0\n")
    return tmp_path / "data"


def _names(*inputs: object, split: str | None = None, **options: object) -> list[str]:
    return [item.path.name for item in find_items([str(value) for value in inputs], split, options)]


def test_folders_patterns_and_files(tree: Path, monkeypatch: pytest.MonkeyPatch):
    assert _names(tree, split="valid") == ["valid_2_a_1.nii.gz", "valid_10_a_1.nii.gz"]
    assert _names(tree / "a" / "*10*", tree / "a") == [
        "valid_10_a_1.nii.gz", "valid_2_a_1.nii.gz", "valid_10_a_1.nii.gz"]
    assert _names(tree / "**" / "*.nii") == ["train_1_a_1.nii"]
    monkeypatch.chdir(tree)
    (item,) = find_items(["b/train_1_a_1.nii"], None, {"slope": 2.0})
    assert (item.path, item.options) == (tree / "b" / "train_1_a_1.nii", {"slope": 2.0})
    assert _names("gone.nii.gz") == ["gone.nii.gz"]  # a failed scan, not the end of all


def test_metadata_of_a_folder_is_used_where_it_has_the_scan(tree: Path):
    found = {item.path.name: item.options for item in find_items([tree], "valid", {})}
    assert found == {"valid_2_a_1.nii.gz": {"metadata": tree / "metadata.csv"}, "valid_10_a_1.nii.gz": {}}


@pytest.mark.parametrize("spelling", ["a/valid_2_a_1.nii.gz", "b/../a/valid_2_a_1.nii.gz", "link/valid_2_a_1.nii.gz",
                                      "{tree}/a/valid_2_a_1.nii.gz"])
def test_metadata_of_a_scan_that_is_named_twice(tree: Path, monkeypatch: pytest.MonkeyPatch, spelling: str):
    """Without the table the same file would be read as if it had no metadata, and its last name counts in a store."""
    (tree / "b" / "train_1_a_1.nii").unlink()
    (tree / "link").symlink_to(tree / "a")
    monkeypatch.chdir(tree)
    for named in ([Path(), spelling.format(tree=tree)], [spelling.format(tree=tree), Path()]):
        found = [item for item in find_items([str(name) for name in named], None, {}) if "_2_" in item.path.name]
        assert [item.options for item in found] == [{"metadata": Path("metadata.csv")}] * 2


def test_lists(tree: Path):
    (tree / "l.csv").write_text("id,path\n1,a/valid_2_a_1.nii.gz\n2,b/train_1_a_1.nii\n")
    pq.write_table(pa.table({"volume": ["a/valid_2_a_1.nii.gz", "b/train_1_a_1.nii"]}), tree / "l.parquet")
    for name in ("l.csv", "l.parquet"):
        assert _names(tree / name) == ["valid_2_a_1.nii.gz", "train_1_a_1.nii"]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("l.csv", b"id\n1\n", "columns id; expected one named path, volume, file"), ("l.csv", b"", "columns none"),
    ("l.csv", b"path\na.nii\n\"\"\n", "row 2: no path in column path"), ("l.csv", b"path\n\xff\n", "not a CSV text"),
    ("l.parquet", b"PAR1", "not a Parquet file, or damaged"), ("none.csv", None, "no such list of scans")])
def test_unusable_lists(tree: Path, name: str, content: bytes | None, message: str):
    if content is not None:
        (tree / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        _names(tree / name)


def test_nothing_there(tree: Path):
    with pytest.raises(InputError, match="no file matches this pattern"):
        _names(tree / "*.dcm")
    (tree / "empty").mkdir()
    with pytest.raises(InputError, match="no .nii, .nii.gz or DICOM volume below it"):
        _names(tree / "empty")
    with pytest.raises(InputError, match="holds volumes of train, valid; choose with --split"):
        _names(tree)
    with pytest.raises(InputError, match="--split: chooses among the scans of a folder, and no folder was named"):
        _names(next(tree.rglob("valid_2_a_1.nii.gz")), split="valid")


def test_a_series_over_two_folders(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    """Each would be embedded as a scan, which is half of one; copies and other series are whole."""
    voxels = np.zeros((8, 8, 20), np.int16)
    write_series(tmp_path / "disc" / "a", voxels)
    (tmp_path / "disc" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    assert _names(tmp_path / "disc") == ["a"]
    shutil.copytree(tmp_path / "disc" / "a", tmp_path / "disc" / "copy")
    write_series(tmp_path / "disc" / "b", voxels)
    assert _names(tmp_path / "disc") == ["a", "b", "copy"]
    assert not recwarn.list
    (tmp_path / "disc" / "c").mkdir()
    for file in sorted((tmp_path / "disc" / "b").iterdir())[:10]:
        file.rename(tmp_path / "disc" / "c" / file.name)
    (tmp_path / "disc" / "a" / "0000.dcm").write_bytes(b"damaged")
    with pytest.warns(DcformerWarning, match="2 folders hold slices of one series, .*/b and .*/c among") as warned:
        assert _names(tmp_path / "disc") == ["a", "b", "c", "copy"]
    assert len(warned) == 1


@pytest.mark.parametrize("case", ["a slice in both", "damage in both", "another series beside both", "one in the other",
                                  "a slice each"])
def test_series_that_are_split_all_the_same(tmp_path: Path, case: str):
    voxels, one, two = np.zeros((8, 8, 20), np.int16), tmp_path / "one", tmp_path / "two"
    write_series(one, voxels)
    files = sorted(one.iterdir())
    if case == "one in the other":
        two = one / "more"
    two.mkdir()
    for file in files[10:]:
        file.rename(two / file.name)
    if case == "a slice in both":
        shutil.copy(files[0], two / files[0].name)
        shutil.copy(two / files[11].name, one / "0000a")
        (two / files[0].name).rename(two / "zz")
    elif case == "damage in both":
        for folder in (one, two):
            (folder / "zz.dcm").write_bytes(b"damaged")
    elif case == "another series beside both":
        write_series(tmp_path / "other", voxels[:, :, :1])
        localizer = next((tmp_path / "other").iterdir())
        for folder in (one, two):
            shutil.copy(localizer, folder / "zz")
        shutil.rmtree(localizer.parent)
    elif case == "a slice each":
        for number, file in enumerate(sorted([*one.iterdir(), *two.iterdir()])):
            (tmp_path / f"{number:02}").mkdir()
            file.rename(tmp_path / f"{number:02}" / file.name)
    with pytest.warns(DcformerWarning, match="20 folders" if case == "a slice each" else "2 folders") as warned:
        _names(tmp_path)
    assert len(warned) == 1


def test_parts_of_a_series_that_are_named_apart(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    one, two = tmp_path / "set" / "one", tmp_path / "set" / "two"
    write_series(one, np.zeros((8, 8, 20), np.int16))
    write_series(tmp_path / "whole", np.zeros((8, 8, 20), np.int16))
    shutil.copytree(one, tmp_path / "copy")
    for named in ([one, tmp_path / "copy", tmp_path / "whole"], [one, one, str(one / "*")]):
        named_scans(named)
        _names(*named)
    assert not recwarn.list
    two.mkdir()
    for file in sorted(one.iterdir())[10:]:
        file.rename(two / file.name)
    listed = tmp_path / "list.csv"
    listed.write_text("path\nset/one\nset/two\n")
    for named in ([one, two], [str(tmp_path / "set" / "*")], [*one.iterdir(), *two.iterdir()], [one, *two.iterdir()],
                  [listed], [tmp_path / "set"], [tmp_path / "set", tmp_path / "whole"]):
        with pytest.warns(DcformerWarning, match="2 folders hold slices of one series, .*one and .*two") as warned:
            _names(*named)
        assert len(warned) == 1, named
    with pytest.warns(DcformerWarning, match="2 folders"):
        named_scans([one, *two.iterdir()])


def test_the_contents_of_a_disc_are_no_scan(tmp_path: Path):
    write_series(tmp_path / "disc" / "a", np.zeros((8, 8, 20), np.int16))
    for name in ("DICOMDIR", "dicomdir"):
        contents = tmp_path / "disc" / name
        contents.write_bytes(bytes(128) + b"DICM")
        assert _names(tmp_path / "disc") == _names(tmp_path / "disc" / "*") == ["a"]
        with pytest.raises(InputError, match="the table of contents of a disc; name the folder of the slices"):
            read_scan(contents, Preprocessing((64, 128, 128)), ReadOptions())
        contents.unlink()


def test_a_split_with_files_and_folders(tree: Path, tmp_path: Path):
    one = next(tree.rglob("train_1_a_1.nii"))
    assert len(_names(tree, one, split="valid")) == 3
    assert len(find_tasks([str(tree), str(one)], "valid", {}, tmp_path / "out")) == 3
    for find in (find_items, lambda given, split, options: find_tasks(given, split, options, tmp_path / "out")):
        with pytest.raises(InputError, match="no folder was named; drop it"):
            find([str(one)], "valid", {})
    assert _names(tmp_path / "gone", split="valid") == ["gone"]  # a failed scan, which says that it is not there

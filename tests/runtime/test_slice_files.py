"""DICOM files that are named one by one: those of a folder are one scan, for every command."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from dicoms import write_series

from dcformer_deploy.runtime import InputError, Model, load
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.errors import DcformerWarning
from dcformer_deploy.runtime.inputs import find_items, one_scan, slices_together
from dcformer_deploy.runtime.preparing import find_tasks
from dcformer_deploy.runtime.scan_files import SliceFiles, as_scan, file_facts, path_text, sha256_scan
from dcformer_deploy.runtime.store import read_store
from scans import LPS_AFFINE, write


@pytest.fixture(scope="module")
def expected(model: Model, hounsfield: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Embedding of the same as NIfTI."""
    return model.embed_image(write(tmp_path_factory.mktemp("nifti") / "scan.nii.gz", hounsfield, LPS_AFFINE))


def _files(folder: Path) -> list[Path]:
    found = sorted(folder.iterdir())
    random.Random(3).shuffle(found)
    return found


def test_as_the_same_scan_in_other_forms(model: Model, series: Path, expected: np.ndarray):
    files = _files(series)
    np.testing.assert_array_equal(model.embed_image(files), expected)
    np.testing.assert_array_equal(model.embed_image(tuple(map(str, files))), expected)
    np.testing.assert_array_equal(model.embed_images([series, files, model.preprocess(files)]), [expected] * 3)
    scored = model.zero_shot(files)
    assert scored.scores == model.zero_shot(series).scores
    assert scored.volume == str(as_scan(files))
    assert str(as_scan(files)).startswith(f"{min(files)} and {len(files) - 1} other files (")


def test_files_of_several_folders(model: Model, series: Path, expected: np.ndarray, tmp_path: Path):
    """As some archives lay a series out; other files beside them are not read."""
    moved = []
    for number, file in enumerate(_files(series)):
        place = tmp_path / "export" / f"{number % 3}" / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        moved.append(shutil.copy(file, place))
    (tmp_path / "export" / "0" / "other.dcm").write_bytes(b"damaged")
    np.testing.assert_array_equal(model.embed_image(moved), expected)


@pytest.mark.parametrize(("change", "message"), [
    (lambda files: [], "an empty list of files"),
    (lambda files: [*files, Path("x.nii.gz")], "x.nii.gz: a scan of its own in a list of files"),
    (lambda files: [*files, files[0].parent], "series: a scan of its own in a list of files"),
    (lambda files: [*files, files[0].with_name("none.dcm")], "none.dcm: no such scan"),
    (lambda files: [*files, Path(__file__)], "test_slice_files.py: no DICOM file, or damaged; expected slices only"),
    (lambda files: files[:1], "only 1 slices"),
    (lambda files: sorted(files)[:4] + sorted(files)[-4:], "pass --resample-irregular|more than half"),
    (lambda files: [1, *files], "scan: list; expected a path, a list of DICOM files"),
    (lambda files: 7, "scan: int; expected a path"),
])
def test_refused(model: Model, series: Path, change, message: str):
    with pytest.raises(InputError, match=message):
        model.embed_image(change(_files(series)))


def test_a_file_twice_is_one(series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In whatever way it is named."""
    files = sorted(series.iterdir())
    assert as_scan([*files, *files]) == as_scan(files) == SliceFiles(tuple(reversed(files)))
    assert as_scan([files[0], files[0]]) == files[0]
    monkeypatch.chdir(series.parent)
    (tmp_path / "link").symlink_to(series)
    other = [Path(series.name, file.name) for file in files[:9]]
    other += [series / ".." / series.name / file.name for file in files[9:12]]
    other += [tmp_path / "link" / file.name for file in files]
    (one,) = slices_together([*other, *files])
    assert isinstance(one, SliceFiles)
    assert sorted(file.name for file in one.files) == [file.name for file in files]


def test_names_facts_and_digests(series: Path, tmp_path: Path):
    """Of all files of a folder as of the folder; lists are told apart though they begin and end alike."""
    copy = Path(shutil.copytree(series, tmp_path / "copy"))
    files = sorted(copy.iterdir())
    whole, part = as_scan(files), as_scan([*files[:3], *files[4:]])
    assert (file_facts(whole), sha256_scan(whole)) == (file_facts(copy), sha256_scan(copy))
    assert sha256_scan(part) != sha256_scan(whole)
    other = as_scan([*files[:4], *files[5:]])
    assert path_text(part).startswith(f"{files[0]} and {len(files) - 2} other files (")
    assert str(part)[:-14] == str(other)[:-14]
    assert str(part) != str(other)
    files[5].unlink()
    assert file_facts(whole) is None


def test_a_damaged_slice_is_not_left_out(pristine_bundle: Path, series: Path, tmp_path: Path, capsys):
    """Though nothing in it says that it is one: without it the scan would be another, and be scored."""
    copy = Path(shutil.copytree(series, tmp_path / "copy"))
    last = sorted(copy.iterdir())[-1]
    last.write_bytes(b"")
    for command in ("zeroshot", "search"):
        arguments = [command, *([str(tmp_path / "s")] if command == "search" else [str(pristine_bundle)])]
        if command == "search":
            assert main(["embed", str(pristine_bundle), str(series), "--out", str(tmp_path / "s")]) == 0
        capsys.readouterr()
        assert main([*arguments, *map(str, copy.iterdir())]) == 2
        assert f"{last}: no DICOM file, or damaged" in capsys.readouterr().err
    assert main(["embed", str(pristine_bundle), *map(str, copy.iterdir()), "--out", str(tmp_path / "t")]) == 2
    (row,) = read_store(tmp_path / "t").to_pylist()
    assert "no DICOM file, or damaged" in row["error"]


def test_slices_that_older_ones_replaced(pristine_bundle: Path, series: Path, hounsfield: np.ndarray, tmp_path: Path,
                                         capsys):
    """Copied with their dates, as archives do: no file is newer than the newest was, and sizes are the same."""
    copy = Path(shutil.copytree(series, tmp_path / "copy"))
    mirrored = tmp_path / "mirrored"
    write_series(mirrored, hounsfield[::-1])
    newest, *others = sorted(copy.iterdir())
    for file in copy.iterdir():
        os.utime(file, (1.7e9, 1.7e9 + 100 * (file == newest)))
    for named in ([str(copy)], list(map(str, copy.iterdir()))):
        embed = ["embed", str(pristine_bundle), *named, "--out", str(tmp_path / f"s{len(named)}"), "--json"]
        found = []
        for source in (series, mirrored):
            for file in others:
                file.write_bytes((source / file.name).read_bytes())
                os.utime(file, (1.6e9, 1.6e9 + (source == series)))
            assert main(embed) in (0, 2)
            found.append(json.loads(capsys.readouterr().out)["skipped"])
        assert found == [0, 0]


def test_empty_names_and_patterns(pristine_bundle: Path, series: Path, tmp_path: Path, capsys,
                                  monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(series)
    for arguments in (["zeroshot", str(pristine_bundle), ""], ["profile", str(pristine_bundle), "--scan", ""],
                      ["embed", str(pristine_bundle), "", "--out", str(tmp_path / "s")],
                      ["report", str(pristine_bundle), " ", "--out", str(tmp_path / "r.html")]):
        assert main(arguments) == 2
        assert "an empty name" in capsys.readouterr().err
    assert main(["zeroshot", str(pristine_bundle), f"{series}/*", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1
    (tmp_path / "set" / "void").mkdir(parents=True)
    shutil.copytree(series, tmp_path / "set" / "good")
    with pytest.warns(DcformerWarning, match="passed over: .*void: no .nii"):
        (item,) = find_items([f"{tmp_path}/set/*"], None, {})
    assert item.path == tmp_path / "set" / "good"


def test_prepared_of_another_scan(pristine_bundle: Path, series: Path, hounsfield: np.ndarray, tmp_path: Path, capsys):
    """Folders of slices are often named alike; one that was moved is the same scan."""
    other, moved = tmp_path / "x" / "series", Path(shutil.copytree(series, tmp_path / "y" / "series"))
    write_series(other, hounsfield[::-1])
    out = ["--out", str(tmp_path / "p")]
    assert main(["prepare", str(pristine_bundle), str(series), *out]) == 0
    before = next((tmp_path / "p").rglob("*.zip")).read_bytes()
    assert main(["prepare", str(pristine_bundle), str(other), *out]) == 2
    assert f"series.nii.gz.prepared.zip was prepared of {series}; prepare it into another" in capsys.readouterr().err
    assert next((tmp_path / "p").rglob("*.zip")).read_bytes() == before
    assert main(["prepare", str(pristine_bundle), str(moved), *out]) == 0


def test_those_of_one_folder_are_together(series: Path, tmp_path: Path):
    other = Path(shutil.copytree(series, tmp_path / "other"))
    bare = other / "IM7"  # known by its content
    next(iter(sorted(other.iterdir()))).rename(bare)
    first, second = sorted(series.iterdir()), sorted(other.iterdir())
    assert bare in second
    alone = tmp_path / "alone.dcm"
    named = ["a text.dcm", first[1], *second, Path("b.nii.gz"), *first, alone, series]
    assert slices_together(named) == [
        "a text.dcm", SliceFiles(tuple(first)), SliceFiles(tuple(second)), Path("b.nii.gz"), alone, series]
    assert one_scan(first) == one_scan([f"{series}/*"]) == SliceFiles(tuple(first))
    assert one_scan([series]) == series
    with pytest.raises(InputError, match=r"and \d+ other files .*: 2 scans; expected one"):
        one_scan([*first, *second])
    with pytest.raises(InputError, match=r"/\*\.ima: no file matches"):
        one_scan([f"{series}/*.ima"])
    assert [item.path for item in find_items([f"{tmp_path}/other/*", f"{series.parent}/*"], None, {})] == [
        SliceFiles(tuple(second)), series]


def test_however_they_are_named(series: Path, tmp_path: Path):
    """Patterns that overlap, patterns beside files, and lists: one scan; folders that are named like files: scans."""
    copy = Path(shutil.copytree(series, tmp_path / "copy"))
    for file in copy.iterdir():
        file.rename(file.with_suffix(".dcm"))
    files = sorted(copy.iterdir())
    whole = [SliceFiles(tuple(files))]
    table = tmp_path / "list.csv"
    table.write_text("path\n" + "".join(f"copy/{file.name}\n" for file in files))
    for named in ([f"{copy}/000*", f"{copy}/00*"], [f"{copy}/*.dcm", files[3]], [table, f"{copy}/*1*"],
                  [f"{tmp_path}/**/*.dcm"]):
        assert [item.path for item in find_items(named, None, {})] == whole
        assert [task.path for task in find_tasks(named, None, {}, tmp_path / "out")] == whole
    item = find_items(files, None, {})[0]
    assert pickle.loads(pickle.dumps(item)) == item  # as Ray sends it
    folders = [Path(shutil.copytree(series, tmp_path / name)) for name in ("a.dcm", "b.ima")]
    assert slices_together(folders) == folders


def test_zeroshot_and_report(pristine_bundle: Path, series: Path, tmp_path: Path, capsys):
    files = list(map(str, _files(series)))
    assert main(["zeroshot", str(pristine_bundle), *files, str(series), "--json"]) == 0
    of_files, of_folder = json.loads(capsys.readouterr().out)
    assert of_files["scores"] == of_folder["scores"]
    page = tmp_path / "page.html"
    arguments = ["report", str(pristine_bundle), *files, "--out", str(page), "--no-occlusion", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["scores"] == of_files["scores"]
    assert str(series) not in page.read_text()
    assert sha256_scan(series) in page.read_text()
    page.unlink()
    assert main([*arguments, str(series)]) == 2
    assert "2 scans; expected one" in capsys.readouterr().err
    assert not page.exists()


def test_store_and_search(pristine_bundle: Path, series: Path, expected: np.ndarray, tmp_path: Path, capsys):
    """The list is a row of its own; its folder has the same content; a list that changed is embedded again."""
    copy = Path(shutil.copytree(series, tmp_path / "copy"))
    files, store = list(map(str, _files(copy))), tmp_path / "store"
    embed = ["embed", str(pristine_bundle), *files, "--out", str(store), "--json"]
    counts = []
    for more in ((), (), (str(copy),)):
        assert main([*embed, *more]) == 0
        figures = json.loads(capsys.readouterr().out)
        counts.append(tuple(figures[name] for name in ("embedded", "skipped", "copied")))
    assert counts == [(1, 0, 0), (0, 1, 0), (0, 1, 1)]
    np.testing.assert_array_equal(np.stack(read_store(store).column("embedding").to_numpy()), [expected] * 2)
    assert main(["search", str(store), *files, "a nodule", "--json"]) == 0
    by_scan, by_text = json.loads(capsys.readouterr().out)["results"]
    assert [hit["path"] for hit in by_scan["hits"]] == [str(copy)]  # all but itself
    assert len(by_text["hits"]) == 2
    uid = write_series(copy / "other", np.zeros((36, 30, 20), np.int16))
    search = ["search", str(store), str(copy), "--json"]
    assert main(search) == 2
    assert "2 CT series; choose one with --series UID" in capsys.readouterr().err
    assert main([*search, "--series", uid]) == 0
    (found,) = json.loads(capsys.readouterr().out)["results"]
    assert len(found["hits"]) == 2  # of another series than the one in the store
    assert main([*search, "a nodule", str(series), "--series", uid]) == 2  # the series of another folder
    assert f"{series}: no series {uid}" in capsys.readouterr().err
    Path(files[0]).touch()
    assert main(embed) == 0
    assert json.loads(capsys.readouterr().out)["copied"] == 1


def test_file_of_embeddings(pristine_bundle: Path, series: Path, expected: np.ndarray, tmp_path: Path):
    out = tmp_path / "e.npz"
    assert main(["embed", str(pristine_bundle), *map(str, _files(series)), "--out", str(out)]) == 0
    with np.load(out) as found:
        np.testing.assert_array_equal(found["embeddings"], [expected])


def test_prepared(pristine_bundle: Path, series: Path, expected: np.ndarray, tmp_path: Path, capsys):
    files = list(map(str, _files(series)))
    prepare = ["prepare", str(pristine_bundle), *files, "--out", str(tmp_path / "p")]
    assert main(prepare) == main(prepare) == 0
    assert "0 prepared, 1 there already" in capsys.readouterr().out
    (path,) = (tmp_path / "p").rglob("*.prepared.zip")
    assert path.name == "series.nii.gz.prepared.zip"
    assert float(load(pristine_bundle).embed_image(path) @ expected) > 0.99999


def test_measured(pristine_bundle: Path, series: Path, capsys):
    """A pattern, where a command takes one word; the original code, which reads NIfTI alone, is left out."""
    assert main(["profile", str(pristine_bundle), "--scan", f"{series}/*", "--runs", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["phases_ms"]["read"] > 0
    for scan in (series, f"{series}/*"):
        assert main(["bench", str(pristine_bundle), "--scan", str(scan), "--runs", "3", "--json"]) == 0
        told = capsys.readouterr()
        assert "the original code reads NIfTI alone" in told.err
        assert [row["name"] for row in json.loads(told.out)["contenders"]] == ["onnxruntime"]
    for arguments in (["--against", "torch"], ["--load-only"]):
        assert main(["bench", str(pristine_bundle), "--scan", str(series), *arguments]) == 2
        assert "reads NIfTI alone" in capsys.readouterr().err
    assert main(["bench", str(pristine_bundle), "--scan", "none.nii.gz"]) == 2
    assert "none.nii.gz: no such scan" in capsys.readouterr().err

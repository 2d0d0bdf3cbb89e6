"""Prepared scans: the answers of the scans themselves, read by every command, refused where they do not belong."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dcformer_deploy.runtime import InputError, load, preparing
from dcformer_deploy.runtime.bundle import write_manifest
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.volume.folder import find_scans
from dcformer_deploy.runtime.volume.prepared import SUFFIX, as_volume, read_prepared, written_file


@pytest.fixture(scope="module")
def prepared(pristine_bundle: Path, scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four scans, prepared; not to be changed."""
    out = tmp_path_factory.mktemp("prepared") / "set"
    assert main(["prepare", str(pristine_bundle), str(scans), "--out", str(out)]) == 0
    return out


def _one(folder: Path, name: str = "b.nii.gz") -> Path:
    return folder / (name + SUFFIX)


@pytest.mark.parametrize(("values", "largest"), [("int16", 1.6e-5), ("fp16", 2.5e-4)])
def test_within_what_is_promised_of_the_scans_themselves(pristine_bundle: Path, scans: Path, tmp_path: Path,
                                                         values: str, largest: float):
    assert main(["prepare", str(pristine_bundle), str(scans), "--out", str(tmp_path / "p"), "--values", values]) == 0
    model = load(pristine_bundle)
    for scan in sorted(scans.iterdir()):
        expected, found = model.prepare(scan), model.prepare(tmp_path / "p" / (scan.name + SUFFIX))
        assert set(found.feeds) == set(expected.feeds)
        worst = max(np.abs(found.feeds[name] - array).max() for name, array in expected.feeds.items())
        assert 0 < worst <= largest
        assert (found.shape_hwd, found.spacing_hwd_mm, found.orientation, found.hounsfield) == (
            expected.shape_hwd, expected.spacing_hwd_mm, expected.orientation, expected.hounsfield)
        cosine = float(model.embed_image(scan) @ model.embed_image(tmp_path / "p" / (scan.name + SUFFIX)))
        assert cosine > (0.99999 if values == "int16" else 0.999)


def test_the_volume_gives_the_same_lines(pristine_bundle: Path, prepared: Path):
    """What a bundle's every reader of volumes gets: whole lines, and zero elsewhere."""
    model = load(pristine_bundle)
    feeds = model.prepare(_one(prepared)).feeds
    volume = model.preprocess(_one(prepared))
    assert volume.shape == model.manifest.preprocessing.shape_dhw
    again = model.prepare(volume).feeds
    for name, array in feeds.items():
        np.testing.assert_array_equal(again[name], array)
    whole = {"volume": volume[None, None]}
    np.testing.assert_array_equal(as_volume(whole, model.manifest.preprocessing), volume)


def test_commands_take_the_prepared_set(pristine_bundle: Path, scans: Path, prepared: Path, tmp_path: Path, capsys):
    assert main(["zeroshot", str(pristine_bundle), str(_one(prepared)), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["zeroshot", str(pristine_bundle), str(scans / "b.nii.gz"), "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert expected[0]["scores"] == pytest.approx(found[0]["scores"], abs=1e-4)
    bundle = Path(shutil.copytree(pristine_bundle, tmp_path / "bundle"))
    assert main(["calibrate", str(bundle), "--data", str(prepared), "--samples", "3", "--precision", "int8",
                 "--method", "minmax", "--depthwise", "never"]) == 0
    assert main(["retention", str(bundle), "--data", str(prepared)]) == 0
    assert main(["check", str(bundle), "--data", str(prepared), "--samples", "2"]) == 0
    assert main(["embed", str(bundle), str(prepared), "--out", str(tmp_path / "store")]) == 0


def test_tables_go_along_and_metadata_are_not_applied_again(pristine_bundle: Path, scans: Path, tmp_path: Path, capsys):
    data = tmp_path / "data"
    (data / "deep" / "er").mkdir(parents=True)
    shutil.copy(scans / "b.nii.gz", data / "deep" / "er" / "valid_1_a_1.nii.gz")
    (data / "labels.csv").write_text("VolumeName,Emphysema\nvalid_1_a_1.nii.gz,1\n")
    (data / "notes.csv").write_text("anything,else\n")
    (data / "metadata.csv").write_text("VolumeName,XYSpacing,ZSpacing,RescaleSlope,RescaleIntercept\n"
                                       "valid_1_a_1.nii.gz,\"[0.5, 0.5]\",2.5,1,0\n")
    out, arguments = tmp_path / "out", ["prepare", str(pristine_bundle), str(data), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert files == [f"deep/er/valid_1_a_1.nii.gz{SUFFIX}", "labels.csv", "metadata.csv"]
    assert find_scans(out) == [(out / files[0], None)]
    model = load(pristine_bundle)
    assert model.prepare(out / files[0]).spacing_hwd_mm == (0.5, 0.5, 2.5)
    # Another table of metadata: prepared again.
    (data / "metadata.csv").write_text((data / "metadata.csv").read_text().replace("2.5", "1.5"))
    capsys.readouterr()
    for count in (1, 0):
        assert main([*arguments, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["prepared"] == count
    assert model.prepare(out / files[0]).spacing_hwd_mm == (0.5, 0.5, 1.5)


def test_the_same_scan_gives_the_same_file(pristine_bundle: Path, scans: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch):
    files = []
    for name, now in (("a", 1.0e9), ("b", 1.5e9)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        assert main(["prepare", str(pristine_bundle), str(scans / "a.nii.gz"), "--out", str(tmp_path / name)]) == 0
        files.append((tmp_path / name / "a.nii.gz.prepared.zip").read_bytes())
    assert files[0] == files[1]


def test_again_only_what_has_changed(pristine_bundle: Path, scans: Path, tmp_path: Path, capsys):
    data = Path(shutil.copytree(scans, tmp_path / "data"))
    (data / "x.nii.gz").write_bytes(b"no gzip")
    arguments = ["prepare", str(pristine_bundle), str(data), "--out", str(tmp_path / "out"), "--json"]

    def run(code: int, *more: str) -> tuple[int, int, int]:
        assert main([*arguments, *more]) == code
        out = json.loads(capsys.readouterr().out)
        return out["prepared"], out["skipped"], out["failed"]

    assert run(2) == (4, 0, 1)
    assert run(2) == (0, 4, 1)
    (data / "b.nii.gz").touch()
    path = _one(tmp_path / "out", "d.nii.gz")
    path.write_bytes(path.read_bytes()[:-100])
    assert run(2) == (2, 2, 1)
    assert run(2, "--values", "fp16") == (4, 0, 1)
    assert run(2, "--values", "fp16", "--slope", "1") == (4, 0, 1)
    assert not list((tmp_path / "out").rglob("*.tmp"))


def _stored(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> tuple[int, int, int]:
    assert main(["prepare", *map(str, arguments), "--json"]) == code
    out = json.loads(capsys.readouterr().out)
    return out["prepared"], out["skipped"], out["failed"]


def test_what_another_bundle_cannot_use_is_not_there_already(pristine_bundle: Path, scans: Path, tmp_path: Path,
                                                             capsys):
    """Prepared for one, then for another: it is prepared again, as its own error message asks for."""
    other = Path(shutil.copytree(pristine_bundle, tmp_path / "other"))
    manifest = load(pristine_bundle).manifest
    window = dataclasses.replace(manifest.preprocessing, window_hu=(-1000.0, 400.0))
    write_manifest(other, dataclasses.replace(manifest, preprocessing=window))
    assert _stored(capsys, 0, pristine_bundle, scans, "--out", tmp_path / "p") == (4, 0, 0)
    assert _stored(capsys, 0, other, scans, "--out", tmp_path / "p") == (4, 0, 0)
    assert _stored(capsys, 0, other, scans, "--out", tmp_path / "p") == (0, 4, 0)
    path = _one(tmp_path / "p")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if "/c/" in info.filename)
    content[info.header_offset + 30 + len(info.filename) + info.file_size // 2] ^= 0xFF
    path.write_bytes(content)
    assert _stored(capsys, 0, other, scans, "--out", tmp_path / "p") == (1, 3, 0)
    load(other).prepare(path)


def test_what_was_prepared_of_a_file_that_is_damaged_now(pristine_bundle: Path, scans: Path, tmp_path: Path, capsys):
    """It would be evaluated as if nothing were wrong. What an option or a touched file says of it is no damage."""
    data, out = Path(shutil.copytree(scans, tmp_path / "data")), tmp_path / "p"
    assert _stored(capsys, 0, pristine_bundle, data, "--out", out) == (4, 0, 0)
    (data / "d.nii.gz").touch()
    assert _stored(capsys, 2, pristine_bundle, data / "d.nii.gz", "--out", out, "--slope", "-1") == (0, 0, 1)
    assert _one(out, "d.nii.gz").exists()
    whole = (data / "b.nii.gz").read_bytes()
    (data / "b.nii.gz").write_bytes(whole[:-1000])
    assert main(["prepare", str(pristine_bundle), str(data), "--out", str(out)]) == 2
    told = capsys.readouterr().err
    assert "b.nii.gz: truncated" in told
    assert f"{_one(out)}, which was prepared of what this was before, is removed" in " ".join(told.split())
    assert sorted(path.name for path, _ in find_scans(out)) == [f"{name}{SUFFIX}" for name in (
        "a.nii.gz", "c.nii", "d.nii.gz")]
    (data / "b.nii.gz").write_bytes(whole)
    assert _stored(capsys, 0, pristine_bundle, data, "--out", out) == (1, 3, 0)
    (data / "b.nii.gz").unlink()  # as of a disk that is not mounted: what was prepared of it is as good as it was
    assert _stored(capsys, 2, pristine_bundle, data / "b.nii.gz", "--out", out) == (0, 0, 1)
    assert _one(out).exists()


def test_what_a_killed_program_left(pristine_bundle: Path, scans: Path, tmp_path: Path, capsys):
    """Passed over by whoever reads the set, and removed when it is gone on with; not what another program writes."""
    out = tmp_path / "p"
    killed = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from dcformer_deploy.runtime.volume.prepared import written_file
        with written_file(Path(sys.argv[1])) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        """)
    for name in (f"a.nii.gz{SUFFIX}", "labels.csv", f"other.nii.gz{SUFFIX}"):
        found = subprocess.run([sys.executable, "-c", killed, str(out / name)], check=False)
        assert found.returncode == -signal.SIGKILL
    left = sorted(path.parent.name for path in out.rglob("*") if path.is_file())
    assert len(left) == 3
    data = Path(shutil.copytree(scans, tmp_path / "data"))
    (data / "labels.csv").write_text("VolumeName,Emphysema\na.nii.gz,1\n")
    with written_file(_one(out)) as file:
        file.write(b"half")
        file.flush()
        written, = (path.name for path in out.iterdir() if path.name not in left)
        assert _stored(capsys, 0, pristine_bundle, data, "--out", out) == (4, 0, 0)
        assert sorted(path.name for path in out.iterdir() if path.name.endswith(".tmp")) == sorted([written, left[-1]])
        assert left[-1].startswith(".other")  # of no scan of this call
        assert len(find_scans(out)) == 4
    assert _one(out).read_bytes() == b"half"


def test_two_tables_of_one_name(pristine_bundle: Path, scans: Path, tmp_path: Path, capsys):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        shutil.copy(scans / f"{'b' if name == 'x' else 'd'}.nii.gz", tmp_path / name)
        (tmp_path / name / "labels.csv").write_text("VolumeName,Emphysema\n")
    assert main(["prepare", str(pristine_bundle), str(tmp_path / "x"), str(tmp_path / "y"), "--out",
                 str(tmp_path / "out")]) == 2
    assert "labels.csv have the same name; prepare into two folders" in capsys.readouterr().err


def test_a_full_disk_ends_it(pristine_bundle: Path, scans: Path, tmp_path: Path, capsys,
                             monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preparing, "write_prepared", full)
    assert main(["prepare", str(pristine_bundle), str(scans), "--out", str(tmp_path / "out"), "--readers", "1"]) == 3
    assert capsys.readouterr().err.count("No space left") == 1


def test_prepared_for_something_else(pristine_bundle: Path, prepared: Path):
    graph = load(pristine_bundle).manifest.graph("image")
    assert graph is not None
    spec = load(pristine_bundle).manifest.preprocessing
    other = dataclasses.replace(spec, window_hu=(-1000.0, 400.0))
    with pytest.raises(InputError, match=r"prepared for window_hu \[-1000.0, 200.0\], the bundle has .*400.0"):
        read_prepared(_one(prepared), graph.inputs, other)
    volume = dataclasses.replace(graph.inputs[0], name="volume", axes=("batch", 1, *spec.shape_dhw))
    with pytest.raises(InputError, match="prepared for .*prepare it again, for this bundle"):
        read_prepared(_one(prepared), [volume], spec)


def _repack(path: Path, change: object) -> None:
    with zipfile.ZipFile(path) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in change(files).items():  # type: ignore[operator]
            archive.writestr(name, content)


def _other_values(files: dict) -> dict:
    about = json.loads(files["zarr.json"])
    about["attributes"]["sha256"] = "0" * 64
    return {**files, "zarr.json": json.dumps(about).encode()}


def _no_array(files: dict) -> dict:
    return {name: content for name, content in files.items() if not name.startswith("lines_h")}


def _pickled(files: dict) -> dict:
    """As Zarr 2, whose filters may be pickles: reading one would run what it says."""
    attributes = json.loads(files["zarr.json"])["attributes"]
    shape = json.loads(files["lines_d/zarr.json"])["shape"]
    array = {"zarr_format": 2, "shape": shape, "chunks": shape, "dtype": "|O", "compressor": None, "fill_value": None,
             "order": "C", "filters": [{"id": "pickle"}]}
    return {".zgroup": b'{"zarr_format": 2}', ".zattrs": json.dumps(attributes).encode(),
            "lines_d/.zarray": json.dumps(array).encode(), "lines_d/0.0.0.0.0": b"cos\nsystem\n(S'false'\ntR."}


def _uncompressed(files: dict) -> dict:
    name = "lines_d/zarr.json"
    array = json.loads(files[name])
    array["codecs"] = array["codecs"][:1]
    return {**files, name: json.dumps(array).encode()}


def _empty_chunks(files: dict) -> dict:
    name = "lines_d/zarr.json"
    array = json.loads(files[name])
    array["chunk_grid"]["configuration"]["chunk_shape"][2] = 0
    return {**files, name: json.dumps(array).encode()}


def _blosc_bomb(files: dict) -> dict:
    """A chunk that says it unpacks to two gigabytes."""
    name = next(name for name in files if "/c/" in name)
    return {**files, name: files[name][:4] + (2**31 - 1).to_bytes(4, "little") + files[name][8:]}


def _other_type(files: dict) -> dict:
    about = json.loads(files["zarr.json"])
    about["attributes"]["values"] = "float16"
    return {**files, "zarr.json": json.dumps(about).encode()}


@pytest.mark.parametrize(("change", "message"), [
    (_pickled, "damaged"), (_uncompressed, "an array in another encoding"), (_empty_chunks, "damaged"),
    (_blosc_bomb, "its chunks unpack to 2[0-9]+ bytes"), (_other_type, "its values are not float16"),
    (_other_values, "its values are not those that were written"), (_no_array, "damaged"),
    (lambda files: {**files, "zarr.json": b"{}"}, "damaged"), (lambda files: {}, "damaged")])
def test_damaged(pristine_bundle: Path, prepared: Path, tmp_path: Path, change: object, message: str):
    path = Path(shutil.copy(_one(prepared), tmp_path))
    _repack(path, change)
    with pytest.raises(InputError, match=message):
        load(pristine_bundle).prepare(path)


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + bytes(18), b"no zip at all"])
def test_no_archive(pristine_bundle: Path, tmp_path: Path, content: bytes):
    path = tmp_path / f"a.nii.gz{SUFFIX}"
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged, or no prepared scan"):
        load(pristine_bundle).prepare(path)


def test_a_zip_bomb_is_not_unpacked(pristine_bundle: Path, tmp_path: Path):
    path = tmp_path / f"a.nii.gz{SUFFIX}"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zarr.json", bytes(64 << 20))
    with pytest.raises(InputError, match="unpacks to 67108864 bytes; not a prepared scan"):
        load(pristine_bundle).prepare(path)


def test_larger_arrays_than_expected_are_not_read(pristine_bundle: Path, prepared: Path, tmp_path: Path):
    """A chunk of zeros is small in the file however large it is."""
    path = Path(shutil.copy(_one(prepared), tmp_path))

    def enlarge(files: dict) -> dict:
        name = "lines_d/zarr.json"
        array = json.loads(files[name])
        array["shape"] = array["chunk_grid"]["configuration"]["chunk_shape"] = [1, 1, 1 << 20, 1 << 12, 1 << 12]
        return {**files, name: json.dumps(array).encode()}

    _repack(path, enlarge)
    with pytest.raises(InputError, match="an array of another shape"):
        load(pristine_bundle).prepare(path)


@pytest.mark.parametrize(("arguments", "message"), [
    (("zeroshot", "{bundle}", "{scan}", "--slope", "2"), "a prepared scan, whose spacing, rescaling and orientation"),
    (("prepare", "{bundle}", "{scan}", "--out", "{out}"), "prepared already; name the scan itself"),
    (("prepare", "{bundle}", "{a}", "{b}", "--out", "{out}"), "have the same name"),
    (("prepare", "{bundle}", "{a}", "--out", "{a}"), "expected a folder"),
    (("prepare", "{bundle}", "{folder}", "--out", "{folder}/p"), "whose scans would then be there twice"),
])
def test_refused(pristine_bundle: Path, scans: Path, prepared: Path, tmp_path: Path, capsys, arguments: tuple,
                 message: str):
    (tmp_path / "x").mkdir()
    names = {"bundle": pristine_bundle, "scan": _one(prepared), "out": tmp_path / "out", "folder": tmp_path / "x",
             "a": scans / "b.nii.gz",
             "b": shutil.copy(scans / "c.nii", tmp_path / "x" / "b.nii.gz")}
    assert main([argument.format(**names) for argument in arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""dcformer calibrate: what it adds, what it remembers, interruptions, and what it refuses."""

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from dcformer_deploy.calibration import add_precisions
from dcformer_deploy.calibration import calibrate as module
from dcformer_deploy.calibration.observe import Observer, activation_bytes, split_by_bytes
from dcformer_deploy.calibration.record import model_digest, read_record, scan_digest
from dcformer_deploy.calibration.scans import Scan
from dcformer_deploy.runtime import CheckFailed, load
from dcformer_deploy.runtime.backends import Options
from dcformer_deploy.runtime.bundle import open_bundle
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.cli.output import progress
from dcformer_deploy.runtime.errors import DcformerWarning
from dcformer_deploy.runtime.files import cache_folder, sha256_file
from dcformer_deploy.runtime.volume import image_feeds

#: Without measuring, which takes seconds; ``test_integers`` has it.
CALIBRATE = ["calibrate", "--depthwise", "never"]


@pytest.fixture
def copy(pristine_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine_bundle, tmp_path / "bundle"))


def refuse(capsys: pytest.CaptureFixture[str], message: str, *arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_bundle_has_the_graphs_and_is_intact(calibrated: Path, pristine_bundle: Path, capsys):
    manifest = open_bundle(calibrated).manifest
    found = {(graph.role, graph.precision) for graph in manifest.graphs}
    assert found == {(role, name) for role in ("image", "text") for name in ("fp32", "fp16", "bf16", "int8")}
    assert {(g.role, g.precision) for g in manifest.graphs if g.target == "tensorrt"} == {
        ("image", "bf16"), ("text", "bf16"), ("image", "int8")}
    by_precision = {conversion.precision: conversion for conversion in manifest.conversions}
    assert (by_precision["int8"].layers, by_precision["int8"].method, by_precision["int8"].scans) == (18, "minmax", 3)
    assert by_precision["fp16"].data == by_precision["int8"].data
    assert [g for g in manifest.graphs if g.precision == "fp32"] == list(open_bundle(pristine_bundle).manifest.graphs)
    assert {record.path for record in manifest.files} == {p.name for p in calibrated.iterdir()} - {"manifest.json"}
    assert main(["inspect", str(calibrated)]) == 0
    assert "Precisions" in capsys.readouterr().out


def test_int8_answers_are_near(calibrated: Path, scans: Path):
    """Of the features: with random weights, codes are too near to each other to survive."""
    scan = scans / "b.nii.gz"
    models = [load(calibrated, precision=name) for name in ("fp32", "int8")]
    exact, found = (m.image_outputs(m.preprocess(scan)[None], ["feature_map"])["feature_map"] for m in models)
    noise = float(((found - exact) ** 2).sum() / (exact**2).sum())
    assert 1e-6 < noise < 1e-2


def test_other_methods_from_what_was_observed(calibrated: Path, tmp_path: Path, capsys):
    bundle = Path(shutil.copytree(calibrated, tmp_path / "bundle"))
    def ranges() -> set[float]:
        proto = onnx.load(bundle / "image.int8.onnx")
        return {float(onnx.numpy_helper.to_array(t)) for t in proto.graph.initializer if "int8_scale" in t.name}

    before = ranges()
    assert main([*CALIBRATE, str(bundle), "--method", "mse", "--precision", "int8", "--json"]) == 0
    conversions = {c["precision"]: c for c in json.loads(capsys.readouterr().out)}
    assert (conversions["fp16"]["method"], conversions["int8"]["method"]) == (None, "mse")
    assert conversions["fp16"]["notes"][0] == "weights rounded so that errors make up for each other on the scans"
    assert conversions["int8"]["notes"][0] == "weights rounded to the nearest, as no scans were at hand"
    assert ranges() != before
    assert main([*CALIBRATE, str(bundle), "--method", "minmax", "--precision", "int8"]) == 0
    assert ranges() == before


@pytest.mark.thorough
def test_cache_of_its_own(copy: Path, scans: Path, tmp_path: Path, calibrated: Path):
    cache = tmp_path / "cache.json"
    assert main([*CALIBRATE, str(copy), "--data", str(scans), "--samples", "3", "--precision", "int8", "--cache",
                 str(cache)]) == 0
    assert cache.read_text() == (calibrated / "calibration.json").read_text()
    again = Path(shutil.copytree(copy, tmp_path / "again"))
    assert main([*CALIBRATE, str(again), "--cache", str(cache), "--precision", "int8"]) == 0
    same = [{g.file for g in open_bundle(path).manifest.graphs} for path in (again, copy)]
    assert same[0] == same[1]


def test_observations_are_those_of_all_activations_at_once(calibrated: Path, scans: Path):
    """Group by group under a small budget, against one session with every output."""
    bundle = open_bundle(calibrated)
    proto = onnx.load(calibrated / "image.fp32.onnx")
    record = read_record(calibrated / "calibration.json", model_digest(proto))
    by_digest = {scan_digest(sha256_file(path), {}): path for path in scans.iterdir()}
    assert len(record.scans) == 3
    model = load(calibrated)
    everything = onnx.ModelProto()
    everything.CopyFrom(proto)
    names = list(activation_bytes(proto))
    known = {output.name for output in proto.graph.output}
    kinds = {value.name: value for value in proto.graph.value_info}
    everything.graph.output.extend(kinds[name] for name in names if name not in known)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(everything.SerializeToString(), options)
    observer = Observer(proto, names, 2, budget_bytes=1 << 20)
    lows = dict.fromkeys(names, np.inf)
    for digest in record.scans:
        feeds = image_feeds(bundle.manifest.graphs[0].inputs, model.preprocess(by_digest[digest])[None])
        observer.observe(feeds)
        for key, values in zip(names, session.run(names, feeds), strict=True):
            lows[key] = min(lows[key], float(values.min()))
    assert {key: observer.histograms[key].low for key in names} == pytest.approx(lows, rel=1e-4, abs=1e-5)
    assert {key: record.histograms[key].low for key in names} == pytest.approx(lows, rel=1e-4, abs=1e-5)


def test_groups_stay_within_the_budget():
    sizes = {"a": 5, "b": 4, "c": 12, "d": 1, "e": 9}
    assert split_by_bytes(sizes, 10) == [["a", "b"], ["c"], ["d", "e"]]


def test_interrupted_calibration_goes_on(copy: Path, scans: Path, monkeypatch: pytest.MonkeyPatch, calibrated: Path):
    seen = []
    observe = Observer.observe

    def interrupted(self, feeds):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(1)
        observe(self, feeds)

    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    monkeypatch.setattr(Observer, "observe", interrupted)
    arguments = [*CALIBRATE, str(copy), "--data", str(scans), "--samples", "3"]
    assert main(arguments) == 130
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    monkeypatch.setattr(Observer, "observe", lambda self, feeds: (seen.append(1), observe(self, feeds)))
    assert main(arguments) == 0
    assert len(seen) == 3
    assert (copy / "calibration.json").read_text() == (calibrated / "calibration.json").read_text()
    assert not list((cache_folder() / "calibrate").iterdir())


def _observe(bundle: Path, chosen: list[Scan], state: Path, monkeypatch: pytest.MonkeyPatch, most: int | None = None):
    """How many scans were observed until the interruption, if any, and the record."""
    seen, record = [], None
    observe = Observer.observe

    def counted(self, feeds):
        if len(seen) == most:
            raise KeyboardInterrupt
        seen.append(1)
        observe(self, feeds)

    with monkeypatch.context() as patch, progress() as display:
        patch.setattr(Observer, "observe", counted)
        try:
            record, _ = module.observe(open_bundle(bundle), chosen, 3, state, Options(), display)
        except KeyboardInterrupt:
            assert most is not None
    return len(seen), record


def _table(path: Path, names: list[str], z_mm: float) -> Path:
    rows = [f'{name},"[0.9, 0.9]",{z_mm},1,0\n' for name in names]
    path.write_text("VolumeName,XYSpacing,ZSpacing,RescaleSlope,RescaleIntercept\n" + "".join(rows))
    return path


def test_goes_on_only_with_the_same_scans_and_table(pristine_bundle: Path, scans: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch):
    """Not by name: a table that was mended, or a scan that was replaced, is observed anew, and all before it, too."""
    folder = Path(shutil.copytree(scans, tmp_path / "scans"))
    names = ["b.nii.gz", "c.nii", "d.nii.gz"]
    table = _table(tmp_path / "table.csv", names, 9)
    chosen = [Scan(folder / name, {"metadata": table}) for name in names]
    state = tmp_path / "state.json"
    assert _observe(pristine_bundle, chosen, state, monkeypatch, most=2) == (2, None)
    assert not any(name in state.read_text() for name in names)
    os.utime(folder / "b.nii.gz", (1, 1))  # the same content still
    count, wrong = _observe(pristine_bundle, chosen, state, monkeypatch)
    assert count == 1
    _table(table, names, 1.5)
    count, record = _observe(pristine_bundle, chosen, state, monkeypatch)
    assert count == 3
    assert record.scans != wrong.scans and record.data == wrong.data
    expected = _observe(pristine_bundle, chosen, tmp_path / "other.json", monkeypatch)[1]
    assert {name: (h.low, h.high, h.counts.tolist()) for name, h in record.histograms.items()} == {
        name: (h.low, h.high, h.counts.tolist()) for name, h in expected.histograms.items()}
    assert {name: h.low for name, h in record.histograms.items()} != {
        name: h.low for name, h in wrong.histograms.items()}
    shutil.copy(scans / "d.nii.gz", folder / "b.nii.gz")
    count, replaced = _observe(pristine_bundle, chosen, state, monkeypatch)
    assert count == 3 and replaced.data != record.data


def test_goes_on_behind_a_scan_that_cannot_be_read(pristine_bundle: Path, scans: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken.nii.gz").write_bytes(b"no gzip")
    names = ["a.nii.gz", "b.nii.gz", "c.nii"]
    chosen = [Scan(scans / names[0]), Scan(tmp_path / "broken.nii.gz"), *(Scan(scans / name) for name in names[1:])]
    with pytest.warns(DcformerWarning, match="left out: .*broken.nii.gz"):
        assert _observe(pristine_bundle, chosen, tmp_path / "state.json", monkeypatch, most=2) == (2, None)
    count, record = _observe(pristine_bundle, chosen, tmp_path / "state.json", monkeypatch)
    assert count == 1
    assert record.scans == tuple(scan_digest(sha256_file(scans / name), {}) for name in names)


def test_scan_that_changes_while_it_is_read_is_left_out(pristine_bundle: Path, scans: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch):
    folder = Path(shutil.copytree(scans, tmp_path / "scans"))
    paths = sorted(folder.iterdir())
    read = module.read_feeds

    def touching(path, *arguments):
        found = read(path, *arguments)
        if path == paths[1]:
            os.utime(path, (1, 1))
        return found

    monkeypatch.setattr(module, "read_feeds", touching)
    with pytest.warns(DcformerWarning, match="left out: .*b.nii.gz: changed while it was read"):
        _, record = _observe(pristine_bundle, [Scan(path) for path in paths], tmp_path / "s.json", monkeypatch)
    assert record.scans == tuple(scan_digest(sha256_file(path), {}) for path in (paths[0], *paths[2:]))


def test_nothing_kept_names_a_scan(calibrated: Path, scans: Path):
    for path in scans.iterdir():
        for file in calibrated.iterdir():
            assert path.name.encode() not in file.read_bytes(), file


def test_files_of_an_earlier_version_lose_their_names(calibrated: Path, copy: Path, tmp_path: Path, capsys):
    old = json.loads((calibrated / "calibration.json").read_text())
    old |= {"format": "dcformer-deploy calibration 1", "scans": ["doe_john.nii.gz", "b.nii.gz", "c.nii"]}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert main([*CALIBRATE, str(copy), "--cache", str(tmp_path / "old.json"), "--precision", "fp16", "--json"]) == 0
    (conversion,) = json.loads(capsys.readouterr().out)
    assert (conversion["scans"], conversion["data"]) == (3, old["data"])
    assert "nii" not in (copy / "calibration.json").read_text()
    assert main([*CALIBRATE, str(copy), "--precision", "fp16"]) == 0  # and is read again


def test_observations_outlive_a_failure_to_write(copy: Path, scans: Path, monkeypatch: pytest.MonkeyPatch):
    """What minutes of scans have shown is not lost because a graph could not be made."""
    arguments = [*CALIBRATE, str(copy), "--data", str(scans), "--samples", "2", "--precision", "int8"]
    seen = []
    observe = Observer.observe
    monkeypatch.setattr(Observer, "observe", lambda self, feeds: (seen.append(1), observe(self, feeds)))
    with monkeypatch.context() as patch:
        patch.setattr(add_precisions, "_require_finite", lambda *_: (_ for _ in ()).throw(CheckFailed("NaN")))
        assert main(arguments) == 1
    assert main(arguments) == 0
    assert len(seen) == 2
    assert not list((cache_folder() / "calibrate").iterdir())


def test_every_scan_is_hashed_once(copy: Path, scans: Path, monkeypatch: pytest.MonkeyPatch):
    hashed = []
    digest = module.sha256_scan
    monkeypatch.setattr(module, "sha256_scan", lambda path: (hashed.append(path), digest(path))[1])
    assert main([*CALIBRATE, str(copy), "--data", str(scans), "--samples", "3", "--precision", "int8"]) == 0
    assert len(hashed) == 3


def test_unreadable_scans_are_replaced(copy: Path, scans: Path, tmp_path: Path, capsys):
    folder = Path(shutil.copytree(scans, tmp_path / "scans"))
    (folder / "a.nii.gz").write_bytes(b"no gzip")
    assert main([*CALIBRATE, str(copy), "--data", str(folder), "--samples", "3", "--precision", "int8"]) == 0
    assert "left out: " in capsys.readouterr().err
    assert open_bundle(copy).manifest.conversions[0].scans == 3
    refuse(capsys, "only 3 of the 4 scans can be read, but 4 were asked for; pass --samples 3",
           "calibrate", copy, "--data", folder, "--samples", 4)


def test_refusals(copy: Path, scans: Path, tmp_path: Path, capsys, calibrated: Path):
    refuse(capsys, "nothing was observed of it yet; `dcformer calibrate", "calibrate", copy)
    refuse(capsys, "4 scans, but 64 were asked for; pass --samples 4", "calibrate", copy, "--data", scans)
    refuse(capsys, "no .nii, .nii.gz or DICOM volume below it", "calibrate", copy, "--data", copy)
    refuse(capsys, "no such folder", "calibrate", copy, "--data", tmp_path / "none")
    refuse(capsys, "method 'entrop': unknown; did you mean 'entropy'", "calibrate", copy, "--data", scans, "--method",
           "entrop")
    refuse(capsys, "--depthwise 'yes': expected one of measure, always, never", "calibrate", copy, "--depthwise", "yes")
    refuse(capsys, "--precision 'int4': expected some of fp16, bf16, int8", "calibrate", copy, "--precision", "int4")
    (tmp_path / "c.json").write_text("{}")
    refuse(capsys, "c.json: not a calibration cache", "calibrate", copy, "--cache", tmp_path / "c.json")
    other = json.loads((calibrated / "calibration.json").read_text())
    other["model"] = "0" * 64
    (tmp_path / "o.json").write_text(json.dumps(other))
    refuse(capsys, "o.json: made for another model (000000000000", "calibrate", copy, "--cache", tmp_path / "o.json")
    name = next(iter(other["activations"]))
    other["model"] = json.loads((calibrated / "calibration.json").read_text())["model"]
    other["activations"][name]["finite"] = False
    (tmp_path / "n.json").write_text(json.dumps(other))
    refuse(capsys, "holds NaN or infinite values on the calibration scans", "calibrate", copy, "--cache",
           tmp_path / "n.json", "--precision", "int8")
    refuse(capsys, f"no image tower in int8 for onnxruntime; `dcformer calibrate {copy} --data DIR --precision int8` "
           "adds it", "embed", copy, scans / "a.nii.gz", "--out", tmp_path / "e.npz", "--precision", "int8")
    refuse(capsys, "bf16 runs on GPUs, after `dcformer calibrate --precision bf16` and `dcformer build`, and in open",
           "embed", copy, scans / "a.nii.gz", "--out", tmp_path / "e.npz", "--precision", "bf16")
    for option, value in (("--samples", 2), ("--split", "valid"), ("--slope", 2)):
        refuse(capsys, f"{option}: only with --data", "calibrate", copy, "--cache", tmp_path / "n.json", option, value)
    assert open_bundle(copy).manifest.conversions == ()


def test_what_cannot_be_written_is_said_first(copy: Path, scans: Path, tmp_path: Path, capsys,
                                              monkeypatch: pytest.MonkeyPatch):
    """Before anything is observed: bundles on read-only disks, a cache that is a folder."""
    monkeypatch.setattr(module, "observe", lambda *_: pytest.fail("too late"))
    refuse(capsys, "found a folder", "calibrate", copy, "--data", scans, "--samples", 2, "--cache", tmp_path)
    make = tempfile.mkdtemp

    def read_only(*arguments: object, dir: Path, **options: object) -> str:
        if copy in (dir, *dir.parents):
            raise OSError(errno.EROFS, "Read-only file system")
        return make(*arguments, dir=dir, **options)

    monkeypatch.setattr(tempfile, "mkdtemp", read_only)
    refuse(capsys, "cannot write here (Read-only file system)", "calibrate", copy, "--data", scans, "--samples", 2)
    refuse(capsys, "cannot write here (Read-only file system)", "build", copy, "--precision", "fp32")


def test_digest_of_a_model_is_that_of_its_weights(copy: Path):
    first = model_digest(module.image_graph(open_bundle(copy))[1])
    proto = onnx.load(copy / "image.fp32.onnx")
    proto.graph.initializer[0].raw_data = b"\1" * len(proto.graph.initializer[0].raw_data)
    assert first != model_digest(proto)

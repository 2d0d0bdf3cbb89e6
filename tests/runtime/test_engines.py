"""Records of engines: what may be loaded where, and what is refused with which command."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from dcformer_deploy.runtime.bundle import Bundle, open_bundle, record_file, write_manifest
from dcformer_deploy.runtime.engines import (
    EngineRecord,
    EngineTensor,
    Gpu,
    Layer,
    Shapes,
    engine_records,
    find_engine,
    read_engine,
    read_record,
    require_fitting,
    runs_on,
)
from dcformer_deploy.runtime.errors import BundleError, EngineRefused
from dcformer_deploy.runtime.files import sha256_file

H100, L4 = Gpu("NVIDIA H100", "9.0", 80 << 30), Gpu("NVIDIA L4", "8.9", 24 << 30)
NAME = "image.fp32.tensorrt.sm90.engine"


def _record(folder: Path, **changes: object) -> EngineRecord:
    graph = "image.fp32.onnx"
    shapes = Shapes((1, 1, 64, 32, 32), (1, 1, 64, 32, 32), (8, 1, 64, 32, 32))
    record = EngineRecord(
        1, NAME, sha256_file(folder / NAME), 9, "image", "fp32", graph, sha256_file(folder / graph),
        "image.fp32.weights", sha256_file(folder / "image.fp32.weights"), "tensorrt", "10.13.2.6", ("9.0",),
        H100.name, False, ({"lines_d": shapes},), {}, (EngineTensor("lines_d", True, "float32", (-1, 1, 64, 32, 32)),),
        (Layer("convolution", 3),), 1, 2.0, "2026-11-25T00:00:00Z", "here")
    return dataclasses.replace(record, **changes)


def _bundle(source: Path, out: Path, **changes: object) -> Bundle:
    """The bundle with an engine of nine bytes."""
    shutil.copytree(source, out)
    (out / NAME).write_bytes(b"an engine")
    (out / f"{NAME}.json").write_text(_record(out, **changes).to_json())
    old = open_bundle(out).manifest
    files = (*old.files, record_file(out, NAME), record_file(out, f"{NAME}.json"))
    write_manifest(out, dataclasses.replace(old, files=files))
    return open_bundle(out)


def test_a_record_survives_its_file(pristine_bundle: Path, tmp_path: Path):
    bundle = _bundle(pristine_bundle, tmp_path / "b")
    assert engine_records(bundle) == [_record(tmp_path / "b")]
    fused = {"engine_layers": (Layer("gemm", 3), Layer("kgen", 1))}
    assert engine_records(_bundle(pristine_bundle, tmp_path / "c", **fused)) == [_record(tmp_path / "c", **fused)]


def test_records_from_before_engine_layers_are_read(pristine_bundle: Path, tmp_path: Path):
    bundle = _bundle(pristine_bundle, tmp_path / "b")
    content = json.loads((bundle.folder / f"{NAME}.json").read_text())
    del content["engine_layers"]
    (tmp_path / "r.json").write_text(json.dumps(content))
    assert read_record(tmp_path / "r.json") == _record(bundle.folder)


@pytest.mark.parametrize(("targets", "gpu", "expected"), [
    (("9.0",), H100, True), (("9.0",), L4, False), (("8.0+",), H100, True), (("8.0+",), L4, True),
    (("9.0+",), L4, False), (("8.9", "12.0"), L4, True), (("8.9", "12.0"), H100, False),
    (("10.0",), Gpu("", "10.0", 0), True), (("8.0+",), Gpu("", "12.0", 0), True),
    (("8.0+",), Gpu("", "7.5", 0), False)])
def test_where_an_engine_runs(targets: tuple[str, ...], gpu: Gpu, expected: bool):
    assert runs_on(targets, gpu) is expected


def test_what_fits_is_loaded(pristine_bundle: Path, tmp_path: Path):
    bundle = _bundle(pristine_bundle, tmp_path / "b")
    record = find_engine(bundle, "image", "fp32", "tensorrt", H100)
    require_fitting(bundle, record, "10.13.2.6", H100)
    assert read_engine(bundle, record) == b"an engine"


@pytest.mark.parametrize(("changes", "version", "gpu", "message"), [
    ({"onnx_sha256": "0" * 64}, "10.13.2.6", H100, "built from another image.fp32.onnx than is there now; run: "),
    ({"weights_sha256": "0" * 64}, "10.13.2.6", H100, "built from another image.fp32.weights than is there now"),
    ({}, "10.14.1", H100, "built by tensorrt 10.13.2.6, here is 10.14.1; run: dcformer build .*--precision fp32 "
     "--engine-library tensorrt, or install tensorrt 10.13.2.6"),
    ({"version_compatible": True}, "10.12.0", H100, "built by tensorrt 10.13.2.6, here is 10.12.0"),
    ({}, "11.0.0", H100, "built by tensorrt 10.13.2.6, here is 11.0.0"),
    ({"version_compatible": True}, "12.0.0", H100, "built by tensorrt 10.13.2.6, here is 12.0.0"),
    ({"version_compatible": True, "version": "11.0.0"}, "10.13.2", H100, "built by tensorrt 11.0.0, here is 10.13.2"),
    ({"version_compatible": True, "version": "11.4.1"}, "12.0.0", H100, "built by tensorrt 11.4.1, here is 12.0.0"),
    ({"version_compatible": True, "version": "8.6.1"}, "11.0.0", H100, "built by tensorrt 8.6.1, here is 11.0.0"),
    ({}, "10.13.2.6", L4, "built for compute capability 9.0, this NVIDIA L4 has 8.9; run on this machine: dcformer "),
])
def test_what_does_not_fit_is_refused(pristine_bundle: Path, tmp_path: Path, changes: dict[str, object], version: str,
                                      gpu: Gpu, message: str):
    bundle = _bundle(pristine_bundle, tmp_path / "b", **changes)
    with pytest.raises(EngineRefused, match=message):
        require_fitting(bundle, engine_records(bundle)[0], version, gpu)


def test_version_compatible_engines_load_later(pristine_bundle: Path, tmp_path: Path):
    bundle = _bundle(pristine_bundle, tmp_path / "b", version_compatible=True)
    record = engine_records(bundle)[0]
    for version in ("10.14.0", "11.0.0", "11.4.1"):
        require_fitting(bundle, record, version, H100)
    require_fitting(bundle, dataclasses.replace(record, version="11.0.0"), "11.1.0", H100)


def test_other_bytes(pristine_bundle: Path, tmp_path: Path):
    """Also where the manifest agrees with the file: the record is what was built."""
    bundle = _bundle(pristine_bundle, tmp_path / "b", sha256="0" * 64)
    with pytest.raises(EngineRefused, match="not the bytes that were built; copy the bundle again, or run: dcformer"):
        read_engine(bundle, engine_records(bundle)[0])
    changed = _bundle(pristine_bundle, tmp_path / "c")
    (tmp_path / "c" / NAME).write_bytes(b"an evil 1")
    with pytest.raises(EngineRefused, match="not the bytes that were built"):
        read_engine(changed, engine_records(changed)[0])
    (tmp_path / "c" / NAME).unlink()
    with pytest.raises(EngineRefused, match="cannot be read .*; run: dcformer build"):
        read_engine(changed, engine_records(changed)[0])


def test_none_was_built(pristine_bundle: Path):
    with pytest.raises(EngineRefused, match="no tensorrt engine of the image tower in fp16; run: dcformer build "):
        find_engine(open_bundle(pristine_bundle), "image", "fp16", "tensorrt", H100)


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"schema_version": 2}', "\x00", '{"schema_version": 1, "engine": 3}'])
def test_what_is_no_record(tmp_path: Path, text: str):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(BundleError, match="r.json: not an engine record.*build the engine again"):
        read_record(tmp_path / "r.json")


def test_unknown_fields_are_refused(pristine_bundle: Path, tmp_path: Path):
    bundle = _bundle(pristine_bundle, tmp_path / "b")
    content = json.loads((bundle.folder / f"{NAME}.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps({**content, "more": 1}))
    with pytest.raises(BundleError, match="not an engine record"):
        read_record(tmp_path / "r.json")

"""Bundles: the manifest's round trip, and refusing what is damaged, truncated, newer or edited."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dcformer_deploy.runtime import BundleError, InputError, Manifest, load
from dcformer_deploy.runtime.bundle import check_file, open_bundle, write_manifest
from dcformer_deploy.runtime.manifest import DIGEST_FIELD, SCHEMA_VERSION, FileRecord, Preprocessing, _digest


def rewrite(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the manifest the way a new version of this program might write it: with a digest that fits."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content.pop(DIGEST_FIELD)
    change(content)
    path.write_text(json.dumps({**content, DIGEST_FIELD: _digest(content)}))


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(BundleError, match=message) as error:
        open_bundle(folder)
    assert str(folder) in str(error.value)


def test_round_trip(pristine_bundle: Path):
    manifest = open_bundle(pristine_bundle).manifest
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert dataclasses.is_dataclass(manifest)
    with pytest.raises(dataclasses.FrozenInstanceError):
        manifest.input_size = 1  # type: ignore[misc]


def test_what_the_manifest_says(pristine_bundle: Path):
    manifest = open_bundle(pristine_bundle).manifest
    assert (manifest.encoder, manifest.input_size, manifest.reduction) == ("dcformer-nano", 128, "channel")
    assert manifest.preprocessing == Preprocessing(shape_dhw=(64, 128, 128))
    assert manifest.zero_shot is not None
    assert manifest.zero_shot.similarity_scale == pytest.approx(2.718281828459045)
    assert manifest.zero_shot.prompts("Lung nodule") == ("Lung nodule is present.", "Lung nodule is not present.")
    assert len(manifest.zero_shot.classes) == 18
    assert {path.name for path in pristine_bundle.iterdir()} == {f.path for f in manifest.files} | {"manifest.json"}
    assert manifest.tools["torch"].startswith("2.")


def test_edited_manifest(bundle_copy: Path):
    path = bundle_copy / "manifest.json"
    path.write_text(path.read_text().replace("Cardiomegaly", "Cardiomegalie"))
    refuse(bundle_copy, "manifest_sha256 does not match the content: the manifest was edited")


def test_reformatted_manifest_is_the_same(bundle_copy: Path):
    path = bundle_copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    open_bundle(bundle_copy)


@pytest.mark.parametrize("length", [0, 1, 100, 3000])
def test_truncated_manifest(bundle_copy: Path, length: int):
    path = bundle_copy / "manifest.json"
    path.write_text(path.read_text()[:length])
    refuse(bundle_copy, "not valid JSON")


def test_number_out_of_range(bundle_copy: Path):
    path = bundle_copy / "manifest.json"
    path.write_text(path.read_text().replace('"scale_hu": 600.0', '"scale_hu": 1e999'))
    refuse(bundle_copy, "a number in it is out of range")


def test_manifest_that_contradicts_the_graph(bundle_copy: Path):
    rewrite(bundle_copy, lambda m: m["preprocessing"].update(shape_dhw=[64, 128, 64]))
    refuse(bundle_copy, r"input_size is 128; expected the size of \(64, 128, 64\)")
    rewrite(bundle_copy, lambda m: (m["preprocessing"].update(shape_dhw=[128, 256, 256]), m.update(input_size=256)))
    refuse(bundle_copy, "shape_dhw is .* expected the sides that the image tower reads")


def test_detector_without_its_output(bundle_copy: Path):
    rewrite(bundle_copy, lambda m: m.update(detector={"classes": ["A"]}))
    refuse(bundle_copy, "detector.classes is 1; expected as many as the image tower's class_scores")


@pytest.mark.parametrize("content", ["[]", "{}", '"text"', '{"schema_version": "1"}', "[" * 100_000])
def test_other_json(bundle_copy: Path, content: str):
    (bundle_copy / "manifest.json").write_text(content)
    refuse(bundle_copy, "no schema_version|not valid JSON")


def test_binary_manifest(bundle_copy: Path):
    (bundle_copy / "manifest.json").write_bytes(b"\xff\xfe\x00")
    refuse(bundle_copy, "not UTF-8")


@pytest.mark.parametrize(("version", "advice"), [
    (SCHEMA_VERSION + 1, "upgrade dcformer-deploy"), (0, "export the checkpoint again")])
def test_other_schema(bundle_copy: Path, version: int, advice: str):
    rewrite(bundle_copy, lambda m: m.update(schema_version=version))
    refuse(bundle_copy, f"schema_version is {version}, this program reads {SCHEMA_VERSION}; {advice}")


@pytest.mark.parametrize(("change", "message"), [
    (lambda m: m.update(colour="blue"), "colour"),
    (lambda m: m["preprocessing"].update(hu=1), "hu"),
    (lambda m: m.pop("reduction"), "reduction"),
    (lambda m: m.update(reduction="width"), "reduction"),
    (lambda m: m.update(input_size="128"), "input_size"),
    (lambda m: m["graphs"][0]["inputs"].pop(), "expected the sides that the image tower reads"),
    (lambda m: m["graphs"][0]["inputs"][1]["axes"].__setitem__(2, 32), "expected the sides that the image tower reads"),
    (lambda m: m.update(encoder=None), "encoder"),
    (lambda m: m["preprocessing"].update(shape_dhw=[64, 128]), "shape_dhw"),
    (lambda m: m["preprocessing"].update(shape_dhw=[64, 128, -128]), "shape_dhw is .* expected positive sides"),
    (lambda m: m["preprocessing"].update(orientation="LPX"), "orientation is 'LPX'"),
    (lambda m: m["preprocessing"].update(scale_hu=0.0), "scale_hu is 0.0; expected a positive number"),
    (lambda m: m["preprocessing"].update(window_hu=[200.0, -1000.0]), "window_hu .* expected low < high"),
    (lambda m: m["zero_shot"].update(score="magic"), "zero_shot.score is 'magic'"),
    (lambda m: m["zero_shot"].update(positive_prompt="present"), "positive_prompt is 'present'; expected one {}"),
    (lambda m: m["zero_shot"].update(negative_prompt="{} {}"), "negative_prompt is '{} {}'; expected one {}"),
    (lambda m: m["zero_shot"].update(negative_prompt=None), "negative_prompt is None; expected a prompt or null"),
    (lambda m: m["zero_shot"].update(score="sigmoid"), "negative_prompt is .* expected a prompt or null, as sigmoid"),
    (lambda m: m["preprocessing"].update(resampling="wide"), "resampling is .wide.; expected one of to_spacing"),
    (lambda m: m["preprocessing"].update(intensity="hu"), "intensity is 'hu'; expected one of window, min_max"),
    (lambda m: m["zero_shot"].update(classes=["A", "A"]), "zero_shot.classes"),
    (lambda m: m["graphs"][0].update(role="audio"), "graphs.role is 'audio'"),
    (lambda m: m["graphs"][0].update(file="other.onnx"), "every named file listed"),
    (lambda m: m["files"][0].update(sha256="12"), "files.sha256 is '12'"),
    (lambda m: m["files"][0].update(path="../image.onnx"), "files.path .* expected a relative path inside the bundle"),
    (lambda m: m["files"][0].update(path="/etc/passwd"), "files.path"),
    (lambda m: m["files"][0].update(path="..\\image.onnx"), "files.path"),
])
def test_wrong_fields_are_named(bundle_copy: Path, change, message: str):
    rewrite(bundle_copy, change)
    refuse(bundle_copy, message)


def test_damaged_graph(bundle_copy: Path):
    path = bundle_copy / "image.fp32.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refuse(bundle_copy, "image.fp32.onnx: sha256 is .* the manifest says .* damaged or edited")
    assert load(bundle_copy, verify=False).manifest.encoder == "dcformer-nano"


@pytest.mark.parametrize("name", ["image.fp32.onnx", "image.fp32.weights", "text.fp32.onnx", "tokenizer.json",
                                  "prompt_embeddings.fp32.npy"])
def test_truncated_and_missing_files(bundle_copy: Path, name: str):
    path = bundle_copy / name
    path.write_bytes(path.read_bytes()[:-1])
    refuse(bundle_copy, re.escape(name) + ": .* bytes, the manifest says .* truncated or edited")
    path.unlink()
    refuse(bundle_copy, re.escape(name) + ": missing; the bundle is incomplete")


def test_what_makes_a_damaged_graph_again(bundle_copy: Path):
    """Not `calibrate` alone, which wants a bundle that is intact."""
    (bundle_copy / "image.fp16.onnx").write_bytes(b"")
    for name, again in (("image.fp16.onnx", "export and calibrate"), ("image.fp32.onnx", "export")):
        with pytest.raises(BundleError, match=f"Copy it again or {again} it again"):
            check_file(bundle_copy, FileRecord(name, "0" * 64, 1))


def test_link_out_of_the_bundle(bundle_copy: Path):
    inside = bundle_copy / "image.fp32.onnx"
    outside = bundle_copy.parent / "elsewhere.onnx"
    inside.rename(outside)
    inside.symlink_to(outside)
    refuse(bundle_copy, "a link that leaves the bundle")


def test_not_a_bundle(tmp_path: Path):
    refuse(tmp_path, "no manifest.json; not a bundle")
    (tmp_path / "file").write_text("x")
    refuse(tmp_path / "file", "a bundle is a folder")
    with pytest.raises(InputError, match="no such bundle"):
        open_bundle(tmp_path / "none")


def test_written_manifest_is_read_back(pristine_bundle: Path, tmp_path: Path):
    manifest = open_bundle(pristine_bundle).manifest
    write_manifest(tmp_path, manifest)
    assert Manifest.from_json((tmp_path / "manifest.json").read_text()) == manifest

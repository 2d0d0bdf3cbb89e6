"""Export: the golden numbers through ONNX Runtime, the checker, reproducibility, and failing when something differs."""

import argparse
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from conftest import GOLDEN_TOLERANCE
from dcformer_deploy.export import make_bundle, write_graphs
from dcformer_deploy.export.make_bundle import ExportOptions, export_checkpoint
from dcformer_deploy.runtime import BundleError, CheckFailed, InputError, backends, load
from dcformer_deploy.runtime.manifest import Preprocessing
from dcformer_deploy.runtime.provenance import Timing
from golden import CASES, NANO, REPOSITORY, Case, inputs, relative_error


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden_outputs_through_onnx_runtime(case: Case, tokenizer_folder: Path, tmp_path: Path):
    out = tmp_path / "bundle"
    manifest = export_checkpoint(case.save(tmp_path / "c.pth"), out, ExportOptions(tokenizer=tokenizer_folder))
    model, expected = load(out), case.expected
    image, ids, mask = inputs()
    outputs = model.image_outputs(image[:, 0])
    np.testing.assert_array_equal(outputs["codes"], expected["codes"])
    assert relative_error(outputs["feature_map"], expected["feature_map"]) < GOLDEN_TOLERANCE
    images = model.embed_images(list(image[:, 0]))
    assert relative_error(images, expected["image_embedding"]) < GOLDEN_TOLERANCE
    texts = model.embed_tokens(ids, mask)
    assert relative_error(texts, expected["text_embedding"]) < GOLDEN_TOLERANCE
    assert manifest.zero_shot is not None
    logits = images @ texts.T * manifest.zero_shot.similarity_scale
    assert relative_error(logits, expected["logits"]) < GOLDEN_TOLERANCE


def test_graphs_are_valid_and_their_axes_are_named(pristine_bundle: Path):
    lines = [["batch", 1, 64, 32, 32], ["batch", 1, 16, 128, 32], ["batch", 1, 16, 32, 128]]
    expected = {"image.fp32.onnx": lines, "text.fp32.onnx": [["batch", "sequence"]] * 2}
    for name, axes in expected.items():
        onnx.checker.check_model(pristine_bundle / name, full_check=True)
        graph = onnx.load(pristine_bundle / name).graph
        assert [[d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input] == axes


def test_each_back_end_runs_the_graph_made_for_it(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of rules that are measured, ONNX Runtime keeps the first here, OpenVINO none."""
    def compare(self, before, after, sides=None):
        grows = not sides and len(after.graph.node) > 2 * len(before.graph.node)
        return Timing(2.0, 1.0 if grows and self._options.backend == "onnxruntime" else 3.0, "here")

    monkeypatch.setattr(write_graphs.Stopwatch, "compare", compare)
    options = ExportOptions(tokenizer=None, targets=("onnxruntime", "openvino", "any"))
    manifest = export_checkpoint(checkpoint, tmp_path / "bundle", options)
    assert [(g.file, g.target) for g in manifest.graphs] == [
        ("image.fp32.onnx", "any"), ("image.fp32.onnxruntime.onnx", "onnxruntime"), ("text.fp32.onnx", "any")]
    assert [(r.rule, r.target, r.matched > 0) for r in manifest.rewrites if r.measured] == [
        ("stream_planes", "onnxruntime", True), ("flatten_convolutions", "onnxruntime", False),
        ("stream_planes", "openvino", False), ("flatten_convolutions", "openvino", False)]
    assert len({a.graph for a in manifest.agreement}) == 3
    opened = []
    monkeypatch.setattr(backends, "open_graph", lambda path, options: opened.append(path.name) or FakeBackend())
    for backend in ("onnxruntime", "openvino"):
        load(tmp_path / "bundle", backend=backend).describe()
    assert opened == ["image.fp32.onnxruntime.onnx", "image.fp32.onnx"]


class FakeBackend:
    def describe(self) -> str:
        return "fake"


def test_no_paths_of_this_machine_in_the_graphs(pristine_bundle: Path):
    for path in pristine_bundle.glob("*.onnx"):
        assert str(REPOSITORY).encode() not in path.read_bytes()
        assert b"site-packages" not in path.read_bytes()


def test_spacing_of_the_checkpoint_reaches_the_manifest(tokenizer_folder: Path, tmp_path: Path):
    arguments = argparse.Namespace(**{**vars(NANO.arguments()), "spacing_hwd_mm": [3.0, 3.0, 4.5]})
    torch.save({"model": NANO.state_dict(), "args": arguments}, tmp_path / "c.pth")
    manifest = export_checkpoint(tmp_path / "c.pth", tmp_path / "bundle", ExportOptions(tokenizer=tokenizer_folder))
    assert manifest.preprocessing == Preprocessing((64, 128, 128), spacing_hwd_mm=(3.0, 3.0, 4.5))
    assert load(tmp_path / "bundle").manifest.preprocessing.spacing_hwd_mm == (3.0, 3.0, 4.5)


def test_agreement_is_recorded_for_real_and_random_input(pristine_bundle: Path):
    manifest = load(pristine_bundle).manifest
    assert {(a.output, a.input) for a in manifest.agreement} == {
        ("feature_map", "real"), ("feature_map", "random"), ("image_embedding", "real"), ("image_embedding", "random"),
        ("text_embedding", "prompts"), ("text_embedding", "random")}
    assert all(0 < a.max_relative_error < 1e-5 and a.cosine > 0.999999 for a in manifest.agreement)


@pytest.mark.usefixtures("traced_anew")
def test_same_checkpoint_gives_the_same_files(checkpoint: Path, tokenizer_folder: Path, tmp_path: Path):
    """But for graphs of single targets, which depend on what was measured while others used the machine."""
    files = [export_checkpoint(checkpoint, tmp_path / name, ExportOptions(tokenizer=tokenizer_folder, targets=())).files
             for name in ("first", "again")]
    assert files[0] == files[1]
    assert {file.path for file in files[0]} >= {"image.fp32.onnx", "text.fp32.onnx", "tokenizer.json"}


def test_nothing_is_written_when_the_graph_differs(checkpoint: Path, tokenizer_folder: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch):
    """Change one weight between tracing and comparing: the comparison must see it."""
    trace = make_bundle.trace_text_tower

    def trace_then_change(clip, spec):
        graph = trace(clip, spec)
        with torch.no_grad():
            clip.to_text_latent.weight[0] *= 1.01
        return graph

    monkeypatch.setattr(make_bundle, "trace_text_tower", trace_then_change)
    with pytest.raises(CheckFailed, match=r"differs from PyTorch: text_embedding on random .* \(cosine"):
        export_checkpoint(checkpoint, tmp_path / "out" / "bundle", ExportOptions(tokenizer=tokenizer_folder))
    assert list(tmp_path.iterdir()) == []


def test_codes_that_differ_without_a_tie_fail(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trace = make_bundle.trace_image_tower

    def trace_then_change(model, spec):
        graph = trace(model, spec)
        codebook = model.visual_transformer.vq.codebook.embed
        codebook.copy_(codebook.roll(1, dims=1))
        return graph

    monkeypatch.setattr(make_bundle, "trace_image_tower", trace_then_change)
    with pytest.raises(CheckFailed, match="VQ codes differ from PyTorch"):
        export_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions(tokenizer=None))
    assert list(tmp_path.iterdir()) == []


def test_existing_bundle_is_replaced_only_on_request(checkpoint: Path, tokenizer_folder: Path, bundle_copy: Path):
    before = (bundle_copy / "manifest.json").read_text()
    with pytest.raises(InputError, match="exists already"):
        export_checkpoint(checkpoint, bundle_copy, ExportOptions(tokenizer=tokenizer_folder))
    assert (bundle_copy / "manifest.json").read_text() == before
    export_checkpoint(checkpoint, bundle_copy, ExportOptions(None, overwrite=True))
    assert load(bundle_copy).manifest.text is None
    assert [p.name for p in bundle_copy.parent.iterdir()] == ["bundle"]


def test_bundle_without_tokenizer_embeds_token_ids_only(checkpoint: Path, ct: Path, tmp_path: Path):
    export_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions(tokenizer=None))
    model = load(tmp_path / "bundle")
    _, ids, mask = inputs()
    assert relative_error(model.embed_tokens(ids, mask), NANO.expected["text_embedding"]) < GOLDEN_TOLERANCE
    for call in (lambda: model.embed_text(["x"]), lambda: model.zero_shot(ct), lambda: model.classify(ct)):
        with pytest.raises(BundleError):
            call()


def test_detector(ct: Path, tokenizer_folder: Path, tmp_path: Path):
    tensors = {f"trained_model.{key}": value for key, value in NANO.state_dict().items()}
    torch.manual_seed(5)
    tensors["classifier.weight"], tensors["classifier.bias"] = torch.randn(18, 512), torch.randn(18)
    torch.save({"model": tensors, "args": NANO.arguments()}, tmp_path / "c.pth")
    export_checkpoint(tmp_path / "c.pth", tmp_path / "bundle", ExportOptions(tokenizer=tokenizer_folder))
    model = load(tmp_path / "bundle")
    image, *_ = inputs()
    embedding = torch.from_numpy(NANO.expected["image_embedding"])
    expected = torch.sigmoid(torch.relu(embedding) @ tensors["classifier.weight"].t() + tensors["classifier.bias"])
    found = list(model.classify(image[1, 0]).scores.values())
    np.testing.assert_allclose(found, expected[1].numpy(), rtol=1e-5)
    assert list(model.classify(ct).scores) == list(model.zero_shot(ct).scores)


def test_detector_with_other_classes_needs_their_names(tmp_path: Path):
    tensors = {f"trained_model.{key}": value for key, value in NANO.state_dict().items()}
    tensors["classifier.weight"], tensors["classifier.bias"] = torch.zeros(2, 512), torch.zeros(2)
    torch.save({"model": tensors, "args": NANO.arguments()}, tmp_path / "c.pth")
    with pytest.raises(InputError, match="2 outputs but 18 class names are given; pass --classes"):
        export_checkpoint(tmp_path / "c.pth", tmp_path / "bundle", ExportOptions(tokenizer=None))
    manifest = export_checkpoint(tmp_path / "c.pth", tmp_path / "bundle", ExportOptions(None, classes=["A", "B"]))
    assert manifest.detector is not None and manifest.detector.classes == ("A", "B")


def test_manifest_names_the_checkpoint(pristine_bundle: Path, checkpoint: Path):
    import hashlib

    content = json.loads((pristine_bundle / "manifest.json").read_text())
    assert content["source"]["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert content["source"]["trained"] is True


def test_fused_attention_is_compared_with_pytorch(checkpoint: Path, tokenizer_folder: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch):
    """On texts of several lengths, so that the mask of the padding counts; kept only where it is faster."""
    seen = []

    def compare(self, before, after, sides=None):
        seen.append(sides)
        return Timing(2.0, 1.0 if sides else 3.0, "here")

    monkeypatch.setattr(write_graphs.Stopwatch, "compare", compare)
    manifest = export_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions(tokenizer=tokenizer_folder))
    assert seen[-1] == {"batch": 36, "sequence": 12}
    assert [g.file for g in manifest.graphs] == ["image.fp32.onnx", "text.fp32.onnx", "text.fp32.onnxruntime.onnx"]
    fused = onnx.load(tmp_path / "bundle" / "text.fp32.onnxruntime.onnx").graph
    plain = onnx.load(tmp_path / "bundle" / "text.fp32.onnx").graph
    layers = [node.op_type for node in plain.node].count("Softmax")
    assert [node.op_type for node in fused.node].count("MultiHeadAttention") == layers > 0
    assert not any(node.op_type == "Softmax" for node in fused.node)
    found = [a for a in manifest.agreement if a.graph == "text.fp32.onnxruntime.onnx"]
    assert {a.input for a in found} == {"random", "prompts"}
    assert all(a.max_relative_error < 1e-5 for a in found)
    _, ids, mask = inputs()
    texts = load(tmp_path / "bundle").embed_tokens(ids, mask)
    assert relative_error(texts, NANO.expected["text_embedding"]) < GOLDEN_TOLERANCE

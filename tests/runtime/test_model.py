"""The model object: same answer by every route, scores by hand, and inputs it must refuse."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import GOLDEN_TOLERANCE
from dcformer_deploy.runtime import BundleError, DeviceUnavailable, InferenceError, InputError, Model, load
from dcformer_deploy.runtime import model as model_module
from dcformer_deploy.runtime.text import TruncationWarning
from golden import NANO, inputs, relative_error
from scans import write


def test_file_and_preprocessed_array_give_the_same_embedding(model: Model, ct: Path):
    volume = model.preprocess(ct)
    assert (volume.shape, volume.dtype) == ((64, 128, 128), np.float32)
    embedding = model.embed_image(ct)
    assert (embedding.shape, embedding.dtype) == ((512,), np.float32)
    np.testing.assert_array_equal(model.embed_image(volume), embedding)
    np.testing.assert_array_equal(model.embed_image(str(ct)), embedding)
    assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-6)


def test_list_of_scans_equals_single_scans(model: Model, ct: Path):
    image, *_ = inputs()
    scans = [ct, image[0, 0], image[1, 0]]
    np.testing.assert_array_equal(model.embed_images(scans), np.stack([model.embed_image(scan) for scan in scans]))
    np.testing.assert_array_equal(model.embed_images(np.array([str(ct)])), [model.embed_image(ct)])


def test_prepared_scans(model: Model, ct: Path):
    prepared = model.prepare(ct)
    assert prepared.volume == str(ct)
    np.testing.assert_array_equal(model.embed_image(prepared), model.embed_image(ct))
    assert model.zero_shot(prepared).scores == model.zero_shot(ct).scores
    with pytest.raises(InputError, match="slope: only for files"):
        model.embed_image(prepared, slope=2)


def test_batch_equals_single_volumes(model: Model):
    image, *_ = inputs()
    batch = model.image_outputs(image[:, 0])["image_embedding"]
    single = np.concatenate([model.image_outputs(volume)["image_embedding"] for volume in image])
    np.testing.assert_allclose(batch, single, atol=1e-6)


def test_read_options_reach_the_reader(model: Model, hounsfield: np.ndarray, tmp_path: Path):
    blank = write(tmp_path / "blank.nii.gz", hounsfield, np.eye(4))
    with pytest.raises(InputError, match="blank header"):
        model.embed_image(blank)
    found = model.preprocess(blank, spacing=(2.0, 2.5, 3.0))
    assert not np.array_equal(found, model.preprocess(blank, spacing=(2.0, 2.0, 3.0)))
    assert not np.array_equal(found, model.preprocess(blank, spacing=(2.0, 2.5, 3.0), intercept=50))
    real = write(tmp_path / "real.nii.gz", hounsfield, np.diag([2.0, 2.5, 3.0, 1.0]))
    np.testing.assert_array_equal(model.preprocess(real, orientation="as-stored"), found)
    flipped = write(tmp_path / "lps.nii.gz", hounsfield[::-1, ::-1], np.diag([2.0, 2.5, 3.0, 1.0]))
    np.testing.assert_array_equal(model.preprocess(flipped), found)


def test_zero_shot_is_the_softmax_over_each_pair(model: Model, ct: Path):
    result = model.zero_shot(ct)
    image = torch.from_numpy(model.embed_image(ct))
    assert model.manifest.zero_shot is not None
    for name in model.manifest.zero_shot.classes:
        texts = torch.from_numpy(model.embed_text([f"{name} is present.", f"{name} is not present."]))
        expected = torch.softmax(texts @ image * torch.e, dim=0)[0].item()
        assert result.scores[name] == pytest.approx(expected, abs=1e-6)
    assert result.volume == str(ct)
    assert {"read", "preprocess", "image", "total"} <= result.timings_ms.keys()
    assert result.timings_ms["total"] >= result.timings_ms["image"] > 0


def test_zero_shot_with_other_classes(model: Model, ct: Path):
    usual = model.zero_shot(ct).scores
    other = model.zero_shot(ct, classes=["Lung nodule", "Left-sided heart"]).scores
    assert list(other) == ["Lung nodule", "Left-sided heart"]
    assert other["Lung nodule"] == pytest.approx(usual["Lung nodule"], abs=1e-6)
    for classes in ([], ["A", "A"]):
        with pytest.raises(InputError, match="classes"):
            model.zero_shot(ct, classes=classes)


def test_text_embedding_does_not_depend_on_its_neighbours(model: Model):
    texts = ["Emphysema is present.", "Coronary artery wall calcification is not present.", ""]
    together = model.embed_text(texts)
    assert together.shape == (3, 512)
    for text, row in zip(texts, together, strict=True):
        np.testing.assert_allclose(model.embed_text([text])[0], row, atol=1e-6)
    np.testing.assert_allclose(model.embed_text(texts[0])[0], together[0], atol=1e-6)


def test_many_long_texts_take_turns(model: Model, monkeypatch: pytest.MonkeyPatch):
    texts = [f"Nodule {'effusion ' * (40 * n)}." for n in range(1, 8)]
    whole = model.embed_text(texts)
    monkeypatch.setattr(model_module, "_TOKENS_AT_ONCE", 700)
    sizes = []
    graph = model._graph("text")
    run = graph.run
    monkeypatch.setattr(graph, "run", lambda feeds, names: sizes.append(feeds["input_ids"].shape) or run(feeds, names))
    np.testing.assert_allclose(model.embed_text(texts), whole, atol=2e-6)
    assert sum(count for count, _ in sizes) == 7
    assert max(count * length for count, length in sizes) <= 700


def test_tokens(model: Model):
    _, ids, mask = inputs()
    found = model.embed_tokens(ids.astype(np.int32), mask.astype(bool))
    assert relative_error(found, NANO.expected["text_embedding"]) < GOLDEN_TOLERANCE


def test_long_text_is_truncated_with_the_count(model: Model):
    words = " ".join(["lung"] * 600)
    with pytest.warns(TruncationWarning, match=r"text 2 has 602 tokens; only the first 512 are read \(90 dropped\)"):
        found = model.embed_text(["short", words])
    np.testing.assert_allclose(found[1], model.embed_text([" ".join(["lung"] * 510)])[0], atol=1e-6)


def test_long_texts_from_many_threads(model: Model):
    """Truncation must not be a setting that the threads share."""
    long, short = " ".join(["lung"] * 3000), "lung nodule"
    expected = {text: model.embed_text([text])[0] for text in (short,)}
    with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("ignore")
        lengths = list(pool.map(lambda i: model._tokenizer.encode([long if i % 2 else short])[0].shape[1], range(200)))
        found = list(pool.map(lambda i: model.embed_text([short])[0], range(8)))
    assert lengths == [4, 512] * 100
    for embedding in found:
        np.testing.assert_allclose(embedding, expected[short], atol=1e-6)


def test_text_of_exactly_the_limit(model: Model, recwarn: pytest.WarningsRecorder):
    model.embed_text([" ".join(["lung"] * 510)])
    assert not recwarn.list


def test_bundle_that_changes_after_loading(bundle_copy: Path, ct: Path):
    """A server must not mix the old image tower with the new prompts."""
    model = load(bundle_copy)
    model.embed_image(ct)
    prompts = bundle_copy / "prompt_embeddings.fp32.npy"
    np.save(prompts, -np.load(prompts))
    with pytest.raises(BundleError, match="changed since the bundle was opened; load it again"):
        model.zero_shot(ct)


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00"])
def test_damaged_prompt_embeddings(bundle_copy: Path, ct: Path, content: bytes):
    path = bundle_copy / "prompt_embeddings.fp32.npy"
    path.write_bytes(content.ljust(path.stat().st_size, b"\0"))
    with pytest.raises(BundleError, match="not a usable array"):
        load(bundle_copy, verify=False).zero_shot(ct)


def test_sixteen_threads_give_the_same_answers(pristine_bundle: Path, ct: Path):
    model = load(pristine_bundle, threads=1)
    expected = load(pristine_bundle).embed_image(ct)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: model.embed_image(ct), range(32)))
    for embedding in found:
        np.testing.assert_allclose(embedding, expected, atol=1e-6)


@pytest.mark.parametrize(("array", "message"), [
    (np.zeros((64, 128, 127), np.float32), r"shape \[1, 64, 128, 127\]; expected \[batch, 64, 128, 128\]"),
    (np.zeros((1, 64, 128, 128), np.float32), "expected"),
    (np.full((64, 128, 128), np.nan, np.float32), "NaN or infinite"),
    (np.full((64, 128, 128), 40, np.float32), r"values from 40 to 40; expected .* \[-1, 1\]"),
    (np.zeros((64, 128, 128), complex), "complex128; expected float32"),
])
def test_arrays_that_are_not_preprocessed(model: Model, array: np.ndarray, message: str):
    with pytest.raises(InputError, match=message):
        model.embed_image(array)


def test_options_for_files_do_not_fit_arrays(model: Model):
    with pytest.raises(InputError, match="spacing: only for files"):
        model.embed_image(np.zeros((64, 128, 128), np.float32), spacing=(1, 1, 1))


@pytest.mark.parametrize("call", [
    lambda m: m.embed_text([]), lambda m: m.embed_text([1]), lambda m: m.embed_text(None), lambda m: m.embed_images([]),
    lambda m: m.embed_image(np.zeros((64, 128, 128), np.int16)),
    lambda m: m.embed_images("one.nii.gz"), lambda m: m.embed_images(None),
    lambda m: m.embed_images(3), lambda m: m.embed_images(np.zeros((64, 128, 128), np.float32)),
    lambda m: m.embed_images(torch.zeros(64, 128, 128)),
    lambda m: m.image_outputs([[1, 2], [3]]), lambda m: m.image_outputs(torch.zeros(1, 64, 128, 128).bfloat16()),
    lambda m: m.image_outputs(torch.zeros(1, 64, 128, 128, requires_grad=True)),
    lambda m: m.embed_tokens(np.zeros(3, int), np.zeros(3, int)),
    lambda m: m.embed_tokens(np.zeros((1, 3)), np.zeros((1, 3))),
    lambda m: m.embed_tokens(np.zeros((1, 3), int), np.zeros((1, 4), int)),
    lambda m: m.embed_tokens(np.full((1, 3), -1), np.ones((1, 3), int)),
    lambda m: m.embed_image(["a.nii"]), lambda m: m.embed_image(None),
    lambda m: m.zero_shot(np.zeros((64, 128, 128), np.float32), classes="Fracture"),
    lambda m: m.zero_shot(np.zeros((64, 128, 128), np.float32), classes=[1, 2]),
    lambda m: m.zero_shot(np.zeros((64, 128, 128), np.float32), classes=["a", " "]),
    lambda m: m.preprocess("a.nii", spacing="abc"), lambda m: m.preprocess("a.nii", slope="1"),
])
def test_other_unusable_arguments(model: Model, call):
    with pytest.raises(InputError):
        call(model)


@pytest.mark.parametrize(("ids", "length"), [(100_000, 3), (1, 600)])
def test_tokens_that_the_text_tower_does_not_have(model: Model, ids: int, length: int, capfd):
    # The text tower with fused attention is in the bundle only where it was measured faster.
    with pytest.raises(InferenceError, match=r"text\.fp32\.(onnxruntime\.)?onnx: inference failed"):
        model.embed_tokens(np.full((1, length), ids), np.ones((1, length), int))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("call", [
    lambda model, ct: model.embed_image(ct), lambda model, ct: model.zero_shot(ct),
    lambda model, ct: model.image_outputs(model.preprocess(ct)[None])])
def test_outputs_that_are_not_finite(pristine_bundle: Path, ct: Path, monkeypatch: pytest.MonkeyPatch, call):
    model = load(pristine_bundle)
    graph = model._graph("image")
    run = graph.run

    def overflow(feeds, names):
        arrays = run(feeds, names)
        return [np.where(array == array.max(), np.nan, array) if array.dtype.kind == "f" else array for array in arrays]

    monkeypatch.setattr(graph, "run", overflow)
    with pytest.raises(InferenceError, match="image tower in fp32: .* is not finite; in fp16"):
        call(model, ct)


def test_devices_are_not_replaced(pristine_bundle: Path):
    with pytest.raises(InputError, match="device: 'gpu'; expected one of cpu, cuda"):
        load(pristine_bundle, device="gpu")
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(DeviceUnavailable, match="no CUDAExecutionProvider"):
        load(pristine_bundle, device="cuda").describe()


def test_describe_names_library_and_device(model: Model):
    assert "onnxruntime" in model.describe() and "CPUExecutionProvider" in model.describe()

"""The OpenVINO back end gives ONNX Runtime's answers, and says clearly what it cannot do."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from conftest import GOLDEN_TOLERANCE
from dcformer_deploy.runtime import InputError, Model, load
from dcformer_deploy.runtime.backends import Options, open_graph
from dcformer_deploy.runtime.errors import (
    BundleError,
    DcformerWarning,
    DeviceUnavailable,
    InferenceError,
    MissingDependency,
)
from golden import NANO, inputs, relative_error


@pytest.fixture(scope="module")
def openvino_model(pristine_bundle: Path) -> Model:
    return load(pristine_bundle, backend="openvino")


def test_golden_outputs(openvino_model: Model):
    image, ids, mask = inputs()
    outputs = openvino_model.image_outputs(image[:, 0])
    np.testing.assert_array_equal(outputs["codes"], NANO.expected["codes"])
    assert relative_error(outputs["feature_map"], NANO.expected["feature_map"]) < GOLDEN_TOLERANCE
    assert relative_error(outputs["image_embedding"], NANO.expected["image_embedding"]) < GOLDEN_TOLERANCE
    texts = openvino_model.embed_tokens(ids, mask)
    assert relative_error(texts, NANO.expected["text_embedding"]) < GOLDEN_TOLERANCE


def test_scores_are_those_of_onnx_runtime(openvino_model: Model, model: Model, ct: Path):
    found, expected = openvino_model.zero_shot(ct), model.zero_shot(ct)
    np.testing.assert_allclose(list(found.scores.values()), list(expected.scores.values()), rtol=1e-5)
    assert openvino_model.describe().startswith("openvino 20")


def test_results_outlive_the_next_inference(openvino_model: Model):
    image, *_ = inputs()
    first = openvino_model.image_outputs(image[:1, 0])["feature_map"]
    kept = first.copy()
    openvino_model.image_outputs(image[1:, 0])
    np.testing.assert_array_equal(first, kept)


def test_many_threads_give_the_same_answers(openvino_model: Model):
    image, *_ = inputs()
    alone = [openvino_model.embed_image(image[i, 0]) for i in (0, 1)]
    with ThreadPoolExecutor(8) as pool:
        for index, found in enumerate(pool.map(lambda i: openvino_model.embed_image(image[i % 2, 0]), range(16))):
            np.testing.assert_array_equal(found, alone[index % 2])


def test_batches_of_any_size(openvino_model: Model):
    image, *_ = inputs()
    alone = [openvino_model.embed_image(volume) for volume in image[:, 0]]
    for order in ([0, 1], [1, 0, 1], [0]):
        found = openvino_model.image_outputs(image[order, 0])["image_embedding"]
        assert relative_error(found, np.stack([alone[i] for i in order])) < 1e-5


def test_compiled_models_are_kept(pristine_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    image, *_ = inputs()
    first = load(pristine_bundle, backend="openvino").embed_image(image[0, 0])
    blobs = set((tmp_path / "dcformer-deploy" / "openvino").iterdir())
    assert len(blobs) == 1
    again = load(pristine_bundle, backend="openvino").embed_image(image[0, 0])
    assert set((tmp_path / "dcformer-deploy" / "openvino").iterdir()) == blobs
    np.testing.assert_array_equal(first, again)


def test_without_a_cache_folder(pristine_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    image, *_ = inputs()
    with pytest.warns(DcformerWarning, match="openvino compiles anew each time"):
        load(pristine_bundle, backend="openvino").embed_image(image[0, 0])


def test_bfloat16_only_when_asked_for(openvino_model: Model, pristine_bundle: Path):
    image, *_ = inputs()
    try:
        rough = load(pristine_bundle, backend="openvino", precision="bf16").image_outputs(image[:, 0])["feature_map"]
    except DeviceUnavailable as error:
        pytest.skip(str(error))
    exact = openvino_model.image_outputs(image[:, 0])["feature_map"]
    assert 1e-4 < relative_error(rough, exact) < 0.1


def test_signals_after_models_are_gone(pristine_bundle: Path):
    """OpenVINO gives the thread another stack for signals, which must outlive the models."""
    code = """
import gc, os, signal, sys, time
from dcformer_deploy.runtime import load
signal.signal(signal.SIGINT, signal.default_int_handler)
models = [load(sys.argv[1], backend="openvino") for _ in range(3)]
for model in models:
    model.describe()
del model
while models:
    del models[0]
    gc.collect()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code, pristine_bundle], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def test_bfloat16_is_not_for_onnx_runtime(pristine_bundle: Path):
    with pytest.raises(BundleError, match="no image tower in bf16 for onnxruntime; bf16 runs on GPUs, .* in openvino"):
        load(pristine_bundle, precision="bf16").describe()


def test_other_devices_are_refused(pristine_bundle: Path):
    with pytest.raises(InputError, match="device 'cuda': the openvino back end runs on the CPU; drop --device cuda"):
        load(pristine_bundle, "cuda", backend="openvino")


def test_unknown_back_end():
    with pytest.raises(InputError, match="backend: 'openvni'; expected one of onnxruntime, openvino"):
        Options(backend="openvni")


def test_absent_library(monkeypatch: pytest.MonkeyPatch, pristine_bundle: Path):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependency, match=r"openvino is not installed .* pip install .*'\.\[openvino\]'"):
        load(pristine_bundle, backend="openvino").describe()


def test_file_that_is_no_graph(tmp_path: Path):
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    with pytest.raises(BundleError, match=r"bad.onnx: openvino .* refuses it"):
        open_graph(tmp_path / "bad.onnx", Options(backend="openvino"))


def test_wrong_input_is_an_error_of_this_project(pristine_bundle: Path):
    backend = open_graph(pristine_bundle / "image.fp32.onnx", Options(backend="openvino"))
    with pytest.raises(InferenceError, match="inference failed"):
        backend.run({"lines_d": np.zeros((1, 1, 2, 3, 4), np.float32)}, ["image_embedding"])

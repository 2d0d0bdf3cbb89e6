"""A model repository: what Triton's own definitions say of it, and what Triton's own server answers with it."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import triton_server
import tritonclient.grpc as client
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException, shared_memory

from dcformer_deploy.runtime import load
from dcformer_deploy.runtime.cli.app import main


def _configs(out: Path) -> dict:
    return {path.parent.name: text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
            for path in (out / "models").glob("*/config.pbtxt")}


def _write(out: Path, bundle: Path, *options: object) -> dict:
    assert main(["triton", str(bundle), "--out", str(out), "--scans", "/scans", "--name", "net",
                 *map(str, options)]) == 0
    return _configs(out)


def test_onnx_towers(pristine_bundle: Path, scans: Path, tmp_path: Path):
    configs = _write(tmp_path / "r", pristine_bundle, "--max-batch", 4, "--instances", 2, "--readers", 3)
    assert set(configs) == {"net", "net_preprocess", "net_image", "net_scores", "net_embed_text", "net_tokenize",
                            "net_text"}
    model = load(pristine_bundle)
    graph = model.manifest.graph("image")
    assert graph is not None
    for name, config in configs.items():
        assert (config.name, config.max_batch_size) == (name, 4)
        assert config.parameters["manifest_sha256"].string_value == model.manifest.digest
        assert (tmp_path / "r" / "models" / name / "1").is_dir()
    image = configs["net_image"]
    assert (image.backend, image.default_model_filename) == ("onnxruntime", "model.onnx")
    assert [(tensor.name, tuple(tensor.dims)) for tensor in image.input] == [
        (info.name, tuple(info.axes[1:])) for info in graph.inputs]
    assert {tensor.data_type for tensor in image.input} == {model_config_pb2.TYPE_FP32}
    assert [tensor.name for tensor in image.output] == [info.name for info in graph.outputs]
    assert (image.instance_group[0].count, image.instance_group[0].kind) == (2, image.instance_group[0].KIND_CPU)
    assert image.dynamic_batching.max_queue_delay_microseconds == 2000
    assert configs["net_preprocess"].instance_group[0].count == 3
    assert list(configs["net_text"].input[0].dims) == [-1]
    # The files run as they lie there, weights and all.
    session = onnxruntime.InferenceSession(tmp_path / "r" / "models" / "net_image" / "1" / "model.onnx")
    scan = model.prepare(scans / "b.nii.gz")
    np.testing.assert_allclose(session.run(["image_embedding"], scan.feeds)[0][0], model.embed_image(scan), atol=2e-6)
    info = json.loads((tmp_path / "r" / "triton.json").read_text())
    assert (info["manifest_sha256"], info["tower"]) == (model.manifest.digest, "onnxruntime")


def test_tensorrt_towers(built: Path, tmp_path: Path, capsys):
    configs = _write(tmp_path / "r", built, "--tower", "tensorrt", "--device", "cuda", "--precision", "fp16",
                     "--max-batch", 2)
    image = configs["net_image"]
    assert (image.backend, image.default_model_filename) == ("tensorrt", "model.plan")
    assert {tensor.data_type for tensor in image.input} == {model_config_pb2.TYPE_FP16}
    assert {tensor.data_type for tensor in configs["net_preprocess"].output} == {model_config_pb2.TYPE_FP16}
    assert image.instance_group[0].kind == image.instance_group[0].KIND_GPU
    plan = (tmp_path / "r" / "models" / "net_image" / "1" / "model.plan").read_bytes()
    assert plan in [path.read_bytes() for path in built.glob("image*.engine")]
    assert "the server must have TensorRT" in capsys.readouterr().out
    assert main(["triton", str(built), "--out", str(tmp_path / "x"), "--scans", "/s", "--tower", "tensorrt", "--device",
                 "cuda", "--precision", "fp16", "--max-batch", "99"]) == 2
    assert "was built for at most 3; pass less, or build" in capsys.readouterr().err


def test_json(pristine_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["triton", str(pristine_bundle), "--out", str(tmp_path / "x"), "--scans", "/s", "--name", "net", "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert "net" in told["models"]
    assert set(told["models"]) <= {path.name for path in (tmp_path / "x" / "models").iterdir()}
    assert told["tensorrt"] is None


@pytest.mark.parametrize(("options", "code", "message"), [
    (("--scans", "here"), 2, "--scans here: expected an absolute path"),
    (("--scans", "/s", "--name", "a/b"), 2, "--name a/b: expected letters"),
    (("--scans", "/s", "--backend", "openvino"), 2, "only with --tower python"),
    (("--scans", "/s", "--precision", "int8"), 2, "no image tower in int8"),
    (("--scans", "/s", "--tower", "tensorrt"), 2, "--device cuda"),
    (("--scans", "/s", "--tower", "python", "--backend", "tensorrt_rtx", "--device", "cuda"), 2,
     "no tensorrt_rtx engine of the image tower"),
    (("--scans", "/s", "--tower", "tensorrt", "--device", "cuda"), 2, "no tensorrt engine of the image tower"),
])
def test_refused(pristine_bundle: Path, tmp_path: Path, capsys, options: tuple, code: int, message: str):
    assert main(["triton", str(pristine_bundle), "--out", str(tmp_path / "r"), *options]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_only_its_own_is_replaced(pristine_bundle: Path, tmp_path: Path, capsys):
    _write(tmp_path / "r", pristine_bundle)
    arguments = ["triton", str(pristine_bundle), "--scans", "/s", "--out"]
    assert main([*arguments, str(tmp_path / "r")]) == 2
    assert main([*arguments, str(tmp_path / "r"), "--force"]) == 0
    (tmp_path / "other").mkdir()
    assert main([*arguments, str(tmp_path / "other"), "--force"]) == 2
    assert "is not what this would replace" in capsys.readouterr().err


needs_server = pytest.mark.skipif(not (triton_server.HERE / "ready").exists(),
                                  reason="no Triton server; `make test` installs it where its wheel fits the system")


@pytest.fixture(scope="module")
def served(pristine_bundle: Path, scans: Path, tmp_path_factory: pytest.TempPathFactory
           ) -> Iterator[client.InferenceServerClient]:
    folder = tmp_path_factory.mktemp("triton")
    assert main(["triton", str(pristine_bundle), "--out", str(folder / "r"), "--scans", str(scans), "--name", "net",
                 "--tower", "python", "--max-batch", "4", "--readers", "1"]) == 0
    moved = Path(shutil.move(folder / "r", folder / "elsewhere"))  # nothing in it says where it lay
    with triton_server.serve(moved / "models", folder / "log") as found:
        yield found


def _ask(served: client.InferenceServerClient, model: str, name: str, values: list, outputs: list[str] | None = None
         ) -> client.InferResult:
    given = client.InferInput(name, [len(values), 1], "BYTES")
    given.set_data_from_numpy(np.array([[value] for value in values], object))
    return served.infer(model, [given], outputs=outputs and [client.InferRequestedOutput(name) for name in outputs])


@needs_server
def test_scans_by_path(served: client.InferenceServerClient, pristine_bundle: Path, scans: Path):
    model = load(pristine_bundle)
    paths = [scans / "a.nii.gz", scans / "c.nii"]
    found = _ask(served, "net", "SCAN", [str(paths[0]), "c.nii"])  # absolute, and below the folder of scans
    for path, embedding, scores in zip(paths, found.as_numpy("image_embedding"), found.as_numpy("scores"),
                                       strict=True):
        np.testing.assert_allclose(embedding, model.embed_image(path), atol=2e-6)
        np.testing.assert_allclose(scores, list(model.zero_shot(path).scores.values()), atol=2e-6)
    for output in ("scores", "image_embedding"):  # either alone
        alone = _ask(served, "net", "SCAN", ["a.nii.gz"], [output]).as_numpy(output)
        np.testing.assert_allclose(alone[0], found.as_numpy(output)[0], atol=2e-6)
    given = client.InferInput("SCAN", [1, 1], "BYTES")
    given.set_data_from_numpy(np.array([["a.nii.gz"]], object))
    top = served.infer("net", [given], outputs=[client.InferRequestedOutput("scores", class_count=2)])
    best = max(model.zero_shot(paths[0]).scores.items(), key=lambda item: item[1])
    assert top.as_numpy("scores").ravel()[0].decode().split(":")[2] == best[0]


@needs_server
def test_texts(served: client.InferenceServerClient, pristine_bundle: Path):
    texts = ["Emphysema.", "No pleural effusion is seen in either lung."]
    found = _ask(served, "net_embed_text", "TEXT", texts).as_numpy("text_embedding")
    np.testing.assert_allclose(found, load(pristine_bundle).embed_text(texts), atol=2e-6)


def _unregister(served: client.InferenceServerClient) -> None:
    """The server lets go of regions a moment after it has answered."""
    for _ in range(100):
        try:
            return served.unregister_system_shared_memory()
        except InferenceServerException:
            time.sleep(0.1)
    raise AssertionError("the server never let go of its regions")


@needs_server
def test_lines_by_shared_memory(served: client.InferenceServerClient, pristine_bundle: Path, scans: Path):
    """A client that preprocesses itself puts the lines where the server reads them; the request holds none."""
    model = load(pristine_bundle)
    scan = model.prepare(scans / "b.nii.gz")
    inputs, regions = [], []
    try:
        for name, array in scan.feeds.items():
            region = shared_memory.create_shared_memory_region(name, f"/dcformer_{name}", array.nbytes)
            regions.append(region)
            shared_memory.set_shared_memory_region(region, [array])
            served.register_system_shared_memory(name, f"/dcformer_{name}", array.nbytes)
            given = client.InferInput(name, list(array.shape), "FP32")
            given.set_shared_memory(name, array.nbytes)
            inputs.append(given)
        found = served.infer("net_image", inputs).as_numpy("image_embedding")
    finally:
        _unregister(served)
        for region in regions:
            shared_memory.destroy_shared_memory_region(region)
    np.testing.assert_allclose(found[0], model.embed_image(scan), atol=2e-6)


@needs_server
@pytest.mark.parametrize(("value", "message"), [
    ("/etc/passwd", "not below the folder of scans"), ("../secret.nii.gz", "not below the folder of scans"),
    ("missing.nii.gz", "no such"), ("a\0b", "a path that cannot be one"), (b"\xff\xfe", "not UTF-8"),
    ("", "not below the folder of scans")])
def test_requests_that_are_refused_harm_no_other(served: client.InferenceServerClient, value: object, message: str):
    with pytest.raises(InferenceServerException, match=re.escape(message)):
        _ask(served, "net", "SCAN", [value])
    assert _ask(served, "net", "SCAN", ["b.nii.gz"]).as_numpy("scores").shape == (1, 18)


@needs_server
def test_another_bundle_beside_the_models_is_refused(pristine_bundle: Path, calibrated: Path, tmp_path: Path):
    _write(tmp_path / "r", pristine_bundle, "--tower", "python")
    shutil.rmtree(tmp_path / "r" / "bundle")
    shutil.copytree(calibrated, tmp_path / "r" / "bundle")
    with pytest.raises(RuntimeError, match="not the bundle that the repository was made of"), \
            triton_server.serve(tmp_path / "r" / "models", tmp_path / "log"):
        pass


@needs_server
def test_the_server_takes_the_configuration_of_onnx_towers(pristine_bundle: Path, tmp_path: Path):
    """Its wheel lacks the back end that would run them, and that is all that it finds wrong."""
    _write(tmp_path / "r", pristine_bundle)
    with pytest.raises(RuntimeError) as found, triton_server.serve(tmp_path / "r" / "models", tmp_path / "log"):
        pass
    errors = re.findall(r"failed to load '(\S+)' version 1: (.*)", str(found.value))
    assert {name for name, _ in errors} == {"net_image", "net_text"}
    assert all("unable to find backend library for backend 'onnxruntime'" in reason for _, reason in errors)

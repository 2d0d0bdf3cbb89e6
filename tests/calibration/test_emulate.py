"""16-bit graphs in float32 with every rounding: against numpy's own FP16, and bfloat16 against OpenVINO's."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch

from dcformer_deploy.calibration.emulate import emulate, emulated_bundle
from dcformer_deploy.calibration.half import to_bfloat16, to_half
from dcformer_deploy.runtime import load
from dcformer_deploy.runtime.backends.openvino import shared_core
from dcformer_deploy.runtime.bundle import open_bundle
from graphs import GraphBuilder, difference, run, volume

FLOAT, HALF, BFLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16


def _chain() -> tuple[onnx.ModelProto, list[np.ndarray]]:
    """Product, sum, square, product: four roundings."""
    graph = GraphBuilder()
    weights = [graph.random.standard_normal(shape).astype(np.float32) for shape in ((6, 6), (6,), (6, 3))]
    y = graph.node("Add", graph.node("MatMul", "x", graph.constant(weights[0])), graph.constant(weights[1]))
    y = graph.node("MatMul", graph.node("Mul", y, y), graph.constant(weights[2]))
    return graph.finish(y, {"x": ["batch", 6]}), weights


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_every_value_is_rounded(kind: type):
    proto, weights = _chain()
    x = volume(5, 6)

    def rounded(array: np.ndarray, dtype: type = kind) -> np.ndarray:
        return array.astype(dtype).astype(np.float32)

    a, b, c = map(rounded, weights)
    if kind is np.float16:
        found = run(emulate(to_half(proto).proto), x=x)
        first = rounded(rounded(x) @ a)
    else:  # what reads the input stays float32
        found = run(emulate(to_bfloat16(proto).proto), x=x)
        first = rounded(rounded(x, np.float16) @ weights[0])
    total = rounded(first + b)
    expected = rounded(rounded(total * total) @ c)
    np.testing.assert_array_equal(found, expected)


def test_onnx_runtime_alone_leaves_roundings_out():
    """The reason for all this: if it no longer does on a CPU without FP16 kernels, the emulation can go."""
    proto, _ = _chain()
    x = volume(5, 6)
    half = to_half(proto).proto
    assert difference(run(half, x=x.astype(np.float16)), run(emulate(half), x=x)) > 1e-5


def test_bfloat16_image_tower(pristine_bundle: Path):
    """Weights as PyTorch rounds them; FP16 inputs; features as OpenVINO computes them from the same file."""
    proto = onnx.load(pristine_bundle / "image.fp32.onnx")
    found = to_bfloat16(proto)
    onnx.checker.check_model(found.proto, full_check=True)
    assert {entry.type.tensor_type.elem_type for entry in found.proto.graph.input} == {HALF}
    assert {entry.type.tensor_type.elem_type for entry in found.proto.graph.output} == {FLOAT, onnx.TensorProto.INT64}
    originals = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    kinds = {tensor.name: tensor.data_type for tensor in found.proto.graph.initializer}
    assert HALF not in kinds.values()
    assert found.float32["the first layer, which reads voxels"] > 0
    rounded = [tensor for tensor in found.proto.graph.initializer if tensor.data_type == BFLOAT16]
    assert len(rounded) > 20
    for tensor in rounded:
        expected = torch.from_numpy(originals[tensor.name].copy()).to(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.float32), expected)
    feeds = {entry.name: np.clip(volume(1, *(d.dim_value for d in entry.type.tensor_type.shape.dim[1:])), -1, 1)
             for entry in found.proto.graph.input}
    exact, emulated = _features(proto, feeds), _features(emulate(found.proto), feeds)
    model = shared_core().read_model(found.proto.SerializeToString())
    compiled = shared_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    there = compiled({name: array.astype(np.float16) for name, array in feeds.items()})["feature_map"]
    assert 4e-3 < difference(emulated, exact) < 1.2e-2
    # Weights are the same, roundings of activations are not: OpenVINO leaves them out, too.
    assert difference(there, exact) < 1.2e-2
    assert difference(there, emulated) < 1.2e-2


def _features(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["feature_map"], feeds)[0]


def test_bfloat16_of_what_fp16_cannot_hold():
    graph = GraphBuilder()
    mask = graph.constant(np.array([0, np.finfo(np.float32).min], np.float32))
    large = graph.node("MatMul", graph.node("Relu", "x"), graph.constant(np.full((2, 2), 1e6, np.float32)))
    proto = graph.finish(graph.node("Softmax", graph.node("Add", large, mask), axis=-1), {"x": ["batch", 2]})
    half = to_bfloat16(proto)
    assert half.overflow == {}
    found = run(emulate(half.proto), x=np.array([[1.0, 2.0]], np.float32))
    np.testing.assert_array_equal(found, [[1, 0]])
    for tensor in half.proto.graph.initializer:
        assert np.isfinite(onnx.numpy_helper.to_array(tensor).astype(np.float64)).all()


def test_bundle_of_graphs_for_gpus(calibrated: Path, ct: Path, tmp_path: Path):
    emulated = emulated_bundle(open_bundle(calibrated), tmp_path)
    models = {name: load(tmp_path, precision=name) for name in ("fp32", "fp16", "bf16", "int8")}
    assert {graph.target for graph in emulated.manifest.graphs} == {"any"}
    assert emulated.manifest.graph("image", "bf16").inputs[0].dtype == "float32"
    exact = load(calibrated)
    np.testing.assert_array_equal(models["fp32"].embed_image(ct), exact.embed_image(ct))
    texts = ["There is emphysema.", "no"]
    reference = exact.embed_text(texts)
    errors = {name: difference(model.embed_text(texts), reference) for name, model in models.items()}
    assert errors["fp32"] < 1e-5 < errors["fp16"] < 1.2e-3
    assert errors["fp16"] < errors["bf16"] < 1e-2
    volumes = exact.preprocess(ct)[None]
    features = {name: model.image_outputs(volumes, ["feature_map"])["feature_map"] for name, model in models.items()}
    noise = {name: float(((found - features["fp32"]) ** 2).sum()) for name, found in features.items()}
    assert 0 < noise["fp16"] < noise["bf16"]
    assert noise["fp16"] < noise["int8"]

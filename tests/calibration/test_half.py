"""FP16: inputs, what stays float32 and why, and no rounding between nodes that stay."""

import numpy as np
import onnx
import onnxruntime
import pytest

from dcformer_deploy.calibration.half import LARGEST_MAGNITUDE, to_half
from dcformer_deploy.runtime import load
from graphs import GraphBuilder, volume

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def _run(proto: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def _kinds(proto: onnx.ModelProto) -> dict[str, int]:
    return {v.name: v.type.tensor_type.elem_type for v in (*proto.graph.value_info, *proto.graph.output)}


@pytest.fixture(scope="module")
def image(pristine_bundle) -> onnx.ModelProto:
    return onnx.load(pristine_bundle / "image.fp32.onnx")


def test_image_tower(image: onnx.ModelProto):
    half = to_half(image)
    onnx.checker.check_model(half.proto, full_check=True)
    assert {entry.type.tensor_type.elem_type for entry in half.proto.graph.input} == {HALF}
    outputs = {entry.name: entry.type.tensor_type.elem_type for entry in half.proto.graph.output}
    assert outputs == {"image_embedding": FLOAT, "feature_map": FLOAT, "codes": onnx.TensorProto.INT64}
    kinds = _kinds(half.proto)
    for node in half.proto.graph.node:
        if node.op_type in ("ReduceL2", "ReduceMean", "MatMul", "Gemm"):
            assert kinds[node.output[0]] == FLOAT, node.op_type
        if node.op_type in ("Conv", "Gelu", "Add", "MaxPool"):
            assert kinds[node.output[0]] == HALF, node.op_type
    assert sum(half.float32.values()) < 20
    assert any("choice of a code" in reason for reason in half.float32)


def test_answers(image: onnx.ModelProto):
    sides = {entry.name: [d.dim_value for d in entry.type.tensor_type.shape.dim[1:]] for entry in image.graph.input}
    feeds = {name: np.clip(volume(1, *shape), -1, 1) for name, shape in sides.items()}
    _, codes, features = _run(image, **feeds)
    half = to_half(image).proto
    found = _run(half, **{name: array.astype(np.float16) for name, array in feeds.items()})
    assert np.abs(found[2] - features).max() < 5e-3 * np.abs(features).max()
    assert (found[1] == codes).mean() > 0.98


def test_no_rounding_between_nodes_that_stay():
    """The norm of a vector and the division by it: FP16 in between would cost three digits."""
    graph = GraphBuilder()
    first = graph.node("MatMul", "x", graph.weight(16, 16))
    norm = graph.node("ReduceL2", first, graph.constant(np.array([1])), keepdims=1)
    unit = graph.node("Div", first, graph.node("Sqrt", graph.node("Mul", norm, norm)))
    codes = graph.node("ArgMax", graph.node("MatMul", unit, graph.weight(16, 40)), axis=-1, keepdims=0)
    proto = graph.finish(graph.node("Cast", codes, to=FLOAT), {"x": ["batch", 16]})
    half = to_half(proto).proto
    kinds = _kinds(half)
    between = [node for node in half.graph.node if node.op_type in ("ReduceL2", "Mul", "Sqrt", "Div", "MatMul")][1:]
    assert len(between) == 5
    assert {kinds[node.output[0]] for node in between} == {FLOAT}
    casts = {node.output[0] for node in half.graph.node if node.op_type == "Cast"}
    assert [len(casts & set(node.input)) for node in between] == [1, 0, 0, 1, 0]  # of what the norm and Div read


def test_what_overflows_stays_float32():
    graph = GraphBuilder()
    large = graph.node("MatMul", graph.node("Relu", "x"), graph.constant(np.full((4, 4), 300.0, np.float32)))
    proto = graph.finish(graph.node("Mul", large, graph.constant(np.float32(1e-3))), {"x": ["batch", 4]})
    x = np.full((2, 4), 100.0, np.float32)
    exact = _run(proto, x=x)[0]
    assert _kinds(to_half(proto).proto)[large] == HALF  # where FP16 is computed in, this is infinite
    half = to_half(proto, {large: 1.2e6})
    product = next(node for node in half.proto.graph.node if node.op_type == "MatMul")
    assert _kinds(half.proto)[product.output[0]] == FLOAT
    assert half.overflow == {large: 1.2e6}
    assert half.float32 == {"an activation too large for FP16": 2}
    np.testing.assert_allclose(_run(half.proto, x=(x * 10).astype(np.float16))[0], exact * 10, rtol=1e-2)
    assert not to_half(proto, {large: LARGEST_MAGNITUDE}).overflow


def test_the_runtime_feeds_what_the_graph_reads(calibrated, ct):
    half, exact = (load(calibrated, precision=name) for name in ("fp16", "fp32"))
    assert float(half.embed_image(ct) @ exact.embed_image(ct)) > 0.999
    assert float((half.embed_text(["x is present."]) @ exact.embed_text(["x is present."]).T)[0, 0]) > 0.999
    assert half.manifest.graph("image", "fp16").inputs[0].dtype == "float16"


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_embeddings_have_unit_length(calibrated, ct, precision: str):
    """The last norm is float32 to the end: rounded to FP16, lengths would be off by 1e-4."""
    model = load(calibrated, precision=precision)
    for embedding in (model.embed_image(ct), model.embed_text(["no"])[0]):
        assert abs(float(np.linalg.norm(embedding.astype(np.float64))) - 1) < 1e-6
        assert np.abs(embedding - embedding.astype(np.float16)).max() > 0

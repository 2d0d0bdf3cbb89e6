"""INT8 in the graph: where it is, what it computes, and what stays float."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from dcformer_deploy.calibration.layers import layer_name, quantizable_layers, source_name
from dcformer_deploy.calibration.quantize import quantize, quantize_weights
from dcformer_deploy.runtime.errors import InputError
from graphs import GraphBuilder, operators, run, volume


def _network() -> onnx.ModelProto:
    """A first layer, a decomposed one, a pool, a point, a residual block with a depthwise layer, a head."""
    graph = GraphBuilder()
    first = graph.star("volume", (8, 1), 3)
    second = graph.star(first, (8, 8), 3)
    pool = graph.node("MaxPool", second, kernel_shape=[3] * 3, strides=[2] * 3, pads=[1] * 6)
    point = graph.node("Conv", pool, graph.weight(8, 8, 1, 1, 1))
    mixed = graph.star(point, (8, 1), 3, group=8)
    hidden = graph.node("Gelu", graph.node("Conv", mixed, graph.weight(16, 8, 1, 1, 1), graph.weight(16)))
    block = graph.node("Add", point, graph.node("Conv", hidden, graph.weight(8, 16, 1, 1, 1), graph.weight(8)))
    mean = graph.node("ReduceMean", block, graph.constant(np.array([2, 3, 4])), keepdims=0)
    return graph.finish(graph.node("Gemm", mean, graph.weight(5, 8), transB=1), {"volume": ["batch", 1, 6, 8, 10]})


def _layers(proto: onnx.ModelProto) -> list:
    return quantizable_layers(ir.from_proto(proto).graph)


def _limits(proto: onnx.ModelProto, size: float = 4.0) -> dict[str, float]:
    return {name: size for node in proto.graph.node for name in node.output}


def test_first_layer_and_head_are_left_out():
    layers = _layers(_network())
    assert [layer.weight.shape[:2] for layer in layers] == [(8, 8)] * 4 + [(8, 1)] * 3 + [(16, 8), (8, 16)]
    assert [layer.depthwise for layer in layers] == [False] * 4 + [True] * 3 + [False] * 2


def test_branches_share_one_scale_and_biases_stay_float():
    proto = _network()
    found = quantize(proto, _limits(proto))
    assert found.layers == 6
    producers = {name: node for node in found.proto.graph.node for name in node.output}
    dense = [node for node in found.proto.graph.node if node.op_type == "Conv" and node.input[0] in producers
             and producers[node.input[0]].op_type == "DequantizeLinear"]
    assert len(dense) == 6
    assert len({node.input[0] for node in dense[:3]}) == 1  # the three branches
    weights = {tensor.name: tensor for tensor in found.proto.graph.initializer}
    for node in dense:
        integers, scale, zero = producers[node.input[1]].input
        assert weights[integers].data_type == onnx.TensorProto.INT8
        assert weights[scale].dims[0] == weights[integers].dims[0]
        assert not onnx.numpy_helper.to_array(weights[zero]).any()
        assert all(weights[bias].data_type == onnx.TensorProto.FLOAT for bias in node.input[2:])


def test_pool_reads_rounded_numbers_and_the_residual_too():
    proto = _network()
    nodes = quantize(proto, _limits(proto)).proto.graph.node
    producers = {name: node for node in nodes for name in node.output}
    (pool,) = [node for node in nodes if node.op_type == "MaxPool"]
    assert producers[pool.input[0]].op_type == "DequantizeLinear"
    (mean,) = [node for node in nodes if node.op_type == "ReduceMean"]
    block = producers[mean.input[0]]
    assert sorted(producers[name].op_type for name in block.input) == ["Conv", "DequantizeLinear"]


def test_result_is_that_of_torchs_fake_quantization():
    """One layer: scale per output channel for the weight, one for the activation."""
    graph = GraphBuilder()
    first = graph.node("Conv", "x", graph.weight(8, 4, 1, 1, 1))
    proto = graph.finish(graph.line(first, (6, 8), 1, 3), {"x": ["batch", 4, 3, 5, 7]})
    limit = 0.7  # saturates
    found = quantize(proto, {proto.graph.node[0].output[0]: limit}).proto
    x = volume(2, 4, 3, 5, 7)
    weights = [torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in proto.graph.initializer]
    middle = torch.nn.functional.conv3d(torch.from_numpy(x), weights[0])
    middle = torch.fake_quantize_per_tensor_affine(middle, limit / 127, 0, -128, 127)
    scales = weights[1].abs().amax(dim=(1, 2, 3, 4)) / 127
    kernel = torch.fake_quantize_per_channel_affine(weights[1], scales, torch.zeros(6, dtype=torch.int32), 0, -127, 127)
    expected = torch.nn.functional.conv3d(middle, kernel, weights[2], padding=(0, 1, 0)).numpy()
    # A value half-way between two steps may be rounded to either; one step of one input moves a sum by this much.
    step = limit / 127 * float(kernel.abs().max())
    difference = np.abs(run(found, x=x) - expected)
    assert difference.max() <= 1.01 * step
    assert (difference > 1e-5).mean() < 1e-3


def test_planes_have_the_scale_of_their_volume():
    from graphs import only

    proto = _network()
    streamed, report = only(proto, "stream_planes")
    assert report.matched
    limits = {name: 3.0 + index for index, name in enumerate(_limits(proto))}
    names = {source_name(layer.x) for layer in _layers(streamed)}
    assert names == {source_name(layer.x) for layer in _layers(proto)}
    x = volume(1, 1, 6, 8, 10)
    a, b = (run(quantize(graph, limits).proto, volume=x) for graph in (proto, streamed))
    # Weights that were merged (the centre taps) are rounded once instead of thrice, so this is near, not equal.
    assert np.abs(a - b).max() < 0.05 * np.abs(a).max()


def test_layers_without_range_are_named():
    proto = _network()
    limits = _limits(proto)
    block = [layer for layer in _layers(proto) if not layer.depthwise]
    limits[source_name(block[-1].x)] = 0.0
    del limits[source_name(block[-2].x)]
    found = quantize(proto, limits)
    assert found.layers == 4
    assert [text.split(": its input")[1].split(" ", 2)[2] for text in found.left] == ["was not observed", "is always 0"]
    assert found.left[0].startswith(layer_name(block[-2]))


def test_nothing_to_quantize():
    graph = GraphBuilder()
    proto = graph.finish(graph.node("Relu", "x"), {"x": [1, 2]})
    for make in (lambda: quantize(proto, {}), lambda: quantize_weights(proto)):
        with pytest.raises(InputError, match="int8: this graph has no"):
            make()


def test_weights_alone():
    graph = GraphBuilder()
    hidden = graph.node("Relu", graph.node("MatMul", "x", graph.weight(16, 32)))
    proto = graph.finish(graph.node("MatMul", hidden, graph.weight(32, 8)), {"x": ["batch", 16]})
    found = quantize_weights(proto)
    assert "QuantizeLinear" not in operators(found)
    assert operators(found).count("DequantizeLinear") == 1  # the first layer stays
    x = volume(4, 16)
    assert np.abs(run(found, x=x) - run(proto, x=x)).max() < 0.02 * np.abs(run(proto, x=x)).max()

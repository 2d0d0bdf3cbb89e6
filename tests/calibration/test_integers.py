"""Weights on INT8's grid in other forms of a graph, and depthwise layers by measurement."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from dcformer_deploy.calibration.integers import Weights, worthwhile_depthwise
from dcformer_deploy.calibration.layers import group_name, quantizable_layers
from dcformer_deploy.calibration.quantize import weight_scales
from dcformer_deploy.runtime.provenance import Timing
from graphs import GraphBuilder, run, volume


def _network() -> onnx.ModelProto:
    """Points and depthwise layers of 8 and of 4 channels; the first layer stays float."""
    graph = GraphBuilder()
    y = graph.star("x", (8, 1), 3)
    for width in (8, 8, 4):
        y = graph.node("Conv", y, graph.weight(width, 8, 1, 1, 1))
        y = graph.line(y, (width, 1), 0, 5, group=width)
    return graph.finish(y, {"x": ["batch", 1, 6, 8, 10]})


def _limits(proto: onnx.ModelProto) -> dict[str, float]:
    return {name: 4.0 for node in proto.graph.node for name in node.output}


class Watch:
    """Says how long graphs take by their depthwise layers that read INT8; each of ``slow`` sizes costs, others save."""

    def __init__(self, slow: int, saved: float) -> None:
        self.slow, self.saved, self.asked = slow, saved, 0

    def _ms(self, proto: onnx.ModelProto) -> float:
        dims = {tensor.name: tensor.dims for tensor in proto.graph.initializer}
        weights = {node.output[0]: node.input[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
        sizes = [np.prod(dims[weights[node.input[1]]]) for node in proto.graph.node
                 if node.op_type == "Conv" and node.input[1] in weights and dims[weights[node.input[1]]][1] == 1]
        return 100 + sum(5 if size == self.slow else -self.saved for size in sizes)

    def compare(self, before: onnx.ModelProto, after: onnx.ModelProto) -> Timing:
        self.asked += 1
        return Timing(self._ms(before), self._ms(after), "here")


@pytest.mark.parametrize(("slow", "saved", "expected"), [(4 * 5, 10, 2), (8 * 5, 10, 1), (0, 10, 3), (0, 0.5, 0)])
def test_depthwise_layers_that_are_faster(slow: int, saved: float, expected: int):
    """Two sizes are asked for, whatever the number of layers; a gain that a second timing might take back is none."""
    proto, watch = _network(), Watch(slow, saved)
    found = worthwhile_depthwise(proto, _limits(proto), lambda _: False, watch)
    layers = [layer for layer in quantizable_layers(ir.from_proto(proto).graph) if layer.depthwise]
    assert watch.asked == 2
    assert len(found) == expected
    assert found <= {group_name(layer) for layer in layers}
    assert all(layer.weight.size != slow for layer in layers if group_name(layer) in found)


def test_layers_that_stay_are_not_measured():
    proto, watch = _network(), Watch(0, 10)
    assert not worthwhile_depthwise(proto, _limits(proto), lambda layer: layer.depthwise, watch)
    assert watch.asked == 0


def test_weights_in_another_form():
    """The same points as matrices without the axes of size 1, under other names."""
    graph = GraphBuilder()
    first = graph.star("x", (8, 1), 3)
    proto = graph.finish(graph.node("Conv", first, graph.weight(4, 8, 1, 1, 1)), {"x": ["batch", 1, 6, 8, 10]})
    flat = onnx.ModelProto()
    flat.CopyFrom(proto)
    for tensor in flat.graph.initializer:
        for node in flat.graph.node:
            node.input[:] = [f"{name}/flat" if name == tensor.name else name for name in node.input]
        tensor.name += "/flat"
    layer = quantizable_layers(ir.from_proto(proto).graph)[-1]
    steps = 3 * weight_scales(layer)
    grid = (np.rint(layer.weight / steps.reshape(-1, 1, 1, 1, 1)) * steps.reshape(-1, 1, 1, 1, 1)).astype(np.float32)
    weights = Weights({layer.weight_name: grid}, {layer.weight_name: steps})
    moved = weights.moved(proto, flat)
    assert set(moved.values) == {f"{layer.weight_name}/flat"}
    x = volume(1, 1, 6, 8, 10)
    expected = run(weights.quantize(proto, _limits(proto), lambda _: False).proto, x=x)
    np.testing.assert_array_equal(run(moved.quantize(flat, _limits(flat), lambda _: False).proto, x=x), expected)
    plain = run(Weights().quantize(flat, _limits(flat), lambda _: False).proto, x=x)
    assert np.abs(plain - expected).max() > 1e-3

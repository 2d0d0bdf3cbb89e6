"""Rounding that makes up for its errors: what a layer reads, the recursion, and what it gains."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from dcformer_deploy.calibration.compensate import (
    Correlations,
    _compensate,
    _inputs,
    _matrix,
    half_rounding,
    integer_rounding,
    replace_weights,
)
from dcformer_deploy.calibration.layers import weighted_layers
from dcformer_deploy.runtime.errors import InputError
from graphs import GraphBuilder, run, volume


class Places:
    """In place of a generator: places one after the other."""

    def integers(self, low: int, high: int, count: int) -> np.ndarray:
        return np.arange(count) % high


def test_what_a_layer_reads_times_its_weights_is_its_result():
    """Three branches with dilations, padding and stride against torch."""
    graph = GraphBuilder()
    a = graph.line("x", (5, 4), 0, 3, stride=2)
    b = graph.node("Conv", "x", graph.weight(5, 4, 1, 2, 1), kernel_shape=[1, 2, 1], dilations=[1, 2, 1],
                   pads=[0, 1, 0, 0, 1, 0], strides=[2] * 3)
    proto = graph.finish(graph.node("Add", a, b), {"x": [1, 4, 6, 7, 8]})
    layers = weighted_layers(ir.from_proto(proto).graph)
    x = volume(1, 4, 6, 7, 8)
    read = _inputs(layers, x.astype(np.float64), Places())  # type: ignore[arg-type]
    found = read.reshape(len(read), -1) @ np.concatenate([_matrix(layer) for layer in layers], axis=1).T
    first, second = (torch.from_numpy(layer.weight.copy()) for layer in layers)
    tensor = torch.from_numpy(x)
    convolve = torch.nn.functional.conv3d
    both = (convolve(tensor, first, padding=(1, 0, 0), stride=2)
            + convolve(tensor, second, padding=(0, 1, 0), dilation=(1, 2, 1), stride=2))
    expected = both[0].numpy()
    depth, height, width = expected.shape[1:]
    index = np.arange(len(read))
    np.testing.assert_allclose(found, expected[:, index % depth, index % height, index % width].T, atol=1e-5)


@pytest.mark.parametrize("bits", ["fp16", "int8"])
def test_correlated_inputs_gain_and_results_can_be_held(bits: str):
    random = np.random.default_rng(0)
    mixing = random.standard_normal((40, 6))
    x = random.standard_normal((5000, 6)) @ mixing.T + 0.01 * random.standard_normal((5000, 40)) + 3.0
    weights = random.standard_normal((8, 40))
    scales = np.abs(weights).max(axis=1) / 127
    nearest = half_rounding(None) if bits == "fp16" else integer_rounding(scales, 127)  # type: ignore[arg-type]
    plain = np.stack([nearest(column) for column in weights.T], axis=1)
    found = _compensate(weights, x.T @ x / len(x), [nearest] * 40)
    np.testing.assert_array_equal(np.stack([nearest(column) for column in found.T], axis=1), found)
    errors = [float(np.square(x @ (w - weights).T).mean()) for w in (plain, found)]
    assert errors[1] < 0.1 * errors[0]


def test_independent_inputs_are_rounded_to_the_nearest():
    weights = np.random.default_rng(0).standard_normal((3, 10))
    nearest = half_rounding(None)  # type: ignore[arg-type]
    found = _compensate(weights, np.eye(10), [nearest] * 10)
    np.testing.assert_array_equal(found, weights.astype(np.float16))


def test_one_output_each_for_depthwise():
    """Channel by channel as if each were a layer of its own."""
    random = np.random.default_rng(1)
    moments = np.stack([(lambda a: a @ a.T)(random.standard_normal((5, 5))) for _ in range(4)])
    moments[:, range(5), range(5)] += np.arange(5, 0, -1) * 10  # the same order in every channel
    weights, nearest = random.standard_normal((4, 5)), half_rounding(None)  # type: ignore[arg-type]
    found = _compensate(weights, moments, [nearest] * 5)
    for channel in range(4):
        alone = _compensate(weights[channel : channel + 1], moments[channel], [nearest] * 5)
        np.testing.assert_array_equal(found[channel], alone[0])


def _network():
    graph = GraphBuilder()
    y = graph.star("x", (8, 4), 3)
    y = graph.star(graph.node("Gelu", y), (8, 1), 5, group=8)
    flat = graph.node("Flatten", graph.node("Conv", y, graph.weight(3, 8, 1, 1, 1)), axis=1)
    return graph.finish(graph.node("MatMul", flat, graph.weight(3 * 4 * 5 * 6, 7)), {"x": ["batch", 4, 4, 5, 6]})


def test_a_whole_graph_in_fp16(tmp_path):
    proto = _network()
    correlations = Correlations.of(proto)
    names = {str(group.layers[0].x.name) for group in correlations.groups.values()}
    assert len(names) == 4
    smooth = np.random.default_rng(0).standard_normal((60, 4, 1, 1, 1)) + 0.05 * volume(60, 4, 4, 5, 6) + 2
    smooth = smooth.astype(np.float32)
    shown = type(proto)()
    shown.CopyFrom(proto)
    kinds = {value.name: value for value in proto.graph.value_info}
    order = [node.input[0] for node in proto.graph.node if node.input[0] in names and node.input[0] in kinds]
    order = list(dict.fromkeys(order))
    for name in order:
        del shown.graph.output[:]
        shown.graph.output.append(kinds[name])
        for scan in smooth[:40]:
            correlations.update(name, run(shown, x=scan[None]), np.random.default_rng(1))
    for scan in smooth[:40]:
        correlations.update("x", scan[None], np.random.default_rng(1))
    new = correlations.rounded(half_rounding)
    assert len(new) == 8  # three branches, three depthwise ones, the point, the product
    assert all((array == array.astype(np.float16)).all() for array in new.values())
    plain = {name: next(layer.weight for group in correlations.groups.values() for layer in group.layers
                        if layer.weight_name == name).astype(np.float16).astype(np.float32) for name in new}
    exact = run(proto, x=smooth[40:])
    errors = [np.square(run(replace_weights(proto, weights), x=smooth[40:]) - exact).mean() for weights in (plain, new)]
    assert errors[1] < 0.6 * errors[0]
    correlations.save(tmp_path / "c.npz")
    again = Correlations.of(proto)
    again.take(again.read(tmp_path / "c.npz"))
    for name, array in again.rounded(half_rounding).items():
        np.testing.assert_array_equal(array, new[name])
    (tmp_path / "c.npz").write_bytes(b"no archive")
    with pytest.raises(InputError, match="c.npz: damaged"):
        again.read(tmp_path / "c.npz")


def test_layers_that_were_not_seen_stay():
    assert Correlations.of(_network()).rounded(half_rounding) == {}


def test_convolutions_of_one_input_that_are_not_added_are_layers_of_their_own():
    """Of different widths, too; and products that only a bias joins."""
    graph = GraphBuilder()
    wide = graph.node("Gelu", graph.node("Conv", "x", graph.weight(9, 4, 1, 1, 1)))
    narrow = graph.node("Relu", graph.line("x", (5, 4), 1, 3))
    both = graph.node("Concat", wide, narrow, axis=1)
    flat = graph.node("Flatten", both, axis=1)
    products = [graph.node("MatMul", flat, graph.weight(14 * 24, 3)) for _ in range(2)]
    first, second = (graph.node("Add", product, graph.weight(3)) for product in products)
    proto = graph.finish(graph.node("Mul", first, second), {"x": ["batch", 4, 2, 3, 4]})
    groups = Correlations.of(proto).groups.values()
    assert sorted(len(group.layers) for group in groups) == [1, 1, 1, 1]
    assert sorted(len(group.moments) for group in groups) == [4, 12, 336, 336]

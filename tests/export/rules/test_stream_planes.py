"""Plane by plane: layers, taps of lines, pools, borders and batches, in the order of a stream."""

import numpy as np
import onnx
import pytest

from dcformer_deploy.export.rules.plane_sums import Tap, _with_centre
from graphs import EXACT, GraphBuilder, difference, only, operators, run, volume

LINES = {"lines_d": (slice(None), slice(None, None, 4), slice(None, None, 4)),
         "lines_h": (slice(None, None, 4), slice(None), slice(None, None, 4)),
         "lines_w": (slice(None, None, 4), slice(None, None, 4), slice(None))}


def stem(depth: int, layers: int, pool: bool) -> onnx.ModelProto:
    graph = GraphBuilder()
    y = graph.star("volume", (24, 1), 7, stride=4)
    for _ in range(layers - 1):
        y = graph.star(y, (24, 24), 3)
    if pool:
        y = graph.node("MaxPool", y, kernel_shape=[3] * 3, strides=[2] * 3, pads=[1] * 6)
    return graph.finish(graph.node("Conv", y, graph.weight(5, 24, 1, 1, 1)), {"volume": ["batch", 1, depth, 20, 28]})


def lines_of(x: np.ndarray) -> dict[str, np.ndarray]:
    return {name: x[:, :, *taken].copy() for name, taken in LINES.items()}


@pytest.mark.parametrize("depth", [4, 8, 12, 28])
@pytest.mark.parametrize("pool", [False, True])
def test_stem_of_lines(depth, pool):
    before = stem(depth, 4, pool)
    lines, _ = only(before, "compose_stem", "merge_branches", "line_input")
    after, report = only(lines, "stream_planes")
    assert report.matched == 19 + pool  # 3 taps, their concatenation, 3 layers of 5 nodes, the pool
    weights = {tensor.name: tensor.dims for tensor in after.graph.initializer}
    ranks = [len(weights[node.input[1]]) for node in after.graph.node if node.op_type == "Conv"]
    assert ranks.count(5) == 1  # what reads the stem
    x = volume(3, 1, depth, 20, 28)
    assert difference(run(after, **lines_of(x)), run(before, volume=x)) < EXACT


@pytest.mark.parametrize("rules", [(), ("merge_branches",), ("compose_stem",), ("line_input",),
                                   ("compose_stem", "merge_branches")])
def test_with_and_without_the_other_rules(rules):
    before = stem(20, 3, pool=True)
    first = only(before, *rules)[0] if rules else before
    after, report = only(first, "stream_planes")
    assert report.matched
    x = volume(2, 1, 20, 20, 28)
    feeds = lines_of(x) if "line_input" in rules else {"volume": x}
    assert difference(run(after, **feeds), run(before, volume=x)) < EXACT


def test_one_hot_taps_are_copied():
    lines, _ = only(stem(16, 2, pool=False), "compose_stem", "merge_branches", "line_input")
    after, _ = only(lines, "stream_planes")
    per_plane = 4  # H, W and the planes before and behind
    assert operators(after).count("Conv") == 4 * (2 + per_plane) - 2 + 1  # two border terms are left out; the reader


def test_a_layer_starts_when_it_can():
    """Every plane is read soon after it is written: the graph's order is that of a stream."""
    lines, _ = only(stem(64, 4, pool=True), "compose_stem", "merge_branches", "line_input")
    after, _ = only(lines, "stream_planes")
    nodes = list(after.graph.node)
    assert len(nodes) > 300
    written = {name: index for index, node in enumerate(nodes) for name in node.output}
    sums = {"Conv", "Add"}
    distances = [index - written[name] for index, node in enumerate(nodes) if node.op_type in sums
                 for name in node.input if name in written and nodes[written[name]].op_type in sums]
    assert max(distances) < 80


def test_batch_neighbours_do_not_meet():
    before = stem(8, 3, pool=False)
    after, _ = only(before, "stream_planes")
    x = volume(2, 1, 8, 20, 28)
    together = run(after, volume=x)
    x[1] = 100
    assert (run(after, volume=x)[0] == together[0]).all()


def test_sums_with_what_is_no_convolution():
    graph = GraphBuilder()
    first = graph.star("volume", (6, 1), 3)
    second = graph.node("Add", graph.star(first, (6, 6), 3), first)
    before = graph.finish(graph.node("Relu", second), {"volume": [2, 1, 5, 6, 7]})
    after, report = only(before, "stream_planes")
    assert report.matched == 11
    # Per plane 3 of the first layer, computed once though two read it, and 4 of the second; less 2 at the borders.
    assert operators(after).count("Conv") == 5 * (3 + 4) - 2
    x = volume(2, 1, 5, 6, 7)
    assert difference(run(after, volume=x), run(before, volume=x)) < EXACT


@pytest.mark.parametrize("shape", [{"length": 5}, {"length": 3, "group": 6}])
def test_volumes_of_many_channels_are_no_source(shape):
    graph = GraphBuilder()
    before = graph.finish(graph.star("x", (6, 6 // shape.get("group", 1)), **shape), {"x": ["batch", 6, 3, 5, 7]})
    after, report = only(before, "stream_planes")
    assert report.matched == 0
    assert after == before


def test_several_readers_of_several_layers_are_refused():
    graph = GraphBuilder()
    first = graph.star("volume", (6, 1), 3)
    second = graph.star(first, (6, 6), 3)
    both = graph.node("Mul", graph.node("Relu", first), graph.node("Relu", second))
    _, report = only(graph.finish(both, {"volume": [1, 1, 5, 6, 7]}), "stream_planes")
    assert report.matched == 0
    assert "2 volumes are read by other operators" in report.refused[0]


@pytest.mark.parametrize("tap", [{"length": 2, "pads": 1, "dilation": 2}, {"length": 3, "pads": 1, "dilation": 1}])
@pytest.mark.parametrize("axis", [0, 1])
def test_centres_are_merged(tap, axis):
    random = np.random.default_rng(0)
    shape = [4, 3, 1, 1]
    shape[2 + axis] = tap["length"]
    pads, dilations = [(0, 0), (0, 0)], [1, 1]
    pads[axis], dilations[axis] = (tap["pads"],) * 2, tap["dilation"]
    weight, centre = random.standard_normal(shape), random.standard_normal((4, 3, 1, 1))
    merged = _with_centre(Tap(None, 1, 0, weight, (1, 1), tuple(pads), tuple(dilations)), centre)  # type: ignore[arg-type]
    line = merged.weight.reshape(4, 3, 3)
    assert merged.dilations == (1, 1)
    was = weight.reshape(4, 3, -1)
    expected = was[:, :, 1] + centre[:, :, 0, 0] if tap["length"] == 3 else centre[:, :, 0, 0]
    assert (line[:, :, 1] == expected).all()
    assert (line[:, :, [0, 2]] == was[:, :, [0, -1]]).all()

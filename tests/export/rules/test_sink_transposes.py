"""Transposes move towards the outputs and cancel there."""

import numpy as np

from graphs import EXACT, GraphBuilder, difference, only, operators, run, volume


def test_permuted_volume_through_convolutions_sum_and_pool():
    """The beginning of DCFormer: kernels of different lengths and strides per axis, so that a mistake shows."""
    graph = GraphBuilder()
    x = graph.node("Transpose", "x", perm=[0, 1, 3, 4, 2])
    a = graph.node("Conv", x, graph.weight(4, 2, 5, 1, 1), kernel_shape=[5, 1, 1], pads=[2, 0, 0, 1, 0, 0],
                   strides=[2, 1, 3], dilations=[1, 1, 1])
    b = graph.node("Conv", x, graph.weight(4, 2, 4, 1, 1), graph.weight(4), kernel_shape=[4, 1, 1],
                   pads=[1, 0, 0, 1, 0, 0], strides=[2, 1, 3])
    y = graph.node("MaxPool", graph.node("Gelu", graph.node("Add", a, b)), kernel_shape=[3] * 3, strides=[2] * 3,
                   pads=[1] * 6)
    before = graph.finish(graph.node("Transpose", y, perm=[0, 1, 4, 2, 3]), {"x": ["batch", 2, 7, 12, 6]})
    after, report = only(before, "sink_transposes")
    assert report.matched > 0
    assert operators(after) == ["Add", "Conv", "Conv", "Gelu", "MaxPool"]
    x = volume(2, 2, 7, 12, 6)
    assert difference(run(after, x=x), run(before, x=x)) < EXACT


def test_moving_data_alone_is_exact_to_the_bit():
    graph = GraphBuilder()
    x = graph.node("Transpose", "x", perm=[0, 1, 3, 4, 2])
    y = graph.node("Transpose", graph.node("Gelu", x), perm=[0, 2, 3, 4, 1])
    before = graph.finish(y, {"x": [2, 3, 4, 5, 6]})
    after, _ = only(before, "sink_transposes")
    assert operators(after) == ["Gelu", "Transpose"]
    x = volume(2, 3, 4, 5, 6)
    np.testing.assert_array_equal(run(after, x=x), run(before, x=x))


def test_permuted_channels_are_left_alone():
    graph = GraphBuilder()
    x = graph.node("Transpose", "x", perm=[0, 4, 1, 2, 3])
    before = graph.finish(graph.line(x, (4, 6), 0, 3), {"x": [1, 3, 4, 5, 6]})
    after, report = only(before, "sink_transposes")
    assert report.matched == 0
    assert "it moves the batch or the channels" in report.refused[0]
    assert after == before


def test_pool_that_differs_by_axis_is_left_alone():
    graph = GraphBuilder()
    x = graph.node("Transpose", "x", perm=[0, 1, 3, 4, 2])
    y = graph.node("MaxPool", x, kernel_shape=[3, 3, 1], strides=[1, 1, 1])
    _, report = only(graph.finish(y, {"x": [1, 3, 4, 5, 6]}), "sink_transposes")
    assert report.matched == 0
    assert "kernel_shape differs from axis to axis" in report.refused[0]

"""Lines instead of the volume: the same numbers, to the bit."""

import numpy as np
import pytest

from dcformer_deploy.export.graph_files import describe_graph
from dcformer_deploy.runtime.volume import image_feeds
from graphs import GraphBuilder, only, run, volume


def test_same_numbers_to_the_bit(tmp_path):
    graph = GraphBuilder()
    before = graph.finish(graph.star("volume", (6, 1), 7, stride=4), {"volume": ["batch", 1, 12, 20, 28]})
    after, report = only(before, "line_input")
    assert report.matched == 3
    (tmp_path / "g.onnx").write_bytes(after.SerializeToString())
    inputs = describe_graph("image", tmp_path / "g.onnx").inputs
    assert {info.name: info.axes for info in inputs} == {
        "lines_d": ("batch", 1, 12, 5, 7), "lines_h": ("batch", 1, 3, 20, 7), "lines_w": ("batch", 1, 3, 5, 28)}
    x = volume(2, 1, 12, 20, 28)
    np.testing.assert_array_equal(run(after, **image_feeds(inputs, x[:, 0])), run(before, volume=x))


@pytest.mark.parametrize(("length", "stride", "sides", "reason"), [
    (7, 1, (12, 20, 28), "stride 1"),
    (7, 4, (12, 20, 30), "side 30 of axis 2 is no multiple of the stride 4")])
def test_what_needs_every_voxel_is_left_alone(length: int, stride: int, sides: tuple[int, ...], reason: str):
    graph = GraphBuilder()
    before = graph.finish(graph.star("volume", (6, 1), length, stride=stride), {"volume": ["batch", 1, *sides]})
    after, report = only(before, "line_input")
    assert report.matched == 0
    assert reason in report.refused[0]
    assert after == before


def test_other_readers_of_the_volume_forbid_it():
    graph = GraphBuilder()
    star = graph.star("volume", (6, 1), 7, stride=4)
    y = graph.node("Add", star, graph.node("ReduceMean", "volume", keepdims=1))
    _, report = only(graph.finish(y, {"volume": ["batch", 1, 12, 20, 28]}), "line_input")
    assert report.matched == 0
    assert "a ReduceMean reads the whole volume" in report.refused[0]


def test_dense_kernels_forbid_it():
    graph = GraphBuilder()
    y = graph.node("Conv", "volume", graph.weight(6, 1, 3, 3, 3), kernel_shape=[3] * 3, strides=[2] * 3, pads=[1] * 6)
    _, report = only(graph.finish(y, {"volume": ["batch", 1, 12, 20, 28]}), "line_input")
    assert report.matched == 0
    assert "kernel [3, 3, 3] does not run along one axis" in report.refused[0]

"""Volumes as images: each axis, points, what lies between, batches, and what is left alone."""

import pytest

from graphs import EXACT, GraphBuilder, difference, only, operators, run, volume


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("length", [3, 13])
def test_depthwise(axis, length):
    graph = GraphBuilder()
    y = graph.line("x", (6, 1), axis, length, group=6)
    before = graph.finish(y, {"x": ["batch", 6, 4, 5, 7]})
    after, report = only(before, "flatten_convolutions")
    assert report.matched == 1
    assert operators(after) == ["Conv", "Reshape", "Reshape"]
    assert report.after.multiply_adds == report.before.multiply_adds
    x = volume(3, 6, 4, 5, 7)
    assert difference(run(after, x=x), run(before, x=x)) < EXACT


def test_block():
    """Depthwise branches, their sum, and the MLP: one view in and one out of the MLP."""
    graph = GraphBuilder()
    y = graph.star("x", (6, 1), 5, group=6)
    hidden = graph.node("Conv", y, graph.weight(24, 6, 1, 1, 1), graph.weight(24))
    out = graph.node("Conv", graph.node("Gelu", hidden), graph.weight(6, 24, 1, 1, 1), graph.weight(6))
    before = graph.finish(graph.node("Add", "x", out), {"x": ["batch", 6, 4, 5, 7]})
    after, _ = only(before, "flatten_convolutions")
    assert operators(after).count("Reshape") == 8
    assert all(len(node.attribute[0].ints) == 2 for node in after.graph.node if node.op_type == "Conv")
    x = volume(2, 6, 4, 5, 7)
    assert difference(run(after, x=x), run(before, x=x)) < EXACT


@pytest.mark.parametrize(("make", "reason"), [
    (lambda g: g.line("x", (6, 6), 0, 3), "neither depthwise nor of one voxel"),
    (lambda g: g.line("x", (6, 1), 0, 3, stride=2, group=6), "strides or dilations"),
    (lambda g: g.node("Conv", "x", g.weight(6, 1, 3, 3, 3), group=6), "does not run along one axis"),
    (lambda g: g.node("Conv", "x", g.weight(6, 1, 2, 1, 1), group=6, pads=[1, 0, 0, 0, 0, 0]),
     "not the same on both sides"),
    (lambda g: g.node("Conv", "x", g.weight(6, 3, 1, 1, 1), group=2), "neither depthwise nor of one voxel"),
])
def test_others_are_left_alone(make, reason):
    graph = GraphBuilder()
    before = graph.finish(make(graph), {"x": [2, 6, 4, 5, 7]})
    after, report = only(before, "flatten_convolutions")
    assert report.matched == 0
    assert reason in report.refused[0]
    assert after == before

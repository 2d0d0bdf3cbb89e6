"""Biases once, and centre taps once where that saves work."""

from graphs import EXACT, GraphBuilder, difference, only, operators, run, volume


def _star(length: int, group: int = 1):
    graph = GraphBuilder()
    return graph.finish(graph.star("x", (8, 8 // group), length, group=group), {"x": ["batch", 8, 5, 3, 7]})


def test_seven_taps_instead_of_nine():
    before = _star(3)
    after, report = only(before, "merge_branches")
    assert report.matched == 1
    assert report.before.multiply_adds * 7 == report.after.multiply_adds * 9
    assert operators(after) == operators(before)
    assert sorted(len(node.input) for node in after.graph.node if node.op_type == "Conv") == [2, 2, 3]
    x = volume(2, 8, 5, 3, 7)
    assert difference(run(after, x=x), run(before, x=x)) < EXACT


def test_long_and_depthwise_kernels_share_a_bias_only():
    for before in (_star(5), _star(5, group=8), _star(3, group=8)):
        after, report = only(before, "merge_branches")
        assert report.matched == 1
        assert report.before.multiply_adds == report.after.multiply_adds
        x = volume(2, 8, 5, 3, 7)
        assert difference(run(after, x=x), run(before, x=x)) < EXACT


def test_merged_branches_are_left_alone():
    once, _ = only(_star(5), "merge_branches")
    twice, report = only(once, "merge_branches")
    assert report.matched == 0
    assert "the biases are merged already" in report.refused[0]
    assert twice == once


def test_branches_of_different_inputs_are_left_alone():
    graph = GraphBuilder()
    a, b, c = (graph.line(x, (8, 8), axis, 3) for axis, x in enumerate(("x", "x", "y")))
    shape = ["batch", 8, 5, 3, 7]
    _, report = only(graph.finish(graph.node("Add", graph.node("Add", a, b), c), {"x": shape, "y": shape}),
                     "merge_branches")
    assert (report.matched, report.refused) == (0, ())

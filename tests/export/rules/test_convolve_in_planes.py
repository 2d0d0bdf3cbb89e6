"""Three-dimensional layers in two dimensions: several in a row, what is before and behind them, and batches."""

from graphs import EXACT, GraphBuilder, difference, only, operators, run, volume


def test_two_layers_and_a_pool():
    graph = GraphBuilder()
    y = graph.star(graph.star("x", (8, 6), 3), (8, 8), 3)
    pool = graph.node("MaxPool", y, kernel_shape=[3] * 3, strides=[2] * 3, pads=[1] * 6)
    before = graph.finish(pool, {"x": ["batch", 6, 4, 6, 10]})
    after, report = only(before, "merge_branches", "convolve_in_planes")
    assert report.matched > 2
    assert report.before.multiply_adds == report.after.multiply_adds
    assert operators(after).count("Transpose") == 2  # before the first layer and behind the pool in the planes
    assert all(len(node.attribute[0].ints) == 2 for node in after.graph.node if node.op_type == "Conv")
    x = volume(3, 6, 4, 6, 10)
    assert difference(run(after, x=x), run(before, x=x)) < EXACT


def test_batch_neighbours_do_not_meet():
    """The first plane of one volume follows the last of another; neither may see the other."""
    graph = GraphBuilder()
    before = graph.finish(graph.star("x", (8, 6), 3), {"x": ["batch", 6, 3, 5, 7]})
    after, report = only(before, "merge_branches", "convolve_in_planes")
    assert report.matched == 1
    x = volume(2, 6, 3, 5, 7)
    together = run(after, x=x)
    assert difference(together, run(before, x=x)) < EXACT
    x[1] = 100
    assert (run(after, x=x)[0] == together[0]).all()


def test_taps_of_lines_stay_in_their_planes():
    graph = GraphBuilder()
    first = graph.star("volume", (24, 1), 7, stride=4)
    before = graph.finish(graph.star(first, (24, 24), 3), {"volume": ["batch", 1, 12, 20, 28]})
    lines, _ = only(before, "compose_stem", "merge_branches", "line_input")
    after, report = only(lines, "convolve_in_planes")
    assert report.matched == 4  # the layer, its concatenated input, and the taps along H and W
    feeds = {"lines_d": (slice(None), slice(None, None, 4), slice(None, None, 4)),
             "lines_h": (slice(None, None, 4), slice(None), slice(None, None, 4)),
             "lines_w": (slice(None, None, 4), slice(None, None, 4), slice(None))}
    x = volume(2, 1, 12, 20, 28)
    found = run(after, **{name: x[:, :, *taken].copy() for name, taken in feeds.items()})
    assert difference(found, run(before, volume=x)) < EXACT


def test_other_kernels_are_left_alone():
    for star in ({"length": 5}, {"length": 3, "group": 6}):
        graph = GraphBuilder()
        group = star.get("group", 1)
        before = graph.finish(graph.star("x", (6, 6 // group), **star), {"x": ["batch", 6, 3, 5, 7]})
        merged, _ = only(before, "merge_branches")
        after, report = only(merged, "convolve_in_planes")
        assert report.matched == 0
        assert "not kernels of length 3 over all channels" in report.refused[0]
        assert after == merged

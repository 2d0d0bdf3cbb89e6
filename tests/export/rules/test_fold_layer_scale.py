"""One factor per channel goes into the convolution before it."""

import numpy as np
import pytest

from graphs import EXACT, GraphBuilder, difference, only, operators, run, volume


def _scaled(*shape: int):
    graph = GraphBuilder()
    factor = graph.constant(np.random.default_rng(1).uniform(0.5, 2, shape).astype(np.float32))
    return graph.finish(graph.node("Mul", factor, graph.line("x", (6, 4), 1, 3)), {"x": ["batch", 4, 3, 5, 7]})


@pytest.mark.parametrize("shape", [(6, 1, 1, 1), (1, 6, 1, 1, 1)])
def test_same_numbers_without_the_product(shape: tuple[int, ...]):
    before = _scaled(*shape)
    after, report = only(before, "fold_layer_scale")
    assert report.matched == 1
    assert operators(after) == ["Conv"]
    x = volume(2, 4, 3, 5, 7)
    assert difference(run(after, x=x), run(before, x=x)) < EXACT


def test_other_factors_are_left_alone():
    after, report = only(_scaled(1, 1, 1, 1, 7), "fold_layer_scale")
    assert report.matched == 0
    assert "[1, 1, 1, 1, 7] is not one number per channel" in report.refused[0]
    assert operators(after) == ["Conv", "Mul"]

"""MLPs between transposes become convolutions of length 1."""

import pytest

from graphs import EXACT, GraphBuilder, difference, only, operators, run, volume


def _mlp(**gelu: str):
    graph = GraphBuilder()
    hidden = graph.node("MatMul", graph.node("Transpose", "x", perm=[0, 2, 3, 4, 1]), graph.weight(6, 24))
    hidden = graph.node("Gelu", graph.node("Add", hidden, graph.weight(24)), **gelu)
    back = graph.node("Add", graph.node("MatMul", hidden, graph.weight(24, 6)), graph.weight(6))
    return graph.finish(graph.node("Transpose", back, perm=[0, 4, 1, 2, 3]), {"x": ["batch", 6, 3, 5, 7]})


def test_same_numbers_without_transposes():
    before = _mlp()
    after, report = only(before, "mlp_to_convolutions")
    assert report.matched == 1
    assert operators(after) == ["Conv", "Conv", "Gelu"]
    assert report.before.multiply_adds == report.after.multiply_adds == 2 * 6 * 24 * 3 * 5 * 7
    x = volume(2, 6, 3, 5, 7)
    assert difference(run(after, x=x), run(before, x=x)) < EXACT


def test_approximate_gelu_is_left_alone():
    after, report = only(_mlp(approximate="tanh"), "mlp_to_convolutions")
    assert report.matched == 0
    assert "the Gelu is approximate" in report.refused[0]
    assert "MatMul" in operators(after)


@pytest.mark.parametrize("perm", [[0, 3, 2, 4, 1]])
def test_other_permutations_do_not_match(perm: list[int]):
    graph = GraphBuilder()
    y = graph.node("MatMul", graph.node("Transpose", "x", perm=perm), graph.weight(6, 6))
    _, report = only(graph.finish(y, {"x": [1, 6, 3, 5, 7]}), "mlp_to_convolutions")
    assert (report.matched, report.refused) == (0, ())

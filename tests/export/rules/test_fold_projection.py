"""The projection of a mean is a mean of projections, where the mean is over all tokens and the table gets no wider."""

import numpy as np
import onnx
import pytest

from graphs import EXACT, GraphBuilder, difference, only, operators, run

TOKENS = (2, 3, 4)


def _tail(width: int, latent: int, axes: tuple[int, ...], stacked: bool = True, transposed: bool = True,
          bias: bool = False) -> onnx.ModelProto:
    graph = GraphBuilder()
    table = graph.weight(*[1] * stacked, 50, width)
    if stacked:
        table = graph.node("Gather", table, graph.constant(np.array(0)), axis=0)
    similar = graph.node("MatMul", "tokens", graph.node("Transpose", table, perm=[1, 0]))
    codes = graph.node("ArgMax", similar, axis=-1, keepdims=0)
    vectors = graph.node("Reshape", graph.node("Gather", table, codes, axis=0),
                         graph.constant(np.array([-1, *TOKENS, width])), allowzero=1)
    mean = graph.node("ReduceMean", vectors, graph.constant(np.array(axes)), keepdims=0)
    if len(axes) < 3:
        mean = graph.node("Flatten", mean, axis=1)
    kept = width * int(np.prod([side for axis, side in enumerate(TOKENS, 1) if axis not in axes]))
    weight = graph.weight(*((latent, kept) if transposed else (kept, latent)))
    out = graph.node("Gemm", mean, weight, *[graph.weight(latent)] * bias, transB=int(transposed))
    return graph.finish(out, {"tokens": ["batch", 24, width]})


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_projection_goes_into_the_table(stacked, transposed):
    before = _tail(32, 12, (1, 2, 3), stacked, transposed)
    after, report = only(before, "fold_projection")
    assert report.matched == 1
    assert "Gemm" not in operators(after)
    x = np.random.default_rng(3).standard_normal((3, 24, 32)).astype(np.float32)
    assert difference(run(after, tokens=x), run(before, tokens=x)) < EXACT


@pytest.mark.parametrize(("arguments", "reason"), [
    ((12, 32, (1, 2, 3)), "32 numbers a token would be looked up instead of 12"),
    ((12, 12, (1, 2, 3)), "12 numbers a token would be looked up instead of 12"),
])
def test_wider_tables_are_refused(arguments, reason):
    before = _tail(*arguments)
    after, report = only(before, "fold_projection")
    assert after == before
    assert reason in report.refused[0]


@pytest.mark.parametrize("options", [{"axes": (1,)}, {"axes": (1, 2, 3), "bias": True}])
def test_tokens_kept_apart_and_biases_are_left_alone(options):
    before = _tail(32, 12, **options)
    after, report = only(before, "fold_projection")
    assert (after, report.matched) == (before, 0)

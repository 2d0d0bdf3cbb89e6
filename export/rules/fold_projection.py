"""The latent projection into the codebook: a lookup and a mean instead of a lookup, a mean and a product.

    Before: y = W mean_t(E[c_t])       E the codes' vectors [N, C], c_t the code of token t, W [L, C]
    After:  y = mean_t(E'[c_t])        E' = E W^T, computed once, [N, L]

A mean over tokens is linear, so the projection of the mean is the mean of the projections. It needs the reduction
"channel": where tokens are kept apart (``depth``, ``none``), W sees their places and no table can. E itself stays, as
the nearest code is looked for in it. Refused where L >= C (nano, naive): looking up longer vectors reads more than the
product does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .base import Refused, Rule, array_of


class FoldProjection(Rule):
    """See the module."""

    title = "fold_projection"

    def __init__(self) -> None:
        super().__init__()
        self.remove_nodes = False  # the table has another reader

    def pattern(self, op: Any, table: Any, codes: Any, shape: Any, axes: Any, weight: Any) -> Any:
        """See onnxscript."""
        vectors = op.Reshape(op.Gather(table, codes, _outputs=["looked_up"]), shape)
        return op.Gemm(op.ReduceMean(vectors, axes, _outputs=["mean"]), weight, _outputs=["projected"])

    def require(self, **bound: ir.Value) -> None:
        """Constant table and weight; a mean over all axes between the batch and the channels; no bias, no scales."""
        table, weight = _table(bound["table"]), array_of(bound["weight"], "the projection")
        shape = array_of(bound["shape"], "the shape of the tokens")
        if _attribute(bound["looked_up"], "axis", 0) != 0 or _attribute(bound["mean"], "keepdims", 1) != 0:
            raise Refused("not the mean of looked-up vectors")
        if array_of(bound["axes"], "the axes").tolist() != list(range(1, shape.size - 1)):
            raise Refused("the mean keeps tokens apart")
        node = bound["projected"].producer()
        assert node is not None
        if node.attributes.get_float("alpha", 1.0) != 1 or _attribute(bound["projected"], "transA", 0):
            raise Refused("not a plain projection")
        width = weight.shape[0 if _attribute(bound["projected"], "transB", 0) else 1]
        if shape[-1] != table.shape[1] or width >= table.shape[1]:
            raise Refused(f"{width} numbers a token would be looked up instead of {table.shape[1]}")

    def rewrite(self, op: Any, table: ir.Value, codes: ir.Value, shape: ir.Value, axes: ir.Value, weight: ir.Value,
                projected: ir.Value, **_: ir.Value) -> Any:
        """See onnxscript."""
        matrix = array_of(weight, "the projection").astype(np.float64)
        matrix = matrix if not _attribute(projected, "transB", 0) else matrix.T
        folded = (_table(table).astype(np.float64) @ matrix).astype(np.float32)
        sides = array_of(shape, "the shape of the tokens").copy()
        sides[-1] = folded.shape[1]
        vectors = op.Gather(self.constant(op, folded, str(weight.name)), codes, axis=0)
        tokens = op.Reshape(vectors, self.constant(op, sides, str(weight.name)), allowzero=1)
        return op.ReduceMean(tokens, axes, keepdims=0)


def _table(value: ir.Value) -> NDArray[np.float32]:
    """``[N, C]``: a constant, or the only entry along the first axis of one."""
    node = value.producer()
    if node is None or node.op_type != "Gather":
        table = array_of(value, "the table")
    else:
        stacked, index = node.inputs[0], node.inputs[1]
        table = array_of(stacked, "the table")
        if len(table) != 1 or array_of(index, "the index").tolist() != 0 or node.attributes.get_int("axis", 0) != 0:
            raise Refused("the table is not a constant")
        table = table[0]
    if table.ndim != 2:
        raise Refused(f"a table of {table.ndim} axes")
    return table


def _attribute(value: ir.Value, name: str, default: int) -> int:
    node = value.producer()
    assert node is not None
    return node.attributes.get_int(name, default)


RULES = (FoldProjection,)

"""MLPs on the channel axis as convolutions of length 1, which leave no transposes.

    Before: t = Transpose(x; to channels last);  y = Transpose(Gelu(t W1 + b1) W2 + b2; back)
    After:  y = Conv(Gelu(Conv(x; W1^T, b1)); W2^T, b2)

Both sum over the same channels at the same position, so only the order of summation differs. Needs constant weights and
the exact Gelu.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .base import Refused, Rule, array_of

_LAST, _BACK = [0, 2, 3, 4, 1], [0, 4, 1, 2, 3]


class MlpToConvolutions(Rule):
    """See the module."""

    title = "mlp_to_convolutions"

    def pattern(self, op: Any, x: Any, w1: Any, b1: Any, w2: Any, b2: Any) -> Any:
        """See onnxscript."""
        hidden = op.Gelu(op.Add(op.MatMul(op.Transpose(x, perm=_LAST), w1), b1), _outputs=["hidden"])
        return op.Transpose(op.Add(op.MatMul(hidden, w2), b2), perm=_BACK)

    def require(self, **bound: ir.Value) -> None:
        """Constant matrices and vectors; the Gelu with erf."""
        for name in ("w1", "w2", "b1", "b2"):
            if array_of(bound[name], name).ndim != (2 if name.startswith("w") else 1):
                raise Refused(f"{name} has another rank than a Linear's")
        gelu = bound["hidden"].producer()
        assert gelu is not None
        if gelu.attributes.get_string("approximate", "none") != "none":
            raise Refused("the Gelu is approximate")

    def rewrite(self, op: Any, x: ir.Value, w1: ir.Value, b1: ir.Value, w2: ir.Value, b2: ir.Value,
                **_: ir.Value) -> Any:
        """See onnxscript."""
        hidden = op.Gelu(op.Conv(x, *self._weights(op, w1, b1), kernel_shape=[1, 1, 1]))
        return op.Conv(hidden, *self._weights(op, w2, b2), kernel_shape=[1, 1, 1])

    def _weights(self, op: Any, matrix: ir.Value, vector: ir.Value) -> list[ir.Value]:
        name = str(vector.name).removesuffix(".bias")
        kernel: NDArray[np.float32] = array_of(matrix, "w").T[:, :, None, None, None]
        return [self.constant(op, kernel, f"{name}.weight"), self.constant(op, array_of(vector, "b"), f"{name}.bias")]


RULES = (MlpToConvolutions,)

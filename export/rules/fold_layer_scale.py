"""LayerScale into the convolution before it.

    Before: y = gamma * Conv(x; W, b), gamma one number per channel
    After:  y = Conv(x; gamma W, gamma b)

One rounding less; needs constants.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx_ir as ir

from .base import Refused, Rule, array_of
from .convolution import convolution_of


class FoldLayerScale(Rule):
    """See the module."""

    title = "fold_layer_scale"

    def pattern(self, op: Any, gamma: Any, x: Any) -> Any:
        """See onnxscript."""
        return op.Mul(gamma, op.Conv(x, _allow_other_inputs=True, _outputs=["inner"]))

    def require(self, **bound: ir.Value) -> None:
        """One constant factor for each output channel."""
        shape = array_of(bound["gamma"], "the factor").shape
        wanted = (convolution_of(bound["inner"]).out_channels, 1, 1, 1)
        if shape not in (wanted, (1, *wanted)):
            raise Refused(f"a factor of shape {list(shape)} is not one number per channel")

    def rewrite(self, op: Any, gamma: ir.Value, inner: ir.Value, **_: ir.Value) -> Any:
        """See onnxscript."""
        convolution = convolution_of(inner)
        factor = array_of(gamma, "the factor").reshape(-1)
        bias = None if convolution.bias is None else convolution.bias * factor
        weight = convolution.weight * factor.reshape(-1, 1, 1, 1, 1)
        return replace(convolution, weight=weight, bias=bias).emit(op, self)


RULES = (FoldLayerScale,)

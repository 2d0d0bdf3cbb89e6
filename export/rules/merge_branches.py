"""The constant parts of a decomposed convolution's three branches, and their centre taps, once instead of thrice.

    Before: y = sum_a (K_a * x + b_a),  K_a along axis a
    After:  y = (K_0 + centres of K_1 and K_2) * x + (b_0 + b_1 + b_2)  +  sum_{a = 1, 2} (K_a without its centre) * x

All three centre taps multiply x at the position itself. For kernels of length 3 over all channels, the two branches
without a centre become kernels of length 2 with dilation 2: 7 multiply-adds instead of 9 per pair of channels. Longer
kernels, and those of one channel each, keep their taps, as a hole in them saves nothing; their biases are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from .base import Refused, Rule
from .convolution import Convolution, star_of


class MergeBranches(Rule):
    """See the module."""

    title = "merge_branches"

    def pattern(self, op: Any, x: Any) -> Any:
        """See onnxscript."""
        a, b, c = (op.Conv(x, _allow_other_inputs=True, _outputs=[name]) for name in ("first", "second", "third"))
        return op.Add(op.Add(a, b), c)

    def require(self, **bound: ir.Value) -> None:
        """Three branches with something to merge."""
        branches = star_of(bound["first"], bound["second"], bound["third"])
        if all(branch.bias is None for branch in branches[1:]):
            raise Refused("the biases are merged already")

    def rewrite(self, op: Any, first: ir.Value, second: ir.Value, third: ir.Value, **_: ir.Value) -> Any:
        """See onnxscript."""
        branches = _merge(star_of(first, second, third))
        a, b, c = (branch.emit(op, self) for branch in branches)
        return op.Add(op.Add(a, b), c)


def _merge(star: Sequence[Convolution]) -> list[Convolution]:
    bias = np.sum([branch.bias_or_zero for branch in star], axis=0, dtype=np.float64).astype(np.float32)
    head, *others = star
    others = [replace(branch, bias=None) for branch in others]
    if head.group == 1 and all(branch.kernel[branch.axis] == 3 for branch in star):
        weight = head.weight.astype(np.float64)
        weight[:, :, *_centre(head)] += np.sum([branch.line[:, :, 1] for branch in others], axis=0, dtype=np.float64)
        head = replace(head, weight=weight.astype(np.float32))
        others = [_without_centre(branch) for branch in others]
    return [replace(head, bias=bias), *others]


def _centre(branch: Convolution) -> tuple[int, ...]:
    return tuple(length // 2 for length in branch.kernel)


def _without_centre(branch: Convolution) -> Convolution:
    dilations = tuple(2 if axis == branch.axis else 1 for axis in range(3))
    weight = np.delete(branch.weight, 1, axis=2 + branch.axis)
    return replace(branch, weight=weight, dilations=dilations)


RULES = (MergeBranches,)

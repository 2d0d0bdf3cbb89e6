"""The permutation of the input into the kernels: transposes move towards the outputs until they meet and cancel.

    Conv(T(x); W)    = T(Conv(x; W with its axes permuted back)),  T a permutation of the three spatial axes
    MaxPool(T(x))    = T(MaxPool(x)), likewise
    Gelu(T(x))       = T(Gelu(x))
    T(a) + T(b)      = T(a + b)
    S(T(x))          = (S after T)(x), nothing if that is the identity

Only data moves: every number is the same (a convolution may sum in another order). What is left stands where the data
is smallest: DCFormer's whole volume is permuted once before, and a few tokens after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from .base import Refused, Rule
from .convolution import convolution_of


def permutation_of(value: ir.Value) -> tuple[int, ...]:
    """Of the Transpose that makes a value."""
    node = value.producer()
    assert node is not None
    perm = node.attributes.get_ints("perm", [])
    if not perm:
        raise Refused("a transpose without perm")
    return tuple(perm)


def _spatial(value: ir.Value) -> tuple[int, ...]:
    """Of the axes behind batch and channels: output axis i is input axis ``[i]``."""
    perm = permutation_of(value)
    if len(perm) != 5 or perm[:2] != (0, 1):
        raise Refused("it moves the batch or the channels")
    return tuple(axis - 2 for axis in perm[2:])


class _Sink(Rule):
    """A transpose stays where it is for its other readers, so nodes are only dropped once unused."""

    def __init__(self) -> None:
        super().__init__()
        self.remove_nodes = False


class SinkBelowConvolution(_Sink):
    """Conv(T(x))."""

    title = "sink_transposes_below_convolution"

    def pattern(self, op: Any, x: Any) -> Any:
        """See onnxscript."""
        return op.Conv(op.Transpose(x, _outputs=["moved"]), _allow_other_inputs=True, _outputs=["convolved"])

    def require(self, **bound: ir.Value) -> None:
        """The spatial axes alone."""
        _spatial(bound["moved"])
        convolution_of(bound["convolved"])

    def rewrite(self, op: Any, x: ir.Value, moved: ir.Value, convolved: ir.Value) -> Any:
        """See onnxscript."""
        convolution = convolution_of(convolved)
        back = np.argsort(_spatial(moved)).tolist()
        kernel = convolution.weight.transpose(0, 1, *(2 + axis for axis in back))
        turned = replace(convolution, weight=kernel, strides=_pick(convolution.strides, back),
                         pads=_pick(convolution.pads, back), dilations=_pick(convolution.dilations, back))
        return op.Transpose(turned.emit(op, self, x), perm=list(permutation_of(moved)))


class SinkBelowPooling(_Sink):
    """MaxPool(T(x))."""

    title = "sink_transposes_below_pooling"

    def pattern(self, op: Any, x: Any) -> Any:
        """See onnxscript."""
        return op.MaxPool(op.Transpose(x, _outputs=["moved"]), _outputs=["pooled"])

    def require(self, **bound: ir.Value) -> None:
        """The spatial axes alone; the same window along each."""
        _spatial(bound["moved"])
        node = bound["pooled"].producer()
        assert node is not None
        for name in ("kernel_shape", "strides", "pads", "dilations"):
            if len(set(node.attributes.get_ints(name, [1]))) > 1:
                raise Refused(f"{name} differs from axis to axis")

    def rewrite(self, op: Any, x: ir.Value, moved: ir.Value, pooled: ir.Value) -> Any:
        """See onnxscript."""
        node = pooled.producer()
        assert node is not None
        return op.Transpose(op.MaxPool(x, **node.attributes), perm=list(permutation_of(moved)))


class SinkBelowGelu(_Sink):
    """Gelu(T(x))."""

    title = "sink_transposes_below_gelu"

    def pattern(self, op: Any, x: Any) -> Any:
        """See onnxscript."""
        return op.Gelu(op.Transpose(x, _outputs=["moved"]), _outputs=["active"])

    def rewrite(self, op: Any, x: ir.Value, moved: ir.Value, active: ir.Value) -> Any:
        """See onnxscript."""
        node = active.producer()
        assert node is not None
        return op.Transpose(op.Gelu(x, **node.attributes), perm=list(permutation_of(moved)))


class SinkBelowSum(_Sink):
    """T(a) + T(b)."""

    title = "sink_transposes_below_sum"

    def pattern(self, op: Any, a: Any, b: Any) -> Any:
        """See onnxscript."""
        return op.Add(op.Transpose(a, _outputs=["first"]), op.Transpose(b, _outputs=["second"]))

    def require(self, **bound: ir.Value) -> None:
        """The same permutation of the same shape."""
        if permutation_of(bound["first"]) != permutation_of(bound["second"]):
            raise Refused("the two terms are permuted differently")

    def rewrite(self, op: Any, a: ir.Value, b: ir.Value, first: ir.Value, second: ir.Value) -> Any:
        """See onnxscript."""
        del second
        return op.Transpose(op.Add(a, b), perm=list(permutation_of(first)))


class MergeTransposes(_Sink):
    """S(T(x))."""

    title = "merge_transposes"

    def pattern(self, op: Any, x: Any) -> Any:
        """See onnxscript."""
        return op.Transpose(op.Transpose(x, _outputs=["first"]), _outputs=["second"])

    def rewrite(self, op: Any, x: ir.Value, first: ir.Value, second: ir.Value) -> Any:
        """See onnxscript."""
        merged = _pick(permutation_of(first), permutation_of(second))
        return op.Identity(x) if merged == tuple(range(len(merged))) else op.Transpose(x, perm=list(merged))


def _pick(values: Sequence[Any], order: Sequence[int]) -> tuple[Any, ...]:
    return tuple(values[index] for index in order)


RULES = (SinkBelowConvolution, SinkBelowPooling, SinkBelowGelu, SinkBelowSum, MergeTransposes)

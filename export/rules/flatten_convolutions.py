"""Convolutions along one axis, or none, over a volume seen as an image.

A library's two-dimensional convolutions are often better than its three-dimensional ones. In memory a volume
[B, C, D, H, W] is also an image, without moving a number, and a kernel along one axis stays within it:

    along D, depthwise:  [B, C, D, H W],  kernel (k, 1)
    along H, depthwise:  [B, C D, H, W],  kernel (k, 1), every channel's weights D times
    along W, or none:    [B, C, D H, W],  kernel (1, k)

The sums are the same. Views that cancel go, and Gelu moves between them. Whether it is faster is measured, not known
(``pipeline.MEASURED``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from .base import Refused, Rule, array_of, shape_of, sides_of
from .convolution import Convolution, convolution_of

_HEIGHT, _WIDTH = 1, 2


class FlattenConvolution(Rule):
    """One convolution, between two views."""

    title = "flatten_convolutions"

    def pattern(self, op: Any, x: Any) -> Any:
        """See onnxscript."""
        return op.Conv(x, _allow_other_inputs=True, _outputs=["convolved"])

    def require(self, **bound: ir.Value) -> None:
        """Depthwise along one axis, or over all channels at one place; no stride, fixed sides."""
        convolution = convolution_of(bound["convolved"])
        _axis(convolution)
        sides_of(convolution.x)

    def rewrite(self, op: Any, x: ir.Value, convolved: ir.Value) -> Any:
        """See onnxscript."""
        convolution = convolution_of(convolved)
        axis, (depth, height, width) = _axis(convolution), sides_of(x)
        weight, bias, times = convolution.line, convolution.bias, 1
        across = axis in (_WIDTH, None)
        if axis == _HEIGHT:
            times = depth
            weight = np.repeat(weight, depth, axis=0)
            bias = np.repeat(bias, depth) if bias is not None else None
        weight = weight[:, :, None] if across else weight[..., None]
        rest = (depth * height, width) if across else (height, width) if axis == _HEIGHT else (depth, height * width)
        groups, name = convolution.group * times, convolution.name
        view = _view(self, op, x, (weight.shape[1] * groups, *rest))
        inputs = [self.constant(op, weight, f"{name}.weight")]
        if bias is not None:
            inputs.append(self.constant(op, bias, f"{name}.bias"))
        pad = 0 if axis is None else convolution.pads[axis][0]
        flat = op.Conv(view, *inputs, kernel_shape=list(weight.shape[2:]), group=groups,
                       pads=[0, pad, 0, pad] if across else [pad, 0, pad, 0])
        flat.shape, flat.type = ir.Shape([_batch(x), len(weight), *rest]), x.type
        return _view(self, op, flat, (convolution.out_channels, depth, height, width))


class ViewOfView(Rule):
    """A view of a view."""

    title = "flatten_convolutions_view"

    def pattern(self, op: Any, x: Any, between: Any, shape: Any) -> Any:
        """See onnxscript."""
        return op.Reshape(op.Reshape(x, between), shape)

    def require(self, **bound: ir.Value) -> None:
        """Both keep the batch as it is, and it is known what is seen."""
        shape_of(bound["x"])
        for name in ("between", "shape"):
            if array_of(bound[name], "the shape")[0] != 0:
                raise Refused("not a view of this rule")

    def rewrite(self, op: Any, x: ir.Value, shape: ir.Value, **_: ir.Value) -> Any:
        """See onnxscript."""
        if shape_of(x)[1:] == tuple(array_of(shape, "the shape")[1:].tolist()):
            return op.Identity(x)
        return op.Reshape(x, shape)


class GeluOfView(Rule):
    """Gelu before the view, so that views meet."""

    title = "flatten_convolutions_gelu"

    def pattern(self, op: Any, x: Any, shape: Any) -> Any:
        """See onnxscript."""
        return op.Gelu(op.Reshape(x, shape), _outputs=["y"])

    def require(self, **bound: ir.Value) -> None:
        """A view that keeps the batch."""
        if array_of(bound["shape"], "the shape")[0] != 0:
            raise Refused("not a view of this rule")

    def rewrite(self, op: Any, x: ir.Value, shape: ir.Value, y: ir.Value) -> Any:
        """See onnxscript."""
        node = y.producer()
        assert node is not None
        activated = op.Gelu(x, approximate=node.attributes.get_string("approximate", "none"))
        activated.shape, activated.type = x.shape, x.type
        return op.Reshape(activated, shape)


def _view(rule: Rule, op: Any, x: ir.Value, sides: tuple[int, ...]) -> ir.Value:
    return op.Reshape(x, rule.constant(op, np.array([0, *sides], np.int64), "view"))


def _batch(x: ir.Value) -> Any:
    assert x.shape is not None
    return x.shape[0]


def _axis(convolution: Convolution) -> int | None:
    """The axis of a depthwise kernel; None for a kernel of one voxel over all channels."""
    if set(convolution.strides) != {1} or set(convolution.dilations) != {1}:
        raise Refused("strides or dilations")
    if convolution.kernel == (1, 1, 1) and convolution.group == 1:
        return None
    if convolution.group == 1 or convolution.weight.shape[1] != 1 or convolution.group != convolution.out_channels:
        raise Refused("neither depthwise nor of one voxel")
    before, after = convolution.pads[convolution.axis]
    if before != after:
        raise Refused("the padding is not the same on both sides")
    return convolution.axis



RULES = (FlattenConvolution, ViewOfView, GeluOfView)

"""Decomposed convolutions over all channels in two dimensions, for libraries that are fast only there.

With [B, C, D, H, W] seen as B D planes [B D, C, H, W], a kernel along H or W stays in its plane, and a kernel of length
3 along D is a product with the plane before and the plane behind, zero outside the volume:

    Before: y = K_d * x + K_h * x + K_w * x
    After:  y_d = K'_h * x_d + K'_w * x_d + K_d[0] x_{d-1} + K_d[2] x_{d+1}

where K'_h has the centre taps of all three and K'_w none (see ``merge_branches``, which comes first). The sum runs in
another order, no more. A max-pool behind it takes the maximum in the planes first and along D afterwards, which is the
same maximum. Planes are taken apart once before the first of several such convolutions and put together after the last.

Where this is faster is measured, not known (``choose``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from .base import Refused, Rule, array_of, shape_of
from .convolution import Convolution, convolution_of

_APART = [0, 2, 1, 3, 4]


@dataclass(frozen=True)
class _Star:
    """The three branches, D first; ``sides`` of the volume (D, H, W)."""

    d: Convolution
    h: Convolution
    w: Convolution
    sides: tuple[int, int, int]


class ConvolveInPlanes(Rule):
    """One decomposed convolution, with the planes taken apart before and put together after it."""

    title = "convolve_in_planes"

    def pattern(self, op: Any, x: Any) -> Any:
        """See onnxscript."""
        a, b, c = (op.Conv(x, _allow_other_inputs=True, _outputs=[name]) for name in ("first", "second", "third"))
        return op.Add(op.Add(a, b), c)

    def require(self, **bound: ir.Value) -> None:
        """Kernels of length 3 over all channels whose centres are merged."""
        _read(bound)

    def rewrite(self, op: Any, x: ir.Value, **bound: ir.Value) -> Any:
        """See onnxscript."""
        star = _read(bound)
        depth, height, width = star.sides
        channels = star.d.weight.shape[1]
        name = star.d.name
        planes = take_apart(self, op, x, (channels, height, width))
        padded = op.Pad(op.Reshape(planes, self.constant(op, _shape(-1, depth, channels, height, width), name)),
                        self.constant(op, _shape(0, 1, 0, 0, 0, 0, 1, 0, 0, 0), name))
        along_d = star.d.line
        total = op.Conv(planes, self.constant(op, star.h.weight[:, :, 0], f"{name}.h"),
                        self.constant(op, star.d.bias_or_zero, f"{name}.bias"), kernel_shape=[3, 1], pads=[1, 0, 1, 0])
        total = op.Add(op.Conv(planes, self.constant(op, star.w.weight[:, :, 0], f"{name}.w"), kernel_shape=[1, 2],
                               pads=[0, 1, 0, 1], dilations=[1, 2]), total)
        for start, column in ((0, 0), (2, along_d.shape[2] - 1)):
            bounds = (self.constant(op, _shape(number), name) for number in (start, start + depth, 1))
            shifted = op.Slice(padded, *bounds)
            shifted = op.Reshape(shifted, self.constant(op, _shape(-1, channels, height, width), name))
            weight = self.constant(op, along_d[:, :, column, None, None], f"{name}.d")
            total = op.Add(op.Conv(shifted, weight, kernel_shape=[1, 1]), total)
        return put_together(self, op, total, (depth, star.d.out_channels, height, width))


class ConcatenateInPlanes(Rule):
    """Taking a concatenation of channels apart is concatenating what is taken apart."""

    title = "convolve_in_planes_concat"

    def pattern(self, op: Any, a: Any, b: Any, c: Any, shape: Any) -> Any:
        """See onnxscript."""
        return op.Reshape(op.Transpose(op.Concat(a, b, c, axis=1), perm=_APART), shape)

    def require(self, **bound: ir.Value) -> None:
        """Planes [-1, C, H, W], and the parts' channels known."""
        if array_of(bound["shape"], "the shape").size != 4:
            raise Refused("not planes")
        for name in "abc":
            convolution_of(bound[name])

    def rewrite(self, op: Any, a: ir.Value, b: ir.Value, c: ir.Value, shape: ir.Value) -> Any:
        """See onnxscript."""
        sides = array_of(shape, "the shape")[2:].tolist()
        parts = [take_apart(self, op, part, (convolution_of(part).out_channels, *sides)) for part in (a, b, c)]
        return op.Concat(*parts, axis=1)


class ConvolveLinesInPlanes(Rule):
    """Taps of one input channel along H or W, one plane at a time: the planes of one channel are apart already."""

    title = "convolve_in_planes_lines"

    def pattern(self, op: Any, x: Any, shape: Any) -> Any:
        """See onnxscript."""
        taps = op.Conv(x, _allow_other_inputs=True, _outputs=["taps"])
        return op.Reshape(op.Transpose(taps, perm=_APART), shape)

    def require(self, **bound: ir.Value) -> None:
        """One input channel, a kernel along H or W, no stride along D."""
        convolution = convolution_of(bound["taps"])
        if convolution.weight.shape[1] != 1 or convolution.axis == 0 or convolution.strides[0] != 1:
            raise Refused("not taps along H or W of one channel")
        if array_of(bound["shape"], "the shape").size != 4:
            raise Refused("not planes")
        _sides(convolution.x)

    def rewrite(self, op: Any, x: ir.Value, taps: ir.Value, shape: ir.Value) -> Any:
        """See onnxscript."""
        del shape
        convolution = convolution_of(taps)
        _, height, width = _sides(x)
        planes = op.Reshape(x, self.constant(op, _shape(-1, 1, height, width), convolution.name))
        inputs = [planes, self.constant(op, convolution.weight[:, :, 0], f"{convolution.name}.weight")]
        if convolution.bias is not None:
            inputs.append(self.constant(op, convolution.bias, f"{convolution.name}.bias"))
        before, after = zip(*convolution.pads[1:], strict=True)
        return op.Conv(*inputs, kernel_shape=list(convolution.kernel[1:]), strides=list(convolution.strides[1:]),
                       pads=[*before, *after])


class KeepPlanes(Rule):
    """What is put together only to be taken apart again stays apart."""

    title = "convolve_in_planes_keep"

    def pattern(self, op: Any, planes: Any, together: Any, apart: Any) -> Any:
        """See onnxscript."""
        volume = op.Transpose(op.Reshape(planes, together), perm=_APART)
        return op.Reshape(op.Transpose(volume, perm=_APART), apart)

    def require(self, **bound: ir.Value) -> None:
        """The same planes."""
        together, apart = (array_of(bound[name], "the shape").tolist() for name in ("together", "apart"))
        if together[2:] != apart[1:]:
            raise Refused("planes of another shape")

    def rewrite(self, op: Any, planes: ir.Value, **_: ir.Value) -> Any:
        """See onnxscript."""
        return op.Identity(planes)


class PoolInPlanes(Rule):
    """A max-pool of length 3 and stride 2: in the planes, then along D."""

    title = "convolve_in_planes_pool"

    def pattern(self, op: Any, planes: Any, together: Any) -> Any:
        """See onnxscript."""
        return op.MaxPool(op.Transpose(op.Reshape(planes, together), perm=_APART), _outputs=["pooled"])

    def require(self, **bound: ir.Value) -> None:
        """The downsampling of DCFormer, of even sides."""
        node = bound["pooled"].producer()
        assert node is not None
        window = [node.attributes.get_ints(name, []) for name in ("kernel_shape", "strides", "pads")]
        if [list(values) for values in window] != [[3] * 3, [2] * 3, [1] * 6]:
            raise Refused("another window than 3 with stride 2")
        if any(side % 2 for side in array_of(bound["together"], "the shape")[[1, 3, 4]].tolist()):
            raise Refused("odd sides")

    def rewrite(self, op: Any, planes: ir.Value, together: ir.Value, **_: ir.Value) -> Any:
        """See onnxscript."""
        _, depth, channels, height, width = array_of(together, "the shape").tolist()
        inside = op.MaxPool(planes, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
        volume = put_together(self, op, inside, (depth, channels, height // 2, width // 2))
        return op.MaxPool(volume, kernel_shape=[3, 1, 1], strides=[2, 1, 1], pads=[1, 0, 0, 1, 0, 0])


def take_apart(rule: Rule, op: Any, x: ir.Value, sides: Sequence[int]) -> ir.Value:
    """``[B, C, D, H, W]`` to ``[B D, C, H, W]``; ``sides``: C, H, W."""
    return op.Reshape(op.Transpose(x, perm=_APART), rule.constant(op, _shape(-1, *sides), "planes"))


def put_together(rule: Rule, op: Any, planes: ir.Value, sides: Sequence[int]) -> ir.Value:
    """``[B D, C, H, W]`` to ``[B, C, D, H, W]``; ``sides``: D, C, H, W."""
    return op.Transpose(op.Reshape(planes, rule.constant(op, _shape(-1, *sides), "volume")), perm=_APART)


def _shape(*sides: int) -> np.ndarray:
    return np.array(sides, np.int64)


def _sides(x: ir.Value) -> tuple[int, int, int]:
    sides = shape_of(x)[2:]
    if len(sides) != 3 or not all(isinstance(side, int) for side in sides):
        raise Refused(f"the sides of {x.name} are not fixed")
    return int(sides[0]), int(sides[1]), int(sides[2])


def _read(bound: dict[str, ir.Value]) -> _Star:
    branches = sorted((convolution_of(bound[name]) for name in ("first", "second", "third")), key=lambda b: b.axis)
    if [branch.axis for branch in branches] != [0, 1, 2] or len({branch.x for branch in branches}) != 1:
        raise Refused("not three axes of one input")
    shapes = [(branch.group, branch.strides, branch.kernel[branch.axis], branch.dilations[branch.axis])
              for branch in branches]
    ones = (1, 1, 1)
    if shapes != [(1, ones, 3, 1), (1, ones, 2, 2), (1, ones, 2, 2)]:
        raise Refused("not kernels of length 3 over all channels with their centres merged")
    d, h, w = branches
    sides = _sides(d.x)
    # The centre goes from the kernel along D, where merge_branches put it, to the one along H.
    centre = d.line[:, :, 1]
    line = np.stack([h.line[:, :, 0], centre, h.line[:, :, 1]], axis=2)
    return _Star(d, _with_line(h, line), w, sides)


def _with_line(branch: Convolution, line: np.ndarray) -> Convolution:
    return replace(branch, weight=line.reshape(*line.shape[:2], 1, line.shape[2], 1), dilations=(1, 1, 1))


RULES = (ConvolveInPlanes, KeepPlanes, ConcatenateInPlanes, ConvolveLinesInPlanes, PoolInPlanes)

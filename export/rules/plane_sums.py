"""What one plane of a volume is the sum of; see ``stream_planes``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .convolution import Convolution, convolution_of


@dataclass(frozen=True)
class Tap:
    """A two-dimensional convolution of one plane of ``x``, or of ``count`` neighbours as the channels of one image.

    For plane p of the output: planes from ``p stride + first``. ``weight`` [C_out, C_in count, kh, kw]; ``strides``,
    ``pads`` (before and after) and ``dilations`` along H and W.
    """

    x: ir.Value
    stride: int
    first: int
    weight: NDArray[np.float32]
    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilations: tuple[int, ...]
    count: int = 1

    @property
    def reads(self) -> tuple[ir.Value, int, int, tuple[int, ...]]:
        """Taps with equal ``reads`` see the same plane at the same places."""
        return self.x, self.stride, self.first, self.strides

    @property
    def is_point(self) -> bool:
        """Whether it reads no neighbours."""
        return self.weight.shape[2:] == (1, 1) and self.count == 1


@dataclass(frozen=True)
class PlaneSum:
    """What an output plane is the sum of: taps, planes of other values, and a bias [C_out]."""

    taps: tuple[Tap, ...]
    addends: tuple[ir.Value, ...]
    bias: NDArray[np.float32] | None

    @property
    def copied(self) -> tuple[Tap, NDArray[np.float32]] | None:
        """The only tap and ``[C_out - count]`` constants, where the output is what that tap reads and then these."""
        if len(self.taps) != 1 or self.addends or self.taps[0].strides != (1, 1):
            return None
        tap = self.taps[0]
        channels, count = tap.weight.shape[:2]
        bias = self.bias if self.bias is not None else np.zeros(channels, np.float32)
        copies = tap.count == count and np.array_equal(tap.weight[:, :, 0, 0], np.eye(channels, count))
        return (tap, bias[count:]) if copies and not bias[:count].any() else None


def plane_sum(value: ir.Value, whole: Collection[ir.Value]) -> PlaneSum:
    """Of a value made by Add or Conv, sums of sums as one; what others read, too, is not computed again but added.

    Args:
        whole: values that are at hand with all planes, so that a kernel along D reads several at once.
    """

    def own(leaf: ir.Value, kind: str) -> bool:
        return operator(leaf) == kind and (leaf is value or len(list(leaf.uses())) == 1)

    leaves = [value]
    while (index := next((i for i, leaf in enumerate(leaves) if own(leaf, "Add")), None)) is not None:
        leaves[index : index + 1] = inputs_of(leaves[index])
    convolutions = [convolution_of(leaf) for leaf in leaves if own(leaf, "Conv")]
    taps = [tap for convolution in convolutions for tap in _taps(convolution, convolution.x in whole)]
    biases = [convolution.bias for convolution in convolutions if convolution.bias is not None]
    bias = np.stack(biases).sum(axis=0, dtype=np.float64).astype(np.float32) if biases else None
    return PlaneSum(tuple(_merge_points(taps)), tuple(leaf for leaf in leaves if not own(leaf, "Conv")), bias)


def _taps(convolution: Convolution, whole: bool) -> list[Tap]:
    """Of a kernel along H or W, one; along D, one per plane that it reads, or one in all."""
    (before, _), *pads = convolution.pads
    tap = Tap(convolution.x, convolution.strides[0], -before, convolution.weight[:, :, 0], convolution.strides[1:],
              tuple(pads), convolution.dilations[1:])
    if convolution.axis != 0:
        return [tap]
    line = convolution.line
    if whole and line.shape[1] == 1 and convolution.dilations[0] == 1:
        return [replace(tap, weight=line[:, 0, :, None, None], count=line.shape[2])]
    return [replace(tap, first=k * convolution.dilations[0] - before, weight=line[:, :, k, None, None])
            for k in range(line.shape[2])]


def _merge_points(taps: Sequence[Tap]) -> list[Tap]:
    """Taps that see neighbours in their plane first, each with the points at its centre added; then the others."""
    lines = [tap for tap in taps if not tap.is_point]
    left = []
    for point in (tap for tap in taps if tap.is_point):
        for index, line in enumerate(lines):
            if line.reads == point.reads and (merged := _with_centre(line, point.weight)) is not None:
                lines[index] = merged
                break
        else:
            left.append(point)
    return [*lines, *left]


def _with_centre(line: Tap, centre: NDArray[np.float32]) -> Tap | None:
    """The tap with a point's weight [C_out, C_in, 1, 1] added; None where its kernel has no place for it."""
    axis = 0 if line.weight.shape[2] > 1 else 1
    length, dilation, pads = line.weight.shape[2 + axis], line.dilations[axis], line.pads[axis]
    if line.count > 1 or line.pads[1 - axis] != (0, 0):
        return None
    if (length, dilation, pads) == (2, 2, (1, 1)):
        a, b = np.split(line.weight, 2, axis=2 + axis)
        return replace(line, weight=np.concatenate([a, centre, b], axis=2 + axis), dilations=(1, 1))
    if length % 2 and dilation == 1 and pads == (length // 2, length // 2):
        weight = line.weight.copy()
        weight[:, :, *((length // 2, 0) if axis == 0 else (0, length // 2))] += centre[:, :, 0, 0]
        return replace(line, weight=weight)
    return None


def inputs_of(value: ir.Value) -> list[ir.Value]:
    """Of the node that makes a value."""
    node = value.producer()
    assert node is not None
    return [x for x in node.inputs if x is not None]


def operator(value: ir.Value) -> str:
    """Of the node that makes a value; "" for a graph's input."""
    node = value.producer()
    return node.op_type if node is not None else ""

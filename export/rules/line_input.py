"""The image tower's input as the lines that its first layer reads, instead of the whole volume.

A kernel of length k along axis a with stride s on all three axes reads, on the two other axes, only every s-th voxel:

    Conv(x; W along a, strides (s, s, s)) = Conv(x_a; W along a, stride s along a alone),
    x_a = x with every s-th index on the two axes other than a

Numbers and their order are the same. The inputs are ``lines_d`` [B, 1, D, H/s, W/s], ``lines_h`` [B, 1, D/s, H, W/s]
and ``lines_w`` [B, 1, D/s, H/s, W]; for s = 4 they hold 3/16 of the volume's numbers, some of them twice or thrice:
15.6 % of the voxels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewriteRuleSet

from ...runtime.manifest import LINE_INPUTS
from .base import Refused, Rule
from .convolution import Convolution, convolution_of

TITLE = "line_input"
VOLUME = "volume"


@dataclass(frozen=True)
class _Reader:
    """A convolution that reads the volume."""

    node: ir.Node
    convolution: Convolution


class _ReadLines(Rule):
    """One convolution of the volume."""

    title = TITLE

    def __init__(self, volume: ir.Value, lines: list[ir.Value], stride: int) -> None:
        super().__init__()
        self._volume, self._lines, self._stride = volume, lines, stride

    def pattern(self, op: Any, x: Any) -> Any:
        """See onnxscript."""
        return op.Conv(x, _allow_other_inputs=True, _outputs=["out"])

    def require(self, **bound: ir.Value) -> None:
        """Only those that read the volume itself."""
        if bound["x"] is not self._volume:
            raise Refused("it does not read the volume")

    def rewrite(self, op: Any, x: ir.Value, out: ir.Value) -> Any:
        """See onnxscript."""
        del x
        convolution = convolution_of(out)
        strides = tuple(self._stride if axis == convolution.axis else 1 for axis in range(3))
        return replace(convolution, strides=strides).emit(op, self, self._lines[convolution.axis])


class LineInput:
    """The whole rewrite: it changes the graph's inputs, which a pattern cannot."""

    def __init__(self) -> None:
        self.title = TITLE
        self.refused: list[str] = []

    def apply(self, model: ir.Model) -> int:
        """Rewrite in place; returns how many convolutions now read lines."""
        self.refused = []
        volume = next((value for value in model.graph.inputs if value.name == VOLUME), None)
        if volume is None:
            return 0
        try:
            readers, stride = _readers(volume)
            lines = [_line_value(volume, axis, stride) for axis in range(3)]
        except Refused as reason:
            self.refused.append(f"{VOLUME}: {reason}")
            return 0
        for node, _ in list(volume.uses()):
            if _is_batch(node):
                node.replace_input_with(0, lines[0])
        RewriteRuleSet([_ReadLines.rule(volume, lines, stride)]).apply_to_model(model)
        position = list(model.graph.inputs).index(volume)
        del model.graph.inputs[position]
        for offset, value in enumerate(lines):
            model.graph.inputs.insert(position + offset, value)
        return len(readers)


def _readers(volume: ir.Value) -> tuple[list[_Reader], int]:
    """The convolutions of the volume and their common stride.

    Raises:
        Refused: anything else reads the volume, or a kernel needs more than lines.
    """
    readers = []
    for node, _ in volume.uses():
        if _is_batch(node):
            continue
        if node.op_type != "Conv":
            raise Refused(f"a {node.op_type} reads the whole volume")
        readers.append(_Reader(node, convolution_of(node.outputs[0])))
    strides = {reader.convolution.strides for reader in readers}
    if len(strides) != 1 or len(set(next(iter(strides)))) != 1:
        raise Refused(f"the convolutions have strides {sorted(strides)}, not one for all axes")
    stride = next(iter(strides))[0]
    axes = {reader.convolution.axis for reader in readers}
    if stride == 1 or axes != {0, 1, 2}:
        raise Refused(f"stride {stride} and kernels along the axes {sorted(axes)} leave no three families of lines")
    return readers, stride


def _is_batch(node: ir.Node) -> bool:
    """Whether a node asks for the number of volumes alone, which all inputs share."""
    span = node.attributes.get_int("start", 0), node.attributes.get_int("end", -1)
    return node.op_type == "Shape" and span == (0, 1)


def _line_value(volume: ir.Value, axis: int, stride: int) -> ir.Value:
    assert volume.shape is not None
    batch, channels, *sides = volume.shape
    for other, side in enumerate(sides):
        if not isinstance(side, int) or side % stride:
            raise Refused(f"side {side} of axis {other} is no multiple of the stride {stride}")
    shape = [side if other == axis else side // stride for other, side in enumerate(sides) if isinstance(side, int)]
    return ir.Value(name=list(LINE_INPUTS)[axis], shape=ir.Shape([batch, channels, *shape]), type=volume.type)

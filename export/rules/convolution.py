"""A Conv node as the rules read and write it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .base import Refused, Rule, array_of


@dataclass(frozen=True)
class Convolution:
    """A convolution over three axes with constant weights.

    ``weight`` [C_out, C_in / group, k0, k1, k2]; ``bias`` [C_out] or None; ``pads``: before and after, per axis.
    """

    x: ir.Value
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilations: tuple[int, ...]
    group: int
    name: str

    @property
    def kernel(self) -> tuple[int, ...]:
        """Lengths along the three axes."""
        return self.weight.shape[2:]

    @property
    def out_channels(self) -> int:
        """C_out."""
        return self.weight.shape[0]

    @property
    def bias_or_zero(self) -> NDArray[np.float32]:
        """``[C_out]``."""
        return self.bias if self.bias is not None else np.zeros(self.out_channels, self.weight.dtype)

    @property
    def axis(self) -> int:
        """The only axis along which the kernel is longer than 1.

        Raises:
            Refused: none or several; a padding elsewhere.
        """
        long = [axis for axis, length in enumerate(self.kernel) if length > 1]
        if len(long) != 1 or any(self.pads[axis] != (0, 0) for axis in range(3) if axis != long[0]):
            raise Refused(f"kernel {list(self.kernel)} does not run along one axis")
        return long[0]

    @property
    def line(self) -> NDArray[np.float32]:
        """The weight of a kernel along one axis, ``[C_out, C_in / group, k]``."""
        return self.weight.reshape(*self.weight.shape[:2], -1)

    def emit(self, op: Any, rule: Rule, x: ir.Value | None = None) -> ir.Value:
        """The node, reading ``x`` instead of what it read."""
        inputs = [x if x is not None else self.x, rule.constant(op, self.weight, f"{self.name}.weight")]
        if self.bias is not None:
            inputs.append(rule.constant(op, self.bias, f"{self.name}.bias"))
        before, after = zip(*self.pads, strict=True)
        return op.Conv(*inputs, kernel_shape=list(self.kernel), strides=list(self.strides), pads=[*before, *after],
                       dilations=list(self.dilations), group=self.group)


def convolution_of(value: ir.Value) -> Convolution:
    """Read the Conv node that makes a value.

    Raises:
        Refused: no Conv, weights that are no constants, padding by name, or not three axes.
    """
    node = value.producer()
    if node is None or node.op_type != "Conv":
        raise Refused(f"{value.name} is not made by a Conv")
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        raise Refused("the padding is given by name")
    weight = array_of(node.inputs[1], "the weight")
    if weight.ndim != 5:
        raise Refused(f"a convolution over {weight.ndim - 2} axes")
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    x = node.inputs[0]
    assert x is not None
    pads = _ints(node, "pads", [0] * 6)
    return Convolution(
        x=x, weight=weight, bias=array_of(bias, "the bias") if bias is not None else None,
        strides=_ints(node, "strides", [1] * 3), pads=tuple(zip(pads[:3], pads[3:], strict=True)),
        dilations=_ints(node, "dilations", [1] * 3), group=node.attributes.get_int("group", 1),
        name=_layer_name(node),
    )


def _layer_name(node: ir.Node) -> str:
    """The module that a convolution was, by the name of its weight."""
    weight = node.inputs[1]
    assert weight is not None
    return str(weight.name).split("/")[0].removesuffix(".weight")


def _ints(node: ir.Node, name: str, default: Sequence[int]) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints(name, default) or default)


def star_of(first: ir.Value, second: ir.Value, third: ir.Value) -> list[Convolution]:
    """The three branches of a decomposed convolution, ``Add(Add(first, second), third)``, in axis order.

    Raises:
        Refused: they are not three kernels along different axes over one input with the same strides.
    """
    branches = [convolution_of(value) for value in (first, second, third)]
    if len({branch.x for branch in branches}) != 1:
        raise Refused("the branches read different inputs")
    if len({(branch.strides, branch.group, branch.out_channels) for branch in branches}) != 1:
        raise Refused("the branches differ in strides, groups or width")
    branches.sort(key=lambda branch: branch.axis)
    if [branch.axis for branch in branches] != [0, 1, 2]:
        raise Refused("two branches run along the same axis")
    for branch in branches:
        length = branch.kernel[branch.axis]
        if length % 2 == 0 or branch.pads[branch.axis] != (length // 2, length // 2) or set(branch.dilations) != {1}:
            raise Refused(f"kernel {list(branch.kernel)} is not centred on its position")
    return branches

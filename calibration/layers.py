"""Which nodes of a graph carry weights that INT8 may hold, found by what they do, not by their names."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..export.rules.stream_planes import PLANE

#: Operators with a constant weight, and the axis of its output channels; Gemm's depends on ``transB``.
_WEIGHTED = {"Conv": 0, "MatMul": 1, "Gemm": 1}
#: A branch of a decomposed convolution, in the name of its weight.
_BRANCH = re.compile(r"\.c[123]\.0$")


@dataclass(frozen=True)
class Layer:
    """A node that may become INT8. ``axis``: of the weight's output channels. ``depthwise``: one channel each."""

    node: ir.Node
    axis: int
    depthwise: bool

    @property
    def x(self) -> ir.Value:
        """Its activation."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def weight_name(self) -> str:
        """Of the weight."""
        value = self.node.inputs[1]
        assert value is not None
        return str(value.name)

    @property
    def weight(self) -> NDArray[np.float32]:
        """Its weight."""
        return weight_of(self.node)


def quantizable_layers(graph: ir.Graph) -> list[Layer]:
    """Convolutions and products with constant weights, in the graph's order, except those that must stay.

    What stays: the first layer, which reads the scan's own values (one step of INT8 over the window of 1200 HU would be
    5 HU); what comes after a choice between codes (its result is no longer an activation) or after the mean over all
    tokens (a handful of numbers that decide everything); products of two activations.
    """
    behind_weights, behind_head = _reached(graph)
    return [layer for layer in _layers(graph, behind_head) if layer.x in behind_weights]


def weighted_layers(graph: ir.Graph) -> list[Layer]:
    """All convolutions and products with constant weights before the head, but for those that only move numbers."""
    return _layers(graph, head_nodes(graph))


def _layers(graph: ir.Graph, behind_head: Collection[ir.Node]) -> list[Layer]:
    layers = []
    for node in graph:
        if not is_weighted(node) or node in behind_head:
            continue
        weight = weight_of(node)
        if weight.ndim < 2:
            continue
        groups = node.attributes.get_int("group", 1)
        if groups > 1 and weight.shape[1] > 1:
            continue  # grouped, but not depthwise: no encoder has it
        axis = _WEIGHTED[node.op_type]
        if node.op_type == "Gemm" and node.attributes.get_int("transB", 0):
            axis = 0
        layers.append(Layer(node, axis, groups > 1))
    return layers


def weight_of(node: ir.Node) -> NDArray[np.float32]:
    """The constant second input."""
    value = node.inputs[1]
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def layer_name(layer: Layer) -> str:
    """The module that a layer was, by the name of its weight."""
    return layer.weight_name.split("/")[0].removesuffix(".weight")


def group_name(layer: Layer) -> str:
    """The module whose layers are chosen together: c1, c2 and c3 of a decomposed convolution share their input."""
    return _BRANCH.sub("", layer_name(layer))


def source_name(value: ir.Value) -> str:
    """The name that a value has in the graph that is not streamed."""
    return str(value.name).split(PLANE)[0]


def is_weighted(node: ir.Node) -> bool:
    """Whether it has a constant weight and does more than move numbers."""
    value = node.inputs[1] if node.op_type in _WEIGHTED else None
    return value is not None and value.const_value is not None and not _copies(value.const_value.numpy())


def _reached(graph: ir.Graph) -> tuple[set[ir.Value], set[ir.Node]]:
    """Values that a weighted layer has already worked on; nodes behind a choice of codes or the mean over tokens."""
    weighted: set[ir.Value] = set()
    head_values: set[ir.Value] = set()
    head: set[ir.Node] = set()
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if any(value in head_values for value in inputs):
            head.add(node)
        if node in head or node.op_type == "ArgMax" or _is_mean_over_tokens(node):
            head_values.update(node.outputs)
        if is_weighted(node) or any(value in weighted for value in inputs):
            weighted.update(node.outputs)
    return weighted, head


def _copies(weight: NDArray[np.float32]) -> bool:
    """Whether a kernel over one channel only moves numbers: a single 1 for every output channel, or nothing."""
    rows = weight.reshape(len(weight), -1)
    return weight.shape[1:2] == (1,) and bool(np.isin(rows, (0, 1)).all() and (rows.sum(axis=1) <= 1).all())


def _is_mean_over_tokens(node: ir.Node) -> bool:
    """A mean over several axes, as the head takes; a norm's is over one."""
    if node.op_type not in ("ReduceMean", "GlobalAveragePool"):
        return False
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    return axes is None or axes.const_value is None or axes.const_value.numpy().size > 1


def reads_stacked_planes(layer: Layer) -> bool:
    """Whether it reads a volume that a streamed graph has put together from planes.

    OpenVINO 2026.4 moves such a layer's QuantizeLinear before the stacking and gets other numbers than ONNX Runtime
    does from the same graph; on all other layers they agree.
    """
    return str(layer.x.name).endswith(PLANE)


def head_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Nodes behind a choice of codes or the mean over all tokens."""
    return _reached(graph)[1]

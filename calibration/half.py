"""FP16 written into the graph, with what must stay float32 kept so for a reason.

The conversion itself is ONNX Runtime's (``onnxruntime.transformers.float16``). It rounds to FP16 between any two nodes,
also where both stay float32; these roundings are taken out again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from .layers import head_nodes

#: FP16 holds 65504. Activations of scans that calibration has not seen may be larger than those it has.
LARGEST_MAGNITUDE = 65504 / 4
_REDUCTIONS = {"ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "GlobalAveragePool"}
_NORMS = {"LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization", "Softmax"}
_CHOICES = {"ArgMax", "ArgMin", "TopK"}


@dataclass(frozen=True)
class Half:
    """A graph in FP16. ``float32``: why nodes stay so, and how many. ``overflow``: magnitudes that are too large."""

    proto: onnx.ModelProto
    float32: dict[str, int]
    overflow: dict[str, float]


def to_half(proto: onnx.ModelProto, largest: Mapping[str, float] | None = None) -> Half:
    """Convert weights, activations and inputs to FP16; outputs stay float32.

    Args:
        largest: magnitudes of activations that were seen, by name; nodes that make or read too large ones stay float32.
    """
    # Here, because the converter is no part of the API that onnxruntime promises, and nothing else needs it.
    from onnxruntime.transformers.float16 import convert_float_to_float16

    named = onnx.ModelProto()
    named.CopyFrom(proto)
    for index, node in enumerate(named.graph.node):
        node.name = f"{node.op_type}_{index}"
    model = ir.from_proto(named)
    overflow = {name: value for name, value in (largest or {}).items() if value > LARGEST_MAGNITUDE}
    reasons = keep_float32(model.graph, overflow)
    outputs = [value.name for value in named.graph.output]
    converted = convert_float_to_float16(
        named, keep_io_types=outputs, op_block_list=[], node_block_list=list(reasons), disable_shape_infer=False)
    found = ir.from_proto(converted)
    _remove_roundings(found)
    passes.RemoveUnusedNodesPass()(found)
    found.graph.sort()  # the converter appends its casts at the end
    clean = ir.to_proto(found)
    for node in clean.graph.node:
        node.ClearField("name")
    del clean.graph.value_info[:]
    counts: dict[str, int] = {}
    for reason in reasons.values():
        counts[reason] = counts.get(reason, 0) + 1
    return Half(onnx.shape_inference.infer_shapes(clean, strict_mode=True, data_prop=True), counts, overflow)


def keep_float32(graph: ir.Graph, overflow: Collection[str] = ()) -> dict[str, str]:
    """Names of nodes that stay float32, with the reason.

    Args:
        overflow: names of values that FP16 cannot hold safely.
    """
    choosing = _between_norm_and_choice(graph)
    head = head_nodes(graph)
    reasons = {}
    for node in graph:
        name = str(node.name)
        if node.op_type in _REDUCTIONS:
            reasons[name] = "a sum over many numbers"
        elif node.op_type in _NORMS:
            reasons[name] = "a normalisation"
        elif node in choosing:
            reasons[name] = "the choice of a code, which a small error changes"
        elif node in head:
            reasons[name] = "the head: a code's vector, its projection and its norm"
        elif any(value is not None and value.name in overflow for value in (*node.inputs, *node.outputs)):
            reasons[name] = "an activation too large for FP16"
    return reasons


def _between_norm_and_choice(graph: ir.Graph) -> set[ir.Node]:
    """Nodes from the norm of the tokens to the choice of a code, and what makes the codebook fit for it."""
    needed: set[ir.Value] = set()
    between: set[ir.Node] = set()
    norms = _descendants(graph, _REDUCTIONS)
    computed = _computed_from_inputs(graph)
    for node in reversed(list(graph)):
        if node.op_type in _CHOICES or any(value in needed for value in node.outputs):
            from_constants = not any(value in computed for value in node.inputs)
            if node.op_type in _CHOICES or node in norms or from_constants:
                between.add(node)
                needed.update(value for value in node.inputs if value is not None)
    return between


def _descendants(graph: ir.Graph, kinds: Collection[str]) -> set[ir.Node]:
    """Nodes that follow one of these operators, the operators themselves included."""
    values: set[ir.Value] = set()
    found: set[ir.Node] = set()
    for node in graph:
        if node.op_type in kinds or any(value in values for value in node.inputs):
            found.add(node)
            values.update(node.outputs)
    return found


def _computed_from_inputs(graph: ir.Graph) -> set[ir.Value]:
    values = set(graph.inputs)
    for node in graph:
        if any(value in values for value in node.inputs):
            values.update(node.outputs)
    return values


def _remove_roundings(model: ir.Model) -> None:
    """Cast to FP16 and back, which rounds between two nodes that both compute in float32."""
    for node in list(model.graph):
        if not _casts_to(node, ir.DataType.FLOAT):
            continue
        x = node.inputs[0]
        inner = x.producer() if x is not None else None
        if inner is None or not _casts_to(inner, ir.DataType.FLOAT16):
            continue
        original = inner.inputs[0]
        if original is not None and original.dtype == ir.DataType.FLOAT and not node.outputs[0].is_graph_output():
            ir.convenience.replace_all_uses_with(node.outputs[0], original)


def _casts_to(node: ir.Node, dtype: ir.DataType) -> bool:
    return node.op_type == "Cast" and node.attributes.get_int("to", 0) == dtype.value

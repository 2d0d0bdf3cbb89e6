"""FP16 and BF16 written into the graph, with what must stay float32 kept so for a reason.

The conversion itself is ONNX Runtime's (``onnxruntime.transformers.float16``). It rounds to FP16 between any two nodes,
also where both stay float32; these roundings are taken out again. BF16 has float32's range and eight bits of precision:
for models whose activations are beyond FP16.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, numpy_helper, version_converter
from onnx_ir.passes import common as passes

from .layers import head_nodes, is_weighted

#: FP16 holds 65504. Activations of scans that calibration has not seen may be larger than those it has.
LARGEST_MAGNITUDE = 65504 / 4
_REDUCTIONS = {"ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "GlobalAveragePool"}
_NORMS = {"LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization", "Softmax"}
_CHOICES = {"ArgMax", "ArgMin", "TopK"}


#: The first opset whose convolutions take bfloat16.
_BFLOAT16_OPSET = 22


@dataclass(frozen=True)
class Half:
    """A graph in FP16 or BF16. ``float32``: why nodes stay so, and how many. ``overflow``: magnitudes too large."""

    proto: onnx.ModelProto
    float32: dict[str, int]
    overflow: dict[str, float]


def to_half(proto: onnx.ModelProto, largest: Mapping[str, float] | None = None) -> Half:
    """Convert weights, activations and inputs to FP16; outputs stay float32.

    Args:
        largest: magnitudes of activations that were seen, by name; nodes that make or read too large ones stay float32.
    """
    overflow = {name: value for name, value in (largest or {}).items() if value > LARGEST_MAGNITUDE}
    return _convert(proto, overflow, inputs_too=True)


def to_bfloat16(proto: onnx.ModelProto) -> Half:
    """Convert weights and activations to BF16; outputs stay float32, inputs become FP16.

    A voxel's value in BF16 would be off by up to 2 HU, so what reads voxels is float32, up to and including the first
    layer. Which graphs need this instead of ``to_half``: those with ``overflow`` there.
    """
    newer = version_converter.convert_version(proto, max(_BFLOAT16_OPSET, _opset(proto)))
    half = _convert(newer, {}, inputs_too=False)
    originals = {tensor.name: tensor for tensor in newer.graph.initializer}
    graph = half.proto.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(_bfloat16(originals.get(tensor.name, tensor), tensor.name))
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.BFLOAT16
            elif attribute.t.data_type == TensorProto.FLOAT16:
                attribute.t.CopyFrom(_bfloat16(attribute.t, attribute.t.name))
    for value in graph.input:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            _read_as_half(graph, value)
    del graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(half.proto, strict_mode=True, data_prop=True)
    return Half(inferred, half.float32, {})


def _opset(proto: onnx.ModelProto) -> int:
    return next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))


def _bfloat16(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    """Rounded to the nearest; what would become infinite, such as a mask's lowest float32, to the largest."""
    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    array = np.clip(numpy_helper.to_array(tensor).astype(np.float32), -largest, largest).astype(ml_dtypes.bfloat16)
    return ir.to_proto(ir.tensor(array, name=name))


def _read_as_half(graph: onnx.GraphProto, value: onnx.ValueInfoProto) -> None:
    """Make an input FP16, cast to what its readers expect."""
    cast = f"{value.name}/float32"
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == value.name:
                node.input[index] = cast
    graph.node.insert(0, onnx.helper.make_node("Cast", [value.name], [cast], to=TensorProto.FLOAT))
    value.type.tensor_type.elem_type = TensorProto.FLOAT16


def _convert(proto: onnx.ModelProto, overflow: dict[str, float], inputs_too: bool) -> Half:
    # Here, because the converter is no part of the API that onnxruntime promises, and nothing else needs it.
    from onnxruntime.transformers.float16 import convert_float_to_float16

    named = onnx.ModelProto()
    named.CopyFrom(proto)
    for index, node in enumerate(named.graph.node):
        node.name = f"{node.op_type}_{index}"
    model = ir.from_proto(named)
    reasons = keep_float32(model.graph, overflow)
    kept = [value.name for value in named.graph.output]
    if not inputs_too:
        kept += [value.name for value in named.graph.input]
        for node in _first_layers(model.graph):
            reasons.setdefault(str(node.name), "the first layer, which reads voxels")
    names: Any = kept  # the library's annotation forgets that it takes a list
    converted = convert_float_to_float16(
        named, keep_io_types=names, op_block_list=[], node_block_list=list(reasons), disable_shape_infer=False)
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
    head = head_nodes(graph) | _final_norm(graph)
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
            reasons[name] = "the head: a code's vector, the projection and the norm of the embedding"
        elif any(value is not None and value.name in overflow for value in (*node.inputs, *node.outputs)):
            reasons[name] = "an activation too large for FP16"
    return reasons


def _first_layers(graph: ir.Graph) -> list[ir.Node]:
    """The first layers that work on the inputs, and what moves numbers before them."""
    raw = {value for value in graph.inputs if value.dtype == ir.DataType.FLOAT}
    found = []
    for node in graph:
        if any(value in raw for value in node.inputs):
            found.append(node)
            if not is_weighted(node):
                raw.update(node.outputs)
    return found


def _final_norm(graph: ir.Graph) -> set[ir.Node]:
    """A norm behind which there are no more layers, what divides by it, and the layer whose result it is of."""
    last: set[ir.Node] = set()
    for node in reversed(list(graph)):
        readers = [reader for value in node.outputs for reader, _ in value.uses()]
        if all(reader in last and not is_weighted(reader) for reader in readers):
            last.add(node)
    found: set[ir.Node] = set()
    behind: set[ir.Value] = set()
    for node in graph:
        if node in last and (node.op_type == "ReduceL2" or any(value in behind for value in node.inputs)):
            found.add(node)
            behind.update(node.outputs)
            producers = [value.producer() for value in node.inputs if value is not None]
            found.update(producer for producer in producers
                         if producer is not None and (is_weighted(producer) or producer in last))
    return found


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
        if original is None or original.dtype != ir.DataType.FLOAT:
            continue
        result = node.outputs[0]
        if result.is_graph_output():
            if original.producer() is None or original.is_graph_output():
                continue
            model.graph.outputs[model.graph.outputs.index(result)] = original
            result.name, original.name = f"{result.name}/rounded", result.name
        ir.convenience.replace_all_uses_with(result, original)


def _casts_to(node: ir.Node, dtype: ir.DataType) -> bool:
    return node.op_type == "Cast" and node.attributes.get_int("to", 0) == dtype.value

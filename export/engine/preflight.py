"""What would fail in a long build, said before it: tensors that are too large, and memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from ...runtime.errors import InputError

#: TensorRT indexes the elements of a tensor with 32 bits.
LARGEST_TENSOR = 2**31 - 1


@dataclass(frozen=True)
class Preflight:
    """Bytes of activations that are alive at once, if nothing is fused; where; and of the weights.

    ``largest_batch``: that fits what TensorRT can index. ``too_large``: the tensor that does not, for people, if the
    batch asked for is larger.
    """

    activation_bytes: int
    at_node: str
    weight_bytes: int
    largest_batch: int
    too_large: str | None


def preflight(proto: onnx.ModelProto, sides: Mapping[str, int], file: str) -> Preflight:
    """Follow the shapes of a graph at the largest profile.

    Args:
        proto: the graph; weights may be external.
        sides: of the dynamic axes, by name, "batch" among them.
        file: for messages.
    """
    shapes, kinds = _shapes(proto, sides)
    batch = sides.get("batch", 1)
    origins = _origins(proto)
    widest = max((name for name in origins if name in shapes), key=lambda name: math.prod(shapes[name]), default=None)
    largest, too_large = batch, None
    if widest is not None and math.prod(shapes[widest]) > LARGEST_TENSOR:
        largest = LARGEST_TENSOR // max(1, math.prod(shapes[widest]) // batch)
        too_large = (f"{file}: {widest} ({origins[widest]}) would be {'x'.join(map(str, shapes[widest]))}, "
                     f"{math.prod(shapes[widest]):,} elements; TensorRT holds {LARGEST_TENSOR:,}")
    sizes = {name: math.prod(shape) * _item_bytes(kinds[name]) for name, shape in shapes.items()}
    peak, where = _peak(proto, sizes)
    weights = sum(math.prod(tensor.dims) * _item_bytes(tensor.data_type) for tensor in proto.graph.initializer)
    return Preflight(peak, where, weights, largest, too_large)


def require_fitting_batch(checks: Sequence[Preflight]) -> None:
    """Refuse a batch that is too large for one of several graphs, with the one that fits all.

    Raises:
        InputError: a tensor with more elements than TensorRT can index.
    """
    worst = min(checks, key=lambda check: check.largest_batch)
    if worst.too_large is not None:
        advice = f"the largest batch that fits is {worst.largest_batch}: pass --max-batch {worst.largest_batch}" if \
            worst.largest_batch else "it does not fit even for a batch of one"
        raise InputError(f"{worst.too_large}; {advice}")


def _shapes(proto: onnx.ModelProto, sides: Mapping[str, int]) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Shapes and element types of all values whose shape follows from the inputs'."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    del fixed.graph.value_info[:]
    for value in (*fixed.graph.input, *fixed.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_value = sides.get(axis.dim_param, 1)
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    shapes, kinds = {}, {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        axes = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(axis.HasField("dim_value") for axis in axes):
            shapes[value.name] = [axis.dim_value for axis in axes]
            kinds[value.name] = value.type.tensor_type.elem_type
    return shapes, kinds


def _origins(proto: onnx.ModelProto) -> dict[str, str]:
    """Where each value that is no weight comes from, in words."""
    inputs = {value.name: "an input" for value in proto.graph.input}
    return inputs | {name: f"made by {node.op_type}" for node in proto.graph.node for name in node.output}


def _item_bytes(kind: int) -> int:
    if kind in (TensorProto.UNDEFINED, TensorProto.STRING):
        return 0
    return helper.tensor_dtype_to_np_dtype(kind).itemsize


def _peak(proto: onnx.ModelProto, sizes: Mapping[str, int]) -> tuple[int, str]:
    """Most bytes of values that are alive while one node runs, in the graph's order; constants are folded before."""
    last = {name: index for index, node in enumerate(proto.graph.node) for name in node.input}
    ends = {value.name for value in proto.graph.output}
    alive = {value.name: sizes.get(value.name, 0) for value in proto.graph.input}
    computed = set(alive)
    peak, where = 0, ""
    for index, node in enumerate(proto.graph.node):
        if not computed & set(node.input):
            continue
        computed |= set(node.output)
        alive.update({name: sizes.get(name, 0) for name in node.output})
        if sum(alive.values()) > peak:
            peak, where = sum(alive.values()), f"{node.op_type} {node.output[0]}"
        for name in [name for name in alive if last.get(name, index) <= index and name not in ends]:
            del alive[name]
    return peak, where

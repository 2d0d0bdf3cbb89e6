"""What a graph costs, for a batch of one."""

from __future__ import annotations

import math

import onnx

from ...runtime.provenance import GraphCost

#: Nodes that move no data: they only rename it.
_FREE = {"Reshape", "Identity", "Squeeze", "Unsqueeze", "Flatten", "Shape", "Constant"}


def cost_of(proto: onnx.ModelProto) -> GraphCost:
    """Count a model whose shapes can be inferred once dynamic axes are 1.

    Bytes are those of every node's inputs and outputs, as if nothing stayed in a cache.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    for value in fixed.graph.input:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_value = 1
    del fixed.graph.value_info[:]
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(fixed, strict_mode=True, data_prop=True).graph
    shapes = {value.name: [axis.dim_value or 1 for axis in value.type.tensor_type.shape.dim]
              for value in (*inferred.input, *inferred.value_info, *inferred.output)}
    sizes = {value.name: math.prod(shapes[value.name]) * _item_size(value.type.tensor_type.elem_type)
             for value in (*inferred.input, *inferred.value_info, *inferred.output)}
    for tensor in inferred.initializer:
        shapes[tensor.name] = list(tensor.dims)
        sizes[tensor.name] = math.prod(tensor.dims) * _item_size(tensor.data_type)
    multiply_adds = sum(_multiply_adds(node, shapes) for node in inferred.node)
    moved = sum(sizes.get(name, 0) for node in inferred.node if node.op_type not in _FREE
                for name in (*node.input, *node.output))
    return GraphCost(len(inferred.node), multiply_adds, moved)


def _item_size(data_type: int) -> int:
    return onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize if data_type else 4


def _multiply_adds(node: onnx.NodeProto, shapes: dict[str, list[int]]) -> int:
    if node.op_type == "Conv":
        return math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
    if node.op_type == "MatMul":
        return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    if node.op_type == "Gemm":
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if transposed else -1]
    return 0

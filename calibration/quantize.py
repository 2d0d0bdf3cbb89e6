"""INT8 written into the graph: QuantizeLinear and DequantizeLinear pairs, placed as TensorRT fuses them.

Symmetric throughout, zero points 0. Weights: one scale per output channel. Activations: one scale per tensor, so all
readers of an activation, such as the three branches of a decomposed convolution, share it. Biases stay float. Where a
layer's result is added to another activation, that one passes through INT8 too, so that convolution and sum become one
kernel. Where a layer reads a max-pool, the pool reads INT8 with the same scale, which changes nothing, as the maximum
of rounded numbers is the rounded maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes
from onnx_ir.tape import Tape

from ..runtime.errors import InputError
from .layers import Layer, layer_name, quantizable_layers, source_name
from .scales import LEVELS


@dataclass(frozen=True)
class Quantized:
    """A graph with INT8 layers: their number, and those left float with the reason."""

    proto: onnx.ModelProto
    layers: int
    left: tuple[str, ...]


def quantize(proto: onnx.ModelProto, thresholds: Mapping[str, float],
             keep: Callable[[Layer], bool] = lambda layer: layer.depthwise,
             scales: Mapping[str, NDArray[np.float64]] | None = None) -> Quantized:
    """Write INT8 into a graph.

    Args:
        thresholds: magnitude that becomes 127, by the activation's name in the graph that is not streamed.
        keep: layers that stay float; by default depthwise ones, whose INT8 kernels are often slower.
        scales: of weights, by name and output channel; others get ``weight_scales``.

    Raises:
        InputError: no layer could be quantized.
    """
    model = ir.from_proto(proto)
    quantizer = _Quantizer(model, thresholds, scales or {})
    left: dict[str, None] = {}
    count = 0
    for layer in quantizable_layers(model.graph):
        if keep(layer):
            continue
        if not thresholds.get(source_name(layer.x), 0.0) > 0:
            reason = "is always 0" if source_name(layer.x) in thresholds else "was not observed"
            left[f"{layer_name(layer)}: its input {source_name(layer.x)} {reason}"] = None
            continue
        quantizer.apply(layer)
        count += 1
    if not count:
        raise InputError("int8: this graph has no layer that INT8 could hold" + "".join(f"; {text}" for text in left))
    return Quantized(_finished(model), count, tuple(left))


def quantize_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Weights of all products of constants in INT8, activations as they are: for towers whose weights are what is slow.

    Raises:
        InputError: no weight could be quantized.
    """
    model = ir.from_proto(proto)
    quantizer = _Quantizer(model, {}, {})
    layers = quantizable_layers(model.graph)
    for layer in layers:
        quantizer.apply_to_weight(layer)
    if not layers:
        raise InputError("int8: this graph has no weight that INT8 could hold")
    return _finished(model)


def _finished(model: ir.Model) -> onnx.ModelProto:
    """Without the weights that INT8 replaces, with shapes."""
    passes.RemoveUnusedNodesPass()(model)
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)


def weight_scales(layer: Layer) -> NDArray[np.float64]:
    """By output channel, so that the largest magnitude is 127 steps; as float32 holds it."""
    array = np.abs(layer.weight.astype(np.float64))
    others = tuple(axis for axis in range(array.ndim) if axis != layer.axis)
    largest = np.maximum(array.max(axis=others), np.finfo(np.float32).tiny * LEVELS)
    return (largest / LEVELS).astype(np.float32).astype(np.float64)


class _Quantizer:
    def __init__(self, model: ir.Model, thresholds: Mapping[str, float],
                 scales: Mapping[str, NDArray[np.float64]]) -> None:
        self._graph, self._thresholds, self._given = model.graph, thresholds, scales
        self._rounded: dict[tuple[ir.Value, float], ir.Value] = {}
        self._weights: dict[ir.Value, ir.Value] = {}
        self._scales: dict[float, ir.Value] = {}
        self._zero: ir.Value | None = None

    def apply(self, layer: Layer) -> None:
        node, x = layer.node, layer.x
        limit = self._thresholds[source_name(x)]
        pool = x.producer()
        if pool is not None and pool.op_type == "MaxPool":
            before = pool.inputs[0]
            assert before is not None
            if (before, limit) not in self._rounded and not _is_rounded(before):
                pool.replace_input_with(0, self._round(before, limit, pool))
        node.replace_input_with(0, self._round(x, limit, node))
        self.apply_to_weight(layer)
        self._round_residual(node.outputs[0])

    def apply_to_weight(self, layer: Layer) -> None:
        weight = layer.node.inputs[1]
        assert weight is not None
        if weight not in self._weights:
            self._weights[weight] = self._integer_weight(layer, weight)
        layer.node.replace_input_with(1, self._weights[weight])

    def _round_residual(self, result: ir.Value) -> None:
        """The other operand of a sum with a layer's result, unless that is a layer's result itself."""
        for reader, index in list(result.uses()):
            if reader.op_type != "Add":
                continue
            other = reader.inputs[1 - index]
            if other is None or _is_rounded(other):
                continue
            if other.const_value is not None:
                self._round_residual(reader.outputs[0])  # a bias
                continue
            if len(list(other.uses())) < 2:
                continue  # a branch of the same sum
            limit = self._thresholds.get(source_name(other), 0.0)
            if limit > 0:
                reader.replace_input_with(1 - index, self._round(other, limit, reader))

    def _round(self, x: ir.Value, limit: float, reader: ir.Node) -> ir.Value:
        """A value after its way through INT8."""
        if (x, limit) not in self._rounded:
            tape = Tape()
            scale = self._scale(limit / LEVELS)
            integers = tape.op("QuantizeLinear", [x, scale, self._zero_point()])
            self._rounded[x, limit] = tape.op("DequantizeLinear", [integers, scale, self._zero_point()])
            producer = x.producer()
            if producer is None:
                self._graph.insert_before(reader, tape.nodes)
            else:
                self._graph.insert_after(producer, tape.nodes)
        return self._rounded[x, limit]

    def _integer_weight(self, layer: Layer, weight: ir.Value) -> ir.Value:
        array = layer.weight.astype(np.float64)
        scales = self._given.get(layer.weight_name)
        scales = weight_scales(layer) if scales is None else scales
        shape = [-1 if axis == layer.axis else 1 for axis in range(array.ndim)]
        integers = np.clip(np.rint(array / scales.reshape(shape)), -LEVELS, LEVELS).astype(np.int8)
        tape = Tape()
        inputs = [self._initializer(integers, f"{weight.name}/int8"),
                  self._initializer(scales.astype(np.float32), f"{weight.name}/scale"),
                  self._initializer(np.zeros(len(scales), np.int8), f"{weight.name}/zero")]
        found = tape.op("DequantizeLinear", inputs, {"axis": layer.axis})
        self._graph.insert_before(self._graph[0], tape.nodes)
        return found

    def _scale(self, scale: float) -> ir.Value:
        if scale not in self._scales:
            self._scales[scale] = self._initializer(np.array(scale, np.float32), f"int8_scale.{len(self._scales)}")
        return self._scales[scale]

    def _zero_point(self) -> ir.Value:
        if self._zero is None:
            self._zero = self._initializer(np.array(0, np.int8), "int8_zero_point")
        return self._zero

    def _initializer(self, array: np.ndarray, name: str) -> ir.Value:
        value = ir.Value(name=name, const_value=ir.tensor(np.asarray(array, order="C"), name=name),
                         shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
        self._graph.initializers[name] = value
        return value


def _is_rounded(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "DequantizeLinear"

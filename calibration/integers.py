"""Weights on INT8's grid, in every form of a graph, and which depthwise layers are worth it on a back end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from ..export.rules.measured import Stopwatch
from .compensate import Correlations, Rounding, integer_rounding, replace_weights
from .layers import Layer, group_name, quantizable_layers
from .quantize import Quantized, quantize, weight_scales
from .scales import LEVELS

#: A depthwise layer in INT8 loses something, so it has to save more than what two timings of one graph differ by.
_WORTHWHILE = 0.98


@dataclass(frozen=True)
class Weights:
    """By name: weights on INT8's grid, and the steps of the grid by output channel. Others round to the nearest."""

    values: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    steps: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def quantize(self, proto: onnx.ModelProto, limits: Mapping[str, float], keep: Callable[[Layer], bool]) -> Quantized:
        """``quantize`` with these weights, in layers that do not stay float."""
        names = {layer.weight_name for layer in quantizable_layers(ir.from_proto(proto).graph) if not keep(layer)}
        chosen = {name: value for name, value in self.values.items() if name in names}
        return quantize(replace_weights(proto, chosen), limits, keep, self.steps)

    def moved(self, source: onnx.ModelProto, target: onnx.ModelProto) -> Weights:
        """The same for another form of the graph, whose arrays may have other names, and more or fewer axes of size 1.

        Args:
            source: the graph that these are for, with its own weights.
            target: the other form.
        """
        places = {_content(tensor): tensor.name for tensor in source.graph.initializer if tensor.name in self.values}
        values, steps = {}, {}
        for tensor in target.graph.initializer:
            name = places.get(_content(tensor))
            if name is not None:
                values[tensor.name] = self.values[name].reshape(tuple(tensor.dims))
                steps[tensor.name] = self.steps[name]
        return Weights(values, steps)


def _content(tensor: onnx.TensorProto) -> tuple[tuple[int, ...], str]:
    array = onnx.numpy_helper.to_array(tensor)
    return tuple(side for side in array.shape if side != 1), hashlib.sha256(array.tobytes()).hexdigest()


def compensated(proto: onnx.ModelProto, limits: Mapping[str, float], correlations: Correlations,
                keep: Callable[[Layer], bool]) -> Weights:
    """Weights rounded so that errors make up for each other, of layers that do not stay float."""
    steps = {layer.weight_name: weight_scales(layer) for layer in quantizable_layers(ir.from_proto(proto).graph)
             if not keep(layer) and limits.get(str(layer.x.name), 0.0) > 0}

    def rounding(layer: Layer) -> Rounding | None:
        return integer_rounding(steps[layer.weight_name], LEVELS) if layer.weight_name in steps else None

    values = correlations.rounded(rounding)
    return Weights(values, {name: steps[name] for name in values})


def worthwhile_depthwise(proto: onnx.ModelProto, limits: Mapping[str, float], keep: Callable[[Layer], bool],
                         stopwatch: Stopwatch) -> frozenset[str]:
    """Groups of depthwise layers (``group_name``) that INT8 makes faster on a back end.

    Layers with weights of one size cost the same and are decided together; one size after the other, each measured
    with what was decided before.

    Args:
        keep: layers that stay float whatever they cost.
    """
    sizes: dict[int, set[str]] = {}
    for layer in quantizable_layers(ir.from_proto(proto).graph):
        if layer.depthwise and not keep(layer):
            sizes.setdefault(layer.weight.size, set()).add(group_name(layer))
    chosen: frozenset[str] = frozenset()

    def write(groups: Collection[str]) -> onnx.ModelProto:
        return quantize(proto, limits, lambda layer: keep(layer) or
                        (layer.depthwise and group_name(layer) not in groups)).proto

    current = write(chosen) if sizes else None
    for groups in sizes.values():
        assert current is not None
        trial = write(chosen | groups)
        timing = stopwatch.compare(current, trial)
        if timing.after_ms < _WORTHWHILE * timing.before_ms:
            chosen, current = chosen | groups, trial
    return chosen

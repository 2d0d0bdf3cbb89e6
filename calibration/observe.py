"""What a graph's activations look like on scans, with memory bounded whatever their number and size.

ONNX Runtime's own calibrators keep every activation of every sample. Here activations are asked for in groups whose
bytes stay within a budget: each group is a graph of its own that ends at them, and after a group's values have entered
their histograms they are gone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ..runtime.backends.onnxruntime import import_onnxruntime, session_options
from .compensate import Correlations
from .histogram import Histogram

#: Bytes of activations that are asked for at once, for one volume.
BUDGET_BYTES = 512 << 20


class Observer:
    """Runs a graph and collects its float activations.

    Args:
        proto: the graph, with its weights.
        detailed: names of activations whose magnitudes are counted; of the others only extremes are kept.
        threads: CPU threads.
        correlates: also collect ``correlations`` of every layer's inputs; else they stay empty.
    """

    def __init__(self, proto: onnx.ModelProto, detailed: Collection[str], threads: int,
                 budget_bytes: int = BUDGET_BYTES, correlates: bool = False) -> None:
        sizes = activation_bytes(proto)
        self._detailed = set(detailed)
        self.histograms = {name: Histogram() for name in sizes}
        self._groups = split_by_bytes(sizes, budget_bytes)
        self.correlations = Correlations.of(proto) if correlates else Correlations()
        self._random = np.random.default_rng(0)
        self._sessions = [open_part(proto, group, threads) for group in self._groups]

    def observe(self, feeds: Mapping[str, NDArray[np.float32]]) -> None:
        """Add what the graph makes of one scan."""
        for name, values in feeds.items():
            self.correlations.update(name, values, self._random)
        for group, session in zip(self._groups, self._sessions, strict=True):
            wanted = {entry.name: feeds[entry.name] for entry in session.get_inputs()}
            for name, values in zip(group, session.run(group, wanted), strict=True):
                self.histograms[name].update(values, name in self._detailed)
                self.correlations.update(name, values, self._random)
                del values


def activation_bytes(proto: onnx.ModelProto) -> dict[str, int]:
    """Bytes, for a batch of one, of every float32 value that nodes compute from the inputs, in the graph's order."""
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph
    kinds = {value.name: value.type.tensor_type for value in (*inferred.value_info, *inferred.output)}
    known = {value.name for value in inferred.input}
    sizes = {}
    for node in inferred.node:
        if not known & set(node.input) or node.op_type == "Shape":
            continue  # computed from constants or shapes alone
        known |= set(node.output)
        for name in node.output:
            kind = kinds.get(name)
            if kind is not None and kind.elem_type == onnx.TensorProto.FLOAT:
                sizes[name] = 4 * math.prod(axis.dim_value or 1 for axis in kind.shape.dim)
    return sizes


def split_by_bytes(sizes: Mapping[str, int], budget: int) -> list[list[str]]:
    """Neighbours together, as many as the budget allows, at least one."""
    groups: list[list[str]] = []
    left = 0
    for name, size in sizes.items():
        if not groups or size > left:
            groups.append([])
            left = budget
        groups[-1].append(name)
        left -= size
    return groups


def open_part(proto: onnx.ModelProto, outputs: Sequence[str], threads: int, given: Sequence[str] = ()) -> Any:
    """An onnxruntime session for the part of a graph that computes some of its values, from its inputs and others."""
    part = _part(proto, outputs, given)
    library = import_onnxruntime()
    settings = session_options(threads)
    # What is fused away could not be asked for.
    settings.graph_optimization_level = library.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return library.InferenceSession(part.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def _part(proto: onnx.ModelProto, outputs: Sequence[str], given: Sequence[str] = ()) -> onnx.ModelProto:
    wanted, nodes = set(outputs), []
    for node in reversed(proto.graph.node):
        if wanted & set(node.output) - set(given):
            nodes.append(node)
            wanted |= set(node.input)
    kinds = {value.name: value for value in (*proto.graph.value_info, *proto.graph.output)}
    graph = onnx.helper.make_graph(
        nodes[::-1], proto.graph.name,
        [*(value for value in proto.graph.input if value.name in wanted), *(kinds[name] for name in given)],
        [kinds[name] for name in outputs],
        [tensor for tensor in proto.graph.initializer if tensor.name in wanted])
    return onnx.helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)

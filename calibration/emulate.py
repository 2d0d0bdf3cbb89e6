"""16-bit graphs on the CPU, with every rounding that is written in them.

ONNX Runtime has no FP16 kernels for convolutions on most CPUs, so it computes them in float32, and takes the casts
between two such nodes out: activations are never rounded, and the graph looks better than it is. Here every FP16 or
BF16 value is computed in float32 and rounded once, which is what a GPU with float32 accumulators does that fuses
nothing; one that fuses nodes rounds less often.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ..export.graph_files import WeightsFile, describe_graph
from ..runtime.backends import Options, open_graph
from ..runtime.bundle import Bundle, copy_files, open_bundle, record_file, write_manifest
from ..runtime.engines import GPU_TARGET
from ..runtime.manifest import ANY_TARGET
from .calibrate import load_graph

_ROUNDED = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def emulate(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 graph that rounds where the 16-bit graph does. Inputs become float32 and are rounded, too."""
    kinds = {value.name: value.type.tensor_type.elem_type
             for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)}
    found = onnx.ModelProto()
    found.CopyFrom(proto)
    graph = found.graph
    for tensor in graph.initializer:
        if tensor.data_type in _ROUNDED:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    nodes, inputs = [], {}
    for value in graph.input:
        if value.type.tensor_type.elem_type in _ROUNDED:
            inputs[value.name] = f"{value.name}/input"
            nodes += _round(value.name, inputs[value.name], value.type.tensor_type.elem_type)
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        _compute_in_float32(node)
        nodes.append(node)
        for index, name in enumerate(node.input):
            node.input[index] = inputs.get(name, name)
        for index, name in enumerate(node.output):
            if kinds.get(name) in _ROUNDED:
                node.output[index] = f"{name}/exact"
                nodes += _round(f"{name}/exact", name, kinds[name])
    rewritten = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(rewritten)
    return onnx.shape_inference.infer_shapes(found, strict_mode=True, data_prop=True)


def _compute_in_float32(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i in _ROUNDED:
            attribute.i = TensorProto.FLOAT
        elif attribute.t.data_type in _ROUNDED:
            array = numpy_helper.to_array(attribute.t).astype(np.float32)
            attribute.t.CopyFrom(numpy_helper.from_array(array, attribute.t.name))


def _round(source: str, result: str, kind: int) -> list[onnx.NodeProto]:
    return [helper.make_node("Cast", [source], [f"{result}/rounded"], to=kind),
            helper.make_node("Cast", [f"{result}/rounded"], [result], to=TensorProto.FLOAT)]


class EmulatedBackend:
    """A 16-bit graph in ONNX Runtime with every rounding; reads what the graph itself reads. See ``Backend``.

    Raises like ``open_graph``.
    """

    def __init__(self, proto: onnx.ModelProto, options: Options) -> None:
        with tempfile.TemporaryDirectory(prefix="dcformer-") as folder:
            path = Path(folder) / "emulated.onnx"
            onnx.save(emulate(proto), path)
            self._backend = open_graph(path, options)

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Compute the named outputs. Raises ``InferenceError``."""
        exact = {name: array.astype(np.float32) if array.dtype == np.float16 else array
                 for name, array in feeds.items()}
        return self._backend.run(exact, outputs)

    def describe(self) -> str:
        """As of ``Backend``."""
        return f"{self._backend.describe()}, emulated"


def emulated_bundle(bundle: Bundle, folder: Path) -> Bundle:
    """A bundle whose graphs of lower precisions are those for GPUs, emulated, for any back end; fp32 is as it was.

    Args:
        folder: where it is written; exists.
    """
    old = bundle.manifest
    graphs, files = [], []
    for role in ("image", "text"):
        for precision in dict.fromkeys(graph.precision for graph in old.graphs if graph.role == role):
            graph = old.graph(role, precision, GPU_TARGET)
            if graph is None:
                continue
            name = f"{role}.{precision}"
            weights = WeightsFile(folder / f"{name}.weights")
            proto = load_graph(bundle, graph)
            weights.save(emulate(proto) if precision != "fp32" else proto, folder / f"{name}.onnx")
            graphs.append(describe_graph(role, folder / f"{name}.onnx", precision, ANY_TARGET, weights.name))
            files += [f"{name}.onnx", weights.name]
    files += copy_files(bundle, folder, {name for graph in old.graphs for name in (graph.file, graph.weights) if name})
    write_manifest(folder, dataclasses.replace(old, graphs=tuple(graphs),
                                               files=tuple(record_file(folder, name) for name in files)))
    return open_bundle(folder, verify=False)

"""ONNX files of a bundle: what the manifest says of them, and weights beside them, which several graphs share."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx
from onnx.external_data_helper import set_external_data, uses_external_data

from ..runtime.manifest import ANY_TARGET, Graph, TensorInfo

#: Smaller arrays stay in the ONNX file.
_SMALLEST_BYTES = 1024
_ALIGNMENT = 64


class WeightsFile:
    """A file of raw arrays (little-endian, as ONNX external data wants them), each once; back ends map it into memory.

    Args:
        path: the file to write, in the folder of the ONNX files.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[bytes, tuple[int, int]] = {}
        path.write_bytes(b"")

    @property
    def name(self) -> str:
        """Of the file."""
        return self._path.name

    def save(self, proto: onnx.ModelProto, path: Path) -> None:
        """Write a graph, its large arrays into the weights file unless they are there already; checked afterwards."""
        shared = onnx.ModelProto()
        shared.CopyFrom(proto)
        for tensor in shared.graph.initializer:
            if uses_external_data(tensor):
                raise ValueError(f"{tensor.name}: its data is in another file already")
            raw = onnx.numpy_helper.to_array(tensor).tobytes()
            if len(raw) >= _SMALLEST_BYTES:
                offset, length = self._place(raw)
                tensor.raw_data = raw
                set_external_data(tensor, self._path.name, offset, length)
                tensor.ClearField("raw_data")
        path.write_bytes(shared.SerializeToString())
        onnx.checker.check_model(path, full_check=True)

    def _place(self, raw: bytes) -> tuple[int, int]:
        digest = hashlib.sha256(raw).digest()
        if digest not in self._places:
            with self._path.open("ab") as file:
                offset = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
                file.write(b"\0" * (offset - file.tell()))
                file.write(raw)
            self._places[digest] = offset, len(raw)
        return self._places[digest]


def describe_graph(role: str, path: Path, precision: str = "fp32", target: str = ANY_TARGET,
                   weights: str | None = None) -> Graph:
    """The manifest's description of an ONNX file: opset, inputs and outputs with their named axes.

    Args:
        target, weights: as the manifest's Graph has them.
    """
    proto = onnx.load(path, load_external_data=False)

    def info(value: onnx.ValueInfoProto) -> TensorInfo:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        return TensorInfo(value.name, dtype, tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim))

    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    return Graph(role, precision, path.name, opset, tuple(map(info, proto.graph.input)),
                 tuple(map(info, proto.graph.output)), target, weights)

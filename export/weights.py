"""Weights beside the ONNX files that use them: one file, every array once, mapped into memory instead of read."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx
from onnx.external_data_helper import set_external_data, uses_external_data

#: Smaller arrays stay in the ONNX file.
_SMALLEST_BYTES = 1024
_ALIGNMENT = 64


class WeightsFile:
    """A file of raw arrays (little-endian, as ONNX external data wants them) that several graphs share.

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

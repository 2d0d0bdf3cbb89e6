"""Inference libraries behind one interface, one file each."""

from __future__ import annotations

from pathlib import Path

from .base import Backend, Options


def open_graph(path: Path, options: Options) -> Backend:
    """Load an ONNX file with the library that ``options`` ask for.

    Raises:
        MissingDependency: the library is not installed.
        DeviceUnavailable: the device is not there, or the library fell back to another one.
        BundleError: the library refuses the file.
    """
    if options.backend == "openvino":
        from .openvino import OpenVinoBackend

        return OpenVinoBackend(path, options)
    from .onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(path, options)


__all__ = ["Backend", "Options", "open_graph"]

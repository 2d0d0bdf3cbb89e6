"""Inference libraries behind one interface, one file each."""

from __future__ import annotations

from pathlib import Path

from ..bundle import Bundle
from ..engines import LIBRARIES
from ..manifest import Graph
from .base import Backend, Options
from .watched import WatchedBackend


def open_tower(bundle: Bundle, graph: Graph, options: Options) -> Backend:
    """Load one of a bundle's graphs, or the engine that was built from it.

    Raises:
        EngineRefused: no engine that fits, or a damaged one.
        DcformerError: as ``open_graph``.
    """
    if options.backend in LIBRARIES:
        from .tensorrt import TensorRtBackend

        return TensorRtBackend(bundle, graph.role, options)
    if graph.weights is None:
        return open_graph(bundle.path(graph.file), options)
    weights = bundle.hold(graph.weights)
    backend = open_graph(bundle.path(graph.file), options)
    bundle.path(graph.weights)  # so the library has opened the file that is held
    return WatchedBackend(backend, weights)


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


__all__ = ["Backend", "Options", "open_graph", "open_tower"]

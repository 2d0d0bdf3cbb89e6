"""Engines from their files: TensorRT's and TensorRT-RTX's own objects.

Run with a faked library only; on a GPU not yet.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from typing import Any

from ..bundle import Bundle
from ..engine_library import Library, Log, explained
from ..engines import EngineRecord, Gpu, build_command, read_engine
from ..errors import DcformerError, DcformerWarning, EngineRefused, InferenceError
from ..files import atomic_file, cache_folder


def deserialize(library: Library, bundle: Bundle, record: EngineRecord) -> tuple[Any, Log]:
    """A bundle's engine, once its bytes are those that were recorded, and what the library says of it.

    Raises:
        EngineRefused: other bytes, or the library's reason.
    """
    log, engine = Log(library), None
    plan = read_engine(bundle, record)
    try:
        with explained(record.engine):
            runtime = library.module.Runtime(log.logger)
            if runtime and record.version_compatible:
                # Such engines bring a runtime of their own, which TensorRT does not load unasked; these bytes are the
                # bundle's.
                runtime.engine_host_code_allowed = True
            engine = runtime.deserialize_cuda_engine(plan) if runtime else None
        reason = log.last()
    except InferenceError as error:
        reason = str(error)
    if engine is None:
        raise EngineRefused(f"{bundle.folder / record.engine}: {library.name} {library.version} refuses it here: "
                            f"{reason}; run on this machine: "
                            f"{build_command(bundle.folder, record.precision, record.library)}")
    if record.flags.get("strip_weights"):
        _refit(library, bundle, record, engine, log)
    return engine, log


def _refit(library: Library, bundle: Bundle, record: EngineRecord, engine: Any, log: Log) -> None:
    """Give an engine that was built without its weights those of its ONNX file."""
    refitter = library.module.Refitter(engine, log.logger)
    parser = library.module.OnnxParserRefitter(refitter, log.logger)
    if record.weights is not None:
        bundle.path(record.weights)  # raises if it is no longer the file that was checked
    if not parser.refit_from_file(str(bundle.path(record.onnx))) or not refitter.refit_cuda_engine():
        raise EngineRefused(f"{bundle.folder / record.engine}: its weights cannot be filled in from {record.onnx}: "
                            f"{log.last()}; run without --strip-weights: "
                            f"{build_command(bundle.folder, record.precision, record.library)}")


#: Combinations of shapes after whose first run the cache is written: texts come in hundreds.
_MOST_KEPT = 16


class Compiled:
    """TensorRT-RTX compiles for the GPU at first use; what it compiled is kept for the next start.

    ``config``: for execution contexts.
    """

    def __init__(self, library: Library, engine: Any, record: EngineRecord, gpu: Gpu) -> None:
        device = re.sub("[^A-Za-z0-9]+", "-", gpu.name)
        self._path = cache_folder() / "tensorrt_rtx" / f"{record.sha256[:20]}-{device}-{record.version}.cache"
        self.config = engine.create_runtime_config()
        self.config.cuda_graph_strategy = library.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # By default the first runs of a shape use a slower kernel, while a thread compiles the one for that shape.
        # Scans come in one shape, which is worth waiting for once; texts in many.
        strategies = library.module.DynamicShapesKernelSpecializationStrategy
        self.config.dynamic_shapes_kernel_specialization_strategy = (
            strategies.EAGER if record.role == "image" else strategies.LAZY)
        self._cache = self.config.create_runtime_cache()
        self._stored = b""  # also where it is of another driver, damaged or unreadable: then it is compiled anew
        with contextlib.suppress(OSError):
            stored = self._path.read_bytes()
            self._stored = stored if self._cache.deserialize(stored) else b""
        self.config.set_runtime_cache(self._cache)
        self._seen: set[Any] = set()

    def keep(self, shapes: Any) -> None:
        """Write it, after the first run of each of the first combinations of shapes, if that has compiled anything."""
        if shapes in self._seen or len(self._seen) >= _MOST_KEPT:
            return
        self._seen.add(shapes)
        now = bytes(memoryview(self._cache.serialize()))
        if now == self._stored:
            return
        self._stored = now
        try:
            with atomic_file(self._path) as temporary:
                temporary.write_bytes(now)
        except (OSError, DcformerError) as error:
            warnings.warn(f"{self._path}: {error}; tensorrt_rtx compiles anew each time. XDG_CACHE_HOME names another "
                          "folder", DcformerWarning, stacklevel=4)

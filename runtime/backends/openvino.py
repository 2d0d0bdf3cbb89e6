"""OpenVINO on the CPU: an optional back end; its own kernels for three-dimensional convolutions are fast."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..errors import BundleError, DeviceUnavailable, InferenceError, MissingDependency, install
from .base import Options


class OpenVinoBackend:
    """One compiled model; each thread that runs it gets a request of its own. See ``Backend``."""

    def __init__(self, path: Path, options: Options) -> None:
        if options.device != "cpu":
            raise DeviceUnavailable(f"device {options.device!r}: the openvino back end runs on the CPU; drop one "
                                    "of the two options")
        library = _import_openvino()
        # Without the hint OpenVINO computes in bfloat16 wherever the CPU can, which nobody asked for.
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": options.thread_count,
                    "INFERENCE_PRECISION_HINT": "bf16" if options.bf16 else "f32"}
        try:
            core = library.Core()
            if options.bf16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
                raise DeviceUnavailable("bf16: this CPU has no bfloat16 units, so it would be slower and less exact; "
                                        "drop --bf16")
            self._compiled = core.compile_model(str(path), "CPU", settings)
        except RuntimeError as error:
            raise BundleError(f"{path}: openvino {library.__version__} refuses it: {_brief(error)}") from error
        self._requests = threading.local()
        self._path = path
        self._description = (f"openvino {library.__version__}, CPU{', bfloat16' if options.bf16 else ''}, "
                             f"{options.thread_count} threads")

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Compute the named outputs.

        Raises:
            InferenceError: the library failed, for example for want of memory.
        """
        if not hasattr(self._requests, "mine"):
            self._requests.mine = self._compiled.create_infer_request()
        request = self._requests.mine
        try:
            request.infer(dict(feeds), share_inputs=True)
            # Copies: the request's own tensors are overwritten by its next inference.
            return [request.get_tensor(name).data.copy() for name in outputs]
        except RuntimeError as error:
            raise InferenceError(f"{self._path}: inference failed: {_brief(error)}") from error

    def describe(self) -> str:
        """Library, version, precision where it is not fp32, and threads."""
        return self._description


def _import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingDependency(f"the openvino back end: openvino is not installed (or broken: {error}); "
                                f"{install('openvino')}") from error
    return openvino


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

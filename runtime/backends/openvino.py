"""OpenVINO on the CPU: an optional back end; its own kernels for three-dimensional convolutions are fast."""

from __future__ import annotations

import functools
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from numpy.typing import NDArray

from ..errors import BundleError, DcformerWarning, DeviceUnavailable, InferenceError, MissingDependency, install
from ..files import cache_folder
from ..forks import ForkableLock
from . import saturation
from .base import Options

#: Why it is not done all the same.
NO_BFLOAT16 = "bf16: this CPU has no bfloat16 units, so it would be slower and less exact"
#: Numbers are rounded as INT8's, products of them are float32.
_INT8_OFF = {"LP_TRANSFORMS_MODE": "NO"}
#: Of the cache: OpenVINO would take what it has compiled with other settings for the same.
_IN_FLOAT = "int8-in-float32"
_USAGE_DATA = "openvino_telemetry"
_IMPORT_LOCK = ForkableLock()


class OpenVinoBackend:
    """A model compiled for a batch of one, which is faster than for any, and for any once that is asked for.

    Each thread that runs it gets a request of its own. Compiled models are kept in the user's cache folder. See
    ``Backend``.
    """

    def __init__(self, path: Path, options: Options) -> None:
        self._library, self._core = import_openvino(), shared_core()
        self._settings = cpu_settings(options)
        in_float = _INT8_OFF.items() <= self._settings.items()
        if (cache := _cache(_IN_FLOAT if in_float else "")) is not None:
            self._settings["CACHE_DIR"] = str(cache)
        self._path = path
        _require_threads(path)
        self._compiled: dict[int | None, Any] = {}
        self._requests = threading.local()
        self._lock = ForkableLock()
        if options.precision == "bf16" and not has_bfloat16():
            raise DeviceUnavailable(f"{NO_BFLOAT16}; choose another --precision")
        if in_float:
            saturation.warn("openvino")
        with self._reading():
            self._model = self._core.read_model(str(path))
        batches = [shape for shape in (tensor.partial_shape for tensor in self._model.inputs)
                   if shape[0].is_dynamic and all(not side.is_dynamic for side in list(shape)[1:])]
        self._only_batch_is_dynamic = len(batches) == len(self._model.inputs)
        self._compile(self._key(1))
        units = ", bfloat16" if options.precision == "bf16" else ", INT8 in float32" if in_float else ""
        self._description = f"openvino {self._library.__version__}, CPU{units}, {options.thread_count} threads"

    def _key(self, batch: int) -> int | None:
        return 1 if self._only_batch_is_dynamic and batch == 1 else None

    def _compile(self, key: int | None) -> Any:
        with self._lock, self._reading():
            if key not in self._compiled:
                model = self._model
                if key is not None:
                    model = model.clone()
                    model.reshape({tensor.any_name: [key, *_fixed_sides(tensor)] for tensor in model.inputs})
                self._compiled[key] = self._core.compile_model(model, "CPU", self._settings)
            return self._compiled[key]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            with _busy():
                yield
        except RuntimeError as error:
            raise BundleError(f"{self._path}: openvino {self._library.__version__} refuses it: "
                              f"{_brief(error)}") from error

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Compute the named outputs.

        Raises:
            InferenceError: the library failed, for example for want of memory.
        """
        _require_threads(self._path)
        key = self._key(max(len(array) for array in feeds.values()))
        requests: dict[int | None, Any] = self._requests.__dict__.setdefault("by_key", {})
        if key not in requests:
            requests[key] = self._compile(key).create_infer_request()
        request = requests[key]
        try:
            with _busy():
                request.infer(dict(feeds), share_inputs=True)
            # Copies: the request's own tensors are overwritten by its next inference.
            return [request.get_tensor(name).data.copy() for name in outputs]
        except RuntimeError as error:
            raise InferenceError(f"{self._path}: inference failed: {_brief(error)}") from error

    def describe(self) -> str:
        """Library, version, precision where it is not fp32, and threads."""
        return self._description


_CORE_LOCK = ForkableLock()
_CORES: list[Any] = []
#: Threads inside of the library, and those that were when this process was forked, which would wait for them for ever.
_BUSY: set[int] = set()
_FORKED: list[int] = []


@contextmanager
def _busy() -> Iterator[None]:
    _BUSY.add(threading.get_ident())
    try:
        yield
    finally:
        _BUSY.discard(threading.get_ident())


def _require_threads(path: Path) -> None:
    if _FORKED:
        raise InferenceError(f"{path}: this process was forked while openvino computed, whose threads it has not; "
                             "start processes by spawn, or before the first model computes")


def _after_fork() -> None:
    _FORKED.extend(_BUSY)
    _BUSY.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def shared_core() -> Any:
    """OpenVINO's ``Core``, one for as long as this process lives. Raises ``MissingDependency`` without openvino.

    With the first model that a core compiles it gives this thread a stack for signals, and takes it away when the core
    goes. Of two cores the one that goes last brings back the stack of the other, which is gone: the next signal, such
    as Ctrl-C, ends the process, or writes into what has the memory now. Seen with openvino 2026.4.
    """
    library = import_openvino()
    with _CORE_LOCK:
        if not _CORES:
            _CORES.append(library.Core())
        return _CORES[0]


def has_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16 at full speed. Raises ``MissingDependency`` without openvino."""
    return "BF16" in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@functools.cache
def int8_saturates() -> bool:
    """Whether INT8 sums overflow here (see ``saturation``). Raises ``MissingDependency`` without openvino."""
    core = shared_core()
    model = core.compile_model(core.read_model(saturation.SUM), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = model.create_infer_request()
    request.infer([saturation.largest_input()])
    return not saturation.is_exact(request.get_output_tensor().data)


def cpu_settings(options: Options) -> dict[str, Any]:
    """What OpenVINO is told when it compiles."""
    # Without the hint OpenVINO computes in bfloat16 wherever the CPU can, which nobody asked for.
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": options.thread_count,
                "INFERENCE_PRECISION_HINT": "bf16" if options.precision == "bf16" else "f32"}
    if options.precision == "int8" and int8_saturates():
        settings |= _INT8_OFF
    return settings


def _fixed_sides(tensor: Any) -> list[int]:
    """All but the batch."""
    return [side.get_length() for side in list(tensor.partial_shape)[1:]]


def _cache(part: str) -> Path | None:
    """Where compiled models are kept; None, with a warning, where nothing can be written."""
    folder = cache_folder() / "openvino" / part
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        warnings.warn(f"{folder}: {error.strerror or error}; openvino compiles anew each time. XDG_CACHE_HOME names "
                      "another folder", DcformerWarning, stacklevel=4)
        return None
    return folder


def import_openvino() -> Any:
    """The library, which sends nothing. Raises ``MissingDependency`` if it is not installed."""
    try:
        with _IMPORT_LOCK, _no_usage_data():
            import openvino
    except ImportError as error:
        raise MissingDependency(f"the openvino back end: openvino is not installed (or broken: {error}); "
                                f"{install('openvino')}") from error
    return openvino


@contextmanager
def _no_usage_data() -> Iterator[None]:
    """Import openvino as where its package for usage data is not installed.

    With it each import is told to Google Analytics, with an identifier kept in ~/intel; only a file in the user's home
    would turn that off. Seen with openvino 2026.4. A hospital's program must not.
    """
    if "openvino" in sys.modules or _USAGE_DATA in sys.modules:
        yield
        return
    sys.modules[_USAGE_DATA] = cast(ModuleType, None)  # makes its import an ImportError, for which openvino is prepared
    try:
        yield
    finally:
        del sys.modules[_USAGE_DATA]


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

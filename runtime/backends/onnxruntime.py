"""ONNX Runtime.

The CPU provider is tested; those for GPUs (CUDA, TensorRT, TensorRT-RTX) have never been run by us, only their checks
have.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..errors import BundleError, DcformerWarning, DeviceUnavailable, InferenceError, MissingDependency, install
from ..files import cache_folder
from . import saturation
from .base import Options

_PROVIDERS = {("onnxruntime", "cpu"): "CPUExecutionProvider", ("onnxruntime", "cuda"): "CUDAExecutionProvider",
              ("onnxruntime-tensorrt", "cuda"): "TensorrtExecutionProvider",
              ("onnxruntime-tensorrt-rtx", "cuda"): "NvTensorRTRTXExecutionProvider"}
#: NVIDIA's plugin, which is registered with ONNX Runtime by path.
_RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
_FATAL_LEVEL = 4  # errors come as exceptions; the library's own log lines would only repeat them


def installed_distributions() -> list[str]:
    """Which of the two distributions are installed; both at once overwrite each other's files."""
    found = []
    for name in _DISTRIBUTIONS:
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found.append(name)
    return found


def import_onnxruntime() -> Any:
    """The library; a warning if both distributions are there.

    Raises:
        MissingDependency: it is not installed.
    """
    if len(installed_distributions()) > 1:
        warnings.warn("onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; uninstall "
                      f"both, then {install('cpu')} (or [cuda])",
                      DcformerWarning, stacklevel=2)
    try:
        import onnxruntime
    except ImportError as error:
        if isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):  # Ctrl-C while its own code started
            raise KeyboardInterrupt from error
        raise MissingDependency("no inference library: onnxruntime is not installed (or broken: "
                                f"{error}); {install('cpu')} (or [cuda])") from error
    _hush()
    return onnxruntime


@functools.cache
def _hush() -> None:
    """Once, so that whoever wants its log can have it: what belongs to no session, such as its memory, logs, too."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(_FATAL_LEVEL)


def session_options(threads: int, on_cpu: bool = True) -> Any:
    """What every session is told. Raises ``MissingDependency`` if onnxruntime is not installed."""
    settings = _options(import_onnxruntime(), threads)
    if on_cpu and int8_saturates():
        # Not session.x64quantprecision, which is for this, but refuses graphs (onnxruntime 1.32).
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    return settings


def _options(library: Any, threads: int) -> Any:
    settings = library.SessionOptions()
    settings.log_severity_level = _FATAL_LEVEL
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    return settings


@functools.cache
def int8_saturates() -> bool:
    """Whether INT8 sums overflow here (see ``saturation``). Raises ``MissingDependency`` without onnxruntime."""
    library = import_onnxruntime()
    session = library.InferenceSession(str(saturation.SUM), _options(library, 1), providers=["CPUExecutionProvider"])
    return not saturation.is_exact(session.run(["y"], {"x": saturation.largest_input()})[0])


class OnnxRuntimeBackend:
    """One ONNX Runtime session. See ``Backend``."""

    def __init__(self, path: Path, options: Options) -> None:
        library = import_onnxruntime()
        provider = _PROVIDERS[options.backend, options.device]
        on_cpu = options.device == "cpu"
        settings = session_options(options.thread_count, on_cpu)
        if options.backend == "onnxruntime-tensorrt-rtx":
            settings.add_provider_for_devices(_rtx_devices(library), {})
            chosen = {}
        else:
            if provider not in library.get_available_providers():
                raise DeviceUnavailable(f"device {options.device!r}: this onnxruntime has no {provider}, only "
                                        f"{', '.join(library.get_available_providers())}; pip uninstall onnxruntime, "
                                        f"then {install('cuda')}")
            chosen = {"providers": [(provider, _provider_options(provider, options.precision))]}
        try:
            self._session = library.InferenceSession(str(path), settings, **chosen)
        except Exception as error:  # onnxruntime's own exceptions have no common base but Exception
            raise BundleError(f"{path}: onnxruntime {library.__version__} refuses it: {_brief(error)}") from error
        # A provider that fails to start is dropped with a log line only: read back what is really there.
        if self._session.get_providers()[0] != provider:
            raise DeviceUnavailable(f"device {options.device!r}: {provider} did not start; onnxruntime fell back to "
                                    f"{self._session.get_providers()[0]}. Check the driver and CUDA libraries")
        self._path = path
        units = ""
        if on_cpu and options.precision == "int8" and int8_saturates():
            saturation.warn("onnxruntime")
            units = ", INT8 in float32"
        self._description = f"onnxruntime {library.__version__}, {provider}{units}, {options.thread_count} threads"

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Compute the named outputs.

        Raises:
            InferenceError: the library failed, for example for want of memory.
        """
        try:
            return self._session.run(list(outputs), dict(feeds))
        except Exception as error:  # as above
            raise InferenceError(f"{self._path}: inference failed: {_brief(error)}") from error

    def describe(self) -> str:
        """Library, version, provider and threads."""
        return self._description


def _provider_options(provider: str, precision: str) -> dict[str, str]:
    # Its own default is to compute float32 with 10 bits of mantissa.
    if provider == "CUDAExecutionProvider":
        return {"use_tf32": "0"}
    if provider != "TensorrtExecutionProvider":
        return {}
    # It must be told which types the graph has, and chooses among them by itself: what the graph keeps in float32 may
    # become FP16.
    caches = cache_folder() / "onnxruntime-tensorrt"
    return {"trt_fp16_enable": str(int(precision != "fp32")), "trt_int8_enable": str(int(precision == "int8")),
            "trt_bf16_enable": str(int(precision == "bf16")), "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(caches)}


def _rtx_devices(library: Any) -> list[Any]:
    """GPUs that the TensorRT-RTX plugin has found; registers it first.

    Raises:
        MissingDependency: the plugin is not installed.
        DeviceUnavailable: it does not load, or finds no GPU.
    """
    try:
        plugin = importlib.import_module(_RTX_PLUGIN)
    except ImportError as error:
        raise MissingDependency(f"{_RTX_PLUGIN} is not installed (or broken: {error}); pip install "
                                "onnxruntime-ep-nv-tensorrt-rtx") from error
    name = plugin.get_ep_name()
    try:
        if all(device.ep_name != name for device in library.get_ep_devices()):
            library.register_execution_provider_library(name, plugin.get_library_path())
    except Exception as error:  # as above
        raise DeviceUnavailable(f"{_RTX_PLUGIN} does not load: {_brief(error)}; run on a machine with a GPU") from error
    devices = [device for device in library.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise DeviceUnavailable(f"{_RTX_PLUGIN} finds no GPU that it supports")
    return devices[:1]


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

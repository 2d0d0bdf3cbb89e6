"""ONNX Runtime. The CPU provider is tested; the CUDA provider has never been run by us, only its checks have."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..errors import BundleError, DcformerWarning, DeviceUnavailable, InferenceError, MissingDependency, install
from .base import Options

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
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
        raise MissingDependency("no inference library: onnxruntime is not installed (or broken: "
                                f"{error}); {install('cpu')} (or [cuda])") from error
    return onnxruntime


class OnnxRuntimeBackend:
    """One ONNX Runtime session. See ``Backend``."""

    def __init__(self, path: Path, options: Options) -> None:
        library = import_onnxruntime()
        provider = _PROVIDERS[options.device]
        if provider not in library.get_available_providers():
            raise DeviceUnavailable(f"device {options.device!r}: this onnxruntime has no {provider}, only "
                                    f"{', '.join(library.get_available_providers())}; pip uninstall onnxruntime, then "
                                    f"{install('cuda')}")
        settings = library.SessionOptions()
        settings.log_severity_level = _FATAL_LEVEL
        settings.intra_op_num_threads = options.thread_count
        settings.inter_op_num_threads = 1
        try:
            self._session = library.InferenceSession(str(path), settings, providers=[provider])
        except Exception as error:  # onnxruntime's own exceptions have no common base but Exception
            raise BundleError(f"{path}: onnxruntime {library.__version__} refuses it: {_brief(error)}") from error
        # A provider that fails to start is dropped with a log line only: read back what is really there.
        if self._session.get_providers()[0] != provider:
            raise DeviceUnavailable(f"device {options.device!r}: {provider} did not start; onnxruntime fell back to "
                                    f"{self._session.get_providers()[0]}. Check the driver and CUDA libraries")
        self._path = path
        self._description = f"onnxruntime {library.__version__}, {provider}, {options.thread_count} threads"

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


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

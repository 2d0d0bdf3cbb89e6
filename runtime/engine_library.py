"""TensorRT and TensorRT-RTX: one interface, two modules; for building engines and for running them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .engines import LIBRARIES
from .errors import DcformerError, InferenceError, InputError, MissingDependency, one_line

AUTO = "auto"
#: NVIDIA's own packages.
_INSTALL = {"tensorrt": "pip install tensorrt-cu12 (or -cu13, as your driver's CUDA version)",
            "tensorrt_rtx": "pip install tensorrt-rtx-cu13"}
_OLDEST = 10


@dataclass(frozen=True)
class Library:
    """``module``: the imported package. ``version``: such as "10.13.2.6"."""

    name: str
    module: Any
    version: str

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX, which finishes compiling on the GPU that runs the engine."""
        return self.name == "tensorrt_rtx"


def load_library(name: str) -> Library:
    """Import a library; "auto" takes tensorrt where it is installed, else tensorrt_rtx.

    Raises:
        InputError: no such library, or one too old for strongly typed networks.
        MissingDependency: not installed.
    """
    if name not in (AUTO, *LIBRARIES):
        raise InputError(f"--engine-library {name!r}: expected one of {', '.join((AUTO, *LIBRARIES))}")
    reasons = []
    for candidate in LIBRARIES if name == AUTO else (name,):
        try:
            module = importlib.import_module(candidate)
        except ImportError as error:
            reasons.append(f"{candidate} is not installed (or broken: {error}); {_INSTALL[candidate]}")
            continue
        version = str(module.__version__)
        if candidate == "tensorrt" and int(version.split(".")[0]) < _OLDEST:
            raise InputError(f"tensorrt {version}: too old for strongly typed networks; {_OLDEST}.0 or newer is needed")
        return Library(candidate, module, version)
    raise MissingDependency("; ".join(reasons))


@contextmanager
def explained(engine: str) -> Iterator[None]:
    """What a library's bindings raise, which have no common base, as this project's.

    Raises:
        InferenceError: the engine, and what was raised.
    """
    try:
        yield
    except DcformerError:
        raise
    except Exception as error:
        raise InferenceError(f"{engine}: {type(error).__name__}: {one_line(str(error))}") from error


class Log:
    """Collects a library's errors, its only explanation of a failure. ``logger``: what the library writes to."""

    def __init__(self, library: Library) -> None:
        trt, found = library.module, list[str]()
        self._found = found

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    found.append(one_line(message))

        self.logger = Logger()

    def all(self) -> str:
        """Every error that was seen, once."""
        return "; ".join(dict.fromkeys(self._found)) or "no reason given"

    def last(self) -> str:
        """The last error."""
        return self._found[-1] if self._found else "no reason given"

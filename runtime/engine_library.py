"""TensorRT and TensorRT-RTX: one interface, two modules; for building engines and for running them."""

from __future__ import annotations

import gc
import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .engines import LIBRARIES
from .errors import DcformerError, InferenceError, InputError, MissingDependency, install, one_line

AUTO = "auto"
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
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
            reasons.append(f"{candidate} is not installed (or broken: {error}); {install(_EXTRAS[candidate])}")
            continue
        version = str(module.__version__)
        if candidate == "tensorrt" and int(version.split(".")[0]) < _OLDEST:
            raise InputError(f"tensorrt {version}: too old for strongly typed networks; {_OLDEST}.0 or newer is needed")
        return Library(candidate, module, version)
    raise MissingDependency("; ".join(reasons))


class _Uncollected:
    """Python's garbage collector, off while anybody needs it off."""

    def __init__(self) -> None:
        self._lock, self._users, self._was_on = threading.Lock(), 0, False

    def begin(self) -> None:
        with self._lock:
            if not self._users:
                self._was_on = gc.isenabled()
                gc.disable()
            self._users += 1

    def end(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users and self._was_on:
                gc.enable()


_UNCOLLECTED = _Uncollected()


@contextmanager
def uncollected() -> Iterator[None]:
    """Nothing is collected meanwhile, in any thread: for calls that make objects of the library.

    The library calls its logger, which is Python, while it holds a lock that every end of one of its objects takes. A
    collection just then that finds such an object waits for ever: in the same thread for itself, in another one with
    what the logger needs to go on. Seen with tensorrt_rtx 1.7.
    """
    _UNCOLLECTED.begin()
    try:
        yield
    finally:
        _UNCOLLECTED.end()


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

"""TensorRT and TensorRT-RTX: one interface, two modules; for building engines and for running them."""

from __future__ import annotations

import gc
import importlib
import itertools
import threading
from collections import deque
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

    Where something else in this process uses the library with a logger of its own, it calls ours while it holds a lock
    that every end of one of its objects takes (see ``_Ears``). A collection just then that finds such an object waits
    for ever: in the same thread for itself, in another one with what the logger needs to go on.
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


@dataclass(frozen=True)
class _Heard:
    """An error. ``thread``: of Python's, that had called the library; None for the library's own threads."""

    number: int
    thread: int | None
    text: str


class _Ears:
    """What a library writes its messages to, one for all of its objects and for as long as this process lives.

    For what belongs to no object the library keeps the logger of the oldest one that is alive. Where an object is made
    with another logger, it says so in a message, holding a lock that every end of an object takes. So with a logger
    for each, a thread that lets go of an object just then waits for that lock with Python's own in its hands, for which
    the message waits, and both wait for ever. And the oldest object's logger may be gone before the others. Seen with
    tensorrt_rtx 1.7.
    """

    def __init__(self, trt: Any) -> None:
        heard = deque[_Heard](maxlen=_MOST_HEARD)
        self.heard, numbers = heard, itertools.count(1)

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    heard.append(_Heard(next(numbers), _own_thread(), one_line(message)))

        self.logger = Logger()


def _own_thread() -> int | None:
    """The running thread, if Python started it; threading keeps a dummy for others that have asked it something."""
    own = threading.get_ident()
    known = any(thread.ident == own and not isinstance(thread, threading._DummyThread)
                for thread in threading.enumerate())
    return own if known else None


#: Errors that are remembered.
_MOST_HEARD = 10_000
#: By module.
_EARS: dict[Any, _Ears] = {}
_EARS_LOCK = threading.Lock()


def _ears(trt: Any) -> _Ears:
    with _EARS_LOCK:
        if trt not in _EARS:
            _EARS[trt] = _Ears(trt)
        return _EARS[trt]


class Log:
    """A library's errors from now on, its only explanation of a failure. ``logger``: for the library's objects.

    Those that other threads brought about by their own calls are left out; what the library's own threads say is not,
    whoever they work for.
    """

    def __init__(self, library: Library) -> None:
        self._ears = _ears(library.module)
        self.logger = self._ears.logger
        last = list(self._ears.heard)[-1:]
        self._since = last[0].number if last else 0

    def _errors(self) -> list[str]:
        return [error.text for error in list(self._ears.heard)
                if error.number > self._since and error.thread in (None, threading.get_ident())]

    def all(self) -> str:
        """Every error that was seen, once."""
        return "; ".join(dict.fromkeys(self._errors())) or "no reason given"

    def last(self) -> str:
        """The last error."""
        return (self._errors() or ["no reason given"])[-1]

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

    The library keeps the logger of the oldest object that is alive for what belongs to none. It is not the object's
    that is made next, it says so in a message, and holds a lock meanwhile that every end of an object takes: with one
    logger for each, a thread that lets go of an object while another makes one waits for it with Python's own lock in
    its hands, and both for ever. And the oldest object's may be gone before the others. Seen with tensorrt_rtx 1.7.
    """

    def __init__(self, trt: Any) -> None:
        heard = deque[_Heard](maxlen=_MOST_HEARD)
        self.heard, self.module, numbers = heard, trt, itertools.count(1)

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    own = threading.get_ident()
                    known = any(thread.ident == own for thread in threading.enumerate())
                    heard.append(_Heard(next(numbers), own if known else None, one_line(message)))

        self.logger = Logger()


#: Errors that are remembered.
_MOST_HEARD = 1000
_EARS: dict[int, _Ears] = {}
_EARS_LOCK = threading.Lock()


def _ears(trt: Any) -> _Ears:
    with _EARS_LOCK:
        return _EARS.setdefault(id(trt), _EARS.get(id(trt)) or _Ears(trt))


class Log:
    """A library's errors from now on, its only explanation of a failure. ``logger``: for the library's objects.

    Those that other threads brought about by their own calls are left out.
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

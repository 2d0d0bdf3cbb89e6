"""Memory of the GPU while something happens, by NVIDIA's management library (nvidia-ml-py).

Run with a faked library in the tests; on a GPU not yet.
"""

from __future__ import annotations

import importlib
import threading
from types import TracebackType
from typing import Any, Self

_PERIOD_S = 0.005


class PeakMemory:
    """Watches how much of the GPU's memory is taken, by anyone, in a thread of its own.

    ``grown_bytes``: at most, beyond what was taken at the beginning; None without NVML. Between two looks (5 ms) memory
    may have come and gone.
    """

    def __init__(self, index: int = 0) -> None:
        self.grown_bytes: int | None = None
        self._index, self._done = index, threading.Event()
        self._library: Any = None
        self._thread = threading.Thread(target=self._watch, name="NVML", daemon=True)

    def __enter__(self) -> Self:
        try:
            self._library = importlib.import_module("pynvml")
            self._library.nvmlInit()
        except Exception:  # ImportError, or the library's own where there is no driver: then there is no figure
            self._library = None
            return self
        self._handle = self._library.nvmlDeviceGetHandleByIndex(self._index)
        self._before = self._used()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        if self._library is None:
            return
        self._done.set()
        self._thread.join()
        self._look()
        self._library.nvmlShutdown()

    def _watch(self) -> None:
        while not self._done.wait(_PERIOD_S):
            self._look()

    def _look(self) -> None:
        self.grown_bytes = max(self.grown_bytes or 0, self._used() - self._before)

    def _used(self) -> int:
        return int(self._library.nvmlDeviceGetMemoryInfo(self._handle).used)

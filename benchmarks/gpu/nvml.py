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

    ``grown_bytes``: known at the end: at most, beyond what was taken at the beginning; None without NVML. Between two
    looks (5 ms) memory may have come and gone.

    Args:
        pci_bus_id: of the GPU, as ``Device.pci_bus_id``.
    """

    def __init__(self, pci_bus_id: bytes) -> None:
        self.grown_bytes: int | None = None
        self._pci_bus_id, self._done, self._looked = pci_bus_id, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="NVML", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._looked.wait()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        try:
            library = importlib.import_module("pynvml")
            library.nvmlInit()
            handle = library.nvmlDeviceGetHandleByPciBusId(self._pci_bus_id)
            before = _used(library, handle)
            self._looked.set()
            largest, is_last = before, False
            while not is_last:
                is_last = self._done.wait(_PERIOD_S)
                largest = max(largest, _used(library, handle))
            library.nvmlShutdown()
            self.grown_bytes = largest - before
        except Exception:  # not installed, or the library's own error: then there is no figure, which the report shows
            self.grown_bytes = None
        finally:
            self._looked.set()


def _used(library: Any, handle: Any) -> int:
    return int(library.nvmlDeviceGetMemoryInfo(handle).used)

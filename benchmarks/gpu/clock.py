"""Time on the GPU, between two events of one stream."""

from __future__ import annotations

from typing import Protocol

from ...runtime.backends.device import Device


class Enqueues(Protocol):
    """``stream``: address of the CUDA stream that ``enqueue`` works on."""

    @property
    def stream(self) -> int: ...  # noqa: D102

    def enqueue(self) -> None:
        """Start one inference, without waiting."""
        ...


class Clock:
    """A pair of events."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._start, self._end = (device.call("cuEventCreate", 0) for _ in range(2))

    def time_ms(self, work: Enqueues, count: int = 1) -> float:
        """Milliseconds of one inference: the mean of ``count`` that follow each other without a gap."""
        self._device.call("cuEventRecord", self._start, work.stream)
        for _ in range(count):
            work.enqueue()
        self._device.call("cuEventRecord", self._end, work.stream)
        self._device.call("cuEventSynchronize", self._end)
        return float(self._device.call("cuEventElapsedTime", self._start, self._end)) / count

    def pci_bus_id(self) -> bytes:
        """As ``Device.pci_bus_id``."""
        return self._device.pci_bus_id()

    def free_bytes(self) -> int:
        """Memory of the device that nobody has taken."""
        return int(self._device.call("cuMemGetInfo"))

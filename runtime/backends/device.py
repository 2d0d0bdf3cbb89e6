"""Memory, streams and graphs of a CUDA device, through NVIDIA's driver bindings (cuda-python).

Run against a driver that is faked in the tests (its memory is the host's, and nothing happens before a stream is waited
for); on a GPU not yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DeviceLost, InferenceError
from ..gpu import import_driver

#: Driver errors after which nothing works any more in this process.
_FATAL = ("CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_LAUNCH_FAILED", "CUDA_ERROR_LAUNCH_TIMEOUT",
          "CUDA_ERROR_HARDWARE_STACK_ERROR", "CUDA_ERROR_ILLEGAL_INSTRUCTION", "CUDA_ERROR_MISALIGNED_ADDRESS",
          "CUDA_ERROR_INVALID_ADDRESS_SPACE", "CUDA_ERROR_INVALID_PC", "CUDA_ERROR_ECC_UNCORRECTABLE",
          "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA_ERROR_CONTEXT_IS_DESTROYED", "CUDA_ERROR_NVLINK_UNCORRECTABLE",
          "CUDA_ERROR_ASSERT", "CUDA_ERROR_DEINITIALIZED", "CUDA_ERROR_CONTAINED", "CUDA_ERROR_TENSOR_MEMORY_LEAK",
          "CUDA_ERROR_MPS_CLIENT_TERMINATED")
#: Every tensor begins at a multiple of this; TensorRT asks for 256.
ALIGNMENT = 256
#: One for all devices of a process: back ends of one bundle have a ``Device`` each, in one context.
_RECORDING = threading.RLock()


@dataclass(frozen=True)
class Plan:
    """Where tensors lie in one block of memory: offsets by name, and the block's size."""

    offsets: dict[str, int]
    total_bytes: int


def plan_buffers(sizes: Mapping[str, int]) -> Plan:
    """Tensors one after the other.

    Args:
        sizes: bytes by tensor.
    """
    offsets, end = {}, 0
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-max(1, size) // ALIGNMENT) * ALIGNMENT
    return Plan(offsets, end)


class Device:
    """The primary context of one GPU. Errors become this project's; after a fatal one, every call says so."""

    def __init__(self, index: int = 0, driver: Any = None) -> None:
        self._driver = driver or import_driver()
        self._lost: str | None = None
        #: Held while a stream is recorded, and by what would be an error meanwhile, and spoil the record: waiting for
        #: the whole context, and, as TensorRT-RTX records in a way that it does not tell, taking and freeing memory.
        self.recording = _RECORDING
        self.call("cuInit", 0)
        self._device = self.call("cuDeviceGet", index)
        self._context = self.call("cuDevicePrimaryCtxRetain", self._device)

    def call(self, name: str, *arguments: Any) -> Any:
        """A driver function's result.

        Raises:
            InferenceError: it failed; what was loaded stays usable.
            DeviceLost: it failed for good.
        """
        if self._lost is not None:
            raise DeviceLost(f"the GPU failed before ({self._lost}); nothing can run on it in this process any more: "
                             "start the program again")
        try:
            status, *values = getattr(self._driver, name)(*arguments)
        except ValueError as error:  # a status that bindings older than the driver do not know
            raise InferenceError(f"the NVIDIA driver answered to {name} what cuda-python does not know ({error}); "
                                 "install a newer one") from error
        if status != self._driver.CUresult.CUDA_SUCCESS:
            self._fail(name, getattr(status, "name", str(status)))
        return values[0] if values else None

    def _fail(self, name: str, status: str) -> None:
        if status == "CUDA_ERROR_OUT_OF_MEMORY":
            raise InferenceError(f"out of GPU memory ({name}); use a smaller batch, fewer requests at once, or close "
                                 "other programs on this GPU")
        if status in _FATAL:
            self._lost = f"{name}: {status}"
            raise DeviceLost(f"the GPU failed in {name} ({status}); nothing can run on it in this process any more: "
                             "start the program again")
        raise InferenceError(f"the NVIDIA driver answered {status} to {name}")

    def use(self) -> None:
        """Make the context that of the calling thread."""
        self.call("cuCtxSetCurrent", self._context)

    def synchronize(self) -> None:
        """Wait for everything in the context, also of other libraries."""
        with self.recording:
            self.call("cuCtxSynchronize")

    def wait_for(self, streams: tuple[int, ...] | None) -> None:
        """Wait for streams of other libraries, by their handles; None: for everything in the context."""
        if streams is None:
            self.synchronize()
            return
        for stream in streams:
            self.call("cuStreamSynchronize", stream)

    def free(self, kind: str, handle: Any) -> None:
        """Give something back; a lost device has nothing left to free."""
        if self._lost is None:
            self.call(kind, handle)


class Stream:
    """Work in order. ``handle``: for libraries that want an integer."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._stream = device.call("cuStreamCreate", 1)  # CU_STREAM_NON_BLOCKING: does not wait for the null stream

    @property
    def raw(self) -> Any:
        """The driver's own object."""
        return self._stream

    @property
    def handle(self) -> int:
        """The stream's address."""
        return int(self._stream)

    def wait(self) -> None:
        """Until all is done. Raises what failed on the way."""
        self._device.call("cuStreamSynchronize", self._stream)

    def upload(self, target: int, source: int, size: int) -> None:
        """Host to device; ``source`` is pinned memory."""
        self._device.call("cuMemcpyHtoDAsync", target, source, size, self._stream)

    def download(self, target: int, source: int, size: int) -> None:
        """Device to host; into memory that is not pinned it waits."""
        self._device.call("cuMemcpyDtoHAsync", target, source, size, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """From one place on the device to another."""
        self._device.call("cuMemcpyDtoDAsync", target, source, size, self._stream)

    def capture(self, work: Callable[[], None]) -> Any:
        """Record what ``work`` enqueues, without doing it; returns what ``replay`` wants."""
        # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may go on with their own streams meanwhile.
        mode = self._device._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        with self._device.recording:
            self._device.call("cuStreamBeginCapture", self._stream, mode)
            try:
                work()
            except BaseException:
                with contextlib.suppress(InferenceError):  # the record is spoilt; why is in the first error
                    self._device.call("cuStreamEndCapture", self._stream)
                raise
            graph = self._device.call("cuStreamEndCapture", self._stream)
        try:
            return self._device.call("cuGraphInstantiate", graph, 0)
        finally:
            self._device.free("cuGraphDestroy", graph)

    def replay(self, graph: Any) -> None:
        """Enqueue what was recorded."""
        self._device.call("cuGraphLaunch", graph, self._stream)

    def close(self) -> None:
        """Give it back."""
        self._device.free("cuStreamDestroy", self._stream)


class Memory:
    """One block on the device and, for ``staging``, one of the same layout in pinned host memory."""

    def __init__(self, device: Device, plan: Plan, staging: bool = True) -> None:
        self._device, self.plan, self._staging = device, plan, None
        with device.recording:
            self._block = device.call("cuMemAlloc", plan.total_bytes)
            if not staging:
                return
            try:
                self._staging = device.call("cuMemAllocHost", plan.total_bytes)
            except BaseException:
                device.free("cuMemFree", self._block)
                raise

    def address(self, name: str) -> int:
        """Of a tensor on the device."""
        return int(self._block) + self.plan.offsets[name]

    def staging(self, name: str) -> int:
        """Of a tensor in pinned host memory."""
        assert self._staging is not None
        return int(self._staging) + self.plan.offsets[name]

    def view(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """A tensor in pinned host memory as an array; good until ``close``."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        block = (ctypes.c_byte * size).from_address(self.staging(name))
        return np.frombuffer(memoryview(block), dtype).reshape(shape)

    def close(self) -> None:
        """Give both back."""
        with self._device.recording:
            if self._staging is not None:
                self._device.free("cuMemFreeHost", self._staging)
            self._device.free("cuMemFree", self._block)

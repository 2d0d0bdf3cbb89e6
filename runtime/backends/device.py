"""Memory, streams and graphs of a CUDA device, through NVIDIA's driver bindings (cuda-python).

Run against a driver that is faked in the tests (its memory is the host's, and nothing happens before a stream is waited
for); on a GPU not yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
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
        #: the whole context, and, as TensorRT-RTX records in a way that it does not tell, loading, taking and freeing.
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

    def pci_bus_id(self) -> bytes:
        """By which NVML knows the GPU, such as b"0000:3b:00.0": its numbers are others where some GPUs are hidden."""
        return bytes(self.call("cuDeviceGetPCIBusId", 16, self._device)).split(b"\0")[0]

    def free(self, kind: str, handle: Any) -> None:
        """Give something back; a lost device has nothing left to free."""
        if self._lost is None:
            self.call(kind, handle)


class Held:
    """Something of the driver's: given back when it is closed, or when nobody refers to it any more.

    Args:
        free: the driver's function that takes it back.
    """

    def __init__(self, device: Device, raw: Any, free: str) -> None:
        self._device, self.raw, self._free = device, raw, free
        self._dropped = weakref.finalize(self, _give_back, device, free, raw)
        self._dropped.atexit = False  # the driver's own end takes everything

    def close(self) -> None:
        """Give it back, once."""
        if self._dropped.detach() is not None:
            with self._device.recording:
                self._device.free(self._free, self.raw)


def _give_back(device: Device, free: str, raw: Any) -> None:
    """In whatever thread a finalizer runs; nobody could hear of an error."""
    with contextlib.suppress(InferenceError), device.recording:
        device.use()
        device.free(free, raw)


class Stream(Held):
    """Work in order. ``raw``: the driver's own object. ``handle``: for libraries that want an integer."""

    def __init__(self, device: Device) -> None:
        # CU_STREAM_NON_BLOCKING: does not wait for the null stream
        super().__init__(device, device.call("cuStreamCreate", 1), "cuStreamDestroy")

    @property
    def handle(self) -> int:
        """The stream's address."""
        return int(self.raw)

    def wait(self) -> None:
        """Until all is done. Raises what failed on the way."""
        self._device.call("cuStreamSynchronize", self.raw)

    def upload(self, target: int, source: int, size: int) -> None:
        """Host to device; ``source`` is pinned memory."""
        self._device.call("cuMemcpyHtoDAsync", target, source, size, self.raw)

    def download(self, target: int, source: int, size: int) -> None:
        """Device to host; into memory that is not pinned it waits."""
        self._device.call("cuMemcpyDtoHAsync", target, source, size, self.raw)

    def copy(self, target: int, source: int, size: int) -> None:
        """From one place on the device to another."""
        self._device.call("cuMemcpyDtoDAsync", target, source, size, self.raw)

    def capture(self, work: Callable[[], None]) -> Held:
        """Record what ``work`` enqueues, without doing it; returns what ``replay`` wants."""
        # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may go on with their own streams meanwhile.
        mode = self._device._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        with self._device.recording:
            self._device.call("cuStreamBeginCapture", self.raw, mode)
            try:
                work()
            except BaseException:
                with contextlib.suppress(InferenceError):  # the record is spoilt; why is in the first error
                    self._device.call("cuStreamEndCapture", self.raw)
                raise
            graph = self._device.call("cuStreamEndCapture", self.raw)
        try:
            return Held(self._device, self._device.call("cuGraphInstantiate", graph, 0), "cuGraphExecDestroy")
        finally:
            self._device.free("cuGraphDestroy", graph)

    def replay(self, graph: Held) -> None:
        """Enqueue what was recorded."""
        self._device.call("cuGraphLaunch", graph.raw, self.raw)


class Memory:
    """One block on the device and, for ``staging``, one of the same layout in pinned host memory.

    Given back like ``Held``.
    """

    def __init__(self, device: Device, plan: Plan, staging: bool = True) -> None:
        self.plan, self._staging = plan, None
        with device.recording:
            self._block = Held(device, device.call("cuMemAlloc", plan.total_bytes), "cuMemFree")
            if staging:
                try:
                    self._staging = Held(device, device.call("cuMemAllocHost", plan.total_bytes), "cuMemFreeHost")
                except BaseException:
                    self._block.close()
                    raise

    def address(self, name: str) -> int:
        """Of a tensor on the device."""
        return int(self._block.raw) + self.plan.offsets[name]

    def staging(self, name: str) -> int:
        """Of a tensor in pinned host memory."""
        assert self._staging is not None
        return int(self._staging.raw) + self.plan.offsets[name]

    def view(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """A tensor in pinned host memory as an array; good until ``close``."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        block = (ctypes.c_byte * size).from_address(self.staging(name))
        return np.frombuffer(memoryview(block), dtype).reshape(shape)

    def close(self) -> None:
        """Give both back."""
        if self._staging is not None:
            self._staging.close()
        self._block.close()

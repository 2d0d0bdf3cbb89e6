"""TensorRT and TensorRT-RTX engines.

Each request takes a slot from a bounded pool: an execution context, a stream, one block of device memory and pinned
staging for all inputs and outputs at the largest profile. Where TensorRT runs the same shapes several times in a row,
its kernels are replayed as one CUDA graph; TensorRT-RTX captures by itself.

Run with a faked driver and engine only, which compute with ONNX Runtime; on a GPU not yet.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..engine_library import Log, explained, load_library, uncollected
from ..engines import EngineRecord, find_engine, require_fitting
from ..errors import DcformerWarning, DeviceLost, InferenceError, InputError
from ..gpu import current_gpu
from ..manifest import Preprocessing, TensorInfo
from ..volume.types import Volume
from .base import Options
from .borrow import Borrowed, Stacked, borrow, streams_of
from .deserialize import Compiled, deserialize
from .device import ALIGNMENT, Device, Held, Memory, Stream, plan_buffers
from .sampler import DeviceArray, Sampler

#: Requests that may run at once, each with memory of its own.
SLOTS = 2
#: An input: on the host, or on the device as one array or as several.
_Input = NDArray[Any] | Borrowed | Stacked


class Resident(Protocol):
    """``stream``: address of the CUDA stream that it works on. ``bytes``: of inputs and outputs, largest batch."""

    @property
    def stream(self) -> int: ...  # noqa: D102

    @property
    def bytes(self) -> int: ...  # noqa: D102

    def enqueue(self) -> None:
        """Compute once more, without waiting."""
        ...

    def fetch(self, outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Wait, and download."""
        ...


class TensorRtBackend:
    """An engine of a bundle. See ``Backend``; inputs may also be arrays on the device.

    Args:
        slots: requests that may run at once; others wait for one to end.
        record: of the engine to run; None = the bundle's for this tower, precision and GPU.
    """

    def __init__(self, bundle: Bundle, role: str, options: Options, slots: int = SLOTS,
                 record: EngineRecord | None = None) -> None:
        gpu = self._gpu = current_gpu()
        library = load_library(options.backend)
        self.record = record or find_engine(bundle, role, options.precision, options.backend, gpu)
        require_fitting(bundle, self.record, library.version, gpu)
        self._is_rtx = library.is_rtx
        self._device = Device()
        self._device.use()
        with self._device.recording, uncollected():
            self._engine, self._log = deserialize(library, bundle, self.record)
            self._compiled = Compiled(library, self._engine, self.record, gpu) if self._is_rtx else None
        self._shapes = _Shapes(self.record)
        self.slots = slots
        self._free = threading.BoundedSemaphore(slots)
        self._idle: list[_Slot] = []
        self._made = 0
        self._lock = threading.Lock()
        self._sampler: Sampler | None = None
        self._description = f"{library.name} {library.version}, {gpu.name}, {self.record.engine}"

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Compute the named outputs.

        Args:
            feeds: numpy arrays, or arrays on the device with ``__cuda_array_interface__`` (torch, CuPy, PyCUDA) or
                DLPack (JAX), which are read where they are.

        Raises:
            InputError: shapes beyond the engine's profile, or another dtype.
            InferenceError: out of memory, or the library failed; the engine stays usable.
            DeviceLost: the GPU failed; nothing stays usable.
        """
        inputs = {name: self._shapes.check(name, feeds[name]) for name in self._shapes.inputs}
        self._device.use()
        with self._slot() as slot:
            found = slot.run(inputs, outputs)
        self._keep_compiled(inputs)
        return found

    def try_out(self) -> None:
        """Compute once, on zeros at the smallest profile: whether the engine works here. Raises like ``run``."""
        self.run(self._shapes.smallest_feeds(), self._shapes.outputs)

    @contextmanager
    def hold(self, feeds: Mapping[str, Any]) -> Iterator[Resident]:
        """An inference whose inputs stay on the device, to be run again and again: for measuring. Raises like ``run``.

        Takes a slot, which others wait for.
        """
        inputs = {name: self._shapes.check(name, feeds[name]) for name in self._shapes.inputs}
        self._device.use()
        with self._slot() as slot:
            slot.run(inputs, self._shapes.outputs)
            self._keep_compiled(inputs)
            yield slot

    @property
    def largest_batch(self) -> int:
        """That the engine was built for."""
        return self._shapes.largest_batch

    @property
    def activation_bytes(self) -> int:
        """Device memory that the engine uses beside weights, inputs and outputs."""
        return int(self._engine.device_memory_size_v2)

    def preprocess(self, volume: Volume, spec: Preprocessing, inputs: Sequence[TensorInfo]) -> dict[str, DeviceArray]:
        """What the engine reads of a scan, made on the GPU and left there. Raises like ``scan_feeds``."""
        return self._open_sampler().feeds(volume, spec, inputs)

    def thin(self, volumes: Borrowed, spec: Preprocessing, inputs: Sequence[TensorInfo]
             ) -> dict[str, DeviceArray | Borrowed]:
        """What the engine reads of preprocessed volumes ``[B, D, H, W]`` on the GPU. Raises like ``Sampler.thin``."""
        return self._open_sampler().thin(volumes, spec, inputs)

    def _open_sampler(self) -> Sampler:
        with self._lock:
            if self._sampler is None:
                self._sampler = Sampler(self._device, self._gpu.compute_capability)
            return self._sampler

    def close(self) -> None:
        """Give back the memory of requests that have ended, and of scans that were preprocessed; the next take new."""
        with self._lock:
            slots, self._idle = self._idle, []
            self._made -= len(slots)
        self._device.use()
        for slot in slots:
            slot.close()
        if self._sampler is not None:
            self._sampler.release()

    def _keep_compiled(self, inputs: Mapping[str, _Input]) -> None:
        if self._compiled is not None:
            self._compiled.keep(tuple((name, tuple(array.shape)) for name, array in inputs.items()))

    def describe(self) -> str:
        """Library, version, GPU and engine."""
        return self._description

    @contextmanager
    def _slot(self) -> Iterator[_Slot]:
        with self._free:
            slot = self._take_slot()
            try:
                yield slot
            except BaseException:
                with self._lock:
                    self._made -= 1
                slot.close()  # its stream may still be busy with what failed: the next request makes a new one
                raise
            with self._lock:
                self._idle.append(slot)

    def _take_slot(self) -> _Slot:
        """One that is idle, or a new one; where there is no memory for another beside those in use, the next of these.

        Raises:
            InferenceError: no memory for a single one.
        """
        while True:
            with self._lock:
                if self._idle:
                    return self._idle.pop()
                self._made += 1
            try:
                return _Slot(self._device, self._context(), self._shapes, self._is_rtx, self._log)
            except BaseException as error:
                with self._lock:
                    self._made -= 1
                    others = self._made
                if isinstance(error, DeviceLost) or not isinstance(error, InferenceError) or not others:
                    raise
                warnings.warn(f"{self.record.engine}: no GPU memory for {others + 1} requests at the same time "
                              f"({error}); they take turns", DcformerWarning, stacklevel=5)
                self._free.acquire()  # waits for one in use; the place of the one that could not be made is given up

    def _context(self) -> Any:
        # It takes memory, and may wait for the GPU.
        with self._device.recording, uncollected(), explained(self.record.engine):
            context = (self._engine.create_execution_context() if self._compiled is None else
                       self._engine.create_execution_context(self._compiled.config))
        if context is None:
            raise InferenceError(f"{self.record.engine}: no execution context ({self._log.last()}); most often for "
                                 "want of GPU memory")
        return context


class _Shapes:
    """What the record says of inputs and outputs."""

    def __init__(self, record: EngineRecord) -> None:
        self.engine = record.engine
        self._profile = record.profiles[0]
        self.inputs = [tensor.name for tensor in record.tensors if tensor.is_input]
        self.outputs = [tensor.name for tensor in record.tensors if not tensor.is_input]
        self.dtypes = {tensor.name: np.dtype(tensor.dtype) for tensor in record.tensors}
        self._declared = {tensor.name: tensor.shape for tensor in record.tensors}

    def check(self, name: str, array: Any) -> _Input:
        """The input, contiguous on the host or as it lies on the device, if the engine takes it."""
        profile = self._profile[name]
        found = array if isinstance(array, Stacked) else borrow(array)
        if isinstance(found, Borrowed) and (isinstance(array, DeviceArray) or found.address % ALIGNMENT):
            # Brought to the slot's own memory: TensorRT reads none at odd places, and where a scan lies that was made
            # here changes each time, and with it what was recorded.
            found = Stacked((found,))
        if found is None:
            found = np.ascontiguousarray(array)
        shape, dtype = tuple(found.shape), str(found.dtype)
        if dtype != self.dtypes[name].name:
            raise InputError(f"{name}: {dtype}; the engine takes {self.dtypes[name]}")
        if len(shape) != len(profile.largest) or not all(
                low <= side <= high for low, side, high in zip(profile.smallest, shape, profile.largest, strict=True)):
            raise InputError(f"{name}: {list(shape)}; the engine {self.engine} was built for "
                             f"{list(profile.smallest)} to {list(profile.largest)}; split the batch, or build with a "
                             "larger --max-batch")
        if not isinstance(found, np.ndarray) and not found.packed:
            raise InputError(f"{name}: an array on the device with gaps; make it contiguous first")
        return found

    def smallest_feeds(self) -> dict[str, NDArray[Any]]:
        """Zeros, of the smallest shapes."""
        return {name: np.zeros(self._profile[name].smallest, self.dtypes[name]) for name in self.inputs}

    @property
    def largest_batch(self) -> int:
        """Of the profile."""
        return max(shapes.largest[0] for shapes in self._profile.values())

    def largest_bytes(self) -> dict[str, int]:
        """By tensor, at the largest profile."""
        batch = self.largest_batch
        sizes = {}
        for name, declared in self._declared.items():
            shape = self._profile[name].largest if name in self._profile else \
                tuple(batch if side < 0 else side for side in declared)
            sizes[name] = math.prod(shape) * self.dtypes[name].itemsize
        return sizes


class _Slot:
    """What one request at a time uses."""

    def __init__(self, device: Device, context: Any, shapes: _Shapes, is_rtx: bool, log: Log) -> None:
        self._device, self._shapes, self._is_rtx, self._log = device, shapes, is_rtx, log
        self._context: Any = context
        self._memory = Memory(device, plan_buffers(shapes.largest_bytes()))
        try:
            self._stream = Stream(device)
        except BaseException:
            self._memory.close()
            raise
        self._bound: tuple[Any, ...] | None = None
        self._fresh = True
        self._graph: Held | None = None
        self._records = not is_rtx

    def run(self, inputs: Mapping[str, _Input], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Upload, compute, download, wait."""
        for name, array in self.bind(inputs).items():
            self._transfer(name, array)
        self.enqueue()
        return self.fetch(outputs)

    @property
    def stream(self) -> int:
        """Address of the stream that it works on."""
        return self._stream.handle

    @property
    def bytes(self) -> int:
        """Device memory for inputs and outputs."""
        return self._memory.plan.total_bytes

    def bind(self, inputs: Mapping[str, _Input]) -> dict[str, NDArray[Any] | Stacked]:
        """Tell the engine where its inputs and outputs lie; arrays of the host are in staging memory then.

        Returns:
            Those that must be brought to the slot's own memory.
        """
        addresses, brought = {}, {}
        self._device.wait_for(streams_of([array for array in inputs.values() if not isinstance(array, np.ndarray)]))
        for name, array in inputs.items():
            if isinstance(array, Borrowed):
                addresses[name] = array.address
                continue
            if isinstance(array, np.ndarray):
                self._memory.view(name, array.shape, array.dtype)[...] = array
            addresses[name] = self._memory.address(name)
            brought[name] = array
        bound = tuple(sorted((name, addresses[name], tuple(array.shape)) for name, array in inputs.items()))
        if bound == self._bound:
            return brought
        # A graph holds addresses and the kernels for one shape.
        self._forget_graph()
        addresses |= {name: self._memory.address(name) for name in self._shapes.outputs}
        with explained(self._shapes.engine):
            for name, array in inputs.items():
                self._require(self._context.set_input_shape(name, tuple(array.shape)), f"the shape of {name}")
            for name, address in addresses.items():
                self._require(self._context.set_tensor_address(name, address), f"the address of {name}")
        self._bound, self._fresh = bound, True
        return brought

    def _transfer(self, name: str, array: NDArray[Any] | Stacked) -> None:
        target = self._memory.address(name)
        if isinstance(array, np.ndarray):
            self._stream.upload(target, self._memory.staging(name), array.nbytes)
            return
        for part in array.parts:
            size = math.prod(part.shape) * self._shapes.dtypes[name].itemsize
            self._stream.copy(target, part.address, size)
            target += size

    def enqueue(self) -> None:
        """Enqueue the engine: at first as it is, which lets it allocate; the second time recorded; then replayed."""
        if self._fresh or not self._records:
            with self._device.recording if self._fresh and self._is_rtx else nullcontext():  # it records by itself
                self._enqueue()
            self._fresh = False
            return
        if self._graph is None:
            try:
                self._graph = self._stream.capture(self._enqueue)
            except DeviceLost:
                raise
            except InferenceError as error:  # nothing was computed; what cannot be recorded can still be run
                self._records = False
                warnings.warn(f"{self._shapes.engine}: cannot be recorded as a CUDA graph ({error}); it runs without, "
                              "which costs the host more time", DcformerWarning, stacklevel=4)
                self._enqueue()
                return
        self._stream.replay(self._graph)

    def fetch(self, outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Download, and wait."""
        with explained(self._shapes.engine):
            shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in outputs}
        for name in outputs:
            size = math.prod(shapes[name]) * self._shapes.dtypes[name].itemsize
            self._stream.download(self._memory.staging(name), self._memory.address(name), size)
        self._stream.wait()
        # Copies: the staging memory is the next request's.
        return [self._memory.view(name, shapes[name], self._shapes.dtypes[name]).copy() for name in outputs]

    def _forget_graph(self) -> None:
        if self._graph is not None:
            self._graph.close()
            self._graph = None

    def _enqueue(self) -> None:
        with explained(self._shapes.engine):
            self._require(self._context.execute_async_v3(self._stream.handle), "to run")

    def _require(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise InferenceError(f"the engine refused {what}: {self._log.last()}")

    def close(self) -> None:
        """Give memory and stream back."""
        with self._device.recording:
            self._context = None
        self._forget_graph()
        self._memory.close()
        self._stream.close()

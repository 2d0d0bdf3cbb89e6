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
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..engine_library import Library, Log, load_library
from ..engines import EngineRecord, Gpu, build_command, find_engine, read_engine, require_fitting
from ..errors import DcformerWarning, DeviceUnavailable, EngineRefused, InferenceError, InputError
from ..files import atomic_file, cache_folder
from ..gpu import current_gpu
from ..manifest import Preprocessing, TensorInfo
from ..volume.types import Volume
from .base import Options
from .borrow import Borrowed, borrow
from .device import Device, Memory, Stream, plan_buffers
from .sampler import DeviceArray, Sampler

#: Requests that may run at once, each with memory of its own.
SLOTS = 2


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
        if options.device != "cuda":
            raise DeviceUnavailable(f"device {options.device!r}: the {options.backend} back end runs on a GPU; pass "
                                    "--device cuda")
        gpu = self._gpu = current_gpu()
        library = load_library(options.backend)
        self.record = record or find_engine(bundle, role, options.precision, options.backend, gpu)
        require_fitting(bundle, self.record, library.version, gpu)
        self._is_rtx = library.is_rtx
        self._device = Device()
        self._device.use()
        self._engine, self._log = _deserialize(library, bundle, self.record)
        self._compiled = _Compiled(library, self._engine, self.record, gpu) if self._is_rtx else None
        self._shapes = _Shapes(self.record)
        self._free = threading.BoundedSemaphore(slots)
        self._idle: list[_Slot] = []
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
        if self._compiled is not None:
            self._compiled.keep()
        return found

    @contextmanager
    def hold(self, feeds: Mapping[str, Any]) -> Iterator[Resident]:
        """An inference whose inputs stay on the device, to be run again and again: for measuring. Raises like ``run``.

        Takes a slot, which others wait for.
        """
        inputs = {name: self._shapes.check(name, feeds[name]) for name in self._shapes.inputs}
        self._device.use()
        with self._slot() as slot:
            slot.run(inputs, self._shapes.outputs)
            if self._compiled is not None:
                self._compiled.keep()
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
        with self._lock:
            if self._sampler is None:
                self._sampler = Sampler(self._device, self._gpu.compute_capability)
        return self._sampler.feeds(volume, spec, inputs)

    def close(self) -> None:
        """Give back the memory of requests that have ended; the next one takes new."""
        with self._lock:
            slots, self._idle = self._idle, []
        for slot in slots:
            slot.close()

    def describe(self) -> str:
        """Library, version, GPU and engine."""
        return self._description

    @contextmanager
    def _slot(self) -> Iterator[_Slot]:
        with self._free:
            with self._lock:
                slot = self._idle.pop() if self._idle else None
            slot = slot or _Slot(self._device, self._context(), self._shapes, self._is_rtx, self._log)
            try:
                yield slot
            except BaseException:
                slot.close()  # its stream may still be busy with what failed: the next request makes a new one
                raise
            with self._lock:
                self._idle.append(slot)

    def _context(self) -> Any:
        context = (self._engine.create_execution_context() if self._compiled is None else
                   self._engine.create_execution_context(self._compiled.config))
        if context is None:
            raise InferenceError(f"{self.record.engine}: no execution context ({self._log.last()}); most often for "
                                 "want of GPU memory")
        return context


class _Compiled:
    """TensorRT-RTX compiles for the GPU at first use; what it compiled is kept for the next start."""

    def __init__(self, library: Library, engine: Any, record: EngineRecord, gpu: Gpu) -> None:
        self._path = cache_folder() / "tensorrt_rtx" / (
            f"{record.sha256[:20]}-{gpu.compute_capability}-{record.version}.cache")
        self.config = engine.create_runtime_config()
        self.config.cuda_graph_strategy = library.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # By default the first runs of a shape use a slower kernel, while a thread compiles the one for that shape.
        self.config.dynamic_shapes_kernel_specialization_strategy = (
            library.module.DynamicShapesKernelSpecializationStrategy.EAGER)
        self._cache = self.config.create_runtime_cache()
        if self._path.exists():
            self._cache.deserialize(self._path.read_bytes())
        self.config.set_runtime_cache(self._cache)
        self._kept = self._path.exists()

    def keep(self) -> None:
        """Write it, after the first run."""
        if self._kept:
            return
        self._kept = True
        try:
            with atomic_file(self._path) as temporary:
                temporary.write_bytes(bytes(memoryview(self._cache.serialize())))
        except (OSError, InputError) as error:
            warnings.warn(f"{self._path}: {error}; tensorrt_rtx compiles anew each time. XDG_CACHE_HOME names another "
                          "folder", DcformerWarning, stacklevel=3)


class _Shapes:
    """What the record says of inputs and outputs."""

    def __init__(self, record: EngineRecord) -> None:
        self._record = record
        self._profile = record.profiles[0]
        self.inputs = [tensor.name for tensor in record.tensors if tensor.is_input]
        self.outputs = [tensor.name for tensor in record.tensors if not tensor.is_input]
        self.dtypes = {tensor.name: np.dtype(tensor.dtype) for tensor in record.tensors}
        self._declared = {tensor.name: tensor.shape for tensor in record.tensors}

    def check(self, name: str, array: Any) -> NDArray[Any] | Borrowed:
        """The input, contiguous on the host or as it lies on the device, if the engine takes it."""
        profile = self._profile[name]
        found = borrow(array)
        if found is None:
            found = np.ascontiguousarray(array)
        shape, dtype = tuple(found.shape), str(found.dtype)
        if dtype != self.dtypes[name].name:
            raise InputError(f"{name}: {dtype}; the engine takes {self.dtypes[name]}")
        if len(shape) != len(profile.largest) or not all(
                low <= side <= high for low, side, high in zip(profile.smallest, shape, profile.largest, strict=True)):
            raise InputError(f"{name}: {list(shape)}; the engine {self._record.engine} was built for "
                             f"{list(profile.smallest)} to {list(profile.largest)}; split the batch, or build with a "
                             "larger --max-batch")
        if isinstance(found, Borrowed) and not found.packed:
            raise InputError(f"{name}: an array on the device with gaps; make it contiguous first")
        return found

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
        self._device, self._context, self._shapes, self._is_rtx, self._log = device, context, shapes, is_rtx, log
        self._memory = Memory(device, plan_buffers(shapes.largest_bytes()))
        try:
            self._stream = Stream(device)
        except BaseException:
            self._memory.close()
            raise
        self._bound: tuple[Any, ...] | None = None
        self._fresh = True
        self._graph: Any = None

    def run(self, inputs: Mapping[str, NDArray[Any] | Borrowed], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Upload, compute, download, wait."""
        uploads = self.bind(inputs)
        for name, size in uploads.items():
            self._stream.upload(self._memory.address(name), self._memory.staging(name), size)
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

    def bind(self, inputs: Mapping[str, NDArray[Any] | Borrowed]) -> dict[str, int]:
        """Tell the engine where its inputs and outputs lie; arrays of the host are in staging memory then.

        Returns:
            Bytes to upload, by input.
        """
        addresses, uploads = {}, {}
        for name, array in inputs.items():
            if isinstance(array, Borrowed):
                addresses[name] = array.address
            else:
                self._memory.view(name, array.shape, array.dtype)[...] = array
                addresses[name] = self._memory.address(name)
                uploads[name] = array.nbytes
        if len(uploads) < len(inputs):
            self._device.synchronize()  # whoever made the arrays may still be writing them
        bound = tuple(sorted((name, addresses[name], tuple(array.shape)) for name, array in inputs.items()))
        if bound == self._bound:
            return uploads
        # A graph holds addresses and the kernels for one shape.
        self._forget_graph()
        for name, array in inputs.items():
            self._require(self._context.set_input_shape(name, tuple(array.shape)), f"the shape of {name}")
        for name, address in (addresses | {name: self._memory.address(name) for name in self._shapes.outputs}).items():
            self._require(self._context.set_tensor_address(name, address), f"the address of {name}")
        self._bound, self._fresh = bound, True
        return uploads

    def enqueue(self) -> None:
        """Enqueue the engine: at first as it is, which lets it allocate; the second time recorded; then replayed."""
        if self._is_rtx or self._fresh:
            self._fresh = False
            self._enqueue()
            return
        if self._graph is None:
            self._graph = self._stream.capture(self._enqueue)
        self._stream.replay(self._graph)

    def fetch(self, outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Download, and wait."""
        shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in outputs}
        for name in outputs:
            size = math.prod(shapes[name]) * self._shapes.dtypes[name].itemsize
            self._stream.download(self._memory.staging(name), self._memory.address(name), size)
        self._stream.wait()
        # Copies: the staging memory is the next request's.
        return [self._memory.view(name, shapes[name], self._shapes.dtypes[name]).copy() for name in outputs]

    def _forget_graph(self) -> None:
        if self._graph is not None:
            self._device.free("cuGraphExecDestroy", self._graph)
            self._graph = None

    def _enqueue(self) -> None:
        self._require(self._context.execute_async_v3(self._stream.handle), "to run")

    def _require(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise InferenceError(f"the engine refused {what}: {self._log.last()}")

    def close(self) -> None:
        """Give memory and stream back."""
        self._forget_graph()
        self._memory.close()
        self._stream.close()


def _deserialize(library: Library, bundle: Bundle, record: EngineRecord) -> tuple[Any, Log]:
    log = Log(library)
    runtime = library.module.Runtime(log.logger)
    engine = runtime.deserialize_cuda_engine(read_engine(bundle, record)) if runtime else None
    if engine is None:
        raise EngineRefused(f"{bundle.folder / record.engine}: {library.name} {library.version} refuses it here: "
                            f"{log.last()}; run on this machine: "
                            f"{build_command(bundle.folder, record.precision, record.library)}")
    if record.flags.get("strip_weights"):
        _refit(library, bundle, record, engine, log)
    return engine, log


def _refit(library: Library, bundle: Bundle, record: EngineRecord, engine: Any, log: Log) -> None:
    """Give an engine that was built without its weights those of its ONNX file."""
    refitter = library.module.Refitter(engine, log.logger)
    parser = library.module.OnnxParserRefitter(refitter, log.logger)
    if record.weights is not None:
        bundle.path(record.weights)  # raises if it is no longer the file that was checked
    if not parser.refit_from_file(str(bundle.path(record.onnx))) or not refitter.refit_cuda_engine():
        raise EngineRefused(f"{bundle.folder / record.engine}: its weights cannot be filled in from {record.onnx}: "
                            f"{log.last()}; run without --strip-weights: "
                            f"{build_command(bundle.folder, record.precision, record.library)}")

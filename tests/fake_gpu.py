# ruff: noqa: N802, N815 - the names are NVIDIA's
"""A CUDA driver and a TensorRT that compute on the CPU: what is faked is where and when, never the result.

Device memory is the host's, at addresses of its own; copies and engines run only when their stream is waited for, in
order, so that a result that is read too early is wrong. Engines compute with ONNX Runtime, with every 16-bit rounding.
"""

import ctypes
import dataclasses
import enum
import itertools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from host_kernels import compile_for_host

from dcformer_deploy.calibration.emulate import emulate
from dcformer_deploy.runtime import gpu
from dcformer_deploy.runtime.backends import device, tensorrt
from dcformer_deploy.runtime.backends.sampler import Job, Thinning
from dcformer_deploy.runtime.bundle import open_bundle, record_file, write_manifest
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.engine_library import Library
from dcformer_deploy.runtime.engines import EngineRecord, engine_records

Status = enum.IntEnum("Status", {"CUDA_SUCCESS": 0, "CUDA_ERROR_OUT_OF_MEMORY": 2, "CUDA_ERROR_NO_DEVICE": 100,
                                 "CUDA_ERROR_INVALID_VALUE": 1, "CUDA_ERROR_ILLEGAL_ADDRESS": 700})


class FakeDriver:
    """As ``cuda.bindings.driver``. ``fail``: function names with the status that their next call answers."""

    CUresult = Status
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75,
                                         CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        self.capability, self.fail, self.calls, self.kernels = capability, {}, [], None
        self.blocks: dict[int, Any] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.captured: dict[int, list[Callable[[], None]]] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.recorded: dict[int, int] = {}
        self.passed: dict[int, float] = {}
        self._handles = itertools.count(1)

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return object.__getattribute__(self, name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if name in self.fail:
                return (self.fail.pop(name),)
            found = object.__getattribute__(self, name)(*arguments)
            return (Status.CUDA_SUCCESS,) if found is None else (Status.CUDA_SUCCESS, found)

        return call

    def cuInit(self, flags: int) -> None: ...
    def cuDeviceGet(self, index: int) -> int: return index
    def cuDeviceGetName(self, size: int, device: int) -> bytes: return b"NVIDIA H100".ljust(size, b"\0")
    def cuDeviceTotalMem(self, device: int) -> int: return 80 << 30
    def cuDeviceGetAttribute(self, which: int, device: int) -> int: return self.capability[which - 75]
    def cuDeviceGetPCIBusId(self, size: int, device: int) -> bytes: return b"0000:3b:00.0".ljust(size, b"\0")
    def cuDevicePrimaryCtxRetain(self, device: int) -> int: return 1
    def cuCtxSetCurrent(self, context: int) -> None: ...
    def cuCtxSynchronize(self) -> None: ...

    def cuMemAlloc(self, size: int) -> int:
        block = ctypes.create_string_buffer(b"\xff" * (size + 255), size + 255)  # NaN, where nothing was written
        address = -(-ctypes.addressof(block) // 256) * 256
        self.blocks[address] = block
        return address

    cuMemAllocHost = cuMemAlloc

    def cuMemFree(self, address: int) -> None:
        del self.blocks[address]

    cuMemFreeHost = cuMemFree

    def cuStreamCreate(self, flags: int) -> int:
        handle = next(self._handles)
        self.streams[handle] = []
        return handle

    def cuStreamDestroy(self, stream: int) -> None:
        del self.streams[stream]

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        self.captured.get(stream, self.streams[stream]).append(work)

    def _copy(self, target: int, source: int, size: int, stream: int) -> None:
        self.enqueue(stream, lambda: ctypes.memmove(target, source, size) and None)

    cuMemcpyHtoDAsync = cuMemcpyDtoHAsync = cuMemcpyDtoDAsync = _copy

    def cuMemGetInfo(self) -> int:
        return (80 << 30) - sum(map(len, self.blocks.values()))

    def cuEventCreate(self, flags: int) -> int:
        return next(self._handles)

    def cuEventRecord(self, event: int, stream: int) -> None:
        self.recorded[event] = stream
        self.enqueue(stream, lambda: self.passed.__setitem__(event, time.perf_counter()))

    def cuEventSynchronize(self, event: int) -> None:
        object.__getattribute__(self, "cuStreamSynchronize")(self.recorded[event])

    def cuEventElapsedTime(self, start: int, end: int) -> float:
        return (self.passed[end] - self.passed[start]) * 1e3

    def cuStreamSynchronize(self, stream: int) -> None:
        work, self.streams[stream] = self.streams[stream], []
        for one in work:
            one()

    def cuStreamBeginCapture(self, stream: int, mode: int) -> None:
        self.captured[stream] = []

    def cuStreamEndCapture(self, stream: int) -> int:
        handle = next(self._handles)
        self.graphs[handle] = self.captured.pop(stream)
        return handle

    def cuModuleLoadData(self, image: bytes) -> bytes: return image
    def cuModuleUnload(self, module: bytes) -> None: ...
    def cuModuleGetFunction(self, module: bytes, name: bytes) -> Any: return getattr(self.kernels, name.decode())

    def cuLaunchKernel(self, function: Any, x: int, y: int, z: int, threads: int, ty: int, tz: int, shared: int,
                       stream: int, arguments: int, extra: int) -> None:
        """Arguments are read now, as CUDA does."""
        kind = Thinning if function is getattr(self.kernels, "thin", None) else Job
        job = kind.from_buffer_copy(kind.from_address(ctypes.c_void_p.from_address(arguments).value))
        self.enqueue(stream, lambda: function(ctypes.byref(job), x, threads))

    def cuGraphInstantiate(self, graph: int, flags: int) -> int:
        handle = next(self._handles)
        self.graphs[handle] = self.graphs[graph]
        return handle

    def cuGraphDestroy(self, graph: int) -> None:
        del self.graphs[graph]

    cuGraphExecDestroy = cuGraphDestroy

    def cuGraphLaunch(self, graph: int, stream: int) -> None:
        for work in self.graphs[graph]:
            self.enqueue(stream, work)


class FakeTensorRt:
    """As ``tensorrt`` or ``tensorrt_rtx``.

    Args:
        engines: by the engine's bytes: its record, and the graph that it was built from.
    """

    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY=0, EAGER=1)
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graph")

    class ILogger:
        ERROR, INTERNAL_ERROR = 1, 0

        def __init__(self) -> None: ...

    def __init__(self, driver: FakeDriver, engines: dict[bytes, tuple[EngineRecord, onnx.ModelProto]]) -> None:
        self.driver, self.engines = driver, engines
        self.versions: dict[str, str] = {}
        self.contexts = 0
        self.shapes: set[Any] = set()
        self.log: Callable[[str], None] = lambda message: None
        self.compiled, self.takes_compiled = b"", True
        self.host_code, self.records, self.largest_right_batch = False, True, 1 << 20
        self.refits, self.refitted = True, []

    def Runtime(self, logger: Any) -> Any:
        runtime = SimpleNamespace(engine_host_code_allowed=False)
        self.log = lambda message: logger.log(self.ILogger.ERROR, message)

        def deserialize(data: bytes) -> Any:
            if data not in self.engines:
                logger.log(self.ILogger.ERROR, "the plan file is corrupt")
                return None
            if self.host_code and not runtime.engine_host_code_allowed:
                logger.log(self.ILogger.ERROR, "host executable code is not allowed")
                return None
            return _Engine(self, *self.engines[data])

        runtime.deserialize_cuda_engine = deserialize
        return runtime

    def Refitter(self, engine: Any, logger: Any) -> Any:
        return SimpleNamespace(refit_cuda_engine=lambda: self.refits)

    def OnnxParserRefitter(self, refitter: Any, logger: Any) -> Any:
        return SimpleNamespace(refit_from_file=lambda path: self.refitted.append(path) or Path(path).exists())


class _Engine:
    device_memory_size_v2 = 1 << 20

    def __init__(self, library: FakeTensorRt, record: EngineRecord, proto: onnx.ModelProto) -> None:
        self._library, self._record = library, record
        self._session = onnxruntime.InferenceSession(emulate(proto).SerializeToString(),
                                                     providers=["CPUExecutionProvider"])

    def create_runtime_config(self) -> Any:
        def deserialize(data: bytes) -> bool:
            if self._library.takes_compiled:
                self._library.compiled = data
            return self._library.takes_compiled

        cache = SimpleNamespace(deserialize=deserialize, serialize=lambda: b"compiled" * len(self._library.shapes))
        return SimpleNamespace(create_runtime_cache=lambda: cache, set_runtime_cache=lambda _: None)

    def create_execution_context(self, config: Any = None) -> Any:
        self._library.contexts += 1
        return _Context(self._library, self._record, self._session)


class _Context:
    def __init__(self, library: FakeTensorRt, record: EngineRecord, session: Any) -> None:
        self._library, self._driver, self._session = library, library.driver, session
        self._tensors = {tensor.name: tensor for tensor in record.tensors}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch = next(iter(self._shapes.values()))[0]
        return tuple(batch if side < 0 else side for side in self._tensors[name].shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if stream in self._driver.captured and not self._library.records:
            self._library.log("operation not permitted when stream is capturing")
            return False
        addresses, shapes = dict(self._addresses), dict(self._shapes)
        self._library.shapes.add(tuple(shapes.items()))
        outputs = [name for name, tensor in self._tensors.items() if not tensor.is_input]
        results = {name: self.get_tensor_shape(name) for name in outputs}

        def work() -> None:
            feeds = {name: self._at(name, addresses[name], shape).astype(
                np.float32 if self._tensors[name].dtype == "float16" else self._tensors[name].dtype)
                for name, shape in shapes.items()}
            for name, array in zip(outputs, self._session.run(outputs, feeds), strict=True):
                array = np.array(array)
                array[self._library.largest_right_batch :] = array[:1]  # a kernel that is wrong in larger batches
                self._at(name, addresses[name], results[name])[...] = array

        self._driver.enqueue(stream, work)
        return True

    def _at(self, name: str, address: int, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(self._tensors[name].dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer((ctypes.c_byte * size).from_address(address), dtype).reshape(shape)


def kernels_on_host(folder: Path) -> Any:
    """The project's kernels, compiled for this machine's processor."""
    library = ctypes.CDLL(str(compile_for_host(folder)))
    library.half_of.argtypes, library.half_of.restype = [ctypes.c_float], ctypes.c_ushort
    library.float_of.argtypes, library.float_of.restype = [ctypes.c_ushort], ctypes.c_float
    library.sample_lines, library.thin = library.sample_lines_on_host, library.thin_on_host
    return library


def with_engines(bundle: Path, out: Path) -> Path:
    """A copy of a calibrated bundle with real FP16 engines of tensorrt_rtx, and for each one that says it is of
    tensorrt for the fake GPU."""
    shutil.copytree(bundle, out)
    assert main(["build", str(out), "--precision", "fp16", "--max-batch", "3"]) == 0
    opened = open_bundle(out)
    files = list(opened.manifest.files)
    for record in engine_records(opened):
        name = record.engine.replace("tensorrt_rtx.portable", "tensorrt.sm90")
        shutil.copy(out / record.engine, out / name)
        other = dataclasses.replace(record, engine=name, library="tensorrt", version="10.13.2",
                                    compute_capability=("9.0",))
        (out / other.files[1]).write_text(other.to_json())
        files += [record_file(out, file) for file in other.files]
    write_manifest(out, dataclasses.replace(opened.manifest, files=tuple(files)))
    return out


def install(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    """Put driver and library in the place of the real ones, knowing the engines of a bundle."""
    driver = FakeDriver()
    for module in (gpu, device):
        monkeypatch.setattr(module, "import_driver", lambda: driver)
    records = engine_records(open_bundle(bundle))
    fake = FakeTensorRt(driver, {(bundle / record.engine).read_bytes(): (record, onnx.load(bundle / record.onnx))
                                 for record in records})
    fake.versions = {record.library: record.version for record in records}
    monkeypatch.setattr(tensorrt, "load_library", lambda name: Library(name, fake, fake.versions[name]))
    return fake

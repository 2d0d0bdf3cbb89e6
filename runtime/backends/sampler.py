"""What an image tower reads, made on the GPU by the kernels of ``sample.cu``, which are compiled when used.

Of a scan, straight from its stored voxels: the arithmetic is that of ``volume.preprocess``, operation by operation, so
results are the same bits. Of preprocessed volumes that are on the GPU already: the samples that the tower reads. The
tests run the kernels compiled for the host. On a GPU they have not run yet.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, MissingDependency, one_line
from ..manifest import Preprocessing, TensorInfo
from ..volume.preprocess import AxisPlan, axis_plans, fit_to_scan
from ..volume.types import Volume
from .borrow import Borrowed
from .device import Device, Held, Memory, Plan, Stream, plan_buffers

SOURCE = Path(__file__).with_name("sample.cu")
_THREADS = 256
_MOST_MAPS = 4
#: What ``arguments.require_preprocessed`` allows beyond the window, too.
_SLACK = 1e-4
_FLOATS = ("float32", "float16")
_KINDS = ("i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8")


class _Axis(ctypes.Structure):
    _fields_ = [("lower", ctypes.c_void_p), ("upper", ctypes.c_void_p), ("weight", ctypes.c_void_p),
                ("start", ctypes.c_int), ("count", ctypes.c_int), ("length", ctypes.c_int)]


class Job(ctypes.Structure):
    """The kernel's argument, as ``sample.cu`` declares it."""

    _fields_ = [("voxels", ctypes.c_void_p), *((name, ctypes.c_longlong) for name in (
                    "offset", "stride_h", "stride_w", "stride_d")),
                ("slope", ctypes.c_double * _MOST_MAPS), ("intercept", ctypes.c_double * _MOST_MAPS),
                *((name, ctypes.c_int) for name in ("maps", "kind", "small")),
                *((name, ctypes.c_float) for name in ("clip_low", "clip_high", "resampling_scale", "window_low",
                                                      "window_high", "offset_hu", "scale_hu", "pad")),
                ("h", _Axis), ("w", _Axis), ("d", _Axis), ("result", ctypes.c_void_p), ("half", ctypes.c_int)]


class Thinning(ctypes.Structure):
    """The argument of the kernel ``thin``, as ``sample.cu`` declares it."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("volumes", "result", "outside")),
                *((name, ctypes.c_longlong) for name in ("stride_b", "stride_d", "stride_h", "stride_w")),
                *((name, ctypes.c_int) for name in ("batch", "depth", "height", "width", "from_float16", "to_float16")),
                ("low", ctypes.c_float), ("high", ctypes.c_float)]


@dataclass(frozen=True)
class Task:
    """What a kernel launch needs, with arrays still on the host.

    ``voxels``: the block of memory that ``stored`` lies in. ``plans``: int32, int32 and float32 by axis h, w, d.
    ``shape``: of the result, [D, H, W]. ``job``: complete but for addresses.
    """

    stored: NDArray[Any]
    voxels: NDArray[Any]
    plans: dict[str, NDArray[Any]]
    shape: tuple[int, int, int]
    job: Job


def takes(volume: Volume) -> bool:
    """Whether the kernel knows the type of a scan's voxels, and has room for its maps to Hounsfield units."""
    dtype = volume.stored.dtype
    return (f"{dtype.kind}{dtype.itemsize}" in _KINDS
            and sum(not step.is_identity for step in volume.scaling) <= _MOST_MAPS)


def plan_task(volume: Volume, spec: Preprocessing, steps_dhw: tuple[int, int, int], dtype: np.dtype[Any]) -> Task:
    """Every ``steps_dhw``-th voxel of the preprocessed volume.

    Args:
        volume, spec: as ``fit_to_scan`` returns them.
        dtype: of the result, float32 or float16.

    Raises:
        InputError: as ``preprocess``; more than four maps to Hounsfield units.
    """
    maps = [step for step in volume.scaling if not step.is_identity]
    if not takes(volume):
        raise InputError(f"{volume.name}: {volume.stored.dtype} voxels with {len(maps)} maps to HU; preprocess on the "
                         "CPU")
    stored = _compact(volume.stored)
    kind = f"{stored.dtype.kind}{stored.dtype.itemsize}"
    plans = axis_plans(volume, spec, steps_dhw)
    low, high = np.lib.array_utils.byte_bounds(stored)
    voxels = np.frombuffer(memoryview((ctypes.c_byte * (high - low)).from_address(low)), stored.dtype)
    offset = (stored.__array_interface__["data"][0] - low) // stored.dtype.itemsize
    job = Job(offset=offset, maps=len(maps), kind=_KINDS.index(kind), half=int(dtype == np.float16),
              small=int(stored.dtype.kind != "f" and stored.dtype.itemsize <= 2))
    job.stride_h, job.stride_w, job.stride_d = (stride // stored.dtype.itemsize for stride in stored.strides)
    for index, step in enumerate(maps):
        job.slope[index], job.intercept[index] = step.slope, step.intercept
    (job.clip_low, job.clip_high), (job.window_low, job.window_high) = spec.clip_hu, spec.window_hu
    job.resampling_scale, job.offset_hu, job.scale_hu = spec.resampling_scale_hu, spec.offset_hu, spec.scale_hu
    job.pad = spec.pad_value
    depth, height, width = (-(-side // step) for side, step in zip(spec.shape_dhw, steps_dhw, strict=True))
    arrays: dict[str, NDArray[Any]] = {}
    for name, plan, length in zip("hwd", plans, (height, width, depth), strict=True):
        arrays |= _arrays(name, plan)
        axis = getattr(job, name)
        axis.start, axis.count, axis.length = plan.start, len(plan.lower), length
    return Task(stored, voxels, arrays, (depth, height, width), job)


def _arrays(name: str, plan: AxisPlan) -> dict[str, NDArray[Any]]:
    return {f"{name}.lower": plan.lower.astype(np.int32), f"{name}.upper": plan.upper.astype(np.int32),
            f"{name}.weight": plan.weight.astype(np.float32)}


def _compact(stored: NDArray[Any]) -> NDArray[Any]:
    """The array itself, or a copy where it is in the other byte order or a small part of something large."""
    if not stored.dtype.isnative:
        return stored.astype(stored.dtype.newbyteorder("="))
    low, high = np.lib.array_utils.byte_bounds(stored)
    return stored if high - low <= 2 * stored.nbytes else np.asfortranarray(stored)


class _Pool:
    """Memory that may be used again."""

    def __init__(self, device: Device) -> None:
        self._device, self._idle, self._keeps = device, list[Memory](), True
        # Reentrant: a finalizer, which gives memory back, may run anywhere, here too.
        self._lock = threading.RLock()

    def take(self, plan: Plan) -> Memory:
        """Memory for a plan: one that was used before, if it is large enough, else new one in its place."""
        with self._lock:
            memory = self._idle.pop() if self._idle else None
        if memory is not None and memory.plan.total_bytes >= plan.total_bytes:
            memory.plan = Plan(plan.offsets, memory.plan.total_bytes)
            return memory
        if memory is not None:
            memory.close()
        return Memory(self._device, plan)

    def give(self, memory: Memory) -> None:
        """Take it back."""
        with self._lock:
            if self._keeps:
                self._idle.append(memory)

    def release(self, keeps: bool = True) -> None:
        """Free what nobody uses, and unless it ``keeps`` what is given back, that too."""
        with self._lock:
            self._keeps, idle, self._idle = keeps, self._idle, []
        for memory in idle:
            memory.close()


class _Lease:
    """Memory that goes back to where it came from once nobody refers to it."""

    def __init__(self, memory: Memory, pool: _Pool) -> None:
        self.memory = memory
        weakref.finalize(self, pool.give, memory)


class DeviceArray:
    """An array on the device, with ``__cuda_array_interface__``; its memory is used again once it is gone."""

    def __init__(self, lease: _Lease, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype, self._lease = shape, dtype, lease
        address = lease.memory.address(name)
        self.__cuda_array_interface__ = {"shape": shape, "typestr": dtype.str, "data": (address, False), "version": 3,
                                         "strides": None}


class Sampler:
    """Compiles the kernel for a GPU and runs it. May be used by several threads at once."""

    def __init__(self, device: Device, compute_capability: str, nvrtc: Any = None) -> None:
        self._device = device
        device.use()
        code = compile_kernel(compute_capability, nvrtc)
        with device.recording:
            self._module = Held(device, device.call("cuModuleLoadData", code), "cuModuleUnload")
        self._sample, self._thin = (device.call("cuModuleGetFunction", self._module.raw, name)
                                    for name in (b"sample_lines", b"thin"))
        self._stream = Stream(device)
        self._pool = _Pool(device)
        self._lock = threading.Lock()

    def feeds(self, volume: Volume, spec: Preprocessing, inputs: Sequence[TensorInfo]) -> dict[str, DeviceArray]:
        """What an image tower reads of one scan, on the device. As ``scan_feeds``; so are the errors."""
        volume, spec = fit_to_scan(volume, spec)
        tasks = {}
        for info in inputs:
            d, h, w = (side // int(kept) for side, kept in zip(spec.shape_dhw, info.axes[-3:], strict=True))
            tasks[info.name] = plan_task(volume, spec, (d, h, w), np.dtype(info.dtype))
        self._device.use()
        voxels = next(iter(tasks.values())).voxels
        uploads = {"voxels": voxels, **{f"{name}/{part}": array for name, task in tasks.items()
                                        for part, array in task.plans.items()}}
        results = {name: int(np.prod(task.shape)) * (2 if task.job.half else 4) for name, task in tasks.items()}
        memory = self._pool.take(plan_buffers({name: array.nbytes for name, array in uploads.items()} | results))
        lease = _Lease(memory, self._pool)
        for name, array in uploads.items():
            memory.view(name, array.shape, array.dtype)[...] = array
        with self._working():
            for name, array in uploads.items():
                self._stream.upload(memory.address(name), memory.staging(name), array.nbytes)
            for name, task in tasks.items():
                self._launch(self._sample, _placed(name, task, memory), math.prod(task.shape))
        return {info.name: DeviceArray(lease, info.name, (1, 1, *tasks[info.name].shape), np.dtype(info.dtype))
                for info in inputs}

    def thin(self, volumes: Borrowed, spec: Preprocessing, inputs: Sequence[TensorInfo]
             ) -> dict[str, DeviceArray | Borrowed]:
        """What an image tower reads of preprocessed volumes ``[B, D, H, W]`` on the device; as they lie, where it can.

        Raises:
            InputError: another shape or dtype; NaN, or values outside the window, where the tower looks.
        """
        if (len(volumes.shape) != 4 or not volumes.shape[0] or volumes.shape[1:] != spec.shape_dhw
                or volumes.dtype not in _FLOATS):
            sides = ", ".join(map(str, spec.shape_dhw))
            raise InputError(f"volumes: {volumes.dtype} {list(volumes.shape)} on the GPU; expected "
                             f"{' or '.join(_FLOATS)} [batch, {sides}] (D, H, W), preprocessed")
        self._device.use()
        self._device.wait_for(volumes.streams)
        batch = volumes.shape[0]
        shapes = {info.name: (batch, *(int(side) for side in info.axes[-3:])) for info in inputs}
        in_place = {info.name for info in inputs
                    if shapes[info.name] == volumes.shape and info.dtype == volumes.dtype and volumes.packed}
        sizes = {info.name: math.prod(shapes[info.name]) * np.dtype(info.dtype).itemsize for info in inputs
                 if info.name not in in_place}
        memory = self._pool.take(plan_buffers({"outside": 4, **sizes}))
        lease = _Lease(memory, self._pool)
        outside = memory.view("outside", (1,), np.dtype(np.int32))
        outside[0] = 0
        with self._working():
            self._stream.upload(memory.address("outside"), memory.staging("outside"), 4)
            for info in inputs:
                job = _thinning(volumes, shapes[info.name], spec)
                job.outside, job.to_float16 = memory.address("outside"), int(info.dtype == "float16")
                job.result = None if info.name in in_place else memory.address(info.name)
                self._launch(self._thin, job, math.prod(shapes[info.name]))
            self._stream.download(memory.staging("outside"), memory.address("outside"), 4)
        if outside[0]:
            low, high = spec.value_range
            raise InputError(f"volumes: NaN, or values outside [{low:g}, {high:g}]; expected a preprocessed volume. "
                             "Pass a file, or use preprocess()")
        return {info.name: replace(volumes.with_axis(1), streams=()) if info.name in in_place else
                DeviceArray(lease, info.name, (batch, 1, *shapes[info.name][1:]), np.dtype(info.dtype))
                for info in inputs}

    def fetch(self, array: DeviceArray) -> NDArray[Any]:
        """An array of ``feeds`` or ``thin``, on the host."""
        found = np.empty(array.shape, array.dtype)
        self._device.use()
        with self._working():
            self._stream.download(found.ctypes.data, array.__cuda_array_interface__["data"][0], found.nbytes)
        return found

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Alone on the stream; at the end all is done, also where something failed: memory may be used again."""
        with self._lock:
            try:
                yield
            finally:
                self._stream.wait()

    def release(self) -> None:
        """Give back memory that nobody uses; the next scan takes new. Others may be at work meanwhile."""
        self._pool.release()

    def close(self) -> None:
        """Give everything back but the memory of arrays that somebody still holds; nothing works afterwards."""
        self._pool.release(keeps=False)
        self._stream.close()
        self._module.close()

    def _launch(self, kernel: Any, job: Job | Thinning, count: int) -> None:
        """Run a kernel on its argument, one thread for each of ``count`` results."""
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(job))
        self._device.call("cuLaunchKernel", kernel, -(-count // _THREADS), 1, 1, _THREADS, 1, 1, 0, self._stream.raw,
                          ctypes.addressof(arguments), 0)


def _placed(name: str, task: Task, memory: Memory) -> Job:
    """A task's job with its addresses."""
    job = task.job
    job.voxels, job.result = memory.address("voxels"), memory.address(name)
    for axis, part in itertools.product("hwd", ("lower", "upper", "weight")):
        setattr(getattr(job, axis), part, memory.address(f"{name}/{axis}.{part}"))
    return job


def _thinning(volumes: Borrowed, shape: tuple[int, ...], spec: Preprocessing) -> Thinning:
    """Complete but for what is written."""
    low, high = spec.value_range
    job = Thinning(volumes=volumes.address, from_float16=int(volumes.dtype == "float16"), low=low - _SLACK,
                   high=high + _SLACK)
    job.batch, job.depth, job.height, job.width = shape
    steps = (1, *(side // kept for side, kept in zip(volumes.shape[1:], shape[1:], strict=True)))
    job.stride_b, job.stride_d, job.stride_h, job.stride_w = (
        stride * step for stride, step in zip(volumes.strides, steps, strict=True))
    return job


def compile_kernel(compute_capability: str, nvrtc: Any = None) -> bytes:
    """Machine code of the kernel for a compute capability such as "9.0".

    Raises:
        MissingDependency: no NVRTC.
    """
    try:
        nvrtc = nvrtc or importlib.import_module("cuda.bindings.nvrtc")
        nvrtc.nvrtcVersion()
    except Exception as error:  # ImportError, or what the bindings raise where the library is not found
        raise MissingDependency(f"NVRTC is not installed (or broken: {one_line(str(error))}); pip install "
                                "'cuda-python[all]', or preprocess on the CPU") from error

    def ask(answer: tuple[Any, ...]) -> Any:
        status, *values = answer
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise MissingDependency(f"NVRTC answered {getattr(status, 'name', status)} for compute capability "
                                    f"{compute_capability}; a newer CUDA may know it, or preprocess on the CPU")
        return values[0] if values else None

    program = ask(nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), b"sample.cu", 0, [], []))
    try:
        options = [f"--gpu-architecture=sm_{compute_capability.replace('.', '')}".encode(), b"--fmad=false"]
        ask(nvrtc.nvrtcCompileProgram(program, len(options), options))
        code = b" " * ask(nvrtc.nvrtcGetCUBINSize(program))
        ask(nvrtc.nvrtcGetCUBIN(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)

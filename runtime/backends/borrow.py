"""Arrays of other libraries on the device: where they lie, through ``__cuda_array_interface__`` or DLPack.

On a GPU not run yet; DLPack's structures are read in the tests from arrays of numpy and torch on the host.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from ..errors import InputError, one_line

#: DLPack's ``DLDeviceType``: kDLCPU, kDLCUDA, kDLCUDAHost (pinned, but on the host), kDLCUDAManaged.
CPU, CUDA, CUDA_MANAGED = 1, 2, 13
_KINDS = {0: "i", 1: "u", 2: "f"}


class _Tensor(ctypes.Structure):
    """``DLTensor`` (dmlc/dlpack, dlpack.h), the beginning of ``DLManagedTensor``."""

    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
                ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
                ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
                ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64)]


class _WithInterface(Protocol):
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


class _WithDlpack(Protocol):
    def __dlpack__(self) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...


@dataclass(frozen=True)
class Borrowed:
    """An array on the device.

    ``dtype``: as numpy names it. ``strides``: in elements. ``owner``: keeps the memory alive. ``streams``: of CUDA, by
    their driver handles, that may still be writing it; None where that is not known.
    """

    address: int
    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...]
    owner: Any
    streams: tuple[int, ...] | None = None

    @property
    def packed(self) -> bool:
        """Whether it is without gaps, in C order; an axis of one element may have any stride."""
        return all(side == 1 or stride == expected for side, stride, expected in
                   zip(self.shape, self.strides, _packed_strides(self.shape), strict=True))

    def with_axis(self, axis: int) -> Borrowed:
        """The same memory with another axis of one element."""
        shape, strides = list(self.shape), list(self.strides)
        shape.insert(axis, 1)
        strides.insert(axis, 0)
        return replace(self, shape=tuple(shape), strides=tuple(strides))


#: An array on the GPU: of torch, CuPy, PyCUDA, Numba, JAX, …
OnGpu = _WithInterface | _WithDlpack | Borrowed


@dataclass(frozen=True)
class Stacked:
    """Arrays on the device that are read as one, one after the other along their first axis."""

    parts: tuple[Borrowed, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:]

    @property
    def dtype(self) -> str:
        """Of all parts."""
        return self.parts[0].dtype

    @property
    def packed(self) -> bool:
        """Whether every part is."""
        return all(part.packed for part in self.parts)

    @property
    def streams(self) -> tuple[int, ...] | None:
        """That may still be writing a part; None where that is not known of one."""
        return streams_of(self.parts)


def borrow(array: Any, devices: tuple[int, ...] = (CUDA, CUDA_MANAGED), index: int = 0) -> Borrowed | None:
    """What lies on the device; None for an array on the host.

    Args:
        devices: DLPack's kinds of memory to take.
        index: of the GPU that it must lie on.

    Raises:
        InputError: it lies on another GPU.
    """
    if isinstance(array, Borrowed):
        return array
    # Arrays of numpy lie on the host, and are many.
    where = getattr(array, "__dlpack_device__", None) if not isinstance(array, np.ndarray) else None
    kind, ordinal = where() if where is not None else (None, index)
    if kind in (CUDA, CUDA_MANAGED) and kind in devices and ordinal != index:
        raise InputError(f"an array on GPU {ordinal}; the model runs on GPU {index}: copy it there first")
    try:
        interface = getattr(array, "__cuda_array_interface__", None)
    except RuntimeError as error:  # PyTorch's, of a tensor that takes part in training
        raise InputError(f"an array on the GPU that cannot be read: {one_line(str(error))}") from error
    if interface is not None:
        dtype, shape = np.dtype(interface["typestr"]), tuple(interface["shape"])
        strides = interface.get("strides")
        steps = tuple(stride // dtype.itemsize for stride in strides) if strides is not None else _packed_strides(shape)
        return Borrowed(int(interface["data"][0]), shape, dtype.name, steps, array, _streams(interface))
    return _from_dlpack(array) if kind in devices and hasattr(array, "__dlpack__") else None


def stack(arrays: Sequence[Any]) -> Any:
    """Arrays ``[1, …]`` of several scans as one, all on the host or all on the device and of one type; else None."""
    if all(isinstance(array, np.ndarray) for array in arrays):
        return np.concatenate(arrays)
    found = tuple(part for part in map(borrow, arrays) if part is not None)
    alike = len({(part.dtype, part.shape[1:]) for part in found}) == 1
    return Stacked(found) if alike and len(found) == len(arrays) else None


def streams_of(arrays: Sequence[Borrowed | Stacked]) -> tuple[int, ...] | None:
    """That may still be writing one of them; None where that is not known."""
    found: dict[int, None] = {}
    for array in arrays:
        if array.streams is None:
            return None
        found.update(dict.fromkeys(array.streams))
    return tuple(found)


def _streams(interface: dict[str, Any]) -> tuple[int, ...] | None:
    """As the interface's version 3 tells; before it nobody did (numba.readthedocs.io, CUDA Array Interface)."""
    if interface.get("version", 0) < 3:
        return None
    stream = interface.get("stream")
    return () if stream is None else (int(stream),)


def _from_dlpack(array: Any) -> Borrowed:
    # Never consumed: the capsule gives the memory back itself, once nobody refers to it.
    capsule = array.__dlpack__()
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.argtypes, pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    tensor = _Tensor.from_address(pointer(capsule, b"dltensor"))
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    strides = tuple(tensor.strides[axis] for axis in range(tensor.ndim)) if tensor.strides else _packed_strides(shape)
    kind = _KINDS.get(tensor.code)
    dtype = f"DLPack type {tensor.code}, {tensor.bits} bits"
    if kind is not None and tensor.lanes == 1 and tensor.bits % 8 == 0:
        dtype = np.dtype(f"{kind}{tensor.bits // 8}").name
    return Borrowed((tensor.data or 0) + tensor.byte_offset, shape, dtype, strides, capsule)


def _packed_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """In elements, of a C-contiguous array."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))

"""Arrays of other libraries on the device: where they lie, through ``__cuda_array_interface__`` or DLPack.

On a GPU not run yet; DLPack's structures are read in the tests from arrays of numpy and torch on the host.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

#: DLPack's ``DLDeviceType``: kDLCPU, kDLCUDA, kDLCUDAHost (pinned, but on the host), kDLCUDAManaged.
CPU, CUDA, CUDA_MANAGED = 1, 2, 13
_KINDS = {0: "i", 1: "u", 2: "f"}


class _Tensor(ctypes.Structure):
    """``DLTensor`` (dmlc/dlpack, dlpack.h), the beginning of ``DLManagedTensor``."""

    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
                ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
                ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
                ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64)]


@dataclass(frozen=True)
class Borrowed:
    """``dtype``: as numpy names it. ``packed``: without gaps, in C order. ``owner``: keeps the memory alive."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    packed: bool
    owner: Any


def borrow(array: Any, devices: tuple[int, ...] = (CUDA, CUDA_MANAGED)) -> Borrowed | None:
    """What lies on the device; None for an array on the host.

    Args:
        devices: DLPack's kinds of memory to take.
    """
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is not None:
        dtype, shape = np.dtype(interface["typestr"]), tuple(interface["shape"])
        strides = interface.get("strides")
        packed = strides is None or _is_packed(shape, strides, dtype.itemsize)
        return Borrowed(int(interface["data"][0]), shape, dtype.name, packed, array)
    if isinstance(array, np.ndarray) or not hasattr(array, "__dlpack__") or array.__dlpack_device__()[0] not in devices:
        return None
    return _from_dlpack(array)


def _from_dlpack(array: Any) -> Borrowed:
    # Never consumed: the capsule gives the memory back itself, once nobody refers to it.
    capsule = array.__dlpack__()
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.argtypes, pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    tensor = _Tensor.from_address(pointer(capsule, b"dltensor"))
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    strides = tuple(tensor.strides[axis] for axis in range(tensor.ndim)) if tensor.strides else None
    kind = _KINDS.get(tensor.code)
    dtype = f"DLPack type {tensor.code}, {tensor.bits} bits"
    if kind is not None and tensor.lanes == 1 and tensor.bits % 8 == 0:
        dtype = np.dtype(f"{kind}{tensor.bits // 8}").name
    return Borrowed((tensor.data or 0) + tensor.byte_offset, shape, dtype,
                    strides is None or _is_packed(shape, strides, 1), capsule)


def _is_packed(shape: tuple[int, ...], strides: tuple[int, ...], step: int) -> bool:
    """Whether strides are those of a C-contiguous array; an axis of one element may have any."""
    for side, stride in zip(reversed(shape), reversed(strides), strict=True):
        if side != 1 and stride != step:
            return False
        step *= side
    return True

"""Where arrays of other libraries lie: DLPack as numpy and torch write it, on the host."""

import gc
import weakref

import numpy as np
import pytest
import torch

from dcformer_deploy.runtime.backends.borrow import CPU, borrow


class Foreign:
    """A library without ``__cuda_array_interface__``, whose arrays are those of another."""

    def __init__(self, array: object) -> None:
        self._array = array

    def __dlpack__(self) -> object:
        return self._array.__dlpack__()  # type: ignore[attr-defined]

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int16", "uint8"])
def test_arrays_of_numpy(dtype: str):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    found = borrow(Foreign(array), (CPU,))
    assert found is not None
    assert (found.address, found.shape, found.dtype, found.packed) == (array.ctypes.data, (2, 3, 4), dtype, True)


def test_arrays_of_torch():
    tensor = torch.arange(120, dtype=torch.float16).reshape(2, 3, 4, 5)
    part = tensor[1:]
    found = borrow(Foreign(part), (CPU,))
    assert found is not None
    assert (found.address, found.shape, found.dtype, found.packed) == (part.data_ptr(), (1, 3, 4, 5), "float16", True)
    for gaps in (tensor.transpose(2, 3), tensor[:, ::2], tensor[..., :3]):
        found = borrow(Foreign(gaps), (CPU,))
        assert found is not None
        assert not found.packed
    channels_last = tensor[:, :1].contiguous(memory_format=torch.channels_last)
    found = borrow(Foreign(channels_last), (CPU,))
    assert found is not None
    assert found.packed == channels_last.is_contiguous()
    found = borrow(Foreign(torch.zeros(2, dtype=torch.bfloat16)), (CPU,))
    assert found is not None
    assert found.dtype == "DLPack type 4, 16 bits"


def test_memory_lives_as_long_as_it_is_borrowed():
    array = np.full(1000, 7.0)
    alive = weakref.ref(array)
    found = borrow(Foreign(array), (CPU,))
    assert found is not None
    del array
    gc.collect()
    assert alive() is not None
    del found
    gc.collect()
    assert alive() is None


def test_what_lies_on_the_host_is_not_borrowed():
    assert borrow(np.zeros(3)) is None
    assert borrow(torch.zeros(3)) is None
    assert borrow([1, 2]) is None

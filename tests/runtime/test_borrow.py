"""Where arrays of other libraries lie: DLPack as numpy and torch write it, on the host."""

import gc
import weakref

import numpy as np
import pytest
import torch
from gpus import OnDevice

from dcformer_deploy.runtime import InputError
from dcformer_deploy.runtime.backends.borrow import CPU, Stacked, borrow, stack


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


@pytest.mark.parametrize(("interface", "streams"), [
    ({}, ()), ({"stream": None}, ()), ({"stream": 2}, (2,)), ({"stream": 77}, (77,)), ({"version": 2}, None)])
def test_who_may_still_be_writing(interface: dict[str, object], streams: tuple[int, ...] | None):
    found = borrow(OnDevice(np.zeros((2, 3)), **interface))
    assert found is not None
    assert found.streams == streams
    assert found.strides == (3, 1)
    other = borrow(OnDevice(np.zeros((4, 3)), stream=5))
    assert other is not None
    assert Stacked((found, other)).streams == (None if streams is None else (*streams, 5))
    assert Stacked((found, other)).shape == (6, 3)


def test_on_another_gpu():
    with pytest.raises(InputError, match="an array on GPU 1; the model runs on GPU 0: copy it there first"):
        borrow(OnDevice(np.zeros(3), device=1))


def test_one_more_axis():
    found = borrow(OnDevice(np.zeros((2, 6))[:, ::2]))
    assert found is not None
    assert not found.packed
    assert found.with_axis(0).shape == (1, 2, 3)
    assert found.with_axis(1).strides == (6, 0, 2)
    whole = borrow(OnDevice(np.zeros((2, 3))))
    assert whole is not None
    assert whole.with_axis(1).packed


def test_several_as_one():
    one, other = np.zeros((1, 2)), np.ones((1, 2))
    np.testing.assert_array_equal(stack([one, other]), [[0, 0], [1, 1]])
    stacked = stack([OnDevice(one), OnDevice(other)])
    assert [part.address for part in stacked.parts] == [one.ctypes.data, other.ctypes.data]
    assert stack([one, OnDevice(other)]) is None
    assert stack([OnDevice(one), OnDevice(other.astype(np.float32))]) is None


def test_what_its_library_does_not_give_away():
    class InTraining:
        @property
        def __cuda_array_interface__(self) -> dict[str, object]:
            raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad.\nUse detach()")

    with pytest.raises(InputError, match="an array on the GPU that cannot be read: Can't get .* Use detach"):
        borrow(InTraining())


def test_what_lies_on_the_host_is_not_borrowed():
    assert borrow(np.zeros(3)) is None
    assert borrow(torch.zeros(3)) is None
    assert borrow([1, 2]) is None

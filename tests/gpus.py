"""A GPU for tests: a real one, or the faked driver, on which the same tests run everywhere."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeDriver, Status, install, with_engines

from dcformer_deploy.runtime.backends import sampler
from dcformer_deploy.runtime.backends.borrow import CUDA
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.engine_library import load_library
from dcformer_deploy.runtime.errors import DcformerError
from dcformer_deploy.runtime.gpu import current_gpu, gpu_or_none, import_driver

KINDS = ["faked", pytest.param("real", marks=pytest.mark.gpu)]


class FakedGpu:
    """``driver``: as ``cuda.bindings.driver``. ``libraries``: that its bundles have engines of."""

    is_real, libraries = False, ("tensorrt", "tensorrt_rtx")

    def __init__(self, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.driver: Any = FakeDriver()
        self.driver.kernels, self._monkeypatch = kernels, monkeypatch
        monkeypatch.setattr(sampler, "compile_kernel", lambda capability, nvrtc: b"machine code")

    def put(self, array: np.ndarray) -> Any:
        """An array on the GPU."""
        return OnDevice(array)

    def with_engines(self, bundle: Path, out: Path) -> Path:
        """A copy of a calibrated bundle with FP16 engines for batches up to three."""
        with_engines(bundle, out)
        kernels, self.driver = self.driver.kernels, install(out, self._monkeypatch).driver
        self.driver.kernels = kernels
        return out

    def run_out_of_memory(self, take: Callable[[int], Any]) -> None:
        """Ask for more than there is."""
        self.driver.fail["cuMemAlloc"] = Status.CUDA_ERROR_OUT_OF_MEMORY
        take(1 << 20)


class RealGpu:
    """As ``FakedGpu``; arrays are PyTorch's."""

    is_real = True

    def __init__(self) -> None:
        if gpu_or_none() is None:
            pytest.skip("no GPU that cuda-python can ask")
        self.driver = import_driver()
        self.libraries = tuple(name for name in ("tensorrt", "tensorrt_rtx") if _loads(name))

    def put(self, array: np.ndarray) -> Any:
        """An array on the GPU."""
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("PyTorch has no CUDA here")
        return torch.from_numpy(array.copy()).cuda()

    def with_engines(self, bundle: Path, out: Path) -> Path:
        """A copy of a calibrated bundle with FP16 engines for batches up to three."""
        if not self.libraries:
            pytest.skip("neither tensorrt nor tensorrt_rtx is installed")
        shutil.copytree(bundle, out)
        for library in self.libraries:
            assert main(["build", str(out), "--precision", "fp16", "--max-batch", "3",
                         "--engine-library", library]) == 0
        return out

    def run_out_of_memory(self, take: Callable[[int], Any]) -> None:
        """Ask for more than there is."""
        take(current_gpu().memory_bytes + (1 << 40))


def _loads(name: str) -> bool:
    try:
        load_library(name)
    except DcformerError:
        return False
    return True


class OnDevice:
    """An array as torch, CuPy or JAX make it, for the faked driver, whose memory is the host's.

    Args:
        interface: beyond shape, type, address and strides.
    """

    def __init__(self, array: np.ndarray, device: int = 0, **interface: object) -> None:
        self.shape, self._array, self._device = array.shape, array, device
        self.__cuda_array_interface__ = {"shape": array.shape, "typestr": array.dtype.str, "version": 3,
                                         "data": (array.ctypes.data, False), "strides": array.strides, **interface}

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self._device

    def __getitem__(self, index: Any) -> Any:
        return OnDevice(self._array[index])


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins where a GPU's allocations do."""
    block = np.empty(array.nbytes + 256, np.uint8)
    start = -block.ctypes.data % 256
    found = block[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    found[...] = array
    return found

"""The GPU of this machine, asked through NVIDIA's own driver bindings (cuda-python)."""

from __future__ import annotations

import importlib
from typing import Any

from .engines import Gpu
from .errors import DeviceUnavailable, MissingDependency, install, one_line

#: What cuda-pathfinder raises where there is no libcuda; its text speaks of a library to programmers.
_NO_LIBRARY = "DynamicLibNotFoundError"


def current_gpu(index: int = 0) -> Gpu:
    """Name, compute capability and memory of a GPU.

    Run on machines without a GPU, where it raises, and against a fake driver; on a GPU not yet.

    Raises:
        MissingDependency: cuda-python is not installed.
        DeviceUnavailable: no driver, or no such GPU.
    """
    driver = import_driver()
    try:
        ask(driver, driver.cuInit(0))
        device = ask(driver, driver.cuDeviceGet(index))
        attributes = driver.CUdevice_attribute
        major, minor = (ask(driver, driver.cuDeviceGetAttribute(which, device)) for which in
                        (attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                         attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR))
        name = bytes(ask(driver, driver.cuDeviceGetName(256, device))).split(b"\0")[0].decode("utf-8", "replace")
        return Gpu(name, f"{major}.{minor}", int(ask(driver, driver.cuDeviceTotalMem(device))))
    except DeviceUnavailable:
        raise
    except Exception as error:  # the bindings raise classes of their own that differ between releases
        if type(error).__name__ == _NO_LIBRARY:
            raise DeviceUnavailable("no NVIDIA driver here (libcuda is not found); run on a machine with a GPU, in a "
                                    "container that is given it") from error
        raise DeviceUnavailable(f"no usable NVIDIA driver ({one_line(str(error))}); run on a machine with a GPU"
                                ) from error


def gpu_or_none() -> Gpu | None:
    """The GPU, if there is one that can be asked."""
    try:
        return current_gpu()
    except (DeviceUnavailable, MissingDependency):
        return None


def import_driver() -> Any:
    """``cuda.bindings.driver``."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise MissingDependency(f"cuda-python is not installed (or broken: {error}); {install('tensorrt')}") from error


def ask(driver: Any, answer: tuple[Any, ...]) -> Any:
    """What a driver call returned.

    Raises:
        DeviceUnavailable: it returned an error.
    """
    status, *values = answer
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceUnavailable(f"the NVIDIA driver answered {getattr(status, 'name', status)}")
    return values[0] if values else None

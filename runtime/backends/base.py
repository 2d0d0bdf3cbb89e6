"""The interface of a back end."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from ..engines import GPU_TARGET, LIBRARIES
from ..errors import InputError
from ..manifest import PRECISIONS, Preprocessing, TensorInfo
from ..volume.types import Volume
from .borrow import Borrowed

DEVICES = ("cpu", "cuda")
CPU_BACKENDS = ("onnxruntime", "openvino")
#: TensorRT and TensorRT-RTX inside ONNX Runtime, which build engines of their own when a graph is opened.
PROVIDER_BACKENDS = ("onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx")
#: `LIBRARIES` run engines that `dcformer build` makes.
BACKENDS = (*CPU_BACKENDS, *LIBRARIES, *PROVIDER_BACKENDS)
#: Stands for the best that works.
AUTO = "auto"
#: "auto": where fewer bytes go to the GPU, the stored voxels or what the tower reads.
PREPROCESS = ("cpu", "gpu", "auto")
#: More than any machine has cores; a library that is asked for more hangs or crashes.
MOST_THREADS = 1024


@dataclass(frozen=True)
class Options:
    """How to run graphs.

    ``device``: "cpu" or "cuda". ``threads``: CPU threads of one inference; None = the cores this process may use.
    ``backend``: inference library; "auto": ``choose_backend``. ``precision``: which of a bundle's graphs to run; for
    "bf16", openvino computes those in fp32 in bfloat16. ``preprocess``: where scans become inputs, "cpu" or, for
    engines, "gpu", or "auto" for where fewer bytes must go to the GPU.
    """

    device: str = "cpu"
    threads: int | None = None
    backend: str = "onnxruntime"
    precision: str = "fp32"
    preprocess: str = "cpu"

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise InputError(f"device: {self.device!r}; expected one of {', '.join(DEVICES)}")
        if self.backend not in (*BACKENDS, AUTO):
            raise InputError(f"backend: {self.backend!r}; expected one of {', '.join((*BACKENDS, AUTO))}")
        if self.backend != AUTO and self.device not in _devices_of(self.backend):
            advice = "a GPU; pass --device cuda" if self.device == "cpu" else "the CPU; drop --device cuda"
            raise InputError(f"device {self.device!r}: the {self.backend} back end runs on {advice}")
        if self.precision not in PRECISIONS:
            raise InputError(f"precision: {self.precision!r}; expected one of {', '.join(PRECISIONS)}")
        if self.preprocess not in PREPROCESS or (self.preprocess != "cpu"
                                                and self.backend not in (*LIBRARIES, AUTO)):
            raise InputError(f"preprocess: {self.preprocess!r}; expected cpu, or with the back ends "
                             f"{', '.join((*LIBRARIES, AUTO))} also gpu or auto")
        if self.threads is not None and not (type(self.threads) is int and 1 <= self.threads <= MOST_THREADS):
            raise InputError(f"threads: {self.threads!r}; expected 1 to {MOST_THREADS}")

    @property
    def graph_precision(self) -> str:
        """Of the graph that is read."""
        return "fp32" if self.precision == "bf16" and self.backend == "openvino" else self.precision

    @property
    def target(self) -> str:
        """What graphs for the back end are made for."""
        return self.backend if self.device == "cpu" and self.backend in CPU_BACKENDS else GPU_TARGET

    @property
    def thread_count(self) -> int:
        """Threads to use: the request, or the cores this process is allowed to run on."""
        if self.threads is not None:
            return self.threads
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity else os.cpu_count() or 1


def _devices_of(backend: str) -> tuple[str, ...]:
    if backend == "onnxruntime":
        return DEVICES
    return ("cpu",) if backend in CPU_BACKENDS else ("cuda",)


class Backend(Protocol):
    """A loaded graph. ``run`` may be called from several threads at once."""

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Compute the named outputs from the named inputs."""
        ...

    def describe(self) -> str:
        """Library, version, and the device really used."""
        ...


@runtime_checkable
class EngineBackend(Backend, Protocol):
    """One that can also make its inputs on the GPU.

    ``largest_batch``: of an inference. ``slots``: inferences that may run at the same time.
    """

    @property
    def largest_batch(self) -> int: ...  # noqa: D102

    @property
    def slots(self) -> int: ...  # noqa: D102

    def preprocess(self, volume: Volume, spec: Preprocessing, inputs: Sequence[TensorInfo]) -> dict[str, Any]:
        """Arrays on the device, by input name, for ``run``."""
        ...

    def thin(self, volumes: Borrowed, spec: Preprocessing, inputs: Sequence[TensorInfo]) -> dict[str, Any]:
        """The same of preprocessed volumes ``[B, D, H, W]`` that are on the device."""
        ...

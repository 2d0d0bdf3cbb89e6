"""What a GPU does at best: bytes by a copy on the device, multiply-adds by a product of matrices."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

from ...runtime.backends.device import Device, Memory, Stream, plan_buffers
from ...runtime.bundle import Bundle
from ...runtime.engines import GPU_TARGET
from . import Floors
from .clock import Clock

_COPIED = 256 << 20
_SIDE = 8192
_RUNS, _WARM_UP_S = 10, 0.5


class _Copy:
    def __init__(self, device: Device, memory: Memory, stream: Stream) -> None:
        self._device, self._memory, self._stream = device, memory, stream

    @property
    def stream(self) -> int:
        return self._stream.handle

    def enqueue(self) -> None:
        self._device.call("cuMemcpyDtoDAsync", self._memory.address("to"), self._memory.address("from"), _COPIED,
                          self._stream.raw)


class _Product:
    def __init__(self, torch: Any, precision: str) -> None:
        self._torch = torch
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}[precision]
        # Random: products of equal numbers draw less power, and run faster than any real ones.
        def draw() -> Any:
            if precision == "int8":
                return torch.randint(-127, 128, (_SIDE, _SIDE), dtype=dtype, device="cuda")
            return torch.randn((_SIDE, _SIDE), device="cuda").to(dtype)

        self._a = draw()
        self._b = draw().t()  # INT8 matrix units want the second factor by columns
        self._multiply = torch._int_mm if precision == "int8" else torch.matmul

    @property
    def stream(self) -> int:
        return int(self._torch.cuda.current_stream().cuda_stream)

    def enqueue(self) -> None:
        self._multiply(self._a, self._b)


def measure_floors(device: Device, clock: Clock) -> Floors:
    """The best of several runs."""
    stream = Stream(device)
    memory = Memory(device, plan_buffers({"from": _COPIED, "to": _COPIED}), staging=False)
    try:
        copy = _Copy(device, memory, stream)
        warm = time.perf_counter() + _WARM_UP_S  # a GPU that has done nothing runs at a fraction of its clock
        while time.perf_counter() < warm:
            clock.time_ms(copy, _RUNS)
        seconds = min(clock.time_ms(copy, _RUNS) for _ in range(3)) / 1e3
    finally:
        memory.close()
        stream.close()
    return Floors(2 * _COPIED / seconds, _matrix_rates(clock))


def _matrix_rates(clock: Clock) -> dict[str, float]:
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    if not torch.cuda.is_available():
        return {}
    torch.backends.cuda.matmul.allow_tf32 = False
    rates = {}
    for precision in ("fp32", "fp16", "bf16", "int8"):
        try:
            product = _Product(torch, precision)
            clock.time_ms(product)
            rates[precision] = _SIDE**3 / (min(clock.time_ms(product, _RUNS) for _ in range(3)) / 1e3)
        except RuntimeError:  # PyTorch's own: not on this card, or not enough memory; then only bytes count
            continue
    return rates


def floor_ms(floors: Floors, bundle: Bundle, precision: str, batch: int, multiply_adds: int) -> float | None:
    """The larger of the two: inputs and weights read once over the copy's bytes, multiply-adds over the product's."""
    graph = bundle.manifest.graph("image", precision, GPU_TARGET) or bundle.manifest.graph("image")
    assert graph is not None
    half = 2 if precision != "fp32" else 4
    inputs = sum(_size(info.axes) * half for info in graph.inputs)
    weights = next((file.bytes for file in bundle.manifest.files if file.path == graph.weights), 0)
    times = [(batch * inputs + weights) / floors.copy_bytes_per_s]
    if precision in floors.multiply_adds_per_s:
        times.append(batch * multiply_adds / floors.multiply_adds_per_s[precision])
    return 1e3 * max(times)


def _size(axes: tuple[int | str, ...]) -> int:
    """Elements for a batch of one."""
    size = 1
    for side in axes:
        size *= side if isinstance(side, int) else 1
    return size

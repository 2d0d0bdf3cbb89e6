"""Latency, throughput and memory on a GPU: engines beside PyTorch and ONNX Runtime, in one process, by turns.

Run on a faked driver in the tests; on a GPU not yet.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One contender at one batch.

    ``precision``: of products. ``median_ms``, ``p95_ms``, ``p99_ms``: of one inference between two events of its
    stream, inputs on the device.
    ``scans_per_s``: with inferences one upon the other. ``ratio``: how many times faster than the first contender, the
    median over paired runs. ``own_mb``: what the library says that it holds; ``device_mb``: by how much the driver's
    free memory fell; ``peak_mb``: how much more was taken at most while it was loaded and first run, by NVML.
    ``build_s``: of the engine, from its record. ``load_ms``: up to the first result, in a process
    that runs already. ``cosine``: the worst, of embeddings with the first contender's. ``floor_ms``: the larger of the
    two floors; ``to_floor``: the median over it. ``problem``: why it could not run; then figures are None.
    """

    name: str
    batch: int
    precision: str = ""
    description: str = ""
    runs: int = 0
    median_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    scans_per_s: float | None = None
    ratio: float | None = None
    own_mb: float | None = None
    device_mb: float | None = None
    peak_mb: float | None = None
    build_s: float | None = None
    load_ms: float | None = None
    cosine: float | None = None
    floor_ms: float | None = None
    to_floor: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Floors:
    """What this GPU does at best, measured in the same run.

    ``copy_bytes_per_s``: read and written bytes of a copy on the device, counted both. ``multiply_adds_per_s``: of a
    product of large square matrices, by precision; without PyTorch on the GPU empty.
    """

    copy_bytes_per_s: float
    multiply_adds_per_s: dict[str, float]


@dataclass(frozen=True)
class GpuReport:
    """A run. ``gpu``: name, compute capability and memory. ``multiply_adds``: of one volume."""

    date: str
    machine: str
    gpu: str
    encoder: str
    volume_dhw: tuple[int, int, int]
    multiply_adds: int
    floors: Floors
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

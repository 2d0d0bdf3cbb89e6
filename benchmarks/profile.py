"""Where the time of a bundle goes: per phase of scoring a scan, and per kind of operator of the image tower."""

from __future__ import annotations

import collections
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.backends import Options
from ..runtime.backends.onnxruntime import import_onnxruntime, session_options
from ..runtime.backends.openvino import cpu_settings, shared_core
from ..runtime.bundle import open_bundle
from ..runtime.errors import InputError
from ..runtime.machine import processor
from ..runtime.model import load
from ..runtime.scan_files import ScanPath
from ..runtime.volume import image_feeds

_WARM_UP = 2


@dataclass(frozen=True)
class OperatorTime:
    """One kind of operator: how many an inference runs, and their milliseconds in all."""

    operator: str
    count: float
    ms: float


@dataclass(frozen=True)
class Profile:
    """``operators``: slowest first. ``phases_ms``: medians by phase of scoring a scan; empty without a scan."""

    machine: str
    backend: str
    operators: tuple[OperatorTime, ...]
    phases_ms: dict[str, float]

    @property
    def total_ms(self) -> float:
        """Of all operators."""
        return sum(row.ms for row in self.operators)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def profile(bundle: Path, options: Options, runs: int, scan: ScanPath | None = None) -> Profile:
    """Run the image tower with its library's own profiler on random voxels, and score a scan if one is given.

    Args:
        runs: measured inferences; before them, some warm up.
    """
    opened = open_bundle(bundle)
    graph = opened.manifest.graph("image", options.graph_precision, options.backend)
    if graph is None:
        raise InputError(f"{bundle}: no image tower in {options.precision}; `dcformer calibrate` adds it")
    spec = opened.manifest.preprocessing
    low, high = spec.value_range
    volume = np.random.default_rng(0).uniform(low, high, (1, *spec.shape_dhw)).astype(np.float32)
    feeds = image_feeds(graph.inputs, volume)
    measure = {"onnxruntime": _onnxruntime, "openvino": _openvino}[options.backend]
    events = measure(opened.path(graph.file), options, feeds, runs)
    phases: dict[str, float] = {}
    if scan is not None:
        model = load(bundle, threads=options.threads, backend=options.backend, precision=options.precision)
        timings = [model.zero_shot(scan).timings_ms for _ in range(_WARM_UP + runs)][_WARM_UP:]
        phases = {name: float(np.median([t[name] for t in timings])) for name in timings[0]}
    library = f"{options.backend} {options.precision}, {options.thread_count} threads"
    return Profile(processor(), library, tuple(_add_up(events, runs)), phases)


def _add_up(events: Iterable[tuple[str, float]], runs: int) -> list[OperatorTime]:
    times: dict[str, float] = collections.defaultdict(float)
    counts: dict[str, int] = collections.Counter()
    for operator, ms in events:
        times[operator] += ms / runs
        counts[operator] += 1
    rows = [OperatorTime(operator, counts[operator] / runs, ms) for operator, ms in times.items()]
    return sorted(rows, key=lambda row: -row.ms)


def _onnxruntime(path: Path, options: Options, feeds: Mapping[str, NDArray[Any]],
                 runs: int) -> Iterator[tuple[str, float]]:
    onnxruntime, settings = import_onnxruntime(), session_options(options.thread_count)
    settings.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        settings.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        for _ in range(_WARM_UP + runs):
            session.run(["image_embedding"], dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    starts = [event["ts"] for event in events if event["name"] == "model_run"]
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= starts[_WARM_UP]:
            shapes = [next(iter(entry.values())) for entry in event["args"]["input_type_shape"]]
            yield _label(event["args"]["op_name"], shapes), event["dur"] / 1e3


def _label(operator: str, shapes: list[list[int]]) -> str:
    """Convolutions apart by kernel and width: ``Conv 3x1, 32 to 32``."""
    if operator not in ("Conv", "FusedConv", "QLinearConv", "ConvInteger") or len(shapes) < 2:
        return operator
    weight = next(shape for shape in shapes[1:] if len(shape) == len(shapes[0]))
    kind = "depthwise" if weight[1] == 1 and weight[0] == shapes[0][1] else f"{shapes[0][1]} to {weight[0]}"
    return f"{operator} {'x'.join(map(str, weight[2:]))}, {kind}"


def _openvino(path: Path, options: Options, feeds: Mapping[str, NDArray[Any]],
              runs: int) -> Iterator[tuple[str, float]]:
    core = shared_core()
    model = core.read_model(str(path))
    model.reshape({name: list(array.shape) for name, array in feeds.items()})
    request = core.compile_model(model, "CPU", {**cpu_settings(options), "PERF_COUNT": True}).create_infer_request()
    for run in range(_WARM_UP + runs):
        request.infer(dict(feeds), share_inputs=True)
        for event in request.get_profiling_info() if run >= _WARM_UP else ():
            if (ms := event.real_time.total_seconds() * 1e3) > 0:
                yield f"{event.node_type} ({event.exec_type})", ms

"""Whether a rewrite that is exact anywhere is also faster here: measured once, and remembered.

How fast a form of a convolution is depends on the library, its version and the processor, so no constant decides. Both
graphs run by turns, and the best of their latencies are kept in the user's cache folder under a key of all that they
depend on: operators and shapes of both graphs (not their weights), library and version, processor, threads. What was
measured while other programs used the machine decides once, and is not remembered.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ...runtime.backends import Backend, Options, open_graph
from ...runtime.errors import DcformerWarning
from ...runtime.files import atomic_file, cache_folder
from ...runtime.machine import processor
from ...runtime.provenance import Timing

#: Measured inferences of each graph, after one that warms up.
RUNS = 5


class Activity:
    """How much of the machine other processes, and other machines on its host, use from now on."""

    def __init__(self) -> None:
        self._wall, self._own, self._all = time.perf_counter(), time.process_time(), _busy_seconds()

    def of_others(self) -> float:
        """Share of all cores; 0 where the system does not tell."""
        wall = (time.perf_counter() - self._wall) * (os.cpu_count() or 1)
        used = _busy_seconds() - self._all - (time.process_time() - self._own)
        # The system counts in ticks of 10 ms.
        return max(0.0, used / wall) if wall > 1 else 0.0


def _busy_seconds() -> float:
    """Seconds that all cores were not idle, or taken away by the host, since the system started."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice, system, _, _, interrupts, soft, stolen = map(int, path.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


class Stopwatch:
    """Measures rewrites on one back end.

    Args:
        options: back end and threads.
        cache: file of known timings; None = in the user's cache folder.
    """

    def __init__(self, options: Options, cache: Path | None = None) -> None:
        self._options = options
        self._cache = cache or cache_folder() / "best-timings.json"

    def compare(self, before: onnx.ModelProto, after: onnx.ModelProto,
                sides: Mapping[str, int] | None = None) -> Timing:
        """Time two graphs with the same inputs; remembered if they were timed here before.

        Args:
            sides: of dynamic axes, by name; 1 where nothing is said.
        """
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / name for name in ("before.onnx", "after.onnx")]
            for path, proto in zip(paths, (before, after), strict=True):
                onnx.save(proto, path)
            backends = [open_graph(path, self._options) for path in paths]
            where = f"{backends[0].describe()}, {processor()}"
            key = f"{where}, {_structure(before)}, {_structure(after)}"
            key += "".join(f", {name} {side}" for name, side in sorted((sides or {}).items()))
            known = self._read()
            if key in known:
                before_ms, after_ms = known[key]
                return Timing(before_ms, after_ms, where)
            activity = Activity()
            before_ms, after_ms = _measure(backends, before, sides or {})
            timing = Timing(before_ms, after_ms, where, round(activity.of_others(), 2))
            if not timing.is_disturbed:
                self._write({**known, key: [before_ms, after_ms]})
            return timing

    def _read(self) -> dict[str, list[float]]:
        if not self._cache.exists():
            return {}
        try:
            known = json.loads(self._cache.read_text(encoding="utf-8"))
            return {str(key): [float(before), float(after)] for key, (before, after) in known.items()}
        except (ValueError, TypeError, AttributeError) as error:
            warnings.warn(f"{self._cache}: damaged ({error}); measured anew", DcformerWarning, stacklevel=3)
            return {}

    def _write(self, known: dict[str, list[float]]) -> None:
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._cache) as path:
            path.write_text(json.dumps(known, indent=1), encoding="utf-8")


def _measure(backends: list[Backend], proto: onnx.ModelProto, sides: Mapping[str, int]) -> list[float]:
    feeds = {value.name: _filled(value, sides) for value in proto.graph.input}
    outputs = [proto.graph.output[0].name]
    latencies: list[list[float]] = [[], []]
    for turn in range(RUNS + 1):
        for index in (0, 1) if turn % 2 else (1, 0):
            start = time.perf_counter()
            backends[index].run(feeds, outputs)
            if turn:
                latencies[index].append((time.perf_counter() - start) * 1e3)
    return [min(times) for times in latencies]


def _filled(value: onnx.ValueInfoProto, sides: Mapping[str, int]) -> NDArray[Any]:
    """Zeros, or ones for integers: as an attention mask, zeros would leave nothing to compute."""
    kind = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    shape = [axis.dim_value or sides.get(axis.dim_param, 1) for axis in kind.shape.dim]
    return np.full(shape, int(np.issubdtype(dtype, np.integer)), dtype)


def _structure(proto: onnx.ModelProto) -> str:
    """A digest of a graph without its weights' values."""
    shapes = {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
    inputs = [[axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in proto.graph.input]
    nodes = [(node.op_type, [shapes.get(name) for name in node.input],
              sorted((a.name, list(a.ints), a.i) for a in node.attribute)) for node in proto.graph.node]
    return hashlib.sha256(json.dumps([inputs, nodes]).encode()).hexdigest()[:16]

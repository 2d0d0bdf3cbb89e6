"""Every graph and engine of a bundle on the same inputs, against fp32 in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ..runtime.backends import Backend, Options, open_graph
from ..runtime.bundle import Bundle
from ..runtime.engines import GPU_TARGET, EngineRecord, engine_records
from ..runtime.errors import DcformerError, EngineRefused, InputError
from ..runtime.manifest import ANY_TARGET, Graph
from ..runtime.volume import image_feeds
from .calibrate import load_graph
from .emulate import EmulatedBackend
from .sqnr import EXACT_DB, energy, signal_to_noise_db

#: Least signal over noise of a graph against fp32. That lower precisions keep the answers is `dcformer retention`'s to
#: show; these only tell a graph that computes something else.
LEAST_DB = {"fp32": 80.0, "fp16": 20.0, "bf16": 12.0, "int8": 3.0}
#: What an engine may add to the noise of the file that it was built from, and noise that is never too much of its own.
_ADDED_DB = 6.0
_OWN_DB = {"fp32": 80.0, "fp16": 60.0, "bf16": 45.0, "int8": 45.0}
_TF32_DB = 50.0
#: What is compared of each tower; the first decides.
OUTPUTS = {"image": ("feature_map", "image_embedding", "codes"), "text": ("text_embedding",)}


@dataclass(frozen=True)
class Row:
    """One file against fp32 on all inputs.

    ``back_end``: what ran it. ``sqnr_db``: of features, or text embeddings. ``least_db``: what is asked for.
    ``cosine``: of embeddings, the worst. ``max_error``: largest difference over largest magnitude. ``codes_equal``:
    share; None without codes. ``not_run``: why it could not run here; then the others are None.
    """

    file: str
    role: str
    precision: str
    back_end: str
    sqnr_db: float | None = None
    least_db: float | None = None
    cosine: float | None = None
    max_error: float | None = None
    codes_equal: float | None = None
    not_run: str | None = None

    @property
    def passed(self) -> bool:
        """Whether it ran and kept to its bound."""
        return self.sqnr_db is not None and self.least_db is not None and self.sqnr_db >= self.least_db

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed if self.not_run is None else None}


def check(bundle: Bundle, volumes: Sequence[NDArray[np.float32]], tokens: Sequence[Mapping[str, NDArray[np.int64]]],
          options: Options, on_file: Callable[[str], None] = lambda _: None) -> list[Row]:
    """Run everything.

    Args:
        volumes: preprocessed, ``[D, H, W]`` each.
        tokens: ``input_ids`` and ``attention_mask`` ``[n, length]``.
        options: threads, and the device for engines.
    """
    rows, records = [], engine_records(bundle)
    for role in OUTPUTS:
        reference = bundle.manifest.graph(role)
        if reference is None:
            continue
        names = [name for name in OUTPUTS[role] if name in {output.name for output in reference.outputs}]

        def feeds(graph: Graph, role: str = role) -> list[Mapping[str, NDArray[Any]]]:
            return [image_feeds(graph.inputs, v[None]) for v in volumes] if role == "image" else list(tokens)

        on_file(reference.file)
        exact = _run(open_graph(bundle.path(reference.file), _cpu(options, "onnxruntime")), feeds(reference), names)
        noise: dict[str, float] = {}
        for graph in bundle.manifest.graphs:
            if graph.role == role and graph is not reference:
                on_file(graph.file)
                rows.append(_check_graph(bundle, graph, feeds(graph), names, exact, options))
                noise[graph.file] = rows[-1].sqnr_db or 0.0
        for record in records:
            if record.role == role:
                on_file(record.engine)
                graph = next(g for g in bundle.manifest.graphs if g.file == record.onnx)
                least = min(noise.get(record.onnx, EXACT_DB) - _ADDED_DB,
                            _TF32_DB if record.flags.get("tf32") else _OWN_DB[record.precision])
                rows.append(_check_engine(bundle, record, feeds(graph), names, exact, options, least))
    return rows


def _cpu(options: Options, backend: str) -> Options:
    return Options(threads=options.threads, backend=backend)


def _check_graph(bundle: Bundle, graph: Graph, feeds: Sequence[Mapping[str, NDArray[Any]]], names: Sequence[str],
                 exact: list[list[NDArray[Any]]], options: Options) -> Row:
    """On the back end that it is made for; one for GPUs, or in 16 bits, with every rounding."""
    emulated = graph.target == GPU_TARGET or (graph.target == ANY_TARGET and graph.precision == "fp16")
    backend = "onnxruntime" if graph.target in (ANY_TARGET, GPU_TARGET) else graph.target
    shown = f"{backend}, emulated" if emulated else backend
    try:
        if graph.weights is not None:
            bundle.path(graph.weights)
        opened = (EmulatedBackend(load_graph(bundle, graph), _cpu(options, backend)) if emulated else
                  open_graph(bundle.path(graph.file), _cpu(options, backend)))
        found = _run(opened, feeds, names)
    except DcformerError as error:
        return Row(graph.file, graph.role, graph.precision, shown, not_run=str(error))
    return _compare(graph.file, graph.role, graph.precision, shown, names, exact, found, LEAST_DB[graph.precision])


def _check_engine(bundle: Bundle, record: EngineRecord, feeds: Sequence[Mapping[str, NDArray[Any]]],
                  names: Sequence[str], exact: list[list[NDArray[Any]]], options: Options, least: float) -> Row:
    from ..runtime.backends.tensorrt import TensorRtBackend

    wanted = Options(device="cuda", threads=options.threads, backend=record.library, precision=record.precision)
    try:
        backend = TensorRtBackend(bundle, record.role, wanted, record=record)
        found = _run(backend, feeds, names)
    except (DcformerError, ImportError) as error:
        return Row(record.engine, record.role, record.precision, record.library, not_run=str(error))
    return _compare(record.engine, record.role, record.precision, backend.describe(), names, exact, found, least)


def _run(backend: Backend, feeds: Sequence[Mapping[str, NDArray[Any]]], names: Sequence[str]) -> list[list[Any]]:
    return [backend.run(feed, names) for feed in feeds]


def _compare(file: str, role: str, precision: str, back_end: str, names: Sequence[str], exact: list[list[NDArray[Any]]],
             found: list[list[NDArray[Any]]], least: float) -> Row:
    by_name = {name: (np.concatenate([outputs[index].reshape(len(outputs[index]), -1) for outputs in exact]),
                      np.concatenate([outputs[index].reshape(len(outputs[index]), -1) for outputs in found]))
               for index, name in enumerate(names)}
    one, other = by_name[names[0]]
    noise = signal_to_noise_db(energy(one), energy(one, other)) if np.isfinite(other).all() else -EXACT_DB
    a, b = by_name[f"{role}_embedding"]
    codes = float((by_name["codes"][0] == by_name["codes"][1]).mean()) if "codes" in by_name else None
    return Row(file, role, precision, back_end, noise, least, float((a * b).sum(axis=1).min()),
               float(np.abs(one - other).max() / np.abs(one).max()), codes)


def random_volumes(bundle: Bundle, count: int, seed: int = 0) -> list[NDArray[np.float32]]:
    """Smooth preprocessed volumes ``[D, H, W]`` over the whole range of values."""
    spec = bundle.manifest.preprocessing
    rng = np.random.default_rng(seed)
    low, high = spec.value_range
    volumes = []
    for _ in range(count):
        coarse = rng.uniform(low, high, tuple(-(-side // 16) for side in spec.shape_dhw)).astype(np.float32)
        volume = coarse.repeat(16, 0).repeat(16, 1).repeat(16, 2)[tuple(slice(side) for side in spec.shape_dhw)]
        volumes.append(np.clip(volume + rng.normal(0, 0.05, spec.shape_dhw), low, high).astype(np.float32))
    return volumes


def random_tokens(bundle: Bundle, seed: int = 0) -> list[Mapping[str, NDArray[np.int64]]]:
    """Token ids ``[4, length]`` with padding of several lengths."""
    text = bundle.manifest.text
    length = min(24, text.max_tokens) if text is not None else 24
    ids = np.random.default_rng(seed).integers(0, _vocabulary(bundle), (4, length))
    mask = (np.arange(length) < np.linspace(2, length, 4).astype(int)[:, None]).astype(np.int64)
    return [{"input_ids": ids, "attention_mask": mask}]


def _vocabulary(bundle: Bundle) -> int:
    """Tokens that the text tower knows, 1 where there is none."""
    graph = bundle.manifest.graph("text")
    if graph is None:
        return 1
    proto = onnx.load(bundle.path(graph.file), load_external_data=False)
    table = next(node.input[0] for node in proto.graph.node if node.op_type == "Gather" and "input_ids" in node.input)
    return next(int(tensor.dims[0]) for tensor in proto.graph.initializer if tensor.name == table)


def require_any_run(rows: Sequence[Row], folder: Path) -> None:
    """Raise unless something ran.

    Raises:
        InputError: the bundle holds nothing but fp32 for any back end.
        EngineRefused: there are engines, and nothing at all could run.
    """
    if not rows:
        raise InputError(f"{folder}: holds one graph of each tower and no engine; there is nothing to compare")
    if all(row.not_run is not None for row in rows):
        raise EngineRefused(f"{folder}: nothing could run here: {rows[0].not_run}")

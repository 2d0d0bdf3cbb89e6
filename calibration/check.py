"""Every graph and engine of a bundle on the same inputs, against fp32 in ONNX Runtime."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ..runtime.backends import Backend, Options, open_graph
from ..runtime.backends.base import CPU_BACKENDS
from ..runtime.backends.device import Device
from ..runtime.backends.sampler import Sampler
from ..runtime.bundle import Bundle
from ..runtime.engines import GPU_TARGET, EngineRecord, engine_records, read_engine
from ..runtime.errors import DcformerError, EngineRefused, InputError
from ..runtime.gpu import current_gpu
from ..runtime.manifest import ANY_TARGET, Graph, Preprocessing
from ..runtime.volume import ReadOptions, image_feeds, read_scan, scan_feeds
from .calibrate import load_graph
from .emulate import EmulatedBackend
from .observe import open_part
from .scans import Scan
from .sqnr import EXACT_DB, energy, signal_to_noise_db


@dataclass(frozen=True)
class Least:
    """What a graph must keep of fp32; the rest is for `dcformer retention` to show.

    ``sqnr_db``: of feature maps, or text embeddings. ``codes_equal``: share. ``cosine``: of an embedding with what fp32
    makes of the same codes; of the embeddings themselves where there are no codes.
    """

    sqnr_db: float
    cosine: float
    codes_equal: float = 0.0


#: At least 8 dB below what encoders with random weights and the demo model give, on scans and on random volumes.
LEAST = {
    "image": {"fp32": Least(100, 0.99999, 0.99), "fp16": Least(40, 0.9999, 0.9), "bf16": Least(25, 0.999, 0.75),
              "int8": Least(10, 0.99, 0.5)},
    "text": {"fp32": Least(100, 0.99999), "fp16": Least(50, 0.9999), "bf16": Least(35, 0.999), "int8": Least(35, 0.99)},
}
#: Where PyTorch and ONNX Runtime, both in float32, agree no better than this, the encoder makes noise of any rounding:
#: TransUNet, whose softmax is nearly an argmax. Others agree to 2e-6.
_OWN_ERROR = 1e-5
LEAST_OF_NOISY = {"fp32": Least(70, 0.99999, 0.9), "fp16": Least(15, 0.9999, 0.5), "bf16": Least(7, 0.999, 0.25),
                  "int8": Least(4, 0.99, 0.1)}
#: What an engine may add to the noise of the file that it was built from, and noise that is never too much of its own.
_ADDED_DB = 6.0
_OWN_DB = {"fp32": 80.0, "fp16": 60.0, "bf16": 45.0, "int8": 45.0}
_TF32_DB = 50.0
#: Of inputs that the GPU makes, in units of the preprocessed volume.
LARGEST_PREPROCESSING_ERROR = 1e-3
#: What is compared of each tower; the first decides.
OUTPUTS = {"image": ("feature_map", "image_embedding", "codes"), "text": ("text_embedding",)}


@dataclass(frozen=True)
class Row:
    """One file against fp32 on all inputs.

    ``back_end``: what ran it. ``sqnr_db``: of features, or text embeddings. ``least_db``: what is asked for.
    ``cosine``: of embeddings, the worst. ``max_error``: largest difference over largest magnitude. ``codes_equal``:
    share; None without codes. ``failures``: what is further from fp32 than it may be. ``not_run``: why it could not run
    here; then the others are None.
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
    failures: tuple[str, ...] = ()
    not_run: str | None = None

    @property
    def passed(self) -> bool:
        """Whether it ran and kept to its bounds."""
        return self.not_run is None and not self.failures

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which knows no NaN: such figures are None."""
        figures = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                   for name, value in asdict(self).items()}
        return {**figures, "passed": self.passed if self.not_run is None or self.failures else None}


class _Reference:
    """One tower in fp32 on all inputs."""

    def __init__(self, bundle: Bundle, graph: Graph, volumes: Sequence[NDArray[np.float32]],
                 tokens: Sequence[Mapping[str, NDArray[np.int64]]], options: Options) -> None:
        self.role = graph.role
        self.names = [name for name in OUTPUTS[self.role] if name in {output.name for output in graph.outputs}]
        self._volumes, self._tokens = volumes, tokens
        self._feeds = self.feeds(graph)
        self._exact = self.run(open_graph(bundle.path(graph.file), Options(threads=options.threads)), self._feeds)
        self._rest = None
        if "codes" in self.names:
            self._rest = open_part(load_graph(bundle, graph), ["image_embedding"], options.thread_count, ["codes"])

    def feeds(self, graph: Graph, batch: int | None = None) -> list[Mapping[str, NDArray[Any]]]:
        """What a graph reads, by inference.

        Args:
            batch: of one inference of all inputs, some of them several times over; None = a scan alone, texts together.
        """
        alone: list[Mapping[str, NDArray[Any]]] = list(self._tokens)
        if self.role == "image":
            alone = [image_feeds(graph.inputs, volume[None]) for volume in self._volumes]
        if batch is None:
            return alone
        together = {name: np.concatenate([feed[name] for feed in alone]) for name in alone[0]}
        return [{name: array[np.arange(batch) % len(array)] for name, array in together.items()}]

    def run(self, backend: Backend, feeds: Sequence[Mapping[str, NDArray[Any]]]) -> list[dict[str, NDArray[Any]]]:
        """By input, the outputs that are compared."""
        return [dict(zip(self.names, backend.run(feed, self.names), strict=True)) for feed in feeds]

    def compare(self, row: Row, found: list[dict[str, NDArray[Any]]], least: Least) -> Row:
        """A row with its figures.

        Args:
            found: of all inputs, or of more, as ``feeds`` makes a batch.
        """
        main, embedding = self.names[0], f"{self.role}_embedding"
        other = _rows(found, main)
        same = np.arange(len(other)) % len(_rows(self._exact, main))
        one = _rows(self._exact, main)[same]
        noise = signal_to_noise_db(energy(one), energy(one, other)) if np.isfinite(other).all() else -EXACT_DB
        codes = None
        if self._rest is not None:
            codes = float((_rows(self._exact, "codes")[same] == _rows(found, "codes")).mean())
        kept = {"features" if self.role == "image" else "embeddings": noise >= least.sqnr_db,
                "codes": codes is None or codes >= least.codes_equal,
                "embeddings of codes": _cosine(self._from_codes(found, same), _rows(found, embedding)) >= least.cosine}
        return dataclasses.replace(
            row, sqnr_db=noise, least_db=least.sqnr_db, codes_equal=codes,
            cosine=_cosine(_rows(self._exact, embedding)[same], _rows(found, embedding)),
            max_error=float(np.abs(one - other).max() / np.abs(one).max()),
            failures=tuple(name for name, good in kept.items() if not good))

    def _from_codes(self, found: list[dict[str, NDArray[Any]]], same: NDArray[np.intp]) -> NDArray[np.float32]:
        """Embeddings that fp32 makes of a graph's own codes; fp32's own where there are none.

        Args:
            same: which input each row of ``found`` is of.
        """
        if self._rest is None:
            return _rows(self._exact, f"{self.role}_embedding")[same]
        inputs = {entry.name for entry in self._rest.get_inputs()}
        read = {name: np.concatenate([feed[name] for feed in self._feeds]) for name in inputs & set(self._feeds[0])}
        embeddings, start = [], 0
        for outputs in found:
            rows = same[start : start + len(outputs["codes"])]
            start += len(rows)
            made = {name: array for name, array in outputs.items() if name in inputs}
            embeddings.append(self._rest.run(None, {name: array[rows] for name, array in read.items()} | made)[0])
        return np.concatenate(embeddings)


def _rows(outputs: list[dict[str, NDArray[Any]]], name: str) -> NDArray[Any]:
    return np.concatenate([output[name].reshape(len(output[name]), -1) for output in outputs])


def _cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The worst of rows of unit length."""
    return float((one * other).sum(axis=1).min())


def check(bundle: Bundle, volumes: Sequence[NDArray[np.float32]], tokens: Sequence[Mapping[str, NDArray[np.int64]]],
          options: Options, on_file: Callable[[str], None] = lambda _: None) -> list[Row]:
    """Run everything.

    Args:
        volumes: preprocessed, ``[D, H, W]`` each.
        tokens: ``input_ids`` and ``attention_mask`` ``[n, length]``.
        options: threads, and the device for engines.
    """
    rows, records = [], engine_records(bundle)
    noisy = any(found.max_relative_error > _OWN_ERROR for found in bundle.manifest.agreement
                if found.output == "feature_map")
    for role in OUTPUTS:
        exact = bundle.manifest.graph(role)
        if exact is None:
            continue
        on_file(exact.file)
        reference = _Reference(bundle, exact, volumes, tokens, options)
        bounds = LEAST_OF_NOISY if noisy and role == "image" else LEAST[role]
        noise: dict[str, float] = {}
        for graph in bundle.manifest.graphs:
            for backend in _back_ends(bundle, graph) if graph.role == role else ():
                if graph is not exact or backend != CPU_BACKENDS[0]:
                    on_file(graph.file)
                    rows.append(_check_graph(bundle, graph, backend, reference, options, bounds[graph.precision]))
                if graph is not exact:
                    noise.setdefault(graph.file, rows[-1].sqnr_db or 0.0)
        for record in records:
            if record.role == role:
                on_file(record.engine)
                least_db = min(noise.get(record.onnx, EXACT_DB) - _ADDED_DB,
                               _TF32_DB if record.flags.get("tf32") else _OWN_DB[record.precision])
                least = dataclasses.replace(bounds[record.precision], sqnr_db=least_db)
                rows.append(_check_engine(bundle, record, reference, options, least))
    return rows


def _back_ends(bundle: Bundle, graph: Graph) -> Iterator[str]:
    """On which a graph is run: those of this machine's CPU that it is for, or the one that emulates GPUs."""
    if graph.target in CPU_BACKENDS:
        yield graph.target
        return
    yield CPU_BACKENDS[0]
    is_run_by_it = bundle.manifest.graph(graph.role, graph.precision, "openvino") is graph
    if is_run_by_it and not _is_emulated(graph) and find_spec("openvino") is not None:
        yield "openvino"


def _is_emulated(graph: Graph) -> bool:
    return graph.target == GPU_TARGET or (graph.target == ANY_TARGET and graph.precision == "fp16")


def _check_graph(bundle: Bundle, graph: Graph, backend: str, reference: _Reference, options: Options, least: Least
                 ) -> Row:
    """One for GPUs, or in 16 bits, with every rounding."""
    emulated = _is_emulated(graph)
    own = Options(threads=options.threads, backend=backend, precision="fp32" if emulated else graph.precision)
    row = Row(graph.file, graph.role, graph.precision, f"{backend}, emulated" if emulated else backend)
    try:
        if graph.weights is not None:
            bundle.path(graph.weights)
        opened = (EmulatedBackend(load_graph(bundle, graph), own) if emulated else
                  open_graph(bundle.path(graph.file), own))
        found = reference.run(opened, reference.feeds(graph))
    except DcformerError as error:
        return dataclasses.replace(row, not_run=str(error))
    return reference.compare(row, found, least)


def _check_engine(bundle: Bundle, record: EngineRecord, reference: _Reference, options: Options, least: Least) -> Row:
    from ..runtime.backends.tensorrt import TensorRtBackend

    row = Row(record.engine, record.role, record.precision, record.library)
    wanted = Options(device="cuda", threads=options.threads, backend=record.library, precision=record.precision)
    graph = next((graph for graph in bundle.manifest.graphs if graph.file == record.onnx), None)
    if graph is None:
        return dataclasses.replace(row, not_run=f"built from {record.onnx}, which is no longer in the bundle")
    try:
        read_engine(bundle, record)  # whether or not there is a GPU to run it
    except EngineRefused as error:
        return dataclasses.replace(row, not_run=str(error), failures=("damaged or missing",))
    try:
        with contextlib.closing(TensorRtBackend(bundle, record.role, wanted, record=record)) as backend:
            batch = backend.largest_batch
            alone = reference.run(backend, [part for feed in reference.feeds(graph) for part in _split(feed, batch)])
            together = reference.run(backend, reference.feeds(graph, batch)) if batch > 1 else alone
    except DcformerError as error:
        return dataclasses.replace(row, not_run=str(error))
    row = dataclasses.replace(row, back_end=backend.describe())
    return _worst(reference.compare(row, alone, least), reference.compare(row, together, least),
                  f"in a batch of {batch}")


def _split(feed: Mapping[str, NDArray[Any]], most: int) -> list[Mapping[str, NDArray[Any]]]:
    """An inference as several of at most that batch."""
    batch = len(next(iter(feed.values())))
    return [{name: array[start : start + most] for name, array in feed.items()} for start in range(0, batch, most)]


def _worst(one: Row, other: Row, where: str) -> Row:
    """Of two measurements of one engine, the worse figures; what only the second fails in says where."""
    def least(name: str) -> float | None:
        values = [getattr(row, name) for row in (one, other)]
        return None if None in values else float(np.minimum(*values))  # NaN stays NaN

    failures = (*one.failures, *(f"{failure} {where}" for failure in other.failures if failure not in one.failures))
    largest = None if one.max_error is None or other.max_error is None else float(
        np.maximum(one.max_error, other.max_error))
    return dataclasses.replace(one, sqnr_db=least("sqnr_db"), cosine=least("cosine"), codes_equal=least("codes_equal"),
                               max_error=largest, failures=failures)


def check_preprocessing(bundle: Bundle, scans: Sequence[Scan], options: Options) -> list[Row]:
    """Inputs that the GPU makes of scans, against those of the CPU; in each dtype that the bundle's graphs read.

    Raises:
        DeviceUnavailable: no GPU.
    """
    gpu, spec = current_gpu(), bundle.manifest.preprocessing
    try:
        sampler = Sampler(Device(), gpu.compute_capability)
    except DcformerError as error:
        return [Row("preprocessing", "image", "fp32", gpu.name, not_run=str(error))]
    rows, by_dtype = [], {graph.inputs[0].dtype: graph for graph in bundle.manifest.graphs if graph.role == "image"}
    for dtype, graph in by_dtype.items():
        row = Row(f"preprocessing, {dtype}", "image", graph.precision, f"{gpu.name}, {len(scans)} scans")
        try:
            rows.append(_compare_inputs(row, graph, sampler, scans, spec, options))
        except DcformerError as error:  # a scan that the kernel does not take, or the GPU's own
            rows.append(dataclasses.replace(row, not_run=str(error)))
    sampler.close()
    return rows


def _compare_inputs(row: Row, graph: Graph, sampler: Sampler, scans: Sequence[Scan], spec: Preprocessing,
                    options: Options) -> Row:
    signal, noise, largest = 0.0, 0.0, 0.0
    for scan in scans:
        volume = read_scan(scan.path, spec, ReadOptions(**scan.options))
        expected = scan_feeds(graph.inputs, volume, spec, options.thread_count)
        for name, array in sampler.feeds(volume, spec, graph.inputs).items():
            found = sampler.fetch(array).astype(np.float32)
            exact = expected[name].astype(np.float32)
            signal, noise = signal + energy(exact), noise + energy(exact, found)
            largest = float(np.maximum(largest, np.abs(found - exact).max()))  # NaN stays NaN
    failures = () if largest <= LARGEST_PREPROCESSING_ERROR else (f"differs by {largest:.1e}",)
    return dataclasses.replace(row, sqnr_db=signal_to_noise_db(signal, noise), max_error=largest, failures=failures)


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

"""A bundle's graphs in other precisions, beside those it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from ..export.graph_files import WeightsFile, describe_graph
from ..export.rules.measured import Stopwatch
from ..runtime.backends import Options, open_graph
from ..runtime.bundle import Bundle, copy_files, open_bundle, record_file, require_unchanged, write_manifest
from ..runtime.cli.output import Stages
from ..runtime.engines import GPU_TARGET, engine_records
from ..runtime.errors import CheckFailed, InputError, MissingDependency
from ..runtime.files import atomic_folder
from ..runtime.manifest import ANY_TARGET, MANIFEST_NAME, Graph, Manifest
from ..runtime.provenance import Conversion
from ..runtime.volume import image_feeds
from .calibrate import image_graph, load_graph
from .compensate import Correlations, bfloat16_rounding, half_rounding, replace_weights
from .emulate import EmulatedBackend
from .half import Half, to_bfloat16, to_half
from .integers import Weights, compensated, worthwhile_depthwise
from .layers import Layer, group_name, reads_stacked_planes
from .quantize import quantize_weights
from .record import Record, model_digest, read_record, write_record
from .scales import threshold
from .sqnr import energy, signal_to_noise_db

CALIBRATION_FILE = "calibration.json"
#: Least signal over the difference of two back ends on one graph.
_SMALLEST_AGREEMENT_DB = 20.0
#: Precisions that calibration can add.
ADDED = ("fp16", "bf16", "int8")
DEFAULT = ("fp16", "int8")
#: Whether depthwise layers become INT8: where that is faster, as measured here; all; none.
DEPTHWISE = ("measure", "always", "never")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What to add: precisions, the method for INT8's thresholds, and whether depthwise layers become INT8, too.

    ``floats``: layers that stay float, by ``group_name``.
    """

    precisions: Sequence[str] = DEFAULT
    method: str = "mse"
    depthwise: str = "measure"
    floats: Collection[str] = ()

    def stays_float(self, layer: Layer) -> bool:
        """Whether a layer stays float on every back end."""
        return (layer.depthwise and self.depthwise == "never") or group_name(layer) in self.floats

    def keep(self, layer: Layer) -> bool:
        """Whether a layer stays float on a back end that cannot be measured here."""
        return self.stays_float(layer) or (layer.depthwise and self.depthwise != "always")

    def decide(self, proto: onnx.ModelProto, limits: Mapping[str, float], stopwatch: Stopwatch,
               stays_float: Callable[[Layer], bool] | None = None) -> tuple[Callable[[Layer], bool], Collection[str]]:
        """Which layers of a graph stay float on a back end, and the depthwise ones that were found faster in INT8.

        Args:
            stays_float: layers that do so whatever is measured; by default this object's own.
        """
        always = stays_float or self.stays_float
        if self.depthwise != "measure":
            return always, ()
        faster = worthwhile_depthwise(proto, limits, always, stopwatch)
        return lambda layer: always(layer) or (layer.depthwise and group_name(layer) not in faster), faster


def bundle_record(bundle: Bundle, proto: onnx.ModelProto) -> Record:
    """What was observed of a bundle's image tower.

    Raises:
        InputError: nothing yet.
    """
    path = bundle.folder / CALIBRATION_FILE
    if not path.exists():
        raise InputError(f"{bundle.folder}: nothing was observed of it yet; `dcformer calibrate {bundle.folder} --data "
                         "DIR` does")
    return read_record(path, model_digest(proto))


def thresholds_of(record: Record, method: str) -> dict[str, float]:
    """By activation.

    Raises:
        InputError: an activation with NaN, or a method that does not exist.
    """
    found = {}
    for name, histogram in record.histograms.items():
        if not histogram.finite:
            raise InputError(f"activation {name} holds NaN or infinite values on the calibration scans; the checkpoint "
                             "cannot be quantized")
        if histogram.counts.any() or histogram.largest == 0:
            found[name] = threshold(histogram, method)
    return found


def add_precisions(bundle: Bundle, record: Record, choice: Choice, display: Stages,
                   correlations: Correlations | None = None) -> Manifest:
    """Make the graphs and replace the bundle by one that has them, or leave it as it is.

    Args:
        correlations: of the scans of ``record``, where these were at hand: weights are then rounded so that errors make
            up for each other, else to the nearest.

    Raises:
        InputError: a graph with no layer that INT8 could hold; activations that cannot be quantized.
        CheckFailed: a new graph gives NaN.
    """
    old = bundle.manifest
    with atomic_folder(bundle.folder, MANIFEST_NAME) as folder:
        kept = [graph for graph in old.graphs if graph.precision not in choice.precisions]
        files = copy_files(bundle, folder, _made_anew(bundle, kept))
        graphs, conversions = list(kept), [c for c in old.conversions if c.precision not in choice.precisions]
        for precision in choice.precisions:
            display.stage(f"writing {precision}")
            if precision == "int8":
                added, conversion = _add_int8(bundle, record, choice, folder, correlations)
            else:
                add = _add_half if precision == "fp16" else _add_bfloat16
                added, conversion = add(bundle, record, folder, correlations)
            for graph in added:
                _require_finite(folder, graph, old)
            graphs += added
            conversions.append(conversion)
        write_record(folder / CALIBRATION_FILE, record)
        new = {name for graph in graphs for name in (graph.file, graph.weights) if name is not None}
        names = sorted({*files, *new, CALIBRATION_FILE})
        manifest = dataclasses.replace(old, graphs=tuple(graphs), conversions=tuple(conversions),
                                       files=tuple(record_file(folder, name) for name in names))
        write_manifest(folder, manifest)
        require_unchanged(bundle)
    return open_bundle(bundle.folder, verify=False).manifest


def _made_anew(bundle: Bundle, kept: Sequence[Graph]) -> set[str]:
    """Files of graphs that are not kept, and engines of these."""
    needed = {name for graph in kept for name in (graph.file, graph.weights)}
    owned = {name for graph in bundle.manifest.graphs for name in (graph.file, graph.weights) if name is not None}
    engines = {name for record in engine_records(bundle) if record.onnx not in needed for name in record.files}
    return {CALIBRATION_FILE, *(owned - needed), *engines}


def _text_graph(bundle: Bundle) -> onnx.ModelProto | None:
    graph = bundle.manifest.graph("text")
    return None if graph is None else load_graph(bundle, graph)


def _add_half(bundle: Bundle, record: Record, folder: Path,
              correlations: Correlations | None) -> tuple[list[Graph], Conversion]:
    _, image = image_graph(bundle)
    if correlations is not None:
        image = replace_weights(image, correlations.rounded(half_rounding))
    half = to_half(image, _largest(record))
    graphs = [_save(half.proto, folder, "image", "fp16")]
    if (text := _text_graph(bundle)) is not None:
        graphs.append(_save(to_half(text).proto, folder, "text", "fp16"))
    return graphs, Conversion("fp16", None, len(record.scans), record.data, 0,
                              (_rounded_how(correlations), *_reasons(half)))


def _add_bfloat16(bundle: Bundle, record: Record, folder: Path,
                  correlations: Correlations | None) -> tuple[list[Graph], Conversion]:
    """For GPUs: on CPUs, ONNX Runtime has no kernels for it, and OpenVINO computes fp32 graphs in it by itself."""
    _, image = image_graph(bundle)
    if correlations is not None:
        image = replace_weights(image, correlations.rounded(bfloat16_rounding))
    half = to_bfloat16(image)
    graphs = [_save(half.proto, folder, "image", "bf16", GPU_TARGET)]
    if (text := _text_graph(bundle)) is not None:
        graphs.append(_save(to_bfloat16(text).proto, folder, "text", "bf16", GPU_TARGET))
    return graphs, Conversion("bf16", None, len(record.scans), record.data, 0,
                              (_rounded_how(correlations), *_reasons(half)))


def _rounded_how(correlations: Correlations | None) -> str:
    if correlations is None:
        return "weights rounded to the nearest, as no scans were at hand"
    return "weights rounded so that errors make up for each other on the scans"


def _largest(record: Record) -> dict[str, float]:
    return {name: histogram.largest for name, histogram in record.histograms.items()}


def _reasons(half: Half) -> tuple[str, ...]:
    texts = [f"{count} nodes in float32: {reason}" for reason, count in half.float32.items()]
    return (*texts, *(f"{name} reaches {value:.3g}, kept in float32; bf16 would hold it"
                      for name, value in half.overflow.items()))


def _add_int8(bundle: Bundle, record: Record, choice: Choice, folder: Path,
              correlations: Correlations | None) -> tuple[list[Graph], Conversion]:
    """For any back end, with float32 where it is not INT8; for GPUs, with FP16 there; and what is faster on others."""
    limits = thresholds_of(record, choice.method)
    _, image = image_graph(bundle)
    weights = Weights()
    if correlations is not None:
        weights = compensated(image, limits, correlations, choice.stays_float)
    keep, decided = choice.decide(image, limits, Stopwatch(Options(precision="int8")))
    found = weights.quantize(image, limits, keep)
    file = WeightsFile(folder / "image.int8.weights")
    graphs = [_save(found.proto, folder, "image", "int8", weights=file)]
    notes = [_rounded_how(correlations), *(f"{name}: float, by choice" for name in choice.floats), *found.left,
             *(f"{name}: depthwise and faster in INT8" for name in sorted(decided))]
    gpu = weights.quantize(image, limits, choice.keep)
    graphs.append(_save(to_half(gpu.proto, _largest(record)).proto, folder, "image", "int8", GPU_TARGET, file))
    notes.append(f"for {GPU_TARGET}: FP16 where it is not INT8")
    for form in bundle.manifest.graphs:
        if form.role == "image" and form.precision == "fp32" and form.target != ANY_TARGET:
            try:
                graph, decided = _int8_for(bundle, form, limits, choice, weights.moved(image, load_graph(bundle, form)),
                                           found.proto, folder, file)
            except MissingDependency:
                notes.append(f"for {form.target}: nothing of its own, as it is not installed here to be measured")
                continue
            if graph is not None:
                graphs.append(graph)
                notes += [f"for {form.target}: {name}: depthwise and faster in INT8" for name in sorted(decided)]
    if (text := _text_graph(bundle)) is not None:
        graphs.append(_save(to_half(quantize_weights(text)).proto, folder, "text", "int8"))
    return graphs, Conversion("int8", choice.method, len(record.scans), record.data, found.layers, tuple(notes))


def _int8_for(bundle: Bundle, form: Graph, limits: Mapping[str, float], choice: Choice, weights: Weights,
              general: onnx.ModelProto, folder: Path, file: WeightsFile) -> tuple[Graph | None, Collection[str]]:
    """A back end's form of the graph in INT8, if that is faster there than the one for any; its depthwise layers."""
    proto, stopwatch = load_graph(bundle, form), Stopwatch(Options(backend=form.target, precision="int8"))

    def keep(layer: Layer) -> bool:
        return choice.stays_float(layer) or reads_stacked_planes(layer)

    stays_float, decided = choice.decide(proto, limits, stopwatch, keep)
    fast = weights.quantize(proto, limits, stays_float).proto
    if not stopwatch.compare(general, fast).is_faster:
        return None, ()
    graph = _save(fast, folder, "image", "int8", form.target, file)
    _require_same_anywhere(folder, graph, bundle.manifest)
    return graph, decided


def _save(proto: onnx.ModelProto, folder: Path, role: str, precision: str, target: str = ANY_TARGET,
          weights: WeightsFile | None = None) -> Graph:
    weights = weights or WeightsFile(folder / f"{role}.{precision}.weights")
    path = folder / ".".join([role, precision, *[target] * (target != ANY_TARGET), "onnx"])
    weights.save(proto, path)
    return describe_graph(role, path, precision, target, weights.name)


def _require_finite(folder: Path, graph: Graph, manifest: Manifest) -> None:
    """Run a new graph once."""
    if graph.role == "image":
        feeds, output = _random_feeds(graph, manifest), "image_embedding"
    else:
        feeds = {"input_ids": np.ones((1, 4), np.int64), "attention_mask": np.ones((1, 4), np.int64)}
        output = "text_embedding"
    path = folder / graph.file
    backend = (EmulatedBackend(onnx.load(path), Options()) if graph.target == GPU_TARGET else
               open_graph(path, Options()))
    (found,) = backend.run(feeds, [output])
    if not np.isfinite(found).all():
        raise CheckFailed(f"{graph.file}: gives NaN or infinite embeddings; nothing was written")


def _random_feeds(graph: Graph, manifest: Manifest) -> Mapping[str, np.ndarray]:
    spec = manifest.preprocessing
    volume = np.random.default_rng(0).uniform(*spec.value_range, (1, *spec.shape_dhw)).astype(np.float32)
    return image_feeds(graph.inputs, volume)


def _require_same_anywhere(folder: Path, graph: Graph, manifest: Manifest) -> None:
    """Compare the back end that a graph is for with ONNX Runtime, which computes every node by itself.

    Back ends may round sums of integers elsewhere, which moves few values by one step; what a step amounts to depends
    on the graph, so the bound is on the whole: noise 20 dB below the signal.
    """
    feeds = _random_feeds(graph, manifest)
    backends = (open_graph(folder / graph.file, Options(backend=name, precision="int8"))
                for name in ("onnxruntime", graph.target))
    expected, found = (backend.run(feeds, ["feature_map"])[0] for backend in backends)
    difference = signal_to_noise_db(energy(expected), energy(expected, found))
    if not difference >= _SMALLEST_AGREEMENT_DB:
        raise CheckFailed(f"{graph.file}: {graph.target} computes something else than onnxruntime ("
                          f"{difference:.1f} dB); nothing was written. Calibrate a bundle that was "
                          f"exported without --target {graph.target}")

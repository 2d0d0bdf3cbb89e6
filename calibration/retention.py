"""How well lower precisions keep the answers of float32: embeddings, codes, scores, and AUROC on labelled scans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..benchmarks.evaluation.metrics import Estimate, auroc_difference, classification
from ..benchmarks.evaluation.run import ReadScan, read_ahead, read_unless_known, recall_or_compute
from ..benchmarks.evaluation.state import State
from ..runtime.bundle import Bundle
from ..runtime.cli.output import Stages
from ..runtime.errors import BundleError, InputError
from ..runtime.machine import machine
from ..runtime.manifest import Preprocessing, TensorInfo
from ..runtime.model import Model
from ..runtime.volume import ReadOptions, read_feeds
from .calibrate import image_graph, load_graph
from .scans import Scan
from .sqnr import LayerNoise, layer_noise

REFERENCE = "fp32"
#: Scans whose activations are compared layer by layer.
NOISE_SCANS = 2


@dataclass(frozen=True)
class Kept:
    """One precision against float32 on the same scans.

    ``cosine_mean``, ``cosine_min``: of image embeddings. ``codes_equal``: share of VQ codes; None without a quantizer.
    ``score_mean``, ``score_max``: absolute differences of scores; None without prompts. ``auroc_delta``: by class,
    with 95 % intervals of the paired bootstrap; ``auroc_delta_mean`` over the classes, ``auroc_delta_worst`` the lowest
    of them; empty and None without labels. ``layers``: noise of activations, noisiest first.
    """

    backend: str
    cosine_mean: float
    cosine_min: float
    codes_equal: float | None
    score_mean: float | None
    score_max: float | None
    auroc_delta: dict[str, Estimate]
    auroc_delta_mean: Estimate | None
    layers: tuple[LayerNoise, ...]

    @property
    def auroc_delta_worst(self) -> float | None:
        """The largest loss of a class, below 0, or the smallest gain."""
        values = [estimate.value for estimate in self.auroc_delta.values() if estimate.value is not None]
        return min(values) if values else None


@dataclass(frozen=True)
class Retention:
    """All precisions; ``auroc``: float32's own mean over classes."""

    bundle: str
    manifest: str
    dataset: str
    scans: int
    machine: str
    failed: tuple[str, ...]
    auroc: float | None
    precisions: dict[str, Kept]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: by precision, and what was compared under ``about``."""
        about = {key: value for key, value in asdict(self).items() if key != "precisions"}
        rows = {}
        for name, kept in self.precisions.items():
            row = asdict(kept)
            mean = row.pop("auroc_delta_mean")
            rows[name] = {**row, "auroc_delta_mean": mean["value"] if mean else None,
                          "auroc_delta_mean_interval_95": [mean["low"], mean["high"]] if mean else None,
                          "auroc_delta_worst": kept.auroc_delta_worst}
        return {**rows, "about": about}


def read_all(inputs: Sequence[TensorInfo], spec: Preprocessing, scans: Sequence[Scan], threads: int,
               on_scan: Callable[[str], None] = lambda _: None) -> list[dict[str, NDArray[np.floating]]]:
    """What an image tower reads of each scan.

    Raises:
        InputError: a scan that cannot be read.
    """
    feeds = []
    for scan in scans:
        on_scan(scan.path.name)
        feeds.append(read_feeds(scan.path, inputs, spec, ReadOptions(**scan.options), threads))
    return feeds


def graph_noise(opened: Bundle, precision: str, scans: Sequence[Scan], threads: int) -> tuple[LayerNoise, ...]:
    """Noise by layer of a precision's graph for any back end, on some scans.

    Empty where there is no graph: a back end's own bfloat16 cannot be looked into.
    """
    graph = opened.manifest.graph("image", precision)
    if graph is None:
        return ()
    reference, proto = image_graph(opened)
    feeds = read_all(reference.inputs, opened.manifest.preprocessing, scans, threads)
    return layer_noise(proto, load_graph(opened, graph), feeds, threads)


@dataclass(frozen=True)
class _Outputs:
    embedding: NDArray[np.float32]
    codes: NDArray[np.float32]
    scores: NDArray[np.float32]


def compare(models: Mapping[str, Model], scans: Sequence[Scan], state: State, display: Stages,
            noise: Callable[[str, Sequence[Scan]], tuple[LayerNoise, ...]], about: Mapping[str, str]) -> Retention:
    """Run every model on every scan.

    Args:
        models: by precision; ``REFERENCE`` among them.
        noise: layers' noise of a precision, on some scans that can be read.
        about: ``bundle`` and ``dataset``, for the report.

    Raises:
        InputError: no scan could be read.
    """
    outputs: dict[str, list[_Outputs]] = {name: [] for name in models}
    done: list[Scan] = []
    failed: list[str] = []
    for scan, found in _run(models, scans, state, display):
        display.advance()
        if isinstance(found, InputError):
            failed.append(str(found))
            continue
        done.append(scan)
        for name, output in found.items():
            outputs[name].append(output)
    if not done:
        raise InputError(f"none of the {len(scans)} scans could be used; the first: {failed[0]}")
    display.stage("resampling")
    task = models[REFERENCE].manifest.zero_shot
    classes = task.classes if task is not None else ()
    truth = np.array([scan.labels for scan in done], bool) if done[0].labels else None
    reference = outputs[REFERENCE]
    auroc = None
    if truth is not None:
        auroc = classification(_scores(reference), truth, classes).mean_auroc.value
    kept = {name: _judge(outputs[name], reference, truth, classes, models[name].describe(),
                         noise(name, done[:NOISE_SCANS]))
            for name in models if name != REFERENCE}
    return Retention(about["bundle"], models[REFERENCE].manifest.digest, about["dataset"], len(done), machine(),
                     tuple(failed), auroc, kept)


def _judge(found: Sequence[_Outputs], reference: Sequence[_Outputs], truth: NDArray[np.bool_] | None,
           classes: Sequence[str], backend: str, layers: tuple[LayerNoise, ...]) -> Kept:
    cosines = [float(a.embedding @ b.embedding) for a, b in zip(found, reference, strict=True)]
    codes = [float((a.codes == b.codes).mean()) for a, b in zip(found, reference, strict=True) if b.codes.size]
    scores, expected = _scores(found), _scores(reference)
    difference = np.abs(scores - expected)
    mean, by_class = None, {}
    if truth is not None:
        mean, by_class = auroc_difference(scores, expected, truth, classes)
    return Kept(backend, float(np.mean(cosines)), min(cosines), float(np.mean(codes)) if codes else None,
                float(difference.mean()) if difference.size else None,
                float(difference.max()) if difference.size else None, by_class, mean, layers)


def _scores(outputs: Sequence[_Outputs]) -> NDArray[np.float64]:
    return np.stack([output.scores for output in outputs]).astype(np.float64)


def _run(models: Mapping[str, Model], scans: Sequence[Scan], state: State, display: Stages
         ) -> Iterator[tuple[Scan, dict[str, _Outputs] | InputError]]:
    """Each scan with its outputs by precision, or the reason why it could not be used; the next is read meanwhile."""
    reader = models[REFERENCE]

    def prepare(scan: Scan) -> ReadScan:
        return read_unless_known(scan.path, scan.options, state, [_key(name, scan) for name in models], reader)

    for scan, prepared in read_ahead(scans, prepare):
        display.stage(scan.path.name)
        try:
            read = prepared()
            yield scan, {name: _outputs(_key(name, scan), model, read, state) for name, model in models.items()}
        except BundleError:
            raise
        except InputError as error:
            yield scan, error


def _key(name: str, scan: Scan) -> str:
    return f"{name}/{scan.path}"


def _outputs(key: str, model: Model, scan: ReadScan, state: State) -> _Outputs:
    """From the state, or computed and put there: embedding, scores, codes in one row."""
    width = model.manifest.embedding_dim
    classes = len(model.manifest.zero_shot.classes) if model.manifest.zero_shot is not None else 0

    def compute(volume: NDArray[np.float32]) -> NDArray[np.float32]:
        names = [info.name for info in model.manifest.graphs[0].outputs if info.name in ("image_embedding", "codes")]
        found = model.image_outputs(volume[None], names)
        embedding = found["image_embedding"]
        scores = model.score_embeddings(embedding)[0] if classes else np.zeros(0, np.float32)
        # Codes are small integers, which float32 holds exactly.
        codes = found["codes"][0].astype(np.float32) if "codes" in found else np.zeros(0, np.float32)
        return np.concatenate([embedding[0], scores.astype(np.float32), codes])

    row = recall_or_compute(state, key, scan, compute)
    return _Outputs(row[:width], row[width + classes :], row[width : width + classes])

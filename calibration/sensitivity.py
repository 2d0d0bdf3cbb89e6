"""Which layers INT8 damages most, and the cheapest choice of layers that keeps a promise.

Each layer alone is quantized and everything behind it computed in float: what the features lose is that layer's damage.
Then all are quantized, and the layer with the most damage for each multiply-add goes back to float, one after the
other, until what was promised holds. Every step is measured, not added up, as damages do not add.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from ..runtime.backends.onnxruntime import import_onnxruntime, session_options
from ..runtime.errors import InputError
from ..runtime.model import Model
from .integers import Weights
from .layers import Layer, group_name, quantizable_layers
from .sqnr import energy, signal_to_noise_db

_NEAREST = Weights()


@dataclass(frozen=True)
class Damage:
    """One layer alone in INT8.

    ``share``: of the multiply-adds of all layers that may become INT8. ``cosine``: mean of embeddings with float32's.
    ``sqnr_db``: signal to noise of the feature map.
    """

    layer: str
    share: float
    cosine: float
    sqnr_db: float


@dataclass(frozen=True)
class Step:
    """A choice of layers.

    ``back``: the layer that went back to float, None first. ``share``: of multiply-adds in INT8. ``kept``: what was
    promised, as measured.
    """

    back: str | None
    share: float
    kept: float


@dataclass(frozen=True)
class Sensitivity:
    """``layers`` by damage, worst first; ``steps`` until the promise holds; ``floats``: layers that stay float."""

    promise: str
    scans: int
    layers: tuple[Damage, ...]
    steps: tuple[Step, ...]
    floats: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Outputs:
    """Of all scans: ``embeddings`` [n, 512], ``features`` [n, …]."""

    embeddings: NDArray[np.float32]
    features: NDArray[np.float32]


def analyse(proto: onnx.ModelProto, limits: Mapping[str, float], feeds: Sequence[Mapping[str, NDArray[np.floating]]],
            threads: int, promise: str, measure: Callable[[Outputs, Outputs], float], target: float,
            weights: Weights = _NEAREST, on_step: Callable[[str], None] = lambda _: None) -> Sensitivity:
    """Rank the layers and choose.

    Args:
        limits: thresholds by activation, as for ``quantize``.
        feeds: inputs by scan.
        promise: what ``measure`` is, for people.
        measure: how well outputs keep those of float32; more is better.
        target: the least that may be kept.
        weights: rounded weights; others are rounded to the nearest.
    """
    layers = [layer for layer in quantizable_layers(ir.from_proto(proto).graph) if not layer.depthwise]
    work: dict[str, float] = {}
    for layer in layers:
        work[group_name(layer)] = work.get(group_name(layer), 0.0) + _multiply_adds(layer)
    if not work:
        raise InputError("int8: this graph has no layer that INT8 could hold")
    total = sum(work.values())

    def run(groups: Collection[str]) -> Outputs:
        if not groups:
            return _run(proto, feeds, threads)
        chosen = weights.quantize(proto, limits, lambda layer: layer.depthwise or group_name(layer) not in groups)
        return _run(chosen.proto, feeds, threads)

    exact = run(())
    damages = []
    for name, count in work.items():
        on_step(name)
        found = run((name,))
        noise = signal_to_noise_db(energy(exact.features), energy(exact.features, found.features))
        damages.append(Damage(name, count / total, cosine_kept(found, exact), noise))
    damages.sort(key=lambda damage: damage.sqnr_db)
    order = sorted(damages, key=lambda d: 10 ** (-d.sqnr_db / 10) / d.share, reverse=True)
    chosen = set(work)
    steps = [Step(None, 1.0, measure(run(chosen), exact))]
    for damage in order:
        if steps[-1].kept >= target:
            break
        on_step(f"without {damage.layer}")
        chosen.discard(damage.layer)
        share = sum(work[name] for name in chosen) / total
        steps.append(Step(damage.layer, share, measure(run(chosen), exact)))
    return Sensitivity(promise, len(feeds), tuple(damages), tuple(steps), tuple(sorted(set(work) - chosen)))


def cosine_kept(found: Outputs, exact: Outputs) -> float:
    """Mean cosine of embeddings."""
    return float((found.embeddings * exact.embeddings).sum(axis=1).mean())


def auroc_kept(model: Model, labels: Sequence[tuple[bool, ...]], where: Path) -> Callable[[Outputs, Outputs], float]:
    """Mean AUROC over the classes less float32's.

    Raises:
        InputError: no labels, or no class that some scans have and others have not.
    """
    truth = np.array(labels, bool)
    defined = np.flatnonzero(truth.any(axis=0) & ~truth.all(axis=0)) if truth.size else np.zeros(0, int)
    if not defined.size:
        raise InputError(f"{where}: no labels, or none that differ among the scans chosen; pass --target-cosine, or "
                         "more --samples")

    def kept(found: Outputs, exact: Outputs) -> float:
        scores = [model.score_embeddings(outputs.embeddings) for outputs in (found, exact)]
        return float(np.mean([roc_auc_score(truth[:, c], scores[0][:, c]) - roc_auc_score(truth[:, c], scores[1][:, c])
                              for c in defined]))

    return kept


def _multiply_adds(layer: Layer) -> float:
    shape = layer.node.outputs[0].shape
    assert shape is not None
    places = math.prod(side for side in shape[1:] if isinstance(side, int))
    channels = layer.weight.shape[layer.axis]
    return places * layer.weight.size / channels


def _run(proto: onnx.ModelProto, feeds: Sequence[Mapping[str, NDArray[np.floating]]], threads: int) -> Outputs:
    session = import_onnxruntime().InferenceSession(proto.SerializeToString(), session_options(threads),
                                                    providers=["CPUExecutionProvider"])
    found = [session.run(["image_embedding", "feature_map"], dict(feed)) for feed in feeds]
    return Outputs(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

"""The metrics of the published tables, with bootstrap intervals.

Sources: the evaluation code of CT-CLIP and DCFormer (scores rounded at 0.5; F1 averaged over classes by support;
precision and recall over all cells; R@K over the validation set), and Efron's percentile bootstrap over scans. Point
estimates are scikit-learn's; intervals use the same definitions on resampled counts and ranks, vectorized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score, roc_auc_score

from ...runtime.search.exact import nearer

RESAMPLES = 1000
RECALL_AT = (1, 5, 10, 50, 100)
_PERCENTILES = (2.5, 97.5)

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; None where it is not defined (a finding that all or none of the scans have)."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Classification:
    """Scores against labels. ``auroc`` by class; ``mean_auroc`` over the classes where it is defined."""

    mean_auroc: Estimate
    auroc: dict[str, Estimate]
    f1: Estimate
    accuracy: Estimate
    precision: Estimate
    recall: Estimate


def classification(scores: Floats, labels: NDArray[np.bool_], classes: Sequence[str], seed: int = 0) -> Classification:
    """All metrics of scores ``[scans, classes]`` in [0, 1] against labels of the same shape."""
    draws = np.random.default_rng(seed).integers(0, len(scores), (RESAMPLES, len(scores)))
    points = [float(roc_auc_score(label, score)) if 0 < label.sum() < len(label) else None
              for score, label in zip(scores.T, labels.T, strict=True)]
    resampled = np.stack([_resampled_auroc(score, label, draws)
                          for score, label in zip(scores.T, labels.T, strict=True)])
    defined = [value for value in points if value is not None]
    kept = resampled[[value is not None for value in points]]
    predicted = np.rint(scores).astype(bool)
    averages = _resampled_averages(predicted, labels, draws)
    return Classification(
        mean_auroc=_estimate(float(np.mean(defined)) if defined else None, _mean_of_defined(kept)),
        auroc={name: _estimate(point, row) for name, point, row in zip(classes, points, resampled, strict=True)},
        f1=_estimate(_weighted_f1(labels, predicted), averages["f1"]),
        accuracy=_estimate(float(accuracy_score(labels.ravel(), predicted.ravel())), averages["accuracy"]),
        precision=_estimate(float(precision_score(labels.ravel(), predicted.ravel())), averages["precision"]),
        recall=_estimate(float(recall_score(labels.ravel(), predicted.ravel())), averages["recall"]),
    )


def auroc_difference(scores: Floats, reference: Floats, labels: NDArray[np.bool_], classes: Sequence[str],
                     seed: int = 0) -> tuple[Estimate, dict[str, Estimate]]:
    """AUROC of ``scores`` less that of ``reference``, both ``[scans, classes]``: mean over classes, and by class.

    Intervals are paired: both are taken on the same resampled scans, so what a draw does to both cancels.
    """
    draws = np.random.default_rng(seed).integers(0, len(scores), (RESAMPLES, len(scores)))
    points: list[float | None] = []
    resampled = []
    for a, b, label in zip(scores.T, reference.T, labels.T, strict=True):
        defined = 0 < label.sum() < len(label)
        points.append(float(roc_auc_score(label, a) - roc_auc_score(label, b)) if defined else None)
        resampled.append(_resampled_auroc(a, label, draws) - _resampled_auroc(b, label, draws))
    kept = [value for value in points if value is not None]
    rows = np.stack(resampled)[[value is not None for value in points]]
    mean = _estimate(float(np.mean(kept)) if kept else None, _mean_of_defined(rows))
    return mean, {name: _estimate(point, row) for name, point, row in zip(classes, points, resampled, strict=True)}


def retrieval(queries: Floats, gallery: Floats, seed: int = 0) -> dict[str, Estimate]:
    """R@K: share of queries ``[n, d]`` (unit rows) whose own item of the gallery ``[n, d]`` is among the K nearest.

    Items as near as that (equal reports: CT-RATE has several reconstructions with one) stand in no order, so a query
    counts by the share of their orders in which its own is among the K. The published code sorts by cosine and leaves
    ties as the files stand, which is one such order: without ties both are the same; with ties its value depends on the
    order of the files, and this is its mean over all of them.
    """
    before, equal = nearer(queries, gallery)
    draws = np.random.default_rng(seed).integers(0, len(queries), (RESAMPLES, len(queries)))
    hits = {k: np.clip((k - before) / equal, 0, 1) for k in RECALL_AT}
    return {f"R@{k}": _estimate(float(hit.mean()), hit[draws].mean(axis=1)) for k, hit in hits.items()}


def _weighted_f1(labels: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> float | None:
    """F1 of each class, averaged by the scans that have it; None where no scan has any.

    Class by class: scikit-learn takes a table of one column for two classes, present and absent, and averages those.
    """
    there = labels.sum(axis=0)
    if not there.any():
        return None
    each = [f1_score(label, found) for label, found in zip(labels.T, predicted.T, strict=True)]
    return float(np.average(each, weights=there))


def _estimate(value: float | None, resampled: Floats) -> Estimate:
    finite = resampled[np.isfinite(resampled)]
    if value is None or not finite.size:
        return Estimate(value, None, None)
    low, high = np.percentile(finite, _PERCENTILES)
    return Estimate(value, float(low), float(high))


def _resampled_auroc(scores: Floats, labels: NDArray[np.bool_], draws: NDArray[np.integer]) -> Floats:
    """AUROC of each draw by the rank sum (Mann and Whitney); NaN where a draw has one class only."""
    positive = labels[draws]
    count = positive.sum(axis=1).astype(np.float64)
    rank_sum = (rankdata(scores[draws], axis=1) * positive).sum(axis=1)
    pairs = count * (draws.shape[1] - count)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, (rank_sum - count * (count + 1) / 2) / pairs, np.nan)


def _mean_of_defined(rows: Floats) -> Floats:
    """Mean over classes of each draw, leaving out those not defined in it."""
    defined = np.isfinite(rows)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(defined, rows, 0).sum(axis=0) / defined.sum(axis=0)


def _resampled_averages(predicted: NDArray[np.bool_], labels: NDArray[np.bool_], draws: NDArray[np.integer]
                        ) -> dict[str, Floats]:
    """Weighted F1, accuracy, micro precision and recall of each draw, from counts."""
    times = np.zeros(draws.shape, np.float64)  # how often each scan was drawn
    np.add.at(times, (np.arange(len(draws))[:, None], draws), 1)
    hit, found, there = (times @ cells for cells in (predicted & labels, predicted, labels))
    right = times @ (predicted == labels)
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.where(found + there > 0, 2 * hit / (found + there), 0)
        return {
            "f1": (f1 * there).sum(axis=1) / there.sum(axis=1),
            "accuracy": right.sum(axis=1) / predicted.size,
            "precision": np.where(found.sum(axis=1) > 0, hit.sum(axis=1) / found.sum(axis=1), 0),
            "recall": np.where(there.sum(axis=1) > 0, hit.sum(axis=1) / there.sum(axis=1), 0),
        }

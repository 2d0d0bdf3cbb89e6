"""Metrics against scikit-learn, against definitions written out, and against what they must do."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score

from dcformer_deploy.benchmarks.evaluation import metrics
from dcformer_deploy.benchmarks.evaluation.metrics import classification, retrieval


def _case(scans: int = 80, classes: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.random((scans, classes)) < np.linspace(0.1, 0.6, classes)
    scores = np.clip(rng.normal(0.4, 0.2, labels.shape) + 0.2 * labels, 0, 1)
    return np.round(scores, 2), labels  # rounded, so that there are ties


def test_resampled_values_are_those_of_sklearn():
    """The vectorized forms behind the intervals, on one draw each, against the library."""
    scores, labels = _case()
    draws = np.random.default_rng(5).integers(0, len(scores), (20, len(scores)))
    averages = metrics._resampled_averages(np.rint(scores).astype(bool), labels, draws)
    for index, draw in enumerate(draws):
        some, truth = scores[draw], labels[draw]
        predicted = np.rint(some).astype(bool)
        for c in range(labels.shape[1]):
            found = metrics._resampled_auroc(scores[:, c], labels[:, c], draws[index : index + 1])[0]
            assert found == pytest.approx(roc_auc_score(truth[:, c], some[:, c]), abs=1e-12)
        assert averages["f1"][index] == pytest.approx(f1_score(truth, predicted, average="weighted"), abs=1e-12)
        assert averages["precision"][index] == pytest.approx(precision_score(truth, predicted, average="micro"))
        assert averages["recall"][index] == pytest.approx(recall_score(truth, predicted, average="micro"))
        assert averages["accuracy"][index] == pytest.approx((predicted == truth).mean())


def test_values_by_hand():
    scores = np.array([[0.9, 0.2], [0.4, 0.7], [0.6, 0.1], [0.1, 0.5]])
    labels = np.array([[1, 0], [1, 1], [0, 0], [0, 1]], bool)
    found = classification(scores, labels, ["a", "b"])
    assert found.auroc["a"].value == pytest.approx(3 / 4)
    assert found.auroc["b"].value == pytest.approx(1)
    assert found.mean_auroc.value == pytest.approx(7 / 8)
    # rounded at 0.5 (numpy rounds 0.5 to 0): a = 1,0,1,0; b = 0,1,0,0
    assert found.accuracy.value == pytest.approx(5 / 8)
    assert found.precision.value == pytest.approx(2 / 3)
    assert found.recall.value == pytest.approx(2 / 4)
    assert found.f1.value == pytest.approx((2 * (2 / 4) + 2 * (2 / 3)) / 4)


def test_interval_holds_the_value_and_narrows_with_scans():
    widths = []
    for scans in (60, 600):
        found = classification(*_case(scans), list("abcde"))
        for estimate in (found.mean_auroc, *found.auroc.values(), found.f1, found.accuracy):
            assert estimate.low <= estimate.value <= estimate.high
        widths.append(found.mean_auroc.high - found.mean_auroc.low)
    assert widths[1] < 0.5 * widths[0]


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth = 0.7602  # area of N(1, 1) against N(0, 1): Phi(1 / sqrt 2)
    covered = 0
    for seed in range(60):
        labels = (rng.random((150, 1)) < 0.4)
        scores = 1 / (1 + np.exp(-(rng.normal(size=labels.shape) + labels)))
        estimate = classification(scores, labels, ["a"], seed).mean_auroc
        covered += estimate.low <= truth <= estimate.high
    assert 51 <= covered <= 60


def test_finding_that_nobody_has_is_not_defined():
    scores, labels = _case()
    labels[:, 2] = False
    found = classification(scores, labels, list("abcde"))
    assert (found.auroc["c"].value, found.auroc["c"].low) == (None, None)
    others = [found.auroc[name].value for name in "abde"]
    assert found.mean_auroc.value == pytest.approx(np.mean(others))


def test_retrieval():
    rng = np.random.default_rng(0)
    gallery = rng.normal(size=(40, 8))
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    assert {name: e.value for name, e in retrieval(gallery, gallery).items()}["R@1"] == 1
    queries = gallery + 0.8 * rng.normal(size=gallery.shape)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    order = np.argsort(-(queries @ gallery.T), axis=1)
    for k, name in ((1, "R@1"), (5, "R@5"), (10, "R@10")):
        expected = np.mean([i in order[i, :k] for i in range(40)])
        assert retrieval(queries, gallery)[name].value == pytest.approx(expected)
    assert retrieval(queries, gallery)["R@50"].value == 1


@pytest.mark.parametrize("copies", [1, 2, 3, 5])
def test_equal_reports_do_not_bias_recall(copies: int):
    """Perfect embeddings of scans with the same report: by chance, one in so many is the first."""
    rows = np.repeat(np.eye(40), copies, axis=0)
    for found in (retrieval(rows, rows), retrieval(rows[::-1], rows[::-1])):
        for k in (1, 5, 10):
            estimate = found[f"R@{k}"]
            assert estimate.value == pytest.approx(min(1, k / copies))
            assert estimate.low == pytest.approx(estimate.high) == pytest.approx(min(1, k / copies))


def test_recall_is_the_mean_over_orders_of_equal_reports():
    """Against the published way, which sorts and leaves ties as the files stand, over many orders of the files."""
    rng = np.random.default_rng(0)
    reports = _unit(rng.normal(size=(12, 6)))[rng.integers(0, 12, 40)]
    images = _unit(reports + 0.4 * rng.normal(size=reports.shape))
    found = retrieval(images, reports)
    orders = [rng.permutation(40) for _ in range(3000)]
    similarity = np.round(images @ reports.T, 9)
    for k in (1, 5, 10):
        hits = []
        for order in orders:
            nearest = order[np.argsort(-similarity[:, order], axis=1, kind="stable")[:, :k]]
            hits.append((nearest == np.arange(40)[:, None]).any(axis=1).mean())
        assert found[f"R@{k}"].value == pytest.approx(np.mean(hits), abs=0.005)
        assert found[f"R@{k}"].low <= found[f"R@{k}"].value <= found[f"R@{k}"].high


def test_all_reports_equal():
    queries = np.eye(10)
    gallery = np.tile(np.full(10, 10**-0.5), (10, 1))
    found = retrieval(queries, gallery)
    assert [found[f"R@{k}"].value for k in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1])


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_one_class_is_judged_by_its_presence():
    """Not by the mean over presence and absence, of which the second is most of the cells."""
    scores, labels = _case(scans=200, classes=1)
    predicted = np.rint(scores[:, 0]).astype(bool)
    found = classification(scores, labels, ["a"])
    for estimate, expected in ((found.f1, f1_score(labels[:, 0], predicted)),
                               (found.precision, precision_score(labels[:, 0], predicted)),
                               (found.recall, recall_score(labels[:, 0], predicted))):
        assert estimate.value == pytest.approx(expected)
        assert estimate.low < estimate.value < estimate.high
    assert found.f1.value < found.accuracy.value - 0.2


@pytest.mark.parametrize("classes", [2, 5])
def test_averages_are_those_of_sklearn(classes: int):
    scores, labels = _case(classes=classes)
    predicted = np.rint(scores).astype(bool)
    found = classification(scores, labels, list("abcde")[:classes])
    assert found.f1.value == pytest.approx(f1_score(labels, predicted, average="weighted"))
    assert found.precision.value == pytest.approx(precision_score(labels, predicted, average="micro"))
    assert found.recall.value == pytest.approx(recall_score(labels, predicted, average="micro"))


@pytest.mark.parametrize("classes", [1, 3])
def test_findings_that_nobody_has(classes: int):
    """F1, which weighs classes by the scans that have them, is not defined."""
    found = classification(np.full((20, classes), 0.7), np.zeros((20, classes), bool), list("abc")[:classes])
    assert (found.f1.value, found.f1.low, found.f1.high) == (None, None, None)
    assert (found.precision.value, found.precision.low, found.precision.high) == (0, 0, 0)

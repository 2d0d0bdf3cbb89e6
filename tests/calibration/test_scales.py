"""Each method against an independent computation on the values themselves."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from onnxruntime.quantization.calibrate import HistogramCollector
from scipy.stats import entropy

from dcformer_deploy.calibration.histogram import BINS, Histogram
from dcformer_deploy.calibration.scales import LEVELS, METHODS, PERCENTILE, _divergence, threshold
from dcformer_deploy.runtime.errors import InputError

RANDOM = np.random.default_rng(1)
VALUES = {
    "normal": RANDOM.normal(0, 1, 200_000),
    "long tail": RANDOM.standard_t(3, 200_000),
    "after GELU": np.maximum(RANDOM.normal(0, 1, 200_000), -0.17),
}


def seen(values: np.ndarray) -> Histogram:
    histogram = Histogram()
    histogram.update(values.astype(np.float32))
    return histogram


@pytest.fixture(params=VALUES)
def values(request: pytest.FixtureRequest) -> np.ndarray:
    return VALUES[request.param].astype(np.float32)


def test_minmax(values: np.ndarray):
    assert threshold(seen(values), "minmax") == np.abs(values).max()


def test_percentile(values: np.ndarray):
    bin_width = float(np.abs(values).max()) / BINS
    assert threshold(seen(values), "percentile") == pytest.approx(np.percentile(np.abs(values), PERCENTILE),
                                                                  abs=2 * bin_width)


def test_mse_is_least_over_a_fine_grid(values: np.ndarray):
    """torch rounds to INT8 itself."""
    tensor = torch.from_numpy(values[:20_000])

    def error(limit: float) -> float:
        rounded = torch.fake_quantize_per_tensor_affine(tensor, limit / LEVELS, 0, -LEVELS, LEVELS)
        return float(((rounded - tensor) ** 2).mean())

    found = threshold(seen(values[:20_000]), "mse")
    best = min(error(limit) for limit in np.linspace(0.05, 1, 100) * float(tensor.abs().max()))
    assert error(found) <= 1.02 * best


def test_entropy_is_least_by_the_definition(values: np.ndarray):
    """The divergences of all cuts, bin by bin as the slides have it."""
    histogram = seen(values)
    counts = histogram.counts.tolist()
    divergences = {}
    for cut in range(LEVELS + 1, BINS + 1, 64):
        p = [*counts[: cut - 1], sum(counts[cut - 1 :])]
        q = [0.0] * cut
        edges = [level * cut // (LEVELS + 1) for level in range(LEVELS + 2)]
        for start, end in pairwise(edges):
            filled = [index for index in range(start, end) if p[index] > 0]
            for index in filled:
                q[index] = sum(counts[start:end]) / len(filled)
        if all(b > 0 for a, b in zip(p, q, strict=True) if a > 0):
            divergences[cut] = entropy([a / sum(p) for a in p], [b / sum(q) for b in q])
    for cut, expected in divergences.items():
        assert _divergence(histogram.counts[:cut].astype(float), float(sum(counts[cut:]))) == pytest.approx(expected)
    found = round(threshold(histogram, "entropy") / histogram.top * BINS)
    least = _divergence(histogram.counts[:found].astype(float), float(sum(counts[found:])))
    assert least <= min(divergences.values()) * (1 + 1e-9)


@pytest.mark.parametrize("name", ["normal", "after GELU"])
def test_entropy_is_near_that_of_onnx_runtime(name: str):
    """Which works on both signs, merges bins a little differently, and smooths."""
    values = VALUES[name].astype(np.float32)
    magnitudes = np.abs(values)
    collector = HistogramCollector("entropy", True, 2 * BINS, 256, 99.99, "same")
    top = float(magnitudes.max())
    histogram = np.histogram(np.concatenate([magnitudes, -magnitudes]), 2 * BINS + 1, (-top, top))
    _, expected = collector.get_entropy_threshold((*histogram, -top, top), 255)[:2]
    assert threshold(seen(values), "entropy") == pytest.approx(float(expected), rel=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_thresholds_lie_within_what_was_seen(method: str, values: np.ndarray):
    assert 0 < threshold(seen(values), method) <= np.abs(values).max()
    assert threshold(seen(np.zeros(5)), method) == 0
    assert threshold(seen(np.full(5, -0.25)), method) == 0.25


def test_refusals():
    with pytest.raises(InputError, match="method 'entrophy': unknown; did you mean 'entropy'"):
        threshold(seen(np.ones(3)), "entrophy")
    with pytest.raises(InputError, match="no values"):
        threshold(Histogram(), "mse")
    with pytest.raises(InputError, match="NaN or infinite"):
        threshold(seen(np.array([1.0, np.nan])), "mse")

"""Histograms that grow with what they see, against numpy's over all values at once."""

import numpy as np
import pytest

from dcformer_deploy.calibration.histogram import BINS, MOST_VALUES, Histogram


def test_values_in_any_order_of_size_are_counted_as_if_at_once():
    random = np.random.default_rng(0)
    parts = [random.normal(0, spread, 5000).astype(np.float32) for spread in (0.1, 3.0, 0.5, 40.0)]
    histogram = Histogram()
    for part in parts:
        histogram.update(part)
    everything = np.concatenate(parts)
    assert (histogram.low, histogram.high) == (everything.min(), everything.max())
    assert histogram.largest == np.abs(everything).max()
    expected, _ = np.histogram(np.abs(everything), BINS, (0, histogram.top))
    assert histogram.counts.sum() == everything.size
    # A value on the edge of a bin may fall to either side when its bin is computed before and after doubling.
    assert np.abs(histogram.counts - expected).sum() <= 4


def test_memory_does_not_depend_on_the_number_of_values():
    histogram = Histogram()
    for _ in range(3):
        histogram.update(np.linspace(-1, 1, 3 * MOST_VALUES, dtype=np.float32))
    assert histogram.counts.shape == (BINS,)
    assert histogram.counts.sum() == 3 * MOST_VALUES
    assert (histogram.low, histogram.high) == (-1, 1)


def test_extremes_alone():
    histogram = Histogram()
    histogram.update(np.array([-3.0, 2.0]), with_counts=False)
    assert histogram.largest == 3
    assert not histogram.counts.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_remembered(value: float):
    histogram = Histogram()
    histogram.update(np.array([1.0, value]))
    histogram.update(np.array([2.0]))
    assert not histogram.finite


def test_constant_zero():
    histogram = Histogram()
    histogram.update(np.zeros(10))
    assert (histogram.largest, histogram.counts.sum(), histogram.finite) == (0, 0, True)

"""From the distribution of an activation to the magnitude that INT8 can still hold: four methods.

All are symmetric: a threshold T, scale T / 127, values beyond T saturate.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import InputError, suggestion
from .histogram import BINS, Histogram

#: Largest magnitude of symmetric INT8.
LEVELS = 127
#: Share of all values that the method "percentile" keeps.
PERCENTILE = 99.99
_CANDIDATES = 256


def threshold(histogram: Histogram, method: str) -> float:
    """The magnitude T that becomes 127; 0 for an activation that is always 0.

    Raises:
        InputError: no such method, or a histogram with NaN, or without values.
    """
    require_method(method)
    if not histogram.finite:
        raise InputError("NaN or infinite values")
    if histogram.high < histogram.low:
        raise InputError("no values")
    if histogram.largest == 0:
        return 0.0
    return min(METHODS[method](histogram), histogram.largest)


def require_method(method: str) -> None:
    """Raise InputError for a name that is no method's."""
    if method not in METHODS:
        raise InputError(f"method {method!r}: unknown{suggestion(method, METHODS)}; expected one of "
                         f"{', '.join(METHODS)}")


def _minmax(histogram: Histogram) -> float:
    return histogram.largest


def _percentile(histogram: Histogram) -> float:
    """The upper edge of the bin where the share is reached."""
    share = np.cumsum(histogram.counts) / histogram.counts.sum()
    return float(np.searchsorted(share, PERCENTILE / 100) + 1) * histogram.top / BINS


def _entropy(histogram: Histogram) -> float:
    """Least Kullback-Leibler divergence of the quantized from the clipped distribution.

    Source: S. Migacz, "8-bit inference with TensorRT", GTC 2017, pages 38 to 42: for every number of bins i from 128
    on, P is the histogram up to i with all that is beyond added to its last bin; Q is that up to i, without it, in 128
    levels, spread evenly over the bins of each level that are not empty in P.
    """
    counts = histogram.counts.astype(np.float64)
    beyond = counts[::-1].cumsum()[::-1]
    divergences = [_divergence(counts[:i], beyond[i] if i < BINS else 0.0) for i in range(LEVELS + 1, BINS + 1)]
    return float(int(np.argmin(divergences)) + LEVELS + 1) * histogram.top / BINS


def _divergence(inside: NDArray[np.float64], outside: float) -> float:
    """KL(P || Q) of the docstring of ``_entropy``."""
    expected = inside.copy()
    expected[-1] += outside
    starts = np.arange(LEVELS + 1) * len(inside) // (LEVELS + 1)
    filled = expected > 0
    sums, widths = np.add.reduceat(inside, starts), np.add.reduceat(filled.astype(np.float64), starts)
    level = np.searchsorted(starts, np.arange(len(inside)), side="right") - 1
    found = np.where(filled, sums[level] / np.maximum(widths[level], 1), 0.0)
    if found.sum() == 0:
        return np.inf
    p, q = expected[filled] / expected.sum(), found[filled] / found.sum()
    # A level that holds outliers alone: Q has nothing there, and the divergence is infinite.
    return float(np.sum(p * np.log(p / q))) if (q > 0).all() else np.inf


def _mse(histogram: Histogram) -> float:
    """Least mean squared error of rounding and saturating, taking each bin's values at its middle."""
    middles = (np.arange(BINS) + 0.5) * histogram.top / BINS
    candidates = np.linspace(0, histogram.top, _CANDIDATES + 1)[1:, None]
    rounded = np.minimum(np.rint(middles * LEVELS / candidates), LEVELS) * candidates / LEVELS
    errors = ((rounded - middles) ** 2 * histogram.counts).sum(axis=1)
    return float(candidates[int(np.argmin(errors)), 0])


METHODS: dict[str, Callable[[Histogram], float]] = {
    "minmax": _minmax, "percentile": _percentile, "entropy": _entropy, "mse": _mse,
}

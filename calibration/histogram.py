"""The distribution of one activation over any number of volumes, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

#: Resolution of the histogram of magnitudes; TensorRT's entropy calibration uses 2048, too.
BINS = 2048
#: Values of one tensor of one volume that enter the histogram, evenly strided; extremes are those of all values.
MOST_VALUES = 1 << 21


@dataclass
class Histogram:
    """Extremes and magnitudes of a tensor.

    ``counts`` int64 [BINS]: of |x| in equal bins from 0 to ``top``. ``low``, ``high``: extremes. ``finite``: whether
    every value was.
    """

    low: float = np.inf
    high: float = -np.inf
    top: float = 0.0
    finite: bool = True
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))

    @property
    def largest(self) -> float:
        """The largest magnitude seen."""
        return max(abs(self.low), abs(self.high)) if self.high >= self.low else 0.0

    def update(self, values: NDArray[np.floating], with_counts: bool = True) -> None:
        """Add a tensor's values."""
        low, high = float(values.min()), float(values.max())  # NaN anywhere makes both NaN
        if not np.isfinite([low, high]).all():
            self.finite = False
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        if not with_counts:
            return
        self._grow(max(abs(low), abs(high)))
        if self.top > 0:
            flat = values.reshape(-1)[:: max(1, -(-values.size // MOST_VALUES))]
            bins = (np.abs(flat) * np.float64(BINS / self.top)).astype(np.int64)
            self.counts += np.bincount(np.minimum(bins, BINS - 1), minlength=BINS)

    def _grow(self, magnitude: float) -> None:
        """Make room for a magnitude by doubling ``top``, which joins bins in pairs and loses nothing else."""
        if self.top == 0:
            self.top = magnitude
        while self.top < magnitude:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, np.int64)])
            self.top *= 2

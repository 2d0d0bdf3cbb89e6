"""The scan as it travels from the reader to preprocessing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class LinearMap:
    """``value -> slope * value + intercept``."""

    slope: float = 1.0
    intercept: float = 0.0

    @property
    def is_identity(self) -> bool:
        """True where applying the map changes nothing."""
        return self.slope == 1.0 and self.intercept == 0.0


@dataclass(frozen=True)
class Volume:
    """One scan, its voxels still as stored.

    ``stored``: ``[H, W, D]``, integer or float; H, W and D indices grow in the directions of ``orientation``.
    ``scaling``: maps in the order in which they turn stored values into Hounsfield units: the file's own, then the
    rescale slope and intercept. They are applied piecewise, so that no full-size float copy is ever made.
    ``spacing_hwd_mm``: distance between voxel centres along H, W, D. ``name``: for messages.
    ``orientation``: for example "LPS"; what the manifest asks for, unless the caller said "as-stored".
    """

    name: str
    stored: NDArray[Any]
    scaling: tuple[LinearMap, ...]
    spacing_hwd_mm: Spacing
    orientation: str

    def hounsfield(self, stored: NDArray[Any]) -> NDArray[np.float64]:
        """HU of a piece of ``stored``, in float64 and in the original's order of operations."""
        values = stored.astype(np.float64)
        for step in self.scaling:
            if not step.is_identity:
                values *= step.slope
                values += step.intercept
        return values

"""Is this a CT in Hounsfield units? The commonest mistake with CT-RATE is rescaling twice, or not at all."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DcformerWarning, InputError
from .types import Volume

#: Every chest CT holds air (-1000 HU); values that never fall below this have not been rescaled.
HIGHEST_MINIMUM_HU = -200.0
#: Nothing in a body is this much lighter than air: a share of such voxels means that the intercept was added twice.
LIGHTER_THAN_AIR_HU = -1300.0
LARGEST_SHARE_LIGHTER_THAN_AIR = 0.05
#: Beyond the extended CT scale (metal reaches 30,000 HU).
HIGHEST_HU = 70_000.0
_SLICES_AT_ONCE = 16


class HounsfieldWarning(DcformerWarning):
    """The voxels do not look like Hounsfield units, but the caller gave slope and intercept."""


@dataclass(frozen=True)
class _Range:
    """``lowest_hu`` and ``highest_hu`` leave out padding: the smallest value where that is lighter than air."""

    minimum_hu: float
    lowest_hu: float
    highest_hu: float
    share_lighter_than_air: float


def check_hounsfield(path: Path, volume: Volume, explicit: bool) -> None:
    """Refuse voxels that are not finite or cannot be Hounsfield units; a constant volume passes.

    Args:
        explicit: the caller gave slope and intercept, so a doubt is a warning and no refusal.

    Raises:
        InputError: NaN, infinity, or values outside anything a CT of a chest can hold.
    """
    found = _hounsfield_range(path, volume)
    if found.minimum_hu == found.highest_hu:
        return
    if found.share_lighter_than_air > LARGEST_SHARE_LIGHTER_THAN_AIR:
        problem = (f"{found.share_lighter_than_air:.0%} of the voxels are below {LIGHTER_THAN_AIR_HU:g} HU, lighter "
                   "than air: slope and intercept were probably applied twice")
    elif found.highest_hu > HIGHEST_HU:
        problem = f"the highest value is {found.highest_hu:g} HU, more than a CT can hold"
    elif found.lowest_hu > HIGHEST_MINIMUM_HU:
        problem = (f"the values go from {found.lowest_hu:g} to {found.highest_hu:g} and a chest CT holds air near "
                   "-1000 HU: the rescale slope and intercept were probably not applied")
    else:
        return
    if explicit:
        warnings.warn(f"{path}: {problem}; used all the same, as slope and intercept were given", HounsfieldWarning,
                      stacklevel=4)
        return
    raise InputError(f"{path}: not Hounsfield units: {problem}. Pass --slope and --intercept "
                     "(1 and 0 if the file is right as it is)")


def _hounsfield_range(path: Path, volume: Volume) -> _Range:
    """One pass over the stored values; HU are computed only for the few numbers that matter."""
    stored = volume.stored
    slope, intercept = 1.0, 0.0
    for step in volume.scaling:
        slope, intercept = slope * step.slope, intercept * step.slope + step.intercept
    # The axis that varies slowest in memory, so that each piece is contiguous.
    slow = int(np.argmax(np.abs(stored.strides)))
    pieces = np.array_split(np.moveaxis(stored, slow, 0), max(1, stored.shape[slow] // _SLICES_AT_ONCE))
    if stored.dtype.kind == "f":
        bad = sum(int(piece.size - np.count_nonzero(np.isfinite(piece))) for piece in pieces)
        if bad:
            raise InputError(f"{path}: {bad:,} voxels are NaN or infinite; repair the file before embedding it")
    low, high = min(piece.min() for piece in pieces), max(piece.max() for piece in pieces)
    ends = sorted((float(low) * slope + intercept, float(high) * slope + intercept))
    if not np.isfinite(ends).all():
        raise InputError(f"{path}: scaling overflows: {low:g}..{high:g} becomes {ends[0]:g}..{ends[1]:g} HU")
    if ends[0] >= LIGHTER_THAN_AIR_HU:
        return _Range(ends[0], ends[0], ends[1], 0.0)
    padding = low if slope > 0 else high
    threshold = (LIGHTER_THAN_AIR_HU - intercept) / slope
    light, lowest = 0, ends[1]
    for piece in pieces:
        rest = piece[piece != padding]
        if rest.size:
            light += int(np.count_nonzero(rest < threshold if slope > 0 else rest > threshold))
            extreme = float(rest.min() if slope > 0 else rest.max())
            lowest = min(lowest, extreme * slope + intercept)
    return _Range(ends[0], lowest, ends[1], light / stored.size)

"""Is this a CT in Hounsfield units? The commonest mistake with CT-RATE is rescaling twice, or not at all.

A negative slope is no mistake in itself: what counts are the values that it makes.

The test looks at shares of voxels, not at extremes: padding of any value, resampling that rings at its border, metal
and single stray voxels occur in scans that are right.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DcformerWarning, InputError
from ..scan_files import ScanPath
from .types import Volume

#: Air around the patient and lung. Every chest CT holds it; without the rescale intercept it lies near 0 or above.
AIR_AND_LUNG_HU = (-1300.0, -200.0)
SMALLEST_AIR_SHARE = 0.01
#: Soft tissue, fluid, fat's neighbours and most bone. With the intercept added twice next to nothing is left here, as
#: only dense bone reaches it, and air falls far below anything lighter than itself.
SOFT_TISSUE_HU = (-200.0, 400.0)
SMALLEST_SOFT_SHARE = 0.01
LARGEST_SHARE_BELOW_AIR = 0.05
#: Voxels lighter than air are padding if nearly all of them have one of very few values, give or take resampling.
PADDING_BIN_HU, PADDING_BINS, SMALLEST_PADDING_SHARE = 50.0, 3, 0.8
#: Denser than nearly all bone. Where more lies here than in air and lung, what is air seems to be dense. Cortical bone,
#: metal with its streaks and contrast agents, in a field of view that they fill, take less than this share of it.
DENSE_HU = 700.0
SMALLEST_INVERTED_SHARE, DENSE_TO_AIR = 0.15, 2.0
#: Beyond the extended CT scale (metal reaches 30,000 HU).
HIGHEST_HU = 70_000.0
#: Shares are counted on about so many slices; the range and the search for NaN cover all.
_SLICES_COUNTED = 64
_SLICES_AT_ONCE = 16


class HounsfieldWarning(DcformerWarning):
    """The voxels do not look like Hounsfield units, but the caller gave slope and intercept."""


@dataclass(frozen=True)
class _Values:
    """Range in HU over all voxels, and shares of those counted; ``padding_share`` of those lighter than air."""

    lowest_hu: float
    highest_hu: float
    air_share: float
    soft_share: float
    dense_share: float
    below_air_share: float
    padding_share: float


def check_voxels(path: ScanPath, volume: Volume, needs_hounsfield: bool, explicit: bool) -> str | None:
    """Refuse voxels that are not finite or cannot be Hounsfield units; a constant volume passes, with a warning.

    Args:
        needs_hounsfield: false to refuse only those that are not finite.
        explicit: the caller gave slope and intercept, so a doubt is a warning and no refusal.

    Returns:
        The doubt; None without one.

    Raises:
        InputError: NaN, infinity, or values that no CT of a chest has.
    """
    found = _measure(path, volume)
    if found.lowest_hu == found.highest_hu:
        doubt = f"all voxels are {found.lowest_hu:g}: nothing is to be seen in it"
        warnings.warn(f"{path}: {doubt}", DcformerWarning, stacklevel=4)
        return doubt
    if not needs_hounsfield:
        return None
    span = f"the values go from {found.lowest_hu:g} to {found.highest_hu:g}"
    if found.highest_hu > HIGHEST_HU:
        problem = f"{span}, more than a CT can hold"
    elif found.below_air_share > LARGEST_SHARE_BELOW_AIR and found.soft_share < SMALLEST_SOFT_SHARE:
        problem = (f"{span}, {found.below_air_share:.0%} of them lighter than air and hardly any in the range of soft "
                   "tissue: slope and intercept were probably applied twice")
    elif found.below_air_share > LARGEST_SHARE_BELOW_AIR and found.padding_share < SMALLEST_PADDING_SHARE:
        problem = (f"{span}, {found.below_air_share:.0%} of them lighter than air and too varied to be padding: slope "
                   "and intercept are wrong, or were applied twice")
    elif found.air_share < SMALLEST_AIR_SHARE:
        problem = (f"{span} and hardly any lies in the range of air and lung, which every chest CT shows: the rescale "
                   "slope and intercept were probably not applied")
    elif found.dense_share > max(SMALLEST_INVERTED_SHARE, DENSE_TO_AIR * found.air_share):
        problem = (f"{span}, {found.dense_share:.0%} of them denser than bone and {found.air_share:.0%} in the range "
                   "of air and lung: air lies on the wrong side, so the slope has the wrong sign, or slope and "
                   "intercept were not applied")
    else:
        return None
    if explicit:
        doubt = f"{problem}; used all the same, as slope and intercept were given"
        warnings.warn(f"{path}: {doubt}", HounsfieldWarning, stacklevel=4)
        return doubt
    raise InputError(f"{path}: not Hounsfield units: {problem}. Pass --slope and --intercept "
                     "(1 and 0 if the file is right as it is)")


def _measure(path: ScanPath, volume: Volume) -> _Values:
    stored = volume.stored
    slope, intercept = 1.0, 0.0
    for step in volume.scaling:
        slope, intercept = slope * step.slope, intercept * step.slope + step.intercept
    # The axis that varies slowest in memory, so that each piece is contiguous.
    by_slice = np.moveaxis(stored, int(np.argmax(np.abs(stored.strides))), 0)
    pieces = [by_slice[start : start + _SLICES_AT_ONCE] for start in range(0, len(by_slice), _SLICES_AT_ONCE)]
    if stored.dtype.kind == "f":
        bad = sum(int(piece.size - np.count_nonzero(np.isfinite(piece))) for piece in pieces)
        if bad:
            raise InputError(f"{path}: {bad:,} voxels are NaN or infinite; repair the file before embedding it")
    low, high = float(min(piece.min() for piece in pieces)), float(max(piece.max() for piece in pieces))
    lowest, highest = sorted((low * slope + intercept, high * slope + intercept))
    if not np.isfinite([lowest, highest]).all():
        raise InputError(f"{path}: scaling overflows: {low:g}..{high:g} becomes {lowest:g}..{highest:g} HU")
    counted = by_slice[:: max(1, len(by_slice) // _SLICES_COUNTED)]

    def between(low_hu: float, high_hu: float) -> NDArray[np.bool_]:
        # The few limits are taken to stored values, not the many voxels to HU.
        low, high = sorted(((low_hu - intercept) / slope, (high_hu - intercept) / slope))
        return (counted >= low) & (counted <= high)

    def share(low_hu: float, high_hu: float) -> float:
        return int(np.count_nonzero(between(low_hu, high_hu))) / counted.size

    below_air = share(-np.inf, AIR_AND_LUNG_HU[0])
    padding = 1.0
    if below_air > LARGEST_SHARE_BELOW_AIR:
        padding = _share_of_fullest_bins(slope * counted[between(-np.inf, AIR_AND_LUNG_HU[0])].astype(np.float32))
    return _Values(lowest, highest, share(*AIR_AND_LUNG_HU), share(*SOFT_TISSUE_HU), share(DENSE_HU, np.inf),
                   below_air, padding)


def _share_of_fullest_bins(hounsfield: NDArray[np.floating[Any]]) -> float:
    _, counts = np.unique(np.rint(hounsfield / PADDING_BIN_HU), return_counts=True)
    return float(np.sort(counts)[-PADDING_BINS:].sum()) / hounsfield.size

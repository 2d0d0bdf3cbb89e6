"""Spacing and directions of a scan: what the header says, whether it can be believed, and turning to the manifest's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import aff2axcodes, apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray

from ..errors import InputError
from ..scan_files import ScanPath
from .metadata import VolumeMetadata
from .options import ReadOptions, expand_spacing, in_mm, require_spacing
from .types import Spacing, Volume

_MILLIMETRE_CODES = (0, 2)  # NIfTI xyzt_units: unknown, which everyone takes for mm, and mm
#: pixdim and affine may differ by rounding in the writing program, not by more (relative).
_SPACING_TOLERANCE = 1e-3
#: Beyond rounding in headers a scan is no box; beyond a patient who lies slightly askew a note says so.
_LARGEST_LEAN_DEGREES, _LARGEST_TURN_DEGREES = 1.0, 5.0
#: What a blank header is taken for: CT-RATE, where such files come from, stores axes to the left, the back and upwards;
#: so does SimpleITK where nothing else was said.
LPS_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])
_REMEDY = "pass --spacing X Y Z, or --metadata CSV for CT-RATE"
#: Sides of what a scan of a chest covers, from infants to whole bodies.
_SMALLEST_EXTENT_MM, _LARGEST_EXTENT_MM = 60.0, 2200.0


@dataclass(frozen=True)
class Geometry:
    """The geometry fields of a header, unrepaired.

    ``affine``: voxel index to patient mm, 4x4 (RAS+). ``pixdim_mm``: along the stored axes. ``has_form``: the header
    has a qform or an sform. ``unit_code``: spatial part of NIfTI's xyzt_units.
    ``other_affine``: a second one that the header gives, which is not used.
    """

    affine: NDArray[np.float64]
    pixdim_mm: Spacing
    has_form: bool
    unit_code: int
    other_affine: NDArray[np.float64] | None = None

    @property
    def is_blank(self) -> bool:
        """The header was never filled in: no orientation, or unit spacing with identity."""
        # The sign does not matter: ITK's default, identity in LPS, is diag(-1, -1, 1) here.
        unit = np.allclose(np.abs(self.pixdim_mm), 1) and np.allclose(np.abs(self.affine), np.eye(4))
        return not self.has_form or bool(unit)

    @property
    def is_regular(self) -> bool:
        """The affine can be inverted."""
        return bool(np.isfinite(self.affine).all()) and abs(np.linalg.det(self.affine[:3, :3])) > 0


def choose_spacing(path: Path, geometry: Geometry, options: ReadOptions, metadata: VolumeMetadata | None,
                   needs_spacing: bool = True) -> Spacing:
    """Spacing along the stored axes: the caller's, else the metadata's, else the header's if it can be believed.

    Args:
        needs_spacing: false to take 1 mm from a blank header.

    Raises:
        InputError: the header is blank, impossible or contradicts itself.
    """
    if options.spacing is not None:
        return expand_spacing(options.spacing)
    if metadata is not None:
        return metadata.spacing_xyz_mm
    pixdim = geometry.pixdim_mm
    if geometry.has_form:
        require_spacing(f"{path}: spacing in the header", pixdim, _REMEDY)
    if geometry.is_blank:
        if not needs_spacing:
            return 1.0, 1.0, 1.0
        raise InputError(f"{path}: blank header (no orientation, or unit spacing with identity): the voxel spacing is "
                         f"unknown; {_REMEDY}")
    if not geometry.is_regular:
        raise InputError(f"{path}: the header's affine is singular or not finite; {_REMEDY}")
    if geometry.unit_code not in _MILLIMETRE_CODES:
        raise InputError(f"{path}: the header's spatial unit is code {geometry.unit_code}, not millimetres; {_REMEDY}")
    from_affine = np.linalg.norm(geometry.affine[:3, :3], axis=0)
    if not np.allclose(from_affine, pixdim, rtol=_SPACING_TOLERANCE):
        raise InputError(f"{path}: the header contradicts itself: pixdim says {in_mm(pixdim)}, the affine "
                         f"{in_mm(from_affine.tolist())}; {_REMEDY}")
    return pixdim


def describe_turn(path: ScanPath, affine: NDArray[np.float64]) -> str | None:
    """A note on axes that do not lie along the patient's, which are read as if they did; None where they do.

    Raises:
        InputError: axes that are not at right angles, as those of a stack that a tilted gantry made.
    """
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    lean = float(np.degrees(np.arcsin(np.clip(np.abs(axes.T @ axes - np.eye(3)).max(), 0, 1))))
    if lean > _LARGEST_LEAN_DEGREES:
        raise InputError(f"{path}: the header's axes are {lean:.1f} degrees off a right angle (a tilted gantry?); "
                         "resample the scan to a regular grid first, or pass --orientation as-stored")
    turn = float(np.degrees(np.arccos(np.clip(np.abs(axes).max(axis=0).min(), 0, 1))))
    if turn <= _LARGEST_TURN_DEGREES:
        return None
    return f"turned by up to {turn:.0f} degrees against the patient's axes, and read along the nearest of them"


def describe_contradiction(geometry: Geometry) -> str | None:
    """A note on a header whose sform and qform give the stored axes other directions; None where they agree."""
    if geometry.other_affine is None:
        return None
    used, other = axis_codes(geometry.affine), axis_codes(geometry.other_affine)
    if used is None or other is None or used == other or _angle(geometry.affine, geometry.other_affine) \
            <= _LARGEST_TURN_DEGREES:
        return None
    return (f"the header contradicts itself: its axes point to {used} by the sform, which is used, and to {other} by "
            "the qform, which other programs use; one of them shows another scan")


def _angle(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """The largest between an axis of one affine and the same of the other, in degrees."""
    a, b = (affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0) for affine in (one, other))
    return float(np.degrees(np.arccos(np.clip((a * b).sum(axis=0).min(), -1, 1))))


def axis_codes(affine: NDArray[np.float64]) -> str | None:
    """Directions of the stored axes, such as "RAS"; None where the affine does not tell."""
    if not np.isfinite(affine).all() or None in (codes := aff2axcodes(affine)):
        return None
    return "".join(map(str, codes))


def describe_extent(volume: Volume) -> str | None:
    """A note on a scan that is no chest by its size, so that its spacing may be wrong; None for others."""
    sides = [count * mm for count, mm in zip(volume.stored.shape, volume.spacing_hwd_mm, strict=True)]
    if all(_SMALLEST_EXTENT_MM <= side <= _LARGEST_EXTENT_MM for side in sides):
        return None
    covered = " x ".join(f"{side:.0f}" for side in sides)
    return f"covers {covered} mm (H x W x D), which no scan of a chest does: is the spacing right?"


def reorient(
    path: ScanPath, affine: NDArray[np.float64], stored: NDArray[Any], spacing: Spacing, target: str
) -> tuple[NDArray[Any], Spacing]:
    """View the array, and order the spacing, in ``target`` directions; oblique scans go to the nearest axes.

    Nothing is copied.
    """
    current = io_orientation(affine) if np.isfinite(affine).all() else np.full((3, 2), np.nan)
    if np.isnan(current).any():
        raise InputError(f"{path}: the header's affine gives no direction for one of the axes; pass --orientation "
                         "as-stored (and --spacing)")
    change = ornt_transform(current, axcodes2ornt(tuple(target)))
    order = np.argsort(change[:, 0])
    h, w, d = (spacing[int(source)] for source in order)
    return apply_orientation(stored, change), (h, w, d)

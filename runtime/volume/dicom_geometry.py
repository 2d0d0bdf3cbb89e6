"""From the planes of slices to a regular grid, or the reason why they do not make one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..scan_files import ScanPath

#: Directions may differ by rounding in the header (cosines).
_SAME_DIRECTION = 1e-3
#: Positions may differ by rounding: of the distance of slices, and in mm.
_SAME_DISTANCE, _SAME_POSITION_MM = 0.02, 0.01
#: Sideways drift of the whole stack that is a tilted gantry, in pixels.
_LARGEST_DRIFT = 0.5
#: Of the regular grid's slices over those that there are: where more than half would be made up, there is no scan.
_MOST_INTERPOLATED = 2
#: What lies outside a slice that was moved sideways.
_OUTSIDE_HU = -1024.0


@dataclass(frozen=True)
class Placed:
    """A slice: its file, the directions of a row and of a column, and the place of its first pixel, in mm (LPS+)."""

    name: str
    orientation: tuple[float, ...]
    position_mm: tuple[float, ...]


@dataclass(frozen=True)
class Grid:
    """``order``: of the slices along their normal. ``affine``: (column, row, slice) to mm, LPS+, 4x4.

    ``resample``: from HU ``[k, row, column]`` in this order to a regular grid; None where they lie on one. ``notes``:
    what was done to the scan, for whoever reads its results.
    """

    order: list[int]
    spacing_mm: float
    affine: NDArray[np.float64]
    resample: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None
    notes: tuple[str, ...]


def arrange(path: ScanPath, slices: Sequence[Placed], spacing_yx: tuple[float, float], resample_irregular: bool
            ) -> Grid:
    """Sort slices along their normal, and require that they make a regular volume.

    Raises:
        InputError: mixed orientations, two slices at one place; unless ``resample_irregular`` gaps, uneven distances
            and a tilted gantry.
    """
    row, column, normal = _directions(path, slices)
    positions = np.array([one.position_mm for one in slices])
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    along, positions = along[order], positions[order]
    names = [slices[index].name for index in order]
    steps = np.diff(along)
    for index, step in enumerate(steps):
        if step <= _SAME_POSITION_MM:
            raise InputError(f"{names[index]} and {names[index + 1]}: two slices at one position, {along[index]:.2f} "
                             "mm; remove one, or choose a series with --series")
    usual = float(np.median(steps))
    notes = []
    uneven = np.flatnonzero(np.abs(steps - usual) > max(_SAME_DISTANCE * usual, _SAME_POSITION_MM))
    if len(uneven):
        index = int(uneven[0])
        found = f"{len(uneven)} uneven distances, the first {steps[index]:.2f} mm instead of {usual:.2f}"
        told = (f"{found} between {names[index]} at {along[index]:.2f} mm and {Path(names[index + 1]).name} at "
                f"{along[index + 1]:.2f} mm")
        if not resample_irregular:
            missing = " (slices are missing)" if steps[index] > 1.5 * usual else ""
            raise InputError(f"{path}: {told}{missing}; pass --resample-irregular to interpolate")
        if (along[-1] - along[0]) / usual + 1 > _MOST_INTERPOLATED * len(along):
            raise InputError(f"{path}: {told}; more than half of the slices would be interpolated, too many to be a "
                             "scan. Choose a series with --series, or find the missing slices")
        # No names of files: notes end up in stores and reports, and names may be those of patients.
        notes.append(f"interpolated along the slices: {found}, at {along[index]:.2f} mm")
    spacing = usual if len(uneven) else float(along[-1] - along[0]) / (len(along) - 1)
    drift = positions - positions[0] - (along - along[0])[:, None] * normal
    sideways = np.stack([drift @ row / spacing_yx[1], drift @ column / spacing_yx[0]], axis=1)
    worst = int(np.abs(sideways).max(axis=1).argmax())
    if np.abs(sideways).max() > _LARGEST_DRIFT:
        tilt = np.degrees(np.arctan2(np.linalg.norm(drift[worst]), abs(along[worst] - along[0])))
        found = f"the stack leans by {tilt:.1f} degrees (gantry tilt)"
        told = (f"{found}: {names[worst]} at {along[worst]:.2f} mm lies {np.linalg.norm(drift[worst]):.1f} mm beside "
                "the first slice")
        if not resample_irregular:
            raise InputError(f"{path}: {told}; pass --resample-irregular to straighten it")
        notes.append(f"straightened: {found}")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * spacing_yx[1], column * spacing_yx[0], normal * spacing
    affine[:3, 3] = positions[0]
    if not notes:
        return Grid(order.tolist(), spacing, affine, None, ())
    even = np.arange(along[0], along[-1] + spacing * 0.5, spacing) if len(uneven) else along
    return Grid(order.tolist(), spacing, affine, lambda hounsfield: _resample(hounsfield, sideways, along, even),
                tuple(notes))


def _directions(path: ScanPath, slices: Sequence[Placed]) -> tuple[NDArray[np.float64], ...]:
    """Unit vectors along a row, along a column, and of the normal."""
    first = np.array(slices[0].orientation)
    for one in slices:
        if np.abs(np.array(one.orientation) - first).max() > _SAME_DIRECTION:
            raise InputError(f"{one.name}: its slice lies in another direction than that of {slices[0].name}; mixed "
                             "orientations are no scan, choose a series with --series")
    row, column = first[:3], first[3:]
    if abs(np.linalg.norm(row) - 1) > 0.01 or abs(np.linalg.norm(column) - 1) > 0.01 or abs(row @ column) > 0.01:
        raise InputError(f"{path}: ImageOrientationPatient {tuple(first)}; expected two directions at a right angle")
    normal = np.cross(row, column)
    if abs(normal[2]) < 0.7:
        raise InputError(f"{path}: the slices are not axial (their normal is {np.round(normal, 2).tolist()}); expected "
                         "an axial series")
    return row, column, normal


def _resample(hounsfield: NDArray[np.float32], sideways: NDArray[np.float64], along: NDArray[np.float64],
              even: NDArray[np.float64]) -> NDArray[np.float32]:
    """Each slice moved back sideways, linearly, then interpolated linearly along the normal."""
    straight = np.stack([_shift(plane, dx, dy) for plane, (dx, dy) in zip(hounsfield, sideways, strict=True)])
    below = np.clip(np.searchsorted(along, even, side="right") - 1, 0, len(along) - 2)
    share = np.clip((even - along[below]) / (along[below + 1] - along[below]), 0, 1).astype(np.float32)
    out = np.empty((len(even), *hounsfield.shape[1:]), np.float32)
    for index, (lower, part) in enumerate(zip(below, share, strict=True)):
        out[index] = (1 - part) * straight[lower] + part * straight[lower + 1]
    return out


def _shift(plane: NDArray[np.float32], dx: float, dy: float) -> NDArray[np.float32]:
    """The plane seen from a grid whose pixel (r, c) lies at (r - dy, c - dx) of its own."""
    for axis, by in ((0, dy), (1, dx)):
        if abs(by) < 1e-6:
            continue
        at = np.arange(plane.shape[axis]) - by
        lower = np.floor(at).astype(int)
        part = (at - lower).astype(np.float32)
        moved = np.moveaxis(plane, axis, 0)
        padded = np.concatenate([moved, np.full((1, *moved.shape[1:]), _OUTSIDE_HU, np.float32)])  # index -1: outside
        pick = [np.where((index >= 0) & (index < len(moved)), index, -1) for index in (lower, lower + 1)]
        weight = part.reshape(-1, *[1] * (plane.ndim - 1))
        plane = np.moveaxis((1 - weight) * padded[pick[0]] + weight * padded[pick[1]], 0, axis)
    return plane

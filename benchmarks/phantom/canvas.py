"""A CT volume to paint on: coordinates in millimetres, shapes with anti-aliased edges, smooth random fields.

Axes are the patient's: x grows to the left, y to the back, z to the head ("LPS"), so arrays ``[x, y, z]`` are stored
the way CT-RATE stores them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

#: Fields over the volume. float32 where they are kept; intermediate distances may be wider.
Array = NDArray[np.floating[Any]]
Point = Sequence[float] | NDArray[np.floating]


@dataclass(frozen=True)
class Grid:
    """Voxel centres in mm along x, y and z; ``spacing_mm`` between them."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    centre_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def axes(self) -> tuple[Array, Array, Array]:
        """Coordinates shaped for broadcasting: [X, 1, 1], [1, Y, 1], [1, 1, Z]."""
        x, y, z = (
            (centre + (np.arange(count) - (count - 1) / 2) * spacing).astype(np.float32)
            for count, spacing, centre in zip(self.shape, self.spacing_mm, self.centre_mm, strict=True)
        )
        return x[:, None, None], y[None, :, None], z[None, None, :]


@dataclass
class Canvas:
    """Hounsfield units under construction."""

    grid: Grid
    hu: Array = field(init=False)

    def __post_init__(self) -> None:
        self.x, self.y, self.z = self.grid.axes()
        self.hu = np.full(self.grid.shape, -1000, np.float32)
        self._first = tuple(float(axis.flat[0]) for axis in (self.x, self.y, self.z))
        #: Half the width over which an edge blurs: partial volume of about one voxel.
        self.edge_mm = 0.6 * float(np.mean(self.grid.spacing_mm))

    # ------------------------------------------------------------------ painting

    def coverage(self, distance: Array) -> Array:
        """Share of each voxel inside a shape, from the signed distance to its surface (negative inside)."""
        return np.clip(0.5 - distance / (2 * self.edge_mm), 0, 1).astype(np.float32)

    def blend(self, where: tuple[slice, slice, slice], share: Array, value: float | Array) -> None:
        """Mix ``value`` into a part of the volume."""
        part = self.hu[where]
        part += share * (value - part)

    def fill(self, share: Array, value: float | Array) -> None:
        """Mix ``value`` into the whole volume."""
        self.blend((slice(None), slice(None), slice(None)), share, value)

    def around(self, low: Point, high: Point, margin: float = 0.0) -> tuple[slice, slice, slice]:
        """The part of the volume that holds the box from ``low`` to ``high`` (mm), widened by ``margin``."""
        slices = []
        for axis, lowest, highest in zip((self.x, self.y, self.z), low, high, strict=True):
            line = axis.ravel()
            start = int(np.searchsorted(line, lowest - margin))
            stop = int(np.searchsorted(line, highest + margin, side="right"))
            slices.append(slice(start, max(start, stop)))
        return slices[0], slices[1], slices[2]

    def local(self, where: tuple[slice, slice, slice]) -> tuple[Array, Array, Array]:
        """Coordinates of a part of the volume, shaped for broadcasting."""
        return self.x[where[0]], self.y[:, where[1]], self.z[:, :, where[2]]

    def value_at(self, field: Array, point: Point) -> float:
        """The field's value in the voxel nearest to a point (mm), or at the border if the point lies outside."""
        index = tuple(min(max(round((float(value) - first) / spacing), 0), count - 1) for value, first, spacing, count
                      in zip(point, self._first, self.grid.spacing_mm, self.grid.shape, strict=True))
        return float(field[index])

    def ellipsoid(self, centre: Point, radii: Point, value: float, within: Array | None = None, rough: float = 0.0,
                  rng: np.random.Generator | None = None) -> None:
        """Paint an ellipsoid; ``rough`` (mm) makes its surface irregular."""
        margin = rough * 2 + self.edge_mm * 2
        where = self.around(np.subtract(centre, radii), np.add(centre, radii), margin)
        distance = ellipsoid_distance(self.local(where), centre, radii)
        if rough and rng is not None and distance.size:
            distance = distance + rough * smooth_noise(distance.shape, 5.0, rng)
        share = self.coverage(distance)
        if within is not None:
            share = share * within[where]
        self.blend(where, share, value)

    def tube(self, points: Sequence[Point], radii: Sequence[float] | float, value: float,
             within: Array | None = None) -> None:
        """Paint a tube through ``points``; ``radii`` per point, or one for all."""
        points = [np.asarray(point, np.float32) for point in points]
        radii = [radii] * len(points) if isinstance(radii, int | float) else list(radii)
        for start, end, first, last in zip(points, points[1:], radii, radii[1:], strict=False):
            widest = max(first, last)
            where = self.around(np.minimum(start, end), np.maximum(start, end), widest + 2 * self.edge_mm)
            distance = capsule_distance(self.local(where), start, end, first, last)
            share = self.coverage(distance)
            # A tube thinner than a voxel must keep its mass, not vanish between the samples.
            share *= min(1.0, (widest / self.edge_mm) ** 0.5)
            if within is not None:
                share = share * within[where]
            self.blend(where, share, value)


def ellipsoid_distance(coordinates: tuple[Array, Array, Array], centre: Point, radii: Point) -> Array:
    """Approximate signed distance (mm) to an ellipsoid: exact for a sphere, good near the surface otherwise."""
    scaled = sum(((axis - c) / r) ** 2 for axis, c, r in zip(coordinates, centre, radii, strict=True))
    norm = np.sqrt(scaled)
    gradient = np.sqrt(sum(((axis - c) / r**2) ** 2 for axis, c, r in zip(coordinates, centre, radii, strict=True)))
    return (norm * (norm - 1) / np.maximum(gradient, 1e-6)).astype(np.float32)


def capsule_distance(coordinates: tuple[Array, Array, Array], start: Array, end: Array, first: float,
                     last: float) -> Array:
    """Signed distance (mm) to a segment whose radius goes from ``first`` to ``last``."""
    direction = end - start
    length_squared = max(float(direction @ direction), 1e-6)
    offset = [axis - s for axis, s in zip(coordinates, start, strict=True)]
    along = sum(o * d for o, d in zip(offset, direction, strict=True)) / length_squared
    along = np.clip(along, 0, 1)
    squared = sum((o - along * d) ** 2 for o, d in zip(offset, direction, strict=True))
    return (np.sqrt(squared) - (first + along * (last - first))).astype(np.float32)


def smooth_noise(shape: Sequence[int], scale: float | Sequence[float], rng: np.random.Generator) -> Array:
    """A smooth random field of about zero mean and unit variance; ``scale``: voxels between its independent values."""
    scales = [scale] * len(shape) if isinstance(scale, int | float) else list(scale)
    coarse = tuple(int(np.ceil(count / s)) + 3 for count, s in zip(shape, scales, strict=True))
    knots = rng.standard_normal(coarse).astype(np.float32)
    field = knots
    for axis, (count, s) in enumerate(zip(shape, scales, strict=True)):
        positions = 1 + np.arange(count) / s
        lower = positions.astype(int)
        weight = positions - lower
        weight = (weight * weight * (3 - 2 * weight)).astype(np.float32)  # smoothstep hides the knots' grid
        form = [1] * len(shape)
        form[axis] = count
        weight = weight.reshape(form)
        field = np.take(field, lower, axis) * (1 - weight) + np.take(field, lower + 1, axis) * weight
    # Interpolation averages neighbours, which shrinks the variance by about 0.74 per axis.
    return (field * 1.16 ** len(shape)).astype(np.float32)


def blur(field: Array, sigma_mm: float, grid: Grid) -> Array:
    """Gaussian blur by millimetres."""
    return ndimage.gaussian_filter(field, [sigma_mm / spacing for spacing in grid.spacing_mm])

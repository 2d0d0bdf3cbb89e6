"""Polyhedral cells, the shape of secondary pulmonary lobules: distances to their walls and a number for each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from .canvas import Array, Canvas


def lobules(canvas: Canvas, where: Array, size_mm: float, rng: np.random.Generator) -> tuple[Array, NDArray[np.intp]]:
    """Voronoi cells of about ``size_mm`` where a share is positive.

    Returns:
        Distance (mm) to the nearest wall, large elsewhere; and the cell's number, -1 elsewhere.
    """
    inside = np.argwhere(where > 0.05)
    distance = np.full(where.shape, 1e3, np.float32)
    number = np.full(where.shape, -1, np.intp)
    if not len(inside):
        return distance, number
    points = np.stack([axis.ravel()[inside[:, i]] for i, axis in enumerate((canvas.x, canvas.y, canvas.z))], axis=1)
    low, high = points.min(axis=0) - size_mm, points.max(axis=0) + size_mm
    counts = np.maximum(((high - low) / size_mm).astype(int), 1)
    lattice = np.stack(np.meshgrid(*(np.linspace(a, b, n) for a, b, n in zip(low, high, counts, strict=True)),
                                   indexing="ij"), axis=-1).reshape(-1, 3)
    seeds = lattice + rng.uniform(-0.45, 0.45, lattice.shape) * size_mm
    reach, index = KDTree(seeds).query(points, k=2)
    near, second = np.asarray(reach).T
    first, other = np.asarray(index).T
    between = np.linalg.norm(seeds[first] - seeds[other], axis=1)
    # The wall is the plane halfway between two seeds: distance (b^2 - a^2) / 2d.
    distance[tuple(inside.T)] = (second**2 - near**2) / (2 * np.maximum(between, 1e-3))
    number[tuple(inside.T)] = first
    return distance, number

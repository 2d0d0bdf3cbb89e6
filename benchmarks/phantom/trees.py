"""Bronchial and vascular trees that fill a region: each branch heads for the middle of what it has to supply."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

#: Murray's law: the cube of a vessel's radius is the sum of its children's cubes.
MURRAY_EXPONENT = 3.0


@dataclass(frozen=True)
class Branch:
    """A segment of a tree, in mm. ``order`` counts the divisions between the root and it."""

    start: NDArray[np.floating]
    end: NDArray[np.floating]
    start_radius: float
    end_radius: float
    order: int

    def beside(self, direction: NDArray[np.floating]) -> Branch:
        """The companion of this branch: touching it, on the side of ``direction``, a little thicker."""
        axis = self.end - self.start
        axis = axis / max(float(np.linalg.norm(axis)), 1e-6)
        across = direction - (direction @ axis) * axis
        across = across / max(float(np.linalg.norm(across)), 1e-6)
        return replace(
            self,
            start=self.start + across * (self.start_radius * 2.1 + 0.8),
            end=self.end + across * (self.end_radius * 2.1 + 0.8),
            start_radius=self.start_radius * 1.05 + 0.3,
            end_radius=self.end_radius * 1.05 + 0.3,
        )


def grow_tree(root: NDArray[np.floating], targets: NDArray[np.floating], root_radius: float, leaf_radius: float,
              rng: np.random.Generator) -> list[Branch]:
    """Branches from ``root`` to every one of ``targets`` [n, 3].

    A branch goes part of the way to the centroid of its targets, which are then divided across their longest axis.
    """
    branches: list[Branch] = []

    def radius(count: int) -> float:
        scale = (count / len(targets)) ** (1 / MURRAY_EXPONENT)
        return leaf_radius + (root_radius - leaf_radius) * max(scale - len(targets) ** (-1 / MURRAY_EXPONENT), 0)

    def grow(start: NDArray[np.floating], points: NDArray[np.floating], order: int, width: float) -> None:
        if len(points) == 1:
            branches.append(Branch(start, points[0], width, leaf_radius * 0.6, order))
            return
        centroid = points.mean(axis=0)
        end = start + (centroid - start) * rng.uniform(0.38, 0.58)
        bend = start + (end - start) * 0.5 + rng.normal(0, 0.05, 3) * np.linalg.norm(end - start)
        narrow = radius(len(points))
        branches.append(Branch(start, bend, width, (width + narrow) / 2, order))
        branches.append(Branch(bend, end, (width + narrow) / 2, narrow, order))
        centred = points - centroid
        longest = np.linalg.eigh(centred.T @ centred)[1][:, -1]
        along = centred @ longest
        first = along > np.quantile(along, rng.uniform(0.35, 0.65))
        if not 0 < first.sum() < len(points):
            first = np.arange(len(points)) < len(points) // 2
        grow(end, points[first], order + 1, radius(int(first.sum())))
        grow(end, points[~first], order + 1, radius(int((~first).sum())))

    grow(np.asarray(root, float), np.asarray(targets, float), 0, root_radius)
    return branches

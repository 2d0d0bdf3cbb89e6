"""From painted anatomy to what a scanner stores: point spread, correlated noise, field of view, table, integers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .anatomy import Patient, Scene
from .canvas import Canvas, Grid

LOWEST_STORED_HU, HIGHEST_STORED_HU = -1024, 3071


@dataclass(frozen=True)
class Protocol:
    """How a scan is taken: voxel spacing and matrix, noise (HU, at 1.5 x 1.5 x 2.5 mm), sharpness of the kernel."""

    grid: Grid
    noise_hu: float
    sharp: bool

    @staticmethod
    def draw(patient: Patient, rng: np.random.Generator, voxel_mm: float = 2.0) -> Protocol:
        """A protocol that covers the patient.

        Args:
            voxel_mm: typical in-plane spacing; slices are 1.3 to 2.1 times as far apart.
        """
        in_plane = voxel_mm * rng.uniform(0.85, 1.2)
        slice_mm = voxel_mm * rng.uniform(1.3, 2.1)
        width = 2 * (patient.half_width * 1.12 + rng.uniform(4, 30))
        side = int(np.ceil(width / in_plane / 2)) * 2
        slices = int(np.ceil((patient.lung_top - patient.diaphragm + 62 + rng.uniform(0, 36)) / slice_mm))
        middle = (patient.lung_top + patient.diaphragm) / 2 - 14
        # The patient never lies quite in the middle of the field of view.
        x, y, z = patient.offset
        grid = Grid((side, side, slices), (in_plane, in_plane, slice_mm), (-x, -y, middle - z))
        return Protocol(grid, rng.uniform(9, 34), bool(rng.random() < 0.5))


def acquire(scene: Scene, protocol: Protocol, rng: np.random.Generator) -> NDArray[np.int16]:
    """Stored values [X, Y, Z] int16 in Hounsfield units."""
    canvas = scene.canvas
    spacing = protocol.grid.spacing_mm
    _paint_table(canvas, scene.patient)
    sigma_mm = 0.45 if protocol.sharp else 0.85
    image = ndimage.gaussian_filter(canvas.hu, [sigma_mm / s for s in spacing])
    if protocol.sharp:  # a sharp kernel overshoots at edges
        image += 0.35 * (image - ndimage.gaussian_filter(image, [1.2 / s for s in spacing]))
    noise = rng.standard_normal(image.shape, np.float32)
    noise = ndimage.gaussian_filter(noise, [0.6, 0.6, 0.25])
    # More photons per voxel, less noise; more body around a voxel, more of it.
    scale = protocol.noise_hu * (1.5 * 1.5 * 2.5 / np.prod(spacing)) ** 0.5 / float(noise.std())
    inside = 0.55 + 0.45 * np.clip(-scene.skin / 60, 0, 1)
    image += noise * scale * inside
    circle = _outside_field_of_view(canvas)
    stored = np.clip(np.rint(image), LOWEST_STORED_HU, HIGHEST_STORED_HU).astype(np.int16)
    stored[circle] = LOWEST_STORED_HU
    return stored


def _paint_table(canvas: Canvas, patient: Patient) -> None:
    """The curved top of the scanner's table under the patient's back."""
    top = patient.half_depth + 16 - 0.0009 * canvas.x**2
    sheet = np.abs(canvas.y - top - 6) - 1.6
    width = np.abs(canvas.x) - 205
    canvas.fill(canvas.coverage(np.maximum(sheet, width)), -160.0)


def _outside_field_of_view(canvas: Canvas) -> NDArray[np.bool_]:
    """The corners that no rotation of the scanner sees."""
    x, y = canvas.x - canvas.x.mean(), canvas.y - canvas.y.mean()
    outside = np.hypot(x, y) > float(np.abs(x).max())
    return np.broadcast_to(outside, canvas.hu.shape)


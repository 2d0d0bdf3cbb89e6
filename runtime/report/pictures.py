"""Slices of a scan as radiologists look at them, and of what the encoder reads with the blocks that it goes by.

Slices are shown from the feet and from the left, in front and above up: the patient's right is on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..manifest import Preprocessing
from ..occlusion import Occlusion
from ..volume import Volume
from ..volume.options import AS_STORED
from .page import picture

#: Pixels of the longer side of a picture.
_SIDE = 360
#: Level and width in HU (Radiology's usual ones).
WINDOWS = {"lung window (level -600, width 1500 HU)": (-600.0, 1500.0),
           "mediastinal window (level 40, width 400 HU)": (40.0, 400.0)}
#: Colour-blind safe (Okabe and Ito): for the class, against it.
_FOR, _AGAINST, _STRONGEST = (213, 94, 0), (0, 114, 178), (255, 255, 255)
_MOST_COLOUR = 0.65


@dataclass(frozen=True)
class Picture:
    """``edges``: directions of the left, the right, the upper and the lower edge, empty where nobody knows."""

    source: str
    caption: str
    edges: tuple[str, str, str, str]


@dataclass(frozen=True)
class _Plane:
    """Slices across one axis (to the left, the back, upwards): ``order``: axes of the rows and of the columns."""

    axis: int
    name: str
    letters: str
    order: tuple[int, int]

    def title(self, known: bool) -> str:
        return self.name if known else f"across axis {self.axis + 1}"

    def edges(self, known: bool) -> tuple[str, str, str, str]:
        left, right, top, bottom = self.letters if known else [""] * 4
        return left, right, top, bottom


_PLANES = (_Plane(2, "axial", "RLAP", (1, 0)), _Plane(1, "coronal", "RLHF", (2, 0)),
           _Plane(0, "sagittal", "APHF", (2, 1)))


def scan_rows(volume: Volume, in_hounsfield: bool) -> list[tuple[str, list[Picture]]]:
    """The middle slices of a scan as it was read, in each window; in its own range where its units are not HU."""
    stored, spacing, known = _as_lps(volume.stored, volume.spacing_hwd_mm, volume.orientation)
    planes = []
    for plane in _PLANES:
        index = stored.shape[plane.axis] // 2
        values = _upright(volume.hounsfield(_slice(stored, plane.axis, index)), plane)
        planes.append((f"{plane.title(known)}, slice {index + 1} of {stored.shape[plane.axis]}", values,
                       plane.edges(known),
                       [stored.shape[axis] * spacing[axis] for axis in plane.order]))
    windows = WINDOWS
    if not in_hounsfield:
        low, high = min(float(v.min()) for _, v, *_ in planes), max(float(v.max()) for _, v, *_ in planes)
        windows = {f"from {low:g} to {high:g}": ((low + high) / 2, max(high - low, 1e-6))}
    return [(title, [Picture(picture(_sized(_grey(values, level - width / 2, level + width / 2), size)), caption, edges)
                     for caption, values, edges, size in planes])
            for title, (level, width) in windows.items()]


def block_row(seen: NDArray[np.float32], scan: Volume, spec: Preprocessing, found: Occlusion, name: str
              ) -> list[Picture]:
    """Slices of the preprocessed ``[D, H, W]`` through the block of the largest effect on a class, all blocks coloured.

    Args:
        scan: that it was made of.
    """
    effect = found.effect[..., found.classes.index(name)]
    mark = np.zeros(effect.shape, bool)
    mark[np.unravel_index(np.abs(effect).argmax(), effect.shape)] = True
    spacing_hwd = spec.spacing_hwd_mm
    if spec.resampling == "to_shape":  # stretched: the pixels' proportions are those of the scan
        sides = (*seen.shape[1:], seen.shape[0])
        spacing_hwd = tuple(mm * length / side for mm, length, side in
                            zip(scan.spacing_hwd_mm, scan.stored.shape, sides, strict=True))

    def turned(array: NDArray[Any]) -> tuple[NDArray[Any], Sequence[float], bool]:
        return _as_lps(array.transpose(1, 2, 0), spacing_hwd, scan.orientation)

    (voxels, spacing, known), (blocks, *_), (marked, *_) = turned(seen), turned(effect), turned(mark)
    at = np.argwhere(marked)[0]
    largest = float(np.abs(effect).max()) or 1.0
    low, high = spec.value_range
    pictures = []
    for plane in _PLANES:
        length = voxels.shape[plane.axis] // blocks.shape[plane.axis]
        grey = _grey(_upright(_slice(voxels, plane.axis, int(at[plane.axis]) * length + length // 2), plane), low, high)
        share, outline = (_upright(_slice(one, plane.axis, int(at[plane.axis])), plane)
                          for one in (blocks / largest, marked))
        size = [voxels.shape[axis] * spacing[axis] for axis in plane.order]
        pictures.append(Picture(picture(_coloured(_sized(grey, size), share, outline)),
                                f"{plane.title(known)}, through the block with the largest effect", plane.edges(known)))
    return pictures


def _slice(array: NDArray[Any], axis: int, index: int) -> NDArray[Any]:
    """As ``take``, which would first copy the whole of an array that is not in C order."""
    return array[(slice(None),) * axis + (index,)]


def _as_lps(array: NDArray[Any], spacing: Sequence[float], orientation: str
            ) -> tuple[NDArray[Any], list[float], bool]:
    """Axes to the left, the back and upwards, their spacing, and whether that is known; a view."""
    if orientation == AS_STORED:
        return array, list(spacing), False
    axes = [next(axis for axis, letter in enumerate(orientation) if letter in pair) for pair in ("LR", "PA", "SI")]
    turned = array.transpose(axes)[tuple(slice(None, None, -1 if orientation[axis] in "RAI" else 1) for axis in axes)]
    return turned, [spacing[axis] for axis in axes], True


def _upright(values: NDArray[Any], plane: _Plane) -> NDArray[Any]:
    """A slice with its rows first, the head up."""
    rows_first = values if plane.order[0] < plane.order[1] else values.T
    return rows_first[::-1] if plane.order[0] == 2 else rows_first


def _grey(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    return np.rint((np.clip(values, low, high) - low) * (255 / (high - low))).astype(np.uint8)


def _sized(grey: NDArray[np.uint8], size_mm: Sequence[float]) -> NDArray[np.uint8]:
    """True proportions, the longer side ``_SIDE`` pixels."""
    rows, columns = (max(1, round(_SIDE * mm / max(size_mm))) for mm in size_mm)
    return np.asarray(Image.fromarray(grey).resize((columns, rows), Image.Resampling.BILINEAR))


def _coloured(grey: NDArray[np.uint8], share: NDArray[np.float32], mark: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Blocks stay blocks: smoothing would promise a resolution that there is not."""
    rows, columns = (np.arange(length) * parts // length for length, parts in zip(grey.shape, share.shape, strict=True))
    spread, marked = share[rows][:, columns], mark[rows][:, columns]
    alpha = np.abs(spread)[..., None] * _MOST_COLOUR
    colour = np.where(spread[..., None] > 0, np.array(_FOR), np.array(_AGAINST))
    pixels = grey[..., None] * (1 - alpha) + colour * alpha
    inner = np.pad(marked, 2)
    inside = inner[:-4, 2:-2] & inner[4:, 2:-2] & inner[2:-2, :-4] & inner[2:-2, 4:]
    pixels[marked & ~inside] = _STRONGEST
    return np.rint(pixels).astype(np.uint8)

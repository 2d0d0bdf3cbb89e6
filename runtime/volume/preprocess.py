"""The original preprocessing, slice by slice: the same numbers without its full-size intermediate volumes.

Reference: the data set class of the published DCFormer and CT-CLIP code, which clips, scales, resamples with
``torch.nn.functional.interpolate(mode="trilinear", align_corners=False)``, clips again, crops and pads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..manifest import Preprocessing
from .types import Volume


@dataclass(frozen=True)
class AxisPlan:
    """Where the samples of one output axis come from, for the part that survives the crop.

    Output index ``start + k`` is ``(1 - weight[k]) * x[lower[k]] + weight[k] * x[upper[k]]``; the other output
    indices are padding.
    """

    lower: NDArray[np.intp]
    upper: NDArray[np.intp]
    weight: NDArray[np.float32]
    start: int

    @property
    def span(self) -> slice:
        """The output indices that hold samples."""
        return slice(self.start, self.start + len(self.lower))


def plan_axis(old_size: int, spacing_mm: float, target_mm: float, length: int) -> AxisPlan:
    """Resample ``old_size`` voxels to ``int(old_size * spacing / target)``, then centre-crop or pad to ``length``.

    Raises:
        InputError: nothing is left after resampling.
    """
    new_size = int(old_size * (spacing_mm / target_mm))
    if new_size < 1:
        raise InputError(f"{old_size} voxels at {spacing_mm:g} mm are less than one voxel of {target_mm:g} mm")
    return resize_axis(old_size, new_size, length)


def resize_axis(old_size: int, new_size: int, length: int) -> AxisPlan:
    """Resample ``old_size`` voxels to ``new_size``, then centre-crop or pad to ``length``."""
    first = max((new_size - length) // 2, 0)
    count = min(new_size, length)
    centres = np.arange(first, first + count, dtype=np.float32) + np.float32(0.5)
    ratio = np.float32(old_size) / np.float32(new_size)
    # PyTorch computes ratio * centre - 0.5 in float32 with one fused multiply-add. float64 holds the product exactly,
    # so rounding once here gives the same bits; rounding twice moves samples by up to 3e-5 voxels, results by 1e-4.
    source = np.maximum((np.float64(ratio) * centres - 0.5).astype(np.float32), np.float32(0))
    lower = np.minimum(source.astype(np.intp), old_size - 1)
    weight = np.clip(source - lower.astype(np.float32), np.float32(0), np.float32(1))
    return AxisPlan(lower, np.minimum(lower + 1, old_size - 1), weight, (length - count) // 2)


def preprocess(volume: Volume, spec: Preprocessing) -> NDArray[np.float32]:
    """What the image tower reads: ``[D, H, W]`` float32, within ``spec.value_range``, of exactly ``spec.shape_dhw``.

    Raises:
        InputError: the scan is smaller than one output voxel along an axis, or has one value only and is to be scaled
            from its minimum to its maximum.
    """
    depth, height, width = spec.shape_dhw
    if spec.intensity == "min_max" or spec.crops_to_foreground:
        volume, spec = _fit_to_scan(volume, spec)
    try:
        plan_h, plan_w, plan_d = (_plan(volume, spec, axis, side) for axis, side in enumerate((height, width, depth)))
    except InputError as error:
        raise InputError(f"{volume.name}: {error}") from error
    result = np.full((depth, height, width), spec.pad_value, np.float32)
    inside = result[plan_d.span, plan_h.span, plan_w.span]
    slices: dict[int, NDArray[np.float32]] = {}
    for index, (lower, upper) in enumerate(zip(plan_d.lower, plan_d.upper, strict=True)):
        slices = {k: slices[k] if k in slices else _scaled_slice(volume, int(k), spec) for k in (lower, upper)}
        plane = _blend(slices[lower], slices[upper], plan_d.weight[index])
        plane = _blend(plane[plan_h.lower], plane[plan_h.upper], plan_h.weight[:, None])
        plane = _blend(plane[:, plan_w.lower], plane[:, plan_w.upper], plan_w.weight)
        plane *= np.float32(spec.resampling_scale_hu)
        np.clip(plane, *spec.window_hu, out=plane)
        plane += np.float32(spec.offset_hu)
        np.divide(plane, np.float32(spec.scale_hu), out=inside[index])
    return result


def _plan(volume: Volume, spec: Preprocessing, axis: int, length: int) -> AxisPlan:
    size = volume.stored.shape[axis]
    if spec.resampling == "to_shape":
        return resize_axis(size, length, length)
    return plan_axis(size, volume.spacing_hwd_mm[axis], spec.spacing_hwd_mm[axis], length)


def _fit_to_scan(volume: Volume, spec: Preprocessing) -> tuple[Volume, Preprocessing]:
    """The scan cut to its foreground, and the window that its own values make.

    Reference: MONAI's ``CropForeground`` as Med3DVLM's data preparation calls it, after scaling to 0..1. Scaling
    commutes with resampling, so it can follow as a window.
    """
    def clipped() -> Iterator[NDArray[np.float64]]:  # slice by slice, twice, rather than a full-size copy
        for index in range(volume.stored.shape[2]):
            yield np.clip(volume.hounsfield(volume.stored[:, :, index]), *spec.clip_hu)

    ranges = [(part.min(), part.max()) for part in clipped()]
    low, high = float(min(ranges)[0]), float(max(top for _, top in ranges))
    if low == high:
        raise InputError(f"{volume.name}: every voxel is {low:g} after clipping to {spec.clip_hu}; expected a scan")
    if spec.crops_to_foreground:
        plane, filled = np.zeros(volume.stored.shape[:2], bool), []
        for part in clipped():
            plane |= part > low
            filled.append(bool((part > low).any()))
        extents: tuple[NDArray[np.bool_], ...] = np.any(plane, 1), np.any(plane, 0), np.array(filled)
        box = tuple(slice(int(line.argmax()), line.size - int(line[::-1].argmax())) for line in extents)
        volume = replace(volume, stored=volume.stored[box])
    if spec.intensity == "min_max":
        spec = replace(spec, window_hu=(low, high), offset_hu=-low, scale_hu=high - low)
    return volume, spec


def _scaled_slice(volume: Volume, index: int, spec: Preprocessing) -> NDArray[np.float32]:
    """Slice ``[H, W]`` of the scan, clipped and divided, rounded to float32 where the original rounds."""
    hounsfield = volume.hounsfield(volume.stored[:, :, index])
    np.clip(hounsfield, *spec.clip_hu, out=hounsfield)
    hounsfield /= spec.resampling_scale_hu
    return hounsfield.astype(np.float32, order="C")


def _blend(
    lower: NDArray[np.float32], upper: NDArray[np.float32], weight: NDArray[np.float32] | np.float32
) -> NDArray[np.float32]:
    return (lower * (np.float32(1) - weight) + upper * weight).astype(np.float32, copy=False)

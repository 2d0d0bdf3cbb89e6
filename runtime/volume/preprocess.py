"""The original preprocessing, slice by slice: the same numbers without its full-size intermediate volumes.

Only the voxels around the wanted samples are ever converted, and slices are worked on in parallel.

Reference: the data set class of the published DCFormer and CT-CLIP code, which clips, scales, resamples with
``torch.nn.functional.interpolate(mode="trilinear", align_corners=False)``, clips again, crops and pads.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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

    def every(self, step: int) -> AxisPlan:
        """The plan of the output indices 0, step, 2 step and so on."""
        first = -self.start % step
        kept = slice(first, None, step)
        return AxisPlan(self.lower[kept], self.upper[kept], self.weight[kept], (self.start + first) // step)


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


def preprocess(volume: Volume, spec: Preprocessing, threads: int = 1) -> NDArray[np.float32]:
    """What the image tower reads: ``[D, H, W]`` float32, within ``spec.value_range``, of exactly ``spec.shape_dhw``.

    Raises:
        InputError: the scan is smaller than one output voxel along an axis, or has one value only and is to be scaled
            from its minimum to its maximum.
    """
    volume, spec = fit_to_scan(volume, spec)
    return sample(volume, spec, (1, 1, 1), threads)


def sample(volume: Volume, spec: Preprocessing, steps_dhw: tuple[int, int, int], threads: int) -> NDArray[np.float32]:
    """Every ``steps_dhw``-th voxel of the preprocessed volume, computing no other: ``result[::d, ::h, ::w]``.

    Args:
        volume, spec: as ``fit_to_scan`` returns them.
        threads: planes are shared out among so many.

    Raises:
        InputError: the scan is smaller than one output voxel along an axis.
    """
    plan_h, plan_w, plan_d = axis_plans(volume, spec, steps_dhw)
    shape = tuple(-(-side // step) for side, step in zip(spec.shape_dhw, steps_dhw, strict=True))
    result = np.full(shape, spec.pad_value, np.float32)
    inside = result[plan_d.span, plan_h.span, plan_w.span]
    plane = _Plane(volume, spec, plan_h, plan_w)

    def work(planes: NDArray[np.intp]) -> None:
        slices: dict[int, NDArray[np.float32]] = {}
        for index in planes:
            wanted = int(plan_d.lower[index]), int(plan_d.upper[index])
            slices = {k: slices[k] if k in slices else plane.read(k) for k in wanted}
            inside[index] = plane.finish(_blend(slices[wanted[0]], slices[wanted[1]], plan_d.weight[index]))

    parts = np.array_split(np.arange(len(plan_d.lower)), threads)
    if threads == 1:
        work(parts[0])
        return result
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work, part) for part in parts]:
            future.result()
    return result


def axis_plans(volume: Volume, spec: Preprocessing, steps_dhw: tuple[int, int, int]) -> tuple[AxisPlan, ...]:
    """Where every ``steps_dhw``-th sample comes from along H, W and D. Raises like ``sample``."""
    depth, height, width = spec.shape_dhw
    try:
        return tuple(_plan(volume, spec, axis, side).every(step) for axis, (side, step) in enumerate(
            zip((height, width, depth), (*steps_dhw[1:], steps_dhw[0]), strict=True)))
    except InputError as error:
        raise InputError(f"{volume.name}: {error}") from error


class _Plane:
    """Slices of a scan, transposed to ``[W, H]`` (NIfTI files store H fastest), reduced to what the samples need."""

    def __init__(self, volume: Volume, spec: Preprocessing, plan_h: AxisPlan, plan_w: AxisPlan) -> None:
        self._volume, self._spec = volume, spec
        # Stored rows and columns that some sample needs, and where in them its two neighbours are.
        self._rows, (self._w0, self._w1) = _needed(plan_w, volume.stored.shape[1])
        self._columns, (self._h0, self._h1) = _needed(plan_h, volume.stored.shape[0])
        self._weight_w, self._weight_h = plan_w.weight[:, None], plan_h.weight

    def read(self, index: int) -> NDArray[np.float32]:
        """What is needed of a slice, clipped and divided."""
        stored = self._volume.stored[:, :, index].T[self._rows][:, self._columns]
        hounsfield = self._volume.hounsfield(stored)
        np.clip(hounsfield, *self._spec.clip_hu, out=hounsfield)
        hounsfield /= np.float32(self._spec.resampling_scale_hu)
        return hounsfield

    def finish(self, plane: NDArray[np.float32]) -> NDArray[np.float32]:
        """Resample a plane between slices along W and H and put it into the window: ``[H', W']``."""
        plane = _blend(plane[self._w0], plane[self._w1], self._weight_w)
        plane = _blend(plane.take(self._h0, 1), plane.take(self._h1, 1), self._weight_h)
        plane *= np.float32(self._spec.resampling_scale_hu)
        np.clip(plane, *self._spec.window_hu, out=plane)
        plane += np.float32(self._spec.offset_hu)
        plane /= np.float32(self._spec.scale_hu)
        return plane.T


def _needed(plan: AxisPlan, size: int) -> tuple[NDArray[np.intp] | slice, tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Indices that the plan reads, and its lower and upper neighbours as positions among them."""
    indices = np.union1d(plan.lower, plan.upper)
    if 2 * len(indices) > size:  # a view of everything costs less than gathering most of it
        return slice(None), (plan.lower, plan.upper)
    return indices, (np.searchsorted(indices, plan.lower), np.searchsorted(indices, plan.upper))


def _plan(volume: Volume, spec: Preprocessing, axis: int, length: int) -> AxisPlan:
    size = volume.stored.shape[axis]
    if spec.resampling == "to_shape":
        return resize_axis(size, length, length)
    return plan_axis(size, volume.spacing_hwd_mm[axis], spec.spacing_hwd_mm[axis], length)


def fit_to_scan(volume: Volume, spec: Preprocessing) -> tuple[Volume, Preprocessing]:
    """The scan cut to its foreground, and the window that its own values make, where ``spec`` asks for that.

    Reference: MONAI's ``CropForeground`` as Med3DVLM's data preparation calls it, after scaling to 0..1. Scaling
    commutes with resampling, so it can follow as a window.
    """
    if spec.intensity == "window" and not spec.crops_to_foreground:
        return volume, spec

    def clipped() -> Iterator[NDArray[np.float32]]:  # slice by slice, twice, rather than a full-size copy
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


def _blend(
    lower: NDArray[np.float32], upper: NDArray[np.float32], weight: NDArray[np.float32] | np.float32
) -> NDArray[np.float32]:
    result = lower * (np.float32(1) - weight)
    result += upper * weight
    return result

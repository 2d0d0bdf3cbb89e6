"""Loading and preprocessing by the published method, with its full-size intermediates: what we measure against.

Written from the description of the data set classes of DCFormer and CT-CLIP: nibabel's float64 array, clip, divide,
``torch.nn.functional.interpolate`` trilinear, multiply, clip, shift and scale, crop or pad. The header's spacing stands
in for CT-RATE's metadata table.
"""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ..runtime.manifest import Preprocessing
from ..runtime.scan_files import ScanPath


def preprocess_array(array: NDArray[np.floating | np.integer], slope: float, intercept: float,
                     spacing_hwd_mm: tuple[float, float, float], spec: Preprocessing) -> NDArray[np.float32]:
    """Stored values ``[H, W, D]`` to ``[D, H, W]`` float32."""
    hounsfield = np.clip(slope * array.astype(np.float64) + intercept, *spec.clip_hu)
    scaled = (hounsfield / spec.resampling_scale_hu).astype(np.float32)
    volume = torch.from_numpy(scaled.transpose(2, 0, 1).copy())[None, None]
    spacing, target = ((mm[2], mm[0], mm[1]) for mm in (spacing_hwd_mm, spec.spacing_hwd_mm))
    size = [int(n * (a / b)) for n, a, b in zip(volume.shape[2:], spacing, target, strict=True)]
    resized = F.interpolate(volume, size=size, mode="trilinear", align_corners=False)[0, 0] * spec.resampling_scale_hu
    resized = (resized.clamp(*spec.window_hu) + spec.offset_hu) / spec.scale_hu
    padding: list[int] = []
    for axis, length in enumerate(spec.shape_dhw):
        start = max((resized.shape[axis] - length) // 2, 0)
        resized = resized.narrow(axis, start, min(length, resized.shape[axis]))
        before = (length - resized.shape[axis]) // 2
        padding = [before, length - resized.shape[axis] - before, *padding]
    return F.pad(resized, padding, value=spec.pad_value).numpy()


def load_volume(path: ScanPath, spec: Preprocessing) -> NDArray[np.float32]:
    """A NIfTI file in Hounsfield units, read as stored, to ``[D, H, W]`` float32."""
    assert isinstance(path, Path)
    image = nib.load(path)
    assert isinstance(image, nib.Nifti1Image)
    # CT-RATE's table says 0.9, the header's float32 says 0.8999999762, which can make the volume one voxel smaller.
    x, y, z = (float(str(mm)) for mm in image.header.get_zooms()[:3])
    return preprocess_array(image.get_fdata(), 1.0, 0.0, (x, y, z), spec)

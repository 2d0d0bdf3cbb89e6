"""A scan as a model wants it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import DcformerWarning, InputError
from ..manifest import Preprocessing, TensorInfo
from ..scan_files import ScanPath, SliceFiles
from .dicom_source import is_dicom_source
from .geometry import describe_extent
from .lines import scan_feeds
from .nifti import read_nifti
from .options import AS_IN_FILE, ReadOptions
from .prepared import PreparedScan, as_volume, is_prepared, read_prepared
from .preprocess import preprocess
from .types import Volume


def read_scan(path: str | ScanPath, spec: Preprocessing, options: ReadOptions = AS_IN_FILE) -> Volume:
    """Read a scan, refusing what the preprocessing needs and it does not tell: NIfTI or DICOM.

    Raises like ``read_nifti`` and ``read_dicom``.
    """
    if isinstance(path, str | Path) and is_prepared(path):
        raise InputError(f"{path}: a prepared scan; here the scan itself is needed, as .nii or .nii.gz")
    if isinstance(path, SliceFiles) or is_dicom_source(path):
        from .dicom import read_dicom  # an extra

        volume = read_dicom(path, spec.orientation, options, spec.intensity == "window")
    elif options.series is not None:
        raise InputError(f"{path}: --series chooses among DICOM series; this is none")
    else:
        volume = read_nifti(path, spec.orientation, options, needs_hounsfield=spec.intensity == "window",
                            needs_spacing=spec.resampling == "to_spacing")
    if spec.resampling == "to_spacing" and (doubt := describe_extent(volume)) is not None:
        warnings.warn(f"{path}: {doubt}", DcformerWarning, stacklevel=2)
        volume = replace(volume, notes=(*volume.notes, doubt))
    return volume


def open_prepared(path: str | Path, spec: Preprocessing, inputs: Sequence[TensorInfo], options: ReadOptions
                  ) -> PreparedScan:
    """Read a prepared scan, which nobody may know better. Raises like ``read_prepared``."""
    if options != AS_IN_FILE:
        raise InputError(f"{path}: a prepared scan, whose spacing, rescaling and orientation are settled; pass none of "
                         "them, or prepare it again with them")
    return read_prepared(Path(path), inputs, spec)


def read_feeds(path: str | ScanPath, inputs: Sequence[TensorInfo], spec: Preprocessing,
               options: ReadOptions = AS_IN_FILE, threads: int = 1) -> dict[str, NDArray[np.floating]]:
    """What an image tower reads of a file, prepared or not. Raises like ``read_scan``, ``scan_feeds``."""
    if isinstance(path, str | Path) and is_prepared(path):
        return open_prepared(path, spec, inputs, options).feeds
    return scan_feeds(inputs, read_scan(path, spec, options), spec, threads)


def prepare_scan(path: str | ScanPath, spec: Preprocessing, options: ReadOptions = AS_IN_FILE, threads: int = 1,
                 inputs: Sequence[TensorInfo] = ()) -> NDArray[np.float32]:
    """Read and preprocess a file: ``[D, H, W]`` float32. Raises like ``read_nifti`` and ``preprocess``.

    Args:
        inputs: of the image tower; with them a file may be a prepared scan, whose volume is zero where none looks.
    """
    if inputs and isinstance(path, str | Path) and is_prepared(path):
        return as_volume(open_prepared(path, spec, inputs, options).feeds, spec)
    return preprocess(read_scan(path, spec, options), spec, threads)

"""A scan as a model wants it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..manifest import Preprocessing
from .nifti import read_nifti
from .options import AS_IN_FILE, ReadOptions
from .preprocess import preprocess
from .types import Volume


def read_scan(path: str | Path, spec: Preprocessing, options: ReadOptions = AS_IN_FILE) -> Volume:
    """Read a file, refusing what the preprocessing needs and the file does not tell. Raises like ``read_nifti``."""
    return read_nifti(path, spec.orientation, options, needs_hounsfield=spec.intensity == "window",
                      needs_spacing=spec.resampling == "to_spacing")


def prepare_scan(path: str | Path, spec: Preprocessing, options: ReadOptions = AS_IN_FILE,
                 threads: int = 1) -> NDArray[np.float32]:
    """Read and preprocess a file: ``[D, H, W]`` float32. Raises like ``read_nifti`` and ``preprocess``."""
    return preprocess(read_scan(path, spec, options), spec, threads)

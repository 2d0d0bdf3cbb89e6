"""The bundle as a user runs it, through the runtime package."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...runtime.model import Model, load
from ...runtime.scan_files import ScanPath
from . import Job

KIND = "bundle"


class _Bundle:
    def __init__(self, model: Model) -> None:
        self._model = model

    def run(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._model.image_outputs(volume, ["image_embedding"])["image_embedding"]

    def run_scan(self, scan: ScanPath) -> NDArray[np.float32]:
        return np.array([list(self._model.zero_shot(scan).scores.values())], np.float32)

    def describe(self) -> str:
        return self._model.describe()


def open_contender(job: Job) -> _Bundle:
    """Load the bundle and its image tower."""
    model = load(job.bundle, job.device, job.threads, backend=job.backend, precision=job.precision,
                 preprocess=job.preprocess)
    model.describe()
    return _Bundle(model)

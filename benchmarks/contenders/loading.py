"""Loading and preprocessing alone: this project's way and the original's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...runtime.bundle import open_bundle
from ...runtime.manifest import Manifest
from ...runtime.scan_files import ScanPath
from ...runtime.volume import read_scan, scan_feeds
from . import Job

KIND, ORIGINAL_KIND = "loading", "original_loading"
#: Parts of what was loaded that are compared: each value of every so many.
_EVERY = 4


class _Loading:
    def __init__(self, manifest: Manifest, threads: int) -> None:
        self._spec, self._threads = manifest.preprocessing, threads
        image = manifest.graph("image")
        assert image is not None
        self._inputs = image.inputs

    def run(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        raise ValueError("loading begins at a file; pass a scan")

    def run_scan(self, scan: ScanPath) -> NDArray[np.float32]:
        feeds = scan_feeds(self._inputs, read_scan(scan, self._spec), self._spec, self._threads)
        if "volume" in feeds:
            return feeds["volume"][0, 0, ::_EVERY, ::_EVERY, ::_EVERY].reshape(1, -1)
        return feeds["lines_d"][0, 0, ::_EVERY].reshape(1, -1)

    def describe(self) -> str:
        return f"this project, {self._threads} threads"


class _Original:
    def __init__(self, manifest: Manifest, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._spec, self._description = manifest.preprocessing, f"original's method, {threads} threads"

    def run(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        raise ValueError("loading begins at a file; pass a scan")

    def run_scan(self, scan: ScanPath) -> NDArray[np.float32]:
        from ..original import load_volume

        return load_volume(scan, self._spec)[::_EVERY, ::_EVERY, ::_EVERY].reshape(1, -1)

    def describe(self) -> str:
        return self._description


def open_contender(job: Job) -> _Loading:
    """What a bundle's runtime does before the image tower."""
    return _Loading(open_bundle(job.bundle, verify=False).manifest, job.threads)


def open_original(job: Job) -> _Original:
    """What the original code does, for the same bundle."""
    return _Original(open_bundle(job.bundle, verify=False).manifest, job.threads)

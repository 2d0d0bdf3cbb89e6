"""What can be measured: each contender does the same work in a process of its own, one file per kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...runtime.scan_files import ScanPath


@dataclass(frozen=True)
class Job:
    """What to load and to do.

    ``bundle`` folder; ``checkpoint`` file or None; CPU ``threads``; see each contender.
    ``same_weights``: whether every contender has the bundle's weights, so that embeddings can be compared.
    ``value_range``: of preprocessed volumes. ``backend``, ``precision``, ``preprocess``: for
    bundles, as in ``runtime.backends.Options``. ``device``: likewise, for PyTorch too.
    ``scan``: what is measured then begins at its files instead of at a preprocessed volume.
    """

    bundle: str
    checkpoint: str | None
    threads: int
    same_weights: bool = False
    value_range: tuple[float, float] = (-1.0, 1.0)
    backend: str = "onnxruntime"
    precision: str = "fp32"
    scan: ScanPath | None = None
    device: str = "cpu"
    preprocess: str = "cpu"


@dataclass(frozen=True)
class Entrant:
    """A contender's name in the table, its kind (of ``open_contender``), and its job."""

    name: str
    kind: str
    job: Job


class Contender(Protocol):
    """A loaded model.

    ``run`` embeds a preprocessed volume ``[1, D, H, W]`` float32 into ``[1, 512]``. ``run_scan`` begins at a file, and
    returns ``[1, n]`` that tells whether two contenders did the same.
    """

    def run(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        """Image embedding of one volume."""
        ...

    def run_scan(self, scan: ScanPath) -> NDArray[np.float32]:
        """File to scores or, for those that only load, to what the image tower reads."""
        ...

    def describe(self) -> str:
        """Library, version, threads and weights."""
        ...


def open_contender(kind: str, job: Job) -> Contender:
    """Load a contender; imports only what that one needs."""
    from . import bundle, loading, pytorch_eager

    openers: dict[str, Callable[[Job], Any]] = {
        bundle.KIND: bundle.open_contender,
        pytorch_eager.KIND: pytorch_eager.open_contender,
        loading.KIND: loading.open_contender,
        loading.ORIGINAL_KIND: loading.open_original,
    }
    return openers[kind](job)

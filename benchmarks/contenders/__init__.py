"""What can be measured: each contender embeds the same volume in a process of its own, one file per kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Job:
    """What to load: ``bundle`` folder; ``checkpoint`` file or None; CPU ``threads``; see each contender.

    ``same_weights``: whether every contender has the bundle's weights, so that embeddings can be compared.
    ``value_range``: of preprocessed volumes.
    """

    bundle: str
    checkpoint: str | None
    threads: int
    same_weights: bool = False
    value_range: tuple[float, float] = (-1.0, 1.0)


class Contender(Protocol):
    """A loaded model; ``run`` embeds a preprocessed volume ``[1, D, H, W]`` float32 into ``[1, 512]``."""

    def run(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        """Image embedding of one volume."""
        ...

    def describe(self) -> str:
        """Library, version, threads and weights."""
        ...


def open_contender(name: str, job: Job) -> Contender:
    """Load a contender by its name; imports only what that one needs."""
    from . import onnxruntime_bundle, pytorch_eager

    openers: dict[str, Callable[[Job], Contender]] = {
        onnxruntime_bundle.NAME: onnxruntime_bundle.open_contender,
        pytorch_eager.NAME: pytorch_eager.open_contender,
    }
    return openers[name](job)

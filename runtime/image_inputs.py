"""What an image tower reads, of whatever a user has: preprocessed volumes on the host or the GPU, a scan just read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .arguments import require_preprocessed
from .backends import Backend, Options
from .backends.base import EngineBackend
from .backends.borrow import borrow
from .backends.sampler import takes
from .engines import LIBRARIES
from .errors import InputError, one_line
from .manifest import Graph, Preprocessing
from .volume import Volume, image_feeds, scan_feeds


class ImageInputs:
    """Makes them.

    Args:
        graph, backend: of the image tower, which may be opened by asking.
    """

    def __init__(self, spec: Preprocessing, options: Options, graph: Callable[[], Graph],
                 backend: Callable[[], Backend]) -> None:
        self._spec, self._options, self._graph, self._backend = spec, options, graph, backend

    def of_volumes(self, volumes: Any) -> dict[str, Any]:
        """Of preprocessed ones ``[B, D, H, W]``: a numpy array, or an array on the GPU.

        Raises:
            InputError: another shape, values outside the window, NaN; on the GPU, with a back end that runs no engines.
        """
        inputs = self._graph().inputs
        if (lying := borrow(volumes)) is not None:
            return self._engine().thin(lying, self._spec, inputs)
        try:
            volumes = np.asarray(volumes)
        except (RuntimeError, TypeError, ValueError) as error:  # PyTorch's of types and gradients, numpy's of odd lists
            raise InputError(f"volumes: no array ({one_line(str(error))}); pass one of numpy, float32") from error
        require_preprocessed(volumes, self._spec)
        return image_feeds(inputs, volumes)

    def of_scan(self, volume: Volume, threads: int) -> dict[str, Any]:
        """Of one that was read and not preprocessed. Raises ``InputError`` as ``preprocess``."""
        inputs = self._graph().inputs
        if self._is_for_gpu(volume):
            return self._engine().preprocess(volume, self._spec, inputs)
        return scan_feeds(inputs, volume, self._spec, threads)

    def _is_for_gpu(self, volume: Volume) -> bool:
        if self._options.preprocess != "auto":
            return self._options.preprocess == "gpu"
        read = sum(math.prod(map(int, info.axes[-3:])) * np.dtype(info.dtype).itemsize for info in self._graph().inputs)
        return takes(volume) and volume.stored.nbytes <= read

    def _engine(self) -> EngineBackend:
        backend = self._backend()
        if not isinstance(backend, EngineBackend):
            raise InputError(f"an array on the GPU: {self._options.backend} on {self._options.device} takes arrays on "
                             f"the host; copy it there, or load the model with one of {', '.join(LIBRARIES)}")
        return backend

"""The lines of a volume that a strided decomposed convolution reads, as the image tower's inputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..manifest import LINE_INPUTS, Preprocessing, TensorInfo
from .preprocess import fit_to_scan, sample
from .types import Volume


def scan_feeds(inputs: Sequence[TensorInfo], volume: Volume, spec: Preprocessing,
               threads: int) -> dict[str, NDArray[np.floating]]:
    """What an image tower reads of one scan, without making a preprocessed volume where it reads only lines of it.

    Returns:
        As ``image_feeds``, for a batch of one.

    Raises:
        InputError: as ``preprocess``.
    """
    volume, spec = fit_to_scan(volume, spec)
    feeds = {}
    for info in inputs:
        depth, height, width = (side // int(kept) for side, kept in zip(spec.shape_dhw, info.axes[-3:], strict=True))
        values = sample(volume, spec, (depth, height, width), threads)[None, None]
        feeds[info.name] = values.astype(info.dtype, copy=False)
    return feeds


def image_feeds(inputs: Sequence[TensorInfo], volumes: NDArray[np.float32]) -> dict[str, NDArray[np.floating]]:
    """What an image tower reads of preprocessed volumes.

    Args:
        inputs: of the graph: one ``volume``, or the three families of ``LINE_INPUTS``.
        volumes: ``[B, D, H, W]``.

    Returns:
        By input name, in its dtype: ``[B, 1, D, H, W]``, or for lines that with every s-th index on two of its axes.
    """
    feeds = {}
    for info in inputs:
        if info.name in LINE_INPUTS:
            taken = (slice(None, None, side // int(kept)) for side, kept in
                     zip(volumes.shape[1:], info.axes[-3:], strict=True))
            feeds[info.name] = np.ascontiguousarray(volumes[:, None, *taken], info.dtype)
        else:
            feeds[info.name] = np.ascontiguousarray(volumes[:, None], info.dtype)
    return feeds

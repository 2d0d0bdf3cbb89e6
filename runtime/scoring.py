"""From cosines to probabilities, as the manifest says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .manifest import ZeroShotTask


def probabilities(cosine: NDArray[np.float32], task: ZeroShotTask) -> NDArray[np.float32]:
    """Scores ``[…]`` of the cosines ``[…, prompts]`` of an image with each class's prompts, positive first."""
    logits = cosine * np.float32(task.similarity_scale) + np.float32(task.similarity_bias)
    return _KINDS[task.score](logits)


def _softmax_over_pair(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """First entry of the softmax over the last axis of ``[..., 2]`` (CLIP, Radford et al., arXiv:2103.00020)."""
    exponent = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponent[..., 0] / exponent.sum(axis=-1)


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sigmoid of the only entry (SigLIP, Zhai et al., arXiv:2303.15343)."""
    # exp of a negative number alone: that of a large positive one would overflow.
    exponent = np.exp(-np.abs(logits[..., 0]))
    return (np.where(logits[..., 0] >= 0, 1, exponent) / (1 + exponent)).astype(np.float32)


_KINDS: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "softmax_over_pair": _softmax_over_pair, "sigmoid": _sigmoid,
}

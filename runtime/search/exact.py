"""Exact search: blocks of one matrix product, so that the gallery may be larger than memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Rows of the gallery at once, 128 MB of 512 float32, and queries.
_BLOCK, _QUERIES = 1 << 16, 256
#: Cosines that differ by less are equal: those of equal texts, for example.
_EQUAL = 1e-7


@dataclass(frozen=True)
class Found:
    """The nearest rows ``[queries, k]`` of the gallery, the nearest first, with their cosines."""

    rows: NDArray[np.int64]
    cosines: NDArray[np.float32]


def nearest(queries: NDArray[np.float32], gallery: NDArray[np.float32], k: int) -> Found:
    """The ``k`` rows of the gallery ``[n, d]`` with the largest product with each query ``[q, d]``, fewer if n < k."""
    rows, values = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
    for start in range(0, len(gallery), _BLOCK):
        product = queries @ np.asarray(gallery[start : start + _BLOCK]).T
        best = _largest(product, k)
        rows = np.concatenate([rows, best + start], axis=1)
        values = np.concatenate([values, np.take_along_axis(product, best, axis=1)], axis=1)
        kept = _largest(values, k)
        rows, values = np.take_along_axis(rows, kept, axis=1), np.take_along_axis(values, kept, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    return Found(np.take_along_axis(rows, order, axis=1), np.take_along_axis(values, order, axis=1))


def nearer(queries: NDArray[np.floating], gallery: NDArray[np.floating]
           ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the row of its own number stands for each query: two counts ``[n]`` of rows of the gallery.

    First those that are nearer to the query ``[n, d]`` than the row of its number in the gallery ``[n, d]``, then those
    that are as near as that (equal reports), itself among them.
    """
    counts = [_nearer(queries[start : start + _QUERIES], gallery, gallery[start : start + _QUERIES])
              for start in range(0, len(queries), _QUERIES)]
    more, equal = np.concatenate(counts, axis=1)
    return more, equal


def _nearer(queries: NDArray[np.floating], gallery: NDArray[np.floating], theirs: NDArray[np.floating]
            ) -> NDArray[np.int64]:
    """Both counts, ``[2, n]``."""
    exact = queries.astype(np.float64)
    own = np.einsum("nd,nd->n", exact, theirs.astype(np.float64))[:, None]
    counts = np.zeros((2, len(queries)), np.int64)
    for start in range(0, len(gallery), _BLOCK):
        difference = exact @ gallery[start : start + _BLOCK].astype(np.float64).T - own
        counts += (difference > _EQUAL).sum(axis=1), (np.abs(difference) <= _EQUAL).sum(axis=1)
    return counts


def _largest(values: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Columns of the ``k`` largest of each row, in any order."""
    if values.shape[1] <= k:
        return np.broadcast_to(np.arange(values.shape[1]), values.shape)
    return np.argpartition(-values, k - 1, axis=1)[:, :k]

"""An approximate index (HNSW, Malkov and Yashunin, arXiv:1603.09320), by usearch. Needs ``pip install '.[search]'``.

usearch and not faiss, which answers as well and faster (docs/stores.md has the comparison): its file is mapped into
memory, so that one question to ten million scans does not begin with reading twenty gigabytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray
from usearch.index import Index

from ..files import atomic_file
from .exact import Found, nearest
from .gallery import Gallery
from .recall import INDEX_NAME, RECALL_NAME, Measured, damaged

#: Neighbours of each node, and how many candidates are looked at when a row is added.
_CONNECTIVITY, _EXPANSION_ADD = 32, 128
#: Candidates that are looked at in a search: the first that reaches the recall is kept.
_EXPANSIONS = (32, 64, 128, 256, 512, 1024)
_PROBES = 256
_BLOCK = 1 << 14


def build_index(gallery: Gallery, k: int, target: float, texts: NDArray[np.float32],
                on_rows: Callable[[int], None] = lambda _: None, threads: int = 0, seed: int = 0) -> Measured:
    """Build the index of a gallery, and measure how many candidates a search must look at.

    Args:
        target: recall of the ``k`` nearest, of every kind of query; if none reaches it, the most candidates are used,
            and the result says what they reach.
        texts: embeddings of texts ``[n, d]``, as others lie where no scan does; none = judged by scans alone.
        on_rows: told how many rows are in it.
        threads: 0 = one for each core.
    """
    matrix = gallery.matrix
    index = Index(ndim=matrix.shape[1], metric="ip", dtype="f16", connectivity=_CONNECTIVITY,
                  expansion_add=_EXPANSION_ADD)
    for start in range(0, len(matrix), _BLOCK):
        block = np.asarray(matrix[start : start + _BLOCK])
        index.add(np.arange(start, start + len(block), dtype=np.uint64), block, threads=threads)
        on_rows(len(index))
    chosen = np.random.default_rng(seed).choice(len(matrix), min(_PROBES, len(matrix)), replace=False)
    queries = {"scans": np.asarray(matrix[np.sort(chosen)])}
    if len(texts):
        queries["texts"] = texts
    exact = {name: nearest(rows, matrix, k) for name, rows in queries.items()}
    probes = {name: len(rows) for name, rows in queries.items()}

    def measure(expansion: int) -> Measured:
        index.expansion_search = expansion
        recall = {name: _recall(_search(index, rows, k, threads), exact[name]) for name, rows in queries.items()}
        return Measured(gallery.state, len(matrix), k, expansion, recall, probes)

    tried = map(measure, _EXPANSIONS[:-1])
    measured = next((one for one in tried if one.least_recall >= target), None) or measure(_EXPANSIONS[-1])
    with atomic_file(gallery.folder / INDEX_NAME) as temporary:
        index.save(str(temporary))
    with atomic_file(gallery.folder / RECALL_NAME) as temporary:
        temporary.write_text(json.dumps(asdict(measured)))
    return measured


def nearest_approximately(queries: NDArray[np.float32], gallery: Gallery, measured: Measured, k: int,
                          threads: int = 0) -> Found:
    """As ``nearest``, by the index; some rows may be others than the nearest, their cosines are exact.

    Raises:
        InputError: the index is damaged.
    """
    path = gallery.folder / INDEX_NAME
    try:
        index = Index.restore(str(path), view=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise damaged(path, error) from error
    if index is None or len(index) != len(gallery.matrix) or index.ndim != gallery.matrix.shape[1]:
        raise damaged(path, ValueError("of another store"))
    index.expansion_search = max(measured.expansion, k)
    found = _search(index, queries, k, threads)
    few = [number for number, one in enumerate(found) if len(one) < min(k, len(index))]
    if few:  # many equal rows can lead the search into a corner
        for number, one in zip(few, nearest(queries[few], gallery.matrix, k).rows, strict=True):
            found[number] = one
    rows = np.stack(found)
    cosines = np.einsum("qd,qkd->qk", queries, np.asarray(gallery.matrix[rows]))
    order = np.argsort(-cosines, axis=1, kind="stable")
    return Found(np.take_along_axis(rows, order, axis=1), np.take_along_axis(cosines, order, axis=1))


def _search(index: Index, queries: NDArray[np.float32], k: int, threads: int) -> list[NDArray[np.int64]]:
    """Rows of the gallery for each query, at most ``k``."""
    found = index.search(np.ascontiguousarray(np.atleast_2d(queries)), min(k, len(index)), threads=threads)
    keys, counts = np.atleast_2d(found.keys), np.atleast_1d(getattr(found, "counts", len(found)))
    return [row[:count].astype(np.int64) for row, count in zip(keys, counts, strict=True)]


def _recall(found: list[NDArray[np.int64]], exact: Found) -> float:
    return float(np.mean([len(set(a.tolist()) & set(b)) / len(b)
                          for a, b in zip(found, exact.rows.tolist(), strict=True)]))

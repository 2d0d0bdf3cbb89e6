"""Exact search beside approximate indexes: which library, and from how many scans on.

``python -m dcformer_deploy.benchmarks.indexes --rows 50000 --out DIR`` (``make indexes``); faiss is measured where it
is installed (``pip install faiss-cpu``). The gallery is synthetic: points of a 24-dimensional space with some noise.
Recall on a store of one's own is what `dcformer index` measures; this compares libraries.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from usearch.index import Index

from ..runtime.cli.output import markdown_table
from ..runtime.files import atomic_file
from ..runtime.machine import machine
from ..runtime.search.exact import nearest

_DIMENSIONS, _INTRINSIC, _NOISE = 512, 24, 0.3
_QUERIES, _K = 100, 20
_CONNECTIVITY, _EXPANSION_ADD = 32, 128
_EXPANSIONS = (32, 64, 128, 256)

_Ask = Callable[[NDArray[np.float32]], NDArray[np.int64]]


@dataclass(frozen=True)
class Row:
    """``open_ms``: from the file to the first answer; ``query_ms``: of one query at a time, median."""

    index: str
    candidates: int | None
    build_s: float | None
    file_mb: float
    open_ms: float | None
    query_ms: float
    recall: float


def synthetic(rows: int, seed: int = 0) -> NDArray[np.float32]:
    """Unit rows ``[rows, 512]``."""
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(1).normal(size=(_INTRINSIC, _DIMENSIONS)).astype(np.float32)
    found = rng.normal(size=(rows, _INTRINSIC)).astype(np.float32) @ basis
    found += np.float32(_NOISE) * rng.standard_normal(found.shape, np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def compare(rows: int, folder: Path) -> list[Row]:
    """Every index on the same gallery and queries."""
    gallery, queries = synthetic(rows), synthetic(_QUERIES, seed=2)
    right = nearest(queries, gallery, _K).rows
    np.save(folder / "gallery.npy", gallery)
    mapped = np.load(folder / "gallery.npy", mmap_mode="r")
    exact = _time("exact, mapped matrix", None, None, folder / "gallery.npy", None,
                  lambda one: nearest(one, mapped, _K).rows, queries, right)
    found = [exact, *_usearch(gallery, queries, right, folder)]
    if importlib.util.find_spec("faiss") is not None:
        found += _faiss(gallery, queries, right, folder)
    return found


def _usearch(gallery: NDArray[np.float32], queries: NDArray[np.float32], right: NDArray[np.int64], folder: Path
             ) -> list[Row]:
    path, start = folder / "index.usearch", time.perf_counter()
    index = Index(ndim=_DIMENSIONS, metric="ip", dtype="f16", connectivity=_CONNECTIVITY, expansion_add=_EXPANSION_ADD)
    index.add(np.arange(len(gallery), dtype=np.uint64), gallery)
    build_s = time.perf_counter() - start
    index.save(str(path))
    start = time.perf_counter()
    opened = Index.restore(str(path), view=True)
    assert opened is not None
    opened.search(queries[0], _K)
    open_ms = (time.perf_counter() - start) * 1e3

    def ask(one: NDArray[np.float32]) -> NDArray[np.int64]:
        return np.atleast_2d(opened.search(one, _K).keys).astype(np.int64)

    rows = []
    for candidates in _EXPANSIONS:
        opened.expansion_search = candidates
        rows.append(_time("usearch, HNSW, f16", candidates, build_s, path, open_ms, ask, queries, right))
    return rows


def _faiss(gallery: NDArray[np.float32], queries: NDArray[np.float32], right: NDArray[np.int64], folder: Path
           ) -> list[Row]:
    import faiss  # pyright: ignore[reportMissingImports]

    path, start = folder / "index.faiss", time.perf_counter()
    index = faiss.IndexHNSWFlat(_DIMENSIONS, _CONNECTIVITY, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = _EXPANSION_ADD
    index.add(gallery)
    build_s = time.perf_counter() - start
    faiss.write_index(index, str(path))
    start = time.perf_counter()
    opened = faiss.read_index(str(path))
    opened.search(queries[:1], _K)
    open_ms = (time.perf_counter() - start) * 1e3
    rows = []
    for candidates in _EXPANSIONS:
        opened.hnsw.efSearch = candidates
        rows.append(_time("faiss, HNSW, f32", candidates, build_s, path, open_ms,
                          lambda one: opened.search(one, _K)[1], queries, right))
    return rows


def _time(name: str, candidates: int | None, build_s: float | None, path: Path, open_ms: float | None, ask: _Ask,
          queries: NDArray[np.float32], right: NDArray[np.int64]) -> Row:
    times, hits = [], 0
    for query, expected in zip(queries, right, strict=True):
        start = time.perf_counter()
        rows = ask(query[None])
        times.append((time.perf_counter() - start) * 1e3)
        hits += len(set(rows[0].tolist()) & set(expected.tolist()))
    return Row(name, candidates, build_s, path.stat().st_size / 1e6, open_ms, statistics.median(times),
               hits / right.size)


def to_markdown(found: list[Row], rows: int) -> str:
    """The report."""
    lines = [f"# The {_K} nearest of {rows:,} embeddings of {_DIMENSIONS}", "",
             f"{machine()}, {time.strftime('%Y-%m-%d')}; {_QUERIES} queries, one at a time, medians; HNSW with "
             f"{_CONNECTIVITY} neighbours.", "",
             *markdown_table(("index", "candidates", "recall", "query", "opening", "file", "building"), [
                 (row.index, str(row.candidates or "-"), f"{row.recall:.4f}", f"{row.query_ms:.2f} ms",
                  f"{row.open_ms:.0f} ms" if row.open_ms is not None else "-", f"{row.file_mb:.0f} MB",
                  f"{row.build_s:.0f} s" if row.build_s is not None else "-") for row in found]), ""]
    return "\n".join(lines)


@click.command()
@click.option("--rows", type=click.IntRange(min=1000), default=50_000, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", required=True)
def command(rows: int, out: Path) -> None:
    """Compare exact search with approximate indexes."""
    with tempfile.TemporaryDirectory(prefix="dcformer-") as folder:
        found = compare(rows, Path(folder))
    content = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "rows": rows,
               "indexes": [dataclasses.asdict(row) for row in found]}
    for ending, text in (("md", to_markdown(found, rows)), ("json", json.dumps(content, indent=2) + "\n")):
        with atomic_file(out / f"indexes-{rows}.{ending}") as temporary:
            temporary.write_text(text, encoding="utf-8")
    click.echo(to_markdown(found, rows))


if __name__ == "__main__":
    command()

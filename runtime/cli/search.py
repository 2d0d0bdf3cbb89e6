"""``dcformer search``."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray

from ..backends.base import MOST_THREADS
from ..bundle import open_bundle
from ..errors import InputError
from ..inputs import slices_together
from ..model import Model, load
from ..scan_files import ScanPath, SliceFiles, file_facts
from ..volume.dicom_source import is_dicom_source
from ..volume.folder import SCANS
from .options import json_option
from .output import announce, print_json, print_table, progress

if TYPE_CHECKING:
    from ..search.exact import Found
    from ..search.gallery import Gallery
    from ..search.recall import Measured

#: From so many rows on an index is used if there is one: below, one matrix product is fast enough (`make indexes`).
_INDEX_FROM = 1_000_000
_SHOWN_FINDINGS = 3


@click.command("search")
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("queries", metavar="QUERY...", nargs=-1, required=True)
@click.option("-k", "count", type=click.IntRange(min=1, max=10_000), default=20, show_default=True,
              help="How many of the nearest scans to show for each query.")
@click.option("--bundle", type=click.Path(path_type=Path), metavar="DIR",
              help="The bundle that the store was made with, if it does not lie where it lay then.")
@click.option("--exact/--approximate", "exact", default=None,
              help="Compare with every scan, or ask the index of `dcformer index`.  [default: the index, if there is "
                   f"one and the store has {_INDEX_FROM:,} scans]")
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads; default: all usable cores.")
@click.option("--series", metavar="UID", help="Of several DICOM series of a QUERY, the one that is meant.")
@json_option
def command(store: Path, queries: tuple[str, ...], count: int, bundle: Path | None, exact: bool | None,
            threads: int | None, series: str | None, as_json: bool) -> None:
    """Find the scans in STORE that are nearest to texts or scans.

    A QUERY that is a file or a folder, or ends like a scan's file, is a scan; it is not found itself.
    So are several DICOM files of one folder together. Everything else is text, such as a sentence of a report.
    Nearness is the cosine of embeddings.
    """
    from ..search.exact import nearest
    from ..search.gallery import open_gallery, require_sound
    from ..search.recall import read_measured

    with progress() as display:
        gallery = open_gallery(store, display.stage)
        measured = None if exact else read_measured(gallery)
        if exact is False and measured is None:
            raise InputError(f"--approximate: {store} has no index, or has changed since; `dcformer index {store}` "
                             "makes one")
        if exact is None and len(gallery.matrix) < _INDEX_FROM:
            measured = None
        display.stage("embedding the queries")
        asked = _queries(queries)
        embeddings, own = _embed(gallery, asked, bundle, threads, series)
        display.stage("searching")
        # One more, as a scan is the nearest to itself.
        if measured is None:
            found = nearest(embeddings, gallery.matrix, count + 1)
        else:
            from ..search.approximate import nearest_approximately

            found = nearest_approximately(embeddings, gallery, measured, count + 1, threads or 0)
    require_sound(gallery, found.cosines)
    if exact is None and measured is None and len(gallery.matrix) >= _INDEX_FROM:
        click.echo(f"{len(gallery.matrix)} scans: `dcformer index {store}` would answer faster from now on", err=True)
    hits = [_hits(gallery, found, number, row, count) for number, row in enumerate(own)]
    how = "exact" if measured is None else _how(measured)
    if as_json:
        print_json({"search": how, "scans": len(gallery.matrix), "results": [
            {"query": str(query), "hits": found} for query, found in zip(asked, hits, strict=True)]})
        return
    for query, rows in zip(asked, hits, strict=True):
        print_table(f"{query} ({how}, of {len(gallery.matrix)})", ("scan", "cosine", "highest scores"), (
            (hit["path"], f"{hit['cosine']:.4f}", _highest(hit["scores"])) for hit in rows))


def _embed(gallery: Gallery, queries: Sequence[str | ScanPath], bundle: Path | None, threads: int | None,
           series: str | None) -> tuple[NDArray[np.float32], list[int | None]]:
    """Unit rows ``[queries, d]``, and the rows of those that are scans of the store as they are now."""
    model: Model | None = None
    rows: list[NDArray[np.float32]] = []
    own: list[int | None] = []
    for query in queries:
        if isinstance(query, str):
            own.append(None)
            model = model or open_model(gallery, bundle, threads)
            rows.append(model.embed_text(query)[0])
            continue
        options = gallery.identity.options
        if series is not None and (isinstance(query, SliceFiles) or is_dicom_source(query)):
            options = {**options, "series": series}
        own.append(_row_now(gallery, query) if options == gallery.identity.options else None)
        if (row := own[-1]) is not None:
            rows.append(np.asarray(gallery.matrix[row]))
            continue
        model = model or open_model(gallery, bundle, threads)
        rows.append(model.embed_image(query, **options))
    return np.stack(rows), own


def _row_now(gallery: Gallery, scan: ScanPath) -> int | None:
    """Of a scan in the store, if its files are what they were; else what the store has of it is another scan."""
    row = gallery.row_of(scan)
    if row is None:
        return None
    entry = gallery.entry(row)
    return row if file_facts(scan) in (None, (entry["bytes"], entry["changed_ns"])) else None


def _queries(words: Sequence[str]) -> list[str | ScanPath]:
    """Texts and scans, in their order."""
    if not all(word.strip() for word in words):
        raise InputError("QUERY: an empty text; expected words, or a scan")
    found: list[str | ScanPath] = []
    for word in words:
        matches = glob.glob(word, recursive=True) if not os.path.exists(word) else []  # noqa: PTH110, PTH207
        is_scan = word.lower().endswith(SCANS) or is_dicom_source(word) or os.path.exists(word)  # noqa: PTH110
        found += map(Path, sorted(matches)) if matches else [Path(word) if is_scan else word]
    return slices_together(found)


def open_model(gallery: Gallery, bundle: Path | None, threads: int | None) -> Model:
    """The model that a store's embeddings come from.

    Raises:
        InputError: it does not lie where it lay then, or is another one.
    """
    from ..store.store import read_info

    folder = bundle or read_info(gallery.store)[1]
    if folder is None or not folder.exists():
        raise InputError(f"{folder or 'bundle'}: the bundle of {gallery.store} is not there; pass --bundle DIR")
    opened, precision = open_bundle(folder, verify=False), gallery.identity.precision
    digest = opened.manifest.results_digest(precision)
    # openvino computes fp32 graphs in bfloat16.
    graphs = {digest, *[opened.manifest.results_digest("fp32")] * (precision == "bf16")}
    if gallery.identity.results_sha256 not in graphs:
        raise InputError(f"{folder}: not the bundle of {gallery.store}, or no longer (its digest for {precision} is "
                         f"{digest[:12]}…, the store says {gallery.identity.results_sha256[:12]}…); pass --bundle DIR")
    if any(opened.manifest.graph(role, precision, "onnxruntime") is None for role in ("image", "text")
           if opened.manifest.graph(role) is not None):
        click.echo(f"warning: queries are embedded in fp32: {folder} has no {precision} for onnxruntime", err=True)
        precision = "fp32"
    model = load(folder, threads=threads, precision=precision)
    announce(model)
    return model


def _hits(gallery: Gallery, found: Found, query: int, own: int | None, count: int) -> list[dict[str, Any]]:
    pairs = [(int(row), float(cosine)) for row, cosine in zip(found.rows[query], found.cosines[query], strict=True)
             if row != own][:count]
    hits = []
    for row, cosine in pairs:
        entry = gallery.entry(row)
        scores = entry["scores"] if gallery.identity.classes else None
        hits.append({"path": entry["path"], "cosine": cosine,
                     "scores": dict(zip(gallery.identity.classes, scores or (), strict=True))})
    return hits


def _how(measured: Measured) -> str:
    recall = ", ".join(f"{value:.3f} for {kind}" for kind, value in measured.recall.items())
    return f"approximate, recall@{measured.k} {recall}"


def _highest(scores: dict[str, float]) -> str:
    highest = sorted(scores.items(), key=lambda item: -item[1])[:_SHOWN_FINDINGS]
    return ", ".join(f"{name} {score:.2f}" for name, score in highest)

"""Observe a bundle's image tower on scans."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from ..runtime.backends import Options
from ..runtime.bundle import Bundle
from ..runtime.cli.output import Stages
from ..runtime.errors import BundleError, DcformerWarning, InputError
from ..runtime.manifest import Graph
from ..runtime.scan_files import sha256_scan
from ..runtime.volume import ReadOptions, read_feeds
from .compensate import Correlations
from .layers import quantizable_layers
from .observe import BUDGET_BYTES, Observer
from .record import Record, data_digest, model_digest, read_record, write_record
from .scans import Scan, too_few


def load_graph(bundle: Bundle, graph: Graph) -> onnx.ModelProto:
    """A graph of a bundle with its weights.

    Raises:
        BundleError: a file changed since the bundle was opened.
    """
    if graph.weights is not None:
        bundle.path(graph.weights)
    return onnx.load(bundle.path(graph.file))


def image_graph(bundle: Bundle) -> tuple[Graph, onnx.ModelProto]:
    """The fp32 image tower that is good anywhere, with its weights. Raises like ``load_graph``."""
    graph = bundle.manifest.graph("image")
    assert graph is not None  # the manifest holds one
    return graph, load_graph(bundle, graph)


def observe(bundle: Bundle, scans: Sequence[Scan], count: int, state: Path, options: Options, display: Stages,
            budget_bytes: int = BUDGET_BYTES) -> tuple[Record, Correlations]:
    """Run ``count`` of the scans through the image tower.

    What was seen is written to ``state`` after every scan, so that an interrupted calibration of the same scans goes on
    there and repeats one scan at most; ``forget`` removes it. A scan that cannot be read is left out with a warning,
    and the next one takes its place.

    Raises:
        InputError: fewer than ``count`` can be read.
    """
    graph, proto = image_graph(bundle)
    spec = bundle.manifest.preprocessing
    model = model_digest(proto)
    detailed = [str(layer.x.name) for layer in quantizable_layers(ir.from_proto(proto).graph)]
    observer = Observer(proto, detailed, options.thread_count, budget_bytes, correlates=True)
    done = _resume(state, model, scans, observer)
    for scan in scans:
        if len(done) == count:
            break
        if scan.path in done:
            display.advance()
            continue
        display.stage(scan.path.name)
        try:
            feeds = read_feeds(scan.path, graph.inputs, spec, ReadOptions(**scan.options), options.thread_count)
        except BundleError:
            raise
        except InputError as error:
            warnings.warn(f"left out: {error}", DcformerWarning, stacklevel=2)
            continue
        observer.observe(feeds)
        done[scan.path] = sha256_scan(scan.path)
        observer.correlations.save(_correlations_of(state))
        write_record(state, _record(model, done, observer))
        display.advance()
    if len(done) < count:
        raise InputError(too_few(len(done), len(scans), count))
    return _record(model, done, observer), observer.correlations


def forget(state: Path) -> None:
    """Remove what ``observe`` wrote."""
    for path in (state, _correlations_of(state)):
        path.unlink(missing_ok=True)


def _correlations_of(state: Path) -> Path:
    return state.with_suffix(".npz")


def _record(model: str, done: dict[Path, str], observer: Observer) -> Record:
    return Record(model, tuple(path.name for path in done), data_digest(done.values()), observer.histograms)


def _resume(state: Path, model: str, scans: Sequence[Scan], observer: Observer) -> dict[Path, str]:
    """Take over what an interrupted calibration of these scans saw; returns their files with their sha256."""
    if not state.exists():
        return {}
    try:
        record = read_record(state, model)
        moments = observer.correlations.read(_correlations_of(state))
    except InputError:  # of another model, or cut off: observed anew
        return {}
    by_name = {scan.path.name: scan.path for scan in scans}
    done = {by_name[name]: sha256_scan(by_name[name]) for name in record.scans if name in by_name}
    if len(done) != len(record.scans) or data_digest(done.values()) != record.data:
        return {}
    observer.histograms.update(record.histograms)
    observer.correlations.take(moments)
    return done

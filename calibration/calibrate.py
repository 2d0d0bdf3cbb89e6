"""Observe a bundle's image tower on scans."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from ..benchmarks.evaluation.state import stamp
from ..runtime.backends import Options
from ..runtime.bundle import Bundle
from ..runtime.cli.output import Stages
from ..runtime.errors import BundleError, DcformerWarning, InputError
from ..runtime.manifest import Graph, Preprocessing
from ..runtime.scan_files import sha256_scan
from ..runtime.volume import ReadOptions, read_feeds
from .compensate import Correlations
from .layers import quantizable_layers
from .observe import BUDGET_BYTES, Observer
from .record import Record, data_digest, model_digest, read_record, scan_digest, write_record
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
    model = model_digest(proto)
    detailed = [str(layer.x.name) for layer in quantizable_layers(ir.from_proto(proto).graph)]
    observer = Observer(proto, detailed, options.thread_count, budget_bytes, correlates=True)

    def read(scan: Scan) -> _Read:
        return _read(scan, graph, bundle.manifest.preprocessing, options.thread_count)

    done = _resume(state, model, scans, observer, read)
    for scan in scans:
        if len(done) == count:
            break
        if scan.path in done:
            display.advance()
            continue
        display.stage(scan.path.name)
        try:
            found = read(scan)
        except BundleError:
            raise
        except InputError as error:
            warnings.warn(f"left out: {error}", DcformerWarning, stacklevel=2)
            continue
        observer.observe(found.feeds)
        done[scan.path] = found.seen
        observer.correlations.save(_correlations_of(state))
        write_record(state, _record(model, done, observer))
        display.advance()
    if len(done) < count:
        raise InputError(too_few(len(done), len(scans), count))
    return _record(model, done, observer), observer.correlations


@dataclass(frozen=True)
class _Seen:
    """A scan: ``sha256`` of its content, and ``digest`` as ``scan_digest``."""

    sha256: str
    digest: str


@dataclass(frozen=True)
class _Read:
    seen: _Seen
    feeds: Mapping[str, NDArray[np.floating]]


def _see(scan: Scan) -> _Seen:
    """Raises ``InputError`` where the scan, or its table of metadata, is not there."""
    try:
        sha256 = sha256_scan(scan.path)
        return _Seen(sha256, scan_digest(sha256, scan.options))
    except OSError as error:
        raise InputError(f"{scan.path}: cannot be read ({error.strerror}: {error.filename})") from error


def _read(scan: Scan, graph: Graph, spec: Preprocessing, threads: int) -> _Read:
    """Raises ``InputError`` where the scan cannot be read, or changes meanwhile."""
    before = stamp(scan.path, scan.options)
    found = _Read(_see(scan), read_feeds(scan.path, graph.inputs, spec, ReadOptions(**scan.options), threads))
    if stamp(scan.path, scan.options) != before:
        raise InputError(f"{scan.path}: changed while it was read, or its table of metadata did")
    return found


def forget(state: Path) -> None:
    """Remove what ``observe`` wrote."""
    for path in (state, _correlations_of(state)):
        path.unlink(missing_ok=True)


def _correlations_of(state: Path) -> Path:
    return state.with_suffix(".npz")


def _record(model: str, done: Mapping[Path, _Seen], observer: Observer) -> Record:
    return Record(model, tuple(seen.digest for seen in done.values()),
                  data_digest(seen.sha256 for seen in done.values()), observer.histograms)


def _resume(state: Path, model: str, scans: Sequence[Scan], observer: Observer, read: Callable[[Scan], _Read]
            ) -> dict[Path, _Seen]:
    """Take over what an interrupted calibration of these scans saw; returns those that it was done with."""
    if not state.exists():
        return {}
    try:
        record = read_record(state, model)
        moments = observer.correlations.read(_correlations_of(state))
    except InputError:  # of another model, or cut off: observed anew
        return {}
    done = _seen_before(record, scans, read)
    if done:
        observer.histograms.update(record.histograms)
        observer.correlations.take(moments)
    return done


def _seen_before(record: Record, scans: Sequence[Scan], read: Callable[[Scan], _Read]) -> dict[Path, _Seen]:
    """The scans of a record, as they are now; none if one of them has changed since, or its table of metadata.

    They come in the order of ``scans``, in which those between them were left out, as they cannot be read.
    """
    done: dict[Path, _Seen] = {}
    for scan in scans:
        if len(done) == len(record.scans):
            return done
        try:
            if (seen := _see(scan)).digest == record.scans[len(done)]:
                done[scan.path] = seen
                continue
            read(scan)
        except BundleError:
            raise
        except InputError:
            continue
        return {}  # one that can be read is not the one that was seen
    return done if len(done) == len(record.scans) else {}

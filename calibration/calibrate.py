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
from ..runtime.volume import ReadOptions, read_scan, scan_feeds
from .compensate import Correlations
from .layers import quantizable_layers
from .observe import BUDGET_BYTES, Observer
from .record import Record, model_digest, read_record, write_record
from .scans import Sample, data_digest

#: A calibration that was interrupted goes on from here.
_UNFINISHED = ".unfinished"


def image_graph(bundle: Bundle) -> tuple[Graph, onnx.ModelProto]:
    """The fp32 image tower that is good anywhere, with its weights.

    Raises:
        BundleError: its file changed.
    """
    graph = bundle.manifest.graph("image")
    assert graph is not None  # the manifest holds one
    if graph.weights is not None:
        bundle.path(graph.weights)
    return graph, onnx.load(bundle.path(graph.file))


def observe(bundle: Bundle, samples: Sequence[Sample], count: int, cache: Path, options: Options, display: Stages,
            budget_bytes: int = BUDGET_BYTES) -> tuple[Record, Correlations]:
    """Run ``count`` of the samples through the image tower and write what was seen to ``cache``.

    The file grows with every scan, under a name of its own until the last; an interrupted calibration of the same scans
    goes on there and repeats one scan at most. A scan that cannot be read is left out with a warning, and the next one
    takes its place.

    Raises:
        InputError: fewer than ``count`` can be read.
    """
    graph, proto = image_graph(bundle)
    spec = bundle.manifest.preprocessing
    digest = model_digest(proto)
    detailed = [str(layer.x.name) for layer in quantizable_layers(ir.from_proto(proto).graph)]
    observer = Observer(proto, detailed, options.thread_count, budget_bytes, correlates=True)
    unfinished = cache.with_name(cache.name + _UNFINISHED)
    done = _resume(unfinished, digest, samples, observer, proto)
    for sample in samples:
        if len(done) == count:
            break
        if sample.path in done:
            display.advance()
            continue
        display.stage(sample.path.name)
        try:
            volume = read_scan(sample.path, spec, ReadOptions(**sample.options))
            feeds = scan_feeds(graph.inputs, volume, spec, options.thread_count)
        except BundleError:
            raise
        except InputError as error:
            warnings.warn(f"left out: {error}", DcformerWarning, stacklevel=2)
            continue
        observer.observe(feeds)
        done.append(sample.path)
        observer.correlations.save(_correlations_of(unfinished))
        write_record(unfinished, _record(digest, done, observer))
        display.advance()
    if len(done) < count:
        raise InputError(f"only {len(done)} of the {len(samples)} scans can be read, but {count} were asked for; pass "
                         f"--samples {len(done)}" if done else f"none of the {len(samples)} scans can be read")
    record = _record(digest, done, observer)
    write_record(cache, record)
    for path in (unfinished, _correlations_of(unfinished)):
        path.unlink(missing_ok=True)
    return record, observer.correlations


def _correlations_of(unfinished: Path) -> Path:
    return unfinished.with_name(unfinished.name + ".npz")


def _record(digest: str, done: Sequence[Path], observer: Observer) -> Record:
    return Record(digest, tuple(path.name for path in done), data_digest(done), observer.histograms)


def _resume(unfinished: Path, digest: str, samples: Sequence[Sample], observer: Observer,
            proto: onnx.ModelProto) -> list[Path]:
    """Take over what an interrupted calibration of these scans saw; returns their files."""
    if not unfinished.exists():
        return []
    try:
        record = read_record(unfinished, digest)
        observer.correlations.load(_correlations_of(unfinished))
    except InputError:
        unfinished.unlink()  # of another model, or cut off: observed anew
        observer.correlations = Correlations.of(proto)
        return []
    names = {sample.path.name: sample.path for sample in samples}
    done = [names[name] for name in record.scans if name in names]
    if len(done) != len(record.scans) or data_digest(done) != record.data:
        observer.correlations = Correlations.of(proto)
        return []
    observer.histograms.update(record.histograms)
    return done

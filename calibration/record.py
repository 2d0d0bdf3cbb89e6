"""What was observed, as a JSON file: it belongs to one model, and saves observing again."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..runtime.errors import InputError
from ..runtime.files import atomic_file, require_file, sha256_file
from .histogram import BINS, Histogram

_FORMAT = "dcformer-deploy calibration 2"
#: Names of the scans' files stood in it, and names may be those of patients.
_WITH_NAMES = "dcformer-deploy calibration 1"


@dataclass(frozen=True)
class Record:
    """Observations of one graph.

    ``model``: digest of the graph and its weights. ``scans``: ``scan_digest`` of each, in their order; empty strings
    from files of an earlier version. ``data``: digest of their contents. ``histograms``: by activation.
    """

    model: str
    scans: tuple[str, ...]
    data: str
    histograms: Mapping[str, Histogram]


def model_digest(proto: onnx.ModelProto) -> str:
    """sha256 of a graph with its weights, whatever file they lie in."""
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


def data_digest(digests: Iterable[str]) -> str:
    """sha256 over the sha256 of files, in their order."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def scan_digest(sha256: str, options: Mapping[str, Any]) -> str:
    """Of a scan's content and of how it was read, wherever it lies and whatever it is called.

    Args:
        sha256: of the scan, as ``sha256_scan``.
        options: as in ``Model.preprocess``; of a table of metadata its content counts.

    Raises:
        OSError: the table cannot be read.
    """
    told = {name: str(value) for name, value in options.items()}
    if (table := options.get("metadata")) is not None:
        told["metadata"] = sha256_file(Path(table))
    return hashlib.sha256(json.dumps([sha256, told], sort_keys=True).encode()).hexdigest()


def write_record(path: Path, record: Record) -> None:
    """Write the file, whole or not at all."""
    activations = {name: {
        "low": _number(h.low), "high": _number(h.high), "top": h.top, "finite": h.finite,
        "counts": base64.b64encode(h.counts.astype("<i8").tobytes()).decode() if h.counts.any() else None,
    } for name, h in record.histograms.items()}
    document = {"format": _FORMAT, "model": record.model, "scans": record.scans, "data": record.data,
                "activations": activations}
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def read_record(path: Path, model: str) -> Record:
    """Read the file.

    Args:
        model: digest of the graph that it is for.

    Raises:
        InputError: not such a file, damaged, or of another model.
    """
    require_file(path, "calibration cache")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] not in (_FORMAT, _WITH_NAMES):
            raise ValueError(f"format {document['format']!r}")
        histograms = {name: _histogram(entry) for name, entry in document["activations"].items()}
        scans = ("" if document["format"] == _WITH_NAMES else str(scan) for scan in document["scans"])
        record = Record(str(document["model"]), tuple(scans), str(document["data"]), histograms)
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a calibration cache of this version, or damaged; calibrate with --data DIR"
                         ) from error
    if record.model != model:
        raise InputError(f"{path}: made for another model ({record.model[:12]}…, this is {model[:12]}…); calibrate "
                         "with --data DIR")
    return record


def _histogram(entry: Mapping[str, Any]) -> Histogram:
    counts = np.zeros(BINS, np.int64)
    if entry["counts"] is not None:
        counts = np.frombuffer(base64.b64decode(entry["counts"], validate=True), "<i8").astype(np.int64)
    if counts.shape != (BINS,) or (counts < 0).any():
        raise ValueError(f"{counts.size} counts")
    low = np.inf if entry["low"] is None else float(entry["low"])
    high = -np.inf if entry["high"] is None else float(entry["high"])
    return Histogram(low, high, float(entry["top"]), bool(entry["finite"]), counts)

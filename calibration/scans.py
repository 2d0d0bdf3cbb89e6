"""Scans for calibration and comparison: any folder of NIfTI files, with CT-RATE's tables if there are any."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..benchmarks.evaluation.dataset import Tables, has_labels, read_dataset
from ..runtime.errors import BundleError, DcformerWarning, InputError
from ..runtime.manifest import Manifest
from ..runtime.volume import ReadOptions, prepare_scan
from ..runtime.volume.folder import find_scans


@dataclass(frozen=True)
class Scan:
    """One file; ``options``: how to read it, as in ``Model.preprocess``; ``labels`` empty where there are none."""

    path: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[bool, ...] = ()


def choose_samples(folder: Path, count: int, split: str | None, options: Mapping[str, Any]) -> list[Scan]:
    """``count`` scans spread evenly over the folder's, and behind them the others, in case some cannot be read.

    Args:
        options: on top of the folder's own metadata.

    Raises:
        InputError: no scan, or fewer than asked for.
    """
    table = options.get("metadata")
    found = find_scans(folder, split, Path(table) if table else None)
    if len(found) < count:
        raise InputError(f"{folder}: {len(found)} scans, but {count} were asked for; pass --samples {len(found)}")
    chosen = dict.fromkeys(index * len(found) // count for index in range(count))
    order = [*chosen, *(index for index in range(len(found)) if index not in chosen)]
    return [Scan(path, {**_options(metadata), **options}) for path, metadata in (found[index] for index in order)]


def read_volumes(scans: Sequence[Scan], count: int, manifest: Manifest, threads: int,
                 on_scan: Callable[[str], None]) -> dict[Path, NDArray[np.float32]]:
    """The first ``count`` of the scans that can be read, preprocessed, ``[D, H, W]`` each; others warn.

    Raises:
        InputError: fewer than ``count`` can be read.
    """
    volumes = {}
    graph = manifest.graph("image")
    inputs = graph.inputs if graph is not None else ()
    for scan in scans:
        if len(volumes) == count:
            break
        on_scan(scan.path.name)
        try:
            volumes[scan.path] = prepare_scan(scan.path, manifest.preprocessing, ReadOptions(**scan.options), threads,
                                              inputs)
        except BundleError:
            raise
        except InputError as error:
            warnings.warn(f"left out: {error}", DcformerWarning, stacklevel=2)
    if len(volumes) < count:
        raise InputError(too_few(len(volumes), len(scans), count))
    return volumes


def too_few(readable: int, found: int, count: int) -> str:
    """What to say when scans cannot be read."""
    if not readable:
        return f"none of the {found} scans can be read"
    return (f"only {readable} of the {found} scans can be read, but {count} were asked for; pass --samples {readable}")


def choose_scans(folder: Path, manifest: Manifest, split: str | None, limit: int | None) -> list[Scan]:
    """Labelled scans if the folder has labels for the bundle's classes, else all.

    Raises:
        InputError: no scans.
    """
    task = manifest.zero_shot
    if task is not None and folder.is_dir() and has_labels(folder, task.classes):
        cases = read_dataset(folder, task.classes, Tables(), split)
        found = [Scan(case.path, _options(case.metadata), case.labels) for case in cases]
    else:
        found = [Scan(path, _options(metadata)) for path, metadata in find_scans(folder, split)]
    return found[:limit]


def _options(metadata: Path | None) -> dict[str, Any]:
    return {} if metadata is None else {"metadata": metadata}

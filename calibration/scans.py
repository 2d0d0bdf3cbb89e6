"""Scans for calibration: any folder of NIfTI files, with CT-RATE's metadata if there is a table of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..benchmarks.evaluation.dataset import find_scans
from ..runtime.errors import InputError
from ..runtime.files import sha256_file


@dataclass(frozen=True)
class Sample:
    """One file and how to read it, as in ``Model.preprocess``."""

    path: Path
    options: Mapping[str, Any]


def choose_samples(folder: Path, count: int, split: str | None, options: Mapping[str, Any]) -> list[Sample]:
    """``count`` scans spread evenly over the folder's, and behind them the others, in case some cannot be read.

    Raises:
        InputError: no scan, or fewer than asked for.
    """
    found = find_scans(folder, split)
    if len(found) < count:
        raise InputError(f"{folder}: {len(found)} scans, but {count} were asked for; pass --samples {len(found)}")
    chosen = [index * len(found) // count for index in range(count)]
    order = [*chosen, *(index for index in range(len(found)) if index not in set(chosen))]
    samples = []
    for index in order:
        path, metadata = found[index]
        samples.append(Sample(path, {"metadata": metadata, **options} if metadata is not None else dict(options)))
    return samples


def data_digest(paths: Sequence[Path]) -> str:
    """sha256 over the contents of files, in their order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(sha256_file(path).encode())
    return digest.hexdigest()

"""What one row of a store holds, and which results may lie in one store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..manifest import PRECISIONS


@dataclass(frozen=True)
class Identity:
    """What all rows of a store have in common; results of another identity are refused.

    ``results_sha256``: of the bundle, as ``Manifest.results_digest`` has it. ``options``: how scans were read, where
    the caller knew better than the files. ``classes``: of the scores, in their order; empty where the bundle has no
    prompts.
    """

    results_sha256: str
    encoder: str
    precision: str
    embedding_dim: int
    classes: tuple[str, ...]
    options: dict[str, Any]

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS or self.embedding_dim < 1:
            raise ValueError(f"precision {self.precision!r}, embedding_dim {self.embedding_dim}")


@dataclass(frozen=True)
class Entry:
    """One scan.

    ``path``: absolute. ``bytes``, ``changed_ns`` (of several files a digest), ``sha256``: of the file as it was read;
    the last is None where it could not be. ``embedding`` [dim], ``scores`` [classes] float32, None with an ``error``.
    ``shape_hwd``, ``spacing_hwd_mm``, ``orientation``: of the scan as read. ``hounsfield``: maps from stored values,
    such as "1 * v - 1024", in the order in which they were applied. ``notes``: what else was done to it, or is odd.
    ``table``: of metadata by which it was read, with its size and time of change.
    """

    path: str
    bytes: int
    changed_ns: int
    sha256: str | None = None
    embedding: NDArray[np.float32] | None = None
    scores: NDArray[np.float32] | None = None
    error: str | None = None
    shape_hwd: tuple[int, ...] | None = None
    spacing_hwd_mm: tuple[float, ...] | None = None
    orientation: str | None = None
    hounsfield: str | None = None
    notes: str | None = None
    table: str | None = None


def schema(identity: Identity) -> pa.Schema:
    """Columns of a part."""
    return pa.schema([
        pa.field("path", pa.string(), nullable=False), pa.field("bytes", pa.int64(), nullable=False),
        pa.field("changed_ns", pa.int64(), nullable=False), ("sha256", pa.string()),
        ("embedding", pa.list_(pa.float32(), identity.embedding_dim)),
        ("scores", pa.list_(pa.float32(), max(1, len(identity.classes)))), ("error", pa.string()),
        ("shape_hwd", pa.list_(pa.int32(), 3)), ("spacing_hwd_mm", pa.list_(pa.float64(), 3)),
        ("orientation", pa.string()), ("hounsfield", pa.string()), ("notes", pa.string()),
        ("table", pa.string())])


def table(entries: list[Entry], identity: Identity) -> pa.Table:
    """A part's content."""
    columns = schema(identity)

    def column(name: str) -> list[Any]:
        values = [getattr(entry, name) for entry in entries]
        return [list(map(float, value)) if isinstance(value, np.ndarray) else value for value in values]

    return pa.table({field.name: pa.array(column(field.name), field.type) for field in columns}, schema=columns)

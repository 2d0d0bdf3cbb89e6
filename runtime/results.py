"""What a model gives, and what it is given once a scan is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prepared:
    """What an image tower reads of a scan, by input: numpy arrays, or arrays on the GPU.

    ``shape_hwd``, ``spacing_hwd_mm``, ``orientation``, ``hounsfield``: of the scan as it was read from a file.
    ``notes``: what else was done to it, such as interpolation.
    ``timings_ms``: of "read" and "preprocess", where they were done.
    """

    volume: str
    feeds: dict[str, Any]
    shape_hwd: tuple[int, ...] | None = None
    spacing_hwd_mm: tuple[float, ...] | None = None
    orientation: str | None = None
    hounsfield: str | None = None
    notes: str | None = None
    timings_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """Result of one scan: probability per class, milliseconds per phase.

    Phases: ``read`` the file, ``preprocess``, ``load`` the graph (once per model), ``image`` tower, ``prompts``
    (once per list of classes), ``score``, and ``total``. An array skips the first two, a detector the last but one two.
    """

    volume: str
    scores: dict[str, float]
    timings_ms: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class ZeroShot(Scores):
    """Scores by prompts."""


@dataclass(frozen=True)
class Classification(Scores):
    """Scores of the fine-tuned detector."""

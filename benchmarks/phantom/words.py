"""What a painter tells the report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Drawn:
    """What was drawn, in a report's words: where, how large, how many."""

    detail: str


def size_in_mm(millimetres: float) -> str:
    """A measurement as reports give it."""
    return f"{round(millimetres)} mm"

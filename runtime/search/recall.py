"""What is known of a gallery's approximate index; reading that needs no usearch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from .gallery import Gallery

INDEX_NAME, RECALL_NAME = "approximate.usearch", "approximate.json"


@dataclass(frozen=True)
class Measured:
    """An index. ``recall``: share of the exact ``k`` nearest that are found, by kind of query, of ``probes`` each."""

    rows: int
    k: int
    expansion: int
    recall: dict[str, float]
    probes: dict[str, int]

    @property
    def least_recall(self) -> float:
        """Of the worst kind."""
        return min(self.recall.values())


def read_measured(gallery: Gallery) -> Measured | None:
    """What is known of the index of a gallery; None without one."""
    try:
        measured = Measured(**json.loads((gallery.folder / RECALL_NAME).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise damaged(gallery.folder / RECALL_NAME, error) from error
    return measured if (gallery.folder / INDEX_NAME).is_file() else None


def damaged(path: Path, error: Exception) -> InputError:
    """What to say of a damaged file."""
    return InputError(f"{path}: damaged ({error}); `dcformer index STORE` makes it anew")

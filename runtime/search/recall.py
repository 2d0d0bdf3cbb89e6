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
    """An index.

    ``gallery``: the state of that which it is of. ``recall``: share of the exact ``k`` nearest that are found, by kind
    of query, of ``probes`` each.
    """

    gallery: str
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
    """What is known of the index of a gallery; None without one, or with that of the store as it was."""
    try:
        measured = Measured(**json.loads((gallery.folder / RECALL_NAME).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise damaged(gallery.folder / RECALL_NAME, error) from error
    return measured if measured.gallery == gallery.state and (gallery.folder / INDEX_NAME).is_file() else None


def damaged(path: Path, error: Exception) -> InputError:
    """What to say of a damaged file."""
    return InputError(f"{path}: damaged ({error}); `dcformer index STORE` makes it anew")

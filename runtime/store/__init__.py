"""Embeddings of many scans in a folder of Parquet files. Needs pyarrow (``pip install '.[store]'``)."""

from __future__ import annotations

from .rows import Entry, Identity
from .store import Store, read_store

__all__ = ["Entry", "Identity", "Store", "read_store"]

"""Embeddings of many scans in a folder of Parquet files. Needs pyarrow (``pip install '.[store]'``)."""

from __future__ import annotations

from .index import Known
from .rows import Entry, Identity
from .store import Store, read_store

__all__ = ["Entry", "Identity", "Known", "Store", "read_store"]

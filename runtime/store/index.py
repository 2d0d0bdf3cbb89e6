"""Which files a store knows, and where which content lies: 57 bytes per row, so that ten millions fit in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: New rows are kept in dictionaries, and merged into the arrays when there are so many.
_MERGE_AT = 1 << 16
_FILE = np.dtype([("bytes", np.int64), ("changed_ns", np.int64), ("failed", np.bool_), ("table", np.uint64)])
_PLACE = np.dtype([("rest", np.uint64), ("part", np.uint32), ("row", np.uint32)])


@dataclass(frozen=True)
class Known:
    """What a store knows of a file: its size and time of change when it was read, and whether that failed.

    ``table``: a key of the table of metadata by which it was read, 0 for none.
    """

    bytes: int
    changed_ns: int
    failed: bool
    table: int = 0


def _content_key(sha256: str) -> tuple[int, int]:
    """The first 128 bits of a hash, in two."""
    return int(sha256[:16], 16), int(sha256[16:32], 16)


class _Sorted:
    """Values by key."""

    def __init__(self, dtype: np.dtype[np.void]) -> None:
        self.keys, self.values = np.empty(0, np.uint64), np.empty(0, dtype)

    def __len__(self) -> int:
        return len(self.keys)

    def get(self, key: int) -> np.void | None:
        at = int(np.searchsorted(self.keys, np.uint64(key)))
        return self.values[at] if at < len(self.keys) and int(self.keys[at]) == key else None

    def merge(self, new: Mapping[int, tuple[Any, ...]]) -> None:
        """Those of ``new`` instead of the old ones of the same keys."""
        if new:
            keys = np.concatenate([np.array(list(new), np.uint64), self.keys])
            values = np.concatenate([np.array(list(new.values()), self.values.dtype), self.values])
            self.keys, first = np.unique(keys, return_index=True)  # the first of each key: new ones
            self.values = values[first]


@dataclass(frozen=True)
class Contents:
    """Contents that need not be embedded again, by two halves of the first 128 bits of their hashes; sorted."""

    keys: NDArray[np.uint64]
    rest: NDArray[np.uint64]

    def __contains__(self, sha256: str) -> bool:
        key, rest = _content_key(sha256)
        at = int(np.searchsorted(self.keys, np.uint64(key)))
        return at < len(self.keys) and int(self.keys[at]) == key and int(self.rest[at]) == rest


class Index:
    """Sorted arrays with the rows of earlier parts, dictionaries with those added since."""

    def __init__(self) -> None:
        self._files, self._contents = _Sorted(_FILE), _Sorted(_PLACE)
        self._new_files: dict[int, Known] = {}
        self._new_contents: dict[int, tuple[int, int, int]] = {}

    def __len__(self) -> int:
        """Files that are known."""
        self._merge()
        return len(self._files)

    def add(self, part: int, rows: Iterable[tuple[str, int, int, str | None, bool, str | None]]) -> None:
        """Take a part's rows, in order: path, bytes, changed_ns, sha256, failed, table. Later ones of a path count.

        A content that was read by a table is not known for other files: another table may say other things of it.
        """
        for number, (path, size, changed_ns, sha256, failed, table) in enumerate(rows):
            self._new_files[path_key(path)] = Known(size, changed_ns, failed, table_key(table))
            if sha256 is not None and not failed and table is None:
                key, rest = _content_key(sha256)
                self._new_contents[key] = (rest, part, number)
        if len(self._new_files) >= _MERGE_AT:
            self._merge()

    def file(self, path: str) -> Known | None:
        """The last row of a path."""
        key = path_key(path)
        if key in self._new_files:
            return self._new_files[key]
        at = self._files.get(key)
        return None if at is None else Known(
            int(at["bytes"]), int(at["changed_ns"]), bool(at["failed"]), int(at["table"]))

    def content(self, sha256: str) -> tuple[int, int] | None:
        """Part and row that hold this content."""
        key, rest = _content_key(sha256)
        found = self._new_contents.get(key) or self._contents.get(key)
        return None if found is None or int(found[0]) != rest else (int(found[1]), int(found[2]))

    def contents(self) -> Contents:
        """Those known now; what is added later does not change it."""
        self._merge()
        return Contents(self._contents.keys, np.ascontiguousarray(self._contents.values["rest"]))

    def _merge(self) -> None:
        self._files.merge({key: (known.bytes, known.changed_ns, known.failed, known.table)
                           for key, known in self._new_files.items()})
        self._contents.merge(self._new_contents)
        self._new_files, self._new_contents = {}, {}


def table_key(table: str | None) -> int:
    """64 bits that stand for ``Entry.table``."""
    return 0 if table is None else path_key(table)


def path_key(path: str) -> int:
    """64 bits that stand for a path."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest(), "little")

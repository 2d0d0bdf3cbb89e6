"""A store's embeddings as one matrix on disk that is mapped into memory, with what each row is.

It lies in the store, in the folder ``search``, and is made anew when the store has changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..errors import InputError
from ..files import atomic_folder
from ..store.index import path_key
from ..store.rows import Identity
from ..store.store import parts, read_info

FOLDER = "search"
_INFO, _MATRIX, _ROWS = "gallery.json", "embeddings.npy", "rows.arrow"
_SCHEMA = pa.schema([("path", pa.large_string()), ("part", pa.large_string()), ("row", pa.int64())])


@dataclass(frozen=True)
class Gallery:
    """``matrix``: ``[n, d]`` float32, unit rows, on disk. ``folder``: where it lies, and an index may."""

    store: Path
    folder: Path
    identity: Identity
    matrix: NDArray[np.float32]
    rows: pa.Table

    def path(self, row: int) -> str:
        """Of the scan."""
        return self.rows.column("path")[row].as_py()

    def row_of(self, path: Path) -> int | None:
        """Of a scan in the store."""
        row = pc.index(self.rows.column("path"), str(path.absolute())).as_py()
        return None if row < 0 else row

    def entry(self, row: int) -> dict[str, Any]:
        """All that the store says of a scan but its embedding."""
        part, number = (self.rows.column(name)[row].as_py() for name in ("part", "row"))
        columns = [name for name in pq.read_schema(self.store / part).names if name != "embedding"]
        return pq.read_table(self.store / part, columns=columns).slice(number, 1).to_pylist()[0]


def open_gallery(store: Path, on_stage: Callable[[str], None] = lambda _: None) -> Gallery:
    """Open the matrix of a store; make it if there is none yet, or the store has changed since.

    Raises:
        InputError: no store, nothing embedded in it, or no permission to write there.
    """
    identity, _ = read_info(store)
    folder = store / FOLDER
    state = _state(store)
    if _read_state(folder) != state:
        on_stage(f"{store}: gathering its embeddings")
        with atomic_folder(folder, replace_if_it_holds=_INFO) as new:
            _write(new, store, identity)
            (new / _INFO).write_text(json.dumps(state))
    try:
        matrix = np.load(folder / _MATRIX, mmap_mode="r", allow_pickle=False)
        with pa.memory_map(str(folder / _ROWS)) as file:
            rows = pa.ipc.open_file(file).read_all()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{folder}: damaged ({error}); remove this folder, it will be made anew") from error
    return Gallery(store, folder, identity, matrix, rows)


def _state(store: Path) -> list[list[Any]]:
    return [[path.name, (status := path.stat()).st_size, status.st_mtime_ns] for path in parts(store)]


def _read_state(folder: Path) -> list[list[Any]] | None:
    try:
        return json.loads((folder / _INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(new: Path, store: Path, identity: Identity) -> None:
    """One part after the other, so that memory does not grow with the store."""
    chosen = _last_rows(store)
    count = sum(len(rows) for rows in chosen.values())
    if not count:
        raise InputError(f"{store}: nothing has been embedded in it; nothing to search")
    matrix = np.lib.format.open_memmap(new / _MATRIX, "w+", np.float32, (count, identity.embedding_dim))
    at = 0
    with pa.OSFile(str(new / _ROWS), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        for part, rows in chosen.items():
            table = pq.read_table(part, columns=["path", "embedding"]).take(pa.array(rows))
            flat = table.column("embedding").combine_chunks().flatten()
            matrix[at : at + len(rows)] = flat.to_numpy().reshape(len(rows), -1)
            at += len(rows)
            writer.write_table(pa.table([table.column("path").cast(pa.large_string()),
                                         pa.array([part.name] * len(rows), pa.large_string()), pa.array(rows)],
                                        schema=_SCHEMA))
    matrix.flush()


def _last_rows(store: Path) -> dict[Path, NDArray[np.int64]]:
    """By part, the rows that are the last of their path and have an embedding."""
    there = parts(store)
    keys, good = [np.empty(0, np.uint64)], [np.empty(0, bool)]
    for part in there:
        table = pq.read_table(part, columns=["path", "error"])
        keys.append(np.fromiter(map(path_key, table.column("path").to_pylist()), np.uint64, len(table)))
        good.append(table.column("error").combine_chunks().is_null().to_numpy(zero_copy_only=False))
    every = np.concatenate(keys)
    last = np.zeros(len(every), bool)
    last[len(every) - 1 - np.unique(every[::-1], return_index=True)[1]] = True  # the first from behind
    kept = last & np.concatenate(good)
    ends = np.cumsum([len(part) for part in keys])
    chosen = {part: np.flatnonzero(kept[start:end]) for part, start, end in
              zip(there, ends[:-1], ends[1:], strict=True)}
    return {part: rows for part, rows in chosen.items() if len(rows)}

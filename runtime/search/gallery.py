"""A store's embeddings as one matrix on disk that is mapped into memory, with what each row is.

It lies in the store, in the folder ``search``, and is made anew when the store has changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..errors import InputError
from ..files import atomic_folder, writing_error
from ..scan_files import ScanPath, path_text
from ..store.index import path_key
from ..store.rows import Identity, schema
from ..store.store import parts, read_info, read_part

FOLDER = "search"
_INFO, _MATRIX, _ROWS, _LOCK = "gallery.json", "embeddings.npy", "rows.arrow", "search.lock"
#: Rounding may go a little beyond 1.
_LARGEST_COSINE = 1.01
_SCHEMA = pa.schema([("path", pa.large_string()), ("part", pa.large_string()), ("row", pa.int64())])


@dataclass(frozen=True)
class Gallery:
    """``matrix``: ``[n, d]`` float32, unit rows, on disk. ``folder``: where it lies, and an index may.

    ``state``: of the store that it was made of.
    """

    store: Path
    folder: Path
    identity: Identity
    matrix: NDArray[np.float32]
    rows: pa.Table
    state: str

    def path(self, row: int) -> str:
        """Of the scan."""
        return self._cell("path", row)

    def row_of(self, path: ScanPath) -> int | None:
        """Of a scan in the store."""
        row = pc.index(self.rows.column("path"), path_text(path.absolute())).as_py()
        return None if row < 0 else row

    def entry(self, row: int) -> dict[str, Any]:
        """All that the store says of a scan but its embedding."""
        part, number = self._cell("part", row), self._cell("row", row)
        if not isinstance(number, int) or number < 0 or not isinstance(self._cell("path", row), str):
            raise _damaged(self.folder, f"row {number!r}")
        columns = [name for name in schema(self.identity).names if name != "embedding"]
        if part not in {path.name for path in parts(self.store)}:
            raise _damaged(self.folder, f"no part {part!r}")
        found = read_part(self.store / part, self.identity, columns).slice(number, 1).to_pylist()
        if not found:
            raise _damaged(self.folder, f"no row {number} in {part}")
        return found[0]

    def _cell(self, column: str, row: int) -> Any:
        try:
            return self.rows.column(column)[row].as_py()
        except (ValueError, IndexError) as error:
            raise _damaged(self.folder, str(error)) from error


def open_gallery(store: Path, on_stage: Callable[[str], None] = lambda _: None) -> Gallery:
    """Open the matrix of a store; make it if there is none yet, or the store has changed since.

    Raises:
        InputError: no store, nothing embedded in it, a damaged part, no space, or no permission to write there.
    """
    identity, _ = read_info(store)
    folder = store / FOLDER
    with _one_at_a_time(store):
        state = _state(store)
        if _read_state(folder) != state:
            on_stage(f"{store}: gathering its embeddings")
            for leftover in store.glob(f".{FOLDER}.*.tmp"):  # of one that was killed
                shutil.rmtree(leftover)
            with atomic_folder(folder, replace_if_it_holds=_INFO) as new:
                _write(new, store, identity)
                (new / _INFO).write_text(state)
        try:
            matrix = np.load(folder / _MATRIX, mmap_mode="r", allow_pickle=False)
            with pa.memory_map(str(folder / _ROWS)) as file:
                rows = pa.ipc.open_file(file).read_all()
        except (OSError, ValueError, EOFError, SyntaxError, TokenError, pa.ArrowException) as error:
            raise _damaged(folder, str(error)) from error
        if (matrix.shape, matrix.dtype) != ((len(rows), identity.embedding_dim), np.float32) or rows.schema != _SCHEMA:
            raise _damaged(folder, f"{matrix.dtype} {list(matrix.shape)} for {len(rows)} rows")
    return Gallery(store, folder, identity, matrix, rows, hashlib.sha256(state.encode()).hexdigest())


def require_sound(gallery: Gallery, cosines: NDArray[np.float32]) -> None:
    """Raise InputError where what was found shows that the matrix is damaged."""
    if not np.isfinite(cosines).all() or np.abs(cosines).max(initial=0) > _LARGEST_COSINE:
        raise _damaged(gallery.folder, "cosines that are none")


def _damaged(folder: Path, what: str) -> InputError:
    return InputError(f"{folder}: damaged ({what}); remove this folder, it will be made anew")


@contextmanager
def _one_at_a_time(store: Path) -> Iterator[None]:
    """Nobody replaces the folder while another reads or makes it; where nothing can be written nobody replaces it."""
    try:
        lock = os.open(store / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        yield
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _state(store: Path) -> str:
    """Of the parts; another one, another text."""
    return json.dumps([[path.name, (status := path.stat()).st_size, status.st_mtime_ns] for path in parts(store)])


def _read_state(folder: Path) -> str | None:
    try:
        return (folder / _INFO).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _write(new: Path, store: Path, identity: Identity) -> None:
    """One part after the other, so that memory does not grow with the store."""
    chosen = _last_rows(store, identity)
    count = sum(len(rows) for rows in chosen.values())
    if not count:
        raise InputError(f"{store}: nothing has been embedded in it; nothing to search")
    header = {"descr": "<f4", "fortran_order": False, "shape": (count, identity.embedding_dim)}
    try:
        # Written, not mapped: a disk that is full is an error then, and not the program's sudden end.
        with (new / _MATRIX).open("wb") as matrix, pa.OSFile(str(new / _ROWS), "wb") as file, \
                pa.ipc.new_file(file, _SCHEMA) as writer:
            np.lib.format.write_array_header_1_0(matrix, header)
            for part, rows in chosen.items():
                table = read_part(part, identity, ["path", "embedding"]).take(pa.array(rows))
                matrix.write(table.column("embedding").combine_chunks().flatten().to_numpy().astype("<f4").tobytes())
                writer.write_table(pa.table([table.column("path").cast(pa.large_string()),
                                             pa.array([part.name] * len(rows), pa.large_string()), pa.array(rows)],
                                            schema=_SCHEMA))
    except OSError as error:
        raise writing_error(store / FOLDER, error) from error


def _last_rows(store: Path, identity: Identity) -> dict[Path, NDArray[np.int64]]:
    """By part, the rows that are the last of their path and have an embedding."""
    there = parts(store)
    keys, good = [np.empty(0, np.uint64)], [np.empty(0, bool)]
    for part in there:
        table = read_part(part, identity, ["path", "error"])
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

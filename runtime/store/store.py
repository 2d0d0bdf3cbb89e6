"""A folder of Parquet parts: written whole or not at all, by one program at a time, and gone on with after any end.

``store.json`` says whose results these are. A part is written under a temporary name, flushed to disk, then renamed, so
whatever ends the program leaves whole parts, and at most a temporary file that the next start removes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import dacite
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DcformerWarning, InputError
from ..files import atomic_folder, open_locked, writing_error
from .index import Index
from .rows import Entry, Identity, schema, table

FORMAT = "dcformer-deploy store 2"
INFO_NAME = "store.json"
_LOCK_NAME = "lock"
_PART = re.compile(r"part-(\d{6,})\.parquet")
_TEMPORARY = ".tmp"
#: A part is written after so many rows, or so many seconds.
PART_ROWS, PART_SECONDS = 512, 30.0


class Store:
    """A store that is open for writing; a context manager.

    ``index``: which files it knows, and where which content lies.

    Args:
        bundle: where it lies, for whoever reads the store; only a new one takes it.

    Raises:
        InputError: not a store, of another identity, or in use by another program.
    """

    def __init__(self, folder: Path, identity: Identity, bundle: Path | None = None) -> None:
        self.folder, self._identity = folder, identity
        self._waiting: list[Entry] = []
        self._since = time.monotonic()
        self._is_new = not folder.exists()
        if self._is_new:
            with atomic_folder(folder) as new:
                info = {"format": FORMAT, "bundle": str(bundle.absolute()) if bundle is not None else None,
                        **dataclasses.asdict(identity)}
                (new / INFO_NAME).write_text(json.dumps(info, indent=2))
        _require_same(folder, identity)
        self._lock = open_locked(folder / _LOCK_NAME, f"{folder}: another program writes to it; wait for its end, or "
                                 "choose another --out")
        try:
            for leftover in folder.glob(f"part-*{_TEMPORARY}"):
                leftover.unlink()
            self.index = Index()
            self._next = 0
            for part in parts(folder):
                self._next = _number(part) + 1
                self._take(part)
        except BaseException:
            os.close(self._lock)
            raise

    def _take(self, part: Path) -> None:
        """Learn what a part holds; one that cannot be read is set aside."""
        try:
            _require_columns(part, self._identity)
            rows = pq.read_table(part, columns=["path", "bytes", "changed_ns", "sha256", "error", "table"],
                                 page_checksum_verification=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            aside = part.with_suffix(".damaged")
            part.rename(aside)
            warnings.warn(f"{part}: damaged ({error}); renamed to {aside.name}, its scans are embedded again",
                          DcformerWarning, stacklevel=4)
            return
        failed = rows.column("error").is_valid().to_pylist()
        columns = (rows.column(name).to_pylist() for name in ("path", "bytes", "changed_ns", "sha256"))
        self.index.add(_number(part), zip(*columns, failed, rows.column("table").to_pylist(), strict=True))

    def has_content(self, sha256: str) -> bool:
        """Whether a file with this content has been embedded."""
        return self.index.content(sha256) is not None or any(
            entry.sha256 == sha256 and entry.error is None and entry.table is None for entry in self._waiting)

    def same_content(self, sha256: str) -> Entry | None:
        """The row of another file with the same content."""
        for entry in self._waiting:
            if entry.sha256 == sha256 and entry.error is None and entry.table is None:
                return entry
        if (place := self.index.content(sha256)) is None:
            return None
        part, index = place
        row = read_part(self.folder / part_name(part), self._identity).slice(index, 1)
        values = row.to_pylist()[0]
        vectors = {name: row.column(name).combine_chunks().flatten().to_numpy() if values[name] is not None else None
                   for name in ("embedding", "scores")}
        return Entry(**{**values, **vectors})

    def append(self, entry: Entry) -> None:
        """Add a row; it is on disk once its part is full, or half a minute old, or the store is closed."""
        self._waiting.append(entry)
        if len(self._waiting) >= PART_ROWS or time.monotonic() - self._since > PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits, as a part."""
        if not self._waiting:
            return
        path = self.folder / part_name(self._next)
        temporary = path.with_suffix(_TEMPORARY)
        try:
            pq.write_table(table(self._waiting, self._identity), temporary, compression="zstd",
                           write_page_checksum=True)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.rename(path)
            _sync_folder(self.folder)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise writing_error(path, error, ", then start again: what is finished is kept") from error
        self.index.add(self._next, ((entry.path, entry.bytes, entry.changed_ns, entry.sha256, entry.error is not None,
                                     entry.table) for entry in self._waiting))
        self._waiting, self._since, self._next = [], time.monotonic(), self._next + 1

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        whole = False
        try:
            self.flush()
            whole = kind is None
        finally:
            if not whole:
                self._remove_if_empty()  # before the lock is given up: someone else may begin a store here then
            os.close(self._lock)

    def _remove_if_empty(self) -> None:
        """A store that this program began, and nothing came of."""
        if self._is_new and not parts(self.folder):
            for name in (_LOCK_NAME, INFO_NAME):
                (self.folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # someone else put something there
                self.folder.rmdir()


def read_part(path: Path, identity: Identity, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of a part; None = all columns.

    Raises:
        InputError: damaged, or with other columns than a store of this identity has.
    """
    try:
        _require_columns(path, identity)
        return pq.read_table(path, columns=columns, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _require_columns(path: Path, identity: Identity) -> None:
    found, expected = pq.read_schema(path), schema(identity)
    if not found.equals(expected):
        wrong = [field.name for field in expected if field.name not in found.names or found.field(field.name) != field]
        raise InputError(f"{path}: damaged, or {INFO_NAME} is, or it is of another store (column "
                         f"{', '.join(wrong) or 'order'}); move it away, and `dcformer embed` makes its rows again")


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: damaged ({error}); move it away, and `dcformer embed` makes its rows again")


def part_name(number: int) -> str:
    """Of a part's file."""
    return f"part-{number:06d}.parquet"


def _number(part: Path) -> int:
    return int(part.stem.split("-")[1])


def parts(folder: Path) -> list[Path]:
    """Parts in the order in which they were written."""
    return sorted((path for path in folder.iterdir() if _PART.fullmatch(path.name)), key=_number)


def read_info(folder: Path) -> tuple[Identity, Path | None]:
    """Whose results a store holds, and where the bundle lay that they come from.

    Raises:
        InputError: not a store, or of another version.
    """
    try:
        content = json.loads((folder / INFO_NAME).read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError
        bundle = content.pop("bundle")
        identity = dacite.from_dict(Identity, content, dacite.Config(strict=True, cast=[tuple]))
        return identity, Path(bundle) if bundle is not None else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, dacite.DaciteError) as error:
        raise InputError(f"{folder}: not a store of this version (no usable {INFO_NAME}); `dcformer embed --out` makes "
                         "one") from error


def read_store(folder: str | Path) -> pa.Table:
    """All rows, the last of each path, failed ones included; columns as ``Entry``, with the identity as metadata.

    Raises:
        InputError: not a store.
    """
    folder = Path(folder)
    identity = read_info(folder)[0]
    whole = pa.concat_tables([schema(identity).empty_table(), *(read_part(part, identity) for part in parts(folder))])
    last = {path: index for index, path in enumerate(whole.column("path").to_pylist())}
    found = whole.take(pa.array(sorted(last.values()), pa.int64()))
    return found.replace_schema_metadata({"dcformer": json.dumps(dataclasses.asdict(identity))})


def _require_same(folder: Path, identity: Identity) -> None:
    there, wanted = (json.loads(json.dumps(dataclasses.asdict(one))) for one in (read_info(folder)[0], identity))
    # What has a name first: a digest differs, too, where the precision does.
    for name, value in sorted(wanted.items(), key=lambda item: item[0] == "results_sha256"):
        if there[name] != value:
            raise InputError(f"{folder}: a store of other results: its {name} is {there[name]!r}, not {value!r}; "
                             "choose another --out")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""What is already computed in an evaluation, on disk line by line, so that an interrupted one goes on where it stopped.

The file belongs to one bundle, data set and set of options: its first line names them, and so does its own name unless
the user chose that.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.errors import InputError
from ...runtime.files import cache_folder, open_locked, writing_error
from ...runtime.scan_files import ScanPath, file_facts, table_of

#: Of the first line, and of those of versions that did not say what a state belongs to.
_BEGINS = (b'{"identity": ', b'{"key": ')


def state_path(identity: Mapping[str, Any]) -> Path:
    """Where the state of an evaluation with this identity lies, in the user's cache folder."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
    return cache_folder() / "evaluate" / f"{digest}.jsonl"


def library_of(description: str) -> str:
    """What a back end says of itself, for an identity: without the threads, which change no more than last bits."""
    return ", ".join(part for part in description.split(", ") if not part.endswith(" threads"))


def stamp(path: ScanPath, options: Mapping[str, Any]) -> str:
    """Changes when a scan does, or the table of metadata by which it is read: sizes and times of change.

    Args:
        options: how it is read, as in ``Model.preprocess``.

    Raises:
        InputError: the scan is not there.
    """
    if (facts := file_facts(path)) is None:
        raise InputError(f"{path}: cannot be read")
    return " ".join(map(str, (*facts, table_of(options) or "")))


class State:
    """Arrays by key, each with the stamp of what it was computed from.

    Args:
        file: descriptor that is open for appending.
    """

    def __init__(self, path: Path, file: int, known: dict[str, tuple[str, NDArray[np.float32]]]) -> None:
        self._path, self._file, self._known = path, file, known

    def get(self, key: str, stamped: str) -> NDArray[np.float32] | None:
        """The array, unless it was computed from another version of its source."""
        entry = self._known.get(key)
        return entry[1] if entry is not None and entry[0] == stamped else None

    def put(self, key: str, stamped: str, value: NDArray[np.float32]) -> None:
        """Remember an array; it is in the file when this returns.

        Raises:
            DiskFull, InputError: the file cannot be written.
        """
        self._known[key] = (stamped, value)
        data = base64.b64encode(np.ascontiguousarray(value, np.float32).tobytes()).decode()
        try:
            _append(self._file, {"key": key, "stamp": stamped, "shape": value.shape, "data": data})
        except OSError as error:
            raise writing_error(self._path, error, ", then start again: what is finished is kept") from error


def _append(file: int, entry: Mapping[str, Any]) -> None:
    line = json.dumps(entry).encode() + b"\n"
    while line:
        line = line[os.write(file, line) :]


@contextmanager
def open_state(path: Path, identity: Mapping[str, Any], fresh: bool = False) -> Iterator[State]:
    """Open or begin the state at ``path``; it is deleted when the block succeeds, kept when it does not.

    Args:
        identity: all that decides what is computed; JSON. A state of another one is refused.
        fresh: forget what is there.

    Raises:
        InputError: the file cannot be written, is something else than a state, of another identity, or in use.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _lock(path)
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        try:
            state = State(path, file, _begin(path, file, json.loads(json.dumps(identity)), fresh))
        except OSError as error:
            raise _unusable(path, error) from error
        yield state
        path.unlink(missing_ok=True)  # before the lock is given up: someone else may begin a state here then
    finally:
        os.close(file)


def _unusable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot keep the state of the evaluation there ({error.strerror}); pass --state FILE")


def _lock(path: Path) -> int:
    """The file, made if need be, open for appending by this program alone."""
    while True:
        file = open_locked(path, f"{path}: another evaluation keeps its state there; wait for its end, or choose "
                           "another --state", os.O_APPEND)
        # Between its opening and the lock, whoever held it may have removed it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)


def _begin(path: Path, file: int, identity: dict[str, Any], fresh: bool) -> dict[str, tuple[str, NDArray[np.float32]]]:
    """What is known already, in a file that ends with a whole line, and has a first one."""
    if not stat.S_ISREG(os.fstat(file).st_mode) or not _is_state(os.pread(file, max(map(len, _BEGINS)), 0)):
        raise InputError(f"{path}: not the state of an evaluation, and would be overwritten; choose another --state")
    known, end = ({}, 0) if fresh else _read(path, identity)
    os.ftruncate(file, end)  # a line cut off by an interruption would spoil the next one
    if not end:
        _append(file, {"identity": identity})
    return known


def _is_state(begins: bytes) -> bool:
    """What is there is changed, and removed in the end: only if an evaluation has left it, if only a part of a line."""
    return any(begin.startswith(begins[: len(begin)]) for begin in _BEGINS)


def _read(path: Path, identity: dict[str, Any]) -> tuple[dict[str, tuple[str, NDArray[np.float32]]], int]:
    """What whole lines hold, and where the last of them ends; what is damaged is computed again."""
    known: dict[str, tuple[str, NDArray[np.float32]]] = {}
    end = 0
    with path.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            if not end:
                _require_same(path, line, identity)
            end += len(line)
            try:
                entry = json.loads(line)
                data = np.frombuffer(base64.b64decode(entry["data"], validate=True), np.float32)
                known[entry["key"]] = (entry["stamp"], data.reshape(entry["shape"]))
            except (ValueError, KeyError, TypeError, binascii.Error):
                continue
    return known, end


def _require_same(path: Path, line: bytes, identity: dict[str, Any]) -> None:
    """Raise InputError unless the first line names this identity."""
    advice = "pass --fresh to begin anew, or another --state"
    try:
        there = dict(json.loads(line)["identity"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: does not say which evaluation's state it is (damaged, or of an earlier version); "
                         f"{advice}") from error
    for name in dict.fromkeys((*identity, *there)):
        if there.get(name) != identity.get(name):
            raise InputError(f"{path}: the state of another evaluation: its {name} is {there.get(name)!r}, not "
                             f"{identity.get(name)!r}; {advice}")

"""What is already computed in an evaluation, on disk line by line, so that an interrupted one goes on where it stopped.

The file belongs to one bundle, data set and set of options: its name is a digest of them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from ...runtime.errors import InputError
from ...runtime.files import cache_folder
from ...runtime.scan_files import file_facts

#: Of every line that ``State.put`` writes.
_BEGINS = b'{"key": '


def state_path(identity: Mapping[str, Any]) -> Path:
    """Where the state of an evaluation with this identity lies, in the user's cache folder."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
    return cache_folder() / "evaluate" / f"{digest}.jsonl"


def stamp(path: Path) -> str:
    """Changes when the file does: size and time of modification."""
    if (facts := file_facts(path)) is None:
        raise InputError(f"{path}: cannot be read")
    return "{}-{}".format(*facts)


class State:
    """Arrays by key, each with the stamp of what it was computed from."""

    def __init__(self, file: TextIO, known: dict[str, tuple[str, NDArray[np.float32]]]) -> None:
        self._file, self._known = file, known

    def get(self, key: str, stamped: str) -> NDArray[np.float32] | None:
        """The array, unless it was computed from another version of its source."""
        entry = self._known.get(key)
        return entry[1] if entry is not None and entry[0] == stamped else None

    def put(self, key: str, stamped: str, value: NDArray[np.float32]) -> None:
        """Remember an array; it is on disk when this returns."""
        self._known[key] = (stamped, value)
        data = base64.b64encode(np.ascontiguousarray(value, np.float32).tobytes()).decode()
        self._file.write(json.dumps({"key": key, "stamp": stamped, "shape": value.shape, "data": data}) + "\n")
        self._file.flush()


@contextmanager
def open_state(path: Path, fresh: bool) -> Iterator[State]:
    """Open or begin the state at ``path``; it is deleted when the block succeeds, kept when it does not.

    Raises:
        InputError: the file cannot be written, or is something else than a state.
    """
    try:
        _require_state(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        known = {} if fresh else _read(path)
        # Rewritten, so that a line cut off by an interruption does not spoil the next one.
        with path.open("w", encoding="utf-8") as file:
            state = State(file, {})
            for key, (stamped, value) in known.items():
                state.put(key, stamped, value)
            yield state
    except OSError as error:
        raise InputError(f"{path}: cannot keep the state of the evaluation there ({error.strerror}); pass --state FILE"
                         ) from error
    path.unlink(missing_ok=True)


def _require_state(path: Path) -> None:
    """What is there is overwritten, and removed in the end: only if an evaluation has left it."""
    if not path.exists():
        return
    with path.open("rb") as file:
        begins = file.read(len(_BEGINS))
    if not _BEGINS.startswith(begins):  # a beginning of the beginning: cut off in the first line
        raise InputError(f"{path}: not the state of an evaluation, and would be overwritten; choose another --state")


def _read(path: Path) -> dict[str, tuple[str, NDArray[np.float32]]]:
    """Whole lines only; what is damaged is computed again."""
    known: dict[str, tuple[str, NDArray[np.float32]]] = {}
    if not path.exists():
        return known
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            data = np.frombuffer(base64.b64decode(entry["data"], validate=True), np.float32)
            known[entry["key"]] = (entry["stamp"], data.reshape(entry["shape"]))
        except (ValueError, KeyError, TypeError, binascii.Error):
            continue
    return known

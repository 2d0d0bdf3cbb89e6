"""What a process needs that was forked from one with threads, of which it has only the one that forked."""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType


class ForkableLock:
    """A lock that a forked process finds free, as whoever held it is not there to release it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _LOCKS.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        if self._lock.locked():  # but where this thread forked while it held it
            self._lock.release()

    def renew(self) -> None:
        """In the new process."""
        self._lock = threading.Lock()


_LOCKS: weakref.WeakSet[ForkableLock] = weakref.WeakSet()


def _renew_locks() -> None:
    for lock in list(_LOCKS):
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)

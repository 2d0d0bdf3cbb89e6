"""The next item's work while this one's result is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_A = TypeVar("_A")
_B = TypeVar("_B")


def ahead(items: Iterable[_A], work: Callable[[_A], _B]) -> Iterator[tuple[_A, Callable[[], _B]]]:
    """Each item with a function that waits for its result, or raises what ``work`` raised; in order, one item ahead.

    At most two results exist at once beside the one in use.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        waiting = None
        for item in items:
            future = pool.submit(work, item)
            if waiting is not None:
                yield waiting
            waiting = (item, future.result)
        if waiting is not None:
            yield waiting
    finally:
        pool.shutdown(cancel_futures=True)

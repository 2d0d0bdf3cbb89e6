"""One item ahead: in order, at the same time, and errors where they belong."""

import threading

import pytest

from dcformer_deploy.runtime.ahead import ahead


def test_the_next_is_made_meanwhile_and_no_more():
    """Deterministic: the second item's work ends only after the first was used, and the third waits its turn."""
    started, used = [threading.Event() for _ in range(4)], threading.Event()

    def work(item: int) -> int:
        started[item].set()
        if item == 1:
            assert used.wait(10)
        return item * item

    results = []
    for item, result in ahead(range(4), work):
        results.append((item, result()))
        if item == 0:
            assert started[1].wait(10)
            assert not started[2].is_set()
            used.set()
    assert results == [(0, 0), (1, 1), (2, 4), (3, 9)]


def test_errors_come_with_their_item():
    found = []
    for item, result in ahead([1, 0, 2], lambda item: 1 / item):
        try:
            found.append((item, result()))
        except ZeroDivisionError:
            found.append((item, None))
    assert found == [(1, 1.0), (0, None), (2, 0.5)]


def test_nothing_goes_on_after_the_end():
    running, threads = [], threading.active_count()
    with pytest.raises(KeyError):
        for _, result in ahead(range(100), running.append):
            result()
            raise KeyError
    assert len(running) <= 3
    assert threading.active_count() <= threads
    assert list(ahead([], str)) == []

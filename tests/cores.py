"""Each of xdist's workers on cores of its own; imported before everything that starts threads.

Two workers whose libraries each take all cores spin while they wait for each other's threads, which makes a calibration
take several times as long as on one core. `make test-all` runs in one process, on all cores.
"""

import contextlib
import os
from pathlib import Path

#: Of the machine, as far as this process may use them.
ALL = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _own() -> list[int]:
    """Those of this worker; all of them without xdist, and where there are fewer cores than workers."""
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker is None or len(ALL) < workers:
        return ALL
    return ALL[int(worker.removeprefix("gw")) % workers::workers]  # one that replaces a crashed one counts on


def _take(cores: list[int]) -> None:
    for thread in Path("/proc/self/task").iterdir():  # xdist has started some already
        with contextlib.suppress(OSError):  # and they may end; where it is forbidden, it takes longer
            os.sched_setaffinity(int(thread.name), cores)


if _own() != ALL:
    _take(_own())

"""Follow a build while it runs, and stop it."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ...runtime.engine_library import uncollected

_T = TypeVar("_T")


@dataclass(frozen=True)
class Phase:
    """A part of a build, as the library names it: ``done`` of ``total`` steps. ``parent``: that it is a step of."""

    name: str
    parent: str | None
    done: int
    total: int


@dataclass
class Watch:
    """Hears of the build's steps, and may stop it.

    ``on_step``: called whenever a phase begins or gets on, with this phase behind those that it is part of: the
    outermost is the first. Called from threads of the library's own, one at a time; must not raise, as the library
    cannot pass an exception on.
    """

    on_step: Callable[[Sequence[Phase]], None] = lambda _: None
    stopped: bool = field(default=False, init=False)


def run_apart(work: Callable[[], _T], watch: Watch) -> _T:
    """Call the library in a thread of its own: what a signal raises in what the library calls back would be lost there.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the library has stopped; and whatever ``work`` raises.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="engine build") as pool:
        try:
            future = pool.submit(_uncollected, work)
            while not future.done():
                wait([future], timeout=0.1)
        except BaseException:  # Ctrl-C, or what SIGTERM raises; leaving waits until the library has stopped
            watch.stopped = True
            raise
        return future.result()


def _uncollected(work: Callable[[], _T]) -> _T:
    with uncollected():
        return work()


def monitor(trt: Any, watch: Watch) -> Any:
    """What the library reports its progress to.

    Args:
        trt: the library's module.
    """
    phases: dict[str, Phase] = {}
    lock = threading.Lock()  # NVIDIA's documentation: calls may come from several threads

    def tell(phase: Phase) -> None:
        phases[phase.name] = phase
        watch.on_step(_lineage(phases, phase))

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with lock:
                tell(Phase(phase_name, parent_phase, 0, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            with lock:
                if phase_name in phases:
                    tell(dataclasses.replace(phases[phase_name], done=step + 1))
            return not watch.stopped

        def phase_finish(self, phase_name: str) -> None:
            with lock:
                phases.pop(phase_name, None)

    return Monitor()


def _lineage(phases: dict[str, Phase], phase: Phase) -> tuple[Phase, ...]:
    found = (phase,)
    while (parent := phases.get(found[0].parent or "")) is not None and parent not in found:
        found = (parent, *found)
    return found

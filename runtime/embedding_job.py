"""From a list of scans to a store: what is there is skipped, what is new is computed, here or by many machines."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from .inputs import Item
from .model import Model
from .pipeline import STEPS, Outcome, Pipeline, Settings
from .scan_files import ScanPath, file_facts, path_text, table_of
from .store import Entry, Store
from .store.index import table_key

#: What readers do.
_READING = ("hash", "read", "preprocess")


@dataclass(frozen=True)
class Stage:
    """``busy``: share of the time that its ``workers`` had something to do."""

    name: str
    workers: int
    busy: float


@dataclass(frozen=True)
class Report:
    """What was done.

    ``embedded``: by inference; ``copied``: from a row with the same content; ``skipped``: there; ``failed_before``:
    there, too, with an error. ``step_s``: mean seconds of each step, over the scans that took it.
    """

    embedded: int
    copied: int
    failed: int
    skipped: int
    failed_before: int
    seconds: float
    stages: tuple[Stage, ...]
    step_s: dict[str, float]

    @property
    def scans_per_s(self) -> float:
        """Of those that were not skipped."""
        return (self.embedded + self.copied + self.failed) / self.seconds if self.seconds else 0.0

    @property
    def limit(self) -> str:
        """The stage that was busiest."""
        return max(self.stages, key=lambda stage: stage.busy).name


#: Told of each scan that is finished, with its error if it has one.
OnScan = Callable[[ScanPath, str | None], None]


class EmbeddingJob:
    """One run into a store.

    Args:
        retry: embed again what failed before, though the file has not changed.
    """

    def __init__(self, store: Store, retry: bool = False, on_scan: OnScan = lambda path, error: None) -> None:
        self._store, self._retry, self._on_scan = store, retry, on_scan
        self._counts: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._taken: Counter[str] = Counter()
        self._lock = threading.Lock()

    def run(self, model: Model, settings: Settings, items: Iterable[Item]) -> Report:
        """Embed what the store does not have, on this machine.

        Raises:
            BundleError, InferenceError: of the model; what was finished before is in the store.
        """
        pipeline = Pipeline(model, settings, self.is_known)
        return self.collect(pipeline.run, items, settings.readers,
                            settings.readers if settings.together else settings.inferences)

    def collect(self, outcomes: Callable[[Iterator[Item]], Iterable[Outcome]], items: Iterable[Item], readers: int,
                models: int) -> Report:
        """Store what ``outcomes`` makes of the scans that are to be embedded.

        Args:
            readers, models: at work at once, for their utilisation.
        """
        start = time.perf_counter()
        for outcome in outcomes(self._todo(items)):
            self._record(outcome)
        with self._timed("write"):
            self._store.flush()
        seconds = time.perf_counter() - start
        reading = sum(self._seconds[step] for step in _READING)
        stages = tuple(Stage(name, workers, busy / (workers * seconds)) for name, workers, busy in (
            ("reading", readers, reading), ("inference", models, self._seconds["inference"]),
            ("writing", 1, self._seconds["write"])))
        steps = {name: self._seconds[name] / self._taken[name] for name in (*STEPS, "write") if self._taken[name]}
        return Report(self._counts["embedded"], self._counts["copied"], self._counts["failed"],
                      self._counts["skipped"], self._counts["failed_before"], seconds, stages, steps)

    def is_known(self, sha256: str) -> bool:
        """Whether this content is in the store; may be called by any thread."""
        with self._lock:
            return self._store.has_content(sha256)

    def _todo(self, items: Iterable[Item]) -> Iterator[Item]:
        """Items without those whose file is as it was when its row was written."""
        for item in items:
            with self._lock:
                known = self._store.index.file(path_text(item.path))
            if known is not None and not (known.failed and self._retry):
                facts = file_facts(item.path)
                as_before = (known.bytes, known.changed_ns, known.table)
                if facts is None or (*facts, table_key(table_of(item.options))) == as_before:
                    self._counts["failed_before" if known.failed else "skipped"] += 1
                    self._on_scan(item.path, None)
                    continue
            yield item

    def _record(self, outcome: Outcome) -> None:
        for step, seconds in outcome.seconds.items():
            self._seconds[step] += seconds
            self._taken[step] += 1
        self._counts[outcome.kind] += 1
        entry = outcome.entry
        with self._timed("write"), self._lock:
            if outcome.kind == "copied":
                entry = self._copy(entry)
            self._store.append(entry)
        self._on_scan(Path(entry.path), entry.error)

    def _copy(self, entry: Entry) -> Entry:
        """The row of the same content, under this file's name."""
        same = self._store.same_content(entry.sha256 or "")
        assert same is not None  # nothing leaves a store while it is open
        return replace(same, path=entry.path, bytes=entry.bytes, changed_ns=entry.changed_ns)

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[step] += time.perf_counter() - start
        self._taken[step] += 1

"""Many scans through one model: reading, inference and writing at the same time, in memory that does not grow.

Readers are threads (decompression and sampling leave Python's lock), each at one scan; at most ``waiting`` scans are
read and not yet computed. Inference takes what is ready, up to a batch.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from .errors import BundleError, InferenceError, InputError
from .files import sha256_file
from .inputs import Item
from .model import Model
from .results import Prepared
from .store import Entry, Store


@dataclass(frozen=True)
class Settings:
    """How much at once.

    ``readers``: scans that are read. ``threads``: that each of these is preprocessed with. ``batch``: largest of an
    inference. ``waiting``: scans that may wait for it.
    """

    readers: int = 1
    threads: int = 1
    batch: int = 1
    waiting: int = 4


@dataclass(frozen=True)
class Stage:
    """``busy``: share of the time that its ``workers`` had something to do."""

    name: str
    workers: int
    busy: float


@dataclass(frozen=True)
class Report:
    """What was done. ``embedded``: by inference; ``copied``: from a row with the same content; ``skipped``: there."""

    embedded: int
    copied: int
    failed: int
    skipped: int
    seconds: float
    stages: tuple[Stage, ...]

    @property
    def scans_per_s(self) -> float:
        """Of those that were not skipped."""
        return (self.embedded + self.copied + self.failed) / self.seconds if self.seconds else 0.0

    @property
    def limit(self) -> str:
        """The stage that was busiest."""
        return max(self.stages, key=lambda stage: stage.busy).name


class OnScan(Protocol):
    """Told of each scan that is finished, with its error if it has one."""

    def __call__(self, path: Path, error: str | None) -> None: ...  # noqa: D102


@dataclass
class _Read:
    """What a reader hands on: a scan with its row so far, or a row that is finished."""

    entry: Entry
    prepared: Prepared | None = None


class _Busy:
    """Adds up seconds that threads spend inside it."""

    def __init__(self) -> None:
        self.seconds, self._lock, self._since = 0.0, threading.Lock(), threading.local()

    def __enter__(self) -> None:
        self._since.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.seconds += time.perf_counter() - self._since.start


class Pipeline:
    """One run.

    Args:
        retry: embed again what failed before, though the file has not changed.
    """

    def __init__(self, model: Model, store: Store, settings: Settings, retry: bool = False,
                 on_scan: OnScan = lambda path, error: None) -> None:
        self._model, self._store, self._settings, self._retry, self._on_scan = model, store, settings, retry, on_scan
        self._reading, self._computing, self._writing = _Busy(), _Busy(), _Busy()
        self._counts: dict[str, int] = dict.fromkeys(("embedded", "copied", "failed", "skipped"), 0)
        self._store_lock = threading.Lock()

    def run(self, items: Iterable[Item]) -> Report:
        """Embed what the store does not have.

        Raises:
            BundleError, InferenceError: of the model; what was finished before is in the store.
        """
        start = time.perf_counter()
        with ThreadPoolExecutor(self._settings.readers, thread_name_prefix="reader") as pool:
            arrived: queue.SimpleQueue[_Read | BaseException] = queue.SimpleQueue()
            todo = self._todo(items)
            try:
                self._feed(pool, todo, arrived)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        with self._writing:
            self._store.flush()
        seconds = time.perf_counter() - start
        stages = tuple(Stage(name, workers, busy.seconds / (workers * seconds)) for name, workers, busy in (
            ("reading", self._settings.readers, self._reading), ("inference", 1, self._computing),
            ("writing", 1, self._writing)))
        return Report(**self._counts, seconds=seconds, stages=stages)

    def _todo(self, items: Iterable[Item]) -> Iterator[Item]:
        """Items without those whose file is as it was when its row was written."""
        for item in items:
            known = self._store.known.get(str(item.path))
            if known is not None and not (known.failed and self._retry):
                facts = _facts(item.path)
                if facts is None or facts == (known.bytes, known.changed_ns):
                    self._counts["skipped"] += 1
                    self._on_scan(item.path, None)
                    continue
            yield item

    def _feed(self, pool: ThreadPoolExecutor, todo: Iterator[Item],
              arrived: queue.SimpleQueue[_Read | BaseException]) -> None:
        """Keep readers at work and compute what arrives."""
        in_flight, ready, exhausted = 0, list[_Read](), False
        most = self._settings.readers + self._settings.waiting

        def read(item: Item) -> None:
            try:
                with self._reading:
                    found = self._read(item)
                arrived.put(found)
            except BaseException as error:  # handed to the thread that waits
                arrived.put(error)

        while True:
            while not exhausted and in_flight + len(ready) < most:
                item = next(todo, None)
                exhausted = item is None
                if item is not None:
                    pool.submit(read, item)
                    in_flight += 1
            if not in_flight and not ready:
                return
            # Wait only if nothing is ready: a batch that is not full is better than a model that has nothing to do.
            if in_flight and (not ready or (len(ready) < self._settings.batch and not arrived.empty())):
                found = arrived.get()
                in_flight -= 1
                if isinstance(found, BaseException):
                    raise found
                if found.prepared is not None:
                    ready.append(found)
                else:
                    self._finish(found.entry, "failed" if found.entry.error else "copied")
                continue
            self._compute(ready[: self._settings.batch])
            del ready[: self._settings.batch]

    def _read(self, item: Item) -> _Read:
        facts = _facts(item.path)
        row = Entry(str(item.path), *(facts or (0, 0)))
        try:
            if facts is None:
                raise InputError(f"{item.path}: no such file")
            digest = sha256_file(item.path)
            with self._store_lock:
                same = None if self._options_matter(item) else self._store.same_content(digest)
            if same is not None:
                return _Read(replace(same, path=row.path, bytes=row.bytes, changed_ns=row.changed_ns))
            prepared = self._model.prepare(item.path, self._settings.threads, **item.options)
            if _facts(item.path) != facts:
                raise InputError(f"{item.path}: changed while it was read; embed it again")
        except BundleError:
            raise
        except (InputError, OSError) as error:
            return _Read(replace(row, error=str(error)))
        return _Read(replace(row, sha256=digest, shape_hwd=prepared.shape_hwd, orientation=prepared.orientation,
                              spacing_hwd_mm=prepared.spacing_hwd_mm, hounsfield=prepared.hounsfield), prepared)

    @staticmethod
    def _options_matter(item: Item) -> bool:
        """A table of metadata says different things of files with the same content."""
        return "metadata" in item.options

    def _compute(self, reads: list[_Read]) -> None:
        try:
            with self._computing:
                embeddings = self._model.embed_batch([read.prepared for read in reads if read.prepared is not None])
                finite = np.atleast_1d(np.isfinite(embeddings).all(axis=1))
                scores = np.full((len(reads), 0), np.nan, np.float32)
                if (task := self._model.manifest.zero_shot) is not None:
                    scores = np.full((len(reads), len(task.classes)), np.nan, np.float32)
                    if finite.any():
                        scores[finite] = self._model.score_embeddings(embeddings[finite])
        except InferenceError as error:
            raise InferenceError(f"{error} (batch of {len(reads)}; what was finished before is in the store)"
                                 ) from error
        for index, read in enumerate(reads):
            if finite[index]:
                self._finish(replace(read.entry, embedding=embeddings[index],
                                     scores=scores[index] if scores.shape[1] else None), "embedded")
            else:
                told = f"{read.entry.path}: its embedding holds NaN or infinite values"
                self._finish(replace(read.entry, error=told), "failed")

    def _finish(self, entry: Entry, kind: str) -> None:
        self._counts[kind] += 1
        with self._writing, self._store_lock:
            self._store.append(entry)
        self._on_scan(Path(entry.path), entry.error)


def _facts(path: Path) -> tuple[int, int] | None:
    """Size and time of change; None without the file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns

"""Many scans through one model: reading and inference at the same time, in memory that does not grow.

Readers are threads (decompression and sampling leave Python's lock), each at one scan; at most ``waiting`` more are
read and not yet computed. Inference takes what is ready, up to a batch, and on engines two batches at a time. On CPUs,
where reading and inference want the same cores, each reader computes what it has read instead: nobody waits for
anybody, and no core has two to serve.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from .errors import BundleError, DcformerError, InferenceError, InputError
from .inputs import Item
from .model import Model
from .results import Prepared
from .scan_files import file_facts, path_text, require_scan, sha256_scan, table_of
from .store.rows import Entry

Kind = Literal["embedded", "copied", "failed"]
#: What is done with a scan, in order; ``Outcome.seconds`` has those that were.
STEPS = ("hash", "read", "preprocess", "inference")


@dataclass(frozen=True)
class Settings:
    """How much at once.

    ``readers``: scans that are read. ``threads``: that each of these is preprocessed with. ``batch``: largest of an
    inference. ``waiting``: scans more than readers that may wait for it, or be in it. ``inferences``: at the same time,
    so that inputs of one go to the GPU while another computes. ``together``: readers compute what they read, and the
    last three do not apply.
    """

    readers: int = 1
    threads: int = 1
    batch: int = 1
    waiting: int = 4
    inferences: int = 1
    together: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a scan.

    ``kind``: "embedded"; "failed", with the error in the row; "copied": its content is known already, and what it was
    embedded to is not in this row. ``seconds``: by step.
    """

    entry: Entry
    kind: Kind
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass
class _Read:
    """What a reader hands on: a scan with its row so far, or an outcome already."""

    outcome: Outcome
    prepared: Prepared | None = None


#: From readers, and of whole batches.
_Queue = queue.SimpleQueue[_Read | list[Outcome] | BaseException]


def _hand_on(arrived: _Queue, work: Callable[[Any], _Read | list[Outcome]], argument: Any) -> None:
    """What a thread does; an error is handed to the thread that waits."""
    try:
        arrived.put(work(argument))
    except BaseException as error:
        arrived.put(error)


def _taken(arrived: _Queue) -> _Read | list[Outcome]:
    """The next result; raises what was raised in its place."""
    found = arrived.get()
    if isinstance(found, BaseException):
        raise found
    return found


def _finished(arrived: _Queue) -> Iterator[Outcome]:
    """What has been computed beside something that failed."""
    while not arrived.empty():
        found = arrived.get()
        if isinstance(found, list):
            yield from found


class Pipeline:
    """Turns scans into rows.

    Args:
        is_known: whether content of this sha256 has been embedded, and need not be again; called from readers.
    """

    def __init__(self, model: Model, settings: Settings, is_known: Callable[[str], bool] = lambda _: False) -> None:
        self._model, self._settings, self._is_known = model, settings, is_known

    def run(self, items: Iterable[Item]) -> Iterator[Outcome]:
        """One outcome for each scan, in the order in which they are finished.

        Raises:
            BundleError, InferenceError: of the model.
        """
        pool = ThreadPoolExecutor(self._settings.readers, thread_name_prefix="reader")
        feed = self._together if self._settings.together else self._apart
        try:
            yield from feed(pool, iter(items), queue.SimpleQueue())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _together(self, pool: ThreadPoolExecutor, todo: Iterator[Item], arrived: _Queue) -> Iterator[Outcome]:
        """Keep readers at work; each hands on what it has computed."""
        in_flight = 0
        while True:
            while in_flight < self._settings.readers and (item := next(todo, None)) is not None:
                pool.submit(_hand_on, arrived, self._read_and_compute, item)
                in_flight += 1
            if not in_flight:
                return
            found = _taken(arrived)
            yield from [found.outcome] if isinstance(found, _Read) else found
            in_flight -= 1

    def _read_and_compute(self, item: Item) -> _Read | list[Outcome]:
        found = self._read(item)
        return found if found.prepared is None else self._compute([found])

    def _apart(self, pool: ThreadPoolExecutor, todo: Iterator[Item], arrived: _Queue) -> Iterator[Outcome]:
        """Keep readers at work and compute what arrives."""
        given = self._settings
        ready, reading, computing, batches, exhausted = list[_Read](), 0, 0, 0, False
        computers = ThreadPoolExecutor(given.inferences, thread_name_prefix="inference")
        try:
            while True:
                while not exhausted and reading + len(ready) + computing < given.readers + given.waiting:
                    item = next(todo, None)
                    exhausted = item is None
                    if item is not None:
                        pool.submit(_hand_on, arrived, self._read, item)
                        reading += 1
                if not reading and not ready and not computing:
                    return
                # A batch that is not full is better than a model that has nothing to do.
                is_full = len(ready) >= given.batch or (exhausted and not reading)
                if ready and batches < given.inferences and (is_full or (not batches and arrived.empty())):
                    count = min(given.batch, len(ready))
                    computers.submit(_hand_on, arrived, self._compute, ready[:count])
                    del ready[:count]  # and no name is left for them: they are gone once they are computed
                    batches, computing = batches + 1, computing + count
                    continue
                found = _taken(arrived)
                if not isinstance(found, _Read):
                    batches, computing = batches - 1, computing - len(found)
                    yield from found
                    continue
                reading -= 1
                if found.prepared is not None:
                    ready.append(found)
                else:
                    yield found.outcome
                del found
        except DcformerError:
            computers.shutdown()
            yield from _finished(arrived)
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # before the wait for inference, or more would be read
            computers.shutdown()

    def _read(self, item: Item) -> _Read:
        facts = file_facts(item.path)
        row = Entry(path_text(item.path), *(facts or (0, 0)), table=table_of(item.options))
        seconds: dict[str, float] = {}
        try:
            require_scan(item.path)
            start = time.perf_counter()
            row = replace(row, sha256=sha256_scan(item.path))
            seconds["hash"] = time.perf_counter() - start
            if row.table is None and self._is_known(row.sha256 or ""):
                return _Read(Outcome(row, "copied", seconds))
            prepared = self._model.prepare(item.path, self._settings.threads, **item.options)
            seconds.update({name: value / 1e3 for name, value in prepared.timings_ms.items()})
            if file_facts(item.path) != facts:
                raise InputError(f"{item.path}: changed while it was read; embed it again")
        except BundleError:
            raise
        except (InputError, OSError) as error:
            return _Read(Outcome(replace(row, sha256=None, error=str(error)), "failed", seconds))
        return _Read(Outcome(replace(
            row, shape_hwd=prepared.shape_hwd, orientation=prepared.orientation,
            spacing_hwd_mm=prepared.spacing_hwd_mm, hounsfield=prepared.hounsfield,
            notes=prepared.notes), "embedded", seconds), prepared)

    def _compute(self, reads: list[_Read]) -> list[Outcome]:
        start = time.perf_counter()
        try:
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
        outcomes, each = list[Outcome](), (time.perf_counter() - start) / len(reads)
        for index, read in enumerate(reads):
            row, seconds = read.outcome.entry, {**read.outcome.seconds, "inference": each}
            if finite[index]:
                row = replace(row, embedding=embeddings[index], scores=scores[index] if scores.shape[1] else None)
                outcomes.append(Outcome(row, "embedded", seconds))
            else:
                told = f"{row.path}: its embedding holds NaN or infinite values"
                outcomes.append(Outcome(replace(row, error=told), "failed", seconds))
        return outcomes

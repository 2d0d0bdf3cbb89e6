"""The same job on many machines: Ray Data with actors that hold the model. Needs ray (``pip install '.[cluster]'``).

Ray schedules, restarts what dies and computes its scans again; one program, the one that the user started, writes the
store. Paths of scans and bundle must mean the same on all machines.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError

from .errors import BundleError, DcformerError, DeviceUnavailable, InputError
from .inputs import Item
from .model import Model, load
from .pipeline import Outcome, Pipeline, Settings
from .scan_files import file_facts, path_text
from .store import Entry
from .store.index import Contents

LOCAL = "local"
#: Scans of one task, for each that is in flight: what is lost with a worker, against the start and end of each task,
#: when not everything is at work.
_TASK_SCANS = 8
#: For each worker at least, so that all of them end at about the same time.
_TASKS = 4
#: A scan over which so many workers ended is left out: Ray itself would try it for ever.
_MOST_DEATHS = 2
_LOADING = "loading the model"
#: For a connection to the cluster's head.
_ANSWER_S = 5


@dataclass(frozen=True)
class ModelSpec:
    """What each worker loads; ``digest``: of the manifest that it must find there. The rest as in ``load``."""

    bundle: str
    digest: str
    device: str
    backend: str
    precision: str
    preprocess: str
    verify: bool


@dataclass(frozen=True)
class Workers:
    """How many actors, with how many CPU and GPU slots each, and what each of them does at once.

    ``exact_batch``: the user asked for this batch; else it is as large as the engine takes.
    """

    count: int
    cpus: int
    gpus: int
    exact_batch: bool
    settings: Settings

    @property
    def task_scans(self) -> int:
        """Scans of one task."""
        return _TASK_SCANS * (self.settings.readers + self.settings.waiting)


class _Attempts:
    """An actor that outlives the workers and knows what each began."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, what: str) -> int:
        """How often this has been begun and not ended, this time included."""
        self._begun[what] += 1
        return self._begun[what]

    def end(self, what: str) -> None:
        """What was begun is done, and harmless."""
        self._begun[what] -= 1


class _Worker:
    """An actor. Scans and outcomes travel as pickles in a column, as Ray does with whatever is no array.

    A task whose worker ended is done again one scan at a time, so that the scan which ends workers is found.
    """

    def __init__(self, spec: ModelSpec, workers: Workers, contents: list[Any], attempts: Any) -> None:
        self._spec, self._workers, self._attempts = spec, workers, attempts
        self._known: Contents = ray.get(contents[0])

    @cached_property
    def _model(self) -> Model:
        """Loaded by the first task: its errors reach the user, while those of a start make Ray start again."""
        spec, settings = self._spec, self._workers.settings
        # All may load at once; whoever dies over it leaves its count behind.
        if self._begin(_LOADING) > self._workers.count + _MOST_DEATHS:
            raise DeviceUnavailable(f"workers end while they load {spec.bundle} (out of memory?); give fewer "
                                    "--workers, or each more --threads")
        threads = settings.threads if settings.together else self._workers.cpus
        model = load(spec.bundle, spec.device, threads, spec.verify, spec.backend, spec.precision,
                     spec.preprocess)
        if model.manifest.digest != spec.digest:
            raise BundleError(f"{spec.bundle}: another bundle on {socket.gethostname()} than where the job was "
                              "started; give all machines the same")
        self._end(_LOADING)
        return model

    @cached_property
    def _settings(self) -> Settings:
        limit, settings = self._model.largest_batch, self._workers.settings
        if limit is not None and limit < settings.batch and self._workers.exact_batch:
            raise InputError(f"--batch {settings.batch}: the engine was built for at most {limit}; build with a larger "
                             "--max-batch")
        return replace(settings, inferences=self._model.inferences,
                       batch=settings.batch if limit is None else min(limit, settings.batch))

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        items: list[Item] = [pickle.loads(item) for item in batch["item"]]
        results: list[Outcome | DcformerError] = []
        try:
            settings = self._settings  # loads the model, for which no scan is to blame
            if self._begin(f"task {items[0].path}") == 1:
                results.extend(self._run(items, settings))
            else:
                results.extend(outcome for item in items for outcome in self._alone(item))
        except DcformerError as error:  # returned: of what is raised Ray hands on no more than the text
            results.append(error)
        found = np.empty(len(results), object)
        found[:] = [pickle.dumps(result) for result in results]
        return {"result": found}

    def _alone(self, item: Item) -> Iterator[Outcome]:
        if self._begin(str(item.path)) > _MOST_DEATHS:
            told = f"{item.path}: {_MOST_DEATHS} workers ended over this scan (out of memory?)"
            facts = file_facts(item.path) or (0, 0)
            return iter([Outcome(Entry(path_text(item.path), *facts, error=told), "failed")])
        done = list(self._run([item], Settings(threads=self._settings.threads)))
        self._end(str(item.path))
        return iter(done)

    def _run(self, items: list[Item], settings: Settings) -> Iterator[Outcome]:
        return Pipeline(self._model, settings, self._known.__contains__).run(items)

    def _begin(self, what: str) -> int:
        return ray.get(self._attempts.begin.remote(what))

    def _end(self, what: str) -> None:
        ray.get(self._attempts.end.remote(what))


class Cluster:
    """A connection to Ray, as ``connect`` makes it."""

    def __init__(self, address: str) -> None:
        self.address = address
        #: CPU and GPU slots of each machine.
        self.machines = [(int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
                         for node in ray.nodes() if node["Alive"]]

    def plan(self, device: str, workers: int | None, readers: int | None, threads: int | None, batch: int,
             exact_batch: bool = False) -> Workers:
        """One actor for each GPU, with its share of the CPU slots, or for each CPU slot.

        Args:
            workers, readers, threads: other numbers of actors, of scans that each reads, and of CPU slots of each.
            exact_batch: an engine that takes less than ``batch`` is an error.

        Raises:
            DeviceUnavailable: no GPU in the cluster, or fewer slots than one actor needs.
        """
        if device == "cuda":
            shares = [cpus // gpus for cpus, gpus in self.machines if gpus]
            if not shares:
                raise DeviceUnavailable(f"--ray {self.address}: no GPU in this cluster; use --device cpu")
            cpus, gpus = threads or max(1, min(shares)), 1
            most = sum(min(there // cpus, gpus_there) for there, gpus_there in self.machines)
        else:
            cpus, gpus = threads or 1, 0
            most = sum(there // cpus for there, _ in self.machines)
        if most < (workers or 1):
            slots = ", ".join(f"{there} CPU and {gpus_there} GPU" for there, gpus_there in self.machines)
            raise DeviceUnavailable(f"--ray {self.address}: machines with {slots} slots; not enough for "
                                    f"{workers or 1} workers of {cpus} CPUs and {gpus} GPUs")
        at_once = readers or max(1, cpus - gpus)
        return Workers(workers or most, cpus, gpus, exact_batch,
                       Settings(at_once, max(1, cpus // at_once), batch, 2 * batch, together=device == "cpu"))

    def run(self, items: Iterator[Item], spec: ModelSpec, workers: Workers, contents: Contents) -> Iterator[Outcome]:
        """One outcome for each scan, in any order.

        Raises:
            DcformerError: of a worker's model, or a worker that dies whatever is tried.
        """
        rows = [{"item": pickle.dumps(item)} for item in items]
        if not rows:
            return
        attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Attempts).remote()
        tasks = max(-(-len(rows) // workers.task_scans), min(len(rows), _TASKS * workers.count))
        scans = ray.data.from_items(rows, override_num_blocks=tasks)
        del rows
        known = ray.put(contents)  # held here as long as workers may start
        results = scans.map_batches(
            _Worker, fn_constructor_args=(spec, workers, [known], attempts), batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=workers.count), num_cpus=workers.cpus, num_gpus=workers.gpus)
        try:
            for row in results.iter_rows():
                result: Outcome | DcformerError = pickle.loads(row["result"])
                if isinstance(result, DcformerError):
                    raise result
                yield result
        except RayError as error:
            raise DeviceUnavailable(f"--ray {self.address}: {error}; what was finished is in the store") from error


@contextmanager
def connect(address: str) -> Iterator[Cluster]:
    """Connect to a cluster, or start one on this machine for ``LOCAL``, which ends with the block.

    Nothing is reported to Ray's makers.

    Raises:
        InputError: nothing there. DeviceUnavailable: it does not start here.
    """
    _require_listener(address)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else its own notes end up among ours
    try:
        if address == LOCAL:
            ray.init(address=LOCAL, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
                     num_cpus=len(os.sched_getaffinity(0)))
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # some of its own are bare ones
        if address == LOCAL:
            raise DeviceUnavailable(f"--ray {LOCAL}: Ray does not start here ({error})") from error
        raise _no_cluster(address, error) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it prints what is raised, too
    with redirect_stdout(sys.stderr):  # where Ray tells of workers that died; standard output is for results
        try:
            yield Cluster(address)
        finally:
            ray.shutdown()


def _require_listener(address: str) -> None:
    """Ray itself would wait ten minutes for somebody to answer."""
    if address in (LOCAL, "auto"):
        return
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    try:
        if not separator or not port.isdecimal():
            raise OSError("not HOST:PORT")
        with socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S):
            pass
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> InputError:
    return InputError(f"--ray {address}: no Ray cluster answers there ({error}); expected {LOCAL!r}, 'auto' or "
                      "HOST:PORT")

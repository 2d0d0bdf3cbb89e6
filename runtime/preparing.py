"""Preprocess a data set once, so that whoever reads it again need not."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BundleError, DiskFull, InputError
from .files import is_full, writing_error
from .inputs import find_items, is_file, require_folder
from .model import Model
from .scan_files import ScanPath, SliceFiles, file_facts, path_text, require_scan, sha256_scan
from .volume.folder import NAME_COLUMN, table_header, tables_below
from .volume.prepared import (
    SUFFIX,
    Origin,
    PreparedScan,
    Values,
    is_prepared,
    read_origin,
    remove_leftovers,
    write_prepared,
    written_file,
)


@dataclass(frozen=True)
class Task:
    """A scan, how to read it, and where it goes once it is prepared."""

    path: ScanPath
    options: Mapping[str, Any]
    out: Path


@dataclass(frozen=True)
class Report:
    """What was done. ``bytes_before``, ``bytes_after``: of the files of those that were prepared."""

    prepared: int
    skipped: int
    failed: int
    bytes_before: int
    bytes_after: int
    seconds: float


def find_tasks(inputs: Sequence[str | ScanPath], split: str | None, options: Mapping[str, Any], out: Path
               ) -> list[Task]:
    """Scans of ``find_items``: those of a folder go to the same place below ``out``, others directly into it.

    Raises:
        InputError: as ``find_items``, two that would go to the same place, scans that are prepared already, or ``out``
            in one of the inputs.
    """
    tasks: dict[Path, Task] = {}
    folders = [Path(given) for given in inputs if not isinstance(given, SliceFiles) and Path(given).is_dir()]
    others = [given for given in inputs if isinstance(given, SliceFiles) or not Path(given).is_dir()]
    require_folder(inputs, split)
    split_of_others = None if all(map(is_file, others)) else split  # files have none, whatever folder is beside them
    found = [(item, None) for item in find_items(others, split_of_others, options)] if others else []
    for folder in (folder.absolute() for folder in folders):
        if out.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{out}: lies in {folder}, whose scans would then be there twice; choose a place outside")
        found += [(item, folder) for item in find_items([folder], split, options)]
    for item, folder in found:
        path = item.path.folder if isinstance(item.path, SliceFiles) else item.path
        if is_prepared(path):
            raise InputError(f"{item.path}: prepared already; name the scan itself")
        within = folder is not None and path != folder
        place = path.relative_to(folder or "/") if within else Path(path.name or "scan")
        task = Task(item.path, item.options, out / place.with_name(_name(place)))
        if (other := tasks.setdefault(task.out, task)).path != task.path:
            raise InputError(f"{task.path} and {other.path} have the same name; prepare them into two folders")
    return list(tasks.values())


def _name(path: Path) -> str:
    """Of the prepared scan; one that is DICOM is named as if it had been converted, as tables would call it."""
    if path.name.lower().endswith((".nii", ".nii.gz")):
        return path.name + SUFFIX
    return (path.stem if path.suffix.lower() in (".zip", ".dcm") else path.name) + ".nii.gz" + SUFFIX


def find_tables(inputs: Iterable[str | Path], out: Path) -> dict[Path, Path]:
    """Tables of the folders among ``inputs``, labels, reports and others, by where they go below ``out``.

    Raises:
        InputError: two that would go to the same place.
    """
    tables: dict[Path, Path] = {}
    for folder in (Path(given) for given in inputs if Path(given).is_dir()):
        for path in tables_below(folder):
            if NAME_COLUMN in table_header(path) and (
                    other := tables.setdefault(out / path.relative_to(folder), path)) != path:
                raise InputError(f"{path} and {other} have the same name; prepare into two folders")
    return tables


def copy_tables(tables: Mapping[Path, Path]) -> None:
    """What ``find_tables`` found."""
    remove_leftovers(tables)
    for place, table in tables.items():
        with table.open("rb") as source, written_file(place) as file:
            shutil.copyfileobj(source, file)


def prepare_all(model: Model, tasks: Sequence[Task], values: Values, readers: int, threads: int,
                on_scan: Callable[[ScanPath, str | None], None] = lambda path, error: None) -> Report:
    """Prepare what is not there yet, or has changed since.

    Args:
        readers: scans at once. threads: that preprocess each of them.
        on_scan: told of each scan that is finished, with its error if it has one.

    Raises:
        BundleError: the bundle has no image tower.
    """
    remove_leftovers(task.out for task in tasks)
    counts: Counter[str] = Counter()
    before, after, start = 0, 0, time.perf_counter()

    def work(task: Task) -> bool:
        if _is_done(model, task, values):
            return False
        _prepare(model, task, values, threads)
        return True

    for task, done in _at_once(tasks, work, readers):
        error = None
        try:
            if done():
                before, after = before + (file_facts(task.path) or (0,))[0], after + task.out.stat().st_size
                counts["prepared"] += 1
            else:
                counts["skipped"] += 1
        except BundleError:
            raise
        except (InputError, DiskFull, OSError) as failure:
            if is_full(failure):
                told = writing_error(task.out, failure) if isinstance(failure, OSError) else failure
                raise DiskFull(f"{told}; what is prepared is kept") from failure
            counts["failed"] += 1
            error = str(failure)
        on_scan(task.path, error)
    return Report(counts["prepared"], counts["skipped"], counts["failed"], before, after, time.perf_counter() - start)


def _prepare(model: Model, task: Task, values: Values, threads: int) -> None:
    require_scan(task.path)
    facts = file_facts(task.path)
    sha256 = sha256_scan(task.path)
    there = _require_same_scan(task, sha256)
    try:
        found = model.prepare(task.path, threads, **task.options)
        if file_facts(task.path) != facts:
            raise InputError(f"{task.path}: changed while it was read; prepare it again")
    except InputError as error:
        if there is None or there.sha256 == sha256:
            raise
        task.out.unlink(missing_ok=True)  # or it would stand for a scan that is no more
        raise InputError(f"{error}; {task.out}, which was prepared of what this was before, is removed") from error
    origin = Origin(path_text(task.path), *(facts or (0, 0)), sha256, _stated(task.options))
    scan = PreparedScan(**{field.name: getattr(found, field.name) for field in dataclasses.fields(PreparedScan)})
    write_prepared(task.out, scan, model.manifest.preprocessing, origin, values)


def _require_same_scan(task: Task, sha256: str) -> Origin | None:
    """What is there was made of; None where nothing is, or it is damaged.

    Raises:
        InputError: it was made of another scan, by its path and by its content.
    """
    try:
        origin, _ = read_origin(task.out)
    except InputError:
        return None
    if origin.path != path_text(task.path) and origin.sha256 != sha256:
        raise InputError(f"{task.path}: {task.out} was prepared of {origin.path}; prepare it into another folder")
    return origin


def _is_done(model: Model, task: Task, values: Values) -> bool:
    """Whether what is there is whole, for this bundle, and of the scan as it is now, read the same way."""
    if not task.out.exists():
        return False
    try:
        origin, there = read_origin(task.out)
        model.prepare(task.out)
    except BundleError:
        raise
    except InputError:
        return False
    return (origin.path, (origin.bytes, origin.changed_ns), origin.options, there) == (
        path_text(task.path), file_facts(task.path), _stated(task.options), values)


def _stated(options: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has it; a table of metadata with its size and time of change, as another says other things."""
    stated = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    if (table := options.get("metadata")) is not None:
        stated["metadata"] = [path_text(Path(table)), *(file_facts(Path(table)) or ())]
    return stated


def _at_once(tasks: Sequence[Task], work: Callable[[Task], bool], readers: int
             ) -> Iterator[tuple[Task, Callable[[], bool]]]:
    """Each task with what gives, or raises, its result, in the order in which they end; few wait at any time."""
    pool = ThreadPoolExecutor(readers, thread_name_prefix="preparing")
    running: dict[Future[bool], Task] = {}
    todo = iter(tasks)
    try:
        while True:
            while len(running) < 2 * readers and (task := next(todo, None)) is not None:
                running[pool.submit(work, task)] = task
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

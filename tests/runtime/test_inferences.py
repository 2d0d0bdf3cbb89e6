"""Readers and inference side by side: what is in memory, what is computed at the same time, and how it ends."""

import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from dcformer_deploy.runtime import InferenceError, Model, load
from dcformer_deploy.runtime.embedding_job import EmbeddingJob
from dcformer_deploy.runtime.inputs import Item
from dcformer_deploy.runtime.pipeline import Pipeline, Settings
from dcformer_deploy.runtime.results import Prepared
from dcformer_deploy.runtime.store import Identity, Store, read_store


class _Slow(Model):
    """Counts scans that were read and not yet computed."""

    def __init__(self, bundle: Path, delay: float = 0.0) -> None:
        real = load(bundle)
        super().__init__(real._bundle, real._options)
        self.delay, self.alive, self.most, self.lock = delay, 0, 0, threading.Lock()

    def prepare(self, scan: object, threads: int | None = None, **_: object) -> Prepared:
        with self.lock:
            self.alive += 1
            self.most = max(self.most, self.alive)
        return Prepared(str(scan), {})

    def embed_batch(self, scans: object) -> np.ndarray:
        time.sleep(self.delay)
        with self.lock:
            self.alive -= len(scans)  # type: ignore[arg-type]
        rows = np.ones((len(scans), 512), np.float32)  # type: ignore[arg-type]
        return rows / np.sqrt(np.float32(512))


def _identity(model: Model) -> Identity:
    manifest = model.manifest
    assert manifest.zero_shot is not None
    return Identity(manifest.results_digest("fp32"), manifest.encoder, "fp32", 512, manifest.zero_shot.classes, {})


def _items(folder: Path, count: int) -> list[Item]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{index}.nii.gz" for index in range(count)]
    for index, path in enumerate(paths):
        path.write_bytes(index.to_bytes(4, "little"))
    return [Item(path) for path in paths]


@pytest.mark.parametrize("count", [20, 200])
def test_scans_in_memory_do_not_grow_with_their_number(pristine_bundle: Path, tmp_path: Path, count: int):
    model = _Slow(pristine_bundle, delay=0.8 / count)
    with Store(tmp_path / "first", _identity(model)) as store:  # loads what writes, which must not count as writing
        EmbeddingJob(store).run(model, Settings(), _items(tmp_path / "one", 1))
    with Store(tmp_path / "s", _identity(model)) as store:
        report = EmbeddingJob(store).run(model, Settings(readers=3, batch=2, waiting=4), _items(tmp_path / "f", count))
    assert report.embedded == count
    assert model.most <= 3 + 4
    assert report.limit == "inference"
    assert len(read_store(tmp_path / "s")) == count


@pytest.mark.parametrize("inferences", [1, 2])
def test_inferences_at_the_same_time(pristine_bundle: Path, tmp_path: Path, inferences: int):
    """Two, where there are two: the first one waits here for the second."""
    model, running, most, both = _Slow(pristine_bundle), [0], [0], threading.Event()
    compute = model.embed_batch

    def embed_batch(scans: list[Prepared]) -> np.ndarray:
        with model.lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        if running[0] == 2:
            both.set()
        if inferences == 2:
            assert both.wait(20)
        with model.lock:
            running[0] -= 1
        return compute(scans)

    model.embed_batch = embed_batch  # type: ignore[method-assign]
    with Store(tmp_path / "s", _identity(model)) as store:
        settings = Settings(readers=3, batch=2, waiting=4, inferences=inferences)
        report = EmbeddingJob(store).run(model, settings, _items(tmp_path / "f", 25))
    assert (most[0], report.embedded, len(read_store(tmp_path / "s"))) == (inferences, 25, 25)
    assert model.most <= 3 + 4
    assert all(stage.busy <= 1 for stage in report.stages)


def test_what_was_computed_is_let_go(pristine_bundle: Path, tmp_path: Path):
    """Scans in memory, counted by when they are really gone, while one batch takes long."""
    model, alive, most, slow = _Slow(pristine_bundle), [0], [0], threading.Event()

    def gone() -> None:
        with model.lock:
            alive[0] -= 1

    def prepare(scan: object, threads: int | None = None, **_: object) -> Prepared:
        array = np.zeros(1)
        weakref.finalize(array, gone)
        with model.lock:
            alive[0] += 1
            most[0] = max(most[0], alive[0])
        return Prepared(str(scan), {"volume": array})

    def embed_batch(scans: list[Prepared]) -> np.ndarray:
        if not slow.is_set():
            slow.set()
            time.sleep(0.5)
        return np.full((len(scans), 512), np.float32(512) ** -0.5, np.float32)

    model.prepare, model.embed_batch = prepare, embed_batch  # type: ignore[method-assign]
    with Store(tmp_path / "s", _identity(model)) as store:
        EmbeddingJob(store).run(model, Settings(3, 1, 8, 16, inferences=2), _items(tmp_path / "f", 100))
    assert most[0] <= 3 + 16
    assert alive[0] == 0


def test_a_batch_that_fails_takes_no_other_along(pristine_bundle: Path, tmp_path: Path):
    """What another thread computes meanwhile is stored."""
    model, begun = _Slow(pristine_bundle), list[int]()
    first, failed = threading.Event(), threading.Event()

    def embed_batch(scans: list[Prepared]) -> np.ndarray:
        begun.append(len(scans))
        if len(begun) == 1:
            first.set()
            assert failed.wait(20)
            time.sleep(0.2)
            return np.full((len(scans), 512), np.float32(512) ** -0.5, np.float32)
        failed.set()
        raise InferenceError("out of memory")

    model.embed_batch = embed_batch  # type: ignore[method-assign]
    with pytest.raises(InferenceError, match="out of memory"), Store(tmp_path / "s", _identity(model)) as store:
        EmbeddingJob(store).run(model, Settings(2, 1, 3, 8, inferences=2), _items(tmp_path / "f", 30))
    assert len(read_store(tmp_path / "s")) == begun[0]


def test_nothing_more_is_read_once_it_ends(pristine_bundle: Path, tmp_path: Path):
    model, computing = _Slow(pristine_bundle, delay=0.5), threading.Event()
    compute, prepare, read = model.embed_batch, model.prepare, list[object]()

    def embed_batch(scans: object) -> np.ndarray:
        computing.set()
        return compute(scans)

    def slowly(scan: object, threads: int | None = None, **_: object) -> Prepared:
        read.append(scan)
        time.sleep(0.02)
        return prepare(scan)

    model.embed_batch, model.prepare = embed_batch, slowly  # type: ignore[method-assign]
    outcomes = Pipeline(model, Settings(1, 1, 2, 40, inferences=2)).run(_items(tmp_path / "f", 60))
    next(outcomes)
    before = len(read)
    outcomes.close()
    assert len(read) <= before + 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("reader", "inference"))]


def test_a_model_that_fails_ends_it_and_keeps_what_is_finished(pristine_bundle: Path, tmp_path: Path):
    model = _Slow(pristine_bundle)
    computed = []

    def fail_later(scans: list[Prepared]) -> np.ndarray:
        if len(computed) == 5:
            raise InferenceError("out of memory")
        computed.append(scans)
        return np.full((len(scans), 512), np.float32(512) ** -0.5, np.float32)

    model.embed_batch = fail_later  # type: ignore[method-assign]
    items = _items(tmp_path / "f", 9)
    with pytest.raises(InferenceError, match="out of memory .batch of 1; what was finished before is in the store"), \
            Store(tmp_path / "s", _identity(model)) as store:
        EmbeddingJob(store).run(model, Settings(), items)
    assert len(read_store(tmp_path / "s")) == 5


def test_embeddings_that_are_no_numbers_are_failures(pristine_bundle: Path, tmp_path: Path):
    model = _Slow(pristine_bundle)
    model.embed_batch = lambda scans: np.full((len(scans), 512), np.nan, np.float32)  # type: ignore[method-assign]
    with Store(tmp_path / "s", _identity(model)) as store:
        report = EmbeddingJob(store).run(model, Settings(), _items(tmp_path / "f", 1))
    assert (report.embedded, report.failed) == (0, 1)
    assert "NaN" in read_store(tmp_path / "s").to_pylist()[0]["error"]

"""Fixtures that several tests share; the expensive ones are made once per session."""

import cores  # first: the others start threads

# isort: split
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from traces import Traces

import golden
from dcformer_deploy.export import trace
from dcformer_deploy.export.make_bundle import ExportOptions, export_checkpoint
from dcformer_deploy.export.random_weights import vocabulary
from dcformer_deploy.runtime import Model, load
from dcformer_deploy.runtime.cli.app import main
from scans import write

Once = Callable[[str, Callable[[Path], Any]], Path]
#: Largest relative error against the golden numbers. 1e-6 is measured, 1e-4 is promised to users.
GOLDEN_TOLERANCE = 1e-5


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file of few tests first: at the end one worker would wait for it."""
    items.sort(key=lambda item: item.path.name != "test_fuzz.py")


@pytest.fixture
def all_cores() -> Iterator[None]:
    """For processes and threads that a test starts: those of the machine, not only this worker's."""
    own = os.sched_getaffinity(0) if cores.ALL else set()
    if own == set(cores.ALL):
        yield
        return
    os.sched_setaffinity(0, cores.ALL)
    yield
    os.sched_setaffinity(0, own)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Timings and states of evaluations go to a folder of this session, not to the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def traces() -> Iterator[Traces]:
    """PyTorch's exporter is asked once for each module; ``traced_anew`` is for tests of the exporter itself."""
    with pytest.MonkeyPatch.context() as patch:
        made = Traces()
        patch.setattr(trace, "_trace", made)
        yield made


@pytest.fixture(autouse=True)
def _traced_once(traces: Traces) -> None:
    """For every test."""


@pytest.fixture
def traced_anew(traces: Traces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_trace", traces.real)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    words = vocabulary()
    words += [f"[unused{i}]" for i in range(512 - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.NANO.save(tmp_path_factory.mktemp("checkpoint") / "nano.pth")


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Makes what is expensive and not to be changed once for all of xdist's workers: a folder, by its name."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, write: Callable[[Path], Any]) -> Path:
        out, done = base / "once" / name, base / "once" / f"{name}.done"
        out.parent.mkdir(exist_ok=True)
        with (base / "once" / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(out, ignore_errors=True)
                write(out)
                done.touch()
        return out

    return make


@pytest.fixture(scope="session")
def pristine_bundle(checkpoint: Path, tokenizer_folder: Path, once: Once) -> Path:
    return once("nano", lambda out: export_checkpoint(checkpoint, out, ExportOptions(tokenizer=tokenizer_folder)))


@pytest.fixture
def bundle_copy(pristine_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(pristine_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def model(pristine_bundle: Path) -> Model:
    return load(pristine_bundle)


@pytest.fixture(scope="session")
def ct() -> Path:
    """The real CT that the package carries."""
    return golden.REPOSITORY / "export" / "data" / "example_ct.nii.gz"


@pytest.fixture(scope="session")
def hounsfield() -> np.ndarray:
    """A small volume [x, y, z] int16 that passes for a chest: air around and inside a body, noise throughout."""
    random = np.random.default_rng(3)
    x, y, z = np.meshgrid(np.linspace(-1, 1, 40), np.linspace(-1, 1, 36), np.linspace(-1, 1, 30), indexing="ij")
    body = np.where(x**2 + y**2 < 0.8, 40, -1000) + np.where((abs(x) - 0.4) ** 2 + y**2 < 0.08, -800, 0)
    body = body + 300 * (x > 0.5) + 200 * (y > 0.2) * (z > 0) + random.normal(0, 20, x.shape)
    return np.clip(body, -1024, 3071).astype(np.int16)


@pytest.fixture(scope="session")
def scans(ct: Path, hounsfield: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four scans: the real CT, and drawn ones."""
    folder = tmp_path_factory.mktemp("scans")
    shutil.copy(ct, folder / "a.nii.gz")
    for index, name in enumerate(("b.nii.gz", "c.nii", "d.nii.gz")):
        write(folder / name, np.roll(hounsfield, 7 * index, axis=index))
    return folder


@pytest.fixture(scope="session")
def series(hounsfield: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A regular DICOM series; not to be changed."""
    from dicoms import write_series  # here, as machines with GPUs may have no reader

    folder = tmp_path_factory.mktemp("dicom") / "series"
    write_series(folder, hounsfield)
    return folder


@pytest.fixture(scope="session")
def calibrated(pristine_bundle: Path, scans: Path, once: Once) -> Path:
    """The bundle with FP16, BF16 and INT8; by extremes, as scans of mostly padding leave other methods little else."""
    def write_it(out: Path) -> None:
        shutil.copytree(pristine_bundle, out)
        assert main(["calibrate", str(out), "--data", str(scans), "--samples", "3", "--method", "minmax",
                     "--depthwise", "never", "--precision", "fp16,bf16,int8"]) == 0

    return once("calibrated", write_it)


@pytest.fixture(scope="session")
def built(calibrated: Path, once: Once) -> Path:
    """The calibrated bundle with engines, as ``fake_gpu.with_engines`` makes it; not to be changed."""
    pytest.importorskip("tensorrt_rtx")
    from fake_gpu import with_engines

    return once("built", lambda out: with_engines(calibrated, out))


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Those for GPUs, compiled for this machine's processor."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    from fake_gpu import kernels_on_host

    return kernels_on_host(tmp_path_factory.mktemp("kernels"))

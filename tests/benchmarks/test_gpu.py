"""Benchmarks on a GPU: a faked driver, real engines' records; what is measured is arithmetic that can be checked."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_gpu import FakeTensorRt, install

from dcformer_deploy.benchmarks import measure
from dcformer_deploy.benchmarks.gpu import Floors, contenders, floors, nvml, race
from dcformer_deploy.benchmarks.gpu.clock import Clock
from dcformer_deploy.benchmarks.gpu.contenders import Work, _Torch, names_of
from dcformer_deploy.runtime import load
from dcformer_deploy.runtime.backends.device import Device
from dcformer_deploy.runtime.bundle import Bundle, open_bundle
from dcformer_deploy.runtime.cli.app import main

pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def library(built: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    fake = install(built, monkeypatch)
    monkeypatch.setattr(floors, "_COPIED", 1 << 20)
    monkeypatch.setattr(floors, "_WARM_UP_S", 0.01)
    monkeypatch.setattr(race, "_LEAST_TURNS", 4)
    monkeypatch.setattr(race, "_REPEATS", 1)
    monkeypatch.setattr(race, "_SUSTAINED_MS", 0)
    return fake


class _Sleeper:
    """Takes a fixed time on its stream, by a clock that only the driver has."""

    def __init__(self, driver: object, stream: int, ms: float) -> None:
        self._driver, self.stream, self._ms = driver, stream, ms

    def enqueue(self) -> None:
        self._driver.enqueue(self.stream, lambda: self._driver.sleep(self._ms))  # type: ignore[attr-defined]


def test_time_is_between_the_events_of_the_stream(library: FakeTensorRt, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("fake_gpu.time", SimpleNamespace(perf_counter=lambda: now[0]))
    driver = library.driver
    driver.sleep = lambda ms: now.__setitem__(0, now[0] + ms / 1e3)
    device = Device()
    clock = Clock(device)
    work = _Sleeper(driver, driver.cuStreamCreate(0)[1], 7.0)
    assert clock.time_ms(work) == pytest.approx(7)
    assert clock.time_ms(work, 4) == pytest.approx(7)


@pytest.mark.thorough
def test_race(built: Path, library: FakeTensorRt):
    bundle = open_bundle(built)
    names = names_of(bundle)
    assert names == [*contenders.TORCH, *contenders.ONNXRUNTIME, "tensorrt_rtx-fp16", "tensorrt-fp16"]
    said = []
    report = race.race(bundle, None, names, [1, 2], 2, 0, said.append)
    rows = {(row.name, row.batch): row for row in report.rows}
    assert len(rows) == len(report.rows) == 2 * len(names)
    assert all(row.problem for row in report.rows if row.name.startswith("torch"))
    assert "has no CUDA here" in str(rows["torch-fp32", 1].problem)
    assert "CUDAExecutionProvider" in str(rows["onnxruntime-cuda-fp16", 1].problem)
    for batch in (1, 2):
        first, second = rows["tensorrt_rtx-fp16", batch], rows["tensorrt-fp16", batch]
        assert first.runs == second.runs == race._LEAST_TURNS * race._REPEATS
        assert first.ratio == 1
        assert first.cosine == pytest.approx(1, abs=1e-6)
        assert second.cosine == pytest.approx(1, abs=1e-6)
        for row in (first, second):
            assert row.median_ms is not None and row.p95_ms is not None
            assert row.p99_ms is not None
            assert 0 < row.median_ms <= row.p95_ms <= row.p99_ms
            assert row.build_s is not None and row.build_s > 0
            assert row.floor_ms is not None
            assert row.to_floor == pytest.approx(row.median_ms / row.floor_ms)
            assert row.own_mb is not None and row.own_mb > 0
    assert rows["tensorrt-fp16", 1].device_mb is not None
    assert "floors" in said
    # Everything was given back: nothing but what the race's own two clocks need is alive.
    assert library.driver.blocks == {}
    assert report.gpu.startswith("NVIDIA H100, compute capability 9.0, 80 GiB")


def test_embeddings_are_those_of_the_model(built: Path, library: FakeTensorRt):
    bundle = open_bundle(built)
    volumes = race._volumes(bundle, 2)
    work = Work(bundle, None, volumes, 2)
    model = load(built, "cuda", backend="tensorrt", precision="fp16")
    expected = model.image_outputs(volumes, ["image_embedding"])["image_embedding"]
    with contenders.open_contender("tensorrt-fp16", work) as contender:
        for _ in range(3):
            contender.enqueue()
            np.testing.assert_array_equal(contender.embeddings(), expected)
    assert library.contexts == 2


def test_pytorch_by_itself(built: Path, library: FakeTensorRt, checkpoint: Path):
    """On the CPU: the same weights as the bundle's, in both dtypes and layouts."""
    bundle = open_bundle(built)
    work = Work(bundle, checkpoint, race._volumes(bundle, 1), 2)
    expected = load(built).image_outputs(work.volumes, ["image_embedding"])["image_embedding"]
    exact = _Torch("torch-fp32", work, device="cpu").embeddings()
    np.testing.assert_allclose(exact, expected, atol=1e-6)
    for name in ("torch-fp16", "torch-fp16-channels-last"):
        half = _Torch(name, work, device="cpu").embeddings()
        assert 0.999 < float((half * expected).sum()) < 1.001


def test_floors(built: Path):
    """By hand: the larger of the two times, both growing with the batch; without a rate only bytes count."""
    bundle = open_bundle(built)
    graph = bundle.manifest.graph("image", "fp16")
    assert graph is not None
    inputs = sum(2 * int(np.prod(info.axes[1:])) for info in graph.inputs)
    weights = (built / str(graph.weights)).stat().st_size
    slow_copy = Floors(1e6, {"fp16": 1e15})
    assert floors.floor_ms(slow_copy, bundle, "fp16", 3, 10**9) == pytest.approx((3 * inputs + weights) / 1e3)
    slow_products = Floors(1e15, {"fp16": 1e9})
    assert floors.floor_ms(slow_products, bundle, "fp16", 3, 10**9) == pytest.approx(3000)
    assert floors.floor_ms(Floors(1e6, {}), bundle, "fp32", 1, 10**9) == pytest.approx(
        (2 * inputs + (built / "image.fp32.weights").stat().st_size) / 1e3)


def test_command(built: Path, library: FakeTensorRt, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """Whole processes are not started: they would not have the faked driver."""
    asked = []
    monkeypatch.setattr(measure, "measure", lambda entrants, *_, keep_going: asked.extend(entrants))
    scan = tmp_path / "a.nii.gz"
    scan.write_bytes(b"")
    assert main(["bench", str(built), "--device", "cuda", "--batches", "1", "--seconds", "0", "--out", str(tmp_path),
                 "--scan", str(scan)]) == 0
    shown = capsys.readouterr().out
    assert "not run: torch-fp32, batch 1: " in shown
    assert [(entrant.name, entrant.job.backend, entrant.job.device, entrant.job.preprocess) for entrant in asked] == [
        (f"{name}{extra}", name.split("-")[0], "cuda", where) for name in ("tensorrt_rtx-fp16", "tensorrt-fp16")
        for extra, where in (("", "cpu"), (", preprocessed on the GPU", "gpu"))]
    document = json.loads((tmp_path / "h100-dcformer-nano.json").read_text())
    assert {row["name"] for row in document["rows"]} == set(names_of(open_bundle(built)))
    text = (tmp_path / "h100-dcformer-nano.md").read_text()
    assert "| tensorrt-fp16 | 1 |" in text
    assert "- torch-fp32, batch 1: " in text
    page = (tmp_path / "h100-dcformer-nano.html").read_text()
    assert "<td>tensorrt-fp16</td>" in page and "torch-fp32, batch 1: " in page


@pytest.mark.parametrize(("options", "message"), [
    (["--batches", "0"], "--batches '0': expected whole numbers from 1 to 64"),
    (["--batches", "1,1"], "each once"), (["--load-only"], "--device cuda measures a BUNDLE"),
    (["--against", "torch"], "--against 'torch': with --device cuda expected some of torch-fp32, torch-fp16, "),
    (["--against", "torch-fp16,torch-fp16"], "each once (engines: those that the bundle has)")])
def test_refusals(built: Path, capsys, options: list[str], message: str):
    assert main(["bench", str(built), "--device", "cuda", *options]) == 2
    assert message in capsys.readouterr().err
    assert main(["bench", str(built), "--batches", "1"]) == 2
    assert "--batches is for --device cuda" in capsys.readouterr().err


def test_without_a_gpu(built: Path, capsys):
    assert main(["bench", str(built), "--device", "cuda"]) == 3
    assert "error: " in capsys.readouterr().err


def test_memory_at_most_by_nvml(monkeypatch: pytest.MonkeyPatch):
    """Also what comes and goes between the beginning and the end; without it, or where it fails, there is no figure."""
    used, looks, ended, asked = [5 << 20], [0], [], []

    def look(handle: object) -> SimpleNamespace:
        looks[0] += 1
        return SimpleNamespace(used=used[0])

    library = SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByPciBusId=asked.append, nvmlShutdown=lambda: ended.append(True),
        nvmlDeviceGetMemoryInfo=look)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    with nvml.PeakMemory(b"0000:3b:00.0") as peak:
        used[0], seen = 12 << 20, looks[0]
        while looks[0] < seen + 2:
            time.sleep(0.001)
        used[0] = 6 << 20
    assert (peak.grown_bytes, ended, asked) == (7 << 20, [True], [b"0000:3b:00.0"])
    with pytest.raises(ZeroDivisionError), nvml.PeakMemory(b""):
        1 / 0  # noqa: B018 - whatever happens inside
    assert ended == [True, True]
    library.nvmlDeviceGetMemoryInfo = lambda handle: 1 / 0
    with nvml.PeakMemory(b"") as peak:
        pass
    assert peak.grown_bytes is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed
    with nvml.PeakMemory(b"") as peak:
        pass
    assert peak.grown_bytes is None


def test_what_takes_long_to_compile_is_compiled_once(built: Path, library: FakeTensorRt,
                                                     monkeypatch: pytest.MonkeyPatch):
    """The report is there after each batch, and a contender that was tuned for minutes is left out of later ones."""
    monkeypatch.setattr(race, "COMPILED", ("tensorrt-fp16",))
    monkeypatch.setattr(race, "_LONGEST_LOAD_MS", 0)
    names, known = ["tensorrt-fp16", "tensorrt_rtx-fp16"], []
    report = race.race(open_bundle(built), None, names, [1, 2], 2, 0, on_batch=known.append)
    assert [len(one.rows) for one in known] == [2, 4]
    assert known[1] == report
    assert {(row.name, row.batch): row.problem is None for row in report.rows} == {
        ("tensorrt-fp16", 1): True, ("tensorrt_rtx-fp16", 1): True, ("tensorrt-fp16", 2): False,
        ("tensorrt_rtx-fp16", 2): True}
    assert "s to compile for a batch of 1; --against tensorrt-fp16 measures it alone" in "".join(
        row.problem or "" for row in report.rows)
    report = race.race(open_bundle(built), None, names[:1], [1, 2], 2, 0)
    assert all(row.problem is None for row in report.rows)


def test_a_lost_device_is_told_and_what_was_finished_kept(built: Path, library: FakeTensorRt):
    bundle: Bundle = open_bundle(built)
    driver = library.driver

    def lose(batch: str) -> None:
        if batch.startswith("batch 2"):
            driver.fail["cuMemcpyHtoDAsync"] = type(driver).CUresult.CUDA_ERROR_ILLEGAL_ADDRESS

    report = race.race(bundle, None, ["tensorrt-fp16"], [1, 2, 3], 2, 0, lose)
    assert [(row.batch, row.problem is None) for row in report.rows] == [(1, True), (2, False), (3, False)]
    assert "the GPU failed" in str(report.rows[1].problem)


def test_one_that_fails_on_the_way_does_not_end_the_others(built: Path, library: FakeTensorRt,
                                                           monkeypatch: pytest.MonkeyPatch):
    runs = []

    def fail_later(self: object) -> None:
        runs.append(self)
        if len(runs) > 8:
            raise ValueError("out of something")
        real(self)

    real = contenders._Engine.enqueue
    monkeypatch.setattr(contenders._Engine, "enqueue", lambda self: fail_later(self) if "tensorrt-" in name_of(self)
                        else real(self))

    def name_of(contender: object) -> str:
        return "tensorrt-" if "tensorrt 10" in contender.describe() else ""  # type: ignore[attr-defined]

    report = race.race(open_bundle(built), None, ["tensorrt-fp16", "tensorrt_rtx-fp16"], [1], 2, 0)
    rows = {row.name: row for row in report.rows}
    assert rows["tensorrt-fp16"].problem == "ValueError: out of something"
    assert rows["tensorrt_rtx-fp16"].ratio == 1

"""What a GPU must do: on a real one with ``pytest -m gpu``, and on the faked one everywhere."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpus import KINDS, FakedGpu, RealGpu

from dcformer_deploy.benchmarks.gpu.clock import Clock
from dcformer_deploy.benchmarks.gpu.floors import _Copy
from dcformer_deploy.runtime import load
from dcformer_deploy.runtime.backends.borrow import borrow
from dcformer_deploy.runtime.backends.device import Device, Memory, Stream, plan_buffers
from dcformer_deploy.runtime.backends.sampler import Sampler
from dcformer_deploy.runtime.errors import InferenceError, InputError
from dcformer_deploy.runtime.gpu import current_gpu
from dcformer_deploy.runtime.manifest import Preprocessing, TensorInfo
from dcformer_deploy.runtime.model import Model
from dcformer_deploy.runtime.volume import image_feeds, scan_feeds
from dcformer_deploy.runtime.volume.types import LinearMap, Volume

Gpu = FakedGpu | RealGpu
SPEC = Preprocessing((48, 64, 80))
LINES = [TensorInfo(f"lines_{axis}", "float32", ("batch", 1, *sides))
         for axis, sides in (("d", (48, 16, 20)), ("h", (12, 64, 20)), ("w", (12, 16, 80)))]
#: Of FP16 engines, over what is added by rounding: the faked ones compute exactly what the graph says.
LEAST_DB = 40.0


@pytest.fixture(params=KINDS)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    if request.param == "real":
        return RealGpu()
    return FakedGpu(request.getfixturevalue("kernels"), monkeypatch)


@pytest.fixture
def device(gpu: Gpu) -> Device:
    made = Device(driver=gpu.driver)
    made.use()
    return made


# ------------------------------------------------------------------ memory, streams, graphs


def _pinned(memory: Memory, name: str, count: int) -> np.ndarray:
    return memory.view(name, (count,), np.dtype(np.uint8))


def test_bytes_come_back(device: Device):
    rng, count = np.random.default_rng(0), 3_000_001
    memory, stream = Memory(device, plan_buffers({"a": count, "b": count})), Stream(device)
    sent = rng.integers(0, 256, count, np.uint8)
    _pinned(memory, "a", count)[:] = sent
    stream.upload(memory.address("a"), memory.staging("a"), count)
    stream.copy(memory.address("b"), memory.address("a"), count)
    stream.download(memory.staging("b"), memory.address("b"), count)
    stream.wait()
    np.testing.assert_array_equal(_pinned(memory, "b", count), sent)
    stream.close()
    memory.close()


def test_what_is_recorded_is_done_when_it_is_replayed(device: Device):
    count = 4096
    memory, stream = Memory(device, plan_buffers({"a": count, "b": count})), Stream(device)

    def bring() -> np.ndarray:
        stream.download(memory.staging("b"), memory.address("b"), count)
        stream.wait()
        return _pinned(memory, "b", count).copy()

    _pinned(memory, "b", count)[:] = 0
    stream.upload(memory.address("b"), memory.staging("b"), count)
    graph = stream.capture(lambda: stream.copy(memory.address("b"), memory.address("a"), count))
    for value in (1, 2, 3):
        _pinned(memory, "a", count)[:] = value
        stream.upload(memory.address("a"), memory.staging("a"), count)
        assert (bring() == value - 1).all()  # not yet
        stream.replay(graph)
        assert (bring() == value).all()
    graph.close()
    stream.close()
    memory.close()


def test_out_of_memory_and_on(gpu: Gpu, device: Device):
    with pytest.raises(InferenceError, match=r"out of GPU memory \(cuMemAlloc\)"):
        gpu.run_out_of_memory(lambda count: Memory(device, plan_buffers({"a": count})))
    Memory(device, plan_buffers({"a": 100})).close()


def test_time_of_a_copy(gpu: Gpu, device: Device, monkeypatch: pytest.MonkeyPatch):
    """Positive, and of a real one within what GPUs do: 20 GB/s to 20 TB/s."""
    count = (256 if gpu.is_real else 1) << 20
    monkeypatch.setattr("dcformer_deploy.benchmarks.gpu.floors._COPIED", count)
    memory, stream = Memory(device, plan_buffers({"from": count, "to": count}), staging=False), Stream(device)
    milliseconds = Clock(device).time_ms(_Copy(device, memory, stream), 20)
    assert milliseconds > 0
    if gpu.is_real:
        assert 2e10 < 2 * count / milliseconds * 1e3 < 2e13
    stream.close()
    memory.close()


# ------------------------------------------------------------------ kernels


def _sampler(gpu: Gpu, device: Device) -> Sampler:
    return Sampler(device, current_gpu().compute_capability if gpu.is_real else "9.0")


@pytest.mark.parametrize("dtype", ["i1", "u1", "<i2", ">i2", "<u2", "<i4", "<u4", "<f4", "<f8"])
@pytest.mark.parametrize("scaling", [(), (LinearMap(1.5, -1024.3), LinearMap(0.7, 3.0))])
@pytest.mark.parametrize("read", ["float32", "float16"])
def test_scans_as_on_the_cpu(gpu: Gpu, device: Device, dtype: str, scaling: tuple[LinearMap, ...], read: str):
    """Every bit: lines, a whole volume, cropped, padded."""
    made = _sampler(gpu, device)
    rng = np.random.default_rng(0)
    low, high = (0, 127) if dtype.endswith("1") else (0, 3000) if "u" in dtype else (-1100, 1500)
    stored = np.asfortranarray(rng.integers(low, high, (97, 110, 41)).astype(dtype))
    infos = [TensorInfo(info.name, read, info.axes) for info in LINES]
    whole = [TensorInfo("volume", read, ("batch", 1, *SPEC.shape_dhw))]
    for volume in (Volume("scan.nii", stored, scaling, (0.8, 0.7, 1.9), "LPS"),
                   Volume("scan.nii", stored[::-1].transpose(1, 0, 2), scaling, (0.4, 0.6, 3.0), "LPS")):
        for inputs in (infos, whole):
            expected = scan_feeds(inputs, volume, SPEC, 2)
            for name, array in made.feeds(volume, SPEC, inputs).items():
                np.testing.assert_array_equal(made.fetch(array), expected[name])
    made.close()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_volumes_that_are_there(gpu: Gpu, device: Device, dtype: str):
    made = _sampler(gpu, device)
    volumes = np.random.default_rng(1).uniform(-1, 1, (2, *SPEC.shape_dhw)).astype(dtype)
    wide = np.zeros((2, *SPEC.shape_dhw[:2], 90), dtype)
    wide[..., 10:] = volumes
    for read in ("float32", "float16"):
        infos = [TensorInfo(info.name, read, info.axes) for info in LINES]
        for array in (gpu.put(volumes), gpu.put(wide)[..., 10:]):
            lying = borrow(array)
            assert lying is not None
            for name, expected in image_feeds(infos, volumes).items():
                found: Any = made.thin(lying, SPEC, infos)[name]
                np.testing.assert_array_equal(made.fetch(found), expected)
    volumes[1, -4, -4, -4] = 2
    lying = borrow(gpu.put(volumes))
    assert lying is not None
    with pytest.raises(InputError, match="NaN, or values outside"):
        made.thin(lying, SPEC, LINES)
    made.close()


@pytest.mark.gpu
def test_a_lost_device_says_so():
    """In a process of its own, whose context a kernel that writes to nowhere ends."""
    RealGpu()
    code = """
import sys
from dcformer_deploy.runtime.backends.device import Device
from dcformer_deploy.runtime.backends.sampler import Sampler, Thinning
from dcformer_deploy.runtime.errors import DeviceLost
from dcformer_deploy.runtime.gpu import current_gpu
device = Device()
made = Sampler(device, current_gpu().compute_capability)
for turn in range(2):
    try:
        with made._working():
            made._launch(made._thin, Thinning(volumes=256, outside=512, batch=1, depth=1, height=1, width=1), 1)
    except DeviceLost as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in first
    assert "the GPU failed before" in second


# ------------------------------------------------------------------ engines


@pytest.fixture
def bundle(gpu: Gpu, calibrated: Path, tmp_path: Path) -> Path:
    return gpu.with_engines(calibrated, tmp_path / "bundle")


def _volumes(model: Model, count: int) -> np.ndarray:
    shape = model.manifest.preprocessing.shape_dhw
    return np.random.default_rng(count).uniform(-1, 1, (count, *shape)).astype(np.float32)


def _noise_db(exact: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10((exact.astype(float) ** 2).sum() / ((found.astype(float) - exact) ** 2).sum()))


def _batches(model: Model, exact: Model) -> dict[int, dict[str, np.ndarray]]:
    """Outputs by batch: near fp32's, and the same bits plain, recorded, replayed and recorded anew."""
    known: dict[int, dict[str, np.ndarray]] = {}
    for count in (1, 1, 1, 3, 3, 3, 2, 1, 1):
        volumes = _volumes(model, count)
        found = model.image_outputs(volumes)
        assert _noise_db(exact.image_outputs(volumes)["feature_map"], found["feature_map"]) > LEAST_DB, count
        for name, array in known.setdefault(count, found).items():
            np.testing.assert_array_equal(found[name], array)
    return known


def test_engines(gpu: Gpu, bundle: Path, calibrated: Path, scans: Path):
    """All in one, as building takes time."""
    exact, paths = load(calibrated), sorted(scans.iterdir())
    for library in gpu.libraries:
        model = load(bundle, device="cuda", backend=library, precision="fp16")
        known, counts = _batches(model, exact), [1, 2, 3] * 8
        volumes = {count: _volumes(model, count) for count in known}
        with ThreadPoolExecutor(16) as pool:
            at_once = list(pool.map(model.image_outputs, [volumes[count] for count in counts]))
        for found, count in zip(at_once, counts, strict=True):
            np.testing.assert_array_equal(found["image_embedding"], known[count]["image_embedding"])
        lying = gpu.put(volumes[2])
        np.testing.assert_array_equal(model.image_outputs(lying)["image_embedding"], known[2]["image_embedding"])
        np.testing.assert_array_equal(model.embed_image(lying[0]), model.embed_image(volumes[2][0]))
        texts = [f"There are {number} nodules." for number in range(7)]
        assert (exact.embed_text(texts) * model.embed_text(texts)).sum(axis=1).min() > 0.999
        there = load(bundle, device="cuda", backend=library, precision="fp16", preprocess="gpu")
        np.testing.assert_array_equal(there.embed_images(paths), model.embed_images(paths))
        together = there.embed_batch([there.prepare(path) for path in paths[:3]])
        np.testing.assert_array_equal(together, model.embed_batch([model.prepare(path) for path in paths[:3]]))

"""The preprocessing kernel: compiled for GPUs, and compiled for the host against the CPU's own preprocessing."""

import ctypes
import dataclasses
import gc
import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from fake_gpu import FakeDriver, Status, install, with_engines

from dcformer_deploy.runtime import InputError, load
from dcformer_deploy.runtime.backends import Options, sampler
from dcformer_deploy.runtime.backends.borrow import Borrowed, borrow
from dcformer_deploy.runtime.backends.device import Device
from dcformer_deploy.runtime.backends.sampler import SOURCE, Job, Sampler, Thinning, compile_kernel, plan_task
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.errors import InferenceError, MissingDependency
from dcformer_deploy.runtime.manifest import Preprocessing, TensorInfo
from dcformer_deploy.runtime.volume import image_feeds, scan_feeds
from dcformer_deploy.runtime.volume.types import LinearMap, Volume

SPEC = Preprocessing((24, 32, 40))
LINES = [TensorInfo(f"lines_{axis}", "float32", ("batch", 1, *sides))
         for axis, sides in (("d", (24, 8, 10)), ("h", (6, 32, 10)), ("w", (6, 8, 40)))]


@pytest.fixture
def driver(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    fake.kernels = kernels
    monkeypatch.setattr(sampler, "compile_kernel", lambda capability, nvrtc: b"machine code")
    return fake


def _volume(dtype: str = "<i2", shape: tuple[int, int, int] = (37, 45, 19), scaling: tuple[LinearMap, ...] = (),
            seed: int = 0) -> Volume:
    rng = np.random.default_rng(seed)
    low, high = (0, 255) if dtype.endswith("1") else (0, 3000) if "u" in dtype else (-1100, 1500)
    stored = np.asfortranarray(rng.integers(low, min(high, 127 if dtype == "i1" else high), shape).astype(dtype))
    return Volume("scan.nii", stored, scaling, (0.8, 0.7, 1.9), "LPS")


def _found(driver: FakeDriver, volume: Volume, spec: Preprocessing, infos: list[TensorInfo]) -> dict[str, np.ndarray]:
    feeds = Sampler(Device(driver=driver), "9.0").feeds(volume, spec, infos)
    arrays = {}
    for name, array in feeds.items():
        address = array.__cuda_array_interface__["data"][0]
        size = int(np.prod(array.shape)) * array.dtype.itemsize
        block = (ctypes.c_byte * size).from_address(address)
        arrays[name] = np.frombuffer(memoryview(block), array.dtype).reshape(array.shape).copy()
    return arrays


@pytest.mark.parametrize("dtype", ["i1", "u1", "<i2", ">i2", "<u2", "<i4", "<u4", "<f4", "<f8"])
@pytest.mark.parametrize("scaling", [(), (LinearMap(1.5, -1024.3), LinearMap(0.7, 3.0))])
def test_the_same_bits_as_on_the_cpu(driver: FakeDriver, dtype: str, scaling: tuple[LinearMap, ...]):
    volume = _volume(dtype, scaling=scaling)
    expected = scan_feeds(LINES, volume, SPEC, 1)
    for name, array in _found(driver, volume, SPEC, LINES).items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("spec", [
    SPEC, Preprocessing((8, 12, 16)), Preprocessing((64, 96, 96)), Preprocessing((24, 32, 40), resampling="to_shape"),
    Preprocessing((24, 32, 40), intensity="min_max", crops_to_foreground=True)])
def test_crops_pads_and_windows(driver: FakeDriver, spec: Preprocessing):
    volume = _volume(shape=(50, 41, 33))
    infos = [TensorInfo("volume", "float32", ("batch", 1, *spec.shape_dhw))]
    np.testing.assert_array_equal(_found(driver, volume, spec, infos)["volume"],
                                  scan_feeds(infos, volume, spec, 1)["volume"])


def test_views_of_the_stored_voxels(driver: FakeDriver):
    """Flipped, transposed and cut, as reorientation leaves them."""
    base = np.arange(30 * 40 * 50, dtype=np.int16).reshape(30, 40, 50) % 2500 - 1000
    for stored in (base[::-1], base.transpose(2, 0, 1)[:, ::-1], base[3:9, 5:, ::-1], base[::2, ::3, 1::4]):
        volume = dataclasses.replace(_volume(), stored=stored, spacing_hwd_mm=(1.0, 1.0, 2.0))
        expected = scan_feeds(LINES, volume, SPEC, 1)
        for name, array in _found(driver, volume, SPEC, LINES).items():
            np.testing.assert_array_equal(array, expected[name])


def test_float16(driver: FakeDriver, kernels: Any):
    """Rounded as numpy does, ties and numbers below the normal ones included."""
    infos = [dataclasses.replace(info, dtype="float16") for info in LINES]
    volume = _volume()
    expected = scan_feeds(infos, volume, SPEC, 1)
    for name, array in _found(driver, volume, SPEC, infos).items():
        assert array.dtype == np.float16
        np.testing.assert_array_equal(array, expected[name])
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.uniform(-1, 1, 20000), 2.0 ** rng.uniform(-30, 3, 20000), [0.0, -0.0, 2**-24, 2**-25,
                             1.5 * 2**-24, 1 + 2**-11, 1 + 3 * 2**-11, 65504.0, -1 - 2**-11]]).astype(np.float32)
    found = np.array([kernels.half_of(value) for value in values], np.uint16)
    np.testing.assert_array_equal(found, values.astype(np.float16).view(np.uint16))


def test_halves_are_numpys(kernels: Any):
    """All of them, infinities and NaN too, both ways."""
    halves = np.arange(1 << 16, dtype=np.uint16)
    values = halves.view(np.float16).astype(np.float32)
    found = np.array([kernels.float_of(int(half)) for half in halves], np.float32)
    np.testing.assert_array_equal(found, values)
    back = np.array([kernels.half_of(value) for value in values], np.uint16).view(np.float16)
    np.testing.assert_array_equal(back, values.astype(np.float16))
    for value in (65519.9, 65520.0, 1e30, -65520.0, np.inf, -np.inf, np.nan):
        with np.errstate(over="ignore"):
            expected = np.float16(value)
        np.testing.assert_array_equal(np.uint16(kernels.half_of(value)).view(np.float16), expected)


def test_the_structs_are_what_the_kernels_declare(kernels: Any):
    for argument, name in ((Job, "sample_lines_bytes"), (Thinning, "thin_bytes")):
        assert ctypes.sizeof(argument) == ctypes.c_ulong.in_dll(kernels, name).value


def _lying(array: np.ndarray) -> Borrowed:
    steps = tuple(stride // array.itemsize for stride in array.strides)
    return Borrowed(array.ctypes.data, array.shape, array.dtype.name, steps, array, ())


def _on_host(array: Any) -> np.ndarray:
    borrowed = borrow(array)
    assert borrowed is not None and borrowed.packed
    block = (ctypes.c_byte * (int(np.prod(borrowed.shape)) * np.dtype(borrowed.dtype).itemsize))
    return np.frombuffer(block.from_address(borrowed.address), borrowed.dtype).reshape(borrowed.shape).copy()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("read", ["float32", "float16"])
def test_volumes_on_the_device(driver: FakeDriver, dtype: str, read: str):
    """Lines of them, the same as of arrays on the host; with gaps, too."""
    made = Sampler(Device(driver=driver), "9.0")
    volumes = np.random.default_rng(0).uniform(-1, 1, (3, *SPEC.shape_dhw)).astype(dtype)
    infos = [dataclasses.replace(info, dtype=read) for info in LINES]
    wide = np.zeros((3, 24, 32, 50), dtype)
    wide[..., 5:45] = volumes
    for lying in (volumes, wide[..., 5:45], volumes.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)):
        found = made.thin(_lying(lying), SPEC, infos)
        for name, expected in image_feeds(infos, volumes).items():
            np.testing.assert_array_equal(_on_host(found[name]), expected)
            assert _on_host(found[name]).dtype == read


def test_whole_volumes_on_the_device_are_not_copied(driver: FakeDriver):
    made = Sampler(Device(driver=driver), "9.0")
    volumes = np.random.default_rng(0).uniform(-1, 1, (2, *SPEC.shape_dhw)).astype(np.float16)
    infos = [TensorInfo("volume", "float16", ("batch", 1, *SPEC.shape_dhw))]
    found = borrow(made.thin(_lying(volumes), SPEC, infos)["volume"])
    assert found is not None
    assert (found.address, found.shape) == (volumes.ctypes.data, (2, 1, *SPEC.shape_dhw))
    assert found.owner is volumes
    other = made.thin(_lying(volumes), SPEC, [dataclasses.replace(infos[0], dtype="float32")])["volume"]
    np.testing.assert_array_equal(_on_host(other), volumes[:, None].astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("value", [1.01, -1.01, np.nan, np.inf])
def test_volumes_on_the_device_that_are_no_preprocessed_ones(driver: FakeDriver, value: float, dtype: str):
    made = Sampler(Device(driver=driver), "9.0")
    volumes = np.zeros((2, *SPEC.shape_dhw), dtype)
    for infos in (LINES, [TensorInfo("volume", dtype, ("batch", 1, *SPEC.shape_dhw))]):
        made.thin(_lying(volumes), SPEC, infos)
        volumes[1, 20, 28, 36] = value
        with pytest.raises(InputError, match=r"volumes: NaN, or values outside \[-1, 1\]; expected a preprocessed"):
            made.thin(_lying(volumes), SPEC, infos)
        volumes[1, 20, 28, 36] = 0
    for wrong in (volumes[:, 1:], volumes[0], volumes.astype(np.float64)):
        with pytest.raises(InputError, match=r"on the GPU; expected float32 or float16 \[batch, 24, 32, 40\]"):
            made.thin(_lying(wrong), SPEC, LINES)


def test_memory_is_used_again(driver: FakeDriver):
    made = Sampler(Device(driver=driver), "9.0")
    small, large = _volume(), _volume(shape=(60, 60, 40))
    for volume in (small, small, large, small, small):
        feeds = made.feeds(volume, SPEC, LINES)
        assert len(driver.blocks) == 2
        del feeds
        gc.collect()
    assert driver.calls.count("cuMemAlloc") == 2
    made.release()
    assert not driver.blocks
    held = made.feeds(small, SPEC, LINES)
    made.close()
    assert len(driver.blocks) == 2
    assert not driver.streams
    del held
    gc.collect()
    assert not driver.blocks
    made = Sampler(Device(driver=driver), "9.0")
    one, other = (made.feeds(small, SPEC, LINES) for _ in range(2))
    addresses = {array.__cuda_array_interface__["data"][0] for feeds in (one, other) for array in feeds.values()}
    assert len(addresses) == 6  # what someone still holds is not written over


def test_errors_are_those_of_the_cpu(driver: FakeDriver):
    made = Sampler(Device(driver=driver), "9.0")
    with pytest.raises(InputError, match="scan.nii: 37 voxels at 0.01 mm are less than one voxel of 0.75 mm"):
        made.feeds(dataclasses.replace(_volume(), spacing_hwd_mm=(0.01, 0.7, 1.9)), SPEC, LINES)
    with pytest.raises(InputError, match="scan.nii: complex64 voxels with 0 maps to HU; preprocess on the CPU"):
        plan_task(dataclasses.replace(_volume(), stored=np.zeros((9, 9, 9), np.complex64)), SPEC, (1, 1, 1),
                  np.dtype(np.float32))
    driver.fail["cuLaunchKernel"] = Status.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(InferenceError, match="out of GPU memory"):
        made.feeds(_volume(), SPEC, LINES)
    assert made.feeds(_volume(), SPEC, LINES)


def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch):
    def load_nothing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(sampler.importlib, "import_module", load_nothing)
    with pytest.raises(MissingDependency, match="NVRTC is not installed .*; pip install 'cuda-python"):
        compile_kernel("9.0")
    for where, backend in (("gpu", "onnxruntime"), ("tpu", "tensorrt")):
        with pytest.raises(InputError, match="preprocess: '.pu'; expected cpu, or with the back ends"):
            Options("cuda", backend=backend, preprocess=where)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
def test_it_compiles_for_gpus(architecture: str, tmp_path: Path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    subprocess.run(["nvcc", "-fmad=false", f"-arch={architecture}", "-cubin", "-o", tmp_path / "k.cubin", SOURCE],
                   check=True)
    assert (tmp_path / "k.cubin").stat().st_size > 1000


def test_from_a_file_to_an_embedding(calibrated: Path, scans: Path, kernels: Any, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch, capsys):
    """On eight threads, preprocessed on the GPU or not: the same embeddings; `dcformer check` compares inputs, too."""
    pytest.importorskip("tensorrt_rtx")
    bundle = with_engines(calibrated, tmp_path / "bundle")
    sampled = install(bundle, monkeypatch)
    sampled.driver.kernels = kernels
    monkeypatch.setattr(sampler, "compile_kernel", lambda capability, nvrtc: b"machine code")
    models = [load(bundle, device="cuda", backend="tensorrt", precision="fp16", preprocess=where)
              for where in ("cpu", "gpu")]
    paths = sorted(scans.iterdir())
    expected = models[0].embed_images(paths)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(models[1].embed_image, paths * 4))
    for embedding, wanted in zip(found, [*expected] * 4, strict=True):
        np.testing.assert_array_equal(embedding, wanted)
    paths, expected = paths[:3], expected[:3]  # that the engines take at once
    prepared = [models[1].prepare(path) for path in paths]
    ran = [model._graph("image") for model in models]
    driver = sampled.driver
    driver.calls.clear()
    np.testing.assert_array_equal(models[1].embed_batch(prepared), expected)
    assert driver.calls.count("cuStreamSynchronize") == 1  # one inference, of all of them
    assert driver.calls.count("cuMemcpyDtoDAsync") == len(paths) * 3
    assert driver.calls.count("cuMemcpyHtoDAsync") == driver.calls.count("cuCtxSynchronize") == 0
    mixed = models[1].embed_batch([prepared[0], models[0].prepare(paths[1])])
    np.testing.assert_array_equal(mixed, expected[:2])
    del prepared
    gc.collect()
    for model in ran:
        model.close()  # type: ignore[attr-defined]
    assert not driver.blocks
    chosen = load(bundle, device="cuda", backend="tensorrt", precision="fp16", preprocess="auto")
    read = sum(int(np.prod(info.axes[-3:])) * 2 for info in chosen._info("image").inputs)
    was_there = []
    for path in sorted(scans.iterdir()):
        was_there.append(not isinstance(chosen.prepare(path).feeds["lines_d"], np.ndarray))
        assert was_there[-1] == (np.prod(nib.load(path).shape) * 2 <= read)
    assert set(was_there) == {True, False}
    wide = nib.Nifti1Image(np.full((20, 20, 20), -500, np.int64), np.diag([-2, -2, 2, 1]), dtype="int64")
    nib.save(wide, tmp_path / "wide.nii")
    assert isinstance(chosen.prepare(tmp_path / "wide.nii").feeds["lines_d"], np.ndarray)  # unknown to the kernel
    arguments = ["check", str(bundle), "--data", str(scans), "--samples", "2", "--json"]

    def checked() -> dict[str, Any]:
        rows = json.loads(capsys.readouterr().out)
        return {row["file"]: row for row in rows if row["file"].startswith("preprocessing")}

    capsys.readouterr()
    assert main(arguments) == 0
    assert {name: row["max_error"] for name, row in checked().items()} == {
        "preprocessing, float32": 0, "preprocessing, float16": 0}
    real = kernels.sample_lines
    monkeypatch.setattr(install(bundle, monkeypatch).driver, "kernels", SimpleNamespace(
        sample_lines=lambda job, blocks, threads: real(job, blocks // 2, threads), thin=kernels.thin))
    assert main(arguments) == 1
    assert [row["passed"] for row in checked().values()] == [False, False]

    def refuse(*_: object) -> bytes:
        raise MissingDependency("no NVRTC")

    monkeypatch.setattr(sampler, "compile_kernel", refuse)
    assert main(arguments) == 0
    assert checked()["preprocessing"]["not_run"] == "no NVRTC"

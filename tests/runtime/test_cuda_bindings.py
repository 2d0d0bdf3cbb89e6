"""NVIDIA's real bindings, without a GPU: calls of the driver end in a stub of it, and NVRTC compiles for real.

The fake driver takes arguments of any type. The bindings do not: an int in place of bytes, a wrong struct or a wrong
order is an error, or arrives as something else. ``stub_cuda.c`` is the ``libcuda.so.1`` that they load then, in
processes of their own, as bindings load a driver once.
"""

import ctypes
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dcformer_deploy.benchmarks.gpu import Floors, floors
from dcformer_deploy.benchmarks.gpu.clock import Clock
from dcformer_deploy.runtime.backends import sampler
from dcformer_deploy.runtime.backends.borrow import borrow
from dcformer_deploy.runtime.backends.device import Device, Memory, Stream, plan_buffers
from dcformer_deploy.runtime.backends.sampler import DeviceArray, Job, Sampler, Thinning, compile_kernel
from dcformer_deploy.runtime.engines import Gpu
from dcformer_deploy.runtime.errors import DeviceLost, DeviceUnavailable, InferenceError, MissingDependency
from dcformer_deploy.runtime.gpu import current_gpu, import_driver
from dcformer_deploy.runtime.manifest import Preprocessing, TensorInfo
from dcformer_deploy.runtime.volume import scan_feeds
from dcformer_deploy.runtime.volume.types import LinearMap, Volume

STUB = Path(__file__).with_name("stub_cuda.c")
MEMORY = 80 << 30
FLOATS = np.dtype(np.float32)
#: By scenario: how its process ended, and the driver's functions that it called.
Outcomes = dict[str, tuple[subprocess.CompletedProcess[str], set[str]]]


# What runs on the stub, each in a process of its own.

def _opened() -> tuple[Device, Clock]:
    device = Device()
    device.use()
    return device, Clock(device)


def _fail(name: str, status: str) -> None:
    os.environ["STUB_CUDA_FAIL"] = f"{name} {int(getattr(import_driver().CUresult, status))}"


def _device() -> None:
    assert current_gpu() == Gpu("Stub GPU", "9.0", MEMORY)
    with pytest.raises(DeviceUnavailable, match="the NVIDIA driver answered CUDA_ERROR_INVALID_DEVICE"):
        current_gpu(1)
    device = Device()
    found: list[Exception | None] = []

    def make_stream() -> None:
        try:
            Stream(device).close()
            found.append(None)
        except InferenceError as error:
            found.append(error)

    make_stream()
    device.use()
    make_stream()
    for work in (make_stream, lambda: (device.use(), make_stream())):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    # A context is that of a thread: another one has none before it asks for it.
    assert [str(error).split()[3] if error else None for error in found] == ["answered", None, "answered", None]
    assert "answered CUDA_ERROR_INVALID_CONTEXT to cuStreamCreate" in str(found[0])
    device.synchronize()
    assert device.pci_bus_id() == b"0000:3b:00.0"


def _memory() -> None:
    device, clock = _opened()
    memory, stream = Memory(device, plan_buffers({"a": 3999, "b": 4000})), Stream(device)
    assert clock.free_bytes() == MEMORY - 8192
    sent, received = (memory.view(name, (10, 100), FLOATS) for name in "ab")
    ordinary = np.zeros((10, 100), np.float32)
    sent[...] = np.random.default_rng(0).normal(size=sent.shape)
    stream.upload(memory.address("a"), memory.staging("a"), sent.nbytes)
    stream.copy(memory.address("b"), memory.address("a"), sent.nbytes)
    stream.download(memory.staging("b"), memory.address("b"), sent.nbytes)
    stream.download(ordinary.ctypes.data, memory.address("b"), sent.nbytes)
    assert np.isnan(received).all()
    stream.wait()
    np.testing.assert_array_equal(received, sent)
    np.testing.assert_array_equal(ordinary, sent)
    for copy, source, target in ((stream.upload, memory.address, memory.staging),
                                 (stream.download, memory.staging, memory.address)):
        with pytest.raises(InferenceError, match="CUDA_ERROR_INVALID_VALUE to cuMemcpy"):
            copy(target("a"), source("a"), 4)
    device.call("cuStreamSynchronize", stream.handle)  # streams of other libraries are integers, and these some of them
    device.call("cuStreamSynchronize", 1)
    memory.close()
    stream.close()
    assert clock.free_bytes() == MEMORY


def _graph() -> None:
    device, _ = _opened()
    memory, stream = Memory(device, plan_buffers({"a": 16})), Stream(device)
    values, found = memory.view("a", (4,), FLOATS), np.zeros(4, np.float32)

    def there_and_back() -> None:
        stream.upload(memory.address("a"), memory.staging("a"), values.nbytes)
        stream.download(found.ctypes.data, memory.address("a"), values.nbytes)

    def fail() -> None:
        there_and_back()
        raise KeyError("engine")

    values[...] = 1
    with pytest.raises(KeyError, match="engine"):
        stream.capture(fail)
    graph = stream.capture(there_and_back)
    stream.wait()
    assert not found.any()
    for value in (2, 3):
        values[...] = value
        stream.replay(graph)
        stream.wait()
        np.testing.assert_array_equal(found, np.full(4, value))
    graph.close()
    memory.close()
    stream.close()


def _sampler() -> None:
    device, clock = _opened()
    spec = Preprocessing((24, 32, 40))
    infos = [TensorInfo(f"lines_{axis}", dtype, ("batch", 1, *sides)) for axis, dtype, sides in (
        ("d", "float32", (24, 8, 10)), ("h", "float16", (6, 32, 10)), ("w", "float32", (6, 8, 40)))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "compile_kernel", lambda *_: os.environ["STUB_CUDA_KERNELS"].encode())
        made = Sampler(device, "9.0")

    def compare(seed: int, shape: tuple[int, int, int]) -> None:
        stored = np.random.default_rng(seed).integers(-1100, 1500, shape).astype(np.int16)
        volume = Volume("scan.nii", np.asfortranarray(stored), (LinearMap(1.5, -24.3),), (0.8, 0.7, 1.9), "LPS")
        (whole,) = made.feeds(volume, spec, [TensorInfo("volume", "float32", ("batch", 1, *spec.shape_dhw))]).values()
        interface = whole.__cuda_array_interface__ | {"shape": (1, *spec.shape_dhw)}
        volumes = borrow(SimpleNamespace(__cuda_array_interface__=interface))
        assert volumes is not None
        expected = scan_feeds(infos, volume, spec, 1)
        for feeds in (made.feeds(volume, spec, infos), made.thin(volumes, spec, infos)):
            for name, array in feeds.items():
                assert isinstance(array, DeviceArray)
                np.testing.assert_array_equal(made.fetch(array), expected[name])

    compare(0, (37, 45, 19))
    compare(1, (60, 50, 40))
    made.close()
    assert clock.free_bytes() == MEMORY


def _clock() -> None:
    device, clock = _opened()
    size = 1 << 20
    memory, stream = Memory(device, plan_buffers({"from": size, "to": size})), Stream(device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(floors, "_COPIED", size)
        patch.setattr(floors, "_matrix_rates", lambda clock: {})
        copy = floors._Copy(device, memory, stream)
        memory.view("from", (size,), np.dtype(np.uint8))[...] = 7
        stream.upload(memory.address("from"), memory.staging("from"), size)
        assert clock.time_ms(copy, 4) == 1  # a copy takes a millisecond of the stub
        stream.download(memory.staging("to"), memory.address("to"), size)
        stream.wait()
        assert (memory.view("to", (size,), np.dtype(np.uint8)) == 7).all()
        memory.close()
        assert floors.measure_floors(device, clock) == Floors(2 * size / 1e-3, {})
    assert clock.free_bytes() == MEMORY


def _errors() -> None:
    device, clock = _opened()
    plan = plan_buffers({"a": 16})
    for name, work in (("cuMemAlloc", lambda: Memory(device, plan)), ("cuMemAllocHost", lambda: Memory(device, plan)),
                       ("cuStreamCreate", lambda: Stream(device))):
        _fail(name, "CUDA_ERROR_OUT_OF_MEMORY")
        with pytest.raises(InferenceError, match=rf"out of GPU memory \({name}\); use a smaller batch"):
            work()
        assert clock.free_bytes() == MEMORY
    memory, stream = Memory(device, plan), Stream(device)
    _fail("cuStreamSynchronize", "CUDA_ERROR_ILLEGAL_ADDRESS")
    with pytest.raises(DeviceLost, match=r"the GPU failed in cuStreamSynchronize \(CUDA_ERROR_ILLEGAL_ADDRESS\)"):
        stream.wait()
    with pytest.raises(DeviceLost, match=r"failed before \(cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS\)"):
        device.use()
    memory.close()
    stream.close()
    assert not {"cuMemFreeHost", "cuStreamDestroy"} & set(Path(os.environ["STUB_CUDA_LOG"]).read_text().split())


SCENARIOS: dict[str, Callable[[], None]] = {
    "device": _device, "memory": _memory, "graph": _graph, "sampler": _sampler, "clock": _clock, "errors": _errors}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    pytest.importorskip("cuda.bindings.driver")
    if sys.platform != "linux" or shutil.which("gcc") is None or shutil.which("g++") is None:
        pytest.skip("no gcc and g++ to compile a stub of the driver for Linux")
    from host_kernels import compile_for_host  # here, as the scenarios' processes do not find it

    folder = tmp_path_factory.mktemp("stub")
    subprocess.run(["gcc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", STUB, "-ldl"],
                   check=True)
    kernels = compile_for_host(folder)
    found = {}
    for name in SCENARIOS:
        log = folder / f"{name}.log"
        environment = os.environ | {
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH")))),
            "STUB_CUDA_LOG": str(log), "STUB_CUDA_KERNELS": str(kernels)}
        ended = subprocess.run([sys.executable, "-X", "faulthandler", __file__, name], env=environment,
                               capture_output=True, text=True, timeout=120, check=False)
        found[name] = ended, set(log.read_text().split()) if log.exists() else set()
    return found


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_on_the_stub(outcomes: Outcomes, scenario: str):
    ended, called = outcomes[scenario]
    assert ended.returncode == 0, ended.stderr
    assert called


def test_nothing_is_left_out(outcomes: Outcomes):
    """Whatever the fake driver stands for was called through the real bindings, too."""
    from fake_gpu import FakeDriver

    called = set.union(*(names for _, names in outcomes.values()))
    assert {name for name in dir(FakeDriver) if name.startswith("cu")} <= called


@pytest.fixture(scope="module")
def _nvrtc() -> None:
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:  # the bindings', where they find no library
        pytest.skip(f"no NVRTC (pip install nvidia-cuda-nvrtc): {error}")


@pytest.mark.parametrize("capability", ["8.0", "9.0", "12.0"])
def test_nvrtc_compiles_for_gpus(_nvrtc: None, capability: str):
    """Machine code for that GPU, whose kernels take structs of the sizes that are handed over."""
    from host_kernels import NAMES

    code = compile_kernel(capability)
    magic, machine, flags = struct.unpack_from("<4s14xH28xI", code)
    assert (magic, machine) == (b"\x7fELF", 190)  # EM_CUDA
    assert int(capability.replace(".", "")) in (flags & 0xff, flags >> 8 & 0xff)  # CUDA 12 and 13
    assert all(name.encode() in code for name in NAMES)
    # EIATTR_CBANK_PARAM_SIZE of .nv.info, a half word: format 3, attribute 0x19
    assert all(b"\x03\x19" + struct.pack("<H", ctypes.sizeof(argument)) in code for argument in (Job, Thinning))


def test_nvrtc_refuses_what_it_does_not_know(_nvrtc: None):
    with pytest.raises(MissingDependency, match="NVRTC answered NVRTC_ERROR_INVALID_OPTION for compute capability 1.0"):
        compile_kernel("1.0")


if __name__ == "__main__":
    SCENARIOS[sys.argv[1]]()

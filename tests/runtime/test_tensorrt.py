"""The TensorRT back end on a faked driver: buffers, graphs, the pool, errors; and real refusals without a GPU."""

import dataclasses
import gc
import inspect
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeDriver, FakeTensorRt, Status, install
from gpus import OnDevice, aligned

from dcformer_deploy.calibration.emulate import emulated_bundle
from dcformer_deploy.runtime import InputError, gpu, load
from dcformer_deploy.runtime.backends import Options, device, sampler, tensorrt
from dcformer_deploy.runtime.backends.device import plan_buffers
from dcformer_deploy.runtime.bundle import open_bundle
from dcformer_deploy.runtime.engines import find_engine
from dcformer_deploy.runtime.errors import (
    DcformerError,
    DcformerWarning,
    DeviceLost,
    EngineRefused,
    InferenceError,
)
from dcformer_deploy.runtime.model import Model

pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def library(built: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    return install(built, monkeypatch)


def _model(built: Path, backend: str = "tensorrt") -> Model:
    return load(built, device="cuda", backend=backend, precision="fp16")


def _volumes(model: Model, count: int) -> np.ndarray:
    shape = model.manifest.preprocessing.shape_dhw
    return np.random.default_rng(count).uniform(-1, 1, (count, *shape)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The same graphs in ONNX Runtime, with every rounding."""
    folder = tmp_path_factory.mktemp("emulated")
    return Model(emulated_bundle(open_bundle(built), folder), Options(precision="fp16"))


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_outputs_are_the_engines(built: Path, expected: Model, library: FakeTensorRt, backend: str):
    """Batches of several sizes: kernels are recorded the second time in a row, replayed, forgotten at another size."""
    model = _model(built, backend)
    for count in (1, 1, 1, 3, 3, 3, 3, 1, 2, 2):
        volumes = _volumes(model, count)
        found, wanted = model.image_outputs(volumes), expected.image_outputs(volumes)
        assert set(found) == {"image_embedding", "feature_map", "codes"}
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array)
    assert library.contexts == 1
    assert library.driver.calls.count("cuMemAlloc") == 1
    captures, launches = (library.driver.calls.count(name) for name in ("cuStreamEndCapture", "cuGraphLaunch"))
    assert (captures, launches) == {"tensorrt": (3, 6), "tensorrt_rtx": (0, 0)}[backend]
    assert len(library.driver.graphs) == min(1, captures)  # of the last size alone
    texts = ["There is emphysema.", "no"]
    np.testing.assert_array_equal(model.embed_text(texts), expected.embed_text(texts))
    assert f"{backend} " in model.describe()
    assert "NVIDIA H100" in model.describe()


def test_arrays_on_the_device_are_read_where_they_are(built: Path, expected: Model, library: FakeTensorRt):
    options = Options("cuda", backend="tensorrt", precision="fp16")
    backend = tensorrt.TensorRtBackend(open_bundle(built), "image", options)
    graph = expected.manifest.graph("image", "fp16")
    assert graph is not None
    for seed in range(3):
        rng = np.random.default_rng(seed)
        host = {info.name: aligned(rng.uniform(-1, 1, (2, *info.axes[1:])).astype(np.float16)) for info in graph.inputs}
        (found,) = backend.run({name: OnDevice(array, version=2) for name, array in host.items()}, ["feature_map"])
        (wanted,) = backend.run(host, ["feature_map"])
        np.testing.assert_array_equal(found, wanted)
    assert library.driver.calls.count("cuCtxSynchronize") == 3
    uploads = library.driver.calls.count("cuMemcpyHtoDAsync")
    assert uploads == 9  # of the host's arrays alone
    assert library.driver.calls.count("cuMemcpyDtoDAsync") == 0
    gaps = {name: OnDevice(array, strides=(1,) * array.ndim) for name, array in host.items()}
    with pytest.raises(InputError, match="lines_d: an array on the device with gaps"):
        backend.run(gaps, ["feature_map"])
    packed = {name: OnDevice(array, strides=None) for name, array in host.items()}
    np.testing.assert_array_equal(backend.run(packed, ["feature_map"])[0], wanted)
    odd = {name: np.empty(array.nbytes + 258, np.uint8)[2:] for name, array in host.items()}
    for name, array in host.items():  # where TensorRT reads nothing
        odd[name] = odd[name][-odd[name].ctypes.data % 256 + 2 :][: array.nbytes].view(np.float16).reshape(array.shape)
        odd[name][...] = array
    (found,) = backend.run({name: OnDevice(array) for name, array in odd.items()}, ["feature_map"])
    np.testing.assert_array_equal(found, wanted)
    assert library.driver.calls.count("cuMemcpyDtoDAsync") == len(host)


def test_volumes_on_the_device(built: Path, expected: Model, library: FakeTensorRt, kernels: Any,
                               monkeypatch: pytest.MonkeyPatch):
    """Through the model itself: what torch, CuPy or JAX hold there, scores as the same volume from the host."""
    library.driver.kernels = kernels
    monkeypatch.setattr(sampler, "compile_kernel", lambda capability, nvrtc: b"machine code")
    model = _model(built)
    volumes = _volumes(model, 2)

    for kind in (np.float32, np.float16):
        host = volumes.astype(kind)
        wanted = expected.image_outputs(host.astype(np.float32))
        for name, array in model.image_outputs(OnDevice(host)).items():
            np.testing.assert_array_equal(array, wanted[name])
        scored = model.zero_shot(OnDevice(host[1]))
        assert scored.volume == "array"
        np.testing.assert_array_equal(model.embed_image(OnDevice(host[1])), wanted["image_embedding"][1])
        np.testing.assert_array_equal(model.embed_images([OnDevice(one) for one in host]), wanted["image_embedding"])
    with pytest.raises(InputError, match="NaN, or values outside"):
        model.embed_image(OnDevice(volumes[0] + 1))
    with pytest.raises(InputError, match=r"volumes: float32 \[0, .* on the GPU; expected"):
        model.image_outputs(OnDevice(volumes[:0]))
    with pytest.raises(InputError, match="spacing: only for files"):
        model.embed_image(OnDevice(volumes[0]), spacing=(1, 1, 1))
    with pytest.raises(InputError, match="an array on the GPU: onnxruntime on cpu takes arrays on the host; copy it"):
        load(built).embed_image(OnDevice(volumes[0]))


def test_everything_is_given_back_with_the_model(built: Path, library: FakeTensorRt, kernels: Any,
                                                 monkeypatch: pytest.MonkeyPatch):
    library.driver.kernels = kernels
    monkeypatch.setattr(sampler, "compile_kernel", lambda capability, nvrtc: b"machine code")
    model = _model(built)
    model.embed_image(OnDevice(_volumes(model, 1)[0]))
    for _ in range(3):
        model.image_outputs(_volumes(model, 2))
    model.embed_text("no")
    driver = library.driver
    assert driver.blocks and driver.streams and driver.graphs
    del model
    gc.collect()
    assert not driver.blocks and not driver.streams and not driver.graphs


def test_what_the_bindings_raise(built: Path, library: FakeTensorRt, monkeypatch: pytest.MonkeyPatch):
    """Is an error of one request, or of loading, and not a traceback."""
    def fail(*_: object) -> None:
        raise RuntimeError("pybind11: something\nelse")

    model = _model(built)
    monkeypatch.setattr("fake_gpu._Context.execute_async_v3", fail)
    with pytest.raises(InferenceError, match="image.fp16.tensorrt.sm90.engine: RuntimeError: pybind11: something else"):
        model.image_outputs(_volumes(model, 1))
    monkeypatch.setattr("fake_gpu._Engine.create_execution_context", fail)
    with pytest.raises(InferenceError, match="RuntimeError: pybind11"):
        model.image_outputs(_volumes(model, 1))
    chosen = load(built, backend="auto", precision="fp16")
    assert chosen.device == "cpu"
    assert "tensorrt: image.fp16.tensorrt.sm90.engine: RuntimeError: pybind11" in str(chosen.choice)
    monkeypatch.setattr(library, "Runtime", fail)
    with pytest.raises(EngineRefused, match="refuses it here: .*RuntimeError: pybind11: something else; run on this"):
        _model(built).describe()


def test_more_texts_than_an_engine_takes(built: Path, expected: Model, library: FakeTensorRt):
    texts = [f"There are {number} nodules." for number in range(10)]
    np.testing.assert_array_equal(_model(built).embed_text(texts), expected.embed_text(texts))


def test_others_streams_are_waited_for(built: Path, library: FakeTensorRt):
    """Before what they write is read."""
    options = Options("cuda", backend="tensorrt", precision="fp16")
    backend = tensorrt.TensorRtBackend(open_bundle(built), "text", options)
    driver = library.driver
    stream, ids = driver.cuStreamCreate(0)[1], np.zeros((1, 4), np.int64)
    driver.enqueue(stream, lambda: ids.__setitem__(slice(None), 7))
    interface = {"shape": (1, 4), "typestr": "<i8", "version": 3, "data": (ids.ctypes.data, False), "stream": stream}
    mask = np.ones((1, 4), np.int64)
    found = backend.run({"input_ids": SimpleNamespace(__cuda_array_interface__=interface), "attention_mask": mask},
                        ["text_embedding"])
    wanted = backend.run({"input_ids": np.full((1, 4), 7), "attention_mask": mask}, ["text_embedding"])
    np.testing.assert_array_equal(found[0], wanted[0])
    assert "cuCtxSynchronize" not in driver.calls


def test_what_cannot_be_recorded_is_run_all_the_same(built: Path, expected: Model, library: FakeTensorRt):
    library.records = False
    model = _model(built)
    volumes = _volumes(model, 1)
    wanted = expected.image_outputs(volumes)["codes"]
    np.testing.assert_array_equal(model.image_outputs(volumes)["codes"], wanted)
    with pytest.warns(DcformerWarning, match=r"image.fp16.tensorrt.sm90.engine: cannot be recorded as a CUDA graph \("
                      "the engine refused to run: operation not permitted when stream is capturing"):
        np.testing.assert_array_equal(model.image_outputs(volumes)["codes"], wanted)
    for _ in range(3):  # nobody tries again, and nobody warns again
        np.testing.assert_array_equal(model.image_outputs(volumes)["codes"], wanted)
    assert library.driver.calls.count("cuStreamBeginCapture") == 1
    assert not library.driver.captured
    assert library.contexts == 1


def test_version_compatible_engines_bring_code_that_is_allowed(built: Path, library: FakeTensorRt):
    bundle = open_bundle(built)
    record = find_engine(bundle, "image", "fp16", "tensorrt", None)
    options = Options("cuda", backend="tensorrt", precision="fp16")
    library.host_code = True
    with pytest.raises(EngineRefused, match="host executable code is not allowed"):
        tensorrt.TensorRtBackend(bundle, "image", options, record=record)
    lean = dataclasses.replace(record, version_compatible=True)
    tensorrt.TensorRtBackend(bundle, "image", options, record=lean).try_out()


def test_what_an_engine_does_not_take(built: Path, library: FakeTensorRt):
    model = _model(built)
    with pytest.raises(InputError, match=r"lines_d: \[4, 1, 64, 32, 32\]; the engine image.fp16.tensorrt.sm90.engine "
                       r"was built for \[1, 1, 64, 32, 32\] to \[3, 1, 64, 32, 32\]; split the batch, or build with"):
        model.image_outputs(_volumes(model, 4))
    backend = model._graph("image")
    feeds = {name: np.zeros((1, 1, 64, 32, 32), np.float32) for name in ("lines_d", "lines_h", "lines_w")}
    with pytest.raises(InputError, match="lines_d: float32; the engine takes float16"):
        backend.run(feeds, ["feature_map"])
    assert model.image_outputs(_volumes(model, 1))  # and goes on


def test_requests_at_once(built: Path, expected: Model, library: FakeTensorRt):
    """Eight threads on two slots: everyone gets his own answer."""
    model = _model(built)
    volumes = [_volumes(model, count % 3 + 1) for count in range(24)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda v: model.image_outputs(v, ["feature_map"])["feature_map"], volumes))
    for array, one in zip(found, volumes, strict=True):
        np.testing.assert_array_equal(array, expected.image_outputs(one, ["feature_map"])["feature_map"])
    assert 1 <= library.contexts <= tensorrt.SLOTS


@pytest.mark.parametrize("call", [
    "cuMemAlloc", "cuMemAllocHost", "cuStreamCreate", "cuStreamSynchronize", "cuGraphLaunch"])
def test_out_of_memory_and_on(built: Path, expected: Model, library: FakeTensorRt, call: str):
    """One request fails; its memory is given back, and the next works."""
    model = _model(built)
    volumes = _volumes(model, 1)
    model.describe()
    for turn in range(4):
        if turn == (2 if call == "cuGraphLaunch" else 0):
            library.driver.fail[call] = Status.CUDA_ERROR_OUT_OF_MEMORY
            with pytest.raises(InferenceError, match=rf"out of GPU memory \({call}\); use a smaller batch"):
                model.image_outputs(volumes)
            assert not library.driver.blocks
            assert not library.driver.streams
        np.testing.assert_array_equal(model.image_outputs(volumes)["codes"], expected.image_outputs(volumes)["codes"])
    assert len(library.driver.blocks) == 2


def test_a_lost_device_says_so(built: Path, library: FakeTensorRt):
    model = _model(built)
    volumes = _volumes(model, 1)
    model.image_outputs(volumes)
    library.driver.fail["cuStreamSynchronize"] = Status.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(DeviceLost, match=r"the GPU failed in cuStreamSynchronize \(CUDA_ERROR_ILLEGAL_ADDRESS\)"):
        model.image_outputs(volumes)
    with pytest.raises(DeviceLost, match="the GPU failed before .*; nothing can run on it in this process any more"):
        model.image_outputs(volumes)


def test_engines_that_do_not_fit(built: Path, library: FakeTensorRt):
    library.versions["tensorrt"] = "10.14.0"
    with pytest.raises(EngineRefused, match=r"built by tensorrt 10.13.2, here is 10.14.0; run: dcformer build .*"
                       "--precision fp16 --engine-library tensorrt"):
        _model(built).describe()
    library.versions["tensorrt"] = "10.13.2"
    library.driver.capability = (8, 9)
    with pytest.raises(EngineRefused, match="built for compute capability 9.0, this NVIDIA H100 has 8.9"):
        _model(built).describe()
    library.driver.capability = (9, 0)
    library.engines.clear()
    with pytest.raises(EngineRefused, match="refuses it here: the plan file is corrupt; run on this machine: dcformer"):
        _model(built).describe()
    with pytest.raises(EngineRefused, match="no tensorrt engine of the image tower in int8"):
        load(built, device="cuda", backend="tensorrt", precision="int8").describe()


def test_what_rtx_compiled_is_kept(built: Path, library: FakeTensorRt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = Options("cuda", backend="tensorrt_rtx", precision="fp16")
    feeds = {name: np.ones((1, 4), np.int64) for name in ("input_ids", "attention_mask")}
    backend = tensorrt.TensorRtBackend(open_bundle(built), "text", options)
    assert not list(tmp_path.iterdir())
    backend.run(feeds, ["text_embedding"])
    assert library.compiled == b""
    (path,) = (tmp_path / "dcformer-deploy" / "tensorrt_rtx").iterdir()
    assert "NVIDIA-H100" in path.name
    other = tensorrt.TensorRtBackend(open_bundle(built), "text", options)
    assert library.compiled == path.read_bytes() == b"compiled"
    longer = {name: np.ones((1, 5), np.int64) for name in feeds}
    other.run(longer, ["text_embedding"])
    assert path.read_bytes() == b"compiledcompiled"  # what a new shape has compiled, too
    library.takes_compiled, library.compiled = False, b""  # of another driver, say
    path.write_bytes(b"of before")
    tensorrt.TensorRtBackend(open_bundle(built), "text", options).run(feeds, ["text_embedding"])
    assert library.compiled == b""
    assert path.read_bytes() == b"compiledcompiled"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(DcformerWarning, match="tensorrt_rtx compiles anew each time"):
        tensorrt.TensorRtBackend(open_bundle(built), "text", options).run(feeds, ["text_embedding"])


def test_engines_without_weights_are_given_those_of_the_onnx_file(built: Path, library: FakeTensorRt):
    bundle = open_bundle(built)
    record = find_engine(bundle, "image", "fp16", "tensorrt", None)
    stripped = dataclasses.replace(record, flags={"strip_weights": True})
    options = Options("cuda", backend="tensorrt", precision="fp16")
    tensorrt.TensorRtBackend(bundle, "image", options, record=record)
    assert library.refitted == []
    tensorrt.TensorRtBackend(bundle, "image", options, record=stripped)
    assert library.refitted == [str(built / record.onnx)]
    library.refits = False
    with pytest.raises(EngineRefused, match="cannot be filled in from image.fp16.onnx.*without --strip-weights"):
        tensorrt.TensorRtBackend(bundle, "image", options, record=stripped)


def test_the_real_library_has_what_is_called():
    trt = pytest.importorskip("tensorrt_rtx")
    assert callable(trt.Refitter.refit_cuda_engine)
    assert callable(trt.OnnxParserRefitter.refit_from_file)
    assert trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE is not None
    for name in ("set_input_shape", "get_tensor_shape", "set_tensor_address", "execute_async_v3"):
        assert callable(getattr(trt.IExecutionContext, name))
    for name in ("create_runtime_config", "create_execution_context"):
        assert callable(getattr(trt.ICudaEngine, name))
    assert trt.ICudaEngine.device_memory_size_v2 is not None
    for name in ("create_runtime_cache", "set_runtime_cache"):
        assert callable(getattr(trt.IRuntimeConfig, name))


def test_without_a_gpu(built: Path):
    """Nothing is faked."""
    with pytest.raises(InputError, match="device 'cpu': the tensorrt_rtx back end runs on a GPU; pass --device cuda"):
        load(built, backend="tensorrt_rtx", precision="fp16")
    if gpu.gpu_or_none() is None:
        with pytest.raises(DcformerError) as caught:
            _model(built, "tensorrt_rtx").describe()
        assert caught.value.exit_code == 3


def test_tensors_begin_where_tensorrt_wants_them():
    plan = plan_buffers({"a": 1, "b": 256, "c": 257, "empty": 0, "d": 8})
    assert plan.offsets == {"a": 0, "b": 256, "c": 512, "empty": 1024, "d": 1280}
    assert plan.total_bytes == 1536


def test_the_real_driver_bindings_have_what_is_called():
    """Names, and how many arguments each takes, of what the fake driver stands for."""
    driver = pytest.importorskip("cuda.bindings.driver")
    names = [name for name in dir(FakeDriver) if name.startswith("cu")]
    assert len(names) > 20
    for name in names:
        signature = getattr(driver, name).__doc__.splitlines()[0]
        inside = signature[signature.index("(") + 1 : signature.rindex(")")]
        found = [part for part in inside.split(",") if part.strip()]
        assert len(found) == len(inspect.signature(getattr(FakeDriver, name)).parameters) - 1, signature
    assert {status.name for status in Status} <= set(driver.CUresult.__members__)
    assert set(device._FATAL) <= set(driver.CUresult.__members__)
    for kind in ("CUdevice_attribute", "CUstreamCaptureMode"):
        for name, value in vars(getattr(FakeDriver, kind)).items():
            assert getattr(getattr(driver, kind), name) == value

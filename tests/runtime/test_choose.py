"""--backend auto: what is chosen, and that it says why."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_gpu import Status, install, with_engines

from dcformer_deploy.runtime import InputError, load
from dcformer_deploy.runtime.backends import Options, choose, onnxruntime
from dcformer_deploy.runtime.backends.choose import choose_backend
from dcformer_deploy.runtime.backends.watched import WatchedBackend
from dcformer_deploy.runtime.bundle import Bundle, open_bundle
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.errors import DeviceUnavailable
from dcformer_deploy.runtime.provenance import GraphCost, Rewrite, Timing


def _measured(bundle: Bundle, **ms: float) -> Bundle:
    cost = GraphCost(1, 1, 1)
    rewrites = tuple(Rewrite("stream_planes", 1, (), cost, cost, Timing(900.0, value, "here"), target)
                     for target, value in ms.items())
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, rewrites=rewrites))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise InputError("there is none")

    monkeypatch.setattr(choose, "current_gpu", fail)


@pytest.mark.usefixtures("no_gpu")
def test_on_a_cpu(pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    bundle = open_bundle(pristine_bundle)
    auto = Options(backend="auto")
    for ms, expected in (({"onnxruntime": 160.0, "openvino": 170.0}, "onnxruntime"),
                         ({"onnxruntime": 390.0, "openvino": 170.0}, "openvino"), ({"openvino": 1.0}, "onnxruntime")):
        options, why, tried = choose_backend(_measured(bundle, **ms), auto)
        assert (options.backend, options.device) == (expected, "cpu")
        assert "no GPU: there is none; " in why
        assert tried is None
    assert "onnxruntime 390 ms, openvino 170 ms" in choose_backend(
        _measured(bundle, onnxruntime=390.0, openvino=170.0), auto)[1]
    for precision, expected in (("bf16", "openvino"), ("int8", "openvino"), ("fp16", "onnxruntime")):
        assert choose_backend(bundle, dataclasses.replace(auto, precision=precision))[0].backend == expected
    monkeypatch.setattr(choose.importlib.util, "find_spec", lambda name: None)
    options, why, _ = choose_backend(bundle, dataclasses.replace(auto, precision="int8"))
    assert options.backend == "onnxruntime"
    assert "openvino is not installed" in why
    with pytest.raises(DeviceUnavailable, match="backend auto on device cuda: no GPU: there is none"):
        choose_backend(bundle, Options("cuda", backend="auto"))


def test_on_a_gpu(calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tensorrt_rtx")
    bundle = with_engines(calibrated, tmp_path / "bundle")
    fake = install(bundle, monkeypatch)
    opened = open_bundle(bundle)
    options, why, tried = choose_backend(opened, Options(backend="auto", precision="fp16"))
    assert (options.backend, options.device) == ("tensorrt", "cuda")
    assert why == "tensorrt, as image.fp16.tensorrt.sm90.engine of the bundle runs on this NVIDIA H100"
    assert tried is not None
    fake.versions["tensorrt"] = "10.12.0"
    options, why, _ = choose_backend(opened, Options(backend="auto", precision="fp16"))
    assert options.backend == "tensorrt_rtx"
    assert why.startswith("tensorrt: ")
    assert "built by tensorrt 10.13.2, here is 10.12.0" in why
    assert choose_backend(opened, Options(backend="auto", precision="int8"))[0].backend == "openvino"
    for where in ("auto", "cpu"):  # where no engine runs, scans become inputs on the CPU
        found = choose_backend(opened, Options(backend="auto", precision="int8", preprocess=where))[0]
        assert (found.backend, found.preprocess) == ("openvino", "cpu")
    with pytest.raises(DeviceUnavailable, match="openvino preprocesses on the CPU alone, and the GPU was asked for"):
        choose_backend(opened, Options(backend="auto", precision="int8", preprocess="gpu"))
    assert choose_backend(opened, Options(backend="auto", precision="fp16", preprocess="gpu"))[0].preprocess == "gpu"
    with monkeypatch.context() as patch:
        patch.setattr(choose, "import_onnxruntime", lambda: SimpleNamespace(
            get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]))
        options, why, _ = choose_backend(opened, Options(backend="auto", precision="int8"))
        assert options.backend == "openvino"  # what the real onnxruntime answers: it has no CUDA
        assert "; onnxruntime: " in why
        patch.setattr(onnxruntime, "OnnxRuntimeBackend", lambda path, options: (path, options))
        options, why, tried = choose_backend(opened, Options(backend="auto", precision="int8"))
        assert (options.backend, options.device) == ("onnxruntime", "cuda")
        assert why.endswith("onnxruntime on this NVIDIA H100")
        assert isinstance(tried, WatchedBackend)
        assert tried._backend == (opened.folder / "image.int8.tensorrt.onnx", options)
    engines = dict(fake.engines)
    fake.engines.clear()  # the record fits, and the library refuses all the same
    options, why, tried = choose_backend(opened, Options(backend="auto", precision="fp16"))
    assert (options.backend, options.device, tried) == ("onnxruntime", "cpu", None)
    assert "the plan file is corrupt" in why
    fake.engines.update(engines)
    fake.driver.fail["cuStreamSynchronize"] = Status.CUDA_ERROR_OUT_OF_MEMORY
    fake.versions["tensorrt"] = "10.13.2"
    options, why, _ = choose_backend(opened, Options(backend="auto", precision="fp16"))
    assert options.backend == "tensorrt_rtx"  # it loads, and does not compute
    assert "tensorrt: out of GPU memory" in why
    fake.driver.capability = (7, 5)
    assert choose_backend(opened, Options(backend="auto", precision="fp16"))[0].backend == "onnxruntime"


@pytest.mark.usefixtures("no_gpu")
def test_the_choice_is_told(pristine_bundle: Path, ct: Path, tmp_path: Path, capsys):
    model = load(pristine_bundle, backend="auto")
    assert model.choice is not None
    assert model.describe().split()[0] in model.choice
    assert main(["embed", str(pristine_bundle), str(ct), "--out", str(tmp_path / "e.npz"), "--backend", "auto"]) == 0
    assert f"backend: {model.choice}" in capsys.readouterr().err

"""The ONNX Runtime back end's checks of what is installed."""

import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest

from dcformer_deploy.runtime.backends import onnxruntime as backend
from dcformer_deploy.runtime.backends.base import Options
from dcformer_deploy.runtime.errors import (
    BundleError,
    DcformerWarning,
    DeviceUnavailable,
    InputError,
    MissingDependency,
)


def test_both_distributions_at_once_are_announced(monkeypatch: pytest.MonkeyPatch):
    """They overwrite each other's files, and pip does not know."""
    monkeypatch.setattr(metadata, "distribution", lambda name: object())
    assert backend.installed_distributions() == ["onnxruntime", "onnxruntime-gpu"]
    with pytest.warns(DcformerWarning, match="overwrite each other's files; uninstall both"):
        backend.import_onnxruntime()


def test_one_distribution_is_fine(recwarn: pytest.WarningsRecorder):
    assert len(backend.installed_distributions()) == 1
    backend.import_onnxruntime()
    assert not recwarn.list


def test_the_library_prints_nothing_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Found by fuzzing: a tensor that no memory holds, which the log of no session tells of."""
    starts = onnx.TensorProto(name="starts", data_type=onnx.TensorProto.INT64, dims=[2**62], raw_data=b"")
    numbers = [onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [1], [value]) for name, value in (
        ("ends", 2), ("axes", 0))]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Slice", ["x", "starts", "ends", "axes"], ["y"])], "g",
        [value("x", onnx.TensorProto.FLOAT, [4])], [value("y", onnx.TensorProto.FLOAT, [None])], [starts, *numbers])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="refuses it"):
        backend.OnnxRuntimeBackend(tmp_path / "g.onnx", Options())
    assert capfd.readouterr() == ("", "")


class _Library:
    """onnxruntime with providers for GPUs; sessions only remember what they were given."""

    __version__ = "1.32.0"

    def __init__(self, providers: tuple[str, ...], starts: bool = True) -> None:
        self.starts, self.sessions, self.registered, self.devices = starts, [], [], []
        self.get_available_providers = lambda: [*providers, "CPUExecutionProvider"]
        self.get_ep_devices = lambda: self.devices

    def SessionOptions(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(add_provider_for_devices=lambda devices, _: self.sessions.append(devices))

    def InferenceSession(self, path: str, settings: object, providers: object = ()) -> SimpleNamespace:  # noqa: N802
        self.sessions.append(providers)
        first = next((name for name, _ in providers), "NvTensorRTRTXExecutionProvider")  # type: ignore[union-attr]
        return SimpleNamespace(get_providers=lambda: [first] * self.starts + ["CPUExecutionProvider"])

    def register_execution_provider_library(self, name: str, path: str) -> None:
        self.registered.append((name, path))
        self.devices = [SimpleNamespace(ep_name="CPUExecutionProvider"), SimpleNamespace(ep_name=name)]


def _open(library: _Library, monkeypatch: pytest.MonkeyPatch, name: str, precision: str = "fp16") -> str:
    monkeypatch.setattr(backend, "import_onnxruntime", lambda: library)
    options = Options("cuda", backend=name, precision=precision)
    return backend.OnnxRuntimeBackend(Path("g.onnx"), options).describe()


def test_providers_for_gpus(monkeypatch: pytest.MonkeyPatch):
    library = _Library(("TensorrtExecutionProvider", "CUDAExecutionProvider"))
    assert "CUDAExecutionProvider" in _open(library, monkeypatch, "onnxruntime")
    assert library.sessions.pop() == [("CUDAExecutionProvider", {"use_tf32": "0"})]
    for precision, flags in (("fp32", "000"), ("fp16", "100"), ("bf16", "101"), ("int8", "110")):
        assert "TensorrtExecutionProvider" in _open(library, monkeypatch, "onnxruntime-tensorrt", precision)
        ((_, given),) = library.sessions.pop()
        assert "".join(given[f"trt_{kind}_enable"] for kind in ("fp16", "int8", "bf16")) == flags
    with pytest.raises(DeviceUnavailable, match="no TensorrtExecutionProvider, only CPUExecutionProvider"):
        _open(_Library(()), monkeypatch, "onnxruntime-tensorrt")
    with pytest.raises(DeviceUnavailable, match="did not start; onnxruntime fell back to CPU"):
        _open(_Library(("CUDAExecutionProvider",), starts=False), monkeypatch, "onnxruntime")
    with pytest.raises(InputError, match="the onnxruntime-tensorrt back end runs on a GPU; pass --device cuda"):
        Options(backend="onnxruntime-tensorrt")


def test_the_plugin_of_tensorrt_rtx(monkeypatch: pytest.MonkeyPatch):
    name, library = "onnxruntime-tensorrt-rtx", _Library(())
    monkeypatch.setitem(sys.modules, backend._RTX_PLUGIN, None)
    with pytest.raises(MissingDependency, match="pip install onnxruntime-ep-nv-tensorrt-rtx"):
        _open(library, monkeypatch, name)
    plugin = SimpleNamespace(get_ep_name=lambda: "NvTensorRTRTXExecutionProvider", get_library_path=lambda: "/p.so")
    monkeypatch.setitem(sys.modules, backend._RTX_PLUGIN, plugin)
    for _ in range(2):
        assert "NvTensorRTRTXExecutionProvider" in _open(library, monkeypatch, name)
    assert library.registered == [("NvTensorRTRTXExecutionProvider", "/p.so")]
    assert library.sessions[0] == [library.devices[1]]
    monkeypatch.setattr(library, "get_ep_devices", list)
    with pytest.raises(DeviceUnavailable, match="finds no GPU"):
        _open(library, monkeypatch, name)


def test_a_plugin_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The real library's own refusal."""
    (tmp_path / "plugin.so").write_text("no library")
    plugin = SimpleNamespace(get_ep_name=lambda: "Nv", get_library_path=lambda: str(tmp_path / "plugin.so"))
    monkeypatch.setitem(sys.modules, backend._RTX_PLUGIN, plugin)
    with pytest.raises(DeviceUnavailable, match="does not load: .*plugin.so.*; run on a machine with a GPU"):
        backend.OnnxRuntimeBackend(Path("g.onnx"), Options("cuda", backend="onnxruntime-tensorrt-rtx"))

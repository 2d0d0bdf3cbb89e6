"""Layers of a built engine. The inspector is faked: the real one needs the GPU that the engine is for."""

import json
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from dcformer_deploy.export.engine.fused_layers import fused_layers
from dcformer_deploy.runtime.engine_library import Library, load_library
from dcformer_deploy.runtime.engines import Layer
from dcformer_deploy.runtime.errors import DcformerWarning


class FakeTensorRt:
    """As ``tensorrt``. ``information``: what the inspector gives; an error is raised; None = the plan is refused."""

    LayerInformationFormat = SimpleNamespace(JSON="json")

    class ILogger:
        ERROR, INTERNAL_ERROR = 1, 0

        def __init__(self) -> None: ...

    def __init__(self, information: Any) -> None:
        self.information = information

    def Runtime(self, logger: Any) -> Any:  # noqa: N802 (NVIDIA's name)
        def deserialize(plan: bytes) -> Any:
            assert plan == b"plan"
            assert runtime.engine_host_code_allowed
            if self.information is None:
                logger.log(self.ILogger.ERROR, "the plan is corrupt")
                return None
            return SimpleNamespace(create_engine_inspector=lambda: SimpleNamespace(get_engine_information=tell))

        def tell(form: str) -> str:
            assert form == "json"
            if isinstance(self.information, Exception):
                raise self.information
            return self.information

        runtime = SimpleNamespace(deserialize_cuda_engine=deserialize, engine_host_code_allowed=False)
        return runtime


def _layers(information: Any) -> tuple[Layer, ...] | None:
    return fused_layers(Library("tensorrt", FakeTensorRt(information), "10.13.2"), b"plan", "a.engine")


def test_most_common_first():
    kinds = ["Reformat", "gemm", "gemm", "kgen", "gemm", "kgen"]
    told = [{"Name": str(index), "LayerType": kind} for index, kind in enumerate(kinds)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _layers(json.dumps({"Layers": told, "Bindings": []})) == (
            Layer("gemm", 3), Layer("kgen", 2), Layer("Reformat", 1))
        mixed = json.dumps({"Layers": [*told[:2], "a name", {"Name": "no kind"}]})
        assert _layers(mixed) == (Layer("unknown", 2), Layer("Reformat", 1), Layer("gemm", 1))


@pytest.mark.parametrize(("information", "reason"), [
    (json.dumps({"Layers": ["conv1 + relu1", "conv2"]}), "the inspector tells names only"),
    (json.dumps({"Layers": []}), "the inspector tells of none"), (json.dumps({"Bindings": []}), "'Layers'"),
    (json.dumps([1]), "list indices"), (json.dumps({"Layers": None}), "not iterable"), ("", "Expecting value"),
    (RuntimeError("CUDA\nfailed"), "CUDA failed"), (None, "the plan is corrupt")])
def test_what_tells_nothing_warns(information: Any, reason: str):
    with pytest.warns(DcformerWarning, match=rf"a.engine: its record will not say which layers.*\(.*{reason}"):
        assert _layers(information) is None


def test_the_real_library_without_the_gpu():
    """Its own words; and it has what is called."""
    trt = pytest.importorskip("tensorrt_rtx")
    with pytest.warns(DcformerWarning, match="a.engine: its record will not say"):
        assert fused_layers(load_library("tensorrt_rtx"), b"no plan", "a.engine") is None
    assert callable(trt.ICudaEngine.create_engine_inspector)
    assert callable(trt.EngineInspector.get_engine_information)
    assert trt.LayerInformationFormat.JSON is not None

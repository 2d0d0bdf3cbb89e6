"""INT8 on CPUs whose integer units cut sums off: found out, and computed otherwise."""

from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dcformer_deploy.runtime import load
from dcformer_deploy.runtime.backends import Options, onnxruntime, open_graph, openvino, saturation
from dcformer_deploy.runtime.errors import DcformerWarning

LIBRARIES = {"onnxruntime": onnxruntime, "openvino": openvino}


def _sum() -> onnx.ModelProto:
    tensors = {"weights": np.full((16, 16, 1, 1), 127, np.int8), "one": np.float32(1), "zero": np.int8(0),
               "step": np.float32(4096)}
    nodes = [helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["xq"]),
             helper.make_node("DequantizeLinear", ["xq", "one", "zero"], ["xd"]),
             helper.make_node("DequantizeLinear", ["weights", "one", "zero"], ["wd"]),
             helper.make_node("Conv", ["xd", "wd"], ["sum"]),
             helper.make_node("QuantizeLinear", ["sum", "step", "zero"], ["yq"]),
             helper.make_node("DequantizeLinear", ["yq", "step", "zero"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16, 4, 4]) for name in "xy"]
    constants = [numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "int8_sum", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_the_file_is_the_graph():
    onnx.checker.check_model(_sum(), full_check=True)
    assert onnx.load(saturation.SUM) == _sum()


def test_what_is_exact():
    """By the reference implementation, and by VPMADDUBSW, of signed inputs that were made unsigned."""
    (found,) = onnx.reference.ReferenceEvaluator(_sum()).run(None, {"x": saturation.largest_input()})
    assert saturation.is_exact(found)
    pairs = np.minimum(2 * (127 + 128) * 127, 2**15 - 1)
    cut = 8 * pairs - 16 * 128 * 127
    assert not saturation.is_exact(np.round(np.float32(cut) / 4096) * 4096)


@pytest.mark.parametrize("name", LIBRARIES)
def test_as_the_processor_says(name: str):
    """On Linux the kernel lists what a CPU has; both libraries use VNNI where it is."""
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    if "avx2" not in flags:
        pytest.skip("no x86 CPU under Linux")
    assert LIBRARIES[name].int8_saturates() == flags.isdisjoint({"avx512_vnni", "avx_vnni"})


@pytest.mark.parametrize("name", LIBRARIES)
def test_back_ends_are_exact_on_any_cpu(name: str):
    backend = open_graph(saturation.SUM, Options(backend=name, precision="int8"))
    assert saturation.is_exact(backend.run({"x": saturation.largest_input()}, ["y"])[0])


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("saturates", [True, False])
def test_what_is_told(calibrated: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, name: str,
                      saturates: bool):
    library: ModuleType = LIBRARIES[name]
    monkeypatch.setattr(library, "int8_saturates", lambda: saturates)
    saturation.warn.cache_clear()
    for _ in range(2):
        assert ("INT8 in float32" in load(calibrated, backend=name, precision="int8").describe()) == saturates
        assert "INT8" not in load(calibrated, backend=name).describe()
    told = [str(warning.message) for warning in recwarn if warning.category is DcformerWarning]
    assert len(told) == saturates
    if saturates:
        assert told[0].startswith(f"int8: INT8 sums of {name} overflow on this CPU, which has no VNNI; they are ")
    settings = openvino.cpu_settings(Options(backend="openvino", precision="int8"))
    assert ("LP_TRANSFORMS_MODE" in settings) == openvino.int8_saturates()

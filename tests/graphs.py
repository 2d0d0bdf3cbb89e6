"""Small ONNX graphs for the tests of the rewrite rules, and running them."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from dcformer_deploy.export.rules.pipeline import RULE_NAMES, optimize
from dcformer_deploy.runtime.provenance import Rewrite

#: Largest relative difference of a rewritten graph in fp32; 1e-6 is seen.
EXACT = 1e-5


class GraphBuilder:
    """Collects nodes; every constant is drawn from one seeded generator."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def constant(self, array: Any) -> str:
        name = f"c{len(self._constants)}.weight"
        self._constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def weight(self, *shape: int) -> str:
        fan = max(1, int(np.prod(shape[1:])))
        return self.constant((self.random.standard_normal(shape) / np.sqrt(fan)).astype(np.float32))

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def line(self, x: str, shape: tuple[int, int], axis: int, length: int, stride: int = 1, group: int = 1) -> str:
        """A convolution along one axis; ``shape``: C_out, C_in / group."""
        kernel, pads = [1, 1, 1], [0, 0, 0]
        kernel[axis], pads[axis] = length, length // 2
        return self.node("Conv", x, self.weight(*shape, *kernel), self.weight(shape[0]), kernel_shape=kernel,
                         pads=pads * 2, strides=[stride] * 3, group=group)

    def star(self, x: str, shape: tuple[int, int], length: int, stride: int = 1, group: int = 1) -> str:
        """A decomposed convolution."""
        a, b, c = (self.line(x, shape, axis, length, stride, group) for axis in range(3))
        return self.node("Add", self.node("Add", a, b), c)

    def finish(self, output: str, inputs: dict[str, list[int | str]]) -> onnx.ModelProto:
        graph = helper.make_graph(
            self._nodes, "graph",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)], self._constants)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        return onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)


def only(proto: onnx.ModelProto, *rules: str) -> tuple[onnx.ModelProto, Rewrite]:
    """The graph with some rules applied, and the report of the last of them."""
    found, reports = optimize(proto, without=[name for name in RULE_NAMES if name not in rules])
    onnx.checker.check_model(found, full_check=True)
    return found, next(report for report in reports if report.rule == rules[-1])


def run(proto: onnx.ModelProto, **feeds: np.ndarray) -> np.ndarray:
    """The only output, computed without onnxruntime's own rewriting."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def operators(proto: onnx.ModelProto) -> list[str]:
    return sorted(node.op_type for node in proto.graph.node)


def volume(*shape: int) -> np.ndarray:
    return np.random.default_rng(9).standard_normal(shape).astype(np.float32)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())

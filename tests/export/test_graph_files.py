"""Weights in a file of their own: every array once, graphs that compute the same with them."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from dcformer_deploy.export.graph_files import WeightsFile
from graphs import GraphBuilder, run, volume


def _graph(seed: int, extra: int) -> onnx.ModelProto:
    """A shared first layer, and another one of its own."""
    graph = GraphBuilder(7)
    y = graph.line("x", (8, 6), 0, 7)
    graph.random = np.random.default_rng(seed)
    return graph.finish(graph.line(y, (extra, 8), 1, 9), {"x": ["batch", 6, 3, 5, 7]})


def _run(path: Path, x: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def test_two_graphs_share_what_is_equal(tmp_path: Path):
    weights = WeightsFile(tmp_path / "w.weights")
    first, second = _graph(1, 8), _graph(2, 16)
    weights.save(first, tmp_path / "a.onnx")
    alone = (tmp_path / "w.weights").stat().st_size
    weights.save(second, tmp_path / "b.onnx")
    shared, own = 8 * 6 * 7 * 4, 16 * 8 * 9 * 4
    assert alone < shared + 8 * 8 * 9 * 4 + 64
    assert alone < (tmp_path / "w.weights").stat().st_size < alone + own + 64
    x = volume(2, 6, 3, 5, 7)
    for proto, name in ((first, "a.onnx"), (second, "b.onnx")):
        np.testing.assert_allclose(_run(tmp_path / name, x), run(proto, x=x), rtol=1e-5, atol=1e-5)
        assert (tmp_path / name).stat().st_size < 3000
        loaded = onnx.load(tmp_path / name)
        assert {t.name: onnx.numpy_helper.to_array(t).tobytes() for t in loaded.graph.initializer} == {
            t.name: onnx.numpy_helper.to_array(t).tobytes() for t in proto.graph.initializer}


def test_the_graph_itself_is_not_changed(tmp_path: Path):
    proto = _graph(1, 8)
    before = proto.SerializeToString()
    WeightsFile(tmp_path / "w.weights").save(proto, tmp_path / "a.onnx")
    assert proto.SerializeToString() == before


def test_weights_that_are_elsewhere_are_no_graph_to_save(tmp_path: Path):
    weights = WeightsFile(tmp_path / "w.weights")
    weights.save(_graph(1, 8), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="its data is in another file already"):
        weights.save(onnx.load(tmp_path / "a.onnx", load_external_data=False), tmp_path / "b.onnx")

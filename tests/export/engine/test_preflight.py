"""What a build would fail at, found from shapes alone."""

import onnx
import pytest

from dcformer_deploy.export.engine.preflight import preflight, require_fitting_batch
from dcformer_deploy.runtime.errors import InputError
from graphs import GraphBuilder


def _wide() -> onnx.ModelProto:
    """1 channel to 64 over 512 x 512 x 256: 2^32 elements for a batch of one."""
    graph = GraphBuilder()
    return graph.finish(graph.node("Relu", graph.node("Conv", "x", graph.weight(32, 1, 1, 1, 1))),
                        {"x": ["batch", 1, 128, 512, 512]})


def test_tensors_beyond_31_bits():
    proto = _wide()
    assert preflight(proto, {"batch": 1}, "g.onnx").activation_bytes == 2 * 32 * 2**25 * 4
    with pytest.raises(InputError, match=r"g.onnx: v0 \(made by Conv\) would be 8x32x128x512x512, 8,589,934,592 "
                       r"elements; TensorRT holds 2,147,483,647; the largest batch that fits is 1: pass --max-batch 1"):
        require_fitting_batch([preflight(proto, {"batch": 8}, "g.onnx")])
    graph = GraphBuilder()
    proto = graph.finish(graph.node("Conv", "x", graph.weight(64, 1, 1, 1, 1)), {"x": ["batch", 1, 128, 512, 512]})
    with pytest.raises(InputError, match="does not fit even for a batch of one"):
        require_fitting_batch([preflight(proto, {"batch": 1}, "g.onnx")])


def test_inputs_beyond_31_bits():
    """Also if what is made of them is small."""
    graph = GraphBuilder()
    pooled = graph.node("MaxPool", "x", kernel_shape=[2, 2, 2], strides=[2, 2, 2])
    proto = graph.finish(pooled, {"x": ["batch", 1, 512, 512, 512]})
    assert preflight(proto, {"batch": 15}, "g.onnx").too_large is None
    with pytest.raises(InputError, match=r"g.onnx: x \(an input\) would be 16x1x512x512x512, 2,147,483,648 elements; "
                       "TensorRT holds 2,147,483,647; the largest batch that fits is 15: pass --max-batch 15"):
        require_fitting_batch([preflight(proto, {"batch": 16}, "g.onnx")])


def test_the_advice_holds_for_all_graphs(calibrated):
    """What it says fits does fit, and one more does not."""
    graphs = {name: onnx.load(calibrated / name, load_external_data=False) for name in (
        "image.fp16.onnx", "image.int8.tensorrt.onnx", "text.fp16.onnx")}

    def check(batch: int) -> None:
        sides = {"batch": batch, "sequence": 512}
        require_fitting_batch([preflight(proto, sides, name) for name, proto in graphs.items()])

    with pytest.raises(InputError) as caught:
        check(65536)
    fits = int(str(caught.value).rsplit(" ", 1)[1])
    check(fits)
    with pytest.raises(InputError, match=f"pass --max-batch {fits}"):
        check(fits + 1)


def test_memory_that_is_alive_at_once():
    """x of 100 floats lives until the sum; a and b are gone when c is made: x + a + b is the most."""
    graph = GraphBuilder()
    a = graph.node("Relu", "x")
    total = graph.node("Add", a, "x")
    mean = graph.node("ReduceMean", total, keepdims=1)
    proto = graph.finish(graph.node("Relu", mean), {"x": ["batch", 50]})
    found = preflight(proto, {"batch": 2}, "g.onnx")
    assert (found.activation_bytes, found.at_node) == (3 * 100 * 4, f"Add {total}")
    assert found.weight_bytes == 0


def test_bytes_of_weights_and_types(calibrated):
    """As numpy counts them; the weights themselves need not be read."""
    sizes = {}
    for precision in ("fp32", "fp16", "int8"):
        path = calibrated / f"image.{precision}.onnx"
        sizes[precision] = preflight(onnx.load(path, load_external_data=False), {"batch": 1}, "")
        arrays = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
        assert sizes[precision].weight_bytes == sum(array.nbytes for array in arrays)
    assert sizes["fp32"].activation_bytes / sizes["fp16"].activation_bytes == pytest.approx(2, rel=0.05)

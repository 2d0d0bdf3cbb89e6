"""FP16 and INT8 of every encoder in ONNX Runtime, and DCFormer's in NVIDIA's parser and builder."""

import gc
from pathlib import Path

import numpy as np
import onnx
import pytest

from dcformer_deploy.calibration.emulate import emulate
from dcformer_deploy.calibration.half import to_bfloat16, to_half
from dcformer_deploy.calibration.observe import Observer
from dcformer_deploy.calibration.quantize import quantize, quantize_weights
from dcformer_deploy.export.random_weights import random_checkpoint
from dcformer_deploy.export.registry import all_encoders, get_encoder
from dcformer_deploy.export.rules.pipeline import MEASURED, optimize
from dcformer_deploy.export.trace import trace_image_tower, trace_text_tower
from dcformer_deploy.runtime.backends import Options, open_graph
from dcformer_deploy.runtime.engine_library import Log, load_library
from dcformer_deploy.runtime.manifest import TensorInfo
from dcformer_deploy.runtime.volume import image_feeds

#: The smallest of each family runs always, but PoolFormer's, which takes longest; the others with `make test-all`.
QUICK = {"convnext-nano", "dcformer-nano", "transunet-naive", "vit-naive"}
#: Least signal over noise of the features, in dB. TransUNet's softmax of large scores is nearly an argmax, which turns
#: any rounding into noise: float32 in PyTorch is 27 dB from float64 at single tokens (``export.verify``).
HALF_DB, INT8_DB = {"transunet": 15.0}, {"transunet": 4.0}
USUAL_HALF_DB, USUAL_INT8_DB = 50.0, 20.0
#: With every 16-bit value rounded.
STRICT_DB, BFLOAT16_DB = {"transunet": 15.0, "": 55.0}, {"transunet": 8.0, "": 38.0}


def _feeds(proto: onnx.ModelProto, volumes: np.ndarray) -> dict[str, np.ndarray]:
    infos = []
    for entry in proto.graph.input:
        kind = entry.type.tensor_type
        infos.append(TensorInfo(entry.name, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name,
                                tuple(d.dim_param or d.dim_value for d in kind.shape.dim)))
    return image_feeds(infos, volumes)


def _features(proto: onnx.ModelProto, volumes: np.ndarray, folder: Path) -> np.ndarray:
    onnx.save(proto, folder / "g.onnx")
    return open_graph(folder / "g.onnx", Options()).run(_feeds(proto, volumes), ["feature_map"])[0]


def _signal_to_noise(exact: np.ndarray, found: np.ndarray) -> float:
    assert np.isfinite(found).all()
    return float(10 * np.log10((exact**2).sum() / ((exact - found) ** 2).sum()))


@pytest.mark.parametrize("name", [
    pytest.param(spec.name, marks=[] if spec.name in QUICK else pytest.mark.thorough) for spec in all_encoders()])
def test_every_encoder(name: str, tmp_path: Path):
    size, family = 2 * get_encoder(name).size_step, name.split("-")[0]
    proto = _optimized(name, size)
    volumes = np.random.default_rng(0).uniform(-1, 1, (2, size // 2, size, size)).astype(np.float32)
    exact = _features(proto, volumes, tmp_path)
    observer = Observer(proto, (), 2)
    for volume in volumes:
        observer.observe(_feeds(proto, volume[None]))
    largest = {name: histogram.largest for name, histogram in observer.histograms.items()}
    half = to_half(proto, largest)
    assert _signal_to_noise(exact, _features(half.proto, volumes, tmp_path)) > HALF_DB.get(family, USUAL_HALF_DB)
    found = quantize(proto, largest)
    assert found.layers >= 4
    assert _signal_to_noise(exact, _features(found.proto, volumes, tmp_path)) > INT8_DB.get(family, USUAL_INT8_DB)
    int8 = to_half(found.proto, largest).proto
    del found
    for make, least in ((lambda: half.proto, STRICT_DB), (lambda: to_bfloat16(proto).proto, BFLOAT16_DB),
                        (lambda: int8, INT8_DB | {"": USUAL_INT8_DB})):
        gc.collect()  # the largest encoder's graph is 800 MB in float32
        noise = _signal_to_noise(exact, _features(emulate(make()), volumes, tmp_path))
        assert noise > least.get(family, least[""])


def _optimized(name: str, size: int) -> onnx.ModelProto:
    checkpoint = random_checkpoint(name, seed=1, input_size=size)
    proto, _ = optimize(trace_image_tower(checkpoint.build(), checkpoint.spec), MEASURED)
    return proto


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int8 and fp16", "text fp16", "text bf16",
                                       "text int8"])
def test_tensorrt_parses_and_builds(precision: str, tmp_path: Path):
    """NVIDIA's own parser and builder, which need no GPU to build."""
    trt = pytest.importorskip("tensorrt_rtx")
    checkpoint = random_checkpoint("dcformer-nano", seed=1, input_size=128)
    model = checkpoint.build()
    if precision.startswith("text"):
        proto = trace_text_tower(model, checkpoint.spec)
        convert = to_bfloat16 if precision == "text bf16" else to_half
        proto = convert(quantize_weights(proto) if precision == "text int8" else proto).proto
    else:
        proto, _ = optimize(trace_image_tower(model, checkpoint.spec), MEASURED)
        if precision == "fp16":
            proto = to_half(proto).proto
        elif precision == "bf16":
            proto = to_bfloat16(proto).proto
        elif precision.startswith("int8"):
            volumes = np.random.default_rng(0).uniform(-1, 1, (1, 64, 128, 128)).astype(np.float32)
            observer = Observer(proto, (), 2)
            observer.observe(_feeds(proto, volumes))
            proto = quantize(proto, {name: h.largest for name, h in observer.histograms.items()}).proto
            if precision == "int8 and fp16":
                proto = to_half(proto).proto
    logger = Log(load_library("tensorrt_rtx")).logger
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(proto.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = [(1 if axis == 0 else 16) if side < 0 else side for axis, side in enumerate(tensor.shape)]
        profile.set_shape(tensor.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None

"""All rules in their order on whole models."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from dcformer_deploy.export.checkpoints import read_checkpoint
from dcformer_deploy.export.rules.pipeline import MEASURED, RULE_NAMES, RULE_TAG, optimize
from dcformer_deploy.export.trace import trace_image_tower
from dcformer_deploy.runtime import InputError, Model
from dcformer_deploy.runtime.manifest import TensorInfo
from dcformer_deploy.runtime.volume import image_feeds
from golden import inputs, relative_error
from graphs import EXACT


@pytest.fixture(scope="module")
def traced(checkpoint: Path) -> onnx.ModelProto:
    read = read_checkpoint(checkpoint)
    return trace_image_tower(read.build(), read.spec)


def _outputs(proto: onnx.ModelProto, volumes: np.ndarray) -> list[np.ndarray]:
    read = [TensorInfo(value.name, "float32", tuple(axis.dim_param or axis.dim_value
                                                    for axis in value.type.tensor_type.shape.dim))
            for value in proto.graph.input]
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["feature_map", "image_embedding", "codes"], image_feeds(read, volumes))


def _assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert relative_error(found[0], expected[0]) < EXACT
    assert relative_error(found[1], expected[1]) < EXACT
    np.testing.assert_array_equal(found[2], expected[2])


def test_every_rule_finds_its_place_in_dcformer(model: Model):
    reports = {report.rule: report for report in model.manifest.rewrites}
    assert list(reports) == list(RULE_NAMES)
    assert reports["fold_projection"].refused[0].endswith("512 numbers a token would be looked up instead of 256")
    assert all(report.matched or report.measured or name == "fold_projection" for name, report in reports.items())
    # Nano at 128: one stem, four stages of one block.
    assert (reports["mlp_to_convolutions"].matched, reports["fold_layer_scale"].matched) == (4, 4)
    assert (reports["compose_stem"].matched, reports["merge_branches"].matched) == (1, 7)
    assert reports["line_input"].after.multiply_adds < 0.72 * reports["mlp_to_convolutions"].before.multiply_adds


@pytest.mark.parametrize("rule", [*RULE_NAMES, None])
def test_without_any_one_rule_the_rest_is_still_exact(traced: onnx.ModelProto, rule: str | None):
    image, *_ = inputs()
    expected = _outputs(traced, image[:, 0])
    proto, reports = optimize(traced, [rule] if rule else [])
    assert rule not in [report.rule for report in reports]
    _assert_same(_outputs(proto, image[:, 0]), expected)


def test_without_all_rules_nothing_changes(traced: onnx.ModelProto):
    proto, reports = optimize(traced, RULE_NAMES)
    assert reports == []
    assert proto == traced


def test_new_nodes_say_which_rule_made_them(traced: onnx.ModelProto):
    proto, _ = optimize(traced)
    made = {entry.value for node in proto.graph.node for entry in node.metadata_props if entry.key == RULE_TAG}
    assert made <= set(RULE_NAMES)
    assert {"stream_planes", "flatten_convolutions", "sink_transposes"} <= made


def test_nothing_is_left_over(traced: onnx.ModelProto):
    proto, _ = optimize(traced)
    read = {name for node in proto.graph.node for name in node.input} | {value.name for value in proto.graph.output}
    assert {tensor.name for tensor in proto.graph.initializer} <= read
    assert proto.ByteSize() < 1.02 * traced.ByteSize()


def test_unknown_rule_is_refused(traced: onnx.ModelProto):
    with pytest.raises(InputError, match="rewrite rule 'line_imput': unknown; did you mean"):
        optimize(traced, ["line_imput"])


def test_names_of_values_that_are_gone_are_not_given_again(traced: onnx.ModelProto):
    """What calibration knows of a value, it knows by its name in the graph before the measured rules."""
    before, _ = optimize(traced, MEASURED)
    image, *_ = inputs()
    after, _ = optimize(before, [name for name in RULE_NAMES if name not in MEASURED])
    shared = [name for node in after.graph.node for name in node.output
              if name in {old for other in before.graph.node for old in other.output}]
    assert len(shared) > 20
    found = []
    for proto in (before, after):
        kinds = {value.name: value for value in (*proto.graph.value_info, *proto.graph.output)}
        chosen = [name for name in shared if kinds[name].type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
        whole = onnx.ModelProto()
        whole.CopyFrom(proto)
        known = {value.name for value in proto.graph.output}
        whole.graph.output.extend(kinds[name] for name in chosen if name not in known)
        session = onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
        read = [TensorInfo(value.name, "float32", tuple(axis.dim_param or axis.dim_value
                                                        for axis in value.type.tensor_type.shape.dim))
                for value in proto.graph.input]
        found.append(session.run(chosen, image_feeds(read, image[:1, 0])))
    for name, a, b in zip(chosen, *found, strict=True):
        assert relative_error(a.reshape(-1), b.reshape(-1)) < EXACT, name

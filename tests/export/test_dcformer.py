"""The encoder family and the CLIP model against the original code's numbers."""

import numpy as np
import pytest
import torch
from fvcore.nn import FlopCountAnalysis

from conftest import GOLDEN_TOLERANCE
from dcformer_deploy.export.clip import Clip, ClipSpec
from dcformer_deploy.export.complexity import EncoderRow, count, table
from dcformer_deploy.export.registry import all_encoders, get_encoder
from dcformer_deploy.export.text import TextSpec
from dcformer_deploy.runtime import InputError
from golden import CASES, NANO, Case, inputs, relative_error

TEXT = TextSpec(vocab_size=512, hidden_size=768, layers=1, intermediate_size=128, max_positions=512, token_types=2)
VARIANTS = {"nano", "naive", "tiny", "small", "base", "large"}


def build(case: Case) -> Clip:
    model = ClipSpec(get_encoder(case.encoder), case.reduction, 128, 8192, TEXT).build()
    model.load_state_dict(case.state_dict())
    return model


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_state_dict_has_the_original_keys_and_shapes(case: Case):
    found = ClipSpec(get_encoder(case.encoder), case.reduction, 128, 8192, TEXT).build().state_dict()
    assert {key: list(value.shape) for key, value in found.items()} == case.shapes


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden_outputs_in_pytorch(case: Case):
    model, expected = build(case), case.expected
    image, ids, mask = inputs()
    with torch.no_grad():
        outputs = model.encode_image(torch.from_numpy(image))
        text = model.encode_text(torch.from_numpy(ids), torch.from_numpy(mask))
    np.testing.assert_array_equal(outputs.codes, expected["codes"])
    assert relative_error(outputs.feature_map.numpy(), expected["feature_map"]) < GOLDEN_TOLERANCE
    assert relative_error(outputs.embedding.numpy(), expected["image_embedding"]) < GOLDEN_TOLERANCE
    assert relative_error(text.numpy(), expected["text_embedding"]) < GOLDEN_TOLERANCE
    logits = (outputs.embedding @ text.t() * np.e).numpy()
    assert relative_error(logits, expected["logits"]) < GOLDEN_TOLERANCE


def test_stem_is_linear():
    """An activation in the stem, as the paper draws it, would make every published checkpoint wrong."""
    stem = build(NANO).visual_transformer.encoder.s0.double()
    a, b = torch.randn(2, 1, 1, 32, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        offset = stem(torch.zeros_like(a))
        combined = stem(2 * a - 3 * b)
        torch.testing.assert_close(combined - offset, 2 * (stem(a) - offset) - 3 * (stem(b) - offset))


def test_doubled_norm_names_are_one_module():
    block = build(NANO).visual_transformer.encoder.s1[0].dwconv
    assert block.c2[1] is block.norm[1]


def test_all_variants_are_registered():
    assert {f"dcformer-{v}" for v in VARIANTS} <= {spec.name for spec in all_encoders()}


@pytest.mark.parametrize("spec", all_encoders(), ids=lambda spec: spec.name)
def test_output_shape(spec):
    size = 2 * spec.size_step
    with torch.device("meta"):
        found = spec.build(size).eval()(torch.empty(1, 1, size // 2, size, size))
    depth, height, width = spec.grid(size)
    assert found.shape == (1, spec.channels, height, width, depth)


def test_unknown_encoder_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'dcformer-nano'"):
        get_encoder("dcformer-nanno")


@pytest.fixture(scope="module")
def rows() -> dict[str, EncoderRow]:
    return {row.name: row for row in table()}


@pytest.mark.parametrize(("name", "params", "gflops"), [
    ("dcformer-nano", "0.92", "34.21"), ("dcformer-naive", "5.85", "49.48"), ("dcformer-tiny", "15.1", "168.15"),
])
def test_published_counts_to_the_printed_digits(rows: dict[str, EncoderRow], name: str, params: str, gflops: str):
    row = rows[name]
    assert f"{row.params_m:.{len(params.split('.')[1])}f}" == params
    assert f"{row.gflops:.2f}" == gflops
    assert row.published_params_m == float(params)


@pytest.mark.parametrize("name", ["dcformer-nano", "dcformer-tiny"])
def test_count_equals_fvcore(name: str):
    """fvcore is the counter behind the published table; on real tensors, which the full size would not allow here."""
    spec = get_encoder(name)
    analysis = FlopCountAnalysis(spec.build(128).train(), torch.zeros(1, 1, 64, 128, 128))
    analysis.unsupported_ops_warnings(False)
    assert count(spec, 128).multiply_accumulates == analysis.total()

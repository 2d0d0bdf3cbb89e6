"""The comparison itself: it must not pass by accident."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dcformer_deploy.export.clip import Clip, ClipSpec
from dcformer_deploy.export.registry import get_encoder
from dcformer_deploy.export.text import TextSpec
from dcformer_deploy.export.verify import (
    LARGEST_TOLERANCE,
    NEAR_TIE_SHARE,
    TOLERANCE,
    _compare_codes,
    _tolerances,
    compare,
    require_agreement,
)
from dcformer_deploy.runtime import CheckFailed
from dcformer_deploy.runtime.provenance import Agreement


def agreement(error: float) -> Agreement:
    return Agreement("image.fp32.onnx", "feature_map", "real", error, 1.0, 1e-4)


def test_known_difference():
    reference = np.array([[3.0, 4.0], [0.0, 2.0]])
    error, cosine = compare(reference, np.array([[3.0, 4.0], [2.0, 0.0]]))
    assert error == pytest.approx(2 / 4)
    assert cosine == pytest.approx(0.0)


@pytest.mark.parametrize("found", [np.array([[1.0, np.nan]]), np.array([[1.0]]), np.array([[np.inf, 1.0]])])
def test_nan_infinity_and_other_shapes_fail(found: np.ndarray):
    error, _ = compare(np.array([[1.0, 2.0]]), found)
    with pytest.raises(CheckFailed):
        require_agreement([agreement(error)])


def test_nothing_compared_is_a_failure():
    with pytest.raises(CheckFailed, match="nothing was compared"):
        require_agreement([])


def test_tolerance_is_a_limit():
    require_agreement([agreement(1e-4)])
    with pytest.raises(CheckFailed, match=r"feature_map on real input by 1.10e-04 .* the tolerance is 1e-04 relative"):
        require_agreement([agreement(1.1e-4)])
    with pytest.raises(CheckFailed):
        require_agreement([agreement(float("nan"))])


def clip_with_twin_codes() -> tuple[Clip, torch.Tensor, torch.Tensor]:
    """A model whose codes 0 and 1 are the same, a feature map, and PyTorch's codes for it."""
    torch.manual_seed(0)
    text = TextSpec(vocab_size=8, hidden_size=64, layers=1, intermediate_size=64, max_positions=8, token_types=2)
    clip = ClipSpec(get_encoder("dcformer-nano"), "channel", 128, 32, text).build()
    assert isinstance(clip, Clip)
    codebook = clip.codebook
    codebook.embed[0, 1] = codebook.embed[0, 0]
    feature_map = torch.randn(1, 256, 16, 16, 1)
    feature_map[0, :, 0, 0, 0] = codebook.embed[0, 0]
    tokens = feature_map.permute(0, 4, 2, 3, 1).flatten(1, 3)
    return clip, feature_map, codebook(tokens)


def test_a_tie_may_be_decided_either_way():
    clip, feature_map, codes = clip_with_twin_codes()
    other = codes.clone()
    other[0, 0] = 1 - codes[0, 0]
    assert {int(codes[0, 0]), int(other[0, 0])} == {0, 1}
    share = _compare_codes(clip, feature_map, codes, other, 1e-5, "here")
    assert share == pytest.approx(255 / 256)


def test_a_code_that_is_no_tie_is_a_failure():
    clip, feature_map, codes = clip_with_twin_codes()
    other = codes.clone()
    other[0, 7] = (other[0, 7] + 2) % 32
    with pytest.raises(CheckFailed, match="1 of 256 VQ codes differ"):
        _compare_codes(clip, feature_map, codes, other, 1e-5, "here")


def test_many_ties_are_a_failure():
    """A collapsed codebook would otherwise let any codes pass."""
    clip, feature_map, codes = clip_with_twin_codes()
    codebook = clip.codebook
    codebook.embed.copy_(codebook.embed[:, :1].expand_as(codebook.embed).clone())
    with pytest.raises(CheckFailed, match="VQ codes differ"):
        _compare_codes(clip, feature_map, codes, (codes + 1) % 32, 1e-5, "here")


def test_tolerance_follows_what_pytorch_itself_is_off():
    """Widened only for a graph that misses the usual one, by PyTorch's own distance from fp64, up to the limit."""
    clip, _, _ = clip_with_twin_codes()
    volume = np.random.default_rng(0).uniform(-1, 1, (1, 64, 128, 128)).astype(np.float32)
    with torch.no_grad():
        expected = clip.visual_transformer.encoder(torch.from_numpy(volume[:, None]))
        usual = TOLERANCE, NEAR_TIE_SHARE * TOLERANCE
        assert _tolerances(clip, volume, expected, expected.numpy()) == usual
        # A graph that is wrong, of a model that is precise: PyTorch's own 1e-6 times 4 is still below 1e-4.
        assert _tolerances(clip, volume, expected, 1.01 * expected.numpy()) == usual
        imprecise = expected + 5e-4 * expected.abs().max() * torch.randn_like(expected).clamp(-1, 1)
        widened, near_tie = _tolerances(clip, volume, imprecise, expected.numpy())
        assert 1e-3 < widened <= 4 * 5.1e-4
        moved = (clip.codebook.similarities(imprecise.permute(0, 4, 2, 3, 1).flatten(1, 3))
                 - clip.codebook.similarities(expected.permute(0, 4, 2, 3, 1).flatten(1, 3))).abs().max()
        assert near_tie == pytest.approx(4 * float(moved), rel=0.05)
        assert _tolerances(clip, volume, 2 * expected, expected.numpy())[0] == LARGEST_TOLERANCE


def test_wide_tolerance_does_not_excuse_another_direction():
    close = Agreement("g.onnx", "feature_map", "real", 0.05, 0.99995, 0.1)
    require_agreement([close])
    with pytest.raises(CheckFailed, match=r"feature_map on real input by 5.00e-02 \(cosine 0.999800\)"):
        require_agreement([replace(close, cosine=0.9998)])

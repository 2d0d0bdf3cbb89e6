"""The comparison itself: it must not pass by accident."""

import numpy as np
import pytest

from dcformer_deploy.export.verify import compare, require_agreement
from dcformer_deploy.runtime import CheckFailed
from dcformer_deploy.runtime.manifest import Agreement


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
    with pytest.raises(CheckFailed, match=r"1.10e-04 \(relative\), tolerance 1e-04"):
        require_agreement([agreement(1.1e-4)])
    with pytest.raises(CheckFailed):
        require_agreement([agreement(float("nan"))])

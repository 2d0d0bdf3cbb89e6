"""Preprocessing against the original's numbers and against its method written with torch."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcformer_deploy.benchmarks.original import preprocess_array
from dcformer_deploy.runtime import InputError
from dcformer_deploy.runtime.manifest import Preprocessing
from dcformer_deploy.runtime.volume import ReadOptions, Volume, preprocess, read_nifti
from dcformer_deploy.runtime.volume.preprocess import plan_axis
from dcformer_deploy.runtime.volume.types import LinearMap
from golden import DATA

TOLERANCE = 1e-5


@pytest.mark.filterwarnings("ignore::dcformer_deploy.runtime.volume.hounsfield.HounsfieldWarning")
@pytest.mark.parametrize("case", range(4))
def test_golden(case: int, ct: Path):
    expected = np.load(DATA / "preprocess-example_ct.npz")
    slope, intercept, xy, z, height, width, depth = expected[f"c{case}_params"]
    options = ReadOptions((xy, xy, z), slope, intercept, "as-stored")
    found = preprocess(read_nifti(ct, "LPS", options), Preprocessing((int(depth), int(height), int(width))))
    assert (1, *found.shape) == tuple(expected[f"c{case}_shape"])
    assert found.dtype == np.float32
    step = int(expected[f"c{case}_step"])
    np.testing.assert_allclose(found[::step, ::step, ::step], expected[f"c{case}_sample"], rtol=0, atol=TOLERANCE)
    assert found.mean(dtype=np.float64) == pytest.approx(expected[f"c{case}_mean"], abs=1e-7)
    assert found.std(dtype=np.float64) == pytest.approx(expected[f"c{case}_std"], abs=1e-7)


sides = st.tuples(*[st.integers(4, 90)] * 3)
spacings = st.tuples(*[st.floats(0.4, 3.0)] * 3)


@settings(max_examples=60, deadline=None)
@given(sides, spacings, st.tuples(*[st.integers(1, 70)] * 3), st.integers(0, 2**31), st.booleans())
def test_equals_the_original_method(shape, spacing, target, seed, rescale):
    random = np.random.default_rng(seed)
    slope, intercept = (0.7, -500.0) if rescale else (1.0, 0.0)
    array = random.integers(-1500, 2500, shape).astype(np.int16)
    volume = Volume("test", array, (LinearMap(), LinearMap(slope, intercept)), spacing, "LPS")
    found = preprocess(volume, Preprocessing(target))
    expected = preprocess_array(array, slope, intercept, spacing, Preprocessing(target))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_equals_the_original_method_at_clinical_size():
    """Long axes are where the rounding of sample positions matters: a plain float32 formula is off by 1e-4 here."""
    random = np.random.default_rng(0)
    for shape, spacing, target in (
        ((700, 5, 6), (0.683, 2.0, 3.0), (12, 640, 13)),
        ((4, 811, 5), (3.0, 0.871, 2.0), (6, 16, 640)),
        ((5, 4, 997), (2.0, 3.0, 0.625), (512, 13, 16)),
    ):
        array = random.integers(-1000, 1000, shape).astype(np.int16)
        volume = Volume("test", array, (), spacing, "LPS")
        found = preprocess(volume, Preprocessing(target))
        expected = preprocess_array(array, 1, 0, spacing, Preprocessing(target))
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_memory_order_of_the_stored_array_does_not_matter():
    array = np.random.default_rng(1).integers(-1000, 1000, (20, 21, 22)).astype(np.int16)
    spec = Preprocessing((16, 24, 24))
    results = [preprocess(Volume("test", variant, (), (0.9, 0.8, 1.7), "LPS"), spec)
               for variant in (array, np.asfortranarray(array), array[::-1].copy()[::-1], array.astype(">i2"))]
    assert all(np.array_equal(results[0], other) for other in results[1:])


def test_scan_smaller_than_one_voxel():
    volume = Volume("tiny.nii", np.zeros((1, 9, 9), np.int16), (), (0.3, 1.0, 1.0), "LPS")
    with pytest.raises(InputError, match=r"tiny.nii: 1 voxels at 0.3 mm are less than one voxel of 0.75 mm"):
        preprocess(volume, Preprocessing((8, 8, 8)))


def test_plan_covers_crop_and_padding():
    crop, pad = plan_axis(100, 0.75, 0.75, 64), plan_axis(10, 0.75, 0.75, 64)
    assert (crop.lower[0], crop.start, len(crop.lower)) == (18, 0, 64)
    assert (pad.lower[0], pad.start, len(pad.lower)) == (0, 27, 10)

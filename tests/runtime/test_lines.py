"""Lines computed alone are those of the whole preprocessed volume."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcformer_deploy.runtime import Model
from dcformer_deploy.runtime.manifest import Preprocessing, TensorInfo
from dcformer_deploy.runtime.volume import Volume, image_feeds, preprocess, read_nifti, scan_feeds
from dcformer_deploy.runtime.volume.preprocess import plan_axis, sample
from dcformer_deploy.runtime.volume.types import LinearMap


def _inputs(shape: tuple[int, int, int], stride: int) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(f"lines_{name}", "float32", ("batch", 1, *(
        side if axis == whole else side // stride for axis, side in enumerate(shape))))
        for whole, name in enumerate("dhw"))


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(4, 90)] * 3), st.tuples(*[st.floats(0.4, 3.0)] * 3),
       st.tuples(*[st.integers(1, 18)] * 3), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(0, 2**31))
def test_equal_to_the_bit(shape, spacing, quarter, stride, threads, seed):
    """Scans larger and smaller than the volume, so that crops and padding of every remainder occur."""
    target = tuple(stride * side for side in quarter)
    array = np.random.default_rng(seed).integers(-1500, 2500, shape).astype(np.int16)
    volume = Volume("test", array, (LinearMap(), LinearMap(0.7, -500.0)), spacing, "LPS")
    spec = Preprocessing(target)
    expected = image_feeds(_inputs(target, stride), preprocess(volume, spec)[None])
    found = scan_feeds(_inputs(target, stride), volume, spec, threads)
    assert list(found) == list(expected) == ["lines_d", "lines_h", "lines_w"]
    for name, lines in found.items():
        assert lines.dtype == np.float32
        np.testing.assert_array_equal(lines, expected[name])


def test_intensity_of_the_whole_scan_counts(hounsfield: np.ndarray):
    """The minimum and maximum of Med3DVLM's scaling are those of the scan, not of the lines."""
    volume = Volume("test", hounsfield, (), (1.0, 1.0, 2.0), "LPS")
    spec = Preprocessing((16, 24, 24), resampling="to_shape", intensity="min_max", crops_to_foreground=True)
    dense = preprocess(volume, spec)
    found = scan_feeds(_inputs(spec.shape_dhw, 4), volume, spec, 1)
    np.testing.assert_array_equal(found["lines_h"][0, 0], dense[::4, :, ::4])


def test_whole_volume_where_the_graph_wants_it(hounsfield: np.ndarray):
    volume = Volume("test", hounsfield, (), (1.0, 1.0, 2.0), "LPS")
    spec = Preprocessing((16, 24, 24))
    found = scan_feeds([TensorInfo("volume", "float32", ("batch", 1, 16, 24, 24))], volume, spec, 2)
    np.testing.assert_array_equal(found["volume"][0, 0], preprocess(volume, spec))


def test_threads_do_not_change_the_result(ct: Path):
    volume = read_nifti(ct)
    spec = Preprocessing((64, 128, 128))
    first = sample(volume, spec, (4, 1, 4), 1)
    assert all(np.array_equal(first, sample(volume, spec, (4, 1, 4), threads)) for threads in (2, 5, 200))


def test_error_of_a_worker_thread_arrives(monkeypatch: pytest.MonkeyPatch, hounsfield: np.ndarray):
    def fail(self: Volume, stored: np.ndarray) -> np.ndarray:
        raise MemoryError("no memory for a slice")

    monkeypatch.setattr(Volume, "hounsfield", fail)
    with pytest.raises(MemoryError, match="no memory for a slice"):
        sample(Volume("test", hounsfield, (), (1.0, 1.0, 2.0), "LPS"), Preprocessing((16, 24, 24)), (1, 4, 4), 2)


def test_plan_of_every_fourth_index():
    whole = plan_axis(10, 0.75, 0.75, 64)  # output indices 27 to 36
    fourth = whole.every(4)
    assert (fourth.start, fourth.lower.tolist()) == (7, [1, 5, 9])  # 28, 32 and 36
    assert whole.every(1).lower.tolist() == whole.lower.tolist()
    assert len(plan_axis(1, 0.75, 0.75, 64).every(4).lower) == 0  # the only sample is at 31


def test_model_reads_a_file_as_it_reads_its_preprocessed_volume(model: Model, ct: Path):
    assert [info.name for info in model.manifest.graphs[0].inputs] == ["lines_d", "lines_h", "lines_w"]
    np.testing.assert_array_equal(model.embed_image(ct), model.embed_image(model.preprocess(ct)))

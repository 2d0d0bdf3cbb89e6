"""What holds for any parameters (hypothesis): a scan is refused in one line, or its volume is finite and in range."""

import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcformer_deploy.runtime import InputError, Model
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.occlusion import choose_grid
from scans import write

_NUMBERS = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0.0, 1.0, -1.0, 1e-3, 50.0]),
                     st.integers(-10, 10))
_SETTINGS = settings(max_examples=60, deadline=None, derandomize=True,
                     suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@st.composite
def _scans(draw: st.DrawFn) -> np.ndarray:
    """Any small shape, and voxels around those of a chest, constant, or at the ends of a type."""
    shape = draw(st.tuples(*[st.integers(1, 24)] * 3))
    dtype = draw(st.sampled_from(["int16", "uint16", "int32", "float32", "uint8", "float64"]))
    low, high = draw(st.sampled_from([(-1024, 3071), (0, 1), (-1000, -1000), (-32768, 32767), (0, 70_000)]))
    values = np.random.default_rng(draw(st.integers(0, 9))).uniform(low, high, shape)
    with np.errstate(all="ignore"):
        return values.astype(dtype)


@_SETTINGS
@given(array=_scans(), spacing=st.none() | st.tuples(_NUMBERS, _NUMBERS, _NUMBERS), slope=st.none() | _NUMBERS,
       intercept=st.none() | _NUMBERS, orientation=st.sampled_from([None, "as-stored", "LPS", "XYZ", ""]))
def test_any_scan_with_any_options(model: Model, array, spacing, slope, intercept, orientation):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = write(Path(folder) / "s.nii", array)
        try:
            volume = model.preprocess(path, spacing=spacing, slope=slope, intercept=intercept, orientation=orientation)
        except InputError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 1000
            return
    spec = model.manifest.preprocessing
    low, high = spec.value_range
    assert volume.shape == spec.shape_dhw
    assert volume.dtype == np.float32
    assert np.isfinite(volume).all()
    assert low - 1e-6 <= volume.min()
    assert volume.max() <= high + 1e-6


@_SETTINGS
@given(texts=st.lists(st.text(min_size=0, max_size=300), min_size=1, max_size=6))
def test_any_texts(model: Model, texts: list[str]):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = model.embed_text(texts)
        except InputError as error:
            assert "texts[" in str(error)
            return
    assert found.shape == (len(texts), 512)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


@_SETTINGS
@given(shape=st.tuples(*[st.integers(1, 600)] * 3), most=st.integers(8, 5000))
def test_any_grid(shape: tuple[int, int, int], most: int):
    grid = choose_grid(shape, most)
    assert np.prod(grid) <= most
    assert all(side % parts == 0 and parts & (parts - 1) == 0 for side, parts in zip(shape, grid, strict=True))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.sampled_from(["--json", "--spacing", "1", "0", "-1", "nan", "--slope", "--threads", "x", "--",
                                       "--classes", "--no-verify", "--precision", "int8", "--backend", "auto"]),
                      max_size=5))
def test_any_words(pristine_bundle: Path, ct: Path, words: list[str], capsys):
    capsys.readouterr()
    code = main(["zeroshot", str(pristine_bundle), str(ct), *words])
    told = capsys.readouterr()
    assert code in (0, 2, 3)
    assert (code == 0) == (not any(line.startswith("error: ") for line in told.err.splitlines()))
    if code == 0 and "--json" in words:
        assert len(json.loads(told.out)) == 1

"""Occlusion: that hiding is what it says, for volumes and for lines, and that it finds what a model goes by."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcformer_deploy.runtime import InputError, Model
from dcformer_deploy.runtime.occlusion import choose_grid, occlude
from dcformer_deploy.runtime.results import Prepared


@pytest.mark.parametrize(("shape", "most", "grid"), [
    ((256, 512, 512), 256, (4, 8, 8)), ((256, 512, 512), 255, (4, 8, 4)), ((64, 128, 128), 8, (2, 2, 2)),
    ((64, 128, 128), 32, (2, 4, 4)), ((120, 240, 240), 300, (4, 8, 8)), ((15, 30, 30), 10**6, (1, 2, 2)),
    ((65, 130, 130), 256, (1, 2, 2))])
def test_grids(shape: tuple[int, int, int], most: int, grid: tuple[int, int, int]):
    assert choose_grid(shape, most) == grid


def test_too_few_blocks():
    with pytest.raises(InputError, match="blocks: 7; expected at least 8"):
        choose_grid((64, 128, 128), 7)


def test_effects_are_those_of_volumes_with_a_block_of_air(model: Model, ct: Path):
    """Whatever lines the graph reads: the same as preprocessing gives with air in the block."""
    volume = model.preprocess(ct)
    found = occlude(model, model.prepare(ct), most_blocks=32)
    assert found.effect.shape == (2, 4, 4, 18)
    assert found.block_dhw == (32, 32, 32)
    whole = model.zero_shot(volume).scores
    np.testing.assert_allclose(found.scores, list(whole.values()), atol=1e-6)
    tried = 0
    for place in ((0, 1, 1), (1, 2, 2), (1, 0, 3), (0, 0, 0)):
        hidden = volume.copy()
        hidden[tuple(slice(32 * i, 32 * i + 32) for i in place)] = -1
        tried += not np.array_equal(hidden, volume)
        scores = np.array(list(model.zero_shot(hidden).scores.values()))
        expected = _log_odds(np.array(list(whole.values()))) - _log_odds(scores)
        np.testing.assert_allclose(found.effect[place], expected, atol=2e-5)
    assert tried >= 2


def test_blocks_of_air_take_no_inference(model: Model):
    volume = np.full(model.manifest.preprocessing.shape_dhw, -1, np.float32)
    volume[40:50, 70:80, 70:80] = 0.3
    steps: list[tuple[int, int]] = []
    found = occlude(model, model.prepare(volume), most_blocks=32, on_block=lambda *step: steps.append(step))
    assert found.inferences == 2
    assert steps == [(0, 1)]
    found.effect[1, 2, 2] = 0
    assert not found.effect.any()


class _Bright:
    """A model that goes by the mean of one corner, so that where it looks is known."""

    def __init__(self, model: Model, region: tuple[slice, ...]) -> None:
        self.manifest, self._region = model.manifest, region

    def zero_shot(self, scan: Prepared, classes: Sequence[str] | None) -> Any:
        value = float(scan.feeds["volume"][0, 0][self._region].mean())
        scores = {"there": 0.5 + value / 4, "not there": 0.5 - value / 4}
        return type("Scores", (), {"scores": scores})


def test_it_finds_what_a_model_goes_by(model: Model):
    spec = model.manifest.preprocessing
    volume = np.random.default_rng(0).uniform(0, 1, spec.shape_dhw).astype(np.float32)
    looks: Any = _Bright(model, (slice(32, 64), slice(96, 128), slice(0, 32)))
    found = occlude(looks, Prepared("v", {"volume": volume[None, None]}), most_blocks=32)
    ((place, effect),) = found.strongest("there")
    assert place == (1, 3, 0)
    assert effect > 0.5
    assert np.count_nonzero(found.effect) == 2
    assert found.effect[1, 3, 0, 1] == pytest.approx(-effect, rel=1e-5)


def test_inputs_on_a_gpu(model: Model):
    with pytest.raises(InputError, match="hides blocks on the CPU"):
        occlude(model, Prepared("v", {"volume": object()}))


def _log_odds(probability: np.ndarray) -> np.ndarray:
    return np.log(probability / (1 - probability))

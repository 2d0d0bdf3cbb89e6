"""The comparison of indexes."""

from pathlib import Path

import numpy as np

from dcformer_deploy.benchmarks import indexes


def test_small(tmp_path: Path):
    rows = indexes.compare(3000, tmp_path)
    exact, *approximate = rows
    assert exact.recall == 1
    assert [row.candidates for row in approximate[:4]] == [32, 64, 128, 256]
    assert approximate[0].recall <= approximate[3].recall
    assert approximate[3].recall > 0.9
    assert "| exact, mapped matrix | - | 1.0000 |" in indexes.to_markdown(rows, 3000)


def test_gallery_is_of_unit_rows():
    np.testing.assert_allclose(np.linalg.norm(indexes.synthetic(100), axis=1), 1, atol=1e-6)

"""Throughput: every contender embeds every scan, and the plan is what one computes by hand."""

import dataclasses
from pathlib import Path

import pytest

from dcformer_deploy.benchmarks import throughput
from dcformer_deploy.benchmarks.capacity import Archive, Steps, plan, plan_rows
from dcformer_deploy.runtime.cli.output import progress
from dcformer_deploy.runtime.inputs import find_items

#: 1 s of reading and 1 s of inference for 100 MB.
STEPS = Steps(hash_s=0.1, read_s=0.7, preprocess_s=0.2, inference_s=1.0, write_s=0.001, bytes=100_000_000,
              row_bytes=2000)


@pytest.mark.parametrize(("archive", "scans_per_s", "hours", "budget"), [
    (Archive(36_000, 1, 10, 0), 5, 2, None),  # 10 cores, 2 s each
    (Archive(36_000, 1, 11, 1), 10, 1, 0.1),  # 10 cores read, one feeds the GPU
    (Archive(360_000, 20, 12, 2), 200, 0.5, 0.2),
])
def test_plans(archive: Archive, scans_per_s: float, hours: float, budget: float | None):
    found = plan(STEPS, archive)
    assert (found.scans_per_s, found.hours, found.gpu_budget_s) == (scans_per_s, hours, budget)
    assert found.bytes_per_s == scans_per_s * 100e6
    assert found.store_bytes == archive.scans * 2000


def test_plan_as_a_table():
    columns, rows = plan_rows(STEPS, [Archive(36_000, 1, 11, 1), Archive(36_000_000, 1, 10, 0)])
    assert len(columns) == len(rows[0])
    assert rows[0][4:8] == ("10.0", "1.0 hours", "1.00 GB/s", "100 ms")
    assert rows[1][5] == "83.3 days"


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
def test_everyone_embeds_all(pristine_bundle: Path, scans: Path, tmp_path: Path):
    items = find_items([scans], None, {})
    with progress() as display:
        found = throughput.measure(pristine_bundle, items, 1, 2, display, tmp_path)
    assert [rate.contender for rate in found.rates] == [
        throughput.LOOP, "embed, 1 reader of one core", "embed, 2 readers of one core",
        f"{throughput.PREPARED}, 2 readers", throughput.APART, "embed --ray, 2 processes"]
    assert all(rate.median > 0 for rate in found.rates)
    assert found.scans == 4
    assert 2000 < found.row_bytes < 20_000
    steps = throughput.steps_of(found)
    assert all(value > 0 for value in dataclasses.asdict(steps).values())
    paths = throughput.write(found, tmp_path, "t")
    text = paths[0].read_text()
    assert "| plain loop |" in text
    assert "50,188" in text

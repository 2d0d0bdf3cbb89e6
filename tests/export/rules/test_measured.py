"""Choosing by measuring: what is measured, what is remembered, and what is done with it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from dcformer_deploy.export.rules import measured
from dcformer_deploy.export.rules.measured import RUNS, Stopwatch
from dcformer_deploy.export.rules.pipeline import MEASURED, RULE_NAMES, optimize
from dcformer_deploy.runtime.backends import Options
from dcformer_deploy.runtime.errors import DcformerWarning
from dcformer_deploy.runtime.provenance import Timing
from graphs import GraphBuilder, operators


def _graph(seed: int = 0, width: int = 8) -> onnx.ModelProto:
    graph = GraphBuilder(seed)
    return graph.finish(graph.star("x", (width, 6), 3), {"x": ["batch", 6, 3, 5, 7]})


class _Backend:
    """Counts inferences; the first to be opened is slower."""

    opened: list["_Backend"]

    def __init__(self, path: Path, options: Options) -> None:
        self.runs, self.shapes = 0, None
        self.opened.append(self)

    def run(self, feeds: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
        self.runs += 1
        self.shapes = {name: array.shape for name, array in feeds.items()}
        if self is self.opened[0]:
            measured.time.sleep(0.01)
        return []

    def describe(self) -> str:
        return "library 1.0"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[_Backend]:
    _Backend.opened = []
    monkeypatch.setattr(measured, "open_graph", _Backend)
    return _Backend.opened


def test_both_graphs_run_equally_often_with_a_batch_of_one(opened: list[_Backend], tmp_path: Path):
    timing = Stopwatch(Options(), tmp_path / "t.json").compare(_graph(), _graph(width=9))
    assert timing.is_faster
    assert timing.where.startswith("library 1.0, ")
    assert [backend.runs for backend in opened] == [RUNS + 1] * 2
    assert opened[0].shapes == {"x": (1, 6, 3, 5, 7)}


def test_known_timings_are_not_measured_again(opened: list[_Backend], tmp_path: Path):
    cache = tmp_path / "sub" / "t.json"
    first = Stopwatch(Options(), cache).compare(_graph(), _graph(width=9))
    again = Stopwatch(Options(), cache).compare(_graph(seed=1), _graph(seed=2, width=9))  # other weights
    assert again == first
    assert sum(backend.runs for backend in opened[2:]) == 0
    Stopwatch(Options(), cache).compare(_graph(), _graph(width=10))  # another shape
    assert sum(backend.runs for backend in opened[4:]) > 0
    assert len(json.loads(cache.read_text())) == 2


def test_damaged_cache_is_announced_and_replaced(opened: list[_Backend], tmp_path: Path):
    (tmp_path / "t.json").write_text("[1, 2]")
    with pytest.warns(DcformerWarning, match="t.json: damaged"):
        Stopwatch(Options(), tmp_path / "t.json").compare(_graph(), _graph(width=9))
    assert len(json.loads((tmp_path / "t.json").read_text())) == 1


@pytest.mark.parametrize(("after_ms", "kept"), [(90.0, True), (110.0, False), (100.0, False)])
def test_a_rule_stays_only_where_it_is_faster(monkeypatch: pytest.MonkeyPatch, after_ms: float, kept: bool):
    timing = Timing(100.0, after_ms, "here")
    monkeypatch.setattr(Stopwatch, "compare", lambda self, before, after, sides=None: timing)
    graph = GraphBuilder()
    layers = graph.star(graph.star("x", (8, 1), 3), (8, 8), 3)
    before = graph.finish(graph.node("Conv", layers, graph.weight(4, 8, 1, 1, 1)), {"x": ["batch", 1, 3, 5, 7]})
    proto, reports = optimize(before, stopwatch=Stopwatch(Options()))
    assert [report.rule for report in reports if report.measured] == list(MEASURED)
    for report in reports[-2:]:
        assert report.measured == timing
        assert (report.matched > 0) == kept
        assert kept or report.refused == (f"graph: slower, {after_ms:.0f} instead of 100 ms",)
    assert ("Unsqueeze" in operators(proto), "Reshape" in operators(proto)) == (kept, kept)


def test_rules_that_find_nothing_are_not_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Stopwatch, "compare", lambda *_: pytest.fail("measured"))
    graph = GraphBuilder()
    optimize(graph.finish(graph.node("Relu", "x"), {"x": [1, 2, 3, 4, 5]}), stopwatch=Stopwatch(Options()))


def test_measured_rules_exist():
    assert set(MEASURED) < set(RULE_NAMES)


def test_on_a_real_back_end(tmp_path: Path):
    timing = Stopwatch(Options(threads=1), tmp_path / "t.json").compare(_graph(), _graph())
    assert timing.before_ms > 0 and timing.after_ms > 0
    assert "onnxruntime" in timing.where


def test_what_was_disturbed_is_not_remembered(opened: list[_Backend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = tmp_path / "t.json"
    for others, remembered in ((0.5, False), (0.05, True)):
        monkeypatch.setattr(measured.Activity, "of_others", lambda self, share=others: share)
        timing = Stopwatch(Options(), cache).compare(_graph(), _graph(width=9))
        assert timing.others == others
        assert cache.exists() == remembered


def test_activity_of_others(monkeypatch: pytest.MonkeyPatch):
    """A process that spins for itself is seen, this one's own work is not."""
    if not Path("/proc/stat").exists():
        pytest.skip("the system does not tell")
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            time.sleep(0.3)
            activity = measured.Activity()
            time.sleep(2)
            assert activity.of_others() > 0.5 / (os.cpu_count() or 1)
        finally:
            other.kill()
    monkeypatch.setattr(measured, "_busy_seconds", time.process_time)
    activity, end = measured.Activity(), time.perf_counter() + 1.2
    while time.perf_counter() < end:
        pass
    assert activity.of_others() < 0.01

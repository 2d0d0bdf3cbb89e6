"""Steps of a build: what the library reports, what is shown of it, and how it is stopped."""

import _thread
import io
import itertools
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import onnx
import pytest

from dcformer_deploy.export.engine import build
from dcformer_deploy.export.engine.add_engines import _tell
from dcformer_deploy.export.engine.build import BuildOptions, build_engine, parser_refusal
from dcformer_deploy.export.engine.watch import Phase, Watch, monitor, run_apart
from dcformer_deploy.runtime.cli import output
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.engine_library import Log, load_library
from graphs import GraphBuilder

trt = pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    builder = GraphBuilder()
    onnx.save(builder.finish(builder.node("Relu", builder.node("Conv", "x", builder.weight(4, 4, 1, 1, 1))),
                             {"x": ["batch", 4, 8, 8, 8]}), tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


def test_steps_of_a_real_build(graph: Path):
    seen: list[tuple[Phase, ...]] = []
    build_engine(load_library("tensorrt_rtx"), graph, BuildOptions(), Watch(seen.append))
    outer = [phases[0] for phases in seen]
    assert {phase.parent for phase in outer} == {None}
    assert {phase.name for phase in outer} == {"Building engine"}
    done = [phase.done for phase in outer]
    assert done == sorted(done)
    assert len(set(done)) > 3
    assert max(done) <= outer[0].total
    nested = [phases for phases in seen if len(phases) > 2]
    assert nested
    for phases in nested:
        assert all(inner.parent == around.name for around, inner in itertools.pairwise(phases))


def test_phases_in_any_order():
    """Two within one, a step of none, a name used again, and the outer one that ends first."""
    seen = []
    reporter = monitor(trt, Watch(lambda phases: seen.append([(phase.name, phase.done, phase.total)
                                                              for phase in phases])))
    reporter.phase_start("all", None, 2)
    reporter.phase_start("a", "all", 3)
    reporter.phase_start("b", "all", 1)
    assert reporter.step_complete("a", 1)
    assert reporter.step_complete("unheard of", 0)
    reporter.phase_finish("a")
    reporter.phase_start("a", "b", 5)
    reporter.phase_finish("all")
    assert reporter.step_complete("a", 0)
    reporter.phase_finish("unheard of")
    assert seen == [[("all", 0, 2)], [("all", 0, 2), ("a", 0, 3)], [("all", 0, 2), ("b", 0, 1)],
                    [("all", 0, 2), ("a", 2, 3)], [("all", 0, 2), ("b", 0, 1), ("a", 0, 5)], [("b", 0, 1), ("a", 1, 5)]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error; not a fixture, as pytest puts another stream there before the test is called."""
    for name, value in (("TERM", "xterm"), ("COLUMNS", "120")):
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    return terminal


def test_a_bar_of_steps(monkeypatch: pytest.MonkeyPatch):
    terminal = _terminal(monkeypatch)
    with output.progress(3) as display:
        display.stage("building e")
        display.steps("library: all: [a], 37 of 214", 4, 6)  # brackets are no markup
    lines = [line for line in terminal.getvalue().splitlines() if "[a], 37 of 214" in line]
    assert "4/6" in lines[-1]
    assert "━" in lines[-1]
    assert "building e" in terminal.getvalue()
    assert "0/3" in terminal.getvalue()


def test_the_next_stage_begins_without_steps(monkeypatch: pytest.MonkeyPatch):
    terminal = _terminal(monkeypatch)
    with output.progress() as display:
        display.stage("building e")
        display.steps("all", 4, 6)
        terminal.truncate(0)
        display.stage("building f")
        time.sleep(0.3)  # longer than a line of before may still be shown
        terminal.truncate(0)
        time.sleep(0.3)
    shown = terminal.getvalue()
    assert "building f" in shown
    assert "4/6" not in shown
    assert "━" not in shown  # nobody knows how many stages there are


def test_a_build_on_a_terminal(calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From the library's report to the line."""
    terminal = _terminal(monkeypatch)
    folder = Path(shutil.copytree(calibrated, tmp_path / "bundle"))
    assert main(["build", str(folder), "--precision", "fp16", "--max-batch", "2"]) == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "building image.fp16.tensorrt_rtx.portable.engine" in shown
    assert re.search(r"tensorrt_rtx: Building engine.*━ \d/\d ", shown)
    assert "2/2" in shown


def test_what_is_told_of_phases():
    told = []

    class Display:
        def steps(self, *arguments: object) -> None:
            told.append(arguments)

    outer, inner = Phase("all", None, 4, 6), Phase("a", "all", 37, 214)
    for phases in ((outer,), (outer, Phase("b", "all", 0, 9), inner)):
        _tell(Display(), load_library("tensorrt_rtx"), phases)
    assert told == [("tensorrt_rtx: all", 4, 6), ("tensorrt_rtx: all: a, 37 of 214", 4, 6)]


def test_without_a_terminal(capsys: pytest.CaptureFixture[str]):
    with output.progress() as display:
        display.stage("building e")
        display.steps("all", 4, 6)
        display.advance()
    assert capsys.readouterr() == ("", "")


def test_signals_while_the_library_works():
    """It is told to stop, and waited for."""
    waiting, watch, finished = threading.main_thread(), Watch(), []

    def work() -> None:
        time.sleep(0.2)  # until it is waited for
        signal.pthread_kill(waiting.ident, signal.SIGINT)
        for _ in range(100):
            time.sleep(0.01 if not watch.stopped else 0)
        time.sleep(0.2)
        finished.append(watch.stopped)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for jobs in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            run_apart(work, watch)
    finally:
        signal.signal(signal.SIGINT, before)
    assert finished == [True]


def test_a_collection_at_the_worst_time(graph: Path):
    """While the library calls the logger, somebody else's object of it is garbage: its end would wait for the library's
    own lock.
    """
    code = """
import faulthandler, gc, sys, threading
from pathlib import Path
from dcformer_deploy.export.engine.build import BuildOptions, build_engine
from dcformer_deploy.runtime.engine_library import load_library
library = load_library("tensorrt_rtx")

class Garbage:
    def __init__(self):
        self.itself, self.held = self, library.module.Runtime(library.module.Logger())

heard = []

def collect(frame, event, _):
    if event == "call" and frame.f_code.co_name == "log":
        heard.append(gc.isenabled())
        if gc.isenabled():
            gc.collect()

gc.collect()
gc.set_threshold(1 << 30)
Garbage()
faulthandler.dump_traceback_later(60, exit=True)
threading.setprofile(collect)
build_engine(library, Path(sys.argv[1]), BuildOptions())
threading.setprofile(None)
assert heard and not any(heard), heard
assert gc.isenabled()
"""
    done = subprocess.run([sys.executable, "-c", code, str(graph)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_objects_made_and_let_go_by_several_threads():
    """With a logger for each, one thread soon waits for the library and the other for Python, and both for ever."""
    code = """
import faulthandler, sys, threading
from dcformer_deploy.runtime.engine_library import Log, load_library
library = load_library("tensorrt_rtx")
faulthandler.dump_traceback_later(60, exit=True)
sys.setswitchinterval(1e-6)
held = library.module.Runtime(Log(library).logger)

def make_and_let_go():
    for _ in range(5000):
        library.module.Runtime(Log(library).logger)

threads = [threading.Thread(target=make_and_let_go) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_errors_of_other_threads_are_not_this_ones():
    library = load_library("tensorrt_rtx")
    earlier = Log(library)

    def fail(words: str) -> None:
        threading.current_thread()  # as logging asks, which makes one of no thread of its own known to it
        earlier.logger.log(trt.ILogger.ERROR, words)
        earlier.logger.log(trt.ILogger.WARNING, f"not {words}")

    fail("mine,\nof before")
    log = Log(library)
    assert (log.last(), log.all()) == ("no reason given", "no reason given")
    other = threading.Thread(target=fail, args=("another's",))
    other.start()
    other.join()
    _thread.start_new_thread(fail, ("the library's own",))  # of which Python's threading knows nothing
    deadline = time.monotonic() + 20
    while log.last() == "no reason given":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    fail("mine")
    fail("mine")
    assert (log.last(), log.all()) == ("mine", "the library's own; mine")
    assert earlier.all() == "mine, of before; the library's own; mine"
    assert log.logger is earlier.logger


def test_the_parser_works_apart_too(graph: Path, monkeypatch: pytest.MonkeyPatch):
    """It calls back for every line of its log: there an exception of Ctrl-C would be lost."""
    threads = []
    real = build._parse
    monkeypatch.setattr(build, "_parse", lambda *arguments: threads.append(threading.current_thread()) or
                        real(*arguments))
    assert parser_refusal(load_library("tensorrt_rtx"), graph) is None
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()

"""What goes wrong outside of the program: full disks, interruptions, files that change."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dcformer_deploy.runtime import InputError, Model, load
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.errors import DiskFull
from dcformer_deploy.runtime.files import atomic_file
from dcformer_deploy.runtime.volume import nifti
from scans import write

#: Variables that say so.
_BUILD_MACHINE = ("CI", "TF_BUILD", "JENKINS_URL")
PROGRAM = [sys.executable, "-c", "from dcformer_deploy.runtime.cli.start import run; run()"]


@pytest.fixture(scope="module")
def scan(hounsfield: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("scan") / "s.nii.gz", hounsfield)


@pytest.fixture(scope="module")
def store(pristine_bundle: Path, scan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store") / "store"
    assert main(["embed", str(pristine_bundle), str(scan), "--out", str(out)]) == 0
    return out


def _environment(folder: Path) -> dict[str, str]:
    for name in ("tmp", "cache"):
        (folder / name).mkdir(exist_ok=True)
    return {**os.environ, "TMPDIR": str(folder / "tmp"), "XDG_CACHE_HOME": str(folder / "cache"), "HOME": str(folder)}


def _left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")
                  if path.relative_to(folder).parts[0] != "cache" and path != folder / "tmp")


@pytest.mark.parametrize(("command", "largest"), [
    (["embed", "BUNDLE", "SCAN", "--out", "e.npz"], 1000),
    (["embed", "BUNDLE", "SCAN", "--out", "new"], 1500),  # the description of the store fits, its first part does not
    (["embed", "BUNDLE", "SCAN", "--out", "new"], 100),
    (["embed-text", "BUNDLE", "Nodule.", "--out", "t.npz"], 1000),
    (["prepare", "BUNDLE", "SCAN", "--out", "new"], 5000),
    (["report", "BUNDLE", "SCAN", "--out", "r.html", "--no-occlusion"], 5000),
    (["search", "STORE", "Nodule.", "--bundle", "BUNDLE"], 1000),
    (["triton", "BUNDLE", "--out", "new", "--scans", "/data"], 100_000),
    (["phantom", "--n", "1", "--out", "new", "--voxel-mm", "6"], 5000),
])
def test_a_full_disk(command: list[str], largest: int, pristine_bundle: Path, scan: Path, store: Path, tmp_path: Path):
    """The system refuses to make any file larger than ``largest`` bytes, for libraries as for ourselves."""
    given = {"BUNDLE": pristine_bundle, "SCAN": scan, "STORE": store}
    words = [str(given.get(word, word)) for word in command]
    done = subprocess.run([*PROGRAM, *words], cwd=tmp_path, env=_environment(tmp_path), capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest)))
    lines = done.stderr.splitlines()
    assert done.returncode == 3, done
    assert [line for line in lines if not line.startswith("warning: ")] == lines[-1:], lines
    assert lines[-1].startswith("error: ")
    assert "cannot be written (" in lines[-1]
    assert "File too large); free some space" in lines[-1]
    assert set(_left(tmp_path)) <= ({"new"} if command[0] == "prepare" else set())
    assert {path.name for path in store.iterdir()} - {"search.lock"} == {"lock", "part-000000.parquet", "store.json"}


def test_other_errors_of_the_block_are_not_full_disks(tmp_path: Path):
    with pytest.raises(OSError, match="No such device"), atomic_file(tmp_path / "a"):
        raise OSError(19, "No such device")
    with pytest.raises(DiskFull, match=r"a: cannot be written \(No space left"), atomic_file(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_at_any_time(pristine_bundle: Path, scan: Path, tmp_path: Path):
    """From the imports of the program to the end; before, the interpreter itself would tell."""
    ends = set()
    for step in range(30):
        if step > 6 and 130 in ends:  # a machine that is busy takes longer to come to what can be told
            break
        folder = tmp_path / str(step)
        folder.mkdir()
        words = ["report", str(pristine_bundle), str(scan), "--out", "r.html"]
        # Whoever runs the tests in the background has it ignored, which would be inherited.
        running = subprocess.Popen([*PROGRAM, *words], cwd=folder, env=_environment(folder), stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        time.sleep(0.7 + 0.4 * step)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
        ends.add(running.returncode)
        assert running.returncode in (130, -signal.SIGINT, 0), (step, errors)
        # A warning of the scan, which is small, may stand before.
        told = [line for line in errors.splitlines() if not line.startswith("warning: ")]
        interrupted = ["error: interrupted; files that were being written have been removed"]
        assert told == (interrupted if running.returncode == 130 else [])
        assert _left(folder) in ([], ["r.html"])
        if _left(folder):  # whole, even if the program was interrupted between its name and its end
            assert (folder / "r.html").read_text().rstrip().endswith("</html>")
    assert 130 in ends


def test_ctrl_c_for_others(pristine_bundle: Path, scan: Path, tmp_path: Path):
    """A shell starts jobs in the background with SIGINT ignored; it stays so."""
    words = [*PROGRAM, "report", str(pristine_bundle), str(scan), "--out", "r.html", "--blocks", "32"]
    running = subprocess.Popen(words, cwd=tmp_path, env=_environment(tmp_path), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    while running.poll() is None:
        running.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert running.returncode == 0
    assert _left(tmp_path) == ["r.html"]


def test_a_scan_that_changes_while_it_is_read(model: Model, scan: Path, hounsfield: np.ndarray, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch):
    fill = nifti._fill
    for name, change in (("a.nii", lambda path: os.truncate(path, 4000)),
                         ("b.nii", lambda path: os.utime(path, (9, 9))),
                         ("c.nii.gz", lambda path: path.write_bytes(scan.read_bytes()[:-9])),
                         ("d.nii", lambda path: shutil.copy(path, path.with_name("new")).replace(path))):
        path = write(tmp_path / name, hounsfield)

        def change_then_fill(*arguments, path: Path = path, change=change):
            change(path)
            return fill(*arguments)

        monkeypatch.setattr(nifti, "_fill", change_then_fill)
        with pytest.raises(InputError, match=f"{name}: changed while it was read; wait until it is written"):
            model.embed_image(path)


def test_scans_that_are_cut_off_again_and_again(model: Model, hounsfield: np.ndarray, tmp_path: Path):
    """A file under another program's hand is refused or read whole; it never ends the process."""
    path = write(tmp_path / "a.nii", np.tile(hounsfield, (3, 3, 3)))
    whole, stop = path.read_bytes(), threading.Event()
    expected = model.embed_image(path)

    def disturb() -> None:
        while not stop.is_set():
            os.truncate(path, len(whole) // 3)
            path.write_bytes(whole)

    thread = threading.Thread(target=disturb)
    thread.start()
    refused = 0
    try:
        for _ in range(40):
            try:
                np.testing.assert_array_equal(model.embed_image(path), expected)
            except InputError:
                refused += 1
    finally:
        stop.set()
        thread.join()
    assert refused


def test_no_program_of_ours_calls_home(pristine_bundle: Path, scan: Path, tmp_path: Path):
    """Published builds of ONNX Runtime and OpenVINO do, and leave an identifier of the machine, unless prevented."""
    words = [*PROGRAM, "zeroshot", str(pristine_bundle), str(scan), "--json"]
    (home := tmp_path / "home").mkdir()
    # OpenVINO's does nothing on machines that build and test.
    environment = {name: value for name, value in _environment(tmp_path).items()
                   if "TELEMETRY" not in name and name not in _BUILD_MACHINE} | {"HOME": str(home)}
    for options in ([], ["--backend", "openvino"]):
        done = subprocess.run([*words, *options], cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert not [path for path in (tmp_path / "cache").rglob("*") if "deviceid" in path.name]
    done = subprocess.run([*PROGRAM, "doctor"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert list(home.iterdir()) == []


def test_sixteen_threads_read_and_score_files(pristine_bundle: Path, scans: Path):
    """The same answers as alone, from one model that all of them use for the first time."""
    paths = sorted(scans.iterdir())
    alone = load(pristine_bundle, threads=1)
    expected = {path: (alone.embed_image(path), alone.zero_shot(path).scores) for path in paths}
    shared, problems = load(pristine_bundle, threads=1), []
    barrier = threading.Barrier(16)

    def work(index: int) -> None:
        try:
            barrier.wait()
            for turn in range(3):
                path = paths[(index + turn) % len(paths)]
                np.testing.assert_array_equal(shared.embed_image(path), expected[path][0])
                assert shared.zero_shot(path).scores == expected[path][1]
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []

"""The same job on a real Ray of several processes on this machine: same rows; the death of a worker costs nothing."""

import json
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.store import Entry, read_store
from dcformer_deploy.runtime.store import Store as RealStore

pytest.importorskip("ray")
from dcformer_deploy.runtime import cluster as module

#: Ray counts them.
pytestmark = pytest.mark.usefixtures("all_cores")


def _workers() -> list[int]:
    """Processes of this session's Ray that hold a model, by their names."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"ray::MapWorker" in (folder / "cmdline").read_bytes() and _is_ours(folder):
                found.append(int(folder.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def _is_ours(process: Path) -> bool:
    """Ray's processes are told where their session's files lie; another test run has another one."""
    import ray

    node = ray._private.worker._global_node
    return node is not None and Path(node.get_session_dir_path()).name.encode() in (process / "environ").read_bytes() \
        + b"".join(link.readlink().as_posix().encode() for link in (process / "fd").iterdir())


def _reads(pid: int, path: Path) -> bool:
    try:
        return any(os.path.realpath(link) == str(path) for link in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def _run(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> dict:
    assert main(["embed", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_a_worker_is_killed_in_the_middle(pristine_bundle: Path, scans: Path, tmp_path: Path, capsys,
                                          monkeypatch: pytest.MonkeyPatch):
    """Two workers; one of them dies once rows have arrived: none is lost, none doubled, and all are right."""
    folder = tmp_path / "many"
    folder.mkdir()
    names = sorted(path.name for path in scans.iterdir())
    for index in range(60):
        name = names[index % 4]
        shutil.copy(scans / name, folder / f"{index}.{name}")
        with (folder / f"{index}.{name}").open("ab") as file:  # another content, the same scan
            file.write(b"" if name.endswith(".gz") else bytes([index]))
    (folder / "bad.nii.gz").write_bytes(b"no gzip")
    monkeypatch.setattr(module, "_TASK_SCANS", 1)
    appended: list[Entry] = []
    killed: list[int] = []

    def append(self: RealStore, entry: Entry) -> None:
        appended.append(entry)
        if len(appended) == 5:
            killed.append(_workers()[0])
            os.kill(killed[0], signal.SIGKILL)
        real(self, entry)

    real = RealStore.append
    monkeypatch.setattr(RealStore, "append", append)
    report = _run(capsys, 2, pristine_bundle, folder, "--out", tmp_path / "s", "--ray", "local", "--workers", "2")
    assert killed
    assert (report["embedded"], report["copied"], report["failed"], report["skipped"]) == (60, 0, 1, 0)
    assert len(appended) == len({entry.path for entry in appended}) == 61
    rows = {Path(row["path"]).name: row for row in read_store(tmp_path / "s").to_pylist()}
    assert len(rows) == 61
    assert "bad.nii.gz" in rows.pop("bad.nii.gz")["error"]
    assert main(["embed", str(pristine_bundle), str(scans), "--out", str(tmp_path / "plain")]) == 0
    plain = {Path(row["path"]).name: row for row in read_store(tmp_path / "plain").to_pylist()}
    for name, row in rows.items():
        np.testing.assert_allclose(row["embedding"], plain[name.split(".", 1)[1]]["embedding"], atol=2e-6)
    # Again: nothing to do but what failed and what has changed in its time; its content is known, and not computed.
    (folder / f"0.{names[0]}").touch()
    shutil.copy(scans / "b.nii.gz", folder / "bad.nii.gz")
    capsys.readouterr()
    report = _run(capsys, 0, pristine_bundle, folder, "--out", tmp_path / "s", "--ray", "local")
    assert (report["embedded"], report["copied"], report["skipped"]) == (0, 2, 59)


@pytest.mark.thorough
def test_a_scan_that_ends_every_worker_is_left_out(pristine_bundle: Path, scans: Path, tmp_path: Path, capsys):
    """Whoever has it open is killed. The others of its task are embedded all the same."""
    deadly = tmp_path / "deadly.nii.gz"
    with deadly.open("wb") as file:
        file.truncate(8 << 30)  # seconds to read, nothing on disk
    deaths: list[int] = []
    ended = threading.Event()

    def kill_readers() -> None:
        while not ended.wait(0.02):
            for pid in _workers():
                if _reads(pid, deadly):
                    os.kill(pid, signal.SIGKILL)
                    deaths.append(pid)
                    while Path(f"/proc/{pid}/fd").exists() and _reads(pid, deadly):
                        time.sleep(0.02)

    thread = threading.Thread(target=kill_readers)
    thread.start()
    try:
        report = _run(capsys, 2, pristine_bundle, *sorted(scans.iterdir()), deadly, "--out", tmp_path / "s", "--ray",
                      "local", "--workers", "1")
    finally:
        ended.set()
        thread.join()
    assert (report["embedded"], report["failed"]) == (4, 1)
    assert len(deaths) == 3  # with the others of its task, then alone, twice
    rows = {Path(row["path"]).name: row for row in read_store(tmp_path / "s").to_pylist()}
    assert "2 workers ended over this scan" in rows["deadly.nii.gz"]["error"]


@pytest.mark.thorough
def test_errors_of_a_worker_arrive(bundle_copy: Path, scans: Path, tmp_path: Path, capsys,
                                   monkeypatch: pytest.MonkeyPatch):
    """The bundle is another one by the time that workers load it."""
    real = module.Cluster.run

    def run(self: module.Cluster, items: object, spec: module.ModelSpec, *more: object) -> object:
        return real(self, items, module.replace(spec, digest="0" * 64), *more)  # type: ignore[arg-type]

    monkeypatch.setattr(module.Cluster, "run", run)
    assert main(["embed", str(bundle_copy), str(scans), "--out", str(tmp_path / "s"), "--ray", "local"]) == 2
    assert "another bundle on " + socket.gethostname() in capsys.readouterr().err


@pytest.mark.parametrize(("options", "code", "message"), [
    (("--ray", "local", "--device", "cuda", "--backend", "tensorrt"), 3, "no GPU in this cluster"),
    (("--ray", "local", "--workers", "999"), 3, "not enough for 999 workers of 1 CPUs"),
    (("--ray", "nonsense"), 2, "no Ray cluster answers there (not HOST:PORT)"),
    (("--ray", "127.0.0.1:9"), 2, "no Ray cluster answers there"),
    (("--workers", "2"), 2, "--workers: only with --ray"),
])
def test_refused_before_anything_is_written(pristine_bundle: Path, scans: Path, tmp_path: Path, capsys,
                                            options: tuple[str, ...], code: int, message: str):
    assert main(["embed", str(pristine_bundle), str(scans), "--out", str(tmp_path / "s"), *options]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("cpus", "gpus", "device", "given", "expected"), [
    (16, 1, "cuda", {}, (1, 16, 1, 15, 1)), (32, 4, "cuda", {}, (4, 8, 1, 7, 1)), (8, 0, "cpu", {}, (9, 1, 0, 1, 1)),
    (8, 0, "cpu", {"threads": 4}, (2, 4, 0, 4, 1)), (8, 0, "cpu", {"threads": 4, "readers": 2}, (2, 4, 0, 2, 2)),
    (8, 0, "cpu", {"workers": 3}, (3, 1, 0, 1, 1)),
])
def test_plans(cpus: int, gpus: int, device: str, given: dict, expected: tuple[int, ...],
               monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.ray, "nodes", lambda: [
        {"Alive": True, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}},
        {"Alive": True, "Resources": {"CPU": 1.0}}, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}])
    options = {"workers": None, "readers": None, "threads": None, **given}
    found = module.Cluster("auto").plan(device, **options, batch=8)
    assert (found.count, found.cpus, found.gpus, found.settings.readers, found.settings.threads) == expected

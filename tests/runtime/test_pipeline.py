"""Many scans: the answers of one at a time, in bounded memory, gone on with after any end, also the hardest."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import install, kernels_on_host

from dcformer_deploy.runtime import Model, load
from dcformer_deploy.runtime.backends import Options, sampler
from dcformer_deploy.runtime.bundle import open_bundle
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.embedding_job import EmbeddingJob
from dcformer_deploy.runtime.inputs import Item
from dcformer_deploy.runtime.pipeline import Settings
from dcformer_deploy.runtime.store import Identity, Store, read_store


@pytest.fixture
def folder(scans: Path, tmp_path: Path) -> Path:
    """Four scans, one of them twice, one that is none."""
    out = Path(shutil.copytree(scans, tmp_path / "scans"))
    shutil.copy(out / "a.nii.gz", out / "e.nii.gz")
    (out / "f.nii.gz").write_bytes(b"no gzip")
    return out


def _run(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> dict:
    assert main(["embed", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def _counts(report: dict) -> tuple[int, ...]:
    return tuple(report[name] for name in ("embedded", "copied", "failed", "skipped"))


@pytest.mark.parametrize("readers", [1, 3])
def test_rows_are_the_answers_of_one_scan_at_a_time(pristine_bundle: Path, folder: Path, tmp_path: Path, capsys,
                                                    readers: int):
    store = tmp_path / "s"
    report = _run(capsys, 2, pristine_bundle, folder, "--out", store, "--readers", readers)
    assert sum(_counts(report)) == 6
    assert report["failed"] == 1
    assert {stage["name"] for stage in report["stages"]} == {"reading", "inference", "writing"}
    assert all(0 <= stage["busy"] <= 1.01 for stage in report["stages"])
    model, table = load(pristine_bundle), read_store(store)
    rows = {Path(row["path"]).name: row for row in table.to_pylist()}
    assert "f.nii.gz" in rows["f.nii.gz"]["error"]
    for path in sorted(folder.iterdir())[:-1]:
        row = rows[path.name]
        np.testing.assert_allclose(row["embedding"], model.embed_image(path), atol=2e-6)
        np.testing.assert_allclose(row["scores"], list(model.zero_shot(path).scores.values()), atol=2e-6)
        assert (row["orientation"], row["bytes"]) == ("LPS", path.stat().st_size)
        assert len(row["shape_hwd"]) == len(row["spacing_hwd_mm"]) == 3
    assert json.loads(table.schema.metadata[b"dcformer"])["results_sha256"] == model.manifest.results_digest("fp32")


@pytest.mark.parametrize("together", [True, False])
def test_a_scan_whose_embedding_is_not_finite_is_a_row(model: Model, folder: Path, tmp_path: Path, together: bool,
                                                       monkeypatch: pytest.MonkeyPatch):
    """It neither ends the run nor takes those along that share its batch."""
    bad = model.prepare(folder / "c.nii").feeds
    graph = model._graph("image")
    run = graph.run

    def overflow(feeds, names):
        arrays = run(feeds, names)
        for index in range(len(arrays[0])):
            if all(np.array_equal(feeds[name][index], bad[name][0]) for name in bad):
                arrays[0][index] = np.nan
        return arrays

    monkeypatch.setattr(graph, "run", overflow)
    identity = Identity(model.results_digest, "nano", "fp32", 512, model.manifest.zero_shot.classes, {})
    items = [Item(path) for path in sorted(folder.iterdir())[:4]]
    with Store(tmp_path / "s", identity) as store:
        settings = Settings(2, 1, together=True) if together else Settings(1, 1, 4, 8)
        report = EmbeddingJob(store).run(model, settings, items)
    assert (report.embedded, report.failed) == (3, 1)
    rows = {Path(row["path"]).name: row["error"] for row in read_store(tmp_path / "s").to_pylist()}
    assert {name for name, error in rows.items() if error} == {"c.nii"}
    assert "finite" in rows["c.nii"]


def test_again_only_what_is_new_or_changed(pristine_bundle: Path, folder: Path, tmp_path: Path, capsys):
    arguments = (pristine_bundle, folder, "--out", tmp_path / "s", "--readers", 1)
    assert _counts(_run(capsys, 2, *arguments))[2:] == (1, 0)
    again = _run(capsys, 2, *arguments)  # a failure stays one until its file is mended
    assert (_counts(again), again["failed_before"]) == ((0, 0, 0, 5), 1)
    assert _counts(_run(capsys, 2, *arguments, "--retry")) == (0, 0, 1, 5)
    shutil.copy(folder / "b.nii.gz", folder / "f.nii.gz")  # mended: the content of another, which is not computed again
    assert _counts(_run(capsys, 0, *arguments)) == (0, 1, 0, 5)
    (folder / "a.nii.gz").touch()  # not changed but in its time
    assert _counts(_run(capsys, 0, *arguments)) == (0, 1, 0, 5)
    rows = {Path(row["path"]).name: row for row in read_store(tmp_path / "s").to_pylist()}
    assert len(rows) == 6
    assert rows["f.nii.gz"]["embedding"] == rows["b.nii.gz"]["embedding"]
    assert main(["embed", str(pristine_bundle), str(folder), "--out", str(tmp_path / "s"), "--slope", "2"]) == 2
    assert "a store of other results: its options is {}" in capsys.readouterr().err


def test_a_store_outlives_the_calibration_of_its_bundle(pristine_bundle: Path, calibrated: Path, scans: Path,
                                                        tmp_path: Path, capsys):
    digests = [{name: open_bundle(bundle).manifest.results_digest(name) for name in ("fp32", "fp16", "int8")}
               for bundle in (pristine_bundle, calibrated)]
    assert len(set(digests[0].values())) == 1  # there is nothing but fp32
    assert len(set(digests[1].values())) == 3
    assert digests[0]["fp32"] == digests[1]["fp32"] != open_bundle(calibrated).manifest.digest
    # openvino computes fp32 graphs in bfloat16; those that were added are for GPUs.
    assert {Model(open_bundle(bundle), Options(backend="openvino", precision="bf16")).results_digest
            for bundle in (pristine_bundle, calibrated)} == {digests[0]["fp32"]}
    one = scans / "a.nii.gz"
    assert _counts(_run(capsys, 0, pristine_bundle, one, "--out", tmp_path / "s"))[0] == 1
    assert _counts(_run(capsys, 0, calibrated, one, "--out", tmp_path / "s")) == (0, 0, 0, 1)
    assert main(["search", str(tmp_path / "s"), "Emphysema.", "--bundle", str(calibrated)]) == 0
    assert main(["embed", str(calibrated), str(one), "--out", str(tmp_path / "s"), "--precision", "fp16"]) == 2
    assert "a store of other results: its precision is 'fp32', not 'fp16'" in capsys.readouterr().err


def test_names_that_are_no_text(pristine_bundle: Path, scans: Path, tmp_path: Path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    odd = folder / os.fsdecode(b"caf\xe9 \xff.nii.gz")
    shutil.copy(scans / "b.nii.gz", odd)
    arguments = (pristine_bundle, folder, "--out", tmp_path / "s")
    assert _counts(_run(capsys, 0, *arguments)) == (1, 0, 0, 0)
    assert _counts(_run(capsys, 0, *arguments)) == (0, 0, 0, 1)
    (row,) = read_store(tmp_path / "s").to_pylist()
    assert row["path"].endswith(r"caf\udce9 \udcff.nii.gz")
    assert main(["search", str(tmp_path / "s"), str(odd)]) == 0
    assert main(["prepare", str(pristine_bundle), str(folder), "--out", str(tmp_path / "p")]) == 0


def test_what_a_table_says_is_not_taken_for_other_files(pristine_bundle: Path, scans: Path, tmp_path: Path, capsys):
    """The same content with a table, without one, and with a corrected one."""
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
        shutil.copy(scans / "b.nii.gz", tmp_path / name / "b.nii.gz")
    table = tmp_path / "with" / "metadata.csv"
    table.write_text("VolumeName,XYSpacing,ZSpacing,RescaleSlope,RescaleIntercept\nb.nii.gz,\"[0.5, 0.5]\",2.5,1,0\n")
    store = tmp_path / "s"
    assert _counts(_run(capsys, 0, pristine_bundle, tmp_path / "with", "--out", store)) == (1, 0, 0, 0)
    assert _counts(_run(capsys, 0, pristine_bundle, tmp_path / "without", "--out", store)) == (1, 0, 0, 0)
    assert _counts(_run(capsys, 0, pristine_bundle, tmp_path / "with", "--out", store)) == (0, 0, 0, 1)
    table.write_text(table.read_text().replace("2.5", "1.5"))
    assert _counts(_run(capsys, 0, pristine_bundle, tmp_path / "with", "--out", store)) == (1, 0, 0, 0)
    spacings = {Path(row["path"]).parent.name: row["spacing_hwd_mm"] for row in read_store(store).to_pylist()}
    assert spacings == {"with": [0.5, 0.5, 1.5], "without": pytest.approx([0.8, 0.9, 1.7], abs=0.11)}


def test_on_a_gpu(built: Path, scans: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """As many at once as the engine takes; scans that were made on the GPU one by one; the same answers."""
    library = install(built, monkeypatch)
    library.driver.kernels = kernels_on_host(tmp_path)
    monkeypatch.setattr(sampler, "compile_kernel", lambda capability, nvrtc: b"machine code")
    found = []
    for where in ("cpu", "gpu"):
        store = tmp_path / where
        report = _run(capsys, 0, built, scans, "--out", store, "--backend", "tensorrt", "--device", "cuda",
                      "--precision", "fp16", "--preprocess", where)
        assert report["embedded"] == 4
        assert {stage["name"]: stage["workers"] for stage in report["stages"]}["inference"] == 2
        found.append({row["path"]: row["embedding"] for row in read_store(store).to_pylist()})
    assert found[0] == found[1]
    assert main(["embed", str(built), str(scans), "--out", str(tmp_path / "s"), "--backend", "tensorrt", "--device",
                 "cuda", "--precision", "fp16", "--batch", "4"]) == 2
    assert "--batch 4: the engine was built for at most 3; build with a larger --max-batch" in capsys.readouterr().err


def _copies(scan: Path, folder: Path, count: int) -> Path:
    """The same scan under as many names, each with another content: an empty gzip member behind the first."""
    folder.mkdir()
    content = scan.read_bytes()
    for index in range(count):
        (folder / f"{index}.nii.gz").write_bytes(content + gzip.compress(b"", mtime=index))
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
def test_peak_memory_does_not_grow_with_the_number_of_scans(pristine_bundle: Path, scans: Path, tmp_path: Path):
    """Ten times more scans; if what is read of each were kept, 1.5 MB, that would be 270 MB more."""
    peaks = []
    script = ("import resource, sys; from dcformer_deploy.runtime.cli.app import main; code = main(sys.argv[1:]); "
              "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)")
    for count in (20, 200):
        folder = _copies(scans / "b.nii.gz", tmp_path / f"in-{count}", count)
        done = subprocess.run([sys.executable, "-c", script, "embed", pristine_bundle, folder, "--out",
                               tmp_path / f"out-{count}"], check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
    assert len(read_store(tmp_path / "out-200")) == 200
    assert peaks[1] < peaks[0] + 30, peaks


@pytest.mark.usefixtures("all_cores")
def test_killed_at_any_time(pristine_bundle: Path, scans: Path, tmp_path: Path):
    """kill -9, again and again at random: no part is ever damaged, nothing finished is lost, and it comes to an end."""
    folder, store = _copies(scans / "a.nii.gz", tmp_path / "many", 40), tmp_path / "s"
    script = ("import sys; from dcformer_deploy.runtime.store import store; store.PART_ROWS = 3; "
              "from dcformer_deploy.runtime.cli.app import main; sys.exit(main(sys.argv[1:]))")
    command = [sys.executable, "-c", script, "embed", str(pristine_bundle), str(folder), "--out", str(store)]
    choose, finished = random.Random(0), 0
    for _ in range(12):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                process.wait(choose.uniform(0.6, 1.6))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
        if store.exists():
            now = len(read_store(store))
            assert now >= finished
            finished = now
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    rows = read_store(store).to_pylist()
    assert {Path(row["path"]).name for row in rows} == {f"{index}.nii.gz" for index in range(40)}
    assert all(row["error"] is None and row["embedding"] == rows[0]["embedding"] for row in rows)
    assert not list(store.glob("*.tmp")) and not list(store.glob("*.damaged"))

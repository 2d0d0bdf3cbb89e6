"""The program as a user meets it: what goes to which stream, exit codes, one clear line per error."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from commands import refuse, run

from dcformer_deploy.runtime import Model
from dcformer_deploy.runtime.cli.app import COMMANDS
from scans import LPS_AFFINE, write

DCFORMER = Path(sys.executable).parent / "dcformer"


# ---------------------------------------------------------------- the good way


def test_subprocess_prints_only_json(pristine_bundle: Path, ct: Path, model: Model):
    """The real program, once: console script, streams and exit code."""
    done = subprocess.run([DCFORMER, "zeroshot", pristine_bundle, ct, "--json"], capture_output=True, text=True,
                          check=True)
    (row,) = json.loads(done.stdout)
    assert set(row) == {"volume", "scores", "timings_ms"}
    assert row["volume"] == str(ct)
    assert row["scores"] == pytest.approx(model.zero_shot(ct).scores, abs=1e-6)
    assert done.stderr == ""


def test_zeroshot_table(capsys, pristine_bundle: Path, ct: Path, model: Model):
    code, out, _ = run(capsys, "zeroshot", pristine_bundle, ct)
    assert code == 0
    for name, score in model.zero_shot(ct).scores.items():
        assert re.search(rf"{re.escape(name)} .* {score:.4f}", out)


def test_zeroshot_with_classes_from_a_file(capsys, pristine_bundle: Path, ct: Path, tmp_path: Path):
    (tmp_path / "classes.txt").write_text("Lung nodule\n\n  Fracture \n")
    code, out, _ = run(capsys, "zeroshot", pristine_bundle, ct, "--json", "--classes", tmp_path / "classes.txt")
    assert code == 0 and list(json.loads(out)[0]["scores"]) == ["Lung nodule", "Fracture"]


def test_keep_going(capsys, pristine_bundle: Path, ct: Path, tmp_path: Path):
    bad = tmp_path / "bad.nii.gz"
    refuse(capsys, "bad.nii.gz: no such scan", "zeroshot", pristine_bundle, ct, bad, "--json")
    code, out, err = run(capsys, "zeroshot", pristine_bundle, bad, ct, "--json", "--keep-going")
    rows = json.loads(out)
    assert code == 2 and "no such scan" in rows[0]["error"] and len(rows[1]["scores"]) == 18
    assert err.count("error:") == 1


def test_embed(capsys, pristine_bundle: Path, ct: Path, model: Model, tmp_path: Path):
    out = tmp_path / "new" / "e.npz"
    assert run(capsys, "embed", pristine_bundle, ct, ct, "--out", out)[0] == 0
    stored = np.load(out)
    np.testing.assert_array_equal(stored["embeddings"], np.stack([model.embed_image(ct)] * 2))
    assert stored["volumes"].tolist() == [str(ct)] * 2
    assert [path.name for path in out.parent.iterdir()] == ["e.npz"]


def test_failed_embed_leaves_the_old_file(capsys, pristine_bundle: Path, ct: Path, tmp_path: Path):
    out = tmp_path / "e.npz"
    out.write_text("old")
    refuse(capsys, "no such scan", "embed", pristine_bundle, ct, tmp_path / "none.nii", "--out", out)
    refuse(capsys, "no such scan|none of the 1 scans", "embed", pristine_bundle, tmp_path / "none.nii", "--out", out)
    assert out.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["e.npz"]
    code, _, err = run(capsys, "embed", pristine_bundle, tmp_path / "none.nii", ct, "--out", out, "--keep-going")
    assert code == 2 and "1 embeddings of 512; 1 scans failed" in err
    assert np.load(out)["embeddings"].shape == (1, 512)


def test_embed_text(capsys, pristine_bundle: Path, model: Model, tmp_path: Path):
    texts = ["Cardiomegaly is present.", "No finding."]
    code, out, _ = run(capsys, "embed-text", pristine_bundle, *texts, "--json", "--out", tmp_path / "t.npz")
    rows = json.loads(out)
    assert code == 0 and [row["text"] for row in rows] == texts
    np.testing.assert_allclose([row["embedding"] for row in rows], model.embed_text(texts), atol=1e-6)
    np.testing.assert_allclose(np.load(tmp_path / "t.npz")["embeddings"], model.embed_text(texts), atol=1e-6)
    assert "1.000" in run(capsys, "embed-text", pristine_bundle, *texts)[1]


def test_long_text_warns_with_the_count(capsys, pristine_bundle: Path):
    code, _, err = run(capsys, "embed-text", pristine_bundle, "lung " * 600, "--json")
    assert code == 0 and err == "warning: text 1 has 602 tokens; only the first 512 are read (90 dropped)\n"


def test_encoders(capsys):
    rows = {row["name"]: row for row in json.loads(run(capsys, "encoders", "--json")[1])}
    nano = rows["dcformer-nano"]
    assert set(nano) == {"name", "input_size", "params_m", "includes_projection", "gflops", "published_params_m",
                         "published_gflops", "published_f1"}
    assert nano["gflops"] == pytest.approx(34.21, abs=0.005) and nano["input_size"] == 512
    # Of the published table: CT-CLIP's encoder, which counts its projection, has 101.1 M parameters.
    assert rows["ctvit"]["includes_projection"] and rows["ctvit"]["params_m"] == pytest.approx(101.1, abs=0.05)
    assert rows["dcformer-large"]["published_gflops"] is None
    table = run(capsys, "encoders")[1]
    assert all(name in table for name in rows)


def test_inspect(capsys, pristine_bundle: Path):
    code, out, _ = run(capsys, "inspect", pristine_bundle)
    assert code == 0 and "dcformer-nano" in out and "intact: every file matches its sha256" in out
    assert json.loads(run(capsys, "inspect", pristine_bundle, "--json")[1])["encoder"] == "dcformer-nano"


def test_version(capsys):
    assert run(capsys, "--version")[1].startswith("dcformer, version 0.")
    done = subprocess.run([sys.executable, "-m", "dcformer_deploy.runtime.cli", "--version"], capture_output=True,
                          text=True)
    assert done.stdout.startswith("dcformer, version 0.")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(capsys, name: str):
    code, out, err = run(capsys, name, "--help")
    assert code == 0 and out.startswith(f"Usage: dcformer {name}") and err == ""


# ---------------------------------------------------------------- bad input


def test_usage_errors(capsys, pristine_bundle: Path):
    refuse(capsys, "no command 'zerosht'; did you mean 'zeroshot'", "zerosht")
    refuse(capsys, "--fast", "zeroshot", pristine_bundle, "a.nii", "--fast")
    refuse(capsys, "'fp61' is not one of .*'int8'; did you mean 'fp16'", "zeroshot", pristine_bundle, "a.nii",
           "--precision", "fp61")
    refuse(capsys, "SCAN", "zeroshot", pristine_bundle)
    refuse(capsys, "no such bundle", "zeroshot", "/nowhere", "a.nii")
    refuse(capsys, "--out e.txt: expected FILE.npz, or", "embed", pristine_bundle, "a.nii", "--out", "e.txt")


@pytest.mark.parametrize("make", [
    lambda folder, hu: folder / "none.nii.gz",
    lambda folder, hu: _text(folder / "a.nii.gz"),
    lambda folder, hu: _truncated(write(folder / "a.nii.gz", hu)),
    lambda folder, hu: write(folder / "a.nii.gz", hu[0]),
    lambda folder, hu: write(folder / "a.nii.gz", np.stack([hu, hu], axis=-1)),
    lambda folder, hu: write(folder / "a.nii", hu, pixdim=[1, 0.9, 0.0, 1.7, 0, 0, 0, 0]),
    lambda folder, hu: write(folder / "a.nii", hu, pixdim=[1, 0.9, -0.8, 1.7, 0, 0, 0, 0]),
    lambda folder, hu: write(folder / "a.nii", hu, pixdim=[1, 0.9, float("nan"), 1.7, 0, 0, 0, 0]),
    lambda folder, hu: write(folder / "a.nii.gz", np.where(hu > 0, np.nan, hu)),
    lambda folder, hu: write(folder / "a.nii.gz", np.where(hu > 0, np.inf, hu)),
    lambda folder, hu: write(folder / "a.nii.gz", (hu + 1024).astype(np.int16)),
    lambda folder, hu: write(folder / "a.nii.gz", (hu - 1024).astype(np.int16)),
    lambda folder, hu: write(folder / "a.nii", hu, dim=[3, 32767, 32767, 100, 1, 1, 1, 1]),
    lambda folder, hu: _colour(folder / "a.nii.gz"),
    lambda folder, hu: write(folder / "a.nii.gz", hu, np.eye(4)),
], ids=["missing", "text", "truncated", "2-D", "4-D", "zero spacing", "negative spacing", "NaN spacing", "NaN",
        "infinity", "not rescaled", "rescaled twice", "huge", "RGB", "blank header"])
def test_bad_scans(capsys, make, hounsfield: np.ndarray, pristine_bundle: Path, tmp_path: Path):
    scan = make(tmp_path, hounsfield)
    before = sorted(tmp_path.iterdir())
    refuse(capsys, re.escape(str(scan)), "zeroshot", pristine_bundle, scan, "--json")
    refuse(capsys, re.escape(str(scan)), "embed", pristine_bundle, scan, "--out", tmp_path / "e.npz")
    assert sorted(tmp_path.iterdir()) == before


def _text(path: Path) -> Path:
    path.write_text("I am no image")
    return path


def _truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-500])
    return path


def _colour(path: Path) -> Path:
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]), LPS_AFFINE), path)
    return path


@pytest.mark.parametrize("fields", [
    {"pixdim": [1, 0.9, 0.0, 1.7, 0, 0, 0, 0]}, {"pixdim": [1, 0.9, -0.8, 1.7, 0, 0, 0, 0]}, {"vox_offset": 1e20},
], ids=["zero spacing", "negative spacing", "offset"])
def test_libraries_add_nothing_to_the_line(fields, hounsfield: np.ndarray, pristine_bundle: Path, tmp_path: Path):
    """In a process of its own: pytest's log capture would hide what nibabel logs."""
    scan = write(tmp_path / "a.nii", hounsfield, **fields)
    done = subprocess.run([DCFORMER, "zeroshot", pristine_bundle, scan], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: "), done.stderr


@pytest.mark.parametrize(("command", "code"), [
    ("{dcformer} inspect {bundle} | true; exit ${{PIPESTATUS[0]}}", 141),
    ("{dcformer} zeroshot {bundle} none.nii 2>&-", 2),
    ("{dcformer} zeroshot {bundle} none.nii 2>/dev/full", 2),
    ("{dcformer} inspect {bundle} >&-", 0),
    ("{dcformer} inspect {bundle} >/dev/full 2>&-", 3),
    ("{dcformer} embed-text {bundle} $'\\xff' --json", 2),
    ("{dcformer}", 0),
])
def test_odd_shells(command: str, code: int, pristine_bundle: Path):
    done = subprocess.run(["bash", "-c", command.format(dcformer=DCFORMER, bundle=pristine_bundle)],
                          capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 1


def test_many_texts(capsys, pristine_bundle: Path):
    code, out, _ = run(capsys, "embed-text", pristine_bundle, *(f"lung {i}" for i in range(20)))
    assert code == 0 and "lung 19" in out and "nearest" in out


def test_control_characters_are_shown_not_obeyed(capsys, pristine_bundle: Path):
    refuse(capsys, r"a\\x1b\[31mb.nii", "zeroshot", pristine_bundle, "a\x1b[31mb.nii")


def test_names_that_the_system_refuses(capsys, pristine_bundle: Path):
    refuse(capsys, "cannot be read as a scan", "zeroshot", pristine_bundle, "x" * 300 + ".nii")
    refuse(capsys, "1 to 1024|1<=x<=1024", "zeroshot", pristine_bundle, "a.nii", "--threads", 100_000)


def test_brackets_in_names_are_no_markup(capsys, pristine_bundle: Path, ct: Path, tmp_path: Path):
    (tmp_path / "classes.txt").write_text("Nodule [/left]\n[left] nodule\n")
    scan = tmp_path / "scan[left].nii.gz"
    scan.write_bytes(ct.read_bytes())
    code, out, _ = run(capsys, "zeroshot", pristine_bundle, scan, "--classes", tmp_path / "classes.txt")
    assert code == 0 and "Nodule [/left]" in out and "[left] nodule" in out and "scan[left].nii.gz" in out


def test_names_that_are_no_text(pristine_bundle: Path, ct: Path, tmp_path: Path):
    scan = os.fsencode(tmp_path) + b"/scan\xff.nii.gz"
    shutil.copy(ct, scan)
    for extra in ([], ["--json"]):
        done = subprocess.run([DCFORMER, "zeroshot", pristine_bundle, scan, *extra], capture_output=True, check=False)
        assert done.returncode == 0 and b"scan" in done.stdout, done.stderr


def test_bench_with_another_checkpoint(capsys, pristine_bundle: Path, tmp_path: Path):
    other = tmp_path / "other.pth"
    other.write_bytes(b"x")
    refuse(capsys, r"other.pth: sha256 .* was made from nano.pth", "bench", pristine_bundle, "--checkpoint", other)


def test_constant_scan_is_allowed(capsys, pristine_bundle: Path, tmp_path: Path):
    scan = write(tmp_path / "a.nii.gz", np.zeros((30, 30, 30), np.int16))
    code, out, err = run(capsys, "zeroshot", pristine_bundle, scan, "--json")
    assert code == 0 and all(0 < score < 1 for score in json.loads(out)[0]["scores"].values())
    assert f"warning: {scan}: all voxels are 0: nothing is to be seen in it" in err


def test_scan_options(capsys, pristine_bundle: Path, hounsfield: np.ndarray, model: Model, tmp_path: Path):
    scan = write(tmp_path / "a.nii.gz", (hounsfield + 1024).astype(np.int16), np.eye(4))
    code, _, err = run(capsys, "embed", pristine_bundle, scan, "--out", tmp_path / "e.npz", "--spacing", 2, 2.5, 3,
                       "--slope", 1, "--intercept", -1024, "--orientation", "as-stored")
    assert code == 0, err
    expected = model.embed_image(scan, spacing=(2, 2.5, 3), slope=1, intercept=-1024)
    np.testing.assert_array_equal(np.load(tmp_path / "e.npz")["embeddings"][0], expected)


def test_edited_bundle(capsys, bundle_copy: Path, ct: Path):
    with (bundle_copy / "image.fp32.onnx").open("r+b") as file:
        file.seek(1000)
        file.write(b"x")
    refuse(capsys, "sha256 is", "zeroshot", bundle_copy, ct)
    refuse(capsys, "sha256 is", "inspect", bundle_copy)


def test_graph_that_the_library_refuses(capsys, bundle_copy: Path, ct: Path):
    for path in bundle_copy.glob("image.*.onnx"):
        path.write_bytes(b"\0" * path.stat().st_size)
    refuse(capsys, "onnxruntime .* refuses it", "zeroshot", bundle_copy, ct, "--no-verify")


@pytest.mark.parametrize(("content", "message"), [
    ("", "no class name in it"), ("A\nB\nA\n", "class 'A' stands there 2 times"), (b"\xff\xfe\x00x", "not UTF-8"),
])
def test_unusable_classes_files(capsys, pristine_bundle: Path, ct: Path, tmp_path: Path, content, message: str):
    path = tmp_path / "classes.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(capsys, message, "zeroshot", pristine_bundle, ct, "--classes", path)


def test_device_that_is_not_there_exits_with_three(capsys, pristine_bundle: Path, ct: Path):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    refuse(capsys, "no CUDAExecutionProvider", "zeroshot", pristine_bundle, ct, "--device", "cuda", code=3)


def test_bundle_without_classifier(capsys, pristine_bundle: Path, ct: Path):
    refuse(capsys, "no classifier in this bundle", "classify", pristine_bundle, ct)


def test_interruption(capsys, pristine_bundle: Path, ct: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def interrupt(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "embed_image", interrupt)
    refuse(capsys, "interrupted", "embed", pristine_bundle, ct, "--out", tmp_path / "e.npz", code=130)
    assert list(tmp_path.iterdir()) == []
